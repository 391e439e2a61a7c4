"""The door `show`: figures that hold what generate draws, what a run wrote and what chains did."""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CALLBACKS, ROOT, fit, sentence
from torch import Tensor

from pipeline import figures
from pipeline.checkpoint import write
from pipeline.cli import main
from pipeline.codec import Columns, Pixels
from pipeline.denoisers import Clean
from pipeline.mcmc import MALA, ULA, Banana, sample
from pipeline.networks import MLP, UNet
from pipeline.samplers import DDIM
from pipeline.schedules import Rectified

PROMPT, OTHER = "a red $\\frac circle", "a small blue square at the top left"
KEEP = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"filename": "{step}", "every_n_train_steps": 2, "save_top_k": -1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show") / "run"
    return fit(folder, "--trainer.logger", "true", callbacks=[*CALLBACKS, KEEP])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """What the figures were given, by their names."""
    given: dict[str, tuple] = {}

    def watched(name: str) -> Any:
        own = getattr(figures, name)
        return lambda *args: given.update({name: args}) or own(*args)

    for name in ("curves", "grid", "paths"):
        monkeypatch.setattr(figures, name, watched(name))
    return given


def show(kind: str, out: Path, *args: str) -> dict[str, Any]:
    """What the PNG says of how it was made."""
    assert main(["show", kind, "--out", str(out), *args]) == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG" and min(picture.size) > 100
        told = json.loads(picture.text["Settings"])  # type: ignore[attr-defined]
    assert told["kind"] == kind and told["command"].startswith(f"python -m pipeline show {kind}")
    return told


def generated(checkpoint: Path, out: Path, *args: str) -> list[Tensor]:
    """The pictures that generate draws, one for each prompt."""
    told = ["generate", "--checkpoint", str(checkpoint), "--out", str(out), "--number", "1"]
    assert main([*told, *args]) == 0
    found = [np.array(Image.open(file)) for file in sorted(out.glob("0*.png"))]
    return [torch.from_numpy(array).movedim(-1, 0) for array in found]


