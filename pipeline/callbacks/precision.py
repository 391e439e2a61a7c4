"""Which type the network computes in."""

import copy
import time
from typing import Any

import lightning.pytorch as pl
import torch

from pipeline.distributed import share
from pipeline.module import ScoreModule
from pipeline.noise import Noise

__all__ = ["Precision", "seconds"]


class Precision(pl.Callback):
    """Runs the network in bfloat16 where a short trial shows that it pays.

    Before the first step the loss and its gradient are timed on a made batch in both types;
    bfloat16 is taken if it needs less than 0.9 of the time. A processor without instructions for
    it, where it takes 20 times as long, is known by one row already. Weights, preconditioning,
    loss and optimizer stay in float32. The choice is kept in the checkpoint, so a resumed run
    computes as before. Two runs on unlike machines may choose differently: name the type where
    that matters.

    Arguments:
        choice: "auto" for the trial, or "float32" or "bfloat16".
        trials: The number of timed repetitions; the fastest counts.
    """

    def __init__(self, choice: str = "auto", trials: int = 4) -> None:
        if choice not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"choice = {choice!r} must be 'auto', 'float32' or 'bfloat16'.")
        self.choice, self.trials = choice, trials

    def on_train_start(self, trainer: pl.Trainer, pl_module: ScoreModule) -> None:
        types = {"float32": None, "bfloat16": torch.bfloat16}
        if self.choice == "auto":
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            ratio = self._ratio(trainer, pl_module, 1, 1)
            if ratio < 8:  # where other work disturbs, a single trial may say 3 and mean 0.7
                rows = data.batch_size // share(trainer)[1]
                ratio = self._ratio(trainer, pl_module, rows, self.trials)
            self.choice = "bfloat16" if ratio < 0.9 else "float32"
            trainer.print(
                f"A step takes {ratio:.2f} as long in bfloat16: computing in {self.choice}."
            )
        pl_module.denoiser.precision = types[self.choice]

    def _ratio(self, trainer: pl.Trainer, pl_module: ScoreModule, rows: int, trials: int) -> float:
        """The time in bfloat16 over that in float32, the least of each; rank 0's for all."""
        # in turn, so that a machine with other work slows both; the first round warms up
        rounds = []
        for _ in range(trials + 1):
            times = []
            for pl_module.denoiser.precision in (None, torch.bfloat16):
                times.append(seconds(trainer, pl_module, rows))
            rounds.append(times)
        full, half = (min(times) for times in zip(*rounds[1:], strict=True))
        return trainer.strategy.broadcast(half / full)

    def state_dict(self) -> dict[str, Any]:
        return {"choice": self.choice}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.choice = state_dict["choice"]


def seconds(trainer: pl.Trainer, pl_module: ScoreModule, rows: int) -> float:
    """What one loss and its gradient take, on rows of zeros and the null condition."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    x = torch.zeros(rows, *data.shape).to(pl_module.device)
    u = data.conditioning.null().to(x.device).expand(len(x)) if data.conditioning else None
    noise = Noise("trial", device=x.device)
    start = time.perf_counter()
    objective = copy.copy(pl_module.objective)  # chains of its own stay where they are
    objective(pl_module.denoiser, x, u, noise).mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    pl_module.zero_grad(set_to_none=True)
    return taken
