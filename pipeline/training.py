"""`fit`: from YAML to a trained run in a folder of its own."""

import logging
import os
import shlex
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from pipeline.callbacks import Stopped
from pipeline.data.base import DataModule
from pipeline.module import ScoreModule
from pipeline.tracking import loggers

__all__ = ["CLI", "train"]


class CLI(LightningCLI):
    """LightningCLI with a folder per run, and a model that says in its checkpoints how to build it
    again.
    """

    def __init__(self, argv: list[str]) -> None:
        super().__init__(
            ScoreModule,
            DataModule,
            subclass_mode_data=True,
            run=False,
            args=argv,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str | None, default=None, help="the run's folder")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="a checkpoint to go on from"
        )
        parser.add_argument(
            "--project", type=str, default="conditional-pipeline", help="the project in W&B"
        )
        # one seed decides everything: the only links there are
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def before_instantiate_classes(self) -> None:
        config = self.config
        given = config.config or []
        name = Path(str(given[0])).stem if given else "run"
        # processes started by the first one, one per GPU, write to the folder it chose
        default = os.environ.setdefault(
            "PIPELINE_RUN", f"runs/{name}/{time.strftime('%Y%m%d-%H%M%S')}"
        )
        self.run_folder = Path(config.run or default)
        config.trainer.default_root_dir = str(self.run_folder)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:  # noqa: ANN401
        config: Any = self.config_init
        if config.trainer.logger in (None, True):
            kwargs["logger"] = False  # ours are made when it is known that all else can be built
        trainer: Any = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.run_folder)
        return trainer

    def describe(self) -> dict[str, Any]:
        """What a checkpoint has to say, plain data all of it."""
        model = yaml.safe_load(
            self.parser.dump(self.config, skip_link_targets=False, skip_none=False)
        )
        data = model["data"]
        return {
            "denoiser": model["model"]["denoiser"],
            "conditioning": data["init_args"].get("conditioning"),
            "sampler": model["model"]["sampler"],
            "guidance": model["model"]["guidance"],
            "data": data,
            "shape": list(self.datamodule.shape),
            "prompts": [],  # what the sample sheet shows, where there is one
        }


def train(argv: list[str]) -> int:
    """Train, and say how to go on when asked to stop. Returns the exit code."""
    warnings.filterwarnings(
        "ignore", message=".*does not have many workers.*"
    )  # the loader gathers from a memory map
    for noise in ("args parameter is intended to run", "LeafSpec", "exists and is not empty"):
        warnings.filterwarnings("ignore", message=f".*{noise}.*")  # Lightning's, about itself
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    cli = CLI(argv)
    trainer, model, run = cli.trainer, cli.model, cli.run_folder
    model.description = cli.describe()
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        run.mkdir(parents=True, exist_ok=True)
        text = cli.parser.dump(cli.config, skip_none=False)
        (_unused(run / "config.yaml")).write_text(text)
        command = shlex.join(["python", "-m", "pipeline", "fit", *argv])
        print(f"Writing to {run}", file=sys.stderr)
        if cli.config.trainer.logger in (None, True):
            trainer.loggers = loggers(
                run, cli.config.project, yaml.safe_load(text) | {"command": command}
            )
    try:
        trainer.fit(
            model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path, weights_only=True
        )
    except Stopped as stopped:
        if trainer.is_global_zero:
            print(
                f"\nStopped at step {stopped.step}; the checkpoint is {stopped.path}\n"
                f"Go on with:   python -m pipeline fit --resume {run}\n"
                f"Draw with:    python -m pipeline generate --checkpoint {run}",
                file=sys.stderr,
            )
        return 128 + stopped.signum if stopped.signum in (signal.SIGINT, signal.SIGTERM) else 1
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        print(
            f"Trained {trainer.global_step} steps. Draw with:   python -m pipeline generate "
            f"--checkpoint {run}"
        )
    return 0


def _unused(file: Path) -> Path:
    """The file itself, or, where a resumed run has written one before, the first free numbered one
    beside it.
    """
    k, found = 1, file
    while found.exists():
        k, found = k + 1, file.with_stem(f"{file.stem}-{k}")
    return found
