r"""The grid and the loop that every diffusion sampler shares.

In the coordinates :math:`y = x_t / \alpha_t` and :math:`s = \sigma_t / \alpha_t` the
probability-flow equation is the same under every schedule, :math:`dy / ds = (y - D) / s`, so grids
are placed in s and a sampler does not depend on the schedule a model was trained with.

References:
    | Elucidating the Design Space of Diffusion-Based Generative Models
    |   (Karras et al., 2022), equations (4), (5)
    | https://arxiv.org/abs/2206.00364
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.denoisers import Denoiser
from pipeline.noise import Noise, PictureNoise
from pipeline.schedules import Schedule, expand_as_batch

__all__ = ["Sampler"]


class Sampler(ABC):
    r"""A way from noise :math:`x_1` to data :math:`x_0` over a denoiser.

    The times are placed so that the ratios :math:`r_i` run from the schedule's last to its first
    with

    .. math:: r_i = \Big( r(1)^{1/\rho}
        + \tfrac{i}{N - 1} \big( r(0)^{1/\rho} - r(1)^{1/\rho} \big) \Big)^{\rho},
        \quad i = 0, …, N - 1

    and the result is D at the last of them: N − 1 steps, then the mean, in which no noise is
    left.

    Arguments:
        steps: The number N of times, at least 1.
        rho: The exponent :math:`\rho`; larger puts more of the times at low noise.
    """

    def __init__(self, steps: int, rho: float) -> None:
        if steps < 1 or not rho > 0:
            raise ValueError(f"steps = {steps} must be at least 1 and rho = {rho} positive.")
        self.steps, self.rho = steps, rho

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """The number of evaluations of the denoiser in one draw."""

    @abstractmethod
    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        u: Tensor | None,
        noise: Noise | PictureNoise,
    ) -> Tensor:
        r"""One step from time t to an earlier time s.

        Arguments:
            denoiser: The denoiser.
            x_t: The noisy tensor at time t, with shape :math:`(B, *)`.
            t: The time, with shape ().
            s: The next time, with shape (), s < t.
            u: The condition, with shape (B, L, E), or `None`.
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

    @torch.inference_mode()
    def __call__(
        self,
        denoiser: Denoiser,
        like: Tensor,
        u: Tensor | None,
        noise: Noise | PictureNoise,
        progress: Callable[[], object] | None = None,
    ) -> Tensor:
        r"""Draw from the law that a denoiser describes.

        Arguments:
            denoiser: The denoiser, guided or not.
            like: A tensor with the shape :math:`(B, *)`, type and device of what is drawn; its
                values are not read.
            u: The condition, with shape (B, L, E), or `None`.
            noise: Where the noise comes from.
            progress: Called after each step.

        Returns:
            The drawn :math:`x_0`, with the shape of like.
        """
        times = self.grid(denoiser.schedule).to(like)
        x_t = expand_as_batch(denoiser.schedule(times[0])[1], like) * noise.normal(like)
        for t, s in zip(times[:-1], times[1:], strict=True):
            x_t = self.step(denoiser, x_t, t, s, u, noise)
            if progress is not None:
                progress()
        x = denoiser(x_t, times[-1], u)
        if progress is not None:
            progress()
        return x
