"""Pictures are decoded once, to a uint8 memory map (N, C, size, size) that later runs open as it
is.

The map's name is a digest of what decides its bytes (the data set's fingerprint, size, channels,
the version of the rule below). It is written beside its place and moved there when complete, so a
run that dies leaves nothing half-made.

Rule: turned upright (EXIF), laid on white where transparent, the shorter side brought to `size`
with a Lanczos filter, the middle cut out. An unreadable picture stops the run with its row;
guessing around it would change the data in silence.
"""

import io
import math
import os
import shutil
import time
from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from pipeline.codec import Pixels
from pipeline.conditioning import Conditioning
from pipeline.data.base import DataModule, Source
from pipeline.errors import UserError
from pipeline.files import digest, whole

if TYPE_CHECKING:
    import datasets

__all__ = ["Pictures", "decode", "write_map"]

VERSION = 1  # of the rule in `decode`: raise it when pictures would come out different


class Pictures(DataModule):
    """A data module over a Hugging Face dataset with a column of encoded images,
    `Image(decode=False)`.

    Arguments:
        size: The side of a picture in pixels.
        channels: 3 for colour, 1 for grey.
        kwargs: See :class:`pipeline.data.DataModule`.
    """

    image = "image"

    def __init__(
        self, conditioning: Conditioning | None, size: int, channels: int = 3, **kwargs: Any
    ) -> None:
        if size < 8:
            raise UserError(f"data.size is {size}; a picture needs a side of at least 8 pixels.")
        super().__init__(Pixels(channels, size, size), conditioning, **kwargs)
        self.size, self.channels = size, channels

    @abstractmethod
    def dataset(self, split: str) -> "datasets.Dataset":
        """The rows, images still encoded."""

    @abstractmethod
    def fingerprint(self, split: str) -> str:
        """What decides the pictures of a split before they are resized."""

    @abstractmethod
    def values(self, split: str) -> list | None:
        """What each picture is conditioned on."""

    def row_number(self, split: str, row: int) -> int:
        """The number by which a person knows a row of a split."""
        return row

    def source(self, split: str) -> Source:
        values = self.values(split)  # before the pictures: what is wrong here is found in no time
        key = digest(VERSION, self.fingerprint(split), self.size, self.channels)
        path = self.cache / "pictures" / f"{key[:32]}.npy"
        if not path.exists():
            images = self.dataset(split).select_columns([self.image])
            try:
                write_map(path, images, (self.channels, self.size, self.size), f"decoding {split}")
            except Unreadable as error:
                count, row, why = error.args
                raise UserError(
                    f"{count} of {len(images)} pictures in column {self.image!r} of split "
                    f"{split!r} cannot be read, the first in row {self.row_number(split, row)} "
                    f"({why}); mend or remove them."
                ) from None
        return Source(np.load(path, mmap_mode="r"), values)


class Unreadable(Exception):
    """How many pictures cannot be read, the first one's row, and why."""


def write_map(
    path: Path, images: "datasets.Dataset", shape: tuple[int, int, int], title: str
) -> None:
    """Decodes a data set of one column, pictures, to `path`, all or nothing."""
    make_room(path.parent, len(images) * math.prod(shape))
    with whole(path) as part:
        rows = np.lib.format.open_memmap(part, "w+", np.uint8, (len(images), *shape))
        broken = []
        for row, picture in enumerate(decoded(images, shape, title)):
            if isinstance(picture, str):
                broken.append((row, picture))
            else:
                rows[row] = picture
        if broken:
            raise Unreadable(len(broken), *broken[0])
        rows.flush()
    rank_zero_info(f"Kept {len(images)} decoded pictures in {path}.")


def decoded(
    images: "datasets.Dataset", shape: tuple[int, int, int], title: str
) -> Iterator[np.ndarray | str]:
    """Each row's picture, or the reason why there is none.

    Pillow decodes outside the interpreter lock: threads double the rate of photographs on two
    cores, and cost thumbnails a fifth of theirs.
    """

    def read(image: dict | None) -> np.ndarray | str:
        try:
            return decode(image, shape[-1], shape[0])
        except UnidentifiedImageError:
            return f"{named(image)}: no image that Pillow knows"
        except Exception as error:  # Pillow raises whatever a broken file provokes
            return f"{named(image)}: {error}"

    with (
        ThreadPoolExecutor(cores()) as pool,
        tqdm(total=len(images), desc=title, unit=" pictures", disable=None) as bar,
    ):
        for some in images.iter(256):
            for picture in pool.map(read, *some.values()):  # type: ignore[union-attr]
                yield picture
                bar.update()


def named(image: dict | None) -> str:
    return (image or {}).get("path") or "no file name"


def decode(image: dict | None, size: int, channels: int) -> np.ndarray:
    """An encoded image {bytes, path} → uint8 (C, size, size)."""
    if not image or not (image.get("bytes") or image.get("path")):
        raise ValueError("it is empty")
    with Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]) as opened:
        picture = flatten(ImageOps.exif_transpose(opened))
    if channels == 1:
        picture = picture.convert("L")
    if picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def flatten(picture: Image.Image) -> Image.Image:
    """To RGB, transparent parts laid on white."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def cores() -> int:
    """The cores that this process may use, where the system tells."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def make_room(folder: Path, size: int) -> None:
    """Makes the folder, without what a killed process left there a day ago or earlier.

    A full disk kills a process that writes to a memory map without a word, so the space is asked
    for before.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.cache_dir cannot hold {folder} ({error}); choose another."
        ) from error
    for part in folder.glob("*.part"):
        if time.time() - part.stat().st_mtime > 86400:
            part.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"The decoded pictures take {size / 2**30:.1f} GiB and {folder} has "
            f"{free / 2**30:.1f} GiB free; make room or set data.cache_dir to another disk."
        )
