"""Rows, order and pictures of the data modules."""

import csv
import io
import json
import os
import pickle
import shutil
import zlib
from collections import Counter
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from test_conditioning import same
from tiny import ROOT, sentence
from torch import Tensor

from pipeline.building import describe
from pipeline.codec import Pixels
from pipeline.condition import Condition
from pipeline.conditioning import Classes, Conditioning
from pipeline.data import Batch, DataModule, Hub, Points, Relations, Shapes, pictures
from pipeline.data.base import Rows, Source
from pipeline.data.order import Order, Pass
from pipeline.data.shapes import OPPOSITE
from pipeline.errors import UserError
from pipeline.mcmc.targets import GaussianMixture

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason=f"the example data are not at {SHARED}"
)


class Lengths(Conditioning):
    """A stand-in for a text encoder: one token, the length of the text and 1."""

    dim = 2  # type: ignore[assignment]

    def embed(self, values: list) -> Condition:
        return Condition(torch.tensor([[[float(len(str(value))), 1.0]] for value in values]))

    def null(self) -> Condition:
        return Condition(torch.zeros(1, 1, 2))

    def fingerprint(self) -> str:
        return "lengths"


class Halves(Lengths):
    """The token of `Lengths`, and a plane: value + 1 on the left, its negative on the right."""

    planes = 1

    def embed(self, values: list) -> Condition:
        v = torch.tensor(values).float()[:, None, None, None] + 1
        return Condition(super().embed(values).tokens, torch.cat([v, -v], 3).repeat(1, 1, 2, 1))

    def null(self) -> Condition:
        return Condition(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2, 2))

    def fingerprint(self) -> str:
        return "halves"


class Numbers(DataModule):
    """Row i is the uint8 picture filled with i; its value is i."""

    def __init__(self, rows: int = 10, conditioning: Conditioning | None = None, **kwargs) -> None:  # noqa: ANN003
        super().__init__(Pixels(1, 2, 2), conditioning, **kwargs)
        self.count = rows

    def source(self, split: str) -> Source:
        x = np.arange(self.count, dtype=np.uint8)[:, None, None, None]
        return Source(np.broadcast_to(x, (self.count, 1, 2, 2)).copy(), list(range(self.count)))


