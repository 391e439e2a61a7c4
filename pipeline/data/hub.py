"""Pictures from the Hugging Face Hub, or from files in its layouts."""

import glob
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.conditioning import Conditioning
from pipeline.data.pictures import Pictures
from pipeline.errors import UserError

if TYPE_CHECKING:
    import datasets

__all__ = ["Hub"]

HELD_OUT = 20  # one row in so many validates, where no split is named for it


class Hub(Pictures):
    """Any data set with a column of images and one of captions or classes.

    Pictures are cropped in the middle to a square and brought to `size`. A class column
    (`ClassLabel`) gives class names, which are prompts to a text encoder and classes to `Classes`.

    Arguments:
        path: A data set on the Hub, a folder (images with metadata.jsonl or metadata.csv, or
            parquet files), or parquet files: one, a list, or a pattern such as `photos/*.parquet`.
        conditioning: What turns a caption or class name into u, or None.
        image: The column of images.
        caption: The column of captions or classes.
        split: The split to train on.
        val_split: The split to validate on; null holds out one in twenty training rows, the same
            in every run.
        size: The side of a picture in pixels.
        channels: 3 for colour, 1 for grey.
        flip: Whether half of the training pictures are mirrored; wrong where captions or pictures
            tell left from right.
        batch_size: The size of a global batch: all devices together.
        seed: What decides the order and the flips.
        workers: Loader processes.
        cache_dir: Where pictures and embeddings are kept; by default
            `~/.cache/conditional-pipeline`.
        table_gib: See :class:`pipeline.data.DataModule`.
    """

    def __init__(
        self,
        path: str | list[str],
        conditioning: Conditioning | None,
        image: str = "image",
        caption: str = "caption",
        split: str = "train",
        val_split: str | None = None,
        size: int = 32,
        channels: int = 3,
        flip: bool = False,
        batch_size: int = 32,
        seed: int = 0,
        workers: int = 0,
        cache_dir: str | None = None,
        table_gib: float = 1.0,
    ) -> None:
        super().__init__(
            conditioning,
            size,
            channels,
            batch_size=batch_size,
            seed=seed,
            workers=workers,
            cache_dir=cache_dir,
            table_gib=table_gib,
        )
        self.path, self.image, self.caption = path, image, caption
        self.split, self.val_split, self.flip = split, val_split, flip
        self._downloads = str(self.cache / "datasets") if cache_dir else None

    @cached_property
    def everything(self) -> "datasets.DatasetDict":
        """All splits, as they come."""
        from datasets import disable_progress_bars, enable_progress_bars, load_dataset

        disable_progress_bars()
        try:
            return load_dataset(**locate(self.path), cache_dir=self._downloads)  # type: ignore
        except UserError:
            raise
        except Exception as error:  # datasets raises whatever its readers do
            reason = " ".join(str(error).split())[:200]
            where = "" if is_here(self.path) else "is no file or folder here and "
            raise UserError(
                f"data.path {self.path!r} {where}cannot be loaded as a data set: {reason}. "
                "Give --data.path a folder, parquet files, or a data set that the Hub has."
            ) from error
        finally:
            enable_progress_bars()

    def dataset(self, split: str) -> "datasets.Dataset":
        """Rows of `train`, `val`, or any split by its own name; images still encoded."""
        from datasets import Image

        name = {"train": self.split, "val": self.val_split or self.split}.get(split, split)
        if name not in self.everything:
            raise UserError(
                f"data.path {self.path!r} has no split {name!r}; it has {listed(self.everything)}."
            )
        rows = self.everything[name]
        if self.divides(split):
            rows = rows.select(held_out(len(rows))[split])
        if len(rows) == 0:
            raise UserError(
                f"Split {name!r} of data.path {self.path!r} leaves no rows for {split!r}."
            )
        self.check_image(rows)
        return rows.cast_column(self.image, Image(decode=False))

    def divides(self, split: str) -> bool:
        """Whether a split is part of one that has a name."""
        return split in ("train", "val") and self.val_split is None

    def row_number(self, split: str, row: int) -> int:
        if not self.divides(split):
            return row
        return int(held_out(len(self.everything[self.split]))[split][row])

    def check_image(self, rows: "datasets.Dataset") -> None:
        from datasets import Image, Value

        kind = self.feature(rows, self.image, "image")
        bytes_and_path = isinstance(kind, dict) and set(kind) == {"bytes", "path"}
        if not (
            isinstance(kind, Image)
            or bytes_and_path
            or kind in (Value("binary"), Value("large_binary"))
        ):
            columns = listed(name for name, of in rows.features.items() if isinstance(of, Image))
            raise UserError(
                f"Column {self.image!r} holds {kind}, not images; columns of images: "
                f"{columns or 'none'}."
            )

    def feature(self, rows: "datasets.Dataset", column: str, argument: str) -> Any:
        if column not in rows.features:
            raise UserError(
                f"data.path {self.path!r} has no column {column!r} (data.{argument}); it has "
                f"{listed(rows.features)}."
            )
        return rows.features[column]

    def fingerprint(self, split: str) -> str:
        return f"{self.dataset(split)._fingerprint} {self.image}"

    def values(self, split: str) -> list[str] | None:
        """Captions or class names, row by row; none are read for an unconditional model."""
        if self.conditioning is None:
            return None
        rows = self.dataset(split)
        kind = self.feature(rows, self.caption, "caption")
        column = rows.select_columns([self.caption])[:][self.caption]
        if hasattr(kind, "int2str"):
            self.check_full(split, [label is None or label < 0 for label in column], "class")
            return kind.int2str(column)
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise UserError(
                f"Column {self.caption!r} holds {kind}; a caption column holds strings or class "
                "labels."
            )
        self.check_full(split, [not (text or "").strip() for text in column], "caption")
        return column

    def names(self) -> list[str]:
        kind = self.feature(self.dataset("train"), self.caption, "caption")
        return list(kind.names) if hasattr(kind, "int2str") else super().names()

    def check_full(self, split: str, empty: list[bool], what: str) -> None:
        if any(empty):
            raise UserError(
                f"{sum(empty)} of {len(empty)} rows have no {what} in column {self.caption!r}, "
                f"the first is row {self.row_number(split, empty.index(True))}; fill or remove "
                "them."
            )


