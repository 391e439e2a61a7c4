"""`fit`: from YAML to a trained run in a folder of its own."""

import argparse
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from pipeline.doors.shared import add_configuration, say_configuration
from pipeline.errors import UserError, code_of

if TYPE_CHECKING:
    from pipeline.checkpoint import Checkpoint
    from pipeline.module import ScoreModule

SUMMARY = "train a model from a YAML experiment"
FREE = ("",)  # options: any key of an experiment
USAGE = """\
python -m pipeline fit -c EXPERIMENT.yaml [--KEY VALUE ...]
       python -m pipeline fit --resume RUN [--KEY VALUE ...]
       python -m pipeline fit -c EXPERIMENT.yaml --run FOLDER --resume auto [--KEY VALUE ...]"""
DESCRIPTION = """\
Train a conditional score network. Everything is set by the YAML of an experiment, and any part of
it by the command line."""
EPILOG = """\
Often changed
  --seed_everything 1           the seed of weights, data, noise and order
  --trainer.max_steps 5000      how long to train; the learning rate falls to 0 at the end
  --trainer.devices 4           how many GPUs (default: all)
  --trainer.accumulate_grad_batches 2
  --data.batch_size 256         the global batch, all devices together
  --data conf/data/emoji.yaml   other data: any group of conf/ can be swapped like this
  --data.path my/pictures       with the hub data: a folder of pictures with metadata.jsonl,
                                parquet files, or a hub id
  --model.sampler conf/sampler/ddim.yaml
  --model.optimizer.lr 1e-3
  --trainer.callbacks+ conf/callback/evaluation.yaml
                                one more of a list
  --trainer.logger "{class_path: lightning.pytorch.loggers.CSVLogger, save_dir: logs}"
                                one more logger, beside the CSV and Weights & Biases
  --trainer.logger false        no logger at all

The run's folder gets config.yaml, last.ckpt (also at Ctrl-C), best.ckpt, sheets/, csv/ and
wandb/."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser, "an experiment, for example conf/experiment/shapes.yaml")
    add = parser.add_argument
    what = "go on with a stopped run, for example runs/shapes/20260102-030405, as if it had not "
    what += (
        "stopped; 'auto': with the one in --run FOLDER, which is begun where there is none, so "
    )
    what += "that one command serves the first time and every other"
    add("--resume", metavar="RUN", help=what)
    add("--run", metavar="FOLDER", help="where to write (default: runs/EXPERIMENT/TIME)")
    add("--ckpt_path", metavar="FILE", help="a checkpoint to go on from")
    what = "begin with the weights of another run, or checkpoint, where they fit; what does "
    what += "not, such as what reads another encoder, begins anew and is listed"
    add("--init_from", metavar="RUN", help=what)


def run(args: argparse.Namespace, options: list[str], line: str) -> int:
    """Train, and say how to go on when asked to stop. Returns the exit code."""
    files, folder, start = resumed(args)
    if start is not None and args.init_from is not None and args.resume != "auto":
        raise UserError(
            f"--init_from {args.init_from} is for a run that begins, and this one goes on from "
            f"{start}: leave one of them out."
        )
    goes_on, step = args.resume == "auto", 0
    from pipeline.callbacks import Stopped
    from pipeline.checkpoint import Checkpoint
    from pipeline.experiment import Experiment, keep_memory, quiet

    quiet()
    keep_memory()
    experiment = Experiment(files, options, folder)
    if say_configuration(args, experiment.plan, experiment.text):
        return 0
    try:
        model, trainer = experiment.make()
        if start is not None:
            checkpoint = Checkpoint(start)
            experiment.check_start(model, checkpoint)
            start = str(checkpoint.path)  # the one before, where the newest is torn
            goes_on |= checkpoint.path.resolve().parent == experiment.run.resolve()
            step = checkpoint.content["global_step"]
            del checkpoint
        elif args.init_from is not None:
            trainer.print(begin(model, Checkpoint(args.init_from)), file=sys.stderr)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            experiment.open_run(trainer, line, step if goes_on else None)
        made = quote(str(experiment.run))
        trainer.fit(model, datamodule=experiment.data, ckpt_path=start, weights_only=True)
    except Stopped as stopped:
        trainer.print(
            f"\nStopped at step {stopped.step}; the checkpoint is {stopped.path}\n"
            f"Go on with:  python -m pipeline fit --resume {made}\n"
            f"Draw with:   python -m pipeline generate --checkpoint {made}",
            file=sys.stderr,
        )
        return code_of(stopped.signum)
    except BaseException as error:
        experiment.give_back()
        told = said(error)
        raise told from (None if told is error else error)
    trainer.print(f"Trained {trainer.global_step} steps.", file=sys.stderr)
    kept = any(experiment.run.glob("*.ckpt")) and not trainer.fast_dev_run  # type: ignore
    draw = f"Draw with:   python -m pipeline generate --checkpoint {made}"
    trainer.print(draw if kept else "No checkpoint is kept.", file=sys.stderr)
    return 0


def begin(model: "ScoreModule", other: "Checkpoint") -> str:
    """Give a denoiser the averaged weights of another that fit, by name; in words, which."""
    mine, given = model.denoiser.state_dict(), other.weights()
    fit = {name: w for name, w in given.items() if name in mine and mine[name].shape == w.shape}
    if not fit:
        raise UserError(
            f"--init_from {other.path}: no weight of it fits this network; name another, or "
            "change model.denoiser.network."
        )
    model.denoiser.load_state_dict(fit, strict=False)
    left = [name for name in mine if name not in fit]
    listed = f"; begun anew: {', '.join(left)}" if left else ""
    unused = [name for name in given if name not in fit and name not in mine]
    more = f"; not taken: {', '.join(unused)}" if unused else ""
    return f"{len(fit)} of {len(mine)} weights are those of {other.path}{listed}{more}."


def said(error: BaseException) -> BaseException:
    """What ends a run, as a person is told it."""
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    reason = " ".join(str(error).split())
    if isinstance(error, MisconfigurationException):
        return UserError(reason)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in reason:
        return UserError(
            f"The memory of the device does not hold a step ({reason[:100]}): make "
            "--data.batch_size smaller, and add --trainer.accumulate_grad_batches 2."
        )
    if isinstance(error, UserError) and "Original Traceback" in reason:
        return UserError(reason.rpartition("UserError: ")[2])  # as the loader's process said it
    if isinstance(error, SystemExit | KeyboardInterrupt):
        # Lightning's answer to being asked while it sets up, and to a second Ctrl-C
        asked: BaseException | None = error
        while asked is not None and not (isinstance(asked, KeyboardInterrupt) and asked.args):
            asked = asked.__cause__ or asked.__context__
        return asked or KeyboardInterrupt()
    return error


def resumed(args: argparse.Namespace) -> tuple[list[str], str | None, str | None]:
    """The files of the experiment, the run's folder and the checkpoint to start from."""
    if args.resume is None:
        return args.config, args.run, args.ckpt_path
    from pipeline.checkpoint import BEFORE, LAST
    from pipeline.experiment import CONFIG, newest_config

    if args.resume == "auto":
        if args.run is None:
            raise UserError(
                "--resume auto goes on with the run in --run FOLDER, or begins it there: name the "
                "folder."
            )
        held = [Path(args.run) / name for name in (LAST, BEFORE)]
        start = args.ckpt_path if not any(file.is_file() for file in held) else str(held[0])
        return args.config, args.run, start
    run = Path(args.resume)
    for names in ((CONFIG,), (LAST, BEFORE)):
        if not any((run / name).is_file() for name in names):
            raise UserError(
                f"--resume {run}: there is no {run / names[0]}; give the folder of a run that was "
                "stopped."
            )
    files = [str(newest_config(run)), *args.config]
    return files, args.run or args.resume, args.ckpt_path or str(run / LAST)
