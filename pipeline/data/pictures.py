"""Pictures are decoded once, to a uint8 memory map (N, C, H, W) that later runs open.

The map's name is a digest of what decides its bytes (the data set's fingerprint, size, channels,
the version of the rule below). It is written beside its place and moved there when complete, so a
run that dies leaves nothing half-made. It ends with a checksum of its name and bytes, which is
verified when it is opened: a map that was changed or cut, or is another's, is made anew.

Rule: turned upright (EXIF), laid on white where transparent, made to fit as `fit` says, with a
Lanczos filter; 16 bits of grey are brought to 8. An unreadable picture stops the run with its row;
guessing around it would change the data in silence.
"""

import hashlib
import io
import math
import os
import shutil
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from pipeline.codec import Pixels
from pipeline.conditioning import Conditioning, Picture
from pipeline.data.base import DataModule, Rows, Source
from pipeline.distributed import each, on_machine
from pipeline.errors import UserError
from pipeline.files import digest, whole
from pipeline.latents import Latents

if TYPE_CHECKING:
    import datasets

__all__ = ["Pictures", "decode", "write_map"]

VERSION = 3  # of the rule in `decode`: raise it when pictures would come out different
SMALL = 3e-4  # seconds that decoding a thumbnail takes at most

Fit = Literal["crop", "pad", "squeeze"]
Read = Callable[[dict | None], np.ndarray]  # of an encoded row {bytes, path}


