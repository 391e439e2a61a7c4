"""The newest checkpoint, whatever ends the run."""

import os
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from pipeline.checkpoint import BEFORE, LAST

__all__ = ["Last", "Stopped"]


class Stopped(Exception):
    """A run that a signal asked to stop has written its checkpoint, `step` steps behind it."""

    def __init__(self, signum: int, step: int, path: Path) -> None:
        super().__init__(f"stopped at step {step}, checkpoint {path}")
        self.signum, self.step, self.path = signum, step, path


class Last(Checkpoint):
    """Writes `last.ckpt` into the run's folder: now and then, when asked to stop, and at the end.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 only set a flag. It is read after an optimizer
    step, every `agree` steps where there are several devices, so that all of them stop at the same
    one; the checkpoint is written and `Stopped` is raised. A second Ctrl-C stops at once, and the
    checkpoint is the one before. A validation that was due at that step is made up for when the
    run goes on, and a run that ends by itself ends with one.

    A checkpoint is replaced when the new one is whole and on the disk, and the one before is kept
    as `before.ckpt`.

    Arguments:
        minutes: The time between two checkpoints, decided on rank 0.
        agree: The number of steps between two agreements among several devices.
    """

    def __init__(self, minutes: float = 5.0, agree: int = 20) -> None:
        self.seconds, self.agree = 60 * minutes, agree
        self.signum = 0
        self.before: dict[int, object] = {}
        self.stopped: Stopped | None = None
        self.owed = False  # whether a validation is due at the step of the checkpoint
        self.validated = 0  # the step of the last one

    def state_dict(self) -> dict[str, Any]:
        return {"owed": self.owed, "validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.owed, self.validated = state_dict["owed"], state_dict["validated"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signum, self.step, self.written = 0, trainer.global_step, time.monotonic()
        self.stopped = None
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            self.before[signum] = signal.signal(signum, self._ask)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
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
            loop = trainer.fit_loop.epoch_loop
            self.owed = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore
            self._save(trainer)
            self.owed = False
        if stop and self.step != trainer.max_steps:  # else the run ends by itself
            signum = self.signum or signal.SIGTERM
            self.stopped = Stopped(signum, trainer.global_step, self._path(trainer))

    def _stop(self, *_: object) -> None:
        if self.stopped is not None:
            raise self.stopped

    # the step is written down before any of these comes
    on_validation_start = on_train_epoch_end = _stop  # type: ignore[assignment]

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        self._stop()
        if self.owed:  # the run goes on
            self.owed = False
            validate(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        last: Any = trainer
        if self.owed or (last.enable_validation and self.validated != trainer.global_step):
            self.owed = False
            validate(trainer)
            self._save(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self.before = {}

    def _path(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / LAST

    def _save(self, trainer: pl.Trainer) -> None:
        self.written = time.monotonic()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = self._path(trainer)
        if trainer.is_global_zero and path.exists():
            keep(path, path.with_name(BEFORE))
        trainer.save_checkpoint(path)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Tell those who keep the best where it lies now: the run's folder may have moved."""
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state and callback.dirpath:
                move(state, str(callback.dirpath))


def validate(trainer: pl.Trainer) -> None:
    """A validation at the step that the run goes on from, as it would have been there: Lightning
    takes it for done.
    """
    loop = trainer.fit_loop.epoch_loop
    first = trainer._logger_connector._first_loop_iter
    trainer.validating, loop.val_loop.restarting = True, False
    loop._batches_that_stepped -= 1  # what loggers call the step; it is counted up after
    loop.val_loop.run()
    loop._batches_that_stepped += 1
    trainer.training, trainer._logger_connector._first_loop_iter = True, first


def keep(path: Path, before: Path) -> None:
    """The file under a second name too; at no moment is it under none."""
    part = before.with_suffix(".part")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # a file system without links
        shutil.copyfile(path, part)
    os.replace(part, before)


def move(state: dict[str, Any], folder: str) -> None:
    """The state of a `ModelCheckpoint` as if it had always kept its files in this folder."""

    def here(path: str) -> str:
        return str(Path(folder) / Path(path).name) if path else path

    state["dirpath"] = folder
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[key] = here(state.get(key, ""))
    state["best_k_models"] = {here(k): v for k, v in state.get("best_k_models", {}).items()}
