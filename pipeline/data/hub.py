"""Pictures from the Hugging Face Hub, or from files in its layouts."""

import glob
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from pipeline.conditioning import Conditioning
from pipeline.data.folder import Listing, canonical, is_picture, list_folder, read_folder, say
from pipeline.data.pictures import Pictures, cores, named
from pipeline.distributed import place
from pipeline.errors import UserError
from pipeline.files import digest, sha256

if TYPE_CHECKING:
    import datasets

__all__ = ["Hub"]

HELD_OUT = 20  # one row in so many validates, where no split is named for it
SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\.parquet")
WORDS = ("string", "large_string")
CAPTIONS = ("caption", "text", "label")  # columns that are looked for
DATA = (".parquet", ".arrow", ".tar")  # the files of a data set that is no folder of pictures


class Hub(Pictures):
    """Any data set with a column of images and one of captions or classes.

    Pictures are made of one `size`, as `fit` says. A class column (`ClassLabel`) gives class
    names, which are prompts to a text encoder and classes to `Classes`. A column of lists of
    captions gives a picture several: one is drawn each time, and the first validates.

    A folder with more pictures than parquet files is a folder of pictures: all of them, in folders
    below and linked ones too, in the order of their paths; what is left out is said. Captions are
    in metadata.jsonl, .csv or .parquet, in the folder or below, by `file_name`; what these do not
    list is left out. Without them, captions are in a file beside each picture, `cat.txt` for
    `cat.png`, one on each line; without these too, the names of the folders that pictures lie in
    are column `label`. The folder is one split, `train`, unless all pictures lie in P/train, P/val
    or P/test, or `split` or `val_split` names another folder directly below, which are splits.

    Arguments:
        path: A data set on the Hub, a folder (of pictures, or of parquet files), or parquet files:
            one, a list, or a pattern such as `photos/*.parquet`.
        conditioning: What turns a caption or class name into u, or None.
        image: The column of images.
        caption: The column of captions, lists of captions, or classes; by default the first that
            there is of `caption`, `text` and `label`.
        condition_image: Of pairs, the column of the pictures that `Paired` gives for `image`.
        labels: Columns of words or classes that the evaluation reads back from the pictures, by a
            judge that it teaches to: `[style, subject]`.
        split: The split to train on; `all` is every row of every split.
        val_split: The split to validate on, which shares no row with `split`; null holds out one
            in twenty training rows, the same in every run.
        flip: Whether half of the training pictures are mirrored; wrong where captions or pictures
            tell left from right.
        more: See :class:`pipeline.data.Pictures`.
    """

    holds: tuple[str, Callable[[str], bool]] = ("picture", is_picture)

    def __init__(
        self,
        path: str | list[str],
        conditioning: Conditioning | None,
        image: str = "image",
        caption: str | None = None,
        condition_image: str | None = None,
        labels: Sequence[str] = (),
        split: str = "train",
        val_split: str | None = None,
        flip: bool = False,
        **more: Any,
    ) -> None:
        super().__init__(conditioning, **more)
        self.path, self.image, self.asked_caption = path, image, caption
        self.condition_image = condition_image
        self.split, self.val_split, self.flip = split, val_split, flip
        self.labels = list(labels)
        if flip and more.get("autoencoder"):
            raise UserError(
                "data.flip mirrors pictures and not latents, which are kept: set data.flip to "
                "false, or data.autoencoder to null."
            )
        self._downloads = str(self.cache / "datasets") if more.get("cache_dir") else None

    def prepare_data(self) -> None:
        """Reads the rows, once per node, and decodes; several processes do that in `setup`."""
        if place()[1] == 1:
            super().prepare_data()
        else:
            for split in self.splits:
                self.dataset(split)

    def setup(self, stage: str | None = None) -> None:
        for split in self.splits:
            self.rows(split, together=place()[1] > 1)
        super().setup(stage)

    @cached_property
    def folder(self) -> Listing | None:
        """The folder of pictures, if the path is one."""
        root = one_folder(self.path)
        found = list_folder(root, *self.holds) if root else None
        if found is None or len(found.pictures) > len(data_files(found)):
            return found
        if not data_files(found):
            held = ", ".join(map(repr, (found.metadata + found.others)[:3]))
            but = f", but {held}" if held else ""
            raise UserError(
                f"data.path {self.path!r} holds no {found.noun}s and no parquet files{but}; give "
                "a folder that does."
            )
        return None

    @cached_property
    def everything(self) -> "dict[str, datasets.Dataset]":
        """All splits, as they come, and `all`."""
        if self.folder:
            return read_folder(self.folder, [self.split, self.val_split or self.split])
        from datasets import concatenate_datasets

        found = self.load()
        alike = len({str(rows.features) for rows in found.values()}) == 1
        return ({"all": concatenate_datasets([*found.values()])} if alike else {}) | found

    def load(self) -> "dict[str, datasets.Dataset]":
        from datasets import disable_progress_bars, enable_progress_bars, load_dataset_builder

        where, files = locate(self.path)
        disable_progress_bars()
        try:
            builder = load_dataset_builder(**where, cache_dir=self.downloads(files))
            builder.download_and_prepare()
            tell_left_out(self.path, files, builder.config.data_files)
            return dict(builder.as_dataset())  # type: ignore[arg-type]
        except Exception as error:  # datasets raises whatever its readers do
            reason = " ".join(str(error).split())[:200]
            where = "" if is_here(self.path) else "is no file or folder here and "
            raise UserError(
                f"data.path {self.path!r} {where}cannot be loaded as a data set: {reason}. "
                "Give --data.path a folder, parquet files, or a data set that the Hub has."
            ) from error
        finally:
            enable_progress_bars()

    def downloads(self, files: list[Path]) -> str | None:
        """A place for each content: `datasets` knows files by their time of change alone."""
        if not files:
            return self._downloads
        return str(self.cache / "datasets" / digest(hashes(files))[:32])

    def dataset(self, split: str) -> "datasets.Dataset":
        """Rows of `train`, `val`, or any split by its own name; images still encoded."""
        from datasets import Image

        name = self.split_name(split)
        if name not in self.everything:
            has = listed(sorted(self.everything, key="all".__eq__))
            said = f"data.path {self.path!r} has no split {name!r}; it has {has}"
            if split == "val":
                said += ": --data.val_split null holds out a part of the training rows"
            raise UserError(f"{said}.")
        if split == "val":
            self.check_apart()
        rows = self.everything[name]
        if self.divides(split):
            rows = rows.select(held_out(len(rows))[split])
        if len(rows) == 0:
            self.fail_empty(split)
        for column in filter(None, (self.image, self.condition_image)):
            self.check_image(rows, column)
            rows = rows.cast_column(column, Image(decode=False))
        return rows

    def split_name(self, split: str) -> str:
        """What a split is called in the data."""
        name = {"train": self.split, "val": self.val_split or self.split}.get(split, split)
        return canonical(name) if self.folder else name

    def check_apart(self) -> None:
        both = {self.split_name("train"), self.split_name("val")}
        if self.val_split is not None and (len(both) == 1 or "all" in both):
            raise UserError(
                f"data.split {self.split!r} and data.val_split {self.val_split!r} share rows, and "
                "a model is validated on rows that it is not trained on; name another val_split, "
                f"or null to hold out one row in {HELD_OUT}."
            )

    def fail_empty(self, split: str) -> NoReturn:
        name = self.split_name(split)
        if not len(self.everything[name]):
            raise UserError(
                f"Split {name!r} of data.path {self.path!r} has no rows for {split!r}; metadata, "
                f"where there are any, have to list its {self.codec.plural}."
            )
        raise UserError(
            f"Split {name!r} of data.path {self.path!r} has one row, which is held out to "
            f"validate on, and none is left to train on; give more {self.codec.plural}, or set "
            "data.val_split to a split with others."
        )

    def divides(self, split: str) -> bool:
        """Whether a split is part of one that has a name."""
        return split in ("train", "val") and self.val_split is None

    def row_number(self, split: str, row: int) -> int:
        if not self.divides(split):
            return row
        return int(held_out(len(self.everything[self.split_name(split)]))[split][row])

    def check_image(self, rows: "datasets.Dataset", column: str) -> None:
        from datasets import Image, Value

        argument = "image" if column == self.image else "condition_image"
        kind = self.feature(rows, column, argument)
        bytes_and_path = isinstance(kind, dict) and set(kind) == {"bytes", "path"}
        if not (
            isinstance(kind, Image)
            or bytes_and_path
            or kind in (Value("binary"), Value("large_binary"))
        ):
            has = listed(name for name, of in rows.features.items() if isinstance(of, Image))
            has = has or "none"
            raise UserError(
                f"Column {column!r} holds {kind}, not images; columns of images: {has}."
            )

    def feature(self, rows: "datasets.Dataset", column: str, argument: str) -> Any:
        if column not in rows.features:
            raise UserError(
                f"data.path {self.path!r} has no column {column!r} (data.{argument}); it has "
                f"{listed(rows.features)}."
            )
        return rows.features[column]

    def fingerprint(self, split: str) -> str:
        rows = self.dataset(split)
        if self.folder:
            return digest(hashes([Path(image["path"]) for image in rows[:][self.image]]))
        return f"{rows._fingerprint} {rows.cache_files} {self.image}"

    @cached_property
    def caption(self) -> str:
        """The column of captions."""
        there = self.dataset("train").features
        return self.asked_caption or next((one for one in CAPTIONS if one in there), CAPTIONS[0])

    def values(self, split: str) -> list[str] | None:
        """Captions or class names, row by row; none are read for an unconditional model."""
        self.labelled(split)  # what is wrong with them is found before training
        if self.prompt is None:
            return None
        rows = self.dataset(split)
        kind = self.feature(rows, self.caption, "caption")
        column = rows.select_columns([self.caption])[:][self.caption]
        if hasattr(kind, "int2str"):
            self.check_full(split, [label is None or label < 0 for label in column], "class")
            return kind.int2str(column)
        several = one_of(kind)
        if getattr(several or kind, "dtype", None) not in WORDS:
            raise UserError(
                f"Column {self.caption!r} holds {kind}; a caption column holds strings, lists of "
                "strings, or class labels."
            )
        if several:
            empty = [not texts or not all(map(filled, texts)) for texts in column]
            self.check_full(split, empty, "caption, or an empty one,")
            return [texts[0] for texts in column]
        self.check_full(split, [not filled(text) for text in column], "caption")
        return column

    def more(self, split: str) -> list[list[str]] | None:
        rows = self.dataset(split)
        if self.prompt is None or not one_of(rows.features[self.caption]):
            return None
        column = rows.select_columns([self.caption])[:][self.caption]
        return [texts[1:] for texts in column]

    def labelled(self, split: str) -> dict[str, list[str]]:
        rows, found = self.dataset(split), {}
        for name in self.labels:
            kind, column = self.feature(rows, name, "labels"), rows.select_columns([name])[:][name]
            if not (hasattr(kind, "int2str") or getattr(kind, "dtype", None) in WORDS):
                raise UserError(
                    f"Column {name!r} (data.labels) holds {kind}; a label is a word or a class."
                )
            self.check_full(split, [value in (None, "", -1) for value in column], "label", name)
            found[name] = kind.int2str(column) if hasattr(kind, "int2str") else column
        return found

    def names(self) -> list[str]:
        kind = self.feature(self.dataset("train"), self.caption, "caption")
        return list(kind.names) if hasattr(kind, "int2str") else super().names()

    def check_full(
        self, split: str, empty: list[bool], what: str, column: str | None = None
    ) -> None:
        if any(empty):
            first = empty.index(True)
            image = self.dataset(split)[first][self.image]
            name = f" ({named(image)})" if self.folder else ""
            raise UserError(
                f"{sum(empty)} of {len(empty)} rows have no {what} in column "
                f"{column or self.caption!r}, "
                f"the first is row {self.row_number(split, first)}{name}; fill or remove them."
            )


