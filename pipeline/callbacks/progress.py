"""What a person sees while a model trains."""

import math
import os
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from pipeline.callbacks.watch import peak
from pipeline.module import ScoreModule

__all__ = ["Progress"]

SETTLED, TIMED = 5, 10  # steps that are not timed, and that are
SLOW, LOOK = 3.0, 60.0  # how many times as slow as announced, over how many seconds, is said


class Progress(ProgressBar):
    """One bar over all steps of the run, and after some of them a line that says what a step
    takes, when the run will end, and what memory it needs; once more where steps become slower.

    Where the output is not a terminal a line is written now and then instead of the bar.

    Arguments:
        seconds: The least time between two updates of the bar.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        super().__init__()
        self.seconds = seconds
        self.bar: tqdm | None = None
        self.taken, self.mark = math.inf, 0  # what a step takes, and since which that is watched

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
        self.taken, self.mark = math.inf, 0
        if not self.bar.disable and trainer.world_size == 1 and pl_module.device.type == "cpu":
            self._warn_of_others()

    def _warn_of_others(self) -> None:
        """Threads share a step out evenly, and one that has no core to itself holds up all."""
        others, cores = busy_cores()
        free = max(1, cores - math.ceil(others - 0.5))
        if torch.get_num_threads() > free:
            self.print(
                f"Other processes keep {others:.1f} of {cores} cores busy, and {free} thread(s) "
                f"may train several times as fast then as {torch.get_num_threads()}: begin with "
                f"OMP_NUM_THREADS={free}."
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: ScoreModule, *_: object) -> None:
        bar, step = self.bar, trainer.global_step
        if bar is None or step == bar.n:  # gradients were accumulated only
            return
        if pl_module.written(step):
            shown = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k != "v_num"}
            bar.set_postfix(
                {k: f"{v:.4f}" for k, v in shown.items() if isinstance(v, float)}, refresh=False
            )
        bar.update(step - bar.n)
        if step == self.first + SETTLED:
            self.since = time.time()
        elif step == self.first + SETTLED + TIMED and not bar.disable:
            self.taken = (time.time() - self.since) / TIMED
            memory = f"The peak of memory is {peak(pl_module.device) / 2**30:.2g} GiB."
            self.print(f"{self._expected(self.taken)}, validation not counted. {memory}")
            self.mark, self.since = step, time.time()
        elif self.mark == 0:  # a validation, and what is drawn then, is behind it
            self.mark, self.since = step, time.time()
        elif self.taken < math.inf and time.time() - self.since > LOOK:
            self._look_again(step, pl_module)

    def _look_again(self, step: int, pl_module: ScoreModule) -> None:
        """Say once, on a CPU, that steps have become slow."""
        taken = (time.time() - self.since) / (step - self.mark)
        self.mark, self.since = step, time.time()
        if taken > SLOW * self.taken and pl_module.device.type == "cpu":
            also = ""
            if torch.get_num_threads() > 1:
                also = " Where other processes share the cores, stop by Ctrl-C and go on with "
                also += "OMP_NUM_THREADS=1: one thread waits for no other."
            self.print(f"{self._expected(taken)}: {taken / self.taken:.0f} times as slow.{also}")
            self.taken = math.inf

    def _expected(self, taken: float) -> str:
        bar, said = self.bar, f"A step takes {taken:.3g} s"
        if bar is None or bar.total is None:
            return said
        end = time.localtime(time.time() + taken * (bar.total - bar.n))
        return f"{said}, so {bar.total:,} steps end {time.strftime('on %d %B at %H:%M', end)}"

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.mark = 0

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.on_exception()

    def on_exception(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def print(self, *args: object, **kwargs: object) -> None:
        """Write a line without breaking the bar."""
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)


def busy_cores(seconds: float = 0.2) -> tuple[float, int]:
    """How many of the cores that this process may use are at work while it sleeps, and how many
    there are; 0 where the system does not say.
    """
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
    stat = Path("/proc/stat")
    if not mine or not stat.exists():
        return 0.0, len(mine) or os.cpu_count() or 1

    def ticks() -> tuple[int, int]:
        """Of these cores since the machine was started: all, and idle."""
        rows = [line.split() for line in stat.read_text().splitlines()]
        own = [list(map(int, r[1:])) for r in rows if r[0][:3] == "cpu" and r[0][3:].isdigit()
               and int(r[0][3:]) in mine]  # fmt: skip
        return sum(sum(one[:8]) for one in own), sum(one[3] + one[4] for one in own)

    before = ticks()
    time.sleep(seconds)
    all_of_it, idle = (b - a for a, b in zip(before, ticks(), strict=True))
    return len(mine) * (1 - idle / max(all_of_it, 1)), len(mine)
