"""What a person sees while a model trains."""

import sys
import time

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from pipeline.distributed import share
from pipeline.module import ScoreModule

__all__ = ["Progress"]


class Progress(ProgressBar):
    """One bar over all steps of the run, and the throughput in every logger.

    Where the output is not a terminal a line is written now and then instead. The throughput,
    "train/examples_per_s", counts the examples of all devices and leaves out validation.

    Arguments:
        seconds: The least time between two updates of the bar.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        super().__init__()
        self.seconds = seconds
        self.bar: tqdm | None = None

    def disable(self) -> None:
        self.seconds = float("inf")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        interval = self.seconds if sys.stderr.isatty() else max(self.seconds, 15.0)
        self.bar = tqdm(
            total=None if steps == float("inf") else int(steps),
            initial=trainer.global_step,
            desc="Training",
            unit="step",
            mininterval=interval,
            miniters=1,  # the time alone decides
            dynamic_ncols=True,
            disable=not trainer.is_global_zero or self.seconds == float("inf"),
        )
        self._restart_window()

    def _restart_window(self) -> None:
        self.batches, self.since, self.paused = 0, time.perf_counter(), 0.0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: ScoreModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        self.batches += 1
        if (
            self.bar is None or trainer.global_step == self.bar.n
        ):  # gradients were accumulated only
            return
        if pl_module.written(trainer.global_step):
            taken = time.perf_counter() - self.since - self.paused
            examples = self.batches * len(batch[0]) * share(trainer)[1]  # type: ignore[index]
            pl_module.log("train/examples_per_s", examples / taken)
            self._restart_window()
            shown = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k != "v_num"}
            self.bar.set_postfix(
                {k: f"{v:.4f}" for k, v in shown.items() if isinstance(v, float)}, refresh=False
            )
        self.bar.update(trainer.global_step - self.bar.n)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validation_start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bar is not None:
            self.paused += time.perf_counter() - self.validation_start

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")

    def print(self, *args: object, **kwargs: object) -> None:
        """Write a line without breaking the bar."""
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)