class Recorder(L.LightningModule):
    """Remembers the rows of every training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[float]] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.seen.append(((batch.x[:, 0, 0, 0] + 1) * 127.5).round().tolist())
        return self.weight**2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def take(order: Order, count: int) -> np.ndarray:
    return np.concatenate([draw.rows for draw, _ in zip(order, range(count), strict=False)])


# --- order ---


@pytest.mark.parametrize("rows", [3, 7, 8, 100])
def test_order_shows_every_row_equally(rows: int) -> None:
    stream = take(Order(rows, 8, seed=1), rows)  # 8 epochs
    assert set(Counter(stream.tolist()).values()) == {8}
    epochs = stream.reshape(8, rows)
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


def test_order_depends_on_seed_and_batches_seen_only() -> None:
    whole = [draw.rows for draw, _ in zip(Order(11, 4, seed=3), range(20), strict=False)]
    resumed = next(iter(Order(11, 4, seed=3, start=lambda: 13)))
    assert (resumed.rows == whole[13]).all()
    assert (take(Order(11, 4, seed=4), 20) != np.concatenate(whole)).any()


def test_start_is_asked_when_the_first_batch_is_wanted() -> None:
    seen = [0]
    iterator = iter(Order(50, 4, start=lambda: seen[0]))
    seen[0] = 5
    assert (next(iterator).rows == Order(50, 4).draw(5).rows).all()


@pytest.mark.parametrize("rows", [3, 30])
def test_two_ranks_share_the_batches_of_one(rows: int) -> None:
    one, *two = (
        Order(rows, 8, flip=True),
        *(Order(rows, 8, rank=r, world=2, flip=True) for r in (0, 1)),
    )
    for batch in range(9):
        shares = [order.draw(batch) for order in two]
        for whole, left, right in zip(one.draw(batch), *shares, strict=True):
            assert (whole == np.concatenate([left, right])).all()


def test_flips_are_half_and_belong_to_the_order() -> None:
    flips = np.concatenate([Order(1000, 100, flip=True).draw(b).flip for b in range(20)])
    assert 0.45 < flips.mean() < 0.55
    assert not Order(1000, 100).draw(0).flip.any()


@pytest.mark.parametrize(("rows", "world"), [(10, 1), (10, 2), (3, 4), (8, 2)])
def test_a_pass_weighs_every_row_once(rows: int, world: int) -> None:
    passes = [Pass(rows, 4, rank, world) for rank in range(world)]
    assert len({len(list(one)) for one in passes}) == 1
    counted = Counter(
        row for one in passes for draw in one for row in draw.rows[draw.weight > 0].tolist()
    )
    assert counted == Counter(range(rows))
    assert all(len(draw.rows) == 4 // world for one in passes for draw in one)


# --- batches ---


def test_batch_is_exact(tmp_path: Path) -> None:
    data = Numbers(256, Lengths(), batch_size=256, cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert isinstance(batch, Batch) and batch.x.dtype == torch.float32
    assert torch.equal(batch.x[:, 0, 0, 0], torch.arange(256) / 127.5 - 1)
    assert batch.x.min() == -1 and batch.x.max() == 1
    assert same(batch.u, Lengths().embed(list(range(256))))
    assert batch.u_null.tokens.shape == (1, 1, 2) and batch.weight.sum() == 256


@pytest.mark.parametrize("workers", [0, 1])
def test_a_large_table_is_gathered_by_the_loader(workers: int, tmp_path: Path) -> None:
    where = {"batch_size": 4, "workers": workers, "cache_dir": str(tmp_path)}
    expected = Halves().embed(Order(9, 4).draw(0).rows.tolist())
    batches = []
    for gib in (1.0, 0.0):
        data = Numbers(9, Halves(), table_gib=gib, **where)
        data.setup()
        raw = next(iter(data.train_dataloader()))
        assert isinstance(raw.u, Tensor if gib else Condition)
        batches.append(data.on_after_batch_transfer(raw, 0))
    for batch in batches:
        assert same(batch.u, expected) and same(batch.u_null, Halves().null())
    assert torch.equal(batches[0].x, batches[1].x)
    assert torch.equal(batches[0].weight, batches[1].weight)


def test_flip_mirrors_the_chosen_rows(tmp_path: Path) -> None:
    data = Numbers(8, batch_size=8, cache_dir=str(tmp_path))
    data._rows["train"] = Source(np.tile(np.array([0, 255], np.uint8), (8, 1, 2, 1)), None)
    data.flip = True
    data.setup()
    raw = next(iter(data.train_dataloader()))
    x = data.on_after_batch_transfer(raw, 0).x
    assert raw.flip.any() and not raw.flip.all()
    assert torch.equal(x[:, 0, 0, 0] == 1, raw.flip)


@pytest.mark.parametrize("gib", [1.0, 0.0])
def test_a_flip_turns_x_and_the_planes_of_u_together(gib: float, tmp_path: Path) -> None:
    data = Numbers(8, Halves(), batch_size=8, cache_dir=str(tmp_path), table_gib=gib)
    data._rows["train"] = Source(np.tile(np.array([0, 255], np.uint8), (8, 1, 2, 1)), [*range(8)])
    data.flip = True
    data.setup()
    raw = next(iter(data.train_dataloader()))
    batch = data.on_after_batch_transfer(raw, 0)
    rows = Order(8, 8).draw(0).rows.tolist()
    assert raw.flip.any() and not raw.flip.all()
    assert torch.equal(batch.u.planes.sign(), -batch.x)  # x is dark on the left, u positive
    assert (batch.u.planes[:, 0, 0, 0].abs() - 1).tolist() == rows
    assert torch.equal(batch.u.tokens, Halves().embed(rows).tokens)


def test_a_split_that_is_not_there_is_told_with_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcd":
        Pillow.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    train = ["fit", "-c", str(ROOT / "conf/experiment/emoji.yaml")]
    said = sentence([*train, "--data.path", str(tmp_path)], capsys)
    assert "has no split 'test'; it has" in said and "--data.val_split null holds out" in said
    assert "data.path is null; expected str or list of str; set it by --data.path" in sentence(
        train, capsys
    )


def test_a_data_module_needs_a_source() -> None:
    with pytest.raises(TypeError, match="abstract.*source"):
        DataModule(Pixels(1, 2, 2), None)  # type: ignore[abstract]


def test_sizes_are_what_a_network_is_to_have(tmp_path: Path) -> None:
    path, grey = folder(tmp_path / "photos", 2), {"channels": 1, "dims": 2}
    assert hub(path, tmp_path, channels=1).sizes() == {"u_dim": 2, "planes": 0, **grey}
    assert Numbers(8, Halves()).sizes() == {"u_dim": 2, "planes": 1, **grey}
    mixture = GaussianMixture([[0.5, 0.0], [-0.5, 0.0], [0.0, 0.5]], [0.05] * 3)
    points = Points(mixture, Classes(), 500, 50)
    assert points.sizes() == {"u_dim": 3, "planes": 0, "x_dim": 2}
    assert Points(mixture, None).sizes() == {"u_dim": 0, "planes": 0, "x_dim": 2}


def test_unconditional_batches_have_no_condition(tmp_path: Path) -> None:
    data = Numbers(batch_size=4, cache_dir=str(tmp_path))
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch.u is None and batch.u_null is None


def test_rows_travel_as_their_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(100000).reshape(-1, 1))
    rows = Rows(np.load(tmp_path / "x.npy", mmap_mode="r"))
    told = pickle.dumps(rows)
    assert len(told) < 1000
    draw = Order(100000, 5).draw(2)
    assert torch.equal(pickle.loads(told).__getitems__(draw).x, rows.__getitems__(draw).x)


def fit(
    data: DataModule, steps: int, folder: Path, checkpoint: str | None = None, **limits: float
) -> Recorder:
    saver = L.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=[saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **limits,  # type: ignore[arg-type]
    )
    module = Recorder()
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module


@pytest.mark.parametrize(("rows", "workers"), [(14, 0), (3, 0), (14, 1)])
def test_a_resumed_run_sees_what_it_would_have_seen(
    rows: int, workers: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def data() -> Numbers:
        return Numbers(rows, batch_size=4, workers=workers, cache_dir=str(tmp_path))

    whole = fit(data(), 13, tmp_path / "whole").seen
    resumed = fit(data(), 13, tmp_path / "again", str(tmp_path / "whole" / "step=5.ckpt")).seen
    assert len(whole) == 13 and resumed == whole[5:]
    assert whole == [Order(rows, 4).draw(b).rows.tolist() for b in range(13)]
    assert not any("not resumable" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ({"overfit_batches": 1}, 1),
        ({"overfit_batches": 2}, 2),
        ({"overfit_batches": 5}, 5),  # more than an epoch has
        ({"overfit_batches": 0.7}, 2),
        ({"limit_train_batches": 2}, 2),
        ({"limit_train_batches": 0.4}, 1),
        ({"limit_train_batches": 1.0}, None),
        ({"limit_train_batches": 9}, None),
        ({}, None),
    ],
)
def test_a_part_of_an_epoch_is_the_same_each_time(
    limits: dict, count: int | None, tmp_path: Path
) -> None:
    def seen(name: str, checkpoint: str | None = None) -> list:
        data = Numbers(14, batch_size=4, cache_dir=str(tmp_path))  # 3 batches an epoch
        return fit(data, 11, tmp_path / name, checkpoint, **limits).seen

    whole = seen("whole")
    stream = [Order(14, 4).draw(b % count if count else b).rows.tolist() for b in range(11)]
    assert whole == stream
    assert seen("again", str(tmp_path / "whole" / "step=5.ckpt")) == whole[5:]


def test_a_batch_that_devices_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Trainer:
        distributed_sampler_kwargs = {"rank": 1, "num_replicas": 3}

    data = Numbers(batch_size=4)
    data.trainer = Trainer()  # type: ignore[assignment]
    with pytest.raises(UserError, match="4.*3 devices.*multiple of 3"):
        data.place()


# --- shapes ---


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    one, other = (Shapes(None, 2, cache_dir=str(tmp_path / name)) for name in "ab")
    x, y = one.rows("train"), other.rows("train")
    assert x.x.tobytes() == y.x.tobytes() and x.values == y.values
    different = Shapes(None, 2, seed=1, cache_dir=str(tmp_path / "a")).rows("train")
    assert different.x.shape == x.x.shape and different.x.tobytes() != x.x.tobytes()


@pytest.mark.parametrize("seed", [0, 1])
def test_unseen_shapes_are_a_balanced_fifth(seed: int) -> None:
    data = Shapes(None, 2, seed=seed)
    seen, unseen = data.combinations("train"), data.combinations("unseen")
    assert (len(seen), len(unseen)) == (192, 48) and not set(seen) & set(unseen)
    assert data.combinations("val") == seen
    for field, count in (("colour", 8), ("shape", 12), ("size", 24)):
        assert set(Counter(getattr(one, field) for one in unseen).values()) == {count}
    assert set(Counter((one.colour, one.shape) for one in unseen).values()) == {2}
    assert all(7 <= count <= 12 for count in Counter(one.position for one in unseen).values())
    assert not set(data.values("train")) & set(data.captions("unseen"))


def test_some_training_captions_leave_attributes_out() -> None:
    data = Shapes(None, 32)
    captions = data.values("train")
    without = np.mean(["at the" not in one for one in captions])
    unsized = np.mean([not {"small", "large"} & set(one.split()) for one in captions])
    assert abs(without - 0.15) < 0.02 and abs(unsized - 0.10) < 0.02
    assert all("at the" in one for split in ("val", "unseen") for one in data.values(split))
    assert set(data.values("val")) == set(data.captions("val"))


def test_mirrored_relations_are_held_out_together() -> None:
    data = Relations(None)
    seen, unseen = data.combinations("train"), data.combinations("unseen")
    assert len(seen) + len(unseen) == 24 * 23 * 4 and 0.19 < len(unseen) / 2208 < 0.21
    assert {pair._replace(first=pair.second, relation=OPPOSITE[pair.relation], second=pair.first)
            for pair in unseen} == set(unseen)  # fmt: skip
    assert {pair.first for pair in seen} == {pair.second for pair in seen}
    assert len({pair.first for pair in seen}) == 24


def test_relations_draw_what_they_say(tmp_path: Path) -> None:
    data = Relations(None, 1, cache_dir=str(tmp_path))
    x, captions, *_ = data.rows("unseen")
    i = next(i for i, c in enumerate(captions) if c.startswith("a red") and "left of a blue" in c)
    left, right = x[i, :, :, :16].astype(int), x[i, :, :, 16:].astype(int)
    assert (left[0] - left[2]).sum() > 1000 and (right[2] - right[0]).sum() > 1000


def test_training_captions_of_relations_may_say_one_object() -> None:
    data = Relations(None, 4, alone=0.5)
    said, plan = data.values("train"), data.plan("train")[0]
    whole = [one.caption for one in plan]
    alone = [f"{one.first.caption} {one.relation} something" for one in plan]
    assert all(a in (b, c) for a, b, c in zip(said, whole, alone, strict=True))
    assert 0.47 < np.mean([a == b for a, b in zip(said, alone, strict=True)]) < 0.53
    assert not any("something" in one for one in data.values("val") + data.captions("unseen"))
    assert Relations(None, 4).values("train") == whole
    with pytest.raises(UserError, match=r"data.alone is 1.5; it must be from 0 to 1"):
        Relations(None, alone=1.5)


def test_shapes_columns(tmp_path: Path) -> None:
    rows = Shapes(None, 1, cache_dir=str(tmp_path)).dataset("unseen")
    assert set(rows.column_names) == {"image", "caption", "colour", "shape", "size", "position"}
    assert isinstance(rows[0]["image"]["bytes"], bytes)
    assert len(Relations(None, 1).dataset("unseen").column_names) == 7


def test_shapes_refuse_other_splits() -> None:
    with pytest.raises(UserError, match="'test'.*'train', 'val' and 'unseen'"):
        Shapes(None).rows("test")


# --- decoding and its cache ---


@pytest.mark.parametrize("small", [1.0, -1.0], ids=["in place", "by threads"])
def test_rows_are_decoded_in_order(small: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thumbnails in place and what takes longer by threads; a bad one keeps its row."""
    monkeypatch.setattr(pictures, "SMALL", small)
    images = Shapes(None, 2).dataset("val").select_columns(["image"])

    def read(image: dict | None) -> np.ndarray:
        if image == images[3]["image"]:
            raise ValueError("broken")
        return pictures.decode(image, 32, 3)

    found = list(pictures.decoded(images, read, "decoding", True))
    assert len(found) == len(images) and "broken" in found[3]
    for k in (0, 1, 2, 4, len(images) - 1):
        assert (found[k] == pictures.decode(images[k]["image"], 32, 3)).all()


