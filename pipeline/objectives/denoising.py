r"""Denoising score matching: noise is added, and the denoiser is to undo it.

The lecture's equation (4) does it at one level:

.. math:: J = \sum \| x - [\tilde x + \sigma^2 \phi(\tilde x)] \|^2, \quad \tilde x = x + \sigma n

The bracket is the denoiser D. `OneLevelDSM` is that sum, `DSM` the same over a law of levels, each
in its own unit. Both learn the laws of noisy data.

References:
    | Vincent, 2011; https://doi.org/10.1162/NECO_a_00142
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.condition import U
from pipeline.denoisers import Preconditioned
from pipeline.noise import Noise
from pipeline.objectives.base import Objective
from pipeline.objectives.weights import Weight
from pipeline.schedules import Schedule, expand_as_batch

__all__ = ["DSM", "Levels", "LogNormal", "OneLevelDSM", "UniformTime"]


class Levels(ABC):
    """A law of noise levels, through its quantiles, so that a batch can cover it evenly."""

    @abstractmethod
    def times(self, schedule: Schedule, q: Tensor) -> Tensor:
        """The time at each quantile: q uniform in [0, 1) gives times with this law. Shape of q."""


class UniformTime(Levels):
    """Times uniform in [0, 1]: the law of DDPM."""

    def times(self, schedule: Schedule, q: Tensor) -> Tensor:
        return q


class LogNormal(Levels):
    r"""A mixture, in equal parts, of normal laws on the level :math:`\log \sigma_t / \alpha_t`.

    It does not depend on the schedule. One part with mean −1.2 and standard deviation 1.2 is EDM's
    law; a logit-normal time on the straight path is this law too, since the logit of :math:`\sigma
    / (\alpha + \sigma)` is the level.

    References:
        | Karras et al., 2022, table 1; https://arxiv.org/abs/2206.00364
        | Esser et al., 2024, section 3.1; https://arxiv.org/abs/2403.03206

    Arguments:
        means: The mean of each part.
        stds: The standard deviation of each part, positive.
    """

    def __init__(self, means: Sequence[float] = (-1.2,), stds: Sequence[float] = (1.2,)) -> None:
        if not means or len(means) != len(stds) or min(stds) <= 0:
            raise ValueError(
                f"means = {list(means)} and stds = {list(stds)} must be equally long, and "
                f"each std positive."
            )
        self.means, self.stds = tuple(means), tuple(stds)

    def times(self, schedule: Schedule, q: Tensor) -> Tensor:
        parts = len(self.means)
        part = (q * parts).floor().clamp(max=parts - 1)
        # a quantile of exactly 0 is at minus infinity
        within = (q * parts - part).clamp(2**-24, 1 - 2**-24)
        mean, std = (q.new_tensor(v)[part.long()] for v in (self.means, self.stds))
        return schedule.time(torch.exp(mean + std * torch.special.ndtri(within)))


class OneLevelDSM(Objective):
    r"""Denoising score matching at one noise level: the lecture's equation (4).

    .. math:: \| x - [\tilde x + \sigma^2 \phi(\tilde x)] \|^2, \quad \tilde x = x + \sigma n

    Here :math:`\tilde x = x_t / \alpha_t` and :math:`\phi` is the score of its law, so the bracket
    is D at the time of noise ratio σ. The least value is reached by the score of the *noisy* law,
    whose variance is :math:`\sigma^2` larger than that of the data; no other time is trained.

    References:
        | Vincent, 2011; https://doi.org/10.1162/NECO_a_00142

    Arguments:
        sigma: The noise ratio σ, within the schedule's.
    """

    def __init__(self, sigma: float) -> None:
        if not sigma > 0:
            raise ValueError(f"sigma = {sigma} must be positive: it is a noise ratio.")
        self.sigma = sigma

    def __call__(self, denoiser: Preconditioned, x: Tensor, u: U, noise: Noise) -> Tensor:
        alpha_t, sigma_t = denoiser.schedule(t := self.time(denoiser.schedule).to(x))
        x_t = alpha_t * x + sigma_t * noise.normal(x)
        return (denoiser(x_t, t, u) - x).square().flatten(1).sum(dim=1)

    def time(self, schedule: Schedule) -> Tensor:
        """The time at which the noise ratio is sigma, with shape (), in float64.

        Raises:
            ValueError: The schedule does not reach sigma.
        """
        low, high = schedule.ratio(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        if not low <= self.sigma <= high:
            ends = f"between {low:.3g} and {high:.3g}, the noise ratios of the schedule"
            raise ValueError(f"sigma = {self.sigma} must lie {ends}.")
        return schedule.time(torch.tensor(self.sigma, dtype=torch.float64))


class DSM(Objective):
    r"""Denoising score matching over many noise levels.

    .. math:: w(t) \, \frac{1}{d} \| D(\alpha_t x + \sigma_t n, t, u) - x \|^2, \quad
        t \sim \text{levels}, \quad d = \dim x

    Without a weight w it is the denoiser's own: the error in units of the network's output.

    References:
        | Karras et al., 2022, equation (8); https://arxiv.org/abs/2206.00364

    Arguments:
        levels: The law of the noise levels.
        bands: The number of equally likely bands of levels, low noise first, into which the
            validation loss is divided.
        weight: The weight w of the error at each level; by default the denoiser's own.
    """

    def __init__(self, levels: Levels, bands: int = 4, weight: Weight | None = None) -> None:
        if bands < 1:
            raise ValueError(f"bands = {bands} must be at least 1.")
        self.levels, self.weight = levels, weight
        self.bands = tuple(f"band_{k}" for k in range(bands))

    def __call__(self, denoiser: Preconditioned, x: Tensor, u: U, noise: Noise) -> Tensor:
        q = noise.spread(len(x)).to(x.device, x.dtype)
        return self._loss(denoiser, x, u, self.levels.times(denoiser.schedule, q), noise)

    def validate(
        self, denoiser: Preconditioned, x: Tensor, u: U, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        q = noise.spread(len(x)).to(x.device, x.dtype)
        t = self.levels.times(denoiser.schedule, q)
        return self._loss(denoiser, x, u, t, noise), self.band(denoiser.schedule, t)

    def _loss(self, denoiser: Preconditioned, x: Tensor, u: U, t: Tensor, noise: Noise) -> Tensor:
        alpha_t, sigma_t = (expand_as_batch(s, x) for s in denoiser.schedule(t))
        x_t = alpha_t * x + sigma_t * noise.normal(x)
        error = denoiser(x_t, t, u) - x
        loss = error.square().flatten(1).mean(dim=1)
        if self.weight is None:
            return denoiser.weight(t) * loss
        return self.weight(denoiser.schedule.ratio(t)) * loss

    def band(self, schedule: Schedule, t: Tensor) -> Tensor:
        """The band of each time, cut at quantiles of the level, whatever a mixture's order."""
        ends = 1024, len(self.bands)
        q, cuts = (torch.linspace(0, 1, n + 1, dtype=t.dtype, device=t.device) for n in ends)
        edges = torch.quantile(self.levels.times(schedule, q[:-1]), cuts)
        return torch.bucketize(t, edges[1:-1])
