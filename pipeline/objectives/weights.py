r"""Weights: how much the error of D counts at each noise level.

The error is :math:`\| D - x \|^2` at noise ratio :math:`s = \sigma_t / \alpha_t`. A weight does
not move the minimum, which is the conditional mean at every level; it says where a network of
finite size is to be near it. The law of the levels says so too, by how often it is asked there.

References:
    | Kingma & Gao, 2023; https://arxiv.org/abs/2303.00848
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["MinSNR", "UnitVariance", "Uniform", "Velocity", "Weight"]


class Weight(ABC):
    """A weight of the error of D."""

    @abstractmethod
    def __call__(self, s: Tensor) -> Tensor:
        """The weight at noise ratio s, with the shape of s."""


class Uniform(Weight):
    """The error of x itself: 1 at every level."""

    def __call__(self, s: Tensor) -> Tensor:
        return torch.ones_like(s)


class Velocity(Weight):
    r"""The error of the velocity :math:`v = n - x` of the straight path, bounded at low noise.

    .. math:: w(s) = \Big( \frac{1 + s}{\max(s, s_0)} \Big)^2

    since :math:`v = (\bar x - x) / \bar t` at :math:`\bar t = s / (1 + s)`.

    References:
        | Li & He, 2025; https://arxiv.org/abs/2511.13720

    Arguments:
        least: The noise ratio :math:`s_0 > 0` below which the weight grows no more.
    """

    def __init__(self, least: float = 0.05) -> None:
        if not least > 0:
            raise ValueError(f"least = {least} must be positive: it is a noise ratio.")
        self.least = least

    def __call__(self, s: Tensor) -> Tensor:
        return ((1 + s) / s.clamp(min=self.least)) ** 2


class UnitVariance(Weight):
    r"""The error in units of what `EDM` asks of its network.

    .. math:: w(s) = \frac{s^2 + \sigma_d^2}{s^2 \, \sigma_d^2}

    References:
        | Karras et al., 2022, table 1; https://arxiv.org/abs/2206.00364

    Arguments:
        sigma_data: The standard deviation :math:`\sigma_d > 0` of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        if not sigma_data > 0:
            raise ValueError(f"sigma_data = {sigma_data} must be positive.")
        self.sigma_data = sigma_data

    def __call__(self, s: Tensor) -> Tensor:
        return s**-2 + self.sigma_data**-2


class MinSNR(Weight):
    r"""The signal-to-noise ratio, bounded: the error of the noise where there is much of it.

    .. math:: w(s) = \min(s^{-2}, \gamma)

    References:
        | Hang et al., 2023; https://arxiv.org/abs/2303.09556

    Arguments:
        gamma: The bound :math:`\gamma > 0`.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise ValueError(f"gamma = {gamma} must be positive: it bounds the weight.")
        self.gamma = gamma

    def __call__(self, s: Tensor) -> Tensor:
        return (s**-2).clamp(max=self.gamma)
