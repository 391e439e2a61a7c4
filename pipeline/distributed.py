"""Processes that work together: who this one is, what the first does for all, and what all have.

Two groups are told apart. All processes of `torch.distributed` draw and measure together
(`place`). A global batch is shared by those that hold a whole model between them (`share`): under
tensor parallelism they are fewer.

A tensor may be in parts, one in each process (torch's DTensor), as weights are under
`pipeline.engines.FSDP`: `assembled`, `collected`, `local` and `parted` go from one form to the
other, and leave other tensors as they are.
"""

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from pipeline.errors import UserError

__all__ = ["assembled", "barrier", "collected", "each", "first", "gather", "in_turn", "join"]
__all__ += ["local", "on_machine", "parted", "place", "share", "total"]

T = TypeVar("T")


def place() -> tuple[int, int]:
    """This process's rank and the number of processes; 0 and 1 without a group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def on_machine() -> tuple[int, list[int]]:
    """This process's number among those of its machine, and their ranks. All have to call it."""
    files = Path("/proc/self/ns/mnt"), Path("/proc/sys/kernel/random/boot_id")
    known = [str(files[0].readlink()), files[1].read_text()] if files[0].is_symlink() else []
    every = each(lambda: [platform.node(), *known])
    ranks = [rank for rank, one in enumerate(every) if one == every[place()[0]]]
    return ranks.index(place()[0]), ranks


def share(trainer: Any) -> tuple[int, int]:
    """Which part of a trainer's global batch is this process's, of how many; 0 of 1 without one.

    Raises:
        UserError: The trainer counts other processes than there are.
    """
    shares = getattr(trainer, "distributed_sampler_kwargs", None)
    rank, parts = (shares["rank"], shares["num_replicas"]) if shares else (0, 1)
    if distributed.is_available() and distributed.is_initialized() and place()[1] % parts:
        raise UserError(
            f"{place()[1]} processes run and the trainer counts {parts} devices, so some rows of "
            "each batch would be taken by none: start one process for each device, such as with "
            "srun --ntasks-per-node DEVICES, and set trainer.num_nodes to the number of nodes."
        )
    return rank, parts


def first(make: Callable[[], T]) -> T:
    """What the first process makes, in every process. Every process has to call it.

    Where the first fails, all fail: its error is raised in each of them.
    """
    rank, world = place()
    if world == 1:
        return make()
    box = [made(make) if rank == 0 else None]
    distributed.broadcast_object_list(box)
    return opened(box[0])


def each(make: Callable[[], T]) -> list[T]:
    """What each makes, in all, in order. Every process has to call it; where one fails, all do."""
    _, world = place()
    if world == 1:
        return [make()]
    boxes: list[Any] = [None] * world
    distributed.all_gather_object(boxes, made(make))
    return [opened(box) for box in boxes]


def made(make: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What is made, or why it is not, as it can be sent."""
    try:
        return make(), None
    except (UserError, OSError) as error:
        return None, error
    except Exception as error:  # as words: not every error can be sent
        return None, RuntimeError(f"{type(error).__name__} in process {place()[0]}: {error}")


def opened(box: Any) -> Any:
    value, error = box
    if error is not None:
        raise error
    return value


def barrier() -> None:
    """Wait until every process has come here."""
    if place()[1] > 1:
        distributed.barrier()


def in_turn(make: Callable[[], T]) -> T:
    """What this process makes, after the first has and wrote it down; every process calls it."""
    rank, _ = place()
    if rank > 0:
        barrier()
    try:
        return make()
    finally:
        if rank == 0:
            barrier()


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, those of the first process first; each may have another number.

    Every process has to call it, with rows of one width.
    """
    rank, world = place()
    if world == 1:
        return rows
    counts = torch.zeros(world, dtype=torch.int64, device=rows.device)
    counts[rank] = len(rows)
    distributed.all_reduce(counts)
    filled = rows.new_zeros(int(counts.max()), *rows.shape[1:])
    filled[: len(rows)] = rows
    parts = [torch.empty_like(filled) for _ in range(world)]
    distributed.all_gather(parts, filled)
    return torch.cat([part[:n] for part, n in zip(parts, counts.tolist(), strict=True)])


def total(x: Tensor) -> Tensor:
    """The sum over all processes, in place. Every process has to call it."""
    if place()[1] > 1:
        distributed.all_reduce(x)
    return x


def local(x: Tensor) -> Tensor:
    """What of a tensor is in this process."""
    return getattr(x, "to_local", lambda: x)()


def assembled(x: Tensor, like: Tensor | None = None) -> Tensor:
    """The whole of a tensor, or, with another that is like the whole, of what is `local`. Every
    process has to call it.
    """
    if hasattr(like, "to_local"):
        from torch.distributed.tensor import DTensor

        told: Any = like
        how = {"shape": told.shape, "stride": told.stride()}
        x = DTensor.from_local(x, told.device_mesh, told.placements, **how)
    return getattr(x, "full_tensor", lambda: x)()


def collected(state: Any) -> Any:
    """Mappings of tensors, whole in the first process, `None` in others. All have to call it."""
    if isinstance(state, Mapping):
        return {key: collected(value) for key, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    x = assembled(state)
    return x.cpu() if place()[0] == 0 else None


def parted(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in parts as another one of its shape is; nothing is sent."""
    if not hasattr(like, "to_local"):
        return x
    from torch.distributed.tensor import distribute_tensor

    told: Any = like
    x = x.to(told.device_mesh.device_type)
    return distribute_tensor(x, told.device_mesh, told.placements, src_data_rank=None)


@contextmanager
def join(device: str) -> Iterator[str]:
    """Joins torchrun's processes, if any, and says this one's device: for "auto" its own GPU."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device == "auto":
        local = f"cuda:{os.environ['LOCAL_RANK']}" if several else "cuda"
        device = local if torch.cuda.is_available() else "cpu"
    if not several:
        yield device
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()
