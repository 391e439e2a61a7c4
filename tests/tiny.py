"""A training run small enough for a test: the real experiment, its network and data made small."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.cli import main

ROOT = Path(__file__).parent.parent
CALLBACKS = [
    {"class_path": "pipeline.callbacks.Progress"},
    {"class_path": "pipeline.callbacks.Watch"},
    {"class_path": "pipeline.callbacks.Precision", "init_args": {"choice": "float32"}},
    {"class_path": "pipeline.callbacks.EMA", "init_args": {"decay": 0.9, "every": 1}},
    {"class_path": "pipeline.callbacks.SampleSheet", "init_args": {"number": 2}},
    {"class_path": "pipeline.callbacks.Last"},
    {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "filename": "best",
            "monitor": "val/loss",
            "enable_version_counter": False,
        },
    },
]


def fit(
    folder: Path, *args: str, callbacks: list[dict[str, Any]] | None = None, steps: int = 6
) -> Path:
    """Train on the built-in shapes into `folder`, to the end."""
    assert launch(folder, *args, callbacks=callbacks, steps=steps) == 0
    return folder


def launch(
    folder: Path, *args: str, callbacks: list[dict[str, Any]] | None = None, steps: int = 6
) -> int:
    """Train in this process; the exit code."""
    os.environ.pop("PIPELINE_RUN", None)
    return main(command(folder, *args, callbacks=callbacks, steps=steps))


def two(
    folder: Path,
    *args: str,
    steps: int = 6,
    strategy: str = "ddp",
    callbacks: list[dict[str, Any]] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Train in two processes that talk through gloo."""
    devices = ["--trainer.devices", "2", "--trainer.strategy", strategy]
    told = command(folder, *devices, *args, steps=steps, callbacks=callbacks)
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *told],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=300,
    )


def command(
    folder: Path, *args: str, callbacks: list[dict[str, Any]] | None = None, steps: int = 6
) -> list[str]:
    """The arguments of `python -m pipeline` for a small run."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    tiny = folder.parent / "tiny.yaml"
    trainer = {"callbacks": CALLBACKS if callbacks is None else callbacks, "max_steps": steps}
    tiny.write_text(yaml.safe_dump({"trainer": trainer | {"val_check_interval": 3}}))
    network = "--model.denoiser.network"
    return (
        ["fit", "-c", str(ROOT / "conf/experiment/shapes.yaml"), "-c", str(tiny)]
        + [f"{network}.widths", "[16, 16]", f"{network}.blocks", "1", f"{network}.patch", "4"]
        + ["--data.per_combination", "1", "--data.batch_size", "8", "--model.warmup", "2"]
        + ["--model.sampler.steps", "2", "--trainer.logger", "false", "--run", str(folder)]
        + ["--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu", *args]
    )


def read(run: Path) -> dict[str, Any]:
    """The checkpoint that ends a run."""
    return torch.load(run / "last.ckpt", weights_only=True)


def equal(a: Any, b: Any) -> bool:
    """Whether two states are the same to the last bit, at any depth."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def sentence(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that bad input ends in."""
    capsys.readouterr()
    assert main(args) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "Traceback" not in said
    return said
