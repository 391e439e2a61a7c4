r"""Adaptation: a step size and the units of the coordinates, found before the draws that count.

Both are pure updates of an explicit state, and all chains share them. The step size is a number of
the host: each step of the warm-up, unlike those that count, waits for its acceptance.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DualAveraging", "Moments", "StepSize", "windows"]


EXTREME = 30.0  # of log ε: where all steps are accepted, or none, ε would leave the numbers


class StepSize(NamedTuple):
    """What dual averaging remembers: the logarithms of the step, of its average and of 10 ε₀, the
    statistic H, and k.
    """

    log_step: float
    log_average: float
    center: float
    error: float = 0.0
    count: int = 0


class DualAveraging:
    r"""Steers a step size until the mean acceptance α is its aim δ.

    .. math:: \log \epsilon_k = \log (10 \, \epsilon_0) - \frac{\sqrt{k}}{\gamma} H_k,
        \quad H_k = \Big( 1 - \frac{1}{k + k_0} \Big) H_{k - 1} + \frac{\delta - \alpha_k}{k + k_0}

    The chains move with :math:`\epsilon_k`; what is kept is the average
    :math:`\log \bar\epsilon_k = k^{-\kappa} \log \epsilon_k + (1 - k^{-\kappa}) \log
    \bar\epsilon_{k - 1}`. As published, γ = 0.05, :math:`k_0` = 10, κ = 0.75; and
    :math:`|\log \epsilon_k|` is at most 30.

    References:
        | Hoffman & Gelman, 2014, section 3.2; https://arxiv.org/abs/1111.4246

    Arguments:
        aim: The mean acceptance δ, between 0 and 1.
    """

    gamma, k_0, kappa = 0.05, 10, 0.75

    def __init__(self, aim: float) -> None:
        if not 0 < aim < 1:
            raise ValueError(f"aim is {aim}; it must lie between 0 and 1.")
        self.aim = aim

    def init(self, step_size: float) -> StepSize:
        log = math.log(step_size)
        return StepSize(log, log, log + math.log(10))

    def update(self, state: StepSize, acceptance: float) -> StepSize:
        """The next state, given the mean acceptance α of the chains."""
        k = state.count + 1
        error = state.error + (self.aim - acceptance - state.error) / (k + self.k_0)
        log_step = state.center - math.sqrt(k) / self.gamma * error
        log_step = min(max(log_step, -EXTREME), EXTREME)
        log_average = state.log_average + k**-self.kappa * (log_step - state.log_average)
        return StepSize(log_step, log_average, state.center, error, k)


class Moments(NamedTuple):
    r"""Running means and sums of squares, Welford's, of batches of points.

    .. math:: n = n_a + n_b, \quad m = m_a + \tfrac{n_b}{n} \delta, \quad
        M = M_a + M_b + \tfrac{n_a n_b}{n} \delta^2, \quad \delta = m_b - m_a

    References:
        | Chan, Golub & LeVeque, 1979; https://doi.org/10.1007/978-3-642-51461-6_3

    Attributes:
        count: The number n of points.
        mean: Their mean m, with the shape of one point.
        square: The sum M of their squared distances from it.
    """

    count: int
    mean: Tensor
    square: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> "Moments":
        zero = torch.zeros_like(like[0], dtype=torch.float64)
        return cls(0, zero, zero)

    def update(self, x: Tensor) -> "Moments":
        """With the points x, (B, *), counted too."""
        n = self.count + len(x)
        mean = x.double().mean(dim=0)
        square = (x - mean).square().sum(dim=0)
        delta = mean - self.mean
        return Moments(
            n,
            self.mean + len(x) / n * delta,
            self.square + square + self.count * len(x) / n * delta**2,
        )

    def scale(self) -> Tensor:
        """The standard deviations, drawn a little towards 0.03 while points are few, as Stan
        does.
        """
        variance = self.square / (self.count - 1)
        share = self.count / (self.count + 5)
        return torch.sqrt(share * variance + (1 - share) * 1e-3)


def windows(warmup: int) -> list[int]:
    """The steps of a warm-up, counted from 1, after which the units of the coordinates are set
    anew.

    Windows of 10, 20, 40, … steps, each for a better estimate than the one before and forgetting
    where the chains started; the last is stretched over what remains of the first 80 %. The other
    20 % tune the step size alone.
    """
    end, ends, length = warmup - warmup // 5, [], 10
    while sum(ends[-1:]) + 3 * length <= end:
        ends.append(sum(ends[-1:]) + length)
        length *= 2
    return [*ends, end] if end >= 10 else []
