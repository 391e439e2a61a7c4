"""Runs that are killed without a word, at any moment."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny import CALLBACKS, contents, equal, launch, read

STEPS = 12
EAGER = [
    *(one for one in CALLBACKS if not one["class_path"].endswith("Last")),
    {"class_path": "pipeline.callbacks.Last", "init_args": {"minutes": 0}},  # after every step
]
OTHER_DISK = Path("/dev/shm")


class Die(pl.Callback):
    """Is killed before the validation at the end, the first time."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        note = Path(trainer.default_root_dir).parent / "died"
        if trainer.global_step == STEPS and not note.exists():
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def train(run: Path, callbacks: list[dict[str, Any]] = EAGER) -> None:
    """What is typed the first time and every other."""
    if OTHER_DISK.is_dir():
        os.environ["TMPDIR"] = str(OTHER_DISK)
    sys.stderr = (run.parent / "said").open("a")
    sys.exit(launch(run, "--resume", "auto", callbacks=callbacks, steps=STEPS))


def start(run: Path, *how: Any) -> Any:
    """A process of its own, forked from one that has imported what a run needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny", "pipeline.experiment", "pipeline.callbacks"])
    run.parent.mkdir(exist_ok=True)
    process = context.Process(target=train, args=(run, *how))
    process.start()
    return process


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_the_same_command_carries_on_after_a_kill(kills: int, tmp_path: Path) -> None:
    """At moments spread over the run, most of them while a checkpoint is written: nothing is torn,
    and what ends is the run that was not disturbed.
    """
    whole = tmp_path / "whole" / "run"
    start(whole).join()  # and the server has imported
    begun, process = time.monotonic(), start(tmp_path / "again" / "run")
    process.join()
    taken = time.monotonic() - begun
    moments, killed, runs = random.Random(kills), 0, 0
    while killed < kills or runs == 0:
        run = tmp_path / str(runs) / "run"
        process = start(run)
        process.join(moments.uniform(0, taken) if killed < kills else None)
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
            continue
        assert process.exitcode == 0, (run.parent / "said").read_text()
        assert_the_same(run, whole)
        runs += 1


def assert_the_same(run: Path, whole: Path) -> None:
    """What two runs have left, sheets and best weights too; and no half a file."""
    for part in ("state_dict", "averages", "optimizer_states", "global_step", "skipped"):
        assert equal(read(run)[part], read(whole)[part]), part
    best = [torch.load(one / "best.ckpt", weights_only=True) for one in (run, whole)]
    assert equal(best[0]["averages"], best[1]["averages"])
    assert contents(run / "sheets") == contents(whole / "sheets")
    assert not list(run.glob("**/*.part"))


def test_a_kill_before_the_last_validation_loses_nothing_of_it(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole" / "run", tmp_path / "run" / "run"
    die = [*EAGER, {"class_path": "test_kills.Die"}]
    for place, how, code in ((whole, EAGER, 0), (run, die, -signal.SIGKILL), (run, die, 0)):
        process = start(place, how)
        process.join()
        assert process.exitcode == code
    assert_the_same(run, whole)
