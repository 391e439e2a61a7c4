"""Runs that are killed without a word, at any moment."""

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import CALLBACKS, contents, equal, launch, read

STEPS = 12
EAGER = [
    *(one for one in CALLBACKS if not one["class_path"].endswith("Last")),
    {"class_path": "pipeline.callbacks.Last", "init_args": {"minutes": 0}},  # after every step
]
OTHER_DISK = Path("/dev/shm")


def train(run: Path) -> None:
    """What is typed the first time and every other."""
    if OTHER_DISK.is_dir():
        os.environ["TMPDIR"] = str(OTHER_DISK)
    sys.stderr = (run.parent / "said").open("a")
    sys.exit(launch(run, "--resume", "auto", callbacks=EAGER, steps=STEPS))


def start(run: Path) -> Any:
    """A process of its own, forked from one that has imported what a run needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny", "pipeline.experiment", "pipeline.callbacks"])
    run.parent.mkdir(exist_ok=True)
    process = context.Process(target=train, args=(run,))
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
        for part in ("state_dict", "averages", "optimizer_states", "global_step", "skipped"):
            assert equal(read(run)[part], read(whole)[part]), part
        assert contents(run / "sheets") == contents(whole / "sheets")
        assert not list(run.glob("**/*.part"))
        runs += 1
