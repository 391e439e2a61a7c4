"""Plain vectors: points of a Gaussian mixture, each conditioned on its component."""

from typing import Any

import torch

from pipeline.codec import Columns
from pipeline.conditioning import Conditioning
from pipeline.data.base import DataModule, Source
from pipeline.errors import UserError
from pipeline.mcmc.targets import GaussianMixture
from pipeline.noise import Noise

__all__ = ["Points"]


class Points(DataModule):
    """Points of a mixture whose score is known, and the number of the component each came from.

    Arguments:
        mixture: What the points are drawn from.
        conditioning: `Classes` with a name for each component, or None.
        rows: The number of points to train on.
        val_rows: The number of points to validate on.
        seed: What decides the points and their order.
        more: See :class:`pipeline.data.DataModule`.
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        conditioning: Conditioning | None,
        rows: int = 65536,
        val_rows: int = 4096,
        batch_size: int = 256,
        **more: Any,
    ) -> None:
        super().__init__(Columns(mixture.dim), conditioning, batch_size, **more)
        if min(rows, val_rows) < 1:
            raise ValueError(f"rows is {rows} and val_rows {val_rows}; both must be at least 1.")
        self.mixture, self.counts = mixture, {"train": rows, "val": val_rows}

    def names(self) -> list[str]:
        """The number of each component."""
        return [str(k) for k in range(len(self.mixture.means))]

    def source(self, split: str) -> Source:
        if split not in self.counts:
            raise UserError(f"There is no split {split!r}; there are 'train' and 'val'.")
        x, component = self.mixture.sample(Noise(self.seed, split), self.counts[split])
        return Source(x.to(torch.float32).numpy(), component.tolist())
