"""Pictures drawn while a model trains."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from pipeline.codec import Codec
from pipeline.errors import UserError
from pipeline.files import whole
from pipeline.module import ScoreModule

__all__ = ["SampleSheet"]


class SampleSheet(pl.Callback):
    """Draws the same prompts with the same seeds at every validation, from the averaged weights,
    all processes together.

    Each sheet is written into the run's folder, as `sheets/step-000500.png`. It is given to every
    logger that takes pictures, as `samples`, and so is each picture of it with its caption, as
    `samples/each`.

    Data that cannot be seen have no sheet.

    Arguments:
        prompts: What to draw; `None` for distinct values of the validation data, evenly spaced.
        number: How many, where `prompts` is `None`.
        columns: The number of pictures in a row of the sheet.
    """

    def __init__(
        self, prompts: list[str] | None = None, number: int = 16, columns: int = 8
    ) -> None:
        if prompts is not None and not prompts:
            raise ValueError("prompts is empty: name what the sheet shall show, or leave it out.")
        self.prompts, self.number, self.columns = prompts, number, columns

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: ScoreModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if type(data.codec).sheet is Codec.sheet:
            return
        prompts = self.prompts or data.prompts(self.number)
        generator = pl_module.generator(data, together=True)
        try:
            rows = torch.cat(list(generator(prompts, range(len(prompts)))))
        except UserError as error:  # one may gather itself; what has diverged is said elsewhere
            rank_zero_warn(f"There is no sheet of step {trainer.global_step}: {error}")
            return
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        sheet: Any = generator.sheet(rows, prompts, self.columns)
        file = Path(trainer.default_root_dir) / f"sheets/step-{trainer.global_step:06d}.png"
        with whole(file, alone=True) as part:
            sheet.save(part, "png")
        takers: list[Any] = [one for one in trainer.loggers if hasattr(one, "log_image")]
        each = [data.codec.sheet(row[None], [""], 1) for row in rows] if takers else []
        for logger in takers:
            step, captions = trainer.global_step, list(map(str, prompts))
            logger.log_image("samples", [sheet], step=step)
            logger.log_image("samples/each", each, step=step, caption=captions)
