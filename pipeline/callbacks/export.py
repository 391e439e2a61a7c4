"""The trained model, exported at the end."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from pipeline.checkpoint import LAST
from pipeline.files import fresh
from pipeline.generator import Generator

__all__ = ["Export"]


class Export(pl.Callback):
    """When training has ended, writes the model into the run's folder as `export` does, `model/`
    (`model-2/`, … where it was gone on with), and gives it to Weights & Biases as an artefact:
    where you are logged in, weights are uploaded.
    """

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or not (run / LAST).is_file():
            return
        folder = fresh(run / "model", "-")
        Generator.from_checkpoint(run).save_pretrained(folder)
        takers: list[Any] = [one for one in trainer.loggers if hasattr(one, "use_artifact")]
        for logger in takers:
            import wandb

            artifact = wandb.Artifact(f"model-{logger.experiment.id}", "model")
            artifact.add_dir(str(folder))
            logger.experiment.log_artifact(artifact)
