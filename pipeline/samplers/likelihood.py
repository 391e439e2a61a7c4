r"""The likelihood: :math:`\log p(x \mid u)` by the probability-flow equation.

In :math:`y = x_t / \alpha_t` and the noise ratio s the equation is :math:`dy / d\log s = y - D`,
and along it the density changes by the divergence,

.. math:: \frac{d \log p_s(y_s)}{d \log s} = - \text{tr} \, \frac{\partial (y - D)}{\partial y}
    = \text{tr} \, J - d, \quad J = \frac{\partial D}{\partial y}

with d the number of coordinates. J runs from I, where noise is small, to 0, where it is large.

References:
    | Song et al., 2021, equation (39); https://arxiv.org/abs/2011.13456
    | Grathwohl et al., 2019, for the estimated trace; https://arxiv.org/abs/1810.01367
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.condition import U
from pipeline.denoisers import Denoiser
from pipeline.noise import Noise
from pipeline.samplers.base import State
from pipeline.samplers.diffusion import Heun

__all__ = ["Likelihood"]


class Likelihood:
    r"""The log-likelihood of x under the flow that a denoiser defines.

    .. math:: \log p(x \mid u) = \log N\Big( \frac{x_1}{\sigma_1}; 0, I \Big) - d \log s_0
        - \int_{s_0}^{s_1} \text{tr} \, J(y_s, s) \, d \log s, \quad y_{s_0} = x

    The path :math:`y_s` is that of `Heun` from the last time to the first, the integral the
    trapezoidal rule on its grid in :math:`\log s`: an error of order 2 in the step.

    As the steps grow it is the density, normalised for every D, of what `Heun` draws before its
    last D. With few steps it is too high, so that bits come out too few: on a mixture on the line
    it integrates to 1.006 to 1.013 with 64 steps and to 1.001 to 1.003 with 128, depending on the
    schedule, and to a quarter of the excess with twice the steps. Where D is
    the conditional mean that is the law of :math:`x + s_0 n`, x with the schedule's least noise,
    but for the start: :math:`N(0, s_1^2 I)` instead of the law of :math:`x + s_1 n`, which shifts
    :math:`\log p` by a random number of standard deviation :math:`|E x| / s_1` about. Where D is
    guided it is a density still, not the one that guidance aims at.

    The trace of J is exact, from d products with J, or Hutchinson's estimate,

    .. math:: \text{tr} \, J = E \, v^T J v, \quad v_i = \pm 1 \text{ with equal probability}

    whose probes v are fresh at every time, so that their errors average out along the path. The
    estimate of :math:`\log p` is unbiased with respect to the exact trace's.

    References:
        | Hutchinson, 1990; https://doi.org/10.1080/03610919008812866

    Arguments:
        steps: The number N of times, at least 2: N traces, and 3 N − 2 evaluations. On a mixture
            in the plane 128 left a mean error of 0.004 nats a coordinate, and 64 four times that.
        probes: The number of probes v at each time, at least 1, or `None` for the exact trace.
        rho: The exponent of the grid; see `Sampler`.
    """

    def __init__(self, steps: int = 128, probes: int | None = 1, rho: float = 7.0) -> None:
        if steps < 2 or (probes is not None and probes < 1):
            raise ValueError(
                f"steps = {steps} must be at least 2, and probes = {probes} at least 1, or None "
                f"for the exact trace."
            )
        self.probes, self.path = probes, Heun(steps, rho)

    def __call__(self, denoiser: Denoiser, x: Tensor, u: U, noise: Noise) -> Tensor:
        r"""The log-likelihood in nats, with shape (B,).

        Arguments:
            denoiser: The denoiser, guided or not. Row i of D must depend on row i of x alone.
            x: Clean data, with shape :math:`(B, *)`.
            u: The condition, or `None`.
            noise: Where the probes come from; the exact trace draws none.
        """
        with torch.inference_mode(False), torch.no_grad():
            # what was made in inference mode cannot take part in a derivative, its copy can
            u = None if u is None else u.clone()
            times = self.path.grid(denoiser.schedule).flip(0)
            state = State(denoiser.schedule.at(times[0])[0] * x)
            traces = [self._trace(denoiser, state.x, times[0], u, noise)]
            for t, s in zip(times[:-1], times[1:], strict=True):
                state = self.path.step(denoiser, state, t, s, u, noise)
                traces.append(self._trace(denoiser, state.x, s, u, noise))
            log_ratio = torch.log(denoiser.schedule.ratio(times)).to(x)
            z = (state.x / denoiser.schedule.at(times[-1])[1]).flatten(1)
            start = -0.5 * (z**2 + math.log(2 * math.pi)).sum(dim=1)
            gain = torch.trapezoid(torch.stack(traces), log_ratio, dim=0)
            return start - z.shape[1] * log_ratio[0] - gain

    def _trace(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, u: U, noise: Noise) -> Tensor:
        """The trace of J at time t, exact or estimated, with shape (B,)."""
        alpha_t, _ = denoiser.schedule.at(t)
        with torch.enable_grad():
            x_t = x_t.clone().requires_grad_()
            d = denoiser(x_t, t, u)
        trace = x_t.new_zeros(len(x_t))
        for v in self._directions(x_t, noise):
            (pull,) = torch.autograd.grad(d, x_t, v, retain_graph=True)
            trace += (v * pull).flatten(1).sum(dim=1)
        return alpha_t * trace / (self.probes or 1)

    def _directions(self, like: Tensor, noise: Noise) -> Iterator[Tensor]:
        """The vectors v whose products v J v are summed: probes, or the basis of unit vectors."""
        if self.probes is not None:
            for _ in range(self.probes):
                yield torch.ones_like(like).copysign(noise.normal(like))
            return
        for i in range(like[0].numel()):
            v = torch.zeros_like(like)
            v.flatten(1)[:, i] = 1
            yield v
