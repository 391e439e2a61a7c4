"""A sampler that chooses its steps by an estimate of its own error."""

import torch
from torch import Tensor

from pipeline.condition import U
from pipeline.denoisers import Denoiser
from pipeline.distributed import place
from pipeline.noise import Noise
from pipeline.samplers.base import Sampler, State
from pipeline.schedules import Schedule, expand_as_batch

__all__ = ["Adaptive"]


class Adaptive(Sampler):
    r"""Bogacki and Shampine's pair on the probability-flow equation, of order 3.

    With :math:`y = x_t / \alpha_t`, r the noise ratio and :math:`f(y, r) = (y - D) / r`, a try
    from r to r + q, q < 0, is

    .. math:: k_1 = f(y, r), \quad k_2 = f(y + \tfrac12 q k_1, r + \tfrac12 q), \quad
        k_3 = f(y + \tfrac34 q k_2, r + \tfrac34 q)

    .. math:: y' = y + \tfrac{q}{9} (2 k_1 + 3 k_2 + 4 k_3), \quad k_4 = f(y', r + q), \quad
        e = \tfrac{q}{72} (-5 k_1 + 6 k_2 + 8 k_3 - 9 k_4)

    where e is how far a solution of order 2 is from y'. It is taken where the root mean square of
    :math:`e / \sqrt{1 + (r + q)^2}`, an error of x as a variance-preserving schedule has it, is
    at most the tolerance; the next try is :math:`0.9 \, (\text{tolerance} / \text{error})^{1/3}`
    times as long in log r, between 0.2 and 5 times.

    Every row has steps of its own, so that it does not depend on those beside it (to rounding,
    where guidance in an interval changes the number of rows the network sees), and waits when it
    has arrived. No step is shorter than an equal share, in log r, of what is left; one of that
    length is taken whatever its error. So all rows arrive in N − 1 tries, all of which several
    processes make: they call the network equally often.

    References:
        | Bogacki & Shampine, 1989; https://doi.org/10.1016/0893-9659(89)90079-7

    Arguments:
        tolerance: The error of a step, in units of x; too small a one gives N − 1 equal steps.
        steps: The number N; N − 1 tries and 3 N − 2 evaluations at most.
    """

    def __init__(self, tolerance: float = 0.01, steps: int = 32) -> None:
        super().__init__(steps, rho=1.0)  # its grid is not used but for the first time
        if not tolerance > 0:
            raise ValueError(f"tolerance = {tolerance} must be positive.")
        self.tolerance = tolerance

    @property
    def evaluations(self) -> int:
        return 3 * self.steps - 2

    def init(self, denoiser: Denoiser, like: Tensor, t: Tensor, u: U, noise: Noise) -> State:
        x, schedule = super().init(denoiser, like, t, u, noise).x, denoiser.schedule
        last = schedule.ratio(torch.zeros_like(t))
        left = torch.log(schedule.ratio(t) / last).to(x).expand(len(x))  # in log r, of each row
        y = x / schedule.at(t)[0]
        k = slope(denoiser, y, last * left.exp(), u)
        return State(x, (y, k, last, left, left / 8, self.steps - 1))

    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        y, k_1, last, left, h, tries = state.memory
        if place()[1] == 1 and not (left > 0).any():
            return state
        least = left / tries
        h = torch.maximum(h, least).minimum(left)
        r, r_s = (expand_as_batch(last * v.exp(), y) for v in (left, left - h))
        q = r_s - r
        k_2 = slope(denoiser, y + q / 2 * k_1, r + q / 2, u)
        k_3 = slope(denoiser, y + 3 / 4 * q * k_2, r + 3 / 4 * q, u)
        new = y + q / 9 * (2 * k_1 + 3 * k_2 + 4 * k_3)
        k_4 = slope(denoiser, new, r_s, u)
        e = q / 72 * (-5 * k_1 + 6 * k_2 + 8 * k_3 - 9 * k_4) / torch.sqrt(1 + r_s**2)
        error = e.flatten(1).square().mean(dim=1).sqrt()
        taken = (left > 0) & ((h <= least) | (error <= self.tolerance))
        rows = expand_as_batch(taken, y)
        y, k_1 = torch.where(rows, new, y), torch.where(rows, k_4, k_1)
        left = torch.where(taken, left - h, left)
        h = h * (0.9 * (self.tolerance / error) ** (1 / 3)).clamp(0.2, 5)
        x, _ = as_noisy(denoiser.schedule, y, last * left.exp())
        return State(x, (y, k_1, last, left, h, tries - 1))

    def last(self, denoiser: Denoiser, state: State, t: Tensor, u: U, noise: Noise) -> State:
        y, k_1, last, left, *_ = state.memory
        return State(y - expand_as_batch(last * left.exp(), y) * k_1)


def as_noisy(schedule: Schedule, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and t where the noise ratio is r, with shape (B,)."""
    t = schedule.time(r)
    return expand_as_batch(schedule(t)[0], y) * y, t


def slope(denoiser: Denoiser, y: Tensor, r: Tensor, u: U) -> Tensor:
    """dy / dr."""
    return (y - denoiser(*as_noisy(denoiser.schedule, y, r.flatten()), u)) / expand_as_batch(r, y)
