"""Tables: columns by name from files, and the whole way from a CSV file to rows that obey u."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Dataset
from tiny import ROOT

from pipeline.cli import main
from pipeline.conditioning import Classes, Number, Several
from pipeline.data import Table
from pipeline.errors import UserError

HEADER = ["time", "machine", "load", "heat", "strokes"]
LINES = [
    [f"2026-11-29 12:{i % 60:02d}", "ab"[i % 2], f"{i / 10}", f"{20 + i / 4}", f"{i * i}"]
    for i in range(40)
]


def write(path: Path, lines: list[list[str]] = LINES, header: list[str] = HEADER) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    return str(path)


def table(path: str, **given: Any) -> Table:
    known = {"conditioning": Several(), "x": ["heat", "strokes"], "u": ["machine", "load"]}
    return Table(path, **(known | given))


def test_columns_by_name(tmp_path: Path) -> None:
    data = table(write(tmp_path / "a.csv"), cache_dir=str(tmp_path), batch_size=38)
    assert data.sizes() == {"u_dim": 4, "planes": 0, "x_dim": 2}
    (x, values, *_), held = data.rows("train"), data.rows("val")
    assert x.shape == (38, 2) and len(held.x) == 2 and x.dtype == np.float32
    i = [int(strokes**0.5) for strokes in x[:, 1]]
    assert x[:, 0].tolist() == [20 + k / 4 for k in i]
    assert values == [f"machine={'ab'[k % 2]},load={k / 10}" for k in i]
    assert not set(i) & {int(strokes**0.5) for strokes in held.x[:, 1]}
    assert data.codec.decimals == [2, 0]  # type: ignore[attr-defined]
    parts = data.conditioning.parts  # type: ignore[union-attr]
    assert parts["machine"].names == ["a", "b"] and parts["load"].mean == pytest.approx(1.95)
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    torch.testing.assert_close(batch.x.std(dim=0, correction=0), torch.full((2,), 0.5))
    # heat is 20 + 2.5 load, and so is u's number of x's
    heat, load = batch.x[:, 0], batch.u.tokens[:, 0, 3]
    assert torch.corrcoef(torch.stack([heat, load]))[0, 1] > 0.9999


def test_the_same_from_parquet_and_from_several_files(tmp_path: Path) -> None:
    whole = table(write(tmp_path / "a.csv"))
    for k, lines in enumerate((LINES[:25], LINES[25:])):
        (tmp_path / "parts").mkdir(exist_ok=True)
        write(tmp_path / f"parts/part{k}.csv", lines)
    named = {name: [line[k] for line in LINES] for k, name in enumerate(HEADER)}
    typed = {k: list(map(float, named[k])) for k in ("load", "heat", "strokes")}
    label = [ord(name) - ord("a") for name in named["machine"]]
    rows = Dataset.from_dict({**typed, "machine": label})
    rows.cast_column("machine", ClassLabel(names=["a", "b"])).to_parquet(tmp_path / "a.parquet")
    for name in ("parts/part*.csv", "parts", "a.parquet"):
        path = str(tmp_path / name)
        data = table(path, cache_dir=str(tmp_path))
        data.learn()
        for split in ("train", "val"):
            assert (data.rows(split).x == whole.rows(split).x).all()
        assert data.conditioning.embed(data.rows("val").values).tokens.shape == (2, 1, 4)
    assert data.rows("val").values == whole.rows("val").values


def test_what_is_a_class(tmp_path: Path) -> None:
    """Words are, and 007; numbers where a person says so."""
    lines = [[f"{i % 3 + 1}", f"00{i % 2 + 1}", f"{i}.5"] for i in range(40)]
    path = write(tmp_path / "a.csv", lines, ["shift", "agent", "heat"])
    own = Several({"shift": Classes()})
    data = table(path, x=["heat"], u=["shift", "agent"], conditioning=own)
    data.learn()
    assert [part.names for part in own.parts.values()] == [["1", "2", "3"], ["001", "002"]]
    data = table(path, x=["heat"], u=["shift"])
    data.learn()
    assert isinstance(data.conditioning.parts["shift"], Number)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "x", "u", "classes"),
    [
        ("diabetes", "target", "sex", ["1", "2"]),
        ("wine", "alcohol", "target", ["class_0", "class_1", "class_2"]),
    ],
)
def test_what_scikit_learn_brings(name: str, x: str, u: str, classes: list[str]) -> None:
    data = table(f"sklearn:{name}", x=[x], u=[u])
    assert data.sizes()["u_dim"] == len(classes)
    assert data.conditioning.parts[u].names == classes  # type: ignore[union-attr]
    assert data.rows("train").x.std() > 0.5


@pytest.mark.parametrize(
    ("row", "column", "cell", "given", "said"),
    [
        (7, 3, "", {}, "1 of 40 rows of column 'heat' hold no finite number, .* row 7, .* ''"),
        (7, 3, "n/a", {}, "'heat' hold no finite number, the first is row 7, .* 'n/a'"),
        (0, 3, "inf", {}, "'heat' hold no finite number, the first is row 0"),
        (9, 2, "high", {}, "'load' hold no finite number, the first is row 9, .* 'high'"),
        (9, 1, "", {}, "'machine' hold no word, the first is row 9"),
        (0, 3, "1", {"x": ["time"]}, "40 of 40 rows of column 'time' hold no finite number"),
        (0, 3, "1", {"x": ["warmth"]}, "no column 'warmth'; it has 'time', 'machine', 'load'"),
        (0, 3, "1", {"u": ["heat"]}, "no column and no split twice"),
        (0, 3, "1", {"x": []}, "at least one column of x"),
        (0, 3, "1", {"split": "all"}, "no split 'all'; it has 'train'"),
        (0, 3, "1", {"path": "none.csv"}, "'none.csv' is not there"),
        (0, 3, "1", {"path": "sklearn:titanic"}, "none of 'sklearn:breast_cancer'"),
        (0, 3, "1", {"u": []}, "set data.conditioning to null"),
    ],
)
def test_what_is_wrong_is_a_sentence(
    row: int, column: int, cell: str, given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    lines = [list(line) for line in LINES]
    lines[row][column] = cell
    path = given.pop("path", write(tmp_path / "a.csv", lines))
    with pytest.raises(UserError, match=said):
        table(path, **given).sizes()
        table(path, **given).rows("train")


def test_a_file_that_is_no_table_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"heat,load\n1,2\n1,2,3\n")
    (tmp_path / "b.csv").write_bytes(b"heat,load\n\xff,2\n")
    for name in "ab":
        with pytest.raises(UserError, match=f"{name}.csv' cannot be read as CSV"):
            table(str(tmp_path / f"{name}.csv")).rows("train")


# --- from a file to rows

SHIFT, SLOPE, WIDTH = {"a": 40.0, "b": 70.0, "c": 55.0}, 20.0, 2.0  # of heat, given machine, load


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of heat ~ N(shift + slope · load, width²) and of strokes, a whole number."""
    folder, order = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    lines = []
    for i in range(2000):
        machine, load = "abc"[i % 3], round(order.uniform(), 3)
        heat = round(SHIFT[machine] + SLOPE * load + WIDTH * order.normal(), 2)
        lines.append([str(i), machine, str(load), str(heat), str(round(100 + order.normal() * 9))])
    told = {"data.path": write(folder / "sensors.csv", lines), "data.x": "[heat, strokes]"}
    told |= {
        "data.u": "[machine, load]",
        "data.cache_dir": str(folder),
        "run": str(folder / "run"),
    }
    told |= {"trainer.max_steps": "300", "model.warmup": "20", "trainer.accelerator": "cpu"}
    told |= {"trainer.logger": "false"}
    told |= {"trainer.enable_progress_bar": "false", "model.optimizer.lr": "5e-3"}
    told["trainer.callbacks"] = "[{class_path: pipeline.callbacks.Last}]"
    options = [word for key, value in told.items() for word in (f"--{key}", value)]
    assert main(["fit", "-c", str(ROOT / "conf/experiment/table.yaml"), *options]) == 0
    return folder / "run"


