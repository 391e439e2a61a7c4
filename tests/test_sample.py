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


MINE = """
import torch


def log_prob(x):
    return -(x**4).sum(dim=1)


class Quartic:
    def log_prob(self, x):
        return log_prob(x)

    def __call__(self, x):
        return log_prob(x)


quartic = Quartic()
gamma = torch.distributions.Gamma(torch.tensor([2.0, 3.0]), 1.0)


def total(x):
    return -(x**2).sum()
"""


def own(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line that draws from a function of mine.py."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"target:\n  class_path: pipeline.mcmc.Density\n  init_args:\n    function: {function}\n"
        "kernel:\n  class_path: pipeline.mcmc.NUTS\n"
    )
    return ["sample", "-c", str(file), *SMALL, "--dim", "2", "--out"]


@pytest.mark.parametrize("name", ["log_prob", "quartic.log_prob", "quartic", "gamma.log_prob"])
def test_a_function_of_ones_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = own(f"mine.{name}", tmp_path, monkeypatch)
    assert main([*line, str(tmp_path / "out")]) == 0
    x = drawn(tmp_path / "out")[0]["x"]
    assert x.shape == (20, 3, 2) and (x > 0).all() == (name == "gamma.log_prob")
    # what was written down names it as it was named, and draws the same again
    again = ["sample", "-c", str(tmp_path / "out" / "config.yaml"), "--out", str(tmp_path / "b")]
    assert main(again) == 0 and torch.equal(drawn(tmp_path / "b")[0]["x"], x)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mine.total", "mine.total gave a tensor of torch.float64 with shape () for x with shape"),
        ("mine.gamma", "is mine.gamma; expected the path of a function"),
        ("mine.totl", "did you mean total"),
    ],
)
def test_a_function_that_is_no_density_is_named(
    name: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*own(name, tmp_path, monkeypatch), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "error: " in err and reason in err and "Traceback" not in err


def test_one_chain_is_told_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["sample", "-c", str(ROOT / "conf/sample/mixture.yaml"), *SMALL, "--chains", "1"]
    assert main([*line, "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    warned = [line for line in err.splitlines() if "arning" in line]
    assert len(warned) == 1 and "R-hat needs at least two chains" in warned[0]
    assert "nan" not in out


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
