"""Conditions that need no network: a class, a vector of numbers."""

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.condition import Condition
from pipeline.conditioning.base import Conditioning
from pipeline.errors import UserError
from pipeline.files import digest

__all__ = ["Classes", "Vectors"]


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
            raise UserError(
                f"There is no class {value!r}; the classes are {self._listed()} "
                f"(or their index, 0 to {len(self.names) - 1})."
            )
        return index

    def _listed(self, most: int = 10) -> str:
        rest = len(self.names) - most
        return ", ".join(self.names[:most]) + (f" and {rest} more" if rest > 0 else "")

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
