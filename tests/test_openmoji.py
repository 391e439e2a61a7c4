"""Drawings of a font that is a package."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from pipeline.data import OpenMoji, openmoji
from pipeline.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> OpenMoji:
    return OpenMoji(None, 16, cache_dir=str(tmp_path_factory.mktemp("cache")))


def pixels(data: OpenMoji, *names: str) -> np.ndarray:
    """The drawings of so many names, with shape (N, 3, 16, 16)."""
    found = {one.name: k for k, one in enumerate(data.plan("train"))}
    return data.rows("train").x[[found[name] for name in names]]


def test_every_emoji_but_flags_of_regions_and_skin_tones(data: OpenMoji) -> None:
    names = [one.name for one in data.drawn]
    assert len(names) > 1600 and len(set(names)) == len(names)
    assert {"red circle", "pirate flag", "man walking", "keycap 5"} <= set(names)
    assert not [name for name in names if "skin tone" in name or name in ("Germany", "France")]
    assert not [name for name in names if set(name) & set(":_’")]


def test_a_family_is_on_one_side(data: OpenMoji) -> None:
    train, val = ({one.name for one in data.plan(split)} for split in ("train", "val"))
    assert len(train) + len(val) == len(data.drawn) and not train & val
    assert 0.08 < len(val) / len(data.drawn) < 0.13
    for doing in ("walking", "running", "kneeling", "elf", "mage"):
        whole = {name for name in train | val if set(name.split()) - openmoji.SAME == {doing}}
        assert len(whole) >= 3 and (whole <= train or whole <= val)


def test_drawings_are_whole_and_on_white(data: OpenMoji) -> None:
    x = data.rows("train").x
    assert x.shape == (len(data.plan("train")), 3, 16, 16)
    assert np.median(x[:, :, 0, 0]) == 255
    assert (x.min(axis=(1, 2, 3)) < 200).all()  # each shows something
    red, black, white = pixels(data, "red heart", "black large square", "white large square")
    middle = np.s_[:, 7:9, 7:9]
    assert red[middle][0].min() > 180 and red[middle][1:].max() < 100
    assert black[middle].max() < 90 and white[middle].min() > 240
    # characters that are joined are one drawing
    assert (pixels(data, "rainbow flag") != pixels(data, "pirate flag")).any()


def test_the_drawing_is_in_the_middle(data: OpenMoji) -> None:
    """The font's square is the picture: what is drawn leaves as much on either side."""
    x = data.rows("train").x.min(axis=1) < 200
    for axis in (1, 2):
        lines = x.any(axis=3 - axis)
        first, last = lines.argmax(axis=1), lines.shape[1] - 1 - lines[:, ::-1].argmax(axis=1)
        assert abs(np.median(first) - np.median(15 - last)) <= 1


def test_same_bytes(data: OpenMoji) -> None:
    font = openmoji.ImageFont.truetype(str(data.font), 100)
    one, two = (openmoji.draw("🐶", font, 128) for _ in range(2))
    assert one == two and Image.open(io.BytesIO(one)).size == (128, 128)
    assert data.fingerprint("train") != data.fingerprint("val")


def test_names_are_captions(data: OpenMoji) -> None:
    assert Counter(data.values("val")) == Counter(data.dataset("val")["caption"])
    with pytest.raises(UserError, match="no split 'test'"):
        data.plan("test")


def test_missing_packages_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmoji, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install .*openmoji"):
        OpenMoji(None, cache_dir=str(tmp_path)).plan("train")
    monkeypatch.undo()
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(UserError, match="Raqm"):
        OpenMoji(None, cache_dir=str(tmp_path)).plan("train")
