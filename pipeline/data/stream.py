"""Pictures that are read from shards while a model trains, and never kept decoded.

A shard is a parquet file or a WebDataset file (.tar). A few of them, a window, are in memory,
still encoded; what a batch needs of them is decoded, its captions embedded, in its turn.
"""

import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.codec import Pixels
from pipeline.conditioning import Conditioning
from pipeline.data.base import DataModule, Loader, Rows, Source
from pipeline.data.folder import is_picture, say
from pipeline.data.hub import matching
from pipeline.data.order import Windows
from pipeline.data.pictures import Fit, cores, decode
from pipeline.errors import UserError
from pipeline.files import digest, whole

__all__ = ["Stream"]

Row = tuple[dict, str | None]  # the encoded picture {bytes, path}, and its caption


class Stream(DataModule):
    """Captioned pictures in more shards than a disk holds decoded.

    What it keeps of the exactness of other data: every row comes once in an epoch, the order is a
    function of (seed, batches seen), whatever the number of devices and workers, and a resumed run
    is the run that was not stopped. What it gives up: rows are mixed within a window of files and
    not over all of them, so shards that are sorted by something should be many in a window; and a
    caption is embedded beside those of its batch, so that its last bits depend on them.

    Each process reads all files of a window and decodes its own rows. The files are counted first,
    a .tar by reading it once, which is remembered.

    Arguments:
        path: The shards: files, or patterns such as `shards/*.tar`, in the order of their paths.
        image: The column of images of a parquet file.
        caption: The column of captions; of a .tar the member's extension, or a key of its .json.
        val_files: So many files, the last ones, are held out to validate on, decoded in memory.
        window: So many files are mixed, and kept in memory encoded, in each process and worker.
        size: The side of a picture in pixels.
        channels: 3 for colour, 1 for grey.
        fit: How a picture becomes a square, see `pipeline.data.Hub`.
        flip: Whether half of the training pictures are mirrored.
        workers: Loader processes, which decode.
        cache_dir: Where the numbers of rows are remembered.
        more: See :class:`pipeline.data.DataModule`.
    """

    table_gib = 0.0  # there is no table

    def __init__(
        self,
        path: str | list[str],
        conditioning: Conditioning | None,
        image: str = "image",
        caption: str = "caption",
        val_files: int = 1,
        window: int = 8,
        size: int = 64,
        channels: int = 3,
        fit: Fit = "crop",
        flip: bool = False,
        workers: int = 2,
        **more: Any,
    ) -> None:
        if size < 8 or window < 1 or val_files < 1:
            raise UserError(
                f"data.size is {size}, data.window {window} and data.val_files {val_files}; they "
                "must be at least 8, 1 and 1."
            )
        super().__init__(Pixels(channels, size, size), conditioning, workers=workers, **more)
        self.flip, self.window = flip, window
        self.columns = image, caption if self.prompt is not None else None
        self.path, self.val_files = path, val_files
        self.fit: Fit = fit

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        """The shards of each split."""
        files = shards(self.path)
        if len(files) <= self.val_files:
            raise UserError(
                f"data.path {self.path!r} names {len(files)} shards, of which {self.val_files} "
                "are held out (data.val_files) and none is left to train on; give more."
            )
        return {"train": files[: -self.val_files], "val": files[-self.val_files :]}

    def source(self, split: str) -> Source:
        counts = [self.count(file) for file in self.files[split]]
        if not any(counts):
            raise UserError(
                f"There is no picture in the shards for {split!r} ({self.files[split][0]}, …); "
                "give others, or another data.val_files."
            )
        keep = self.window if split == "train" else 1
        found = Shards(self.files[split], counts, self.columns, self.shape, self.fit, keep)
        values = Captions(found) if self.prompt is not None else None
        if split == "train":
            return Source(found, values)  # type: ignore[arg-type]
        return Source(found[np.arange(len(found))], values and list(values))

    def count(self, file: Path) -> int:
        """The number of rows of a shard."""
        about = file.stat()
        note = self.cache / "shards" / digest(str(file.resolve()), about.st_size, about.st_mtime)
        if note.is_file():
            return int(note.read_text())
        number = count(file)
        with whole(note) as part:
            part.write_text(str(number))
        return number

    def embed(self) -> None:
        """Nothing yet: each batch's captions are embedded in their turn."""
        self.learn()
        if self.prompt is not None and self.trainer is not None:
            self.prompt.to(self.trainer.strategy.root_device)

    def train_dataloader(self) -> Loader:
        rank, world = self.place()
        x: Any = self.rows("train").x
        how = {"seed": self.seed, "start": self.seen, "rank": rank, "world": world}
        order = Windows(x.counts, self.window, self.batch_size, flip=self.flip, **how)
        order.again = self.again(len(order))
        return self.loader("train", order)

    def gathering(self, split: str) -> Rows:
        source = self.rows(split)
        return Rows(source.x, values=source.values)


