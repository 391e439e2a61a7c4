"""The newest checkpoint, whatever ends the run."""

import signal
import time
from pathlib import Path
from types import FrameType

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

__all__ = ["Last", "Stopped"]


class Stopped(Exception):
    """A run that was asked to stop has written its checkpoint.

    Arguments:
        signum: The signal that asked.
        step: The number of optimizer steps taken.
        path: The checkpoint.
    """

    def __init__(self, signum: int, step: int, path: Path) -> None:
        super().__init__(f"stopped at step {step}, checkpoint {path}")
        self.signum, self.step, self.path = signum, step, path


class Last(Checkpoint):
    """Writes `last.ckpt` into the run's folder: now and then, when asked to stop, and at the end.

    SIGINT (Ctrl-C) and SIGTERM only set a flag. It is read after an optimizer step, every `agree`
    steps where there are several devices, so that all of them stop at the same one; the checkpoint
    is written and `Stopped` is raised. A second Ctrl-C stops at once, and the checkpoint is the
    one before.

    Arguments:
        minutes: The time between two checkpoints, decided on rank 0.
        agree: The number of steps between two agreements among several devices.
    """

    def __init__(self, minutes: float = 5.0, agree: int = 20) -> None:
        self.seconds, self.agree = 60 * minutes, agree
        self.signum = 0
        self.before: dict[int, object] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signum, self.step, self.written = 0, trainer.global_step, time.monotonic()
        for signum in (signal.SIGINT, signal.SIGTERM):
            self.before[signum] = signal.signal(signum, self._ask)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        alone = trainer.world_size == 1
        stepped = trainer.global_step > self.step  # else gradients accumulate, and would be lost
        self.step = trainer.global_step
        if not stepped or (not alone and self.step % self.agree):
            return
        due = time.monotonic() - self.written > self.seconds
        stop = bool(self.signum)
        if not alone:
            due = trainer.strategy.broadcast(due)
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if due or stop:
            self._save(trainer)
        if stop:
            raise Stopped(self.signum or signal.SIGTERM, trainer.global_step, self._path(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self.before = {}

    def _path(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "last.ckpt"

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self._path(trainer))
        self.written = time.monotonic()
