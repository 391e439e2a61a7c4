"""Weights in parts: each of N devices holds 1/N of them, and all of a block that computes.

Under DDP every device holds the weights, their gradients, averages and the optimizer's state
whole; here it holds a part of each. What is trained and what a checkpoint holds is the same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from pipeline.denoisers import Preconditioned
from pipeline.distributed import collected, parted
from pipeline.errors import UserError
from pipeline.networks import blocks

__all__ = ["FSDP", "shard"]

LEAST = 2, 8  # before that a part and a whole do not always go together


class FSDP(ModelParallelStrategy):
    """Training with the weights in parts, one on each device (FSDP2).

    A checkpoint is the file that one device or DDP writes, and each of them goes on from the
    others', on any number of devices: the first process puts it together a tensor at a time.

    References:
        | Zhao et al., 2023; https://arxiv.org/abs/2304.11277

    Raises:
        UserError: torch is older than 2.8.
    """

    def __init__(self) -> None:
        if tuple(map(int, torch.__version__.split(".")[:2])) < LEAST:
            raise UserError(
                f"Weights in parts need torch {'.'.join(map(str, LEAST))} or later, and this is "
                f"{torch.__version__}: leave trainer.strategy out, or install a later torch."
            )
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return collected(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return collected(optimizer.state_dict())

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        state, told = self.lightning_module.state_dict(), checkpoint["state_dict"]
        parts = {name: parted(w, state.get(name, w)) for name, w in told.items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        parts = []
        for optimizer, told in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                k: {
                    name: parted(x, weights[k]) if x.shape == weights[k].shape else x
                    for name, x in of_one.items()
                }
                for k, of_one in told["state"].items()
            }
            parts.append({**told, "state": state})
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": parts})


def shard(denoiser: Preconditioned, mesh: DeviceMesh) -> None:
    """Leave each process of a mesh its part of a network's weights, block by block.

    Raises:
        UserError: The denoiser has weights beside its network.
    """
    if isinstance(denoiser.network, FSDPModule):
        return
    inside = set(denoiser.network.parameters())
    if beside := [name for name, p in denoiser.named_parameters() if p not in inside]:
        raise UserError(
            f"{type(denoiser).__name__} has {beside[0]} beside its network, and FSDP shares out "
            "the network's weights alone: train with --trainer.strategy ddp."
        )
    for block in blocks(denoiser.network):
        fully_shard(block, mesh=mesh)
    # its own too are let go after each pass: averages may take their place before the next one
    fully_shard(denoiser.network, mesh=mesh, reshard_after_forward=True)
