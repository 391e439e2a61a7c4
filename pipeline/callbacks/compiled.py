"""The network compiled for training."""

from typing import Any

import lightning.pytorch as pl
import torch

from pipeline.callbacks.precision import seconds
from pipeline.denoisers import Energy
from pipeline.distributed import share
from pipeline.errors import UserError
from pipeline.module import ScoreModule

__all__ = ["Compile"]

KINDS = ("auto", "compiled", "eager")


class Compile(pl.Callback):
    """Trains with the network compiled, by `torch.compile`, where a trial shows that it pays.

    Compiled, operations that only pass over memory become one. That takes a minute or two, a
    compiler on a CPU, and less a second time on one machine. It is tried where what is left of the
    run would take `minutes` or more, and kept if a step then takes less than 0.95 of its time;
    where it cannot be done the run goes on without it, and says why. Stands behind `Precision`,
    whose choice it is tried with.

    Pictures are drawn and validated by the same network uncompiled: their numbers of rows vary.
    The choice is kept in the checkpoint, so a resumed run computes as before. An energy is not
    compiled, whose loss is differentiated twice, and neither are weights in parts.

    Arguments:
        choice: "auto" for the trial, or "compiled" or "eager".
        minutes: How long a run has to be for the trial.
        trials: The number of timed repetitions; the fastest counts.

    Raises:
        UserError: It is told to compile what cannot be.
    """

    def __init__(self, choice: str = "auto", minutes: float = 15.0, trials: int = 4) -> None:
        if choice not in KINDS:
            raise ValueError(f"choice = {choice!r} must be one of {', '.join(KINDS)}.")
        self.choice, self.minutes, self.trials = choice, minutes, trials

    def on_train_start(self, trainer: pl.Trainer, pl_module: ScoreModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        rows = data.batch_size // share(trainer)[1]
        denoiser: Any = pl_module.denoiser
        whole = all(type(p) is torch.nn.Parameter for p in denoiser.network.parameters())
        if not whole or isinstance(denoiser, Energy):
            if self.choice == "compiled":
                raise UserError(
                    "An energy, and a network in parts, is not compiled: leave out "
                    "callbacks.Compile, or set its choice to eager."
                )
            self.choice = "eager"
        before = None
        if self.choice == "auto":
            before = self._step(trainer, pl_module, rows)
            if (trainer.max_steps - trainer.global_step) * before < 60 * self.minutes:
                return  # and nothing is chosen: resumed with more steps it may be tried
            trainer.print("Compiling the network, which takes a minute or two.")
        if self.choice == "eager":
            return
        denoiser.compiled = torch.compile(denoiser.network.forward)
        try:
            after = self._step(trainer, pl_module, rows)
        except Exception as error:  # the compiler has many of its own
            denoiser.compiled, reason = None, " ".join(str(error).split())[:200]
            if before is None:
                raise UserError(f"The network could not be compiled: {reason}.") from error
            self.choice = "eager"
            trainer.print(f"It could not be compiled, and is trained as it is: {reason}.")
            return
        if before is not None:
            self.choice = "compiled" if after < 0.95 * before else "eager"
            said = f"A step takes {after / before:.2f} as long compiled: training"
            trainer.print(f"{said} {'with it' if self.choice == 'compiled' else 'without'}.")
        if self.choice == "eager":
            denoiser.compiled = None

    def _step(self, trainer: pl.Trainer, pl_module: ScoreModule, rows: int) -> float:
        """The seconds of a loss and its gradient, the least of several; rank 0's for all."""
        times = [seconds(trainer, pl_module, rows) for _ in range(self.trials + 2)]
        return trainer.strategy.broadcast(min(times[2:]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: ScoreModule) -> None:
        pl_module.denoiser.compiled = None  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        return {"choice": self.choice}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.choice = state_dict["choice"]