class Pictures(DataModule):
    """A data module over a Hugging Face dataset with a column of encoded images,
    `Image(decode=False)`.

    Arguments:
        size: The side of a picture in pixels; or its height and its width, `[48, 64]`.
        channels: 3 for colour, 1 for grey.
        fit: How a picture of another shape is made to fit: `crop` cuts out the middle, `pad` adds
            white on both sides, `squeeze` brings height and width to `size` each.
        autoencoder: A frozen `AutoencoderKL` of diffusers, a folder or a name on the Hub, whose
            latents are learned in place of pixels; those of all pictures are kept. By default
            pixels are learned.
        more: See :class:`pipeline.data.DataModule`.
    """

    image = "image"
    kind: type = np.uint8  # of the numbers of a row

    def __init__(
        self,
        conditioning: Conditioning | None,
        size: int | tuple[int, int] = 32,
        channels: int = 3,
        fit: Fit = "crop",
        autoencoder: str | None = None,
        **more: Any,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 8:
            raise UserError(f"data.size is {size}; a picture needs sides of at least 8 pixels.")
        if autoencoder and isinstance(conditioning, Picture):
            raise UserError(
                "data.conditioning is of pictures and data.autoencoder learns latents, whose "
                "sides are others: set one of them to null."
            )
        self.frame = (channels, height, width)
        codec = Latents(autoencoder, *self.frame) if autoencoder else Pixels(*self.frame)
        super().__init__(codec, conditioning, **more)
        self.size, self.channels = size, channels
        self.fit: Fit = fit
        self._latents: dict[str, np.ndarray] = {}

    @abstractmethod
    def dataset(self, split: str) -> "datasets.Dataset":
        """The rows, images still encoded."""

    @abstractmethod
    def fingerprint(self, split: str) -> str:
        """What decides the pictures of a split before they are resized."""

    @abstractmethod
    def values(self, split: str) -> list | None:
        """What each picture is conditioned on."""

    def more(self, split: str) -> list[list] | None:
        return None

    def read(self, image: dict | None) -> np.ndarray:
        """What is encoded, {bytes, path}, as a row."""
        return decode(image, self.size, self.channels, self.fit)

    def row_number(self, split: str, row: int) -> int:
        """The number by which a person knows a row of a split."""
        return row

    def source(self, split: str, together: bool = False) -> Source:
        """The rows of a split, decoded where they are not kept, by all processes if `together`."""
        values = self.values(split)  # before the pictures: what is wrong here is found in no time
        other = self.condition_image
        given = None if other is None else self.decoded(split, other, together)
        return Source(self.decoded(split, self.image, together), values, self.more(split), given)

    def decoded(self, split: str, column: str, together: bool) -> np.ndarray:
        """The pictures of a column."""
        about = (VERSION, self.fingerprint(split), self.size, self.channels, self.fit)
        key = digest(*about, *([] if column == self.image else [column]))
        path = self.cache / "pictures" / f"{key[:32]}.npy"
        sound = is_sound(path)
        if not (all(each(lambda: sound)) if together else sound):
            images = self.dataset(split).select_columns([column])

            def make(start: int, end: int, quiet: bool) -> Iterator[np.ndarray | str]:
                some = images.select(range(start, end))
                return decoded(some, self.read, f"decoding {split}", quiet)

            try:
                write_map(path, len(images), self.frame, self.kind, make, together)
            except Unreadable as error:
                count, row, why = error.args
                raise UserError(
                    f"{count} of {len(images)} {self.codec.plural} in column {column!r} of "
                    f"split {split!r} cannot be read, the first in row "
                    f"{self.row_number(split, row)} ({why}); mend or remove them."
                ) from None
        return np.load(path, mmap_mode="r")

    def setup(self, stage: str | None = None) -> None:
        """And keeps the latents of all pictures, where they are learned."""
        super().setup(stage)
        if isinstance(self.codec, Latents):
            for split in self.splits:
                if split not in self._latents:
                    self._latents[split] = self.latents(split, self.codec)

    def latents(self, split: str, codec: Latents) -> np.ndarray:
        pictures: Any = self.rows(split).x
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        key = digest("latents", VERSION, Path(pictures.filename).name, codec.weights)
        path = self.cache / "latents" / f"{key[:32]}.npy"
        sound = is_sound(path)
        if not all(each(lambda: sound)):

            def make(start: int, end: int, quiet: bool) -> Iterable[np.ndarray]:
                some = codec.kept(pictures[start:end], device)
                return tqdm(some, f"encoding {split}", end - start, disable=quiet or None)

            write_map(path, len(pictures), codec.shape, np.float32, make, together=True)
            codec.autoencoder.to("cpu")  # the device's memory is for the training
        return np.load(path, mmap_mode="r")

    def gathering(self, split: str) -> Rows:
        rows = super().gathering(split)
        rows.x = self._latents.get(split, rows.x)
        return rows


class Unreadable(Exception):
    """How many pictures cannot be read, the first one's row, and why."""


def write_map(
    path: Path,
    number: int,
    shape: tuple[int, ...],
    dtype: type,
    make: Callable[[int, int, bool], Iterable[np.ndarray | str]],
    together: bool = False,
) -> None:
    """Writes so many rows of a shape and a type to a memory map, all or nothing.

    Arguments:
        make: Makes the rows from one to another, each or the reason why there is none; says how
            far it is unless the last argument is true.
        together: Whether every process calls this, and those of a machine make a part each.

    Raises:
        Unreadable: Some rows could not be made.
    """
    (rank, ranks), every = (on_machine(), each) if together else ((0, [0]), lambda make: [make()])

    def begin() -> Path | None:
        if part is not None:
            make_room(path.parent, number * math.prod(shape) * np.dtype(dtype).itemsize)
            np.lib.format.open_memmap(part, "w+", dtype, (number, *shape)).flush()
        return part

    def fill() -> list[tuple[int, str]]:
        rows, broken = np.load(begun, mmap_mode="r+"), []
        start, end = (k * number // len(ranks) for k in (rank, rank + 1))
        for k, row in enumerate(make(start, end, rank > 0), start):
            if isinstance(row, str):
                broken.append((k, row))
            else:
                rows[k] = row
        rows.flush()
        return broken

    def end() -> None:
        if part is not None:
            sealed = seal(part, path.name, part.stat().st_size)
            with part.open("ab") as file:
                file.write(sealed)

    with whole(path) if rank == 0 else nullcontext() as part:
        begun: Any = every(begin)[ranks[0]]  # of this machine's first
        broken = sorted({one for some in every(fill) for one in some})
        if broken:
            raise Unreadable(len(broken), *broken[0])
        every(end)
    every(lambda: None)  # it has its name now
    rank_zero_info(f"Kept {number} {path.parent.name} in {path}.")


def seal(file: Path, name: str, size: int) -> bytes:
    """The sha256 of a map's name and its first so many bytes."""
    found = hashlib.sha256(name.encode())
    with file.open("rb") as opened:
        while size > 0 and (block := opened.read(min(size, 1 << 20))):
            found.update(block)
            size -= len(block)
    return found.digest()


def is_sound(path: Path) -> bool:
    """Whether a map is there and as it was written; warns where it is there and another."""
    try:
        size = path.stat().st_size - hashlib.sha256().digest_size
        with path.open("rb") as file:
            file.seek(max(size, 0))
            if file.read() == seal(path, path.name, size):
                return True
        reason = "its bytes are not those that were written"
    except FileNotFoundError:
        return False
    except OSError as error:
        reason = str(error)
    warnings.warn(f"The decoded pictures {path} are made anew ({reason}).", stacklevel=3)
    return False


def decoded(
    images: "datasets.Dataset", read: Read, title: str, quiet: bool
) -> Iterator[np.ndarray | str]:
    """Each row's picture, or the reason why there is none.

    Pillow decodes outside the interpreter lock: threads double the rate of photographs on two
    cores. Of thumbnails they cost three times the processor's time, so the first few say which
    these are.
    """

    def tried(image: dict | None) -> np.ndarray | str:
        try:
            return read(image)
        except UnidentifiedImageError:
            return f"{named(image)}: no image that Pillow knows"
        except Exception as error:  # Pillow raises whatever a broken file provokes
            return f"{named(image)}: {error}"

    with (
        ThreadPoolExecutor(cores()) as pool,
        tqdm(total=len(images), desc=title, unit=" rows", disable=quiet or None) as bar,
    ):
        for some in images.iter(256):
            (column,) = some.values()  # type: ignore[union-attr]
            start, done = time.perf_counter(), 0
            while done < len(column) and time.perf_counter() - start < SMALL * (done + 8):
                yield tried(column[done])  # while they are small, or the first eight
                done += 1
            bar.update(done)
            for picture in pool.map(tried, column[done:]):
                yield picture
                bar.update()


def named(image: dict | None) -> str:
    return (image or {}).get("path") or "no file name"


def decode(
    image: dict | None, size: int | tuple[int, int], channels: int, fit: Fit = "crop"
) -> np.ndarray:
    """An encoded image {bytes, path} → uint8 (C, height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    if not image or not (image.get("bytes") or image.get("path")):
        raise ValueError("it is empty")
    with Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]) as opened:
        picture = flatten(eight_bits(ImageOps.exif_transpose(opened)))
    if channels == 1:
        picture = picture.convert("L")
    if picture.size != (width, height):
        picture = fits[fit](picture, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def padded(picture: Image.Image, size: tuple[int, int], by: Image.Resampling) -> Image.Image:
    return ImageOps.pad(picture, size, by, color="white")


fits = {"crop": ImageOps.fit, "pad": padded, "squeeze": Image.Image.resize}


def eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey → 8-bit grey, value / 257; what is transparent is white. Pillow would cut."""
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;"):
        return picture
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"its mode {picture.mode} has more than 16 bits a channel; save it with 8 or 16"
        )
    grey = ((values.astype(np.int32) + 128) // 257).astype(np.uint8)
    if "transparency" in picture.info:
        grey[values == picture.info["transparency"]] = 255
    return Image.fromarray(grey)


def flatten(picture: Image.Image) -> Image.Image:
    """To RGB, transparent parts laid on white."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    key = picture.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of 16 bits, of which Pillow has read the upper
        picture.info["transparency"] = tuple(value >> 8 for value in key)
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def cores() -> int:
    """The cores that this process may use, where the system tells."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def make_room(folder: Path, size: int) -> None:
    """Makes the folder, without what a killed process left there a day ago or earlier.

    A full disk kills who writes to a memory map without a word, so the space is asked for before.
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
