r"""Guidance: a guided denoiser is a denoiser.

The lecture's equation (6) asks for :math:`\phi(x \mid u)`. By Bayes' rule
:math:`\nabla \log p(u \mid x) = \phi(x \mid u) - \phi(x)`, so the score of :math:`p(x) \, p(u \mid
x)^w` is a linear combination of two learned scores, and, D being linear in the score, of two
denoisers; its log-density, up to a constant, is that of the two log-densities.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pipeline.conditioning import align
from pipeline.denoisers import Denoiser

__all__ = ["ClassifierFree", "Guidance", "Guided"]


class Guidance(ABC):
    """A way to strengthen a condition. It holds numbers only and is given the denoiser when
    called.
    """

    @abstractmethod
    def __call__(self, denoiser: Denoiser, u_null: Tensor | None) -> Denoiser:
        """The guided denoiser.

        Arguments:
            denoiser: A conditional denoiser that was trained with condition dropout.
            u_null: The null condition, with shape (1, L, E).

        Raises:
            ValueError: The guidance needs a null condition and there is none.
        """


class ClassifierFree(Guidance):
    r"""Classifier-free guidance.

    .. math:: D_w = D(x_t, t, \varnothing) + w \, \big( D(x_t, t, u) - D(x_t, t, \varnothing) \big)

    w = 1 is the conditional denoiser itself and w = 0 the unconditional one: each costs one
    network evaluation, every other w costs two, in one batch.

    References:
        | Classifier-Free Diffusion Guidance
        |   (Ho & Salimans, 2022), equation (6), with w there counted from 0
        | https://arxiv.org/abs/2207.12598

    Arguments:
        scale: The scale w; above 1 the condition is stronger than the data would have it.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = float(scale)

    def __call__(self, denoiser: Denoiser, u_null: Tensor | None) -> Denoiser:
        if self.scale == 1:
            return denoiser
        if u_null is None:
            raise ValueError(f"scale = {self.scale} needs a null condition, and there is none.")
        return Guided(denoiser, u_null, self.scale)


class Guided(Denoiser):
    """The denoiser that `ClassifierFree` makes."""

    def __init__(self, denoiser: Denoiser, u_null: Tensor, scale: float) -> None:
        super().__init__(denoiser.schedule)
        self.denoiser, self.u_null, self.scale = denoiser, u_null, scale

    def forward(self, x_t: Tensor, t: Tensor, u: Tensor | None = None) -> Tensor:
        return self._combine(self.denoiser(*self._both(x_t, t, u)))

    def score(self, x_t: Tensor, t: Tensor, u: Tensor | None = None) -> Tensor:
        return self._combine(self.denoiser.score(*self._both(x_t, t, u)))

    def log_prob(self, x_t: Tensor, t: Tensor, u: Tensor | None = None) -> Tensor:
        return self._combine(self.denoiser.log_prob(*self._both(x_t, t, u)))

    def log_prob_and_score(
        self, x_t: Tensor, t: Tensor, u: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        log_p, score = self.denoiser.log_prob_and_score(*self._both(x_t, t, u))
        return self._combine(log_p), self._combine(score)

    def _both(self, x_t: Tensor, t: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What to evaluate: each row with the null condition, then with its own; at scale 0 the
        first alone.
        """
        if u is None:
            raise ValueError(
                "Guidance needs a condition u, and None was given; draw with scale 1 or with "
                "prompts."
            )
        null, u = align(self.u_null.to(u).expand(len(u), -1, -1), u)
        if self.scale == 0:
            return x_t, t, null
        double = t.repeat(2) if t.ndim else t
        return x_t.repeat(2, *[1] * (x_t.ndim - 1)), double, torch.cat((null, u))

    def _combine(self, value: Tensor) -> Tensor:
        if self.scale == 0:
            return value
        null, given = value.chunk(2)
        return torch.lerp(null, given, self.scale)
