r"""Noise schedules: how much signal and how much noise there is at time t.

A noisy example is :math:`x_t = \alpha_t x + \sigma_t n` with :math:`n \sim N(0, I)`; t = 0 is data
and t = 1 is noise. All that sampling and learning need of a schedule is that pair of functions,
and its inverse in the one coordinate that does not depend on the schedule, the noise ratio
:math:`\sigma_t / \alpha_t`: the law of
:math:`x_t / \alpha_t` at a given ratio is the same under every schedule.

The lecture's equation (7) is a random walk :math:`x_k = \sqrt{1 - \beta_k} \, x_{k-1} +
\sqrt{\beta_k} \, n`, whose composition has :math:`\alpha_k^2 = \prod_{j \leq k} (1 - \beta_j)` and
:math:`\sigma_k^2 = 1 - \alpha_k^2`: `DiscreteVP`. `VP` is its limit of many small steps.

Every schedule is clipped so that :math:`\sigma_0 > 0` and :math:`\alpha_1 > 0`: a score exists at
every time.
"""

import math
from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.building import Part

__all__ = ["VE", "VP", "Cosine", "DiscreteVP", "Rectified", "Scale", "Schedule"]
__all__ += ["expand_as_batch"]


Scale = float | Tensor  # a number for all rows, or one for each that broadcasts against them


def expand_as_batch(scale: Tensor, x: Tensor) -> Tensor:
    """Append dimensions to a scale of shape () or (B,) so that it broadcasts against x (B, *)."""
    return scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim)) if scale.ndim else scale


def _interval(low: float, high: float, names: str) -> None:
    if not 0 < low < high:
        raise ValueError(
            f"{names} must satisfy 0 < {low} < {high}; change the first or the second."
        )


class Schedule(Part, ABC):
    r"""A noise schedule :math:`t \mapsto (\alpha_t, \sigma_t)` on [0, 1], its noise ratio strictly
    increasing.
    """

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Signal and noise scale at time t.

        Arguments:
            t: The time :math:`t \in [0, 1]`, with any shape.

        Returns:
            :math:`\alpha_t` and :math:`\sigma_t`, with the shape of t.
        """

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        r"""The time t at which :math:`\sigma_t / \alpha_t` equals a ratio.

        A ratio outside of the schedule's range gives the nearest end.

        Arguments:
            ratio: The noise ratio :math:`\sigma / \alpha > 0`, with any shape.

        Returns:
            t, with the shape of ratio.
        """

    def ratio(self, t: Tensor) -> Tensor:
        r"""The noise ratio :math:`\sigma_t / \alpha_t`, with the shape of t."""
        alpha_t, sigma_t = self(t)
        return sigma_t / alpha_t

    def at(self, t: Tensor) -> tuple[float, float]:
        r""":math:`\alpha_t` and :math:`\sigma_t` at a single time of shape (), as numbers: they
        are of float64 and computed once. A time that is not on the CPU is waited for.
        """
        return _at(self, t.item())

    def scales(self, t: Tensor, x: Tensor) -> tuple[Scale, Scale]:
        r""":math:`\alpha_t` and :math:`\sigma_t` to multiply x, with shape (B, *): numbers at a
        single time, or else tensors that broadcast against it.
        """
        if not t.ndim:
            return self.at(t)
        alpha_t, sigma_t = self(t)
        return expand_as_batch(alpha_t, x), expand_as_batch(sigma_t, x)


@lru_cache(maxsize=4096)
def _at(schedule: Schedule, t: float) -> tuple[float, float]:
    alpha_t, sigma_t = schedule(torch.tensor(t, dtype=torch.float64))
    return alpha_t.item(), sigma_t.item()


class VP(Schedule):
    r"""The variance-preserving schedule with linear :math:`\beta`; the lecture's equation (7) in
    continuous time.

    .. math:: \alpha_t^2 = \exp\left(-\int_0^{t'} \beta_r \, dr\right), \quad
        \sigma_t^2 = 1 - \alpha_t^2, \quad t' = t_0 + (1 - t_0) \, t, \quad
        \beta_r = \beta_{\min} + (\beta_{\max} - \beta_{\min}) \, r

    References:
        | Song et al., 2021, equation (32); https://arxiv.org/abs/2011.13456

    Arguments:
        beta_min: The rate of noising at the data, :math:`\beta_{\min} > 0`.
        beta_max: The rate of noising at the noise, :math:`\beta_{\max} > \beta_{\min}`.
        clip: The time :math:`t_0` at which t = 0 is put.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, clip: float = 1e-4) -> None:
        _interval(beta_min, beta_max, "beta_min, beta_max")
        _interval(clip, 1.0, "clip, 1")
        self.beta_min, self.beta_max, self.clip = beta_min, beta_max, clip

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r = self.clip + (1 - self.clip) * t
        integral = r * (self.beta_min + (self.beta_max - self.beta_min) / 2 * r)
        return torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))

    def time(self, ratio: Tensor) -> Tensor:
        integral = torch.log1p(ratio**2)
        slope = (self.beta_max - self.beta_min) / 2
        # the root of slope r² + beta_min r = integral, in the form that does not cancel when the
        # integral is small
        r = 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 4 * slope * integral))
        return ((r - self.clip) / (1 - self.clip)).clamp(0, 1)


