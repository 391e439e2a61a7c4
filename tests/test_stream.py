"""Pictures read from shards while a model trains."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_module import stop_at
from tiny import ROOT, command, equal, read

from pipeline.cli import main
from pipeline.data import Stream
from pipeline.data.order import Windows
from pipeline.doors.fit import said as told_by_fit
from pipeline.errors import UserError
from pipeline.noise import permuted

COUNTS = [5, 9, 1, 7, 12, 3, 8]


def order(**how: Any) -> Windows:
    return Windows(COUNTS, 3, 6, seed=1, **how)


def stream(of: Windows, batches: int) -> np.ndarray:
    return np.concatenate([of.draw(k).rows for k in range(batches)])


def test_every_row_comes_once_in_an_epoch() -> None:
    total = sum(COUNTS)
    rows = stream(order(), 23)  # of 6
    epochs = rows[: 3 * total].reshape(3, total)
    for epoch in epochs:
        assert sorted(epoch) == list(range(total))
    assert not (epochs[0] == epochs[1]).all()


def test_a_window_is_of_so_many_files_and_mixed() -> None:
    starts, rows = np.cumsum([0, *COUNTS]), stream(order(), 8)
    files = permuted(np.arange(len(COUNTS)), len(COUNTS), "files", 1, 0)
    for k in range(0, len(COUNTS), 3):
        members = [np.arange(starts[f], starts[f + 1]) for f in files[k : k + 3]]
        inside, rows = np.split(rows, [sum(map(len, members))])
        assert sorted(inside) == sorted(np.concatenate(members))
        assert len(inside) < 8 or not (inside == np.concatenate(members)).all()


def test_ranks_share_a_batch_of_windows() -> None:
    parts = [order(rank=rank, world=3) for rank in range(3)]
    for batch in (0, 3, 11):
        whole = order().draw(batch).rows
        assert (np.concatenate([part.draw(batch).rows for part in parts]) == whole).all()


# --- files


def picture(k: int) -> bytes:
    """A picture of one colour, which says its number."""
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (k, 255 - k, 7 * k % 256)).save(file, "png")
    return file.getvalue()


def write_parquet(file: Path, rows: range) -> None:
    from datasets import Dataset

    images = [{"bytes": picture(k), "path": f"{k}.png"} for k in rows]
    columns = {"image": images, "caption": [f"number {k}" for k in rows]}
    Dataset.from_dict(columns).to_parquet(file)


def write_tar(file: Path, rows: range, said: str = "txt") -> None:
    with tarfile.open(file, "w") as opened:
        for k in rows:
            caption = f"number {k}"
            text = json.dumps({"caption": caption}) if said == "json" else caption
            for kind, content in (("png", picture(k)), (said, text.encode())):
                member = tarfile.TarInfo(f"some/{k:05d}.{kind}")
                member.size = len(content)
                opened.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 8 to 12 rows, of both kinds."""
    place, first = tmp_path_factory.mktemp("shards"), 0
    for k, count in enumerate((8, 12, 9, 11, 10)):
        rows = range(first, first + count)
        if k % 2:
            write_tar(place / f"{k}.tar", rows, "json" if k == 1 else "txt")
        else:
            write_parquet(place / f"{k}.parquet", rows)
        first += count
    return place


def data(folder: Path, cache: Path, conditioning: Any = None, **how: Any) -> Stream:
    both = [str(folder / "*.parquet"), str(folder / "*.tar")]
    return Stream(both, conditioning, size=8, cache_dir=str(cache), **how)


def test_rows_of_both_kinds_are_read(folder: Path, tmp_path: Path) -> None:
    """The last file by its name validates: 0.parquet, 1.tar, … 4.parquet."""
    from pipeline.conditioning import Classes

    found = data(folder, tmp_path, Classes([f"number {k}" for k in range(50)]), window=2)
    train, val = found.rows("train"), found.rows("val")
    assert train.x.shape == (40, 3, 8, 8) and val.x.shape == (10, 3, 8, 8)
    which = np.array([39, 0, 8, 20, 19, 21])  # in four files, of which three are held
    colours = np.stack([which, 255 - which, 7 * which % 256], axis=1)
    assert (train.x[which] == colours[:, :, None, None]).all()
    assert train.values is not None and [train.values[k] for k in which] == [
        f"number {k}" for k in which
    ]
    assert train.values[39] == "number 39" and val.values == [f"number {k}" for k in range(40, 50)]
    shards: Any = train.x
    assert len(shards.held) == 3
    assert len(list((tmp_path / "shards").iterdir())) == 5  # the counts


def test_batches_are_of_their_captions(folder: Path, tmp_path: Path) -> None:
    """Through the loader's processes and without: the same rows, and u of them."""
    from pipeline.conditioning import Classes

    names = [f"number {k}" for k in range(50)]
    batches = []
    for workers in (0, 2):
        module = data(folder, tmp_path, Classes(names), workers=workers, batch_size=7)
        module.prepare_data()
        module.setup()
        loader = iter(module.train_dataloader())
        batches.append([module.on_after_batch_transfer(next(loader), 0) for _ in range(8)])
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.u.tokens, other.u.tokens)
        number = one.u.tokens[:, 0].argmax(dim=1)
        assert torch.equal(((one.x[:, 0, 0, 0] + 1) * 127.5).round().long(), number)
        assert one.u_null is not None


