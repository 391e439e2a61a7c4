r"""The condition u of p(x | u).

Whatever a person conditions on (a prompt, a class, a vector) becomes one tensor u of tokens, with
shape (B, L, E): a text is its L token embeddings, a class or a vector is a single token. Texts of
unequal length are padded with rows that are exactly zero, so that u carries its own mask: a row
is padding if and only if all of it is 0.

A conditioning is frozen. It is no child of the model: the checkpoint holds what is trained and
nothing else, and says by a fingerprint which conditioning it was trained with.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Conditioning", "align"]


def align(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two conditions (B, L, E) padded with zero rows to one length."""
    length = max(u.shape[1], v.shape[1])
    return pad(u, (0, 0, 0, length - u.shape[1])), pad(v, (0, 0, 0, length - v.shape[1]))


class Conditioning(ABC):
    """Turns what a person conditions on into u."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """The width E of one token of u."""

    @abstractmethod
    def embed(self, values: Sequence[Any]) -> Tensor:
        """The conditions of N values: u, float32 on the CPU, with shape (N, L, E), where L is the
        longest of this call and padded rows are exactly zero.
        """

    @abstractmethod
    def null(self) -> Tensor:
        """The null condition, with shape (1, L0, E)."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hex digest of everything that decides the embedding."""