def one_of(kind: Any) -> Any:
    """What a column of lists holds lists of, or None."""
    return kind[0] if isinstance(kind, list) else getattr(kind, "feature", None)


def filled(text: str | None) -> bool:
    return bool((text or "").strip())


def one_folder(path: str | list[str]) -> Path | None:
    paths = [path] if isinstance(path, str) else list(path)
    if not paths or not all(one.strip() for one in paths):
        raise UserError(
            f"data.path is {path!r}; give a name on the Hub, a folder, or parquet files."
        )
    root = Path(paths[0]).expanduser()
    return root if len(paths) == 1 and root.is_dir() else None


def data_files(found: Listing) -> list[Path]:
    return [found.root / name for name in found.others if name.endswith(DATA)]


def locate(path: str | list[str]) -> tuple[dict[str, Any], list[Path]]:
    """What to tell `datasets`: files, a folder or a name on the Hub; and the files here."""
    if root := one_folder(path):
        check_plain(root)
        found = list_folder(root)
        files = data_files(found)
        if splits := shards(files):
            return {"path": "parquet", "data_files": splits}, files
        pictures = [root / name for name in found.pictures]  # some, beside more parquet files
        return {"path": str(root)}, files + pictures
    paths = [path] if isinstance(path, str) else list(path)
    files = [matching(one) for one in paths]
    for one, found in zip(paths, files, strict=True):
        if not found and (len(paths) > 1 or looks_local(one)):
            raise UserError(
                f"data.path {one!r} is not there: no such file or folder (from {Path.cwd()})."
            )
        for file in found:
            check_parquet(one, file)
    if not files[0]:
        return {"path": paths[0]}, []
    every = [file for found in files for file in found]
    return {"path": "parquet", "data_files": {"train": [str(file) for file in every]}}, every