def test_pictures_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "photos", 12)
    Hub(path, None, size=8, cache_dir=str(tmp_path / "cache")).setup()
    calls = []
    decode = pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda *args: calls.append(1) or decode(*args))
    Hub(path, None, size=8, cache_dir=str(tmp_path / "cache")).setup()
    assert not calls
    Hub(path, None, size=9, cache_dir=str(tmp_path / "cache")).setup()
    assert len(calls) == 12


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stopped_decode_leaves_nothing(
    stop: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = pictures.decode, []

    def stopping(*args: object) -> np.ndarray:
        calls.append(1)
        if len(calls) > 10:
            raise stop
        return decode(*args)  # type: ignore[arg-type]

    data = Shapes(None, 1, cache_dir=str(tmp_path))
    monkeypatch.setattr(pictures, "decode", stopping)
    with pytest.raises(stop):
        data.rows("train")
    assert not list((tmp_path / "pictures").iterdir())
    monkeypatch.setattr(pictures, "decode", decode)
    assert len(data.rows("train").x) == 192


def encoded(picture: Pillow.Image, kind: str = "png", **kwargs: object) -> dict:
    file = io.BytesIO()
    picture.save(file, kind, **kwargs)
    return {"bytes": file.getvalue(), "path": None}


def test_transparent_is_white() -> None:
    picture = Pillow.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.putpixel((3, 2), (0, 0, 255, 255))
    x = pictures.decode(encoded(picture), 8, 3)
    assert x[:, 0, 0].tolist() == [255, 255, 255] and x[:, 2, 3].tolist() == [0, 0, 255]
    palette = Pillow.new("P", (8, 8), 0)
    assert (pictures.decode(encoded(palette, transparency=0), 8, 3) == 255).all()


def test_grey_pictures() -> None:
    grey = Pillow.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert (pictures.decode(encoded(grey), 8, 1)[0] == np.asarray(grey)).all()
    assert (pictures.decode(encoded(grey), 8, 3) == np.asarray(grey)).all()
    assert pictures.decode(encoded(Pillow.new("RGB", (8, 8), "red")), 8, 1).shape == (1, 8, 8)


def deep(kind: str, **kwargs: object) -> dict:
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    return encoded(Pillow.fromarray(levels), kind, **kwargs)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["png", "tiff", "ppm", "tiff of 32 bits"])
def test_sixteen_bits_are_scaled_to_eight(kind: str, channels: int) -> None:
    values = np.arange(64).reshape(8, 8) * 1040
    if kind == "tiff of 32 bits":
        image = encoded(Pillow.fromarray(values.astype(np.int32)), "tiff")
    else:
        image = encoded(Pillow.fromarray(values.astype(np.uint16)), kind)
    x = pictures.decode(image, 8, channels)
    assert x.shape == (channels, 8, 8) and (x == np.rint(values / 257)).all()


