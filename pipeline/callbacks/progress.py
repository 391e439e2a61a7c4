"""What a person sees while a model trains."""

import sys
import time

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from pipeline.callbacks.watch import peak
from pipeline.module import ScoreModule

__all__ = ["Progress"]

SHOWN = ("train/loss", "val/loss")
SETTLED, TIMED = 5, 10  # steps that are not timed, and that are


class Progress(ProgressBar):
    """One bar over all steps of the run, and after some of them a line that says what a step
    takes, when the run will end, and what memory it needs.

    Where the output is not a terminal a line is written now and then instead of the bar.

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
        self.first, self.since = trainer.global_step, 0.0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: ScoreModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        bar, step = self.bar, trainer.global_step
        if bar is None or step == bar.n:  # gradients were accumulated only
            return
        if pl_module.written(step):
            shown = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k != "v_num"}
            bar.set_postfix({k: f"{v:.4f}" for k, v in shown.items() if k in SHOWN}, refresh=False)
        bar.update(step - bar.n)
        if step == self.first + SETTLED:
            self.since = time.time()
        elif step == self.first + SETTLED + TIMED and not bar.disable:
            self.print(self._expected(bar, pl_module))

    def _expected(self, bar: tqdm, pl_module: ScoreModule) -> str:
        taken = (time.time() - self.since) / TIMED
        said = f"A step takes {taken:.3g} s"
        if bar.total is not None:
            end = time.localtime(time.time() + taken * (bar.total - bar.n))
            said += f", so {bar.total:,} steps end {time.strftime('on %d %B at %H:%M', end)}"
            said += ", validation not counted"
        return f"{said}. The peak of memory is {peak(pl_module.device) / 2**30:.2g} GiB."

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