def shards(files: list[Path]) -> dict[str, list[str]]:
    """The files of each split, where all are named as the Hub names them,
    `test_pair-00000-of-00001.parquet`; else nothing. `datasets` would take that one for `test`.
    """
    splits: dict[str, list[str]] = {}
    for file in files:
        if not (named := SHARD.fullmatch(file.name)):
            return {}
        splits.setdefault(named[1], []).append(str(file))
    return splits


def matching(pattern: str) -> list[Path]:
    """The file of this name, or else the files that a pattern matches."""
    file = Path(pattern).expanduser()
    return [file] if file.exists() else [Path(one) for one in sorted(glob.glob(str(file)))]


def check_parquet(said: str, file: Path) -> None:
    if is_picture(file.name):
        raise UserError(f"data.path {said!r} is one picture; give the folder that it is in.")
    if file.suffix != ".parquet" or not file.is_file():
        raise UserError(
            f"data.path {said!r} is not a parquet file; give parquet files, a folder, or a "
            "name on the Hub."
        )
    check_plain(file)


def check_plain(path: Path) -> None:
    """Refuses what `datasets` takes for a pattern."""
    if signs := [sign for sign in ("[", "*", "?", "::") if sign in str(path.resolve())]:
        raise UserError(
            f"The reader of parquet files takes {signs[0]!r} in {str(path.resolve())!r}, which is "
            "data.path, for a pattern; rename it."
        )


