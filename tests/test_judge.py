"""What is read back from pictures by a classifier that is taught to."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from pipeline.data import Hub
from pipeline.errors import UserError
from pipeline.evaluation import judge as room
from pipeline.evaluation.adherence import adherence, right
from pipeline.evaluation.judge import Judge, judge_of
from pipeline.evaluation.measure import Measure
from pipeline.evaluation.report import block, context

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 200, 0),
    "purple": (160, 40, 190),
    "black": (10, 10, 10),
}
STYLES = ("plain", "framed")


def drawing(colour: str, style: str, place: int) -> dict:
    x = np.full((16, 16, 3), 255, np.uint8)
    x[5:11, 2 + place : 8 + place] = COLOURS[colour]
    if style == "framed":
        x[[0, 1, 14, 15]] = x[:, [0, 1, 14, 15]] = 90
    file = io.BytesIO()
    Pillow.fromarray(x).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def data(folder: Path, **kwargs: object) -> Hub:
    """Colours in two styles; "blue, framed" is held out."""
    pairs = [(colour, style) for colour in COLOURS for style in STYLES]
    types = {
        "image": Image(decode=False),
        "caption": Value("string"),
        "colour": Value("string"),
        "style": ClassLabel(names=list(STYLES)),
    }
    (folder / "p").mkdir(exist_ok=True)
    for split in ("train", "test_pair"):
        rows = [(*pair, k) for pair in pairs for k in range(5)]
        rows = [row for row in rows if (row[:2] == ("blue", "framed")) == (split == "test_pair")]
        columns = {
            "image": [drawing(*row) for row in rows],
            "caption": [f"{colour}, {style}" for colour, style, _ in rows],
            "colour": [colour for colour, _, _ in rows],
            "style": [style for _, style, _ in rows],
        }
        table = Dataset.from_dict(columns, features=Features(types))
        table.to_parquet(folder / f"p/{split}-00000-of-00001.parquet")
    how = {"labels": ["colour", "style"], "val_split": "test_pair", "size": 16}
    return Hub(str(folder / "p"), None, cache_dir=str(folder / "cache"), **(how | kwargs))  # type: ignore


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "STEPS", 120)


def test_it_reads_a_pair_that_it_never_saw(tmp_path: Path) -> None:
    of = data(tmp_path)
    judge = judge_of(of)
    assert judge is not None
    x, order = torch.from_numpy(np.array(of.rows("val").x)), np.random.default_rng(0)
    wanted = of.labelled("val")
    assert wanted == {"colour": ["blue"] * 5, "style": ["framed"] * 5}
    values = {name: len(known) for name, known in judge.values.items()}
    found = adherence(judge.read(x), wanted, values, order)
    assert found["accuracy"] == {"colour": 1, "style": 1, "mean": 1, "all": 1}
    assert found["chance"] == pytest.approx(
        {"colour": 1 / 6, "style": 1 / 2, "mean": 1 / 3, "all": 1 / 12}
    )
    every = of.labelled("train")
    x = torch.from_numpy(np.array(of.rows("train").x))
    found = adherence(judge.read(x), every, values, order)
    assert found["accuracy"]["all"] == 1 and found["shuffled"]["all"] < 0.5
    noise = torch.from_numpy(order.integers(0, 256, (300, 3, 16, 16), dtype=np.uint8))
    asked = {name: [column[k % 55] for k in range(300)] for name, column in every.items()}
    # which it cannot know: what it says of all is the same thing, and right for some
    assert right(judge.read(noise), asked)["all"] < 0.3


def test_a_label_is_read_by_what_tells_it() -> None:
    """Of squares, the colour by colours, and by shapes whether they are whole or in pieces."""
    order, n = np.random.default_rng(0), 400
    x = np.full((n, 3, 16, 16), 255, np.uint8)
    colour, pieces = order.integers(0, 4, n), order.integers(0, 2, n)
    for k in range(n):
        top, left = order.integers(0, 8, 2)
        # as many coloured pixels either way
        step = 2 if pieces[k] else 1
        x[k, :, top : top + 4 * step : step, left : left + 4 * step : step] = np.array(
            list(COLOURS.values())[colour[k]]
        )[:, None, None]
    labels = {"colour": list(map(str, colour)), "pieces": list(map(str, pieces))}
    judge = Judge(3, 16, {name: sorted(set(column)) for name, column in labels.items()})
    room.teach(judge, x, labels)
    assert judge.by_shapes.tolist() == [False, True]
    found = right(judge.eval().read(torch.from_numpy(x)), labels)
    assert found["colour"] == 1 and found["pieces"] > 0.9


def test_colours_are_a_ridge_regression() -> None:
    """Against the normal equations, written out with all features at once."""
    order, n = np.random.default_rng(0), 50
    x = order.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    truth = {"a": torch.from_numpy(order.integers(0, 3, n))}
    reader = room.Colours(1, {"a": ["x", "y", "z"]})
    reader.teach(x, np.arange(n), truth)
    f = np.stack([np.bincount(p.ravel() // 16, minlength=16) / 64 for p in x]) ** 0.5
    e = np.eye(3)[truth["a"]]
    f0, e0 = f - f.mean(0), e - e.mean(0)
    gram = f0.T @ f0
    w = np.linalg.solve(gram + np.trace(gram) / 16 * np.eye(16), f0.T @ e0)
    logits = reader(torch.from_numpy(x))["a"].detach().numpy()
    np.testing.assert_allclose(logits, f0 @ w + e.mean(0), atol=1e-5)  # float32 weights


def test_it_is_taught_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = judge_of(data(tmp_path))
    (file,) = (tmp_path / "cache/judges").iterdir()

    def never(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(room, "teach", never)
    again = judge_of(data(tmp_path))
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(AssertionError):  # of other labels it is another
        judge_of(data(tmp_path, labels=["colour"]))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(AssertionError):  # and a torn one is taught anew
        judge_of(data(tmp_path))


def test_data_without_labels_have_none(tmp_path: Path) -> None:
    assert judge_of(data(tmp_path, labels=[])) is None


def test_a_label_that_is_not_there_is_found_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column 'styl' .data.labels.; it has"):
        data(tmp_path, labels=["styl"]).rows("train")
    with pytest.raises(UserError, match="'image' .data.labels. holds Image.*a word or a class"):
        data(tmp_path, labels=["image"]).rows("train")


def test_all_is_right_together() -> None:
    found = {"a": ["x", "x", "y", "y"], "b": ["1", "2", "1", "2"]}
    wanted = {"a": ["x", "y", "y", "x"], "b": ["1", "2", "2", "1"]}
    assert right(found, wanted) == {"a": 0.5, "b": 0.5, "mean": 0.5, "all": 0.25}


@pytest.mark.parametrize("side", [8, 16, 32, 48, 64])
def test_every_size_of_picture(side: int) -> None:
    judge = Judge(3, side, {"a": ["x", "y"]}).eval()
    logits = judge(torch.zeros(2, 3, side, side, dtype=torch.uint8))
    assert {name: part.shape for name, part in logits.items()} == {"a": (2, 2)}


def test_it_stands_in_a_measure(tmp_path: Path) -> None:
    """With the accuracy on true pictures beside it."""

    class Features(torch.nn.Module):
        dim, name, protocol, classified, device = 2, "mean", "none", False, torch.device("cpu")

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            x = pictures.double()
            return torch.stack((x.mean((1, 2, 3)), x.std((1, 2, 3))), dim=1)

        def fingerprint(self) -> str:
            return "mean"

    measure = Measure(data(tmp_path), Features(), 6)  # type: ignore[arg-type]
    assert measure.floor["accuracy"] == {"colour": 1, "style": 1, "mean": 1, "all": 1}
    red = torch.from_numpy(measure.data.rows("train").x[:6].copy())
    found = measure.judged(red, np.random.default_rng(0))
    assert found["accuracy"]["all"] == 0
    found |= measure.score(red, [""] * 6)
    result = found | {"pictures": 6, "spread": None, "floor": measure.floor, "seeds": 1}
    said = block(result) + context(result | {"reference": measure.reference.about})
    assert "colour 0.000" in said and "true pictures 1.000" in said and "judge" in said
