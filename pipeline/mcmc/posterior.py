r"""Inverse problems: the law of x given a linear measurement of it, by Bayes' rule.

.. math:: y = A x + \sigma_y n, \quad
    \log p(x \mid y) = \log p(x) - \frac{\| y - A x \|^2}{2 \sigma_y^2} + \text{const}
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from pipeline.errors import UserError
from pipeline.mcmc.targets import Target

__all__ = ["Measurement", "Posterior"]


class Measurement:
    r"""What was measured, y, and the map A: some coordinates of x, or, where y is a picture
    smaller than x by a whole factor f, the means of areas of f × f.

    Arguments:
        y: With shape :math:`(D,)` or :math:`(C, H / f, W / f)`; NaN or null where nothing is
            known.
        noise: The standard deviation :math:`\sigma_y \ge 0` of its noise.
    """

    def __init__(self, y: Tensor | Sequence[float | None], noise: float) -> None:
        if not noise >= 0:
            raise ValueError(f"noise = {noise} must be at least 0: it is a standard deviation.")
        if not isinstance(y, Tensor):
            y = torch.tensor([torch.nan if v is None else v for v in y], dtype=torch.float64)
        self.known, self.y, self.noise = ~y.isnan(), y.nan_to_num(0.0), float(noise)

    def factor(self, x: Tensor) -> int:
        """The factor f for an x of some shape, with a `UserError` where there is none."""
        own, f = self.y.shape, x.shape[-1] // max(self.y.shape[-1], 1)
        fits = x.shape[1:] == (*own[:-2], *(f * n for n in own[-2:]))
        if not fits or (f > 1 and x.ndim < 4):
            raise UserError(
                f"What is known has shape {tuple(own)}, and what is drawn {tuple(x.shape[1:])}: a "
                "picture must be as large, or smaller by a whole factor."
            )
        return f

    def __call__(self, x: Tensor) -> Tensor:
        """A x of each row, with shape (B, *), and 0 where nothing is known."""
        f = self.factor(x)
        return self.known.to(x.device) * (x if f == 1 else avg_pool2d(x, f))

    def residual(self, x: Tensor) -> Tensor:
        """y − A x, with shape (B, *), and 0 where nothing is known."""
        return self.y.to(x) - self(x)

    def back(self, r: Tensor, f: int) -> Tensor:
        r""":math:`A^T r`, with the shape of x; f² times that is the least x with A x = r."""
        r = r * self.known.to(r.device)
        return r if f == 1 else r.repeat_interleave(f, -1).repeat_interleave(f, -2) / f**2


class Posterior(Target):
    r"""The law of x given y, with a density where the prior has one.

    .. math:: \nabla \log p(x \mid y) = \phi(x) + A^T (y - A x) / \sigma_y^2

    Arguments:
        prior: The law of x.
        y: What was measured; see `Measurement`.
        noise: The standard deviation :math:`\sigma_y` of its noise, positive.
    """

    def __init__(self, prior: Target, y: Tensor | Sequence[float | None], noise: float) -> None:
        if not noise > 0:
            raise ValueError(f"noise = {noise} must be positive, for the law to have a density.")
        self.prior, self.y, self.dim = prior, Measurement(y, noise), getattr(prior, "dim", None)

    def score(self, x: Tensor) -> Tensor:
        r = self.y.residual(x)
        return self.prior.score(x) + self.y.back(r, self.y.factor(x)) / self.y.noise**2

    def log_prob(self, x: Tensor) -> Tensor:
        square = self.y.residual(x).square().flatten(1).sum(dim=1)
        return self.prior.log_prob(x) - square / (2 * self.y.noise**2)
