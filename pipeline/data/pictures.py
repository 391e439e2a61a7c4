"""Pictures are decoded once, to a uint8 memory map (N, C, size, size) that later runs open as it
is.

The map's name is a digest of what decides its bytes (the data set's fingerprint, size, channels,
the version of the rule below). It is written beside its place and moved there when complete, so a
run that dies leaves nothing half-made.

Rule: turned upright (EXIF), laid on white where transparent, the shorter side brought to `size`
with a Lanczos filter, the middle cut out. An unreadable picture stops the run with its row;
guessing around it would change the data in silence.
"""

import hashlib
import io
import json
import os
import time
from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageOps
from tqdm import tqdm

from pipeline.conditioning.base import Conditioning
from pipeline.data.base import DataModule, Source
from pipeline.errors import UserError

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
        super().__init__(conditioning, **kwargs)
        if size < 8:
            raise UserError(f"data.size is {size}; a picture needs a side of at least 8 pixels.")
        if channels not in (1, 3):
            raise UserError(f"data.channels is {channels}; it must be 3 (colour) or 1 (grey).")
        self.size, self.channels = size, channels

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    @abstractmethod
    def dataset(self, split: str) -> "datasets.Dataset":
        """The rows, images still encoded."""

    @abstractmethod
    def fingerprint(self, split: str) -> str:
        """What decides the pictures of a split before they are resized."""

    @abstractmethod
    def values(self, split: str) -> list | None:
        """What each picture is conditioned on."""

    def source(self, split: str) -> Source:
        key = json.dumps([VERSION, self.fingerprint(split), self.size, self.channels])
        path = self.cache / "pictures" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        if not path.exists():
            write_map(path, self.dataset(split), self.image, self.size, self.channels, split)
        return Source(np.load(path, mmap_mode="r"), self.values(split))


def write_map(
    path: Path, dataset: "datasets.Dataset", column: str, size: int, channels: int, split: str
) -> None:
    """Decodes a column of pictures to `path`, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    part = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}.part")
    try:
        rows = np.lib.format.open_memmap(
            part, "w+", np.uint8, (len(dataset), channels, size, size)
        )
        broken = []
        for row, picture in enumerate(
            decoded(dataset, column, size, channels, f"decoding {split}")
        ):
            if isinstance(picture, np.ndarray):
                rows[row] = picture
            else:
                broken.append((row, picture))
        if broken:
            row, why = broken[0]
            raise UserError(
                f"{len(broken)} of {len(dataset)} pictures in column {column!r} of split "
                f"{split!r} cannot be read, the first in row {row} ({why}); mend or remove them."
            )
        rows.flush()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    rank_zero_info(f"Decoded {len(dataset)} pictures ({split}) to {path}.")


def decoded(
    dataset: "datasets.Dataset", column: str, size: int, channels: int, title: str
) -> Iterator[Any]:
    """Each row's picture, or the reason why there is none. Pillow decodes outside the interpreter
    lock: threads pay.
    """

    def read(image: dict | None) -> np.ndarray | str:
        try:
            return decode(image, size, channels)
        except Exception as error:  # Pillow raises whatever a broken file provokes
            return f"{(image or {}).get('path') or 'no file name'}: {error}"

    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        tqdm(total=len(dataset), desc=title, unit="") as bar,
    ):
        for images in dataset.select_columns([column]).iter(256):
            yield from pool.map(read, images[column])  # type: ignore[index]
            bar.update(len(images[column]))  # type: ignore[index]


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


def sweep(folder: Path, seconds: float = 86400) -> None:
    """Removes what a killed process left unfinished a day ago or earlier."""
    for part in folder.glob("*.part"):
        if time.time() - part.stat().st_mtime > seconds:
            part.unlink(missing_ok=True)
