"""The same run on one device and on two."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import ROOT, command, fit, read


def two(folder: Path, *args: str, steps: int = 6) -> subprocess.CompletedProcess[str]:
    """Train in two processes that talk through gloo."""
    devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *command(folder, *devices, *args, steps=steps)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


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
def test_a_batch_that_cannot_be_shared_is_one_sentence(tmp_path: Path) -> None:
    done = two(tmp_path / "run", "--data.batch_size", "7")
    assert done.returncode != 0
    assert "data.batch_size is 7" in done.stderr and "Traceback" not in done.stderr
