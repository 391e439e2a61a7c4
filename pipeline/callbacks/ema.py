"""The moving average of the weights."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from pipeline.checkpoint import averages

__all__ = ["EMA"]


class EMA(pl.Callback):
    r"""Keeps an exponential moving average of the trained weights, and validates and samples with
    it.

    .. math:: \bar\theta \leftarrow d_k \, \bar\theta + (1 - d_k) \, \theta, \quad
        d_k = \min\left(d, \frac{1 + k}{10 + k}\right)^m

    after every m-th optimizer step k. Checkpoints hold θ as the model's weights and
    :math:`\bar\theta` among the averages, named after d, whenever they are written.

    Arguments:
        decay: The decay d of one step, in [0, 1).
        every: The number m of steps between two updates, at least 1. An average over hundreds of
            steps hardly differs, and each update reads and writes all weights.
    """

    def __init__(self, decay: float = 0.999, every: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"decay = {decay} must lie in [0, 1); 0.999 averages over about 1,000 steps."
            )
        if every < 1:
            raise ValueError(f"every = {every} must be at least 1.")
        self.decay, self.every, self.name = decay, every, f"{decay:g}"
        self.average: dict[str, Tensor] = {}
        self.step = 0
        self.swapped = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fresh = {name: p.detach().clone() for name, p in _trained(pl_module)}
        for name, average in self.average.items():  # loaded from a checkpoint, on the CPU
            fresh[name].copy_(average)
        self.average, self.step = fresh, trainer.global_step
        self.weights = [p for _, p in _trained(pl_module)]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
    ) -> None:
        k, stepped = trainer.global_step, trainer.global_step > self.step  # else accumulated only
        self.step = k
        if not stepped or k % self.every:
            return
        decay = min(self.decay, (1 + k) / (10 + k)) ** self.every
        weights = [p.data for p in self.weights]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)  # type: ignore

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.average:
            self._swap(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.swapped:
            self._swap(pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self.swapped:
            self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: nn.Module) -> None:
        """Exchange weights and averages, in place: whoever holds a parameter, a compiled network
        say, sees it.
        """
        for name, p in _trained(pl_module):
            kept = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name].copy_(kept)
        self.swapped = not self.swapped

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        weights, average = checkpoint["state_dict"], self.average
        if self.swapped:
            average = {name: weights[name] for name in self.average}
            weights.update(self.average)
        checkpoint.setdefault("averages", {})[self.name] = average

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        kept = averages(checkpoint)
        # a run may go on with another decay: it starts from the one average there is
        self.average = kept.get(self.name) or next(iter(kept.values()), {})


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
