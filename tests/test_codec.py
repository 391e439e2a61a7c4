"""Codecs: rows to x and back, to files, and what a density of x says of rows."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.building import build, describe
from pipeline.codec import Codec, Columns, Pixels, Standardised
from pipeline.errors import UserError
from pipeline.networks import MLP, UNet
from pipeline.noise import Noise

LEVELS = torch.arange(256, dtype=torch.uint8)


def test_every_level_comes_back() -> None:
    codec, rows = Pixels(1, 16, 16), LEVELS.reshape(1, 1, 16, 16)
    x = codec.encode(rows)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    # float32: k / 127.5 and the sum are rounded once each, of numbers up to 2
    assert torch.allclose(x.double(), rows.double() / 127.5 - 1, rtol=0, atol=2**-23)
    decoded = codec.decode(x)
    assert decoded.dtype == torch.uint8 and torch.equal(decoded, rows)


def test_the_nearest_level_is_taken_and_values_outside_are_clipped() -> None:
    codec = Pixels(1, 1, 1)
    for nudge in (-0.49, 0.49):
        assert torch.equal(codec.decode((LEVELS + nudge) / 127.5 - 1), LEVELS)
    assert codec.decode(torch.tensor([-torch.inf, -1.2, 1.2, torch.inf])).tolist() == [
        0,
        0,
        255,
        255,
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_say_their_shape_and_sizes(channels: int) -> None:
    codec = Pixels(channels, 8, 16)
    assert codec.shape == (channels, 8, 16) and codec.plural == "pictures" and codec.pictures
    assert UNet(**codec.sizes).channels == channels  # arguments of a network
    sheet = codec.sheet(torch.zeros(3, *codec.shape, dtype=torch.uint8), ["a", "b", ""], 2)
    assert isinstance(sheet, Image.Image)


def test_columns_are_as_they_are() -> None:
    codec = Columns(2)
    assert codec.shape == (2,) and codec.plural == "vectors" and not codec.pictures
    assert MLP(**codec.sizes).x_dim == 2
    rows = Noise("rows").normal(torch.zeros(5, 2))
    assert torch.equal(codec.encode(rows), rows) and torch.equal(codec.decode(rows), rows)
    assert codec.encode(rows.double()).dtype == torch.float32
    assert codec.sheet(rows, [""] * 5, 2) is None  # nothing to see


def test_two_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="channels is 2; it must be 3 .* or 1"):
        Pixels(2, 8, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_written_with_how_they_were_made(channels: int, tmp_path: Path) -> None:
    codec = Pixels(channels, 4, 6)
    rows = torch.arange(2 * channels * 24, dtype=torch.uint8).reshape(2, channels, 4, 6)
    about = [{"prompt": f"ein Haus, größer als {k} 家", "seed": k} for k in range(5)]
    said, settings = [dict(one) for one in about], {"steps": 3}
    codec.write(rows, 3, tmp_path, about, settings)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00003.png", "00004.png"]
    for picture, i in zip(rows, (3, 4), strict=True):
        assert about[i] == said[i] | {"file": f"{i:05d}.png"}
        with Image.open(tmp_path / about[i]["file"]) as image:
            assert image.text["Title"] == said[i]["prompt"]  # type: ignore[attr-defined]
            assert json.loads(image.text["Settings"]) == said[i] | settings  # type: ignore[attr-defined]
            pixels = torch.from_numpy(np.array(image)).reshape(4, 6, channels).permute(2, 0, 1)
        assert torch.equal(pixels, picture)
    assert about[:3] == said[:3]


def test_vectors_are_lines_under_one_header(tmp_path: Path) -> None:
    rows = Noise("lines").normal(torch.zeros(5, 2))
    about = [{"prompt": f'"{k}", and a comma', "seed": 10 + k} for k in range(5)]
    for first, last in ((0, 2), (2, 4), (4, 5)):
        Columns(2).write(rows[first:last], first, tmp_path, about, {"steps": 3})
    with (tmp_path / "samples.csv").open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == ["prompt", "seed", "x_0", "x_1"]
    assert [line[:2] for line in lines] == [[one["prompt"], str(one["seed"])] for one in about]
    assert [[float(v) for v in line[2:]] for line in lines] == rows.tolist()  # to the last bit
    assert not any("file" in one for one in about)


def test_bits_of_the_uniform_law() -> None:
    """256 equal values need 8 bits: as wide as the cells of all values, 256 / 127.5."""
    log_prob = torch.tensor([-48 * math.log(256 / 127.5)], dtype=torch.float64)
    assert torch.allclose(Pixels(3, 4, 4).bits(log_prob), torch.tensor([8.0]).double())


def test_dequantise() -> None:
    pictures = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1).expand(-1, 1, 32, 32)
    x = Pixels(1, 32, 32).dequantise(pictures, Noise("cell"))
    v = (x + 1) * 127.5 - pictures
    assert v.abs().max() < 0.5 + 1e-4  # float32: 1e-7 of 255
    n = v.numel()
    # moments of the uniform law on (-1/2, 1/2), within four standard errors
    assert v.mean().abs() < 4 / math.sqrt(12 * n)
    assert abs(v.square().mean() - 1 / 12) < 4 / math.sqrt(180 * n)


def test_bits_bound_the_code_length() -> None:
    """Of a density p the law of a uint8 value is its mass on the value's cell. The bits of p after
    `dequantise` are those of this law, plus what p varies within a cell, on average.
    """
    zero = torch.zeros((), dtype=torch.float64)
    law = torch.distributions.Normal(zero, zero + 0.02)  # 2.5 cells wide: p varies within one
    k = torch.arange(118, 138, dtype=torch.float64)  # four widths to each side
    mass = law.cdf((k + 0.5) / 127.5 - 1) - law.cdf((k - 0.5) / 127.5 - 1)
    needed = -torch.log2(mass)
    pictures = k.to(torch.uint8).reshape(-1, 1, 1, 1).repeat_interleave(4096, dim=0)
    codec = Pixels(1, 1, 1)
    x = codec.dequantise(pictures, Noise("cell")).flatten()
    bits = codec.bits(law.log_prob(x)).reshape(-1, 4096).mean(dim=1)
    assert ((bits - needed) > -0.05).all()  # the mean of 4,096 is uncertain by a hundredth
    gap = (mass * (bits - needed)).sum()
    assert 0 < gap < 0.05


TABLE = torch.tensor(
    [[20.25, 1.0, 1e-9], [21.5, 3.0, 3e-9], [24.0, 2.0, -7e-9]], dtype=torch.float64
)


def test_standardised_columns_come_back_as_they_were() -> None:
    codec = Standardised(["heat", "count", "tiny"])
    codec.learn(TABLE)
    x = codec.encode(TABLE.float())
    assert x.dtype == torch.float32 and MLP(**codec.sizes).x_dim == 3
    # float32, of numbers about 20
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(x.std(dim=0, correction=0), torch.full((3,), 0.5))
    assert codec.decimals == [2, 0, None]
    rows = codec.decode(x)
    assert torch.equal(rows[:, :2], TABLE[:, :2])  # rounded to their decimals
    torch.testing.assert_close(rows[:, 2], TABLE[:, 2], rtol=1e-6, atol=0)
    assert codec.decode(x[:1] + 0.1)[0, 1] == 1  # 0.16 more, and a whole number
    again = build(describe(codec), Codec)
    assert torch.equal(again.decode(x), rows) and torch.equal(again.encode(TABLE.float()), x)


def test_rows_are_written_with_what_was_asked_for(tmp_path: Path) -> None:
    codec = Standardised(["heat", "count", "tiny"])
    codec.learn(TABLE)
    about = [{"prompt": "-", "seed": k, "u": {"machine": "a,b", "load": None}} for k in range(3)]
    codec.write(TABLE[:2], 0, tmp_path, about, {})
    codec.write(TABLE[2:], 2, tmp_path, about, {})
    assert (tmp_path / "samples.csv").read_text().splitlines() == [
        "machine,load,seed,heat,count,tiny",
        '"a,b",,0,20.25,1,1e-09',
        '"a,b",,1,21.5,3,3e-09',
        '"a,b",,2,24.0,2,-7e-09',
    ]


def test_a_column_named_seed_is_kept(tmp_path: Path) -> None:
    """Of x or of u: the seed of the draw stands beside it."""
    for names, u in ((["seed", "b", "c"], {"a": "1"}), (["a", "b", "c"], {"seed": "1"})):
        codec = Standardised(names)
        codec.learn(TABLE)
        found = codec.columns(TABLE, [{"prompt": "", "seed": 7, "u": u}] * 3)
        own = TABLE[:, 0].tolist() if "seed" in names else ["1"] * 3
        assert found["seed"] == own and found["seed of the draw"] == [7] * 3


@pytest.mark.parametrize("column", [[3.0, 3.0, 3.0], [1e9, 1e9 + 1, 1e9 + 2]])
def test_a_column_that_does_not_vary_is_refused(column: list[float]) -> None:
    with pytest.raises(UserError, match="Column 'flat' varies by .* leave it out, or subtract"):
        Standardised(["flat"]).learn(torch.tensor(column, dtype=torch.float64)[:, None])