def draw(run: Path, out: Path, *told: str) -> list[dict[str, str]]:
    how = ["--micro-batch", "256", "--checkpoint", str(run), "--out", str(out)]
    assert main(["generate", *told, *how]) == 0
    with (out / "samples.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def off(rows: list[dict[str, str]], asked: list[dict[str, str]]) -> float:
    """The root mean square of heat from the mean that was asked for, in true deviations."""
    means = [SHIFT[one["machine"]] + SLOPE * float(one["load"]) for one in asked]
    heat = np.array([float(row["heat"]) for row in rows])
    return float(np.sqrt(np.mean((heat - means) ** 2)) / WIDTH)


def test_drawn_rows_obey_what_is_asked_for(run: Path, tmp_path: Path) -> None:
    order = np.random.default_rng(1)
    lines = [["abc"[i % 3], f"{order.uniform():.3f}"] for i in range(240)]
    prompts = write(tmp_path / "asked.csv", lines, ["machine", "load"])
    rows = draw(run, tmp_path / "out", "--prompts", prompts, "--number", "1")
    assert list(rows[0]) == ["machine", "load", "seed", "heat", "strokes"] and len(rows) == 240
    assert [[row["machine"], row["load"]] for row in rows] == lines
    assert all(row["strokes"].isdigit() for row in rows)  # whole
    assert all(len(row["heat"].partition(".")[2]) <= 2 for row in rows)
    drawn = off(rows, rows)
    # 1 for the true law; the mean of a half-trained network is off by less than another deviation,
    # where the classes are 7 to 15 deviations apart
    assert drawn < 2
    # p = 1/100 of a permutation test: nobody of 99 who were asked for in another order fits better
    assert drawn < min(off(rows, list(order.permutation(rows))) for _ in range(99))
    said = json.loads((tmp_path / "out/manifest.json").read_text())["samples"][0]
    assert said["u"] == dict(zip(("machine", "load"), lines[0], strict=True))
    kept = pyarrow.parquet.read_table(tmp_path / "out/samples.parquet").to_pylist()
    assert [str(row["heat"]) for row in kept] == [row["heat"] for row in rows]
    assert isinstance(kept[0]["strokes"], int)


def test_a_part_may_be_left_out(run: Path, tmp_path: Path) -> None:
    """Then it is as the data have it: of all machines, or of all loads."""
    lines = [["a", ""], ["", "0.5"], ["", ""]]
    prompts = write(tmp_path / "asked.csv", lines, ["machine", "load"])
    rows = draw(run, tmp_path / "out", "--prompts", prompts, "--number", "80")
    heat = np.array([float(row["heat"]) for row in rows]).reshape(3, 80)
    # of machine a alone heat spreads by sqrt(20² / 12 + 2²) = 6.1, of all by 12.4 more: 13.8
    assert heat[0].std() < 9 < heat[1].std() and 9 < heat[2].std()
    assert abs(heat[0].mean() - 50) < 5  # 5 is 7 standard errors, for what is half learned
    assert draw(run, tmp_path / "two", "machine=a", "--number", "2")[0]["load"] == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("machine,room\na,3\n", "'room=3' in 'machine=a,room=3' is not NAME=VALUE"),
        ("machine,load\nd,0.5\n", "machine: There is no class 'd'; the classes are a, b, c"),
        ("machine,load\na,0.5,7\n", "(no column)=['7']"),
        ("machine,load\n", "holds a header and no rows"),
        (f"machine,load\na,{'1' * 140_000}\n", "asked.csv cannot be read as CSV: field larger"),
    ],
)
def test_rows_that_cannot_be_asked_for_are_a_sentence(
    text: str, said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "asked.csv").write_text(text)
    told = ["generate", "--prompts", str(tmp_path / "asked.csv"), "--checkpoint", str(run)]
    assert main([*told, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
