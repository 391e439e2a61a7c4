"""The trained model, exported at the end."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from pipeline import exported
from pipeline.checkpoint import LAST, Checkpoint
from pipeline.errors import UserError
from pipeline.files import fresh

__all__ = ["Export"]


class Export(pl.Callback):
    """When training has ended, writes the model into the run's folder as `export` does, `model/`
    (`model-2/`, … where it was gone on with), and gives it to Weights & Biases as an artefact:
    where you are logged in, weights are uploaded. It needs `Last`; a model that cannot be exported
    is said, and the run ends as it would without.
    """

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or not (run / LAST).is_file():
            return
        checkpoint = Checkpoint(run)
        folder = fresh(run / "model", "-")
        try:
            exported.save(folder, checkpoint.about, checkpoint.weights())
        except UserError as error:
            folder.rmdir()
            trainer.print(f"warning: The model was not exported: {error}")
            return
        takers: list[Any] = [one for one in trainer.loggers if hasattr(one, "use_artifact")]
        for logger in takers:
            import wandb

            artifact = wandb.Artifact(f"model-{logger.experiment.id}", "model")
            artifact.add_dir(str(folder))
            logger.experiment.log_artifact(artifact)
