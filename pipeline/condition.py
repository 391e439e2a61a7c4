"""The condition u of p(x | u), as a network is given it.

A text is tokens, one embedding each; a class or a vector is a single token; a picture is planes of
numbers as large as x, which stand beside x: the lecture's (x, u). A condition may have both. Texts
of unequal length are padded with tokens that are exactly zero, so that u carries its own mask: a
token is padding if and only if all of it is 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Condition", "U", "mirror"]


@dataclass(frozen=True)
class Condition:
    """The conditions of B examples; what is not in use is `None`.

    Arguments:
        tokens: Token embeddings, with shape (B, L, E).
        planes: Pictures, with shape (B, C, H, W).
    """

    tokens: Tensor | None = None
    planes: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        """The condition with each part that it has changed."""
        parts = (self.tokens, self.planes)
        return Condition(*(None if part is None else change(part) for part in parts))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.tokens, self.planes) if part is not None)

    def __len__(self) -> int:
        return next((len(part) for part in (self.tokens, self.planes) if part is not None), 0)

    def __getitem__(self, rows: Any) -> "Condition":
        """Some rows: a slice, or indices with shape (B',)."""
        return self.map(lambda part: part[rows])

    def to(self, *where: Any, **how: Any) -> "Condition":
        return self.map(lambda part: part.to(*where, **how))

    def pin_memory(self) -> "Condition":
        return self.map(Tensor.pin_memory)

    def clone(self) -> "Condition":
        return self.map(Tensor.clone)

    def repeat(self, times: int) -> "Condition":
        """All rows, so many times over."""
        return self.map(lambda part: part.repeat(times, *[1] * (part.ndim - 1)))

    def expand(self, rows: int) -> "Condition":
        """Its only row, so many times."""
        return self.map(lambda part: part.expand(rows, *part.shape[1:]))

    def padded(self, length: int) -> "Condition":
        """With zero tokens up to a length L."""
        if self.tokens is None or self.tokens.shape[1] == length:
            return self
        return Condition(pad(self.tokens, (0, 0, 0, length - self.tokens.shape[1])), self.planes)

    def replaced(self, null: "Condition", where: Tensor, part: str | None = None) -> "Condition":
        """The condition, or one part, as the null one's only row where `where` (B,) is true."""
        u, null = align([self, null])
        found = u._with(null, lambda a, b: torch.where(_rows(where, a), b.to(a), a))
        return found if part is None else replace(u, **{part: getattr(found, part)})

    def without(self, block: slice, where: Tensor) -> "Condition":
        """Tokens zero in some columns, in the rows where `where`, with shape (B,), is true."""
        assert self.tokens is not None
        tokens = self.tokens.clone()
        tokens[..., block].masked_fill_(_rows(where, tokens), 0.0)
        return Condition(tokens, self.planes)

    def beside(self, null: "Condition") -> "Condition":
        """Twice the rows: the null condition, of one row, for each, then the condition."""
        u, null = align([self, null])
        return u._with(null, lambda a, b: torch.cat((b.to(a).expand(a.shape), a)))

    def mirrored(self, where: Tensor) -> "Condition":
        """Planes turned left to right in some rows, as x is; `where` has shape (B,)."""
        return Condition(self.tokens, None if self.planes is None else mirror(self.planes, where))

    def _with(self, other: "Condition", both: Callable[[Tensor, Tensor], Tensor]) -> "Condition":
        """Part by part a function of two conditions, which have to have the same parts."""
        parts = []
        for a, b in ((self.tokens, other.tokens), (self.planes, other.planes)):
            if (a is None) != (b is None):
                raise ValueError("A condition and its null condition must have the same parts.")
            parts.append(None if a is None or b is None else both(a, b))
        return Condition(*parts)

    @staticmethod
    def stack(rows: Sequence["Condition"]) -> "Condition":
        """Conditions one after the other, their tokens padded to the longest."""
        rows = align(rows)
        tokens = [row.tokens for row in rows if row.tokens is not None]
        planes = [row.planes for row in rows if row.planes is not None]
        return Condition(*(torch.cat(some) if some else None for some in (tokens, planes)))


U = Condition | None  # `None` for an unconditional model


def align(conditions: Sequence[Condition]) -> list[Condition]:
    """Conditions padded with zero tokens to one length."""
    length = max((u.tokens.shape[1] for u in conditions if u.tokens is not None), default=0)
    return [u.padded(length) for u in conditions]


def mirror(x: Tensor, where: Tensor) -> Tensor:
    """Pictures (B, …, W) turned left to right in the rows where `where`, (B,), is true."""
    return torch.where(_rows(where, x), x.flip(-1), x)


def _rows(where: Tensor, x: Tensor) -> Tensor:
    return where.reshape(-1, *[1] * (x.ndim - 1))