def test_curves_are_the_numbers_of_the_csv(run: Path, tmp_path: Path, drawn: dict) -> None:
    told = show("curves", tmp_path / "a.png", str(run))
    metrics, panels = drawn["curves"]
    with (run / "csv/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("train/loss", "val/loss", "val/band_3", "train/lr"):
        expected = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert expected and list(zip(*metrics[name], strict=True)) == expected
    assert [list(panel) for panel in panels.values()] == [
        ["train/loss", "val/loss"],
        [f"val/band_{k}" for k in range(4)],
        ["train/lr"],
    ]
    assert told["panels"] == panels


def test_an_objective_of_ones_own_has_bands_without_ratios(
    run: Path, tmp_path: Path, drawn: dict
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run / "csv", folder / "csv")
    config = (run / "config.yaml").read_text()
    own = config.replace("pipeline.objectives.denoising.DSM", "mine.DSM")
    own = own.replace("pipeline.objectives.DSM", "mine.DSM")
    assert own != config
    (folder / "config.yaml").write_text(own)
    show("curves", tmp_path / "a.png", str(folder))
    names = [f"val/band_{k}" for k in range(4)]
    assert drawn["curves"][1]["val/loss by noise"] == dict(zip(names, names, strict=True))


def test_bands_are_quarters_of_the_law_of_the_levels(
    run: Path, tmp_path: Path, drawn: dict
) -> None:
    """Of conf/objective/dsm_clean.yaml: half N(0, 1), half N(1.5, 1.2) on the log of the ratio."""
    show("curves", tmp_path / "a.png", str(run))
    labels = list(drawn["curves"][1]["val/loss by noise"].values())
    words = [label.split() for label in labels]
    ends = [(float(low), float(high)) for _, low, _, high in words]
    for k, (_, high) in enumerate(ends[:3], start=1):
        level = math.log(high)
        share = sum(math.erfc((m - level) / s / 2**0.5) / 4 for m, s in ((0, 1), (1.5, 1.2)))
        assert share == pytest.approx(k / 4, abs=0.01)  # a label has two digits
        assert high == ends[k][0]


def test_a_torn_row_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("epoch,step,train/loss,val/loss\n0,1,0.5,\n0,1,,0.25\n0,2,0.\n")
    assert figures.read_metrics(file) == {"train/loss": ([1], [0.5]), "val/loss": ([1], [0.25])}


def test_denoising_begins_with_one_step_and_ends_with_what_generate_draws(
    run: Path, tmp_path: Path, drawn: dict
) -> None:
    how = ["--seed", "7", "--steps", "3", PROMPT, OTHER]
    told = show("denoising", tmp_path / "a.png", "--checkpoint", str(run), *how)
    assert told["prompts"] == [PROMPT, OTHER] and told["sampler"]["steps"] == 3
    pictures, rows, columns, _ = drawn["grid"]
    assert pictures.shape == (4, 3, 3, 32, 32) and rows == [PROMPT, "", OTHER, ""]
    assert float(columns[0]) > 10 * float(columns[1]) > 100 * float(columns[2])
    last = generated(run, tmp_path / "last", *how)
    first = generated(run, tmp_path / "first", *how[:2], "--steps", "1", PROMPT, OTHER)
    for i in range(2):
        assert torch.equal(pictures[2 * i + 1, -1], last[i])
        difference = pictures[2 * i + 1, 0].int() - first[i].int()
        assert difference.abs().max() <= 1  # of 255: another micro-batch
        assert not torch.equal(pictures[2 * i + 1, 0], pictures[2 * i + 1, -1])
    assert (pictures[0, 0].float().std() > 60) and torch.equal(pictures[0, 0], pictures[2, 0])
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3  # type: ignore[attr-defined]


def test_the_grid_of_guidance_holds_what_generate_draws(
    run: Path, tmp_path: Path, drawn: dict
) -> None:
    model = ["--checkpoint", str(run), OTHER]
    show("guidance", tmp_path / "a.png", *model, "--scale", "0,2", "--steps", "3,2")
    pictures, rows, columns, *_ = drawn["grid"]
    assert rows == ["0", "2 (own)"] and columns == ["2 (own)", "3"]
    assert torch.equal(pictures[1, 0], generated(run, tmp_path / "own", OTHER)[0])
    other = generated(run, tmp_path / "other", OTHER, "--scale", "0", "--steps", "3")[0]
    assert torch.equal(pictures[0, 1], other) and not torch.equal(pictures[1, 0], other)
    show("guidance", tmp_path / "b.png", *model)
    assert drawn["grid"][1:3] == (["0", "1", "2 (own)", "4"], ["2 (own)", "4", "8"])


def test_training_shows_each_checkpoint_by_its_step(
    run: Path, tmp_path: Path, drawn: dict
) -> None:
    told = show("training", tmp_path / "a.png", "--checkpoint", str(run), OTHER, "--seed", "2")
    pictures, rows, columns, _ = drawn["grid"]
    assert rows == [OTHER] and columns in (["2", "4", "6"], ["2", "3", "4", "6"])  # 3 if best
    for k, step in enumerate(columns):
        file = Path(told["checkpoint"][step])
        assert torch.load(file, weights_only=True)["global_step"] == int(step)
        expected = generated(file, tmp_path / step, OTHER, "--seed", "2")[0]
        assert torch.equal(pictures[0, k], expected)
    two = [str(run / "step=4.ckpt"), "--checkpoint", str(run / "step=2.ckpt")]
    show("training", tmp_path / "b.png", "--checkpoint", *two, OTHER)
    assert drawn["grid"][2] == ["2", "4"]


def test_langevin_paths_are_the_draws_of_each_kernel(tmp_path: Path, drawn: dict) -> None:
    law = ["--target", str(ROOT / "conf/target/banana.yaml"), "--target.std", "2"]
    how = ["--step-size", "0.3", "--chains", "2", "--draws", "9", "--seed", "4"]
    told = show("langevin", tmp_path / "a.png", *law, *how)
    assert told["target"]["std"] == 2 and told["step_size"] == 0.3
    target, panels = drawn["paths"]
    for x, kernel in zip(panels.values(), (ULA(0.3), MALA(0.3)), strict=True):
        same = sample(Banana(0.1, 2.0), kernel, chains=2, draws=9, warmup=0, seed=4)
        assert torch.equal(x, same.x) and x.shape == (9, 2, 2)


def test_a_name_of_its_own_where_none_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    law = ["--target", str(ROOT / "conf/target/mixture.yaml"), "--draws", "2"]
    for _ in range(2):
        assert main(["show", "langevin", *law]) == 0
    assert sorted(f.name for f in Path("outputs").iterdir()) == ["langevin-2.png", "langevin.png"]


def test_without_a_condition(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], drawn: dict
) -> None:
    parts: Any = {"conditioning": None, "sampler": DDIM(2)}
    pixels, vectors = tmp_path / "pixels.ckpt", tmp_path / "vectors.ckpt"
    network = UNet(channels=1, widths=(8, 8), blocks=1)
    write(pixels, Clean(network, Rectified()), codec=Pixels(1, 8, 8), **parts)
    write(vectors, Clean(MLP(x_dim=2), Rectified()), codec=Columns(2), **parts)
    content = torch.load(pixels, weights_only=True)
    content["pipeline"]["prompts"] = [""]  # as a run without a condition says
    torch.save(content, pixels)
    show("denoising", tmp_path / "a.png", "--checkpoint", str(pixels))
    assert drawn["grid"][0].shape == (2, 2, 1, 8, 8)
    for kind, file, said in (
        ("denoising", vectors, "is a model of vectors, and this shows pictures"),
        ("guidance", pixels, "nothing guides it"),
        ("training", pixels, "does not say its training step"),
    ):
        assert said in sentence(["show", kind, "--checkpoint", str(file)], capsys)
    given = ["show", "denoising", "--checkpoint", str(pixels), "red"]
    assert "takes no prompt, such as 'red'" in sentence(given, capsys)


