"""The same run on one device and on two."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from tiny import CALLBACKS, ROOT, command, equal, fit, read, two

from pipeline.cli import main
from pipeline.data import Batch


class Spoil(pl.Callback):
    """Makes the second process's rows of the third batch NaN."""

    def on_train_batch_start(self, trainer: pl.Trainer, _: object, batch: Batch, k: int) -> None:
        if trainer.global_rank == 1 and k == 2:
            batch.x.fill_(torch.nan)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    one = fit(tmp_path / "one" / "run")
    done = two(tmp_path / "two" / "run")
    assert done.returncode == 0, done.stderr
    for part in ("state_dict", "averages"):
        both = [read(run) for run in (one, tmp_path / "two" / "run")]
        both = [checkpoint[part].get("0.9", checkpoint[part]) for checkpoint in both]
        for name, weight in both[0].items():
            # the sums of the gradients are taken in another order: float32, after 6 steps of Adam,
            # whose step is near the learning rate whatever the gradient's size
            torch.testing.assert_close(both[1][name], weight, rtol=1e-3, atol=2e-4)
    sheets = [run / "sheets/step-000006.png" for run in (one, tmp_path / "two" / "run")]
    pixels = [torch.tensor(list(Image.open(sheet).tobytes())) for sheet in sheets]
    assert (pixels[0] - pixels[1]).abs().max() <= 2


@pytest.mark.slow
def test_what_is_not_finite_on_one_device_is_skipped_on_all(tmp_path: Path) -> None:
    spoil = [*CALLBACKS, {"class_path": "test_devices.Spoil"}]
    done = two(tmp_path / "run", callbacks=spoil)
    assert done.returncode == 0, done.stderr
    ended = read(tmp_path / "run")
    assert ended["skipped"] == [0, 1]
    assert all(w.isfinite().all() for w in ended["state_dict"].values())


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_one_sentence(tmp_path: Path) -> None:
    done = two(tmp_path / "run", "--data.batch_size", "7")
    assert done.returncode != 0
    assert "data.batch_size is 7" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_processes_of_torchrun_write_into_one_folder(tmp_path: Path) -> None:
    """Each names it by its own clock, and the one that comes first is not the first one."""
    args = command(tmp_path / "unused", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    args = args[: args.index("--run")] + args[args.index("--run") + 2 :]
    late = "import os, sys, time; time.sleep(2 * (os.environ['RANK'] == '0'))\n"
    late += "from pipeline.cli import main; sys.exit(main(sys.argv[1:]))\n"
    (tmp_path / "late.py").write_text(late)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    env = {k: v for k, v in os.environ.items() if k != "PIPELINE_RUN"}
    done = subprocess.run(
        [*torchrun, "--standalone", "late.py", *args],
        cwd=tmp_path,
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.glob("runs/*/*")
    assert read(run)["global_step"] == 6 and len(list(run.glob("sheets/*.png"))) == 2


class Lost(pl.Callback):
    """The second process is killed at a batch, once."""

    def __init__(self, batch: int, note: str) -> None:
        self.batch, self.note = batch, Path(note)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        seen = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if trainer.global_rank == 1 and seen == self.batch and not self.note.exists():
            self.note.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_is_lost_is_replaced(tmp_path: Path) -> None:
    """torchrun starts both anew, and the same command goes on."""
    whole, run = tmp_path / "whole" / "run", tmp_path / "run" / "run"
    assert two(whole).returncode == 0
    lost = {"batch": 4, "note": str(tmp_path / "lost")}
    callbacks = [
        *(one for one in CALLBACKS if not one["class_path"].endswith("Last")),
        {"class_path": "pipeline.callbacks.Last", "init_args": {"minutes": 0, "agree": 1}},
        {"class_path": "test_devices.Lost", "init_args": lost},
    ]
    args = command(run, "--trainer.devices", "2", "--resume", "auto", callbacks=callbacks)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--standalone", "--max-restarts", "1", "-m", "--", "pipeline", *args],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": str(ROOT / "tests"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lost").exists()
    for part in ("state_dict", "averages", "optimizer_states", "global_step"):
        assert equal(read(run)[part], read(whole)[part]), part


@pytest.mark.slow
def test_two_processes_draw_what_one_does(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", steps=2)
    args = ["generate", "a red circle", "a blue square", "--checkpoint", str(run), "--number", "3"]
    args += ["--micro-batch", "2", "--sampler", str(ROOT / "conf/sampler/ddpm.yaml")]
    args += ["--steps", "3", "--device", "cpu"]
    assert main([*args, "--out", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--standalone", "-m", "--", "pipeline", *args, "--out", str(tmp_path / "two")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    names = sorted(file.name for file in (tmp_path / "one").glob("*.png"))
    assert len(names) == 7 and done.stdout.count("are in") == 1
    for name in names:
        both = [Image.open(tmp_path / folder / name).tobytes() for folder in ("one", "two")]
        assert both[0] == both[1], name