class DiscreteVP(Schedule):
    r"""The variance-preserving schedule of K steps: the lecture's equation (7) itself.

    .. math:: x_k = \sqrt{1 - \beta_k} \, x_{k-1} + \sqrt{\beta_k} \, n, \quad
        \alpha_k^2 = \prod_{j \leq k} (1 - \beta_j), \quad \sigma_k^2 = 1 - \alpha_k^2, \quad
        \beta_k = \beta_{\min} + (\beta_{\max} - \beta_{\min}) \tfrac{k - 1}{K - 1}

    t = 0 is :math:`x_1` and t = 1 is :math:`x_K`. Between two k the logarithm of α is a straight
    line, as if the step were walked at a constant rate.

    References:
        | Ho et al., 2020, equations (2), (4), section 4; https://arxiv.org/abs/2006.11239

    Arguments:
        steps: The number K of steps, at least 2.
        beta_min: The variance :math:`\beta_1 > 0` of the first step.
        beta_max: The variance of the last, :math:`\beta_{\min} < \beta_K < 1`.
    """

    def __init__(self, steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> None:
        _interval(beta_min, beta_max, "beta_min, beta_max")
        _interval(beta_max, 1.0, "beta_max, 1")
        _interval(1, steps, "1, steps")
        self.steps, self.beta_min, self.beta_max = steps, beta_min, beta_max
        beta = torch.linspace(beta_min, beta_max, steps, dtype=torch.float64)
        self._integral = -torch.log1p(-beta).cumsum(0)  # −log α_k², k = 1, …, K

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        known, k = self._integral.to(t), (self.steps - 1) * t
        below = k.long().clamp(0, self.steps - 2)
        integral = torch.lerp(known[below], known[below + 1], k - below)
        return torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))

    def time(self, ratio: Tensor) -> Tensor:
        known, integral = self._integral.to(ratio), torch.log1p(ratio**2)
        below = torch.searchsorted(known, integral.contiguous()).clamp(1, self.steps - 1) - 1
        share = (integral - known[below]) / (known[below + 1] - known[below])
        return ((below + share) / (self.steps - 1)).clamp(0, 1)


class Cosine(Schedule):
    r"""The variance-preserving schedule with :math:`\alpha_t = \cos \theta_t`,
    :math:`\sigma_t = \sin \theta_t`.

    .. math:: \theta_t = \epsilon + (\pi / 2 - 2 \epsilon) \, t

    References:
        | Nichol & Dhariwal, 2021, equation (17); https://arxiv.org/abs/2102.09672

    Arguments:
        clip: The angle :math:`\epsilon`, in radians, kept away from both ends.
    """

    def __init__(self, clip: float = 1e-3) -> None:
        _interval(clip, math.pi / 4, "clip, π/4")
        self.clip = clip

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.clip + (math.pi / 2 - 2 * self.clip) * t
        return torch.cos(angle), torch.sin(angle)

    def time(self, ratio: Tensor) -> Tensor:
        return ((torch.atan(ratio) - self.clip) / (math.pi / 2 - 2 * self.clip)).clamp(0, 1)


class VE(Schedule):
    r"""The variance-exploding schedule, with a geometric noise scale.

    .. math:: \alpha_t = 1, \quad \sigma_t = \sigma_{\min}^{1 - t} \, \sigma_{\max}^t

    References:
        | Song et al., 2021, equation (30); https://arxiv.org/abs/2011.13456

    Arguments:
        sigma_min: The noise scale at t = 0, :math:`\sigma_{\min} > 0`.
        sigma_max: The noise scale at t = 1, :math:`\sigma_{\max} > \sigma_{\min}`.
    """

    def __init__(self, sigma_min: float = 2e-3, sigma_max: float = 80.0) -> None:
        _interval(sigma_min, sigma_max, "sigma_min, sigma_max")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma_t = torch.exp(math.log(self.sigma_min) * (1 - t) + math.log(self.sigma_max) * t)
        return torch.ones_like(t), sigma_t

    def time(self, ratio: Tensor) -> Tensor:
        t = torch.log(ratio / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)
        return t.clamp(0, 1)


class Rectified(Schedule):
    r"""The straight path from data to noise.

    .. math:: \alpha_t = 1 - \sigma_t, \quad \sigma_t = \epsilon + (1 - 2 \epsilon) \, t

    References:
        | Liu et al., 2022; https://arxiv.org/abs/2209.03003

    Arguments:
        clip: The least noise scale and the least signal scale, :math:`\epsilon`.
    """

    def __init__(self, clip: float = 1e-3) -> None:
        _interval(clip, 0.5, "clip, 0.5")
        self.clip = clip

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma_t = self.clip + (1 - 2 * self.clip) * t
        # not 1 - sigma_t, which loses digits near t = 1
        return self.clip + (1 - 2 * self.clip) * (1 - t), sigma_t

    def time(self, ratio: Tensor) -> Tensor:
        return ((ratio / (1 + ratio) - self.clip) / (1 - 2 * self.clip)).clamp(0, 1)
