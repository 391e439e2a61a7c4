"""Conditions that need no network: a class, numbers, several of them at once."""

import csv
import io
import operator
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.condition import Condition
from pipeline.conditioning.base import Conditioning
from pipeline.errors import UserError
from pipeline.files import digest

__all__ = ["Classes", "Number", "Several", "Vectors"]


class Classes(Conditioning):
    """One class of C: a one-hot token, u of shape (N, 1, C). The null condition is zeros.

    Arguments:
        names: The name of each class; a value to embed is a name or its index in this list.
            `None` takes the names that the data have.

    Raises:
        UserError: A value is neither a name nor an index; the sentence lists the names.
    """

    def __init__(self, names: list[str] | None = None) -> None:
        self.names: list[str] = []
        if names is not None:
            self.learn(names)

    @property
    def open(self) -> bool:  # type: ignore[override]
        return not self.names

    def learn(self, names: Sequence[str]) -> None:
        if not names or len(set(names)) < len(names):
            raise ValueError(f"names must be different and at least one, not {names}.")
        self.names = list(names)
        self._given = (type(self), (), {"names": self.names})

    @property
    def dim(self) -> int:
        return len(self.names)

    def index(self, value: str | int) -> int:
        """The index of a class given by name, or by index (3, or "3" where no name is "3")."""
        if value in self.names:
            return self.names.index(str(value))
        try:
            index = int(value) if isinstance(value, str) else operator.index(value)
        except (TypeError, ValueError):
            index = -1
        if not 0 <= index < len(self.names):
            rest = len(self.names) - 10
            known = ", ".join(self.names[:10]) + (f" and {rest} more" if rest > 0 else "")
            raise UserError(
                f"There is no class {value!r}; the classes are {known} "
                f"(or their index, 0 to {len(self.names) - 1})."
            )
        return index

    def embed(self, values: Sequence[str | int]) -> Condition:
        tokens = torch.zeros(len(values), 1, self.dim, dtype=torch.float32)
        for row, value in zip(tokens, values, strict=True):
            row[0, self.index(value)] = 1.0
        return Condition(tokens)  # (N, 1, C)

    def null(self) -> Condition:
        return Condition(torch.zeros(1, 1, self.dim, dtype=torch.float32))

    def fingerprint(self) -> str:
        return digest("Classes", 1, self.names)


