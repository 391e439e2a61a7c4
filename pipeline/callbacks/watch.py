"""What a step costs, for the loggers."""

import sys
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipeline.distributed import share
from pipeline.module import ScoreModule

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Watch"]

PHASES = ("forward", "backward", "optimizer")


class Watch(pl.Callback):
    """Logs what a step costs, whenever the loggers are told of one, on the first device:

    - `train/examples_per_s`, of all devices, since the last time and without validation;
    - `time/data`, the share of that time in which the loop waited for a batch;
    - `time/forward`, `time/backward` and `time/optimizer`, the seconds of this one step: noise,
      network and loss; the way back; norm, clipping and optimizer;
    - `train/lr`, the learning rate;
    - `memory/peak_gib`, since training began: of the GPU what tensors took, of the process on a
      processor;
    - `train/tflops`, 10¹² operations a second and device, of products, convolutions and attention
      as they were counted in the first step; `train/mfu`, the same as a share of what the device
      could do, where Lightning knows it. What `Recompute` computes again is counted again.

    On a GPU the phases are told apart by events in its stream, read at this one step: the host
    waits for nothing in between.
    """

    def __init__(self) -> None:
        self.operations = 0.0
        self.marks: list[Any] | None = None
        self.counter: Operations | None = None
        self._begin()

    def on_train_start(self, trainer: pl.Trainer, pl_module: ScoreModule) -> None:
        self.step = trainer.global_step
        self._begin()

    def _begin(self) -> None:
        self.batches, self.waited, self.paused = 0, 0.0, 0.0
        self.since = self.ended = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: ScoreModule, *_: Any) -> None:
        self.waited += time.perf_counter() - self.ended
        if not self.operations:
            self.counter = Operations()
            self.counter.__enter__()
        self.marks = [] if pl_module.written(trainer.global_step + 1) else None
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]
        self._mark(pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: ScoreModule, *_: Any) -> None:
        self._mark(pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: ScoreModule) -> None:
        self._mark(pl_module)
        self._stop_counting()

    def _mark(self, pl_module: ScoreModule) -> None:
        if self.marks is None:
            return
        if pl_module.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def _stop_counting(self, *_: Any) -> None:
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.operations, self.counter = self.counter.number, None

    on_exception = _stop_counting  # type: ignore[assignment]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: ScoreModule, outputs: object, batch: Any, *_: object
    ) -> None:
        self.batches += 1
        if trainer.global_step > self.step and self.marks is not None:
            self._mark(pl_module)
            self._tell(trainer, pl_module, len(batch[0]))
        self.step = trainer.global_step
        self.ended = time.perf_counter()

    def _tell(self, trainer: pl.Trainer, pl_module: ScoreModule, rows: int) -> None:
        marks: list[Any] = self.marks or []
        if pl_module.device.type == "cuda":
            marks[-1].synchronize()
            taken = [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]
        else:
            taken = [b - a for a, b in zip(marks, marks[1:], strict=False)]
        whole = time.perf_counter() - self.since - self.paused
        speed = self.operations * self.batches / whole
        said = dict(zip((f"time/{phase}" for phase in PHASES), taken, strict=True))
        said |= {
            "train/examples_per_s": self.batches * rows * share(trainer)[1] / whole,
            "time/data": self.waited / whole,
            "train/lr": self.rate,
            "memory/peak_gib": peak(pl_module.device) / 2**30,
            "train/tflops": speed / 1e12,
        }
        if (most := available(pl_module)) is not None:
            said["train/mfu"] = speed / most
        for name, value in said.items():
            pl_module.log(name, value)
        self._begin()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: ScoreModule) -> None:
        self.validation_start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: ScoreModule) -> None:
        if trainer.sanity_checking:
            return
        self.ended = time.perf_counter()
        self.paused += self.ended - self.validation_start
        # one that a run had owed comes when a step has begun, and is no part of it
        if self.counter is not None:
            self.counter.number = 0.0
        if self.marks is not None:
            self.marks.clear()
            self._mark(pl_module)


class Operations(TorchDispatchMode):
    """Counts the operations of products, convolutions and attention, by torch's own formulas.

    Not torch's `FlopCounterMode`, which takes others apart on the way, and so changes the last
    bits of the step that it counts.
    """

    number = 0.0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.number += formula(*args, **kwargs, out_val=out)
        return out


def peak(device: torch.device) -> float:
    """The most memory that was taken until now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available(pl_module: ScoreModule) -> float | None:
    """The operations a second that the device is said to be able to do, where that is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_available_flops(pl_module.device, pl_module.denoiser.precision or torch.float32)
