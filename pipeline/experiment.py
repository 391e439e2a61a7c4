"""An experiment: model, data and trainer from YAML, and the folder of its run."""

import ctypes
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from pipeline.building import Config, Plan, dump, make
from pipeline.checkpoint import Checkpoint
from pipeline.data import DataModule
from pipeline.denoisers import Denoiser
from pipeline.module import ScoreModule
from pipeline.tracking import loggers

__all__ = ["Experiment", "keep_memory", "quiet", "read"]

SEED = "seed_everything"
NETWORK = "model.denoiser.network"


def parts(
    model: ScoreModule,
    data: DataModule,
    trainer: pl.Trainer,
    seed_everything: int = 0,
    project: str = "conditional-pipeline",
) -> None:
    """The keys of an experiment's YAML.

    Arguments:
        model: What is trained, and how.
        data: What it is trained on.
        trainer: For how long and on what.
        seed_everything: The seed of weights, data, noise and order.
        project: The project in W&B.
    """


def read(files: Sequence[str | Path], options: Sequence[str]) -> Config:
    """The YAML of an experiment, its one seed put wherever one is wanted.

    Raises:
        UserError: A file cannot be read, or has a key that no experiment has.
    """
    config = Config(files, options)
    for old in ("run", "ckpt_path", "config"):  # in the files of runs of before
        config.tree.pop(old, None)
    config.known(parts)
    seed = config.resolve(SEED, int | None) or 0
    config.set(SEED, seed)
    config.set("model.seed", seed)
    if "seed" in config.parameters("data"):
        config.set("data.seed", seed)
    return config


class Experiment:
    """What `fit` trains.

    Arguments:
        files: The YAML of an experiment; several merge, the later over the earlier.
        options: `--KEY VALUE`, over the files.
        run: The run's folder; `runs/EXPERIMENT/TIME` by default.

    Attributes:
        plan: All of it, checked, before anything but the data is made.
        text: The same as YAML.

    Raises:
        UserError: It cannot be built as it is.
    """

    def __init__(
        self, files: Sequence[str | Path], options: Sequence[str], run: str | None = None
    ) -> None:
        config = read(files, options)
        config.resolve("trainer", pl.Trainer)  # what is wrong here is found before data are read
        self.data: DataModule = make(config.resolve("data", DataModule))
        config.fill(NETWORK, self.data.sizes())
        openers = {Denoiser: lambda file: Checkpoint(file).denoiser()}
        self.plan: Plan = config.call(parts, openers=openers)
        told = {key: dump(value) for key, value in self.plan.arguments.items()}
        told |= {key: told[key]["init_args"] for key in ("model", "trainer")}
        self.told = told
        self.text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
        name = Path(files[0]).stem if files else "run"
        # processes started by the first one, one per GPU, write to the folder it chose
        default = f"runs/{name}/{time.strftime('%Y%m%d-%H%M%S')}"
        self.run = Path(run or os.environ.setdefault("PIPELINE_RUN", default))

    def make(self) -> tuple[ScoreModule, pl.Trainer]:
        """The model and the trainer."""
        found = self.plan.arguments
        pl.seed_everything(found[SEED], workers=True)
        model: ScoreModule = make(found["model"])
        given = found["trainer"].arguments
        own: dict[str, Any] = {"default_root_dir": str(self.run)}
        if self.logs:
            own["logger"] = False  # ours are made when it is known that all else can be built
        trainer: pl.Trainer = make(found["trainer"]._replace(arguments=given | own))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.run)
        return model, trainer

    @property
    def logs(self) -> bool:
        """Whether the loggers are ours."""
        return self.plan.arguments["trainer"].arguments.get("logger") in (None, True)

    def open_run(self, trainer: pl.Trainer, command: str) -> None:
        """Make the run's folder, and write down how the run was made."""
        self.run.mkdir(parents=True, exist_ok=True)
        unused(self.run / "config.yaml").write_text(self.text, encoding="utf-8")
        if self.logs:
            about: dict[str, Any] = self.told | {"command": command}
            trainer.loggers = loggers(self.run, self.plan.arguments["project"], about)
        print(f"Writing to {self.run}", file=sys.stderr)


def unused(file: Path) -> Path:
    """The file itself, or, where a resumed run has written one before, the first free numbered one
    beside it.
    """
    k, found = 1, file
    while found.exists():
        k, found = k + 1, file.with_stem(f"{file.stem}-{k}")
    return found


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
        "LeafSpec",
        "exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=f".*{said}")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
