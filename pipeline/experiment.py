"""An experiment: model, data and trainer from YAML, and the folder of its run."""

import ctypes
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pipeline.building import Config, Plan, describe, dump, make
from pipeline.checkpoint import BEFORE, LAST, Checkpoint, differences
from pipeline.data import DataModule
from pipeline.denoisers import Denoiser
from pipeline.errors import UserError
from pipeline.files import fresh, whole
from pipeline.module import ScoreModule
from pipeline.tracking import loggers

__all__ = ["Experiment", "keep_memory", "newest_config", "quiet", "read"]

SEED = "seed_everything"
CONFIG = "config.yaml"
# of a checkpoint of Lightning, beside the weights
TRAINED = ("global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers")
RESULTS = (LAST, BEFORE, "best.ckpt", "sheets", "csv", "wandb")  # what makes a folder a run
NETWORK = "model.denoiser.network"
SHARDED = "FSDP"  # the strategy of ours, pipeline.engines


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
        # processes started by the first one, one per GPU, write to the folder it chose
        told = run or os.environ.get("PIPELINE_RUN")
        name = Path(files[0]).stem if files else "run"
        self.run = Path(told or f"runs/{name}/{time.strftime('%Y%m%d-%H%M%S')}")
        self.chosen, self.made = told is None, list[Path]()  # the folder; what was made of the run
        self.model: Any = None

    def check(self) -> None:
        """Say what no run can be made of, before anything is."""
        given = self.plan.arguments["trainer"].arguments
        if given.get("precision") not in (None, 32, "32", "32-true"):
            raise UserError(
                f"trainer.precision is {given['precision']!r}, and weights and loss are of 32 "
                "bits: leave it out, and set the network's type by pipeline.callbacks.Precision."
            )
        name = strategy_of(given)
        told = ("fsdp", "parallel", "deepspeed")
        if name != SHARDED and any(word in name.lower() for word in told):
            raise UserError(
                f"trainer.strategy is {name}: name conf/strategy/fsdp.yaml, which shares the "
                "weights out among the devices, or ddp, which holds them whole on each."
            )
        if given.get("max_steps") == 0 or given.get("max_epochs") == 0:
            raise UserError(
                "trainer.max_steps or max_epochs is 0; give the number of steps, or -1 for no end."
            )

    def make(self) -> tuple[ScoreModule, pl.Trainer]:
        """The model and the trainer."""
        self.check()
        found = self.plan.arguments
        first = not _get_rank()  # by the variables of torchrun and SLURM: no group is there yet
        if self.chosen and first and not found["trainer"].arguments.get("fast_dev_run"):
            self.run = new_run(self.run)
            self.made.append(self.run)
            os.environ["PIPELINE_RUN"] = str(self.run)
        pl.seed_everything(found[SEED], workers=True)
        self.model = make(found["model"])
        given = found["trainer"].arguments
        own: dict[str, Any] = {"default_root_dir": str(self.run)}
        if given.get("logger") in (None, True):
            own["logger"] = False  # ours are made when it is known that all else can be built
        silent = given.get("enable_progress_bar") is False  # which Lightning takes for a conflict
        own["enable_progress_bar"] = None if silent else given.get("enable_progress_bar")
        if strategy_of(given) == SHARDED:
            own["inference_mode"] = False  # parts cannot be gathered in it
        plugins = make(given.get("plugins")) or []
        own["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), *own_plugins()]
        trainer: pl.Trainer = make(found["trainer"]._replace(arguments=given | own))
        trainer.callbacks.insert(0, OneFolder())  # type: ignore[attr-defined]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if silent and isinstance(callback, ProgressBar):
                callback.disable()
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.run)
        return self.model, trainer

    def check_start(self, model: ScoreModule, start: Checkpoint) -> None:
        """Say what a checkpoint cannot be gone on with as.

        Raises:
            UserError: It is of another model, or of another condition, or holds weights alone.
        """
        if lacks := [name for name in TRAINED if name not in start.content]:
            raise UserError(
                f"{start.path} holds weights and no training to go on with (it lacks {lacks[0]}): "
                "give the last.ckpt of a run, or begin with these weights by --init_from."
            )
        old, new = describe(start.part("denoiser", Denoiser)), describe(model.denoiser)
        unlike = list(differences(old, new, "model.denoiser"))
        conditioning = self.data.conditioning
        if (conditioning and conditioning.fingerprint()) != start.about["fingerprint"]:
            asked = None if conditioning is None else describe(conditioning)
            unlike += list(differences(start.about["conditioning"], asked, "data.conditioning"))
            unlike = unlike or ["data.conditioning reads other files than it did"]
        optimizers = start.content.get("optimizer_states") or []
        mine = [kinds(model.optimizer(model.denoiser.parameters()).param_groups)]
        if not unlike and optimizers and mine != [kinds(o["param_groups"]) for o in optimizers]:
            unlike.append("model.optimizer is of another kind than it was")
        if unlike:
            raise UserError(
                f"{start.path} cannot be gone on with: {'; '.join(unlike[:3])}. Leave that as it "
                "was, or begin a new run."
            )

    @property
    def logs(self) -> bool:
        """Whether anything is logged: by ours, and by those that are named, beside them."""
        return self.plan.arguments["trainer"].arguments.get("logger") is not False

    def give_back(self) -> None:
        """Leave no folder that announces itself as a run where nothing was trained."""
        for made in [] if self.model is not None and self.model.begun else self.made:
            with suppress(OSError):
                shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)

    def open_run(self, trainer: pl.Trainer, command: str, step: int | None = None) -> None:
        """Take the run's folder, write down how the run was made, and give the trainer its
        loggers; `step` are the steps behind a run that goes on in its own folder.

        Raises:
            UserError: It cannot be written to, or holds a run.
        """
        try:
            if not self.run.exists():
                self.made.append(self.run)
            self.run.mkdir(parents=True, exist_ok=True)
            self.made.append(claim(self.run, self.text, step is not None))
        except OSError as error:
            raise UserError(
                f"--run {self.run} cannot be written to: {error.strerror}; name another folder."
            ) from error
        if self.logs:
            about: dict[str, Any] = self.told | {"command": command}
            for logger in trainer.loggers:
                logger.log_hyperparams(about)
            ours = loggers(self.run, self.plan.arguments["project"], about, step or 0)
            trainer.loggers = [*ours, *trainer.loggers]
        print(f"Writing to {self.run}", file=sys.stderr)


