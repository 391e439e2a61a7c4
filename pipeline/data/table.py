"""Tables: rows of named columns, some of them x and some u."""

import re
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.codec import Standardised
from pipeline.conditioning import Number, Several
from pipeline.data.base import DataModule, Source
from pipeline.data.hub import Hub, held_out, listed, matching
from pipeline.errors import UserError

if TYPE_CHECKING:
    import datasets

__all__ = ["Table"]

BUNDLED = "sklearn:"
SETS = ("breast_cancer", "diabetes", "iris", "wine")


class Table(DataModule):
    """Rows of a table, of which some columns are drawn, x, and some are what is asked for, u.

    Columns of x are numbers; they are standardised. Columns of u are numbers, or words or classes;
    one of a CSV file is numbers if any of its cells is one. `conditioning` may say otherwise.

    Arguments:
        path: CSV or parquet files: one, a list, a pattern such as `logs/*.csv`, or a folder of
            them; a data set on the Hub; or one that scikit-learn brings, `sklearn:diabetes`.
        conditioning: What turns the columns of u into u, or None.
        x: The columns that are drawn.
        u: The columns that are asked for.
        split: The split to train on, where there are several.
        val_split: The split to validate on; null holds out one row in twenty, always the same.
        others: See :class:`pipeline.data.DataModule`.
    """

    def __init__(
        self,
        path: str | list[str],
        conditioning: Several | None,
        x: Sequence[str],
        u: Sequence[str] = (),
        split: str = "train",
        val_split: str | None = None,
        batch_size: int = 256,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(Standardised(x), conditioning, batch_size, seed, cache_dir=cache_dir)
        self.codec: Standardised
        self.conditioning: Several | None
        both = [*x, *u]
        if not x or len(set(both)) < len(both) or split == val_split:
            raise UserError(
                f"data.x is {list(x)}, data.u {list(u)}, and the splits are {split} and "
                f"{val_split}; name at least one column of x, and no column and no split twice."
            )
        self.path, self.x, self.u = path, list(x), list(u)
        self.split, self.val_split = split, val_split
        self.hub = Hub(path, None, cache_dir=cache_dir)  # reads what is not CSV
        self._columns: dict[str, dict[str, np.ndarray]] = {}

    @cached_property
    def files(self) -> list[Path]:
        """Those of CSV, if all are."""
        paths = [self.path] if isinstance(self.path, str) else self.path
        found = [file for one in paths for file in matching(one)]
        files = [file for one in found for file in sorted(one.glob("*.csv")) or [one]]
        return files if all(file.suffix == ".csv" for file in files) else []

    @cached_property
    def everything(self) -> "dict[str, datasets.Dataset]":
        """All splits, as they come."""
        if self.files:
            return {"train": read_csv(self.files)}
        if isinstance(self.path, str) and self.path.startswith(BUNDLED):
            return {"train": bundled(self.path)}
        return self.hub.everything

    def columns(self, split: str) -> dict[str, np.ndarray]:
        """The wanted columns of a split of the data: float64 (N,), or objects for words."""
        name = {"train": self.split, "val": self.val_split or self.split}.get(split, split)
        if name not in self._columns:
            if name not in self.everything:
                has = listed(self.everything)
                raise UserError(f"data.path {self.path!r} has no split {name!r}; it has {has}.")
            rows = self.everything[name]
            self._columns[name] = {one: self.column(rows, one) for one in (*self.x, *self.u)}
        return self._columns[name]

    def column(self, rows: "datasets.Dataset", name: str) -> np.ndarray:
        import pandas

        if name not in rows.features:
            has = listed(rows.features)
            raise UserError(f"data.path {self.path!r} has no column {name!r}; it has {has}.")
        kind, cells = rows.features[name], rows.select_columns([name])[:][name]
        if hasattr(kind, "int2str"):
            cells = [None if k in (None, -1) else kind.int2str(k) for k in cells]  # type: ignore
            kind = None  # words now
        series = pandas.Series(cells, dtype=object)
        numbers = np.asarray(pandas.to_numeric(series, errors="coerce"), np.float64)
        told = self.conditioning.parts.get(name) if self.conditioning else None
        is_number = name in self.x or isinstance(told, Number)
        if told is None and not is_number:
            coded = any(re.match(r"[+-]?0\d", str(cell)) for cell in cells)  # 007 is a name
            written = self.files and np.isfinite(numbers).any() and not coded
            is_number = written or re.match("u?int|float|bool", str(getattr(kind, "dtype", "")))
        bad = ~np.isfinite(numbers) if is_number else series.isin([None, ""]).to_numpy()
        if bad.any():
            first = int(bad.argmax())
            raise UserError(
                f"{bad.sum()} of {len(cells)} rows of column {name!r} hold no "
                f"{'finite number' if is_number else 'word'}, the first is row {first}, counted "
                f"from 0: {cells[first]!r}; fill or remove them."
            )
        return numbers if is_number else np.array(list(map(str, cells)), object)

    def source(self, split: str) -> Source:
        columns = self.columns(split)
        x, asked = np.stack([columns[name] for name in self.x], axis=1), None
        kept = np.arange(len(x))
        if split in self.splits and self.val_split is None:
            kept = held_out(len(x))[split]
        if not len(kept):
            raise UserError(f"data.path {self.path!r} has too few rows to {split} on.")
        if split == "train":
            self.codec.learn(torch.from_numpy(x[kept]))
        if self.conditioning is not None and self.u:
            rows = zip(*(columns[name][kept].tolist() for name in self.u), strict=True)
            asked = [Several.text(dict(zip(self.u, row, strict=True))) for row in rows]
        return Source(x[kept].astype(np.float32), asked)

    def names(self) -> Any:
        """Of each column of u the names of its classes, or its numbers."""
        train, val = (self.columns(split) for split in self.splits)
        return {
            k: sorted({*train[k], *val[k]}) if train[k].dtype == object else train[k].tolist()
            for k in self.u
        }


def read_csv(files: list[Path]) -> "datasets.Dataset":
    """The rows of CSV files, all cells as text."""
    import pandas
    from datasets import Dataset

    how: Any = {"dtype": str, "keep_default_na": False, "skipinitialspace": True}
    how |= {"encoding": "utf-8-sig", "index_col": False}
    try:
        frames = [pandas.read_csv(one, **how) for one in files]
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{listed(map(str, files))} cannot be read as CSV: {reason}.") from error
    return Dataset.from_pandas(pandas.concat(frames), preserve_index=False)


def bundled(path: str) -> "datasets.Dataset":
    """A data set that scikit-learn brings, of which no download is needed."""
    from datasets import Dataset

    name, sets = path.removeprefix(BUNDLED), listed(BUNDLED + one for one in SETS)
    if name not in SETS or find_spec("sklearn") is None:
        raise UserError(f"data.path {path!r} is none of {sets}, or scikit-learn is not installed.")
    import sklearn.datasets

    how = {"scaled": False} if name == "diabetes" else {}
    found = getattr(sklearn.datasets, f"load_{name}")(as_frame=True, **how)
    frame = found.frame.convert_dtypes()  # 2.0, where all are whole, is 2
    if "sex" in frame:
        frame["sex"] = frame["sex"].astype(str)  # a class, 1 or 2
    if "target_names" in found:
        frame["target"] = found.target_names[found.target].astype(str)
    return Dataset.from_pandas(frame, preserve_index=False)