class Shards:
    """Decoded pictures of many files, by their row, as an array of uint8 (N, C, size, size) that
    is made as it is read.

    Arguments:
        counts: The number of rows of each.
        columns: The names of the image and of the caption, or None.
        keep: The number of files that stay in memory, and one more.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        files: list[Path],
        counts: list[int],
        columns: tuple[str, str | None],
        shape: tuple[int, ...],
        fit: Fit,
        keep: int,
    ) -> None:
        self.files, self.counts, self.columns = files, counts, columns
        self.first = np.cumsum([0, *counts])
        self.shape, self.keep = (sum(counts), *shape), keep
        self.fit: Fit = fit
        self.held: OrderedDict[int, list[Row]] = OrderedDict()

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"held": OrderedDict()}

    @property
    def digest(self) -> str:
        """Of what decides the pictures: the files are known by name, size and time of change."""
        about = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime) for f in self.files]
        return digest(about, self.columns, self.shape, self.fit)

    def row(self, k: int) -> Row:
        """A row as its file has it."""
        of = int(np.searchsorted(self.first, k, "right")) - 1
        if of not in self.held:
            self.held[of] = read(self.files[of], *self.columns)
            if len(self.held) > self.keep + 1:
                self.held.popitem(last=False)
        self.held.move_to_end(of)
        return self.held[of][k - int(self.first[of])]

    def __getitem__(self, which: Any) -> np.ndarray:
        rows = np.arange(len(self))[which] if isinstance(which, slice) else np.asarray(which)
        found = np.empty((len(rows), *self.shape[1:]), np.uint8)
        order = np.argsort(rows, kind="stable")  # file by file
        encoded = [self.row(k)[0] for k in rows[order].tolist()]
        with ThreadPoolExecutor(cores()) as pool:
            for place, picture in zip(order, pool.map(self.decode, encoded), strict=True):
                found[place] = picture
        return found

    def decode(self, image: dict) -> np.ndarray:
        try:
            return decode(image, self.shape[-1], self.shape[1], self.fit)
        except Exception as error:  # Pillow raises whatever a broken file provokes
            raise UserError(
                f"{image['path']} cannot be read as a picture ({error}); mend or remove it."
            ) from error


class Captions(Sequence):
    """The captions of the rows of shards."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, k: Any) -> Any:
        image, words = self.shards.row(int(k))
        if not words or not words.strip():
            raise UserError(
                f"{image['path']} has no caption {self.shards.columns[1]!r}; fill or remove it."
            )
        return words


def shards(path: str | list[str]) -> list[Path]:
    """The files that names and patterns stand for, in the order of their paths."""
    said = [path] if isinstance(path, str) else list(path)
    found = []
    for one in said:
        files = matching(one)
        if not files or any(f.suffix not in (".parquet", ".tar") or f.is_dir() for f in files):
            raise UserError(
                f"data.path {one!r} names {'no file' if not files else str(files[0])!r}; give "
                "parquet files or WebDataset files (.tar), or a pattern such as 'shards/*.tar'."
            )
        found += files
    return sorted(dict.fromkeys(found))


def count(file: Path) -> int:
    """The number of rows of a shard."""
    if file.suffix == ".tar":
        say(f"Counting the pictures in {file}.")
        return len(read(file, "", None))
    from pyarrow.parquet import read_metadata

    with mendable(file):
        return read_metadata(file).num_rows


def read(file: Path, image: str, caption: str | None) -> list[Row]:
    """The rows of a shard, pictures still encoded."""
    with mendable(file):
        return (read_tar if file.suffix == ".tar" else read_parquet)(file, image, caption)


@contextmanager
def mendable(file: Path) -> Iterator[None]:
    """Makes a sentence of whatever pyarrow and tarfile raise at a broken file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file} cannot be read ({error}); write it anew.") from error


def read_parquet(file: Path, image: str, caption: str | None) -> list[Row]:
    from pyarrow.parquet import read_schema, read_table

    names = [image] if caption is None else [image, caption]
    has = read_schema(file).names
    if lacks := [name for name in names if name not in has]:
        raise UserError(f"{file} has no column {lacks[0]!r}; it has {', '.join(map(repr, has))}.")
    table = read_table(file, columns=names)
    images = table[image].to_pylist()
    words = [None] * len(images) if caption is None else table[caption].to_pylist()
    if wrong := [one for one in words if not isinstance(one, str | None)]:
        raise UserError(f"{file}: column {caption!r} holds {wrong[0]!r}; a caption is a string.")
    rows = []
    for k, (one, text) in enumerate(zip(images, words, strict=True)):
        encoded = one.get("bytes") if isinstance(one, dict) else one
        name = one.get("path") if isinstance(one, dict) and one.get("path") else f"row {k}"
        rows.append(({"bytes": encoded, "path": f"{file}: {name}"}, text))
    return rows


def read_tar(file: Path, image: str, caption: str | None) -> list[Row]:
    """The members of one name but for what comes after its first dot are a row."""
    rows: dict[str, dict[str, tuple[str, bytes]]] = {}
    with tarfile.open(file) as opened:
        for member in opened:
            folder, name = os.path.split(member.name)
            key, _, kind = name.partition(".")
            if member.isfile() and key and kind:
                content = opened.extractfile(member)
                assert content is not None
                wanted = caption is not None or is_picture(name)
                found = member.name, content.read() if wanted else b""
                rows.setdefault(os.path.join(folder, key), {})[kind.lower()] = found
    filled = []
    for row in rows.values():
        pictures = [one for kind, one in row.items() if is_picture(f"x.{kind}")]
        if pictures:
            name, encoded = pictures[0]
            filled.append(({"bytes": encoded, "path": f"{file}: {name}"}, words(row, caption)))
    return filled


def words(row: dict[str, tuple[str, bytes]], caption: str | None) -> str | None:
    """The caption of a row of a .tar: a member of its own, a key of the .json, or the .txt."""
    if caption is None:
        return None
    if caption in row:
        return row[caption][1].decode()
    said = json.loads(row["json"][1]) if "json" in row else {}
    if said.get(caption) is not None:
        return str(said[caption])
    return row["txt"][1].decode() if "txt" in row else None