def test_bad_input_ends_in_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/metrics.csv").write_text("epoch,step,val/loss\n0,1,0.5\n")
    model, funnel = ["--checkpoint", str(run)], str(ROOT / "conf/target/funnel.yaml")
    adaptive = ["--sampler", str(ROOT / "conf/sampler/adaptive.yaml")]
    for args, said in (
        ([], "KIND"),
        (["curves", "nowhere"], "There is no nowhere/csv/metrics.csv"),
        (["curves", str(tmp_path)], "has no train/loss yet"),
        (["curves", str(run), "--sampler.steps", "3"], "no option --sampler.steps of show curves"),
        (["curves", str(run), "--out", "a.jpg"], "ends in .png"),
        (["langevin", "--target", funnel], "has 10 coordinates"),
        (["langevin", "--target", "none.yaml"], "none.yaml"),
        (["langevin", "--step-size", "0"], "--step-size 0 must be positive"),
        (["denoising", *model, " "], "A prompt is empty"),
        (["denoising", *model, *adaptive, OTHER], "Adaptive gives each picture times of its own"),
        (["guidance", *model, OTHER, PROMPT], "2 prompts were given"),
        (["guidance", *model, OTHER, "--steps", "2,a"], "invalid integers value: '2,a'"),
        (["training", "--checkpoint", str(run / "last.ckpt")], "one training step alone"),
    ):
        assert said in sentence(["show", *args], capsys)
    (tmp_path / "csv/metrics.csv").write_text("epoch,step,train/loss\n0,1,much\n")
    assert "is no table of numbers" in sentence(["show", "curves", str(tmp_path)], capsys)
    assert not (tmp_path / "outputs").exists() or not list((tmp_path / "outputs").iterdir())
