"""What every objective is: a number for each example."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from pipeline.condition import U
from pipeline.denoisers import Preconditioned
from pipeline.noise import Noise
from pipeline.schedules import expand_as_batch

__all__ = ["Objective", "clean"]


class Objective(ABC):
    """What is minimised. `bands` names the groups into which a validation loss is divided."""

    bands: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, denoiser: Preconditioned, x: Tensor, u: U, noise: Noise) -> Tensor:
        """The loss of each example, with shape (B,).

        Arguments:
            denoiser: The denoiser that is trained.
            x: Clean data, with shape :math:`(B, *)`.
            u: The condition, or `None`.
            noise: Where the levels and the noise come from.
        """

    def validate(
        self, denoiser: Preconditioned, x: Tensor, u: U, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """The loss of each example and the index of its band, each with shape (B,)."""
        loss = self(denoiser, x, u, noise)
        return loss, torch.zeros_like(loss, dtype=torch.long)

    def state(self) -> dict[str, Any]:
        """What it keeps from step to step; every process has to call it."""
        return {}

    def load(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from what `state` gave."""


def clean(denoiser: Preconditioned, x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Data as the denoiser sees them where no noise was added: :math:`\alpha_0 x`, and t = 0."""
    t = x.new_zeros(())
    return expand_as_batch(denoiser.schedule(t)[0], x) * x, t
