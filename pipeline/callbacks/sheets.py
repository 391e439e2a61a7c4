"""Pictures drawn while a model trains."""

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch

from pipeline.generator import Generator
from pipeline.module import ScoreModule
from pipeline.png import contact_sheet, to_uint8

__all__ = ["SampleSheet"]


class SampleSheet(pl.Callback):
    """Draws the same prompts with the same seeds at every validation, from the averaged weights.

    Each sheet is written into the run's folder, as `sheets/step-000500.png`, and given to every
    logger that takes pictures.

    Arguments:
        prompts: What to draw.
        columns: The number of pictures in a row of the sheet.
    """

    def __init__(self, prompts: Sequence[str], columns: int = 4) -> None:
        if not prompts:
            raise ValueError(
                "prompts is empty: name what the sheet shall show, or leave the callback out."
            )
        self.prompts, self.columns = list(prompts), columns

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: ScoreModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # not on_validation_epoch_end, where the averaged weights may be gone already
        if batch_idx or not trainer.is_global_zero or trainer.sanity_checking:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        generator = Generator(
            pl_module.denoiser,
            data.conditioning,
            data.shape,
            pl_module.sampler,
            pl_module.guidance,
        )
        x = torch.cat(list(generator(self.prompts, range(len(self.prompts)))))
        sheet = contact_sheet(to_uint8(x), self.prompts, self.columns)
        folder = Path(trainer.default_root_dir) / "sheets"
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"step-{trainer.global_step:06d}.png")
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples", [sheet], step=trainer.global_step)  # type: ignore[attr-defined]
