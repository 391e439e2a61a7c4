r"""What a person conditions on → u.

A conditioning is frozen. It is no child of the model: the checkpoint holds what is trained and
nothing else, and says by a fingerprint which conditioning it was trained with.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from pipeline.building import Part
from pipeline.condition import Condition

__all__ = ["Conditioning"]


class Conditioning(Part, ABC):
    """Turns what a person conditions on (a prompt, a class, a vector) into u.

    Attributes:
        planes: The number C of planes of u.
        open: Whether it is still to `learn` from the data.
        blocks: The columns of a token that belong to each of several parts, by its name, which
            training drops one by one too.
    """

    planes: int = 0
    open: bool = False
    blocks: Mapping[str, slice] = {}

    @property
    @abstractmethod
    def dim(self) -> int:
        """The width E of one token of u; 0 where it has none."""

    @abstractmethod
    def embed(self, values: Sequence[Any]) -> Condition:
        """The conditions of N values, float32 on the CPU, their tokens padded with zeros."""

    def to(self: Self, device: torch.device | str) -> Self:
        """Computes on `device` from now on, where it computes anything."""
        return self

    @abstractmethod
    def null(self) -> Condition:
        """The null condition, of one row."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hex digest of everything that decides the embedding."""

    def learn(self, names: Any) -> None:
        """Take from the data what was left open: the names of its distinct values."""