def locate(path: str | list[str]) -> dict[str, Any]:
    """What to tell `load_dataset`: parquet files, a folder, or a name on the Hub."""
    paths = [path] if isinstance(path, str) else list(path)
    if len(paths) == 1 and Path(paths[0]).expanduser().is_dir():
        return {"path": str(Path(paths[0]).expanduser())}
    files = [sorted(glob.glob(str(Path(one).expanduser()))) for one in paths]
    for one, found in zip(paths, files, strict=True):
        if not found and (len(paths) > 1 or looks_local(one)):
            raise UserError(
                f"data.path {one!r} is not there: no such file or folder (from {Path.cwd()})."
            )
        if any(not name.endswith(".parquet") for name in found):
            raise UserError(
                f"data.path {one!r} is not a parquet file; give parquet files, a folder, or a "
                "name on the Hub."
            )
    if files and files[0]:
        return {
            "path": "parquet",
            "data_files": {"train": [name for found in files for name in found]},
        }
    return {"path": paths[0]} if paths else fail()


def fail() -> dict[str, Any]:
    raise UserError("data.path is empty; give a name on the Hub, a folder, or parquet files.")


def is_here(path: str | list[str]) -> bool:
    return not isinstance(path, str) or Path(path).expanduser().exists() or looks_local(path)


def looks_local(path: str) -> bool:
    return (
        path[:1] in "./~"
        or path.count("/") > 1
        or any(sign in path for sign in "*?[")
        or path.endswith(".parquet")
    )


def held_out(rows: int) -> dict[str, np.ndarray]:
    """Row numbers: one in `HELD_OUT` for `val`, chosen by a fixed seed, and the others for
    `train`.
    """
    chosen = np.random.default_rng(0).permutation(rows)
    count = min(rows, max(1, rows // HELD_OUT))
    return {"train": np.sort(chosen[count:]), "val": np.sort(chosen[:count])}


def listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