class Vectors(Conditioning):
    """A vector v of d numbers: the token (1, v), u of shape (N, 1, d + 1). The leading 1 tells
    v = 0 from the null condition, which is zeros.

    Arguments:
        dim: The number d of numbers in a vector; a token is one wider.

    Raises:
        UserError: A vector has another length, or holds what is not a finite number.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, not {dim}.")
        self.numbers = dim

    @property
    def dim(self) -> int:
        return self.numbers + 1

    def embed(self, values: Sequence[Sequence[float]] | np.ndarray | Tensor) -> Condition:
        rows = [self._row(i, value) for i, value in enumerate(values)]
        v = torch.from_numpy(np.array(rows, dtype=np.float32).reshape(len(rows), self.numbers))
        # (N, 1, d + 1)
        return Condition(torch.cat([torch.ones_like(v[:, :1]), v], dim=1).unsqueeze(1))

    def _row(self, i: int, value: Sequence[float] | np.ndarray | Tensor) -> np.ndarray:
        try:
            row = np.asarray(value, dtype=np.float32).reshape(-1)
        except (TypeError, ValueError) as error:
            raise UserError(f"Vector {i} is {value!r}, which is not a list of numbers.") from error
        if len(row) != self.numbers or not np.isfinite(row).all():
            raise UserError(
                f"Vector {i} is {np.array2string(row, threshold=8)} with {len(row)} numbers; "
                f"{self.numbers} finite numbers were expected."
            )
        return row

    def null(self) -> Condition:
        return Condition(torch.zeros(1, 1, self.dim, dtype=torch.float32))

    def fingerprint(self) -> str:
        return digest("Vectors", 1, self.numbers)


class Number(Vectors):
    r"""One number v of any scale: the token :math:`(1, (v - m) / s)`, u of shape (N, 1, 2).

    Arguments:
        mean: The mean m of the data; `None` takes it from them.
        std: Their standard deviation s, likewise.
    """

    def __init__(self, mean: float | None = None, std: float | None = None) -> None:
        super().__init__(1)
        self.open = mean is None or std is None
        self.mean, self.std = mean or 0.0, std or 1.0

    def learn(self, names: Sequence[float]) -> None:
        self.__init__(float(np.mean(names)), float(np.std(names)))
        self._given = (type(self), (self.mean, self.std), {})

    def _row(self, i: int, value: Any) -> np.ndarray:
        return (super()._row(i, value) - self.mean) / self.std

    def fingerprint(self) -> str:
        return digest("Number", 1, self.mean, self.std)


class Several(Conditioning):
    """Several conditions at once, each by its name: their single tokens side by side in one, u of
    shape (N, 1, E), E the sum of their widths.

    A value is text, `machine=pump,load=0.7`, quoted as a line of CSV is. A part that it leaves out
    is zeros, that part's null condition; the null condition leaves out all. Of a single part the
    name may be left away.

    Arguments:
        parts: What makes u of each part, by its name. `None` takes the columns of the data:
            words are `Classes` and numbers a `Number`.

    Raises:
        UserError: A value names no part of these, or a part refuses what is said of it.
    """

    def __init__(self, parts: dict[str, Classes | Number] | None = None) -> None:
        self.parts = dict(parts or {})

    @property
    def open(self) -> bool:  # type: ignore[override]
        return not self.parts or any(part.open for part in self.parts.values())

    def learn(self, names: Mapping[str, Sequence[Any]]) -> None:
        """Take what was left open from the data: the distinct names, or the numbers, of each."""
        for name, values in names.items():
            made = Classes() if isinstance(values[0], str) else Number()
            if (part := self.parts.setdefault(name, made)).open:
                part.learn(values)
        if lacks := self.parts.keys() - names:
            raise UserError(f"The data have no column {min(lacks)!r} for u: {', '.join(names)}.")
        self._given = (type(self), (self.parts,), {})

    @property
    def dim(self) -> int:
        return sum(part.dim for part in self.parts.values())

    @property
    def blocks(self) -> dict[str, slice]:  # type: ignore[override]
        ends = accumulate((part.dim for part in self.parts.values()), initial=0)
        return {name: slice(*two) for name, two in zip(self.parts, pairwise(ends), strict=True)}

    def said(self, value: str) -> dict[str, str | None]:
        """What a value says of each part, `None` where it leaves one out."""
        try:
            lines = csv.reader(io.StringIO(value, newline=""), skipinitialspace=True)
            cells = [cell for line in lines for cell in line]
        except csv.Error as error:
            raise UserError(f"{value[:40]!r}… is no line of CSV: {error}.") from error
        found: dict[str, str | None] = dict.fromkeys(self.parts)
        if len(found) == 1 and not any(cell.startswith(f"{[*found][0]}=") for cell in cells):
            return dict.fromkeys(found, value or None)
        for cell in cells:
            name, equals, said = cell.partition("=")
            if not equals or name not in found:
                raise UserError(
                    f"{cell!r} in {value!r} is not NAME=VALUE with a name of {', '.join(found)}."
                )
            found[name] = said or None
        return found

    @staticmethod
    def text(said: Mapping[str, Any]) -> str:
        """The value that says so; what is `None` or empty is left out."""
        line = io.StringIO()
        full = [f"{name}={v}" for name, v in said.items() if v not in (None, "")]
        csv.writer(line, lineterminator="\r\n").writerow(full)  # which it quotes within a cell
        return line.getvalue()[:-2]

    def embed(self, values: Sequence[str]) -> Condition:
        tokens = torch.zeros(len(values), 1, self.dim, dtype=torch.float32)
        said = [self.said(value) for value in values]
        for name, block in self.blocks.items():
            rows = [i for i, one in enumerate(said) if one[name] is not None]
            try:
                u: Any = self.parts[name].embed([said[i][name] for i in rows])  # type: ignore[misc]
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            tokens[rows, :, block] = u.tokens
        return Condition(tokens)  # (N, 1, E)

    def null(self) -> Condition:
        return self.embed([""])

    def fingerprint(self) -> str:
        return digest("Several", 1, [(k, part.fingerprint()) for k, part in self.parts.items()])