def tell_left_out(path: str | list[str], files: list[Path], read: Any) -> None:
    """Says which files of a folder `datasets` has left out of its splits."""
    used = {os.path.realpath(name) for names in (read or {}).values() for name in names}
    left = [file.name for file in files if os.path.realpath(file) not in used]
    if left:
        some = f"{', '.join(left[:3])}{', …' if left[3:] else ''}"
        say(
            f"{len(left)} of {len(files)} files in {path} left out ({some}): the names of the "
            "others say which splits they are of."
        )


def hashes(files: list[Path]) -> list[str]:
    """The sha256 of each file."""
    try:
        with ThreadPoolExecutor(cores()) as pool:
            return list(pool.map(sha256, files))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error


def is_here(path: str | list[str]) -> bool:
    return not isinstance(path, str) or Path(path).expanduser().exists() or looks_local(path)


def looks_local(path: str) -> bool:
    return (
        path[:1] in "./~"
        or path.count("/") > 1
        or any(sign in path for sign in "*?[")
        or is_picture(path)
        or path.endswith((".parquet", ".csv", ".json", ".jsonl", ".txt"))
    )


def held_out(rows: int) -> dict[str, np.ndarray]:
    """Row numbers: one in `HELD_OUT` for `val`, chosen by a fixed seed; others for `train`."""
    chosen = np.random.default_rng(0).permutation(rows)
    count = min(rows, max(1, rows // HELD_OUT))
    return {"train": np.sort(chosen[count:]), "val": np.sort(chosen[:count])}


def listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
