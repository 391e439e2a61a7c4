"""The moving average of the weights."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from pipeline.averaging import exponent, keep
from pipeline.checkpoint import averages
from pipeline.distributed import collected, local, parted
from pipeline.errors import UserError

__all__ = ["EMA", "PowerEMA"]


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
        self.decay = decay
        self._begin([f"{decay:g}"], every)

    def _begin(self, names: Sequence[str], every: int) -> None:
        if every < 1:
            raise ValueError(f"every = {every} must be at least 1.")
        self.every, self.step, self.swapped = every, 0, False
        self.averages: dict[str, dict[str, Tensor]] = {name: {} for name in names}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if sum(isinstance(one, EMA) for one in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise UserError(
                "Two callbacks average the weights, and each would put its own in place of the "
                "other's: name one, EMA or PowerEMA, in trainer.callbacks."
            )

    def kept_share(self, name: str, k: int) -> float:
        """The share of an average that is kept at step k, over m steps."""
        return min(self.decay, (1 + k) / (10 + k)) ** self.every

    @property
    def average(self) -> dict[str, Tensor]:
        """The first average, which validates and draws."""
        return next(iter(self.averages.values()))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._place(pl_module)
        self.step = trainer.global_step
        self.weights = [p for _, p in _trained(pl_module)]

    def _place(self, pl_module: pl.LightningModule) -> None:
        """Lay the averages beside the weights: on their device, in parts where they are."""
        for name, loaded in self.averages.items():
            fresh = {key: p.detach().clone() for key, p in _trained(pl_module)}
            for key, average in loaded.items():  # from a checkpoint, on the CPU
                fresh[key].copy_(parted(average, fresh[key]))
            self.averages[name] = fresh

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: nn.Module, *_: object) -> None:
        k, stepped = trainer.global_step, trainer.global_step > self.step  # else accumulated only
        self.step = k
        if not stepped or k % self.every:
            return
        weights = [local(p.data) for p in self.weights]
        for name, average in self.averages.items():
            share = 1 - self.kept_share(name, k)
            torch._foreach_lerp_([local(w) for w in average.values()], weights, share)  # type: ignore

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.average:
            if not hasattr(self, "weights"):  # before training, or after all of it
                self._place(pl_module)
            self._swap(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: nn.Module, *_: object) -> None:
        if self.swapped:
            self._swap(pl_module)

    on_exception = on_validation_end  # type: ignore[assignment]

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
        weights, kept = checkpoint["state_dict"], collected(self.averages)
        if self.swapped:
            first = next(iter(kept))
            average, kept[first] = kept[first], {name: weights[name] for name in self.average}
            weights.update(average)
        checkpoint.setdefault("averages", {}).update(kept)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        kept = averages(checkpoint)
        # a run may go on with another decay: it starts from the first average there is
        first = next(iter(kept.values()), {})
        self.averages = {name: kept.get(name) or first for name in self.averages}


class PowerEMA(EMA):
    r"""Keeps averages of several lengths in proportion to the run, from which that of any other
    length is made afterwards; see `pipeline.averaging`.

    .. math:: \hat\theta \leftarrow d_k \, \hat\theta + (1 - d_k) \, \theta, \quad
        d_k = \left(1 - \frac{m}{k}\right)^{\gamma + 1}

    after every m-th step k. All of them are kept in the run's folder, `averages/`, at some evenly
    spread steps; with those of a checkpoint `generate --ema 0.08` makes and draws with the average
    of length 0.08 at the checkpoint's step. The first validates and draws.

    References:
        | Karras et al., 2024, section 3; https://arxiv.org/abs/2312.02696

    Arguments:
        lengths: The relative lengths σ_rel, at least two different ones, each in (0, 0.288).
        every: The number m of steps between two updates.
        times: How often they are kept in a run, at most; each takes the room of all of them.
    """

    def __init__(
        self, lengths: Sequence[float] = (0.1, 0.05), every: int = 1, times: int = 16
    ) -> None:
        if len(set(lengths)) < 2 or times < 1:
            raise ValueError(
                f"lengths = {list(lengths)} must be at least two, and times = {times} at least 1."
            )
        self.times = times
        self.exponents = {f"{length:g}": exponent(length) for length in lengths}
        self._begin(list(self.exponents), every)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if math.isinf(trainer.estimated_stepping_batches):
            raise UserError(
                "PowerEMA keeps averages at shares of the run, and this run has no end: give "
                "--trainer.max_steps, or average with pipeline.callbacks.EMA."
            )
        super().on_train_start(trainer, pl_module)

    def kept_share(self, name: str, k: int) -> float:
        return (1 - self.every / k) ** (self.exponents[name] + 1)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: nn.Module, *_: object) -> None:
        before = self.step
        super().on_train_batch_end(trainer, pl_module)
        steps = trainer.estimated_stepping_batches
        spacing = -(-int(steps) // (self.times * self.every)) * self.every
        due = self.step > before and self.step % spacing == 0
        if due and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            averages = collected(self.averages)
            if trainer.is_global_zero:
                keep(Path(trainer.default_root_dir), self.step, averages)


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