def chunked(colour: int, pixel: bytes, key: bytes) -> dict:
    """A PNG of 16 bits a channel, all of one pixel, with a transparent colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        )

    head = (8).to_bytes(4, "big") * 2 + bytes([16, colour, 0, 0, 0])
    rows = zlib.compress((b"\0" + pixel * 8) * 8)
    parts = ((b"IHDR", head), (b"tRNS", key), (b"IDAT", rows), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    return {"bytes": data, "path": None}


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3)])
def test_a_transparent_colour_of_sixteen_bits_is_white(colour: int, channels: int) -> None:
    pixel, other = b"\x40\x33" * channels, b"\x55\x33" * channels
    assert (pictures.decode(chunked(colour, pixel, pixel), 8, 3) == 255).all()
    assert (pictures.decode(chunked(colour, pixel, other), 8, 3) == 64).all()


@pytest.mark.parametrize(
    ("values", "mode"), [(np.float32(0.5), "F"), (np.int32(65536), "I"), (np.int32(-1), "I")]
)
def test_deeper_pictures_are_refused(values: np.generic, mode: str, tmp_path: Path) -> None:
    plain(tmp_path / "p" / "a.png", tmp_path / "p" / "b.png")
    Pillow.fromarray(np.full((8, 8), values)).save(tmp_path / "p" / "c.tiff")
    with pytest.raises(UserError, match=f"1 of 3 pictures.*c.tiff: its mode {mode} .*16 bits"):
        everything(tmp_path / "p", tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr"])
def test_each_mode_of_eight_bits_keeps_its_colours(mode: str) -> None:
    colour = Pillow.new("RGB", (8, 8), "white")
    colour.paste("black", (0, 0, 8, 4))
    kind = {"CMYK": "tiff", "YCbCr": "jpeg", "PA": "tiff"}.get(mode, "png")
    source = colour.convert("P").convert("PA") if mode == "PA" else colour.convert(mode)
    x = pictures.decode(encoded(source, kind), 8, 3).astype(int)
    assert abs(x - np.asarray(colour).transpose(2, 0, 1)).max() < 3


def test_the_middle_is_cut_out() -> None:
    wide = Pillow.new("RGB", (48, 16), "red")
    wide.paste("blue", (16, 0, 32, 16))
    x = pictures.decode(encoded(wide), 8, 3)
    assert (abs(x[:, 4, 2:6].astype(int) - np.array([[0], [0], [255]])) < 8).all()


def test_each_fit_keeps_what_it_says() -> None:
    wide = Pillow.new("RGB", (48, 16), "red")
    wide.paste("blue", (16, 0, 32, 16))
    padded, squeezed = (pictures.decode(encoded(wide), 12, 3, fit) for fit in ("pad", "squeeze"))
    # 48 × 16 becomes 12 × 4, between two bands of white
    assert (padded[:, [0, 3, 8, 11]] == 255).all()
    red, blue = np.array([[255], [0], [0]]), np.array([[0], [0], [255]])
    for row, x in ((5, padded), (0, squeezed), (11, squeezed)):  # a third each; ringing is less
        assert (abs(x[:, row, [0, 1, 10, 11]].astype(int) - red) < 24).all()
        assert (abs(x[:, row, 5:7].astype(int) - blue) < 24).all()
    grey = pictures.decode(encoded(Pillow.new("L", (8, 16), 7)), 16, 1, "pad")
    assert (grey[0, :, :4] == 255).all() and (grey[0, :, 4:12] == 7).all()


def test_a_fit_has_its_own_map(tmp_path: Path) -> None:
    path = folder(tmp_path / "photos", 3)  # wide ones
    crop, pad = (hub(path, tmp_path, fit=fit).rows("train").x for fit in ("crop", "pad"))
    assert crop[:, :, 0].max() <= 2 and pad[:, :, 0].min() == 255


def test_photographs_are_turned_upright() -> None:
    picture = Pillow.new("RGB", (16, 16), "black")
    picture.paste("white", (0, 0, 16, 8))
    exif = Pillow.Exif()
    exif[0x0112] = 3  # upside down
    x = pictures.decode(encoded(picture, "jpeg", exif=exif), 16, 3)
    assert x[:, 1].max() < 20 and x[:, -2].min() > 235


# --- hub ---


def folder(path: Path, count: int, captions: list | None = None) -> str:
    """A folder of images with metadata.jsonl."""
    path.mkdir()
    lines = []
    for i in range(count):
        Pillow.new("RGB", (20, 10 + i), (i, 0, 0)).save(path / f"{i:03}.png")
        caption = captions[i] if captions else f"picture {i}"
        lines.append(json.dumps({"file_name": f"{i:03}.png", "caption": caption}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return str(path)


def plain(*files: Path) -> None:
    """Pictures, each of its own level: the place in the list."""
    for level, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        Pillow.new("RGB", (8, 8), (level, level, level)).save(file)


def levels(data: Hub, split: str = "train") -> list[int]:
    return data.rows(split).x[:, 0, 0, 0].tolist()


def everything(path: Path, tmp_path: Path) -> list[int]:
    """As `reference --pictures` reads a folder."""
    data = hub(str(path), tmp_path, conditioning=None, split="all", val_split="all")
    return levels(data)


def parquet(path: Path, images: list, **columns: tuple) -> str:
    """A parquet file of encoded images and other columns, each (type, values)."""
    types = {"image": Image(decode=False)} | {name: of for name, (of, _) in columns.items()}
    rows = {"image": images} | {name: values for name, (_, values) in columns.items()}
    Dataset.from_dict(rows, features=Features(types)).to_parquet(path)
    return str(path)


def twice(path: str) -> str:
    """A folder with a parquet file as its training and its test split."""
    both = Path(path).with_suffix("")
    both.mkdir()
    for split in ("train", "test"):
        shutil.copy(path, both / f"{split}.parquet")
    return str(both)


def images(count: int) -> list[dict]:
    return [encoded(Pillow.new("RGB", (8, 8), (10 * i, 0, 0))) for i in range(count)]


def hub(path: str | list[str], tmp_path: Path, **kwargs: object) -> Hub:
    arguments = {"conditioning": Lengths(), "size": 8, "cache_dir": str(tmp_path / "cache")}
    return Hub(path, **(arguments | kwargs))  # type: ignore[arg-type]


def test_captions_in_a_file_beside_each_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photos"
    plain(*(root / "cats" / f"{name}.png" for name in "abc"))
    for name in "abc":
        (root / "cats" / f"{name}.txt").write_text(f"\n a cat {name} \n")
    (root / "notes.txt").write_text("not a caption")
    data = hub(str(root), tmp_path)
    found = dict(zip(levels(data), data.rows("train").values or (), strict=True))
    assert found | dict(zip(levels(data, "val"), data.rows("val").values or (), strict=True)) == {
        0: "a cat a",
        1: "a cat b",
        2: "a cat c",
    }
    assert (
        "3 pictures" in (said := capsys.readouterr().err) and "1 not pictures (notes.txt)" in said
    )
    (root / "cats" / "b.txt").write_text("one\n\ntwo\n")  # lines: several captions
    data = hub(str(root), tmp_path, split="all", val_split=None)
    every = [first for split in data.splits for first in data.rows(split).every()]
    assert sorted(every) == [("a cat a",), ("a cat c",), ("one", "two")]
    (root / "cats" / "b.txt").unlink()
    with pytest.raises(
        UserError, match=r"1 of \d rows have no caption in column 'caption'.*b\.png"
    ):
        data = hub(str(root), tmp_path)
        data.rows("train"), data.rows("val")


@pytest.mark.parametrize("column", ["caption", "text"])
def test_the_column_of_captions_is_found(column: str, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    plain(root / "cats" / "a.png", root / "dogs" / "b.png")
    data = hub(str(root), tmp_path)
    assert sorted([*data.values("train"), *data.values("val")]) == ["cats", "dogs"]  # type: ignore
    lines = [{"file_name": f, column: f[:4]} for f in ("cats/a.png", "dogs/b.png")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = hub(str(root), tmp_path)
    assert data.caption == column and data.names() == ["cats", "dogs"]


def test_pictures_that_are_no_squares(tmp_path: Path) -> None:
    data = hub(folder(tmp_path / "photos", 4), tmp_path, size=[8, 16])
    assert data.shape == (3, 8, 16) == data.rows("train").x.shape[1:]
    with pytest.raises(UserError, match=r"data.size is \[4, 16\]; a picture needs sides of at"):
        hub(str(tmp_path / "photos"), tmp_path, size=[4, 16])


def test_folder_of_images(tmp_path: Path) -> None:
    data = hub(folder(tmp_path / "photos", 40), tmp_path)
    data.prepare_data()
    data.setup()
    train, val = data.rows("train"), data.rows("val")
    assert (len(train.x), len(val.x)) == (38, 2) and data.shape == (3, 8, 8)
    for source in (train, val):  # row and caption belong together
        assert [f"picture {level}" for level in source.x[:, 0, 4, 4]] == source.values
    assert not set(train.values) & set(val.values)
    assert hub(str(tmp_path / "photos"), tmp_path, seed=5).rows("val").values == val.values


@pytest.mark.parametrize("word", ["train", "test", "dev", "validation", "eval"])
def test_words_in_names_are_no_splits(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / f"pics {word} [v1]::x*"
    names = ["a.png", f"b/{word}/c.JPG", f"steam_{word}_1.png", f"{word}-2.bmp", f"{word}.gif"]
    plain(*(root / name for name in names))
    (root / "notes.txt").touch()
    plain(root / ".hidden.png", root / ".git" / "x.png")
    assert everything(root, tmp_path) == levels(hub(str(root), tmp_path, conditioning=None,
        val_split="other")) == sorted(range(5), key=lambda k: names[k])  # fmt: skip
    said = capsys.readouterr().err
    assert "5 pictures in" in said and "1 not pictures (notes.txt)" in said
    assert "2 hidden (.git, .hidden.png)" in said


def test_split_folders_are_splits_where_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "p"
    plain(root / "Train" / "a.png", root / "train" / "b.png", root / "valid" / "c.png")
    assert everything(root, tmp_path) == [0, 1, 2]
    data = hub(str(root), tmp_path, conditioning=None, val_split="validation")
    assert levels(data) == [0, 1] and levels(data, "val") == levels(data, "dev") == [2]
    hub(str(root), tmp_path, conditioning=None).setup()
    assert "1 in no split that is read (valid/c.png)" in capsys.readouterr().err
    with pytest.raises(UserError, match="no split 'test'; it has 'train', 'val', 'all'"):
        hub(str(root), tmp_path, conditioning=None, val_split="test").setup()
    plain(root / "bus" / "d.png")  # now train is one of several classes
    assert len(levels(hub(str(root), tmp_path, conditioning=None, val_split="test"))) == 4
    data = hub(str(root), tmp_path, conditioning=None, val_split="bus")
    assert levels(data) == [0, 1] and levels(data, "val") == [0]


@pytest.mark.parametrize(
    ("split", "val_split"), [("train", "train"), ("all", "test"), ("train", "all"), ("val", "dev")]
)
def test_validation_is_of_other_rows(split: str, val_split: str, tmp_path: Path) -> None:
    plain(*(tmp_path / "p" / name / "a.png" for name in ("train", "test", "val")))
    data = hub(str(tmp_path / "p"), tmp_path, conditioning=None, split=split, val_split=val_split)
    data.rows("train")
    with pytest.raises(UserError, match=f"'{val_split}' share rows.*name another"):
        data.setup()


def test_linked_folders_are_read_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root, real = tmp_path / "p", tmp_path / "real"
    plain(root / "car" / "a.png", real / "b.png", real / "deep" / "c.png")
    (root / "plane").symlink_to("../real")
    (real / "back").symlink_to(root)
    (real / "loop").symlink_to(real)
    (root / "again").symlink_to("car")
    (root / "linked.png").symlink_to(real / "b.png")
    assert everything(root, tmp_path) == [0, 1, 1, 2]
    assert "3 linked to again (again, plane/back, plane/loop)" in capsys.readouterr().err
    (root / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match="gone.png cannot be read"):
        everything(root, tmp_path)


def test_folders_are_classes(tmp_path: Path) -> None:
    root = tmp_path / "p"
    plain(root / "car" / "a.png", root / "bus" / "b.png", root / "train" / "c.png")
    kwargs = {"caption": "label", "val_split": "test"}
    data = hub(str(root), tmp_path, **kwargs)
    assert data.rows("train").values == ["bus", "car", "train"] and levels(data) == [1, 0, 2]
    for split in ("train", "test"):
        plain(tmp_path / "q" / split / "b" / "x.png", tmp_path / "q" / split / "a" / "x.png")
    data = hub(str(tmp_path / "q"), tmp_path, **kwargs)
    data.setup()
    assert data.names() == data.rows("train").values == data.rows("val").values == ["a", "b"]
    plain(root / "lies_outside.png")
    with pytest.raises(UserError, match="no column 'label'"):
        hub(str(root), tmp_path, **kwargs).rows("train")


def captioned(path: Path, name: str, text: str | bytes, pictures: int = 3) -> str:
    plain(*(path / f"p{k}.png" for k in range(pictures)))
    (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


WORDS = [
    "null",
    "NA",
    "none",
    "007",
    "1e5",
    "true",
    "nan",
    "2020-01-01",
    "a, b",
    'a "b"',
    "é\u2028",
]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_captions_are_as_typed(kind: str, tmp_path: Path) -> None:
    rows = [(f"p{k}.png", word) for k, word in enumerate(WORDS)]
    path, text = tmp_path / "p", io.StringIO()
    if kind == "csv":
        csv.writer(text).writerows([("file_name", "caption"), *rows])
    lines = "\n".join(json.dumps({"file_name": a, "caption": b}) for a, b in rows)
    said = "\ufeff" + (text.getvalue() if kind == "csv" else lines)  # the mark of some editors
    captioned(path, f"metadata.{kind}", said, len(WORDS))
    if kind == "parquet":
        columns = {"file_name": [a for a, _ in rows], "caption": WORDS}
        Dataset.from_dict(columns).to_parquet(path / "metadata.parquet")
    data = hub(str(path), tmp_path, val_split="other")
    found = dict(zip(levels(data), data.rows("train").values, strict=True))
    assert [found[k] for k in range(len(WORDS))] == WORDS


SEVERAL = [["a", "bb"], ["ccc"], ["dddd", "eeeee", "ffffff"], ["a", "ggggggg"]]


def several(kind: str, tmp_path: Path) -> str:
    if kind == "folder":
        return folder(tmp_path / "p", 4, SEVERAL)
    of = List(Value("string"))
    return twice(parquet(tmp_path / "p.parquet", images(4), caption=(of, SEVERAL)))


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_one_of_several_captions_is_drawn_each_time(kind: str, tmp_path: Path) -> None:
    data = hub(several(kind, tmp_path), tmp_path, val_split=None, batch_size=12)
    data.setup()
    train, order = data.rows("train"), Order(len(data.rows("train").x), 12)
    assert train.values == [captions[0] for captions in train.every()]
    seen: dict[int, list[int]] = {row: [] for row in range(len(train.x))}
    for raw, draw in zip(data.train_dataloader(), map(order.draw, range(300)), strict=False):
        lengths = data.on_after_batch_transfer(raw, 0).u.tokens[:, 0, 0]
        for row, length in zip(draw.rows.tolist(), lengths.tolist(), strict=True):
            seen[row].append(int(length))
    for row, captions in enumerate(train.every()):
        count, n = Counter(seen[row]), len(seen[row])
        assert set(count) == {len(caption) for caption in captions}
        # 5 standard deviations of a binomial with n = 1,200
        assert all(abs(k / n - 1 / len(captions)) < 5 * 0.5 / n**0.5 for k in count.values())
    first = [len(caption) for caption in data.rows("val").values]
    for _ in range(2):
        batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
        assert batch.u.tokens[: len(first), 0, 0].tolist() == first


def test_which_caption_belongs_to_the_order(tmp_path: Path) -> None:
    data = hub(several("folder", tmp_path), tmp_path, batch_size=6)
    data.setup()
    whole = [raw.u.tolist() for raw, _ in zip(data.train_dataloader(), range(20), strict=False)]
    data.seen = lambda: 13  # type: ignore[method-assign]
    assert next(iter(data.train_dataloader())).u.tolist() == whole[13]


@pytest.mark.parametrize("empty", [[], None, ["a", " "], ["a", None]])
def test_an_empty_list_of_captions_is_named(empty: list | None, tmp_path: Path) -> None:
    column = (List(Value("string")), [["a"], ["b"], empty, ["d"]])
    path = parquet(tmp_path / "a.parquet", images(4), caption=column)
    with pytest.raises(UserError, match="1 of 4 rows have no caption, or an empty one.*row 2"):
        hub(path, tmp_path, val_split="test").rows("train")


def test_metadata_may_lie_below_and_name_windows_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "p"
    captioned(root / "train", "metadata.csv", "file_name,caption\nsub\\q.png,q\n./p1.png,one\n")
    plain(root / "train" / "sub" / "q.png")
    captioned(root / "test", "metadata.jsonl", '{"file_name": "p2.png", "caption": "two"}\n\n')
    data = hub(str(root), tmp_path, val_split="test")
    assert data.rows("train").values == ["one", "q"] and data.rows("val").values == ["two"]
    assert (
        "4 not in the metadata (test/p0.png, test/p1.png, train/p0.png, …)"
        in capsys.readouterr().err
    )
    assert len(everything(root, tmp_path)) == 7


LINE = '{"file_name": "p0.png", "caption": "a"}\n'


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("metadata.jsonl", LINE + '{"file_name"\n', "metadata.jsonl, line 2.*not JSON"),
        ("metadata.jsonl", LINE + '["p1.png"]\n', "line 2.*no object"),
        ("metadata.jsonl", "\n" + LINE + LINE, "line 3.*lists 'p0.png' again, after line 2"),
        ("metadata.jsonl", LINE.replace("p0", "p7"), "line 1.*'p7.png', which is no picture"),
        ("metadata.jsonl", LINE.replace("p0", "../q/p0"), r"'../q/p0.png', which lies outside"),
        ("metadata.jsonl", LINE.replace("p0", "..\\\\q"), "which lies outside"),
        ("metadata.jsonl", LINE.replace("p0", "/etc/q"), "which lies outside"),
        ("metadata.jsonl", LINE.replace('"p0.png"', "7"), "line 1.*has 7 as file_name"),
        ("metadata.jsonl", '{"name": 1, "caption": 2}', "no column 'file_name'.*'name'"),
        ("metadata.jsonl", LINE.replace("caption", "image"), "column 'image'.*rename"),
        ("metadata.jsonl", LINE + LINE.replace("p0", "p1").replace('"a"', "7"), "'caption'.*as s"),
        ("metadata.jsonl", LINE.replace('"a"', '[1, 2]'), "'caption' holds List.*strings"),
        ("metadata.jsonl", LINE.replace('"a"', '""'), r"no caption.*row 0 .*p0.png"),
        ("metadata.jsonl", LINE.replace("caption", "title"), "no column 'caption'.*'title'"),
        ("metadata.jsonl", LINE.encode() + b"\xe9", "line 2.*not UTF-8"),
        ("metadata.jsonl", "", "'train'.*no rows.*metadata"),
        ("metadata.csv", "file_name,caption\np0.png\n", "csv, line 2.*1 fields.*line 1 2"),
        ("metadata.csv", 'file_name,caption\np0.png,"a\n', "metadata.csv, line 2.*not CSV"),
        ("metadata.csv", "file;caption\np0.png;a\n", "line 1.*'file_name' among.*'file;caption'"),
        ("metadata.csv", "file_name,a,a\n", "line 1.*each once"),
        ("metadata.parquet", "no", "metadata.parquet is not a parquet file"),
    ],
)  # fmt: skip
def test_each_mistake_in_metadata_has_its_sentence(
    name: str, text: str | bytes, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        hub(captioned(tmp_path / "p", name, text), tmp_path, val_split="other").rows("train")


def test_two_metadata_files_are_refused(tmp_path: Path) -> None:
    path = captioned(tmp_path / "p", "metadata.jsonl", LINE)
    captioned(tmp_path / "p", "metadata.csv", "file_name,caption\np0.png,a\n")
    with pytest.raises(UserError, match="metadata.csv and metadata.jsonl; keep one"):
        hub(path, tmp_path).setup()


def test_what_is_replaced_is_read_anew(tmp_path: Path) -> None:
    """A picture, metadata and a parquet file, of the same size and with their old time."""

    def replace(file: Path, content: bytes) -> None:
        old = file.stat()
        assert old.st_size == len(content)
        file.write_bytes(content)
        os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))

    root = Path(captioned(tmp_path / "p", "metadata.jsonl", LINE))
    read = lambda: hub(str(root), tmp_path, val_split="other").rows("train")  # noqa: E731
    assert (read().x == 0).all() and read().values == ["a"]
    for file, level in ((root / "p0.bmp", 1), (root / "new.bmp", 2)):
        Pillow.new("RGB", (8, 8), (level,) * 3).save(file)
    (root / "metadata.jsonl").write_text(LINE.replace("png", "bmp"))
    assert (read().x == 1).all()
    replace(root / "p0.bmp", (root / "new.bmp").read_bytes())
    replace(root / "metadata.jsonl", LINE.replace("png", "bmp").replace('"a"', '"b"').encode())
    assert (read().x == 2).all() and read().values == ["b"]
    text = Value("string")
    file = Path(parquet(tmp_path / "a.parquet", images(4), caption=(text, list("abcd"))))
    other = parquet(tmp_path / "b.parquet", images(4), caption=(text, list("efgh")))
    assert hub(str(file), tmp_path, val_split="other").rows("train").values == list("abcd")
    replace(file, Path(other).read_bytes())
    assert hub(str(file), tmp_path, val_split="other").rows("train").values == list("efgh")


@pytest.mark.parametrize("spoil", ["flip", "flip header", "cut", "empty", "foreign", "other"])
def test_a_spoilt_map_is_made_anew(spoil: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "photos", 4)
    read = lambda size=8: hub(path, tmp_path, conditioning=None, size=size).rows("train").x  # noqa: E731
    right = read().copy()
    (file,) = (tmp_path / "cache" / "pictures").iterdir()
    whole = bytearray(file.read_bytes())
    read(9)
    (another,) = set((tmp_path / "cache" / "pictures").iterdir()) - {file}
    flipped = {k: whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :] for k in (20, 300)}
    file.write_bytes({
        "flip": flipped[300], "flip header": flipped[20], "cut": whole[:400], "empty": b"",
        "foreign": b"PK not a map", "other": another.read_bytes(),
    }[spoil])  # fmt: skip
    with pytest.warns(UserWarning, match=f"{file} are made anew"):
        assert (read() == right).all()
    assert file.read_bytes() == whole


def test_parquet_files_in_no_split_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("a", "steam_train"):
        (tmp_path / "p").mkdir(exist_ok=True)
        parquet(tmp_path / "p" / f"{name}.parquet", images(4))
    hub(str(tmp_path / "p"), tmp_path, conditioning=None).setup()
    assert "1 of 2 files in" in capsys.readouterr().err
    shutil.copytree(tmp_path / "p", tmp_path / "p [v1]")
    for path in (tmp_path / "p [v1]", tmp_path / "p [v1]" / "a.parquet"):
        with pytest.raises(UserError, match=r"takes '\[' in .*p \[v1\].*rename"):
            hub(str(path), tmp_path, conditioning=None).setup()


def test_shards_are_of_the_split_that_they_name(tmp_path: Path) -> None:
    """Also of one whose name has a word in it that `datasets` takes for a split."""
    for k, split in enumerate(("train", "test_pair", "test_subject", "train")):
        number = f"{k // 3:05}-of-{1 + (split == 'train'):05}"
        (tmp_path / "p").mkdir(exist_ok=True)
        parquet(tmp_path / f"p/{split}-{number}.parquet", images(4)[k : k + 1])
    data = hub(str(tmp_path / "p"), tmp_path, conditioning=None, val_split="test_pair")
    assert [levels(data, split) for split in ("train", "val")] == [[0, 30], [10]]
    assert sorted(data.everything) == ["all", "test_pair", "test_subject", "train"]


def test_all_of_parquet_files_is_every_split(tmp_path: Path) -> None:
    path = twice(parquet(tmp_path / "a.parquet", images(4)))
    assert everything(Path(path), tmp_path) == [0, 10, 20, 30] * 2


def test_parquet_file_list_and_pattern(tmp_path: Path) -> None:
    text = Value("string")
    for name in "ab":
        parquet(tmp_path / f"{name}.parquet", images(4), caption=(text, [name] * 4))
    pattern, listed = str(tmp_path / "*.parquet"), [str(tmp_path / f"{n}.parquet") for n in "ba"]
    assert len(hub(str(tmp_path / "a.parquet"), tmp_path).rows("train").x) == 3
    assert len(hub(pattern, tmp_path).rows("train").x) == 7
    rows = hub(listed, tmp_path, val_split="test").rows("train")
    assert rows.values == ["b"] * 4 + ["a"] * 4


def test_class_column_gives_names(tmp_path: Path) -> None:
    labels = (ClassLabel(names=["cat", "dog"]), [0, 1, 1, 0])
    path = twice(parquet(tmp_path / "a.parquet", images(4), label=labels))
    kwargs = {"caption": "label", "val_split": "test", "batch_size": 4}
    data = hub(path, tmp_path, conditioning=Classes(["cat", "dog"]), **kwargs)
    assert data.rows("val").values == ["cat", "dog", "dog", "cat"]
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert batch.u.tokens[:, 0].argmax(-1).tolist() == [0, 1, 1, 0]


def test_classes_take_their_names_from_the_data(tmp_path: Path) -> None:
    labels = ClassLabel(names=["dog", "cat", "cow"]), [0, 1, 1, 0]  # in the order of the column
    captions = Value("string"), ["a dog", "a cat", "a cat", "a dog"]  # sorted
    path = twice(parquet(tmp_path / "a.parquet", images(4), label=labels, caption=captions))
    for column, names in (("label", ["dog", "cat", "cow"]), ("caption", ["a cat", "a dog"])):
        classes = Classes()
        assert classes.open
        data = hub(path, tmp_path, conditioning=classes, caption=column, val_split="test")
        assert data.sizes()["u_dim"] == len(names)
        assert classes.names == names and not classes.open
        assert describe(classes)["init_args"] == {"names": names}  # as a checkpoint keeps it
        data.setup()
        batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
        found = [names[k] for k in batch.u.tokens[:4, 0].argmax(-1)]
        assert found == data.rows("val").values


def test_each_mistake_has_its_sentence(tmp_path: Path) -> None:
    text = Value("string")
    good = parquet(tmp_path / "a.parquet", images(4), caption=(text, list("abcd")))
    with pytest.raises(UserError, match="no column 'photo'.*it has 'image', 'caption'"):
        hub(good, tmp_path, image="photo").setup()
    with pytest.raises(UserError, match="no column 'title'.*it has 'image', 'caption'"):
        hub(good, tmp_path, caption="title").setup()
    with pytest.raises(UserError, match="'caption' holds Value.*not images.*'image'"):
        hub(good, tmp_path, image="caption").setup()
    with pytest.raises(UserError, match="'image' holds Image.*lists of strings, or class"):
        hub(good, tmp_path, caption="image").setup()
    with pytest.raises(UserError, match="no split 'test'; it has 'train'"):
        hub(good, tmp_path, val_split="test").setup()
    with pytest.raises(UserError, match="size is 7.*at least 8"):
        hub(good, tmp_path, size=7)
    with pytest.raises(ValueError, match="channels is 2; it must be 3"):
        hub(good, tmp_path, channels=2)
    one = parquet(tmp_path / "one.parquet", images(1), caption=(text, ["a"]))
    with pytest.raises(UserError, match="one row, which is held out.*data.val_split"):
        hub(one, tmp_path).setup()


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_an_empty_caption_is_named(empty: str | None, tmp_path: Path) -> None:
    column = (Value("string"), ["a", "b", empty, "d"])
    path = parquet(tmp_path / "a.parquet", images(4), caption=column)
    with pytest.raises(UserError, match="1 of 4 rows have no caption.*row 2"):
        hub(path, tmp_path, val_split="test").rows("train")
    hub(path, tmp_path, conditioning=None, val_split="test").rows("train")


@pytest.mark.parametrize("broken", [b"no picture", images(1)[0]["bytes"][:40], None])
def test_unreadable_pictures_are_named(broken: bytes | None, tmp_path: Path) -> None:
    rows = images(5)
    rows[3] = {"bytes": broken, "path": None} if broken else None
    path = parquet(tmp_path / "a.parquet", rows, caption=(Value("string"), list("abcde")))
    with pytest.raises(UserError, match="1 of 5 pictures.*row 3"):
        hub(path, tmp_path, val_split="test").rows("train")
    assert not list((tmp_path / "cache" / "pictures").iterdir())


def test_rows_are_named_as_in_the_file(tmp_path: Path) -> None:
    """Whichever side of the held-out twentieth a row is on."""
    for row in range(0, 40, 3):
        captions = [f"picture {i}" for i in range(40)]
        captions[row] = ""
        column = (Value("string"), captions)
        path = parquet(tmp_path / f"{row}.parquet", images(20) * 2, caption=column)
        with pytest.raises(UserError, match=f"row {row};"):
            hub(path, tmp_path).setup()


def test_where_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (str(tmp_path / "nope"), "./nope", str(tmp_path / "*.parquet"), "nope.parquet"):
        with pytest.raises(UserError, match="is not there"):
            hub(path, tmp_path).setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty.*holds no pictures and no parquet files; give"):
        hub(str(tmp_path / "empty"), tmp_path).setup()
    for name in ("a.txt", "metadata.csv", "a.json"):
        (tmp_path / "empty" / name).write_text("a")
        with pytest.raises(UserError, match="not a parquet file"):
            hub(str(tmp_path / "empty" / name), tmp_path).setup()
    with pytest.raises(UserError, match="holds no pictures.* but 'metadata.csv', 'a.json', 'a.t"):
        hub(str(tmp_path / "empty"), tmp_path).setup()
    with pytest.raises(UserError, match="000.png' is one picture; give the folder"):
        hub(folder(tmp_path / "p", 1) + "/000.png", tmp_path).setup()
    for nothing in ("", " ", []):
        with pytest.raises(UserError, match="data.path is"):
            hub(nothing, tmp_path).setup()


def test_offline_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError,
        match="'somebody/something' is no file or folder here and cannot be loaded.*[Oo]ffline",
    ):
        hub("somebody/something", tmp_path).setup()


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 2**29})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="1.0 GiB and .* has 0.5 GiB free.*data.cache_dir"):
        pictures.make_room(tmp_path, 2**30)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="data.cache_dir cannot hold"):
        pictures.make_room(tmp_path / "file" / "pictures", 1)


@needs_shared
def test_emoji(tmp_path: Path) -> None:
    data = hub(str(SHARED / "emoji"), tmp_path, val_split="test", size=16)
    data.setup()
    train = data.rows("train")
    assert train.x.shape == (1469, 3, 16, 16) and train.values[0] == "grinning face"
    assert len(data.rows("val").x) == 163
    assert (train.x[:, :, 0, 0] == 255).mean() > 0.5  # on white


# --- points ---


def test_points_know_their_component(tmp_path: Path) -> None:
    mixture = GaussianMixture([[0.5, 0.5], [-0.5, -0.5]], [0.05, 0.05])
    data = Points(mixture, Classes(["up", "down"]), 500, 50, 100, cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch.x.shape == (100, 2) and data.shape == (2,) and batch.x.dtype == torch.float32
    assert torch.equal(batch.u.tokens[:, 0, 0] == 1, batch.x[:, 0] > 0)
    again = Points(mixture, None, 500, 50)
    assert (again.rows("train").x == data.rows("train").x).all()
    assert not np.isin(again.rows("val").x, again.rows("train").x).any()
