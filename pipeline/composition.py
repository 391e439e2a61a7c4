r"""Composition: a law that is a product of others, a prior with a likelihood or more prompts.

A product has the sum of the scores, but the noisy laws of a product are not the products of noisy
laws. Where a factor is a linear measurement, the law of x given :math:`x_t` says what to add
(`MomentMatching`). Elsewhere the products are a path of laws like any other, and chains that stay
with each in turn end with the right one: `samplers.AnnealedLangevin` or `PredictorCorrector` with
MALA or HMC, for which densities are needed (`denoisers.Energy`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.condition import Condition, U
from pipeline.denoisers import Denoiser
from pipeline.errors import UserError
from pipeline.guidance import ClassifierFree, Guidance, Guided, under
from pipeline.mcmc.kernels import dot
from pipeline.mcmc.posterior import Measurement
from pipeline.schedules import expand_as_batch

__all__ = ["Composed", "MomentMatching"]


class Composed(Guidance):
    r"""The prompt OR others, AND others, NOT others.

    .. math:: \log p_w(x) = \log p(x) + w \Big( \log \frac{p_\text{or}(x)}{p(x)}
        + \sum_\text{also} \log \frac{p(x \mid u_k)}{p(x)}
        - \sum_\text{without} \log \frac{p(x \mid u_k)}{p(x)} \Big), \quad
        p_\text{or} \propto p(x \mid u) + \sum_\text{either} p(x \mid u_k)

    OR is right at every noise level. It needs densities, and weighs them by their constants, which
    an energy knows where it is `normalised`. AND and NOT are right at the last level only, and NOT
    may leave no law: where :math:`p(x \mid u_k)` falls faster than all the rest, its inverse
    grows.

    References:
        | Du et al., 2023, section 4; https://arxiv.org/abs/2302.11552

    Arguments:
        also: Prompts that hold beside the one that is drawn: AND.
        either: Prompts of which one may hold in place of it: OR.
        without: Prompts that do not hold: NOT.
        scale: The scale w.
    """

    def __init__(
        self,
        also: Sequence[str] = (),
        either: Sequence[str] = (),
        without: Sequence[str] = (),
        scale: float = 1.0,
    ) -> None:
        super().__init__(scale)
        self.others, self.either = (*either, *also, *without), len(either)
        self.signs = [1.0] * len(also) + [-1.0] * len(without)

    def __call__(self, denoiser: Denoiser, u_null: U) -> Denoiser:
        assert u_null is not None, "the model has no conditions to compose"
        return _Composed(denoiser, u_null, self)


class _Composed(Guided):
    def __init__(self, denoiser: Denoiser, others: Condition, guidance: Composed) -> None:
        super().__init__(denoiser, guidance)
        self.others, self.either, self.signs = others, 1 + guidance.either, guidance.signs

    def _both(self, what: str, x_t: Tensor, t: Tensor, u: U) -> tuple[tuple, tuple]:
        if u is None:
            raise UserError("A composition needs a condition u, and None was given.")
        null, *rest = (self.others[k : k + 1].expand(len(u)) for k in range(len(self.others)))
        every = Condition.stack([u, *rest, null])
        values = under(2 + len(rest), every, self.denoiser, what, x_t, t)
        each = [torch.stack(of) for of in zip(*values, strict=True)]
        log_p = torch.zeros(1, len(u))
        if self.either > 1:
            some = every[: self.either * len(u)]
            chosen = under(self.either, some, self.denoiser, "log_prob", x_t, t)
            log_p = torch.stack([one for (one,) in chosen])
        share = torch.softmax(log_p, dim=0).to(x_t)
        strong = []
        for v in each:  # (K, B, *)
            either, rest = v[: self.either], v[self.either : -1] - v[-1]
            wide = share.reshape(*share.shape, *[1] * (v.ndim - 2))
            mixed = torch.logsumexp(either, 0) if v.ndim == 2 else (wide * either).sum(dim=0)
            strong.append(mixed + sum(s * one for s, one in zip(self.signs, rest, strict=True)))
        return tuple(v[-1] for v in each), tuple(strong)


class MomentMatching(ClassifierFree):
    r"""Moment matching posterior sampling: a model of p(x | u) draws from p(x | u, y), y = A x +
    σ_y n, with the law of x given :math:`x_t` as the Gaussian whose moments the denoiser says.

    .. math:: D_y = D + C A^T (\sigma_y^2 I + A C A^T)^{-1} (y - A D), \quad
        C = \frac{\sigma_t^2}{\alpha_t} \Big( \frac{\partial D}{\partial x_t} \Big)^T

    Exact on a Gaussian law. The system is solved by conjugate gradients, each iteration a product
    with the derivative of D, and one more at the end. Without noise :math:`A D_y = y` is kept.

    References:
        | Rozet et al., 2024, section 4; https://arxiv.org/abs/2405.13712

    Arguments:
        known: A picture file whose transparent pixels are not known; one that is smaller than what
            is drawn by a whole factor says the means of areas. Or numbers; see `Measurement`.
        noise: The standard deviation :math:`\sigma_y` of what is known, in units of x.
        iterations: The iterations of conjugate gradients, at least 1.
        scale: The scale of classifier-free guidance, which comes first; 1 is the model itself.
        interval: Where that guides; see `Guidance`.

    Raises:
        UserError: The file cannot be read, what is known does not fit what is drawn, or the scale
            is not 1 and the model has no condition.
    """

    needs_condition = False

    def __init__(
        self,
        known: str | Sequence[float | None] | Tensor,
        noise: float = 0.0,
        iterations: int = 3,
        scale: float = 1.0,
        interval: Sequence[float] | None = None,
    ) -> None:
        super().__init__(scale, interval)
        if iterations < 1:
            raise ValueError(f"iterations = {iterations} must be at least 1.")
        self.iterations = iterations
        self.measurement = Measurement(_read(known) if isinstance(known, str) else known, noise)

    def __call__(self, denoiser: Denoiser, u_null: U) -> Denoiser:
        if u_null is None and self.scale != 1:
            raise UserError(f"scale = {self.scale} must be 1: the model has no condition.")
        return _Measured(super().__call__(denoiser, u_null), self)


class _Measured(Denoiser):
    def __init__(self, denoiser: Denoiser, guidance: MomentMatching) -> None:
        super().__init__(denoiser.schedule)
        self.denoiser, self.law, self.jumps = denoiser, guidance.measurement, denoiser.jumps
        self.iterations = guidance.iterations

    def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        law, f = self.law, self.law.factor(x_t)
        alpha_t, sigma_t = self.schedule.scales(t, x_t)
        with torch.inference_mode(False), torch.enable_grad():
            # what was made in inference mode cannot be differentiated, its copy can
            x_t, t, u = x_t.clone().requires_grad_(), t.clone(), None if u is None else u.clone()
            mean = self.denoiser(x_t, t, u)
            d = mean.detach()

            def covariance(v: Tensor) -> Tensor:  # C Aᵀ v
                (slope,) = torch.autograd.grad(mean, x_t, law.back(v, f), retain_graph=True)
                return sigma_t**2 / alpha_t * slope

            r = p = law.residual(d)
            v, square = torch.zeros_like(r), dot(r, r)
            for _ in range(self.iterations):
                s = law.noise**2 * p + law(covariance(p))
                curve = dot(p, s)  # where a learned one is not positive, nothing is done
                step = expand_as_batch(torch.where(curve > 0, square / curve, 0.0), p)
                v, r = v + step * p, r - step * s
                before, square = square, dot(r, r)
                p = r + expand_as_batch(torch.where(before > 0, square / before, 0.0), p) * p
            d = d + covariance(v)
        return d + f**2 * law.back(law.residual(d), f) if law.noise == 0 else d


def _read(path: str) -> Tensor:
    """A picture in [-1, 1], (C, H, W), NaN where it is transparent."""
    try:
        with Image.open(path) as picture:
            how = "LA" if picture.mode in ("1", "L", "LA", "I;16") else "RGBA"
            levels = torch.from_numpy(np.array(picture.convert(how))).permute(2, 0, 1)
    except OSError as error:
        raise UserError(f"known = {path!r} is no picture that can be read: {error}.") from error
    return torch.where(levels[-1:] == 255, levels[:-1] / 127.5 - 1, torch.nan)
