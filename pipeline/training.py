"""`fit`: from YAML to a trained run in a folder of its own."""

import ctypes
import logging
import os
import shlex
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

    def open_run(self, command: str) -> None:
        """Make the run's folder, and write down how the run was made."""
        self.run_folder.mkdir(parents=True, exist_ok=True)
        text = self.parser.dump(self.config, skip_none=False)
        _unused(self.run_folder / "config.yaml").write_text(text)
        if self.config.trainer.logger in (None, True):
            told = yaml.safe_load(text) | {"command": command}
            self.trainer.loggers = loggers(self.run_folder, self.config.project, told)
        print(f"Writing to {self.run_folder}", file=sys.stderr)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self.model.description = self.describe()

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
    quiet()
    keep_memory()
    cli = CLI(argv)
    trainer, run = cli.trainer, cli.run_folder
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        cli.open_run(shlex.join(["python", "-m", "pipeline", "fit", *argv]))
    last = cli.config.ckpt_path
    try:
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last, weights_only=True)
    except Stopped as stopped:
        trainer.print(
            f"\nStopped at step {stopped.step}; the checkpoint is {stopped.path}\n"
            f"Go on with:  python -m pipeline fit --resume {run}\n"
            f"Draw with:   python -m pipeline generate --checkpoint {run}",
            file=sys.stderr,
        )
        return 128 + stopped.signum
    trainer.print(f"Trained {trainer.global_step} steps.", file=sys.stderr)
    trainer.print(f"Draw with:   python -m pipeline generate --checkpoint {run}", file=sys.stderr)
    return 0


def keep_memory() -> None:
    """Make the C library keep the memory that a step frees, for the next step to take again.

    Given back to the system, each page is fetched and cleared anew: some 4,000 page faults and 4 %
    of a step of the default experiment on a CPU. Where there is no glibc, nothing changes.
    """
    trim_threshold, mmap_threshold = -1, -3  # the names that malloc.h gives to these numbers
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def quiet() -> None:
    """Silence what the libraries say about themselves."""
    for said in (
        "does not have many workers",  # the loader gathers from a memory map
        "args parameter is intended to run",
        "LeafSpec",
        "exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=f".*{said}")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)


def _unused(file: Path) -> Path:
    """The file itself, or, where a resumed run has written one before, the first free numbered one
    beside it.
    """
    k, found = 1, file
    while found.exists():
        k, found = k + 1, file.with_stem(f"{file.stem}-{k}")
    return found
