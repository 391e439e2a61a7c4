r"""Targets: laws that can be evaluated, up to a constant.

What a sampler needs of a law is its score :math:`\nabla_x \log p(x)` and, to correct its own
errors, the density. A Gaussian mixture has both in closed form, keeps them when noise is added,
and its components can be classes: it is the truth against which everything that learns or samples
is tested.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.noise import Noise

__all__ = ["GaussianMixture", "Target"]


class Target(ABC):
    """A law with a score and, where it has one, a log-density up to a constant (`log_prob`)."""

    @abstractmethod
    def score(self, x: Tensor) -> Tensor:
        r"""The score :math:`\nabla_x \log p(x)`, with the shape of x, (B, D)."""


class GaussianMixture(Target):
    r"""A mixture of spherical Gaussians, whose components may be classes.

    .. math:: p(x) = \sum_k w_k \, N(x; m_k, s_k^2 I), \qquad p(x \mid u = k) = N(x; m_k, s_k^2 I)

    Noise keeps it a mixture: :math:`x_t = \alpha_t x + \sigma_t n` has means :math:`\alpha_t m_k`
    and variances
    :math:`\alpha_t^2 s_k^2 + \sigma_t^2`.

    Arguments:
        means: The means :math:`m_k`, with shape (K, D), or (B, K, D) to give each example a
            mixture of its own.
        stds: The standard deviations :math:`s_k`, with shape (K,) or (B, K).
        weights: The weights :math:`w_k`, with shape (K,) or (B, K), summing to one; equal by
            default.
    """

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        stds: Tensor | Sequence[float],
        weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        means = torch.as_tensor(means)
        self.means = means if means.is_floating_point() else means.to(torch.get_default_dtype())
        kind = {"dtype": self.means.dtype, "device": self.means.device}
        self.stds = torch.as_tensor(stds, **kind)
        if weights is None:
            weights = torch.full_like(self.stds, 1 / self.stds.shape[-1])
        self.weights = torch.as_tensor(weights, **kind)
        if self.means.shape[:-1] != self.stds.shape or (self.stds <= 0).any():
            raise ValueError(
                f"means {tuple(self.means.shape)} need one positive standard deviation each, "
                f"and stds is {self.stds.tolist()}."
            )

    def _log_joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log w_k N(x; m_k, s_k² I), (B, K), and m_k - x, (B, K, D)."""
        offset = self.means.to(x) - x[:, None, :]
        variance = self.stds.to(x) ** 2
        log_norm = self.weights.to(x).log() - x.shape[-1] / 2 * torch.log(2 * torch.pi * variance)
        return log_norm - offset.square().sum(dim=-1) / (2 * variance), offset

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density, normalised, with shape (B,)."""
        return torch.logsumexp(self._log_joint(x)[0], dim=-1)

    def score(self, x: Tensor) -> Tensor:
        log_joint, offset = self._log_joint(x)
        share = torch.softmax(log_joint, dim=-1) / self.stds.to(x) ** 2  # (B, K)
        return torch.einsum("bk,bkd->bd", share, offset)

    def diffuse(
        self, alpha_t: Tensor, sigma_t: Tensor, u: Tensor | None = None
    ) -> "GaussianMixture":
        r"""The law of :math:`x_t` given u.

        Arguments:
            alpha_t: The signal scale, with shape () or (B,).
            sigma_t: The noise scale, with shape () or (B,).
            u: The class of each example as one one-hot token, with shape (B, 1, K). A row of
                zeros, the null condition, means the whole mixture, as does `None`.
        """
        alpha, sigma = alpha_t.reshape(-1, 1), sigma_t.reshape(-1, 1)  # (B or 1, 1)
        means = alpha[..., None] * self.means.to(alpha)
        stds = torch.sqrt((alpha * self.stds.to(alpha)) ** 2 + sigma**2)
        weights = self.weights.to(alpha).expand(stds.shape)
        if u is not None:
            null = (u[:, 0] == 0).all(dim=-1, keepdim=True)
            weights = torch.where(null, weights, u[:, 0].to(weights))
            means, stds = means.expand(len(u), -1, -1), stds.expand(len(u), -1)
        return GaussianMixture(means, stds, weights)

    def sample(self, noise: Noise, n: int) -> tuple[Tensor, Tensor]:
        """n points, with shape (n, D), and the component of each, with shape (n,)."""
        edges = self.weights.cumsum(dim=-1)[:-1].contiguous()
        k = torch.bucketize(noise.uniform(n).to(edges), edges, right=True)
        means = self.means[k]
        return means + self.stds[k, None] * noise.normal(means), k
