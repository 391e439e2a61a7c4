"""Samplers that follow the reverse of a diffusion."""

import torch
from torch import Tensor

from pipeline.condition import U
from pipeline.denoisers import Denoiser
from pipeline.noise import Noise
from pipeline.samplers.base import Sampler, State

__all__ = ["DDIM", "DPMSolver", "Heun"]

LONG = 10.0  # the ratio r_t / r_s above which a step is Euler's; 18 times have at most 8.9


class DDIM(Sampler):
    r"""Denoising diffusion implicit models.

    .. math:: x_s = \alpha_s D + \sigma_s \left( \sqrt{1 - \eta^2 \tau} \,
        \frac{x_t - \alpha_t D}{\sigma_t} + \eta \sqrt{\tau} \, n \right), \quad
        \tau = 1 - \frac{\alpha_t^2 \sigma_s^2}{\alpha_s^2 \sigma_t^2}

    η = 0 is Euler's method on the probability-flow equation, of order 1; η = 1 is DDPM, the
    reverse of the lecture's equation (7), whose step is the exact posterior of :math:`x_s` given
    :math:`x_t` and x = D.

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), equations (12), (16)
        | https://arxiv.org/abs/2010.02502
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), equation (7)
        | https://arxiv.org/abs/2006.11239

    Arguments:
        steps: The number of times, which is the number of evaluations.
        eta: The stochasticity η in [0, 1].
        rho: The exponent of the grid; see `Sampler`.
    """

    def __init__(self, steps: int = 50, eta: float = 0.0, rho: float = 7.0) -> None:
        super().__init__(steps, rho)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta = {eta} must lie between 0 (deterministic) and 1 (DDPM).")
        self.eta = eta

    @property
    def evaluations(self) -> int:
        return self.steps

    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.schedule(t), denoiser.schedule(s)
        x_t = state.x
        d = denoiser(x_t, t, u)
        n = (x_t - alpha_t * d) / sigma_t
        if self.eta:
            tau = 1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2
            n = torch.sqrt(1 - self.eta**2 * tau) * n + self.eta * torch.sqrt(tau) * noise.normal(
                x_t
            )
        return State(alpha_s * d + sigma_s * n)


class Heun(Sampler):
    r"""Heun's method on the probability-flow equation, of order 2.

    With :math:`y = x_t / \alpha_t`, r the noise ratio and :math:`f(y, r) = (y - D) / r`, a step
    from :math:`r_t` to
    :math:`r_s` is

    .. math:: \tilde y = y_t + (r_s - r_t) \, f(y_t, r_t), \quad
        y_s = y_t + \tfrac{r_s - r_t}{2} \big( f(y_t, r_t) + f(\tilde y, r_s) \big)

    A step with :math:`r_t > 10 \, r_s` is Euler's, that of `DDIM`. On Gaussian data Euler never
    draws a law too wide, and Heun may by the factor :math:`r_t / 5 \, r_s` about: the slope that
    falls to 0 at :math:`r_s` says nothing of most of a long step. The times of the default have
    no such step; two or three would end a hundred times too wide.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
        |   algorithm 1
        | https://arxiv.org/abs/2206.00364

    Arguments:
        steps: The number of times N; 2 N − 1 evaluations.
        rho: The exponent of the grid; see `Sampler`.
    """

    def __init__(self, steps: int = 18, rho: float = 7.0) -> None:
        super().__init__(steps, rho)

    @property
    def evaluations(self) -> int:
        return 2 * self.steps - 1

    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.schedule(t), denoiser.schedule(s)
        r_t, r_s = sigma_t / alpha_t, sigma_s / alpha_s
        y = state.x / alpha_t
        slope = (y - denoiser(state.x, t, u)) / r_t
        ahead = y + (r_s - r_t) * slope
        slope_ahead = (ahead - denoiser(alpha_s * ahead, s, u)) / r_s
        slope_ahead = torch.where(r_t > LONG * r_s, slope, slope_ahead)
        return State(alpha_s * (y + (r_s - r_t) / 2 * (slope + slope_ahead)))


class DPMSolver(Sampler):
    r"""DPM-Solver++(2M), a two-step method on the probability-flow equation, of order 2.

    In :math:`y = x_t / \alpha_t` and the noise ratio r, whose logarithm is minus the paper's
    :math:`\lambda`, the equation is linear but for D. D is held at its value in the middle of the
    step, to which a straight line in :math:`\lambda` through its last two values leads, and the
    rest is solved exactly:

    .. math:: y_s = \tfrac{r_s}{r_t} \, y_t + \big(1 - \tfrac{r_s}{r_t}\big) \Big( D_t
        + \tfrac{h}{2 h'} (D_t - D_{t'}) \Big), \quad h = \log \tfrac{r_t}{r_s}, \quad
        h' = \log \tfrac{r_{t'}}{r_t}

    where :math:`t' > t` is the time before. The first step has none, and is DDIM's.

    References:
        | DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (Lu et
        |   al., 2022), algorithm 2
        | https://arxiv.org/abs/2211.01095

    Arguments:
        steps: The number of times, which is the number of evaluations.
        rho: The exponent of the grid; see `Sampler`.
    """

    def __init__(self, steps: int = 25, rho: float = 7.0) -> None:
        super().__init__(steps, rho)

    @property
    def evaluations(self) -> int:
        return self.steps

    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.schedule(t), denoiser.schedule(s)
        shrink = sigma_s * alpha_t / (sigma_t * alpha_s)
        h = -torch.log(shrink)
        d = denoiser(state.x, t, u)
        ahead = d
        if state.memory is not None:
            d_before, h_before = state.memory
            ahead = d + h / (2 * h_before) * (d - d_before)
        y = torch.lerp(ahead, state.x / alpha_t, shrink)
        return State(alpha_s * y, (d, h))
