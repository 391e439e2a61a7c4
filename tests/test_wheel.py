"""The wheel, outside the repository: nothing that is needed is left behind."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from tiny import ROOT, fit

from pipeline.cli import main
from pipeline.generator import Generator


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    done = subprocess.run([*pip, str(ROOT)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no wheel can be built here: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def outside(installed: Path, cwd: Path, *told: str) -> str:
    """Run the installed program in an empty folder."""
    cwd.mkdir(exist_ok=True)
    env = os.environ | {"PYTHONPATH": str(installed)}
    call = [sys.executable, "-m", "pipeline", *told]
    done = subprocess.run(call, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_exported_model_draws_the_same_outside(installed: Path, tmp_path: Path) -> None:
    run = fit(tmp_path / "run", steps=3)
    Generator.from_checkpoint(run).save_pretrained(tmp_path / "model")
    told = ["generate", "a red circle", "--number", "1", "--model", str(tmp_path / "model")]
    assert main([*told, "--out", str(tmp_path / "here")]) == 0
    outside(installed, tmp_path / "empty", *told, "--out", "there")
    files = tmp_path / "here/00000.png", tmp_path / "empty/there/00000.png"
    here, there = (Image.open(file).tobytes() for file in files)
    assert here == there


@pytest.mark.slow
def test_the_configuration_comes_with_it(installed: Path, tmp_path: Path) -> None:
    assert len(list((installed / "pipeline/conf").rglob("*.yaml"))) == len(
        list((ROOT / "conf").rglob("*.yaml"))
    )
    here = subprocess.run(
        [sys.executable, "-m", "pipeline", "fit", "-c", "conf/experiment/table.yaml"]
        + ["--data.path", "sklearn:diabetes", "--print_config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    told = ["fit", "-c", "conf/experiment/table.yaml", "--data.path", "sklearn:diabetes"]
    there = outside(installed, tmp_path / "empty", *told, "--print_config")
    assert "pipeline.data.Table" in there and there == here
    (entry,) = installed.glob("*.dist-info/entry_points.txt")
    assert "conditional-score-pipeline = pipeline.__main__:run" in entry.read_text()
