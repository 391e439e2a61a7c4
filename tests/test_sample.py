"""The door `sample`, opened as a person would."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny import ROOT

from pipeline.cli import main

EXAMPLES = sorted((ROOT / "conf/sample").glob("*.yaml"))
SMALL = ["--draws", "20", "--warmup", "20", "--chains", "3"]


def drawn(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(str(out / "draws.safetensors"), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_every_example_runs(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "-c", str(file), "--out", str(tmp_path / "a"), *SMALL]) == 0
    tensors, about = drawn(tmp_path / "a")
    assert tensors["x"].shape[:2] == (20, 3) and tensors["x"].isfinite().all()
    assert tensors["acceptance"].shape == tensors["diverged"].shape == (20, 3)
    assert about["command"].startswith("python -m pipeline sample -c")
    for name in ("trace.png", "pairs.png"):
        with Image.open(tmp_path / "a" / name) as picture:
            assert min(picture.size) > 100
    out = capsys.readouterr().out
    assert "ESS bulk" in out and "R-hat" in out and "x_1" in out
    # what was written down draws the same again
    again = ["sample", "-c", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")]
    assert main(again) == 0
    assert torch.equal(drawn(tmp_path / "b")[0]["x"], tensors["x"])


def test_parts_can_be_swapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf = ROOT / "conf"
    parts = ["--target", str(conf / "target/student_t.yaml"), "--target.dim", "3"]
    kernel = ["--kernel", str(conf / "kernel/ula.yaml"), "--kernel.step_size", "0.001"]
    file = str(conf / "sample/banana.yaml")
    assert main(["sample", "-c", file, *parts, *kernel, *SMALL, "--out", str(tmp_path)]) == 0
    tensors, about = drawn(tmp_path)
    assert tensors["x"].shape == (20, 3, 3) and set(tensors) == {"x"}  # ULA accepts all
    assert "pipeline.mcmc.ULA" in about["config"]
    assert "warning: R-hat" in capsys.readouterr().err


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import Tensor\n\n\n"
        "def log_prob(x: Tensor) -> Tensor:\n    return -(x**4).sum(dim=1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(
        "target:\n  class_path: pipeline.mcmc.Density\n  init_args:\n    function: mine.log_prob\n"
        "kernel:\n  class_path: pipeline.mcmc.NUTS\n"
    )
    args = ["sample", "-c", str(file), *SMALL, "--out", str(tmp_path / "out")]
    assert main([*args, "--dim", "2"]) == 0
    assert drawn(tmp_path / "out")[0]["x"].shape == (20, 3, 2)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["-c", "nowhere.yaml"], "nowhere.yaml"),
        (["--kernel.step_size", "-1"], "must be positive"),
        (["--kernel.stepsize", "1"], "stepsize"),
        (["--draws", "0"], "at least 1"),
        (["--chains", "0"], "at least 1"),
        (["--dim", "5"], "dim is 5"),
        (["--target", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_said_in_a_sentence(
    args: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = ["-c", str(ROOT / "conf/sample/mixture.yaml")]
    line = ["sample", *example, *SMALL, *args, "--out", str(tmp_path / "out")]
    assert main(line) == 2
    err = capsys.readouterr().err
    assert "error: " in err and reason in err and "Traceback" not in err


def test_draws_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["sample", "-c", str(ROOT / "conf/sample/mixture.yaml"), *SMALL, "--out", str(tmp_path)]
    assert main(args) == 0 and main(args) == 2
    assert "holds results already" in capsys.readouterr().err


def test_help_comes_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    line = [sys.executable, "-X", "importtime", "-m", "pipeline", "sample", "--help"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage: python -m pipeline sample -c FILE.yaml" in done.stdout
    assert "torch" not in done.stderr  # nothing heavy was imported
    assert time.perf_counter() - start < 30
    assert main(["sample"]) == 0 and "--kernel.step_size" in capsys.readouterr().out
