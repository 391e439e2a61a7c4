"""What stands in docs/ runs: commands, the diff, the notebook; what it points to is there."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.io import wavfile
from tiny import ROOT

from pipeline.cli import main

PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
KEPT = "[{class_path: pipeline.callbacks.Last}, {class_path: pipeline.callbacks.SampleSheet}]"
SMALL = {  # what makes the commands of a page small
    "fit": ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--model.warmup", "1"]
    + ["--trainer.accelerator", "cpu", "--data.batch_size", "4", "--model.sampler.steps", "2"]
    + ["--trainer.logger", "false", "--trainer.callbacks", KEPT],
    "generate": ["--number", "1", "--device", "cpu"],
    "evaluate": ["--number", "6", "--micro-batch", "6", "--device", "cpu"],
}
NETWORK = "--model.denoiser.network"
UNET = [f"{NETWORK}.widths", "[16, 16, 16]", f"{NETWORK}.blocks", "1"]


def blocks(page: Path, kind: str) -> list[str]:
    """What stands between the fences of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The words of each command, without python -m pipeline."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("python -m pipeline ")) for line in lines]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with conf/ and the data that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PIPELINE_RUN", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    chance = np.random.default_rng(0)
    for folder in ("pictures", "classes/cat", "classes/dog", "sounds", "shards"):
        (tmp_path / "my" / folder).mkdir(parents=True)
    for k in range(60):
        pixels = chance.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        kind = "cat" if k % 2 else "dog"
        for file in (f"pictures/{k}.png", f"classes/{kind}/{k}.png", f"shards/{k}.png"):
            Image.fromarray(pixels).save(tmp_path / "my" / file)
        for folder in ("pictures", "shards", "sounds"):
            (tmp_path / f"my/{folder}/{k}.txt").write_text(f"a {kind}\na picture of a {kind}")
        sound = chance.integers(-999, 999, 2500, dtype=np.int16)
        wavfile.write(tmp_path / f"my/sounds/{k}.wav", 8000, sound)
    (tmp_path / "shards").mkdir()
    for k in range(2):
        with tarfile.open(tmp_path / f"shards/{k}.tar", "w") as shard:
            for file in sorted((tmp_path / "my/shards").iterdir())[60 * k : 60 * k + 60]:
                shard.add(file, file.name)
    lines = ["temperature,pressure,machine,rpm"]
    lines += [f"{20 + k % 7},{1 + k % 5 / 10},pump-{k % 2 + 6},{1500 + 10 * k}" for k in range(60)]
    (tmp_path / "sensors.csv").write_text("\n".join(lines))
    return tmp_path


def run(words: list[str]) -> int:
    """A command made small: of `fit`, what the page says comes later and wins."""
    door, *said = words
    points = {"conf/experiment/mixture.yaml", "conf/experiment/table.yaml"} & set(said)
    if door == "fit":
        return main([door, *SMALL[door], *([] if points else UNET), *said])
    return main([door, *said, *SMALL[door]])


@pytest.mark.slow
def test_the_commands_on_data_and_evaluation_run(here: Path) -> None:
    for words in commands(ROOT / "docs/data.md") + commands(ROOT / "docs/evaluation.md"):
        assert run(words) == 0, words
    assert len(list((here / "runs/mine").glob("*/last.ckpt"))) == 7
    drawn = {file.parent.name for file in here.glob("drawn/*/manifest.json")}
    assert drawn == {"first", "table"}
    scores = json.loads((here / "drawn/scores.json").read_text())
    assert scores["seeds"] == 3 and len(scores["ladder"]) == 5
    assert len(list(here.glob("drawn/sweep/*.json"))) == 8


def test_members_of_your_own_train_and_draw(here: Path) -> None:
    page = ROOT / "docs/extending.md"
    for kind in ("python", "yaml"):
        for text in blocks(page, kind):
            (here / text.split()[1]).write_text(text)  # its first line names the file
    try:
        for words in commands(page):
            assert run(words) == 0, words
        for name in ("plain", "rings"):
            assert (here / f"drawn/{name}/samples.csv").read_text().count("\n") > 1
        untrusted = [w for w in commands(page)[1] if w not in ("--trust", "mine")]
        assert run([*untrusted, "--out", "other"]) == 2
    finally:
        sys.modules.pop("mine", None)


@pytest.mark.slow
def test_the_diff_of_a_sampler_applies_and_its_tests_pass(tmp_path: Path) -> None:
    for name in ("pipeline", "conf", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (diff,) = blocks(ROOT / "docs/extending.md", "diff")
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    chosen = [
        "tests/test_samplers.py",
        "tests/test_conf.py",
        "-k",
        "Midpoint or midpoint or orders",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


def test_the_command_of_tensorboard_runs(here: Path) -> None:
    pytest.importorskip("tensorboard")
    (words,) = commands(ROOT / "docs/tracking.md")
    assert run(words) == 0
    assert list(here.glob("runs/mine/tensorboard/events.*"))
    assert (here / "runs/mine/watched/csv/metrics.csv").is_file()


@pytest.mark.slow
def test_the_notebook_runs_and_says_what_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    matplotlib.use("agg")
    notebook = json.loads((ROOT / "docs/lecture.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    found: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            code = re.sub(r"^STEPS = \d+", "STEPS = 500", "".join(cell["source"]), flags=re.M)
            exec(code, found)  # noqa: S102
            matplotlib.pyplot.close("all")
    spread, distance, truth = (found[name] for name in ("spread", "distance", "truth"))
    assert found["error"] < 0.1  # of the learned score; 0.02 after 3,000 steps
    clean, noisy = found["clean"], found["clean"] + 2 * found["SIGMA"] ** 2
    assert clean < spread(found["half"]) < (clean + noisy) / 2 < spread(found["langevin"])
    # the distance of a chain that seldom crosses, of the noisy law, and of the data
    for better, worse in (("Heun", "MALA"), ("DDIM", "ULA")):
        assert distance(found["diffused"][better], truth) < 1
        assert distance(found["walks"][worse], truth) > 5
    assert distance(found["langevin"], truth) > 3
    assert found["share"] > 0.98


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_is_there(page: Path) -> None:
    text = re.sub(r"^```diff\n.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    for link in links:
        assert not link or "://" in link or (page.parent / link).exists(), link
    # files, and not what the page itself makes
    own = r"(?<![\w./])((?:pipeline|tests|benchmarks|docker|conf)/[\w./-]+\.(?:py|yaml|sbatch))"
    for name in set(re.findall(own, text)) - {"conf/sampler/midpoint.yaml"}:
        assert (ROOT / name).is_file(), name


def test_the_citation_is_one_of_this_version() -> None:
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(said)
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]  # type: ignore[index]
    assert said["version"] == version and f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert [one["name"] for one in said["authors"]] == ["The conditional-score-pipeline authors"]