STREAM = ["--data", str(ROOT / "conf/data/stream.yaml"), "--data.size", "16"]


def told(folder: Path, workers: int = 0) -> list[str]:
    path = ["--data.path", str(folder / "*.tar"), "--data.window", "1"]
    return [*STREAM, *path, "--data.batch_size", "8", "--data.workers", str(workers)]


def test_a_stopped_run_goes_on_in_the_middle_of_a_window(folder: Path, tmp_path: Path) -> None:
    own = command(tmp_path / "whole" / "run")
    drop = own.index("--data.per_combination")
    assert main([*own[:drop], *own[drop + 2 :], *told(folder)]) == 0
    args = command(tmp_path / "run" / "run", callbacks=stop_at(2))
    args = [*args[:drop], *args[drop + 2 :], *told(folder, workers=1)]
    assert main(args) == 130
    run = tmp_path / "run" / "run"
    assert main(["fit", "--resume", str(run)]) == 0
    for part in ("state_dict", "averages", "optimizer_states", "global_step"):
        assert equal(read(run)[part], read(tmp_path / "whole" / "run")[part]), part
    draw = ["generate", "number 3", "--checkpoint", str(run), "--number", "1"]
    assert main([*draw, "--out", str(tmp_path / "out")]) == 0


# --- what is wrong


def test_shards_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    for path, said in ((tmp_path / "*.tar", "no file"), (tmp_path / "a.png", "a.png")):
        with pytest.raises(UserError, match=said):
            Stream(str(path), None).prepare_data()
    write_tar(tmp_path / "a.tar", range(3))
    with pytest.raises(UserError, match="names 1 shards, of which 1 are held out"):
        Stream(str(tmp_path / "*.tar"), None).prepare_data()
    with pytest.raises(UserError, match=r"data\.window 0"):
        Stream(str(tmp_path / "*.tar"), None, window=0)


def test_rows_that_are_wrong_are_named(folder: Path, tmp_path: Path) -> None:
    from pipeline.conditioning import Classes

    for k, broken in enumerate((b"no picture", picture(1))):
        file = tmp_path / f"{k}.tar"
        with tarfile.open(file, "w") as opened:
            member = tarfile.TarInfo("7.png")
            member.size = len(broken)
            opened.addfile(member, io.BytesIO(broken))
    module = Stream(str(tmp_path / "*.tar"), Classes(["x"]), size=8, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"0\.tar: 7\.png cannot be read as a picture"):
        module.rows("train").x[np.array([0])]
    with pytest.raises(UserError, match=r"1\.tar: 7\.png has no caption 'caption'"):
        module.rows("val")
    with pytest.raises(UserError) as caught:
        module.workers = 1
        module._rows["val"] = module.rows("train")
        next(iter(module.train_dataloader()))
    assert str(told_by_fit(caught.value)).startswith(f"{tmp_path}/0.tar: 7.png cannot be read")
    (tmp_path / "0.tar").write_bytes(b"no archive")
    (tmp_path / "0.parquet").write_bytes(b"no table")
    for pattern in ("*.tar", "*.parquet"):
        files = [str(tmp_path / pattern), str(folder / "4.parquet")]
        with pytest.raises(UserError, match="cannot be read"):
            Stream(files, None, size=8, cache_dir=str(tmp_path)).prepare_data()
    module = Stream(str(folder / "*.parquet"), None, image="photo", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"no column 'photo'; it has 'image', 'caption'"):
        module.rows("val")


def test_captions_that_are_none_are_named(tmp_path: Path) -> None:
    """A class as a number, and a null in JSON: no word of either kind is made up."""
    from datasets import Dataset

    from pipeline.conditioning import Classes

    images = [{"bytes": picture(k), "path": None} for k in range(2)]
    for k in range(2):
        file = tmp_path / f"{k}.parquet"
        Dataset.from_dict({"image": images, "caption": [0, 1]}).to_parquet(file)
        with tarfile.open(tmp_path / f"{k}.tar", "w") as opened:
            for name, content in (("7.png", picture(1)), ("7.json", b'{"caption": null}')):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                opened.addfile(member, io.BytesIO(content))
    for pattern, said in (
        ("*.parquet", "holds 0; a caption is a string"),
        ("*.tar", "no caption"),
    ):
        module = Stream(str(tmp_path / pattern), Classes(["x"]), size=8, cache_dir=str(tmp_path))
        with pytest.raises(UserError, match=said):
            module.rows("val")


def test_shards_without_a_picture_are_said(tmp_path: Path) -> None:
    for k in range(2):
        write_tar(tmp_path / f"{k}.tar", range(0))
    with pytest.raises(UserError, match="no picture in the shards for 'train'"):
        Stream(str(tmp_path / "*.tar"), None, cache_dir=str(tmp_path)).prepare_data()
