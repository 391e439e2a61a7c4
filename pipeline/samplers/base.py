r"""The grid and the loop that every diffusion sampler shares.

In the coordinates :math:`y = x_t / \alpha_t` and :math:`s = \sigma_t / \alpha_t` the
probability-flow equation is the same under every schedule, :math:`dy / ds = (y - D) / s`, so grids
are placed in s and a sampler does not depend on the schedule a model was trained with.

References:
    | Karras et al., 2022, equations (4), (5); https://arxiv.org/abs/2206.00364
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.building import Part
from pipeline.condition import U
from pipeline.denoisers import Denoiser
from pipeline.noise import Noise
from pipeline.schedules import Schedule

__all__ = ["Sampler", "State"]


SMALL = 1e-9  # of a noise ratio
MOST = 100_000  # times


class State(NamedTuple):
    r"""Where a draw stands.

    Arguments:
        x: The noisy tensor :math:`x_t`, with shape :math:`(B, *)`; at the end, what is drawn.
        memory: What the next step needs beside x, each sampler its own; `None` where nothing.
        acceptance: The mean probability with which the step accepted its proposals, with shape
            (B,); `None` where it proposes none.
    """

    x: Tensor
    memory: Any = None
    acceptance: Tensor | None = None


class Sampler(Part, ABC):
    r"""A way from noise :math:`x_1` to data :math:`x_0` over a denoiser.

    The times are placed so that the ratios :math:`r_i` run from the schedule's last to its first
    with

    .. math:: r_i = \Big( r(1)^{1/\rho}
        + \tfrac{i}{N - 1} \big( r(0)^{1/\rho} - r(1)^{1/\rho} \big) \Big)^{\rho},
        \quad i = 0, …, N - 1

    and the last step ends in D at the last of them: N − 1 steps, then the mean, in which no noise
    is left.

    Arguments:
        steps: The number N of times, at least 1.
        rho: The exponent :math:`\rho`; larger puts more of the times at low noise.
    """

    def __init__(self, steps: int, rho: float) -> None:
        if not 1 <= steps <= MOST or not rho > 0:
            raise ValueError(
                f"steps = {steps} must be at least 1, at most {MOST:,}, and rho = {rho} positive."
            )
        self.steps, self.rho = steps, rho

    @property
    def evaluations(self) -> int:
        """The number of evaluations of the denoiser in one draw, at most: one at each time, or
        more.
        """
        return self.steps

    @abstractmethod
    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        r"""One step from time t to the next time s.

        Arguments:
            denoiser: The denoiser.
            state: The state at time t.
            t: The time, with shape (), in float64 on the CPU.
            s: The next time, likewise, s < t.
            u: The condition, or `None`.
            noise: Where the noise comes from.
        """

    def grid(self, schedule: Schedule) -> Tensor:
        """The times from 1 to 0, with shape (N,), in float64."""
        ends = schedule.ratio(torch.tensor([1.0, 0.0], dtype=torch.float64)) ** (1 / self.rho)
        share = torch.linspace(0, 1, self.steps, dtype=torch.float64)
        t = schedule.time(torch.lerp(ends[0], ends[1], share) ** self.rho)
        t[0] = 1.0
        if self.steps > 1:
            t[-1] = 0.0
        return t

    def times(self, denoiser: Denoiser) -> Tensor:
        """The grid, stretched so that a time lies just below each noise ratio at which D jumps."""
        t = self.grid(denoiser.schedule)
        r = denoiser.schedule.ratio(t)
        jumps = sorted(j for j in denoiser.jumps if r[-1] < j < r[0])
        if not jumps or len(jumps) > len(t) - 2:
            return t
        v, k = (r ** (1 / self.rho)).flip(0).numpy(), np.arange(len(t))
        found = np.interp(np.array(jumps) ** (1 / self.rho), v, k)  # where they are in the grid
        first, last = np.arange(len(jumps)) + 1, np.arange(len(jumps)) - len(jumps) - 1 + len(t)
        near = np.round(found).clip(first, last)
        near = np.maximum.accumulate(near - first) + first  # a time for each
        moved = np.interp(k, [0, *near, k[-1]], [0, *found, k[-1]])
        r = torch.from_numpy(np.interp(moved, k, v) ** self.rho).flip(0)
        t[1:-1] = denoiser.schedule.time(r * (1 - SMALL))[1:-1]
        return t

    def init(self, denoiser: Denoiser, like: Tensor, t: Tensor, u: U, noise: Noise) -> State:
        r"""The state before the first step: noise, :math:`x_t = \sigma_t n`.

        Arguments:
            denoiser: The denoiser.
            like: A tensor with the shape, type and device of what is drawn.
            t: The first time, with shape (), in float64 on the CPU.
            u: The condition, or `None`.
            noise: Where the noise comes from.
        """
        return State(denoiser.schedule.at(t)[1] * noise.normal(like))

    def last(self, denoiser: Denoiser, state: State, t: Tensor, u: U, noise: Noise) -> State:
        """The step that ends at the last time t, whose x is the drawn :math:`x_0`: the mean D."""
        return State(denoiser(state.x, t, u))

    @torch.inference_mode()
    def __call__(
        self,
        denoiser: Denoiser,
        like: Tensor,
        u: U,
        noise: Noise,
        progress: Callable[[State], object] | None = None,
    ) -> Tensor:
        r"""Draw from the law that a denoiser describes.

        Arguments:
            denoiser: The denoiser, guided or not.
            like: A tensor with the shape :math:`(B, *)`, type and device of what is drawn; its
                values are not read.
            u: The condition, or `None`.
            noise: Where the noise comes from.
            progress: Called with the state after each of the N steps.

        Returns:
            The drawn :math:`x_0`, with the shape of like.
        """
        times = self.times(denoiser).unbind()  # on the CPU, where they can be numbers
        state = self.init(denoiser, like, times[0], u, noise)
        for t, s in pairwise(times):
            state = self.step(denoiser, state, t, s, u, noise)
            if progress is not None:
                progress(state)
        state = self.last(denoiser, state, times[-1], u, noise)
        if progress is not None:
            progress(state)
        return state.x


def crosses(denoiser: Denoiser, above: float, below: float) -> bool:
    """Whether D jumps between two noise ratios."""
    return any(below < jump <= above for jump in denoiser.jumps)
