"""Less memory for a step, and more time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.checkpoint import checkpoint

from pipeline.module import ScoreModule
from pipeline.networks import blocks

__all__ = ["Recompute"]


class Recompute(pl.Callback):
    """Keeps of each block of the network its input alone, and computes the block once more on the
    way back (activation checkpointing).

    A step takes about a third longer, since the way forward is gone twice, and its memory grows
    with the number of blocks by their inputs and not by all that is between. What is trained is
    the same, to the last bit, and so are checkpoints.

    The blocks are the members of the network's lists of modules, see `pipeline.networks.blocks`.

    References:
        | Chen et al., 2016; https://arxiv.org/abs/1604.06174
    """

    def setup(self, trainer: pl.Trainer, pl_module: ScoreModule, stage: str) -> None:
        for block in blocks(pl_module.denoiser.network):
            block.forward = partial(again, block.forward)


def again(forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """The function's value, which is computed once more where its gradient is."""
    if not torch.is_grad_enabled():
        return forward(*args, **named)
    return checkpoint(forward, *args, use_reentrant=False, **named)