def strategy_of(given: dict[str, Any]) -> str:
    """The name of the strategy that a trainer is given."""
    strategy = given.get("strategy")
    return strategy if isinstance(strategy, str) else getattr(strategy, "cls", str).__name__


def claim(run: Path, text: str, goes_on: bool) -> Path:
    """The configuration, written where none was: whoever comes second does not find the place.

    Raises:
        UserError: The folder holds a run already, and this one does not go on with it.
    """
    held = [file.name for file in run.iterdir() if file.name in (*RESULTS, CONFIG)]
    k, file = 1, run / CONFIG
    while True:
        if not goes_on and (held or k > 1):
            raise UserError(
                f"--run {run} holds a run already ({', '.join(held) or CONFIG}); go on with it by "
                f"--resume {quote(str(run))}, or name another folder."
            )
        try:
            with file.open("x", encoding="utf-8") as opened:
                opened.write(text)
            return file
        except FileExistsError:
            k, file = k + 1, run / f"config-{k}.yaml"


def new_run(folder: Path) -> Path:
    """A folder that nobody has, named like this one."""
    try:
        return fresh(folder, ".")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to: {error.strerror}; give --run FOLDER."
        ) from error


def newest_config(run: Path) -> Path:
    """How the run was last gone on with."""
    numbered = [f for f in run.glob("config-*.yaml") if f.stem.partition("-")[2].isdecimal()]
    return max(numbered, key=lambda f: int(f.stem.partition("-")[2]), default=run / CONFIG)


class OneFolder(pl.Callback):
    """All processes of a run write where the first does: each names folders by its clock."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        told: Any = trainer
        told._default_root_dir = trainer.strategy.broadcast(trainer.default_root_dir)


class WholeFiles(TorchCheckpointIO):
    """Checkpoints whole or not at all, written beside their place: TMPDIR may lie elsewhere."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        with whole(path, alone=True) as part, part.open("wb") as file:
            torch.save(checkpoint, file)  # not by the name: the system's own error would be lost


def own_plugins() -> list[Any]:
    """What a trainer is given beside what it is told."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and not _get_rank():
        print(
            "warning: processes that torchrun starts anew may find the addresses of those that "
            "are gone, and wait for good: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before it.",
            file=sys.stderr,
        )
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1
    if "SLURM_NTASKS" not in os.environ or TorchElasticEnvironment.detect():
        return [WholeFiles()]
    if several:
        try:
            return [WholeFiles(), SLURMEnvironment(auto_requeue=False)]  # docker/slurm.sbatch does
        except RuntimeError as error:  # such as --ntasks without --ntasks-per-node
            raise UserError(str(error)) from error
    # a job's variables, but not one task for each device: Lightning starts its own processes
    return [WholeFiles(), LightningEnvironment()]


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
        "The `srun` command is available",
        "It is recommended to use `self.log",  # what is logged is of all devices already
        "is smaller than the logging interval",  # which is counted in steps, whatever the epoch
    ):
        warnings.filterwarnings("ignore", message=f".*{said}")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)


def kinds(groups: list[dict[str, Any]]) -> list[tuple[int, set[str]]]:
    """How many weights each group of an optimizer has, and by what rule they move."""
    return [(len(g["params"]), {"betas", "momentum"} & g.keys()) for g in groups]
