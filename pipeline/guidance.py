r"""Guidance: a guided denoiser is a denoiser.

The lecture's equation (6) asks for :math:`\phi(x \mid u)`. By Bayes' rule
:math:`\nabla \log p(u \mid x) = \phi(x \mid u) - \phi(x)`, so the score of :math:`p(x) \, p(u \mid
x)^w` is a linear combination of two learned scores, and, D being linear in the score, of two
denoisers; its log-density, up to a constant, is that of the two log-densities.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.building import Part, describe
from pipeline.condition import Condition, U
from pipeline.denoisers import Denoiser
from pipeline.errors import UserError
from pipeline.schedules import expand_as_batch

__all__ = ["Autoguidance", "ByPart", "ClassifierFree", "Guidance", "Guided", "under"]

LARGEST = 1e38  # scale, of which float32 is able


class Guidance(Part, ABC):
    r"""A way to strengthen a condition. It is given the denoiser when called; it may hold another.

    Arguments:
        scale: The scale w.
        interval: The least and the greatest noise ratio :math:`\sigma_t / \alpha_t` at which it
            guides; elsewhere the denoiser is left as it is, for one evaluation. By default it
            always guides.

    Attributes:
        needs_condition: Whether an unconditional model has nothing of it.
        negative: What stands in place of the null condition, a prompt or a class name; `None`
            for nothing.
        others: Further prompts, whose conditions follow the null condition when it is called.
        blocks: The columns of a token of each part of a condition of several, by its name; who
            draws says so before it is called.

    Raises:
        ValueError: The interval is not two numbers, 0 ≤ least < greatest.

    References:
        | Kynkäänniemi et al., 2024; https://arxiv.org/abs/2404.07724
    """

    needs_condition = True
    negative: str | None = None
    others: tuple[str, ...] = ()
    blocks: Mapping[str, slice] = {}

    def __init__(self, scale: float, interval: Sequence[float] | None = None) -> None:
        if interval is not None and (len(interval) != 2 or not 0 <= interval[0] < interval[1]):
            raise ValueError(
                f"interval = {list(interval)} must be the least and the greatest noise ratio, "
                "0 ≤ least < greatest, such as [0.2, 3]."
            )
        if not abs(scale) <= LARGEST:
            raise ValueError(f"scale = {scale} must lie between -{LARGEST:g} and {LARGEST:g}.")
        self.scale = float(scale)
        self.interval = None if interval is None else (float(interval[0]), float(interval[1]))

    @abstractmethod
    def __call__(self, denoiser: Denoiser, u_null: U) -> Denoiser:
        """The guided denoiser.

        Arguments:
            denoiser: A conditional denoiser.
            u_null: The null condition, of one row, and a row for each of `others`.

        Raises:
            ValueError: The guidance needs a null condition and there is none, or its own denoiser
                does not fit.
        """


class ClassifierFree(Guidance):
    r"""Classifier-free guidance.

    .. math:: D_w = D(x_t, t, \varnothing) + w \, \big( D(x_t, t, u) - D(x_t, t, \varnothing) \big)

    The denoiser is to be trained with condition dropout. w = 1 is the conditional denoiser itself
    and w = 0 the unconditional one: each costs one network evaluation, every other w costs two, in
    one batch.

    References:
        | Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), equation (6), with w there
        |   counted from 0
        | https://arxiv.org/abs/2207.12598

    Arguments:
        scale: The scale w; above 1 the condition is stronger than the data would have it.
        interval: Where it guides; see `Guidance`. At scale 0 the prompt is ignored at every noise
            ratio.
        negative: A prompt to go away from, in place of the null condition; for a model of classes
            the name of one.
    """

    def __init__(
        self,
        scale: float = 1.0,
        interval: Sequence[float] | None = None,
        negative: str | None = None,
    ) -> None:
        super().__init__(scale, interval)
        self.negative = negative

    def __call__(self, denoiser: Denoiser, u_null: U) -> Denoiser:
        if self.scale == 1:
            return denoiser
        if u_null is None:
            raise ValueError(f"scale = {self.scale} needs a null condition, and there is none.")
        return _ClassifierFree(denoiser, u_null, self)


class ByPart(ClassifierFree):
    r"""Classifier-free guidance of a condition of tokens and planes, (c, p), each part by a scale.

    .. math:: D_w = D(\varnothing, \varnothing)
        + w_p \, \big( D(\varnothing, p) - D(\varnothing, \varnothing) \big)
        + w \, \big( D(c, p) - D(\varnothing, p) \big)
        + \sum_k (w_k - 1) \, \big( D(c, p) - D(c_{\setminus k}, p) \big)

    The last sum is over parts of `Several`, :math:`c_{\setminus k}` leaving part k out: with
    :math:`w = w_p = 1` the law is :math:`p(x \mid u) \prod_k p(u_k \mid x, u_{\setminus k})^{w_k
    - 1}`. One batch of the terms whose coefficient is not 0. Where u has tokens or planes alone,
    their scale is used. The other arguments are those of `ClassifierFree`.

    References:
        | Brooks et al., 2023, equation (3); https://arxiv.org/abs/2211.09800

    Arguments:
        scale: The scale w of the tokens.
        planes_scale: The scale w_p of the planes; 1 leaves them as the data have them.
        parts: The scale w_k of parts by their names, `{machine: 2.0}`; 1 for those left away.

    Raises:
        UserError: A part has no such name.
    """

    def __init__(
        self,
        scale: float = 2.0,
        planes_scale: float = 1.0,
        interval: Sequence[float] | None = None,
        negative: str | None = None,
        parts: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(scale, interval, negative)
        self.planes_scale, self.parts = float(planes_scale), dict(parts or {})

    def __call__(self, denoiser: Denoiser, u_null: U) -> Denoiser:
        if u_null is None:
            raise ValueError("Guidance by part needs a null condition, and there is none.")
        if unknown := self.parts.keys() - self.blocks.keys():
            raise UserError(
                f"guidance.parts names {min(unknown)!r}; the condition's parts by name are "
                f"{', '.join(self.blocks) or 'none'}."
            )
        return _ByPart(denoiser, u_null, self)


class Autoguidance(Guidance):
    r"""Guidance by a weaker model of the same law, smaller or trained for less time.

    .. math:: D_w = D'(x_t, t, u) + w \, \big( D(x_t, t, u) - D'(x_t, t, u) \big)

    The two make the same mistakes, D' larger ones, and w > 1 goes on from D' through D. w = 1 is
    the denoiser itself, w = 0 the weaker one. It needs no condition.

    References:
        | Karras et al., 2024, equation (3); https://arxiv.org/abs/2406.02507

    Arguments:
        denoiser: The weaker denoiser D', with the schedule of D; in YAML, its checkpoint.
        scale: The scale w.
        interval: Where it guides; see `Guidance`.
    """

    needs_condition = False

    def __init__(
        self, denoiser: Denoiser, scale: float = 2.0, interval: Sequence[float] | None = None
    ) -> None:
        super().__init__(scale, interval)
        self.denoiser = denoiser.eval().requires_grad_(False)

    def __call__(self, denoiser: Denoiser, u_null: U) -> Denoiser:
        weak, strong = (describe(one.schedule) for one in (self.denoiser, denoiser))
        if weak != strong:
            raise ValueError(
                f"The weaker denoiser has the schedule {weak}, and the other {strong}; "
                "autoguidance needs one for both."
            )
        where = next((p.device for p in denoiser.parameters()), None)
        return _Autoguided(denoiser, self.denoiser.to(where), self)


class Guided(Denoiser):
    """A linear combination of two denoisers, weaker + w (stronger − weaker), and so of their
    scores and log-densities; outside of the interval the stronger one.
    """

    def __init__(self, denoiser: Denoiser, guidance: Guidance) -> None:
        super().__init__(denoiser.schedule)
        self.denoiser, self.scale, self.interval = denoiser, guidance.scale, guidance.interval
        self.jumps = (*denoiser.jumps, *(self.interval or ()))

    @abstractmethod
    def _both(self, what: str, x_t: Tensor, t: Tensor, u: U) -> tuple[tuple, tuple]:
        """What a method of the weaker denoiser gives, and that of the stronger."""

    def _combined(self, what: str, x_t: Tensor, t: Tensor, u: U) -> tuple[Tensor, ...]:
        scale = self._scale(t)
        if scale is None:
            return _tuple(getattr(self.denoiser, what)(x_t, t, u))
        both = zip(*self._both(what, x_t, t, u), strict=True)
        if isinstance(scale, Tensor):
            return tuple(torch.lerp(a, b, expand_as_batch(scale.to(x_t), a)) for a, b in both)
        return tuple(torch.lerp(a, b, scale) for a, b in both)

    def _scale(self, t: Tensor) -> float | Tensor | None:
        """The scale at a time, of each row where each has its own; `None` where nothing guides."""
        if self.interval is None:
            return self.scale
        least, greatest = self.interval
        if not t.ndim:
            alpha_t, sigma_t = self.schedule.at(t)
            return self.scale if least <= sigma_t / alpha_t <= greatest else None
        s = self.schedule.ratio(t)
        inside = (least <= s) & (s <= greatest)
        return torch.where(inside, self.scale, 1.0) if inside.any() else None

    def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        return self._combined("__call__", x_t, t, u)[0]

    def score(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        return self._combined("score", x_t, t, u)[0]

    def log_prob(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        return self._combined("log_prob", x_t, t, u)[0]

    def log_prob_and_score(self, x_t: Tensor, t: Tensor, u: U = None) -> tuple[Tensor, Tensor]:
        log_p, score = self._combined("log_prob_and_score", x_t, t, u)
        return log_p, score


class _ClassifierFree(Guided):
    def __init__(self, denoiser: Denoiser, u_null: Condition, guidance: Guidance) -> None:
        super().__init__(denoiser, guidance)
        self.u_null = u_null
        if self.scale == 0:
            self.interval = None  # the prompt is ignored, and not at some noise ratios only

    def _both(self, what: str, x_t: Tensor, t: Tensor, u: U) -> tuple[tuple, tuple]:
        if u is None:
            raise ValueError(
                "Guidance needs a condition u, and None was given; draw with scale 1 or with "
                "prompts."
            )
        both = u.beside(self.u_null)
        if self.scale == 0:
            (null,) = under(1, both[: len(u)], self.denoiser, what, x_t, t)
            return null, null
        weak, strong = under(2, both, self.denoiser, what, x_t, t)
        return weak, strong


class _ByPart(Guided):
    def __init__(self, denoiser: Denoiser, u_null: Condition, guidance: ByPart) -> None:
        super().__init__(denoiser, guidance)
        self.u_null, self.scales = u_null, (guidance.scale, guidance.planes_scale)
        self.blocks = [(w, guidance.blocks[name]) for name, w in guidance.parts.items()]
        self.interval = guidance.interval if guidance.scale else None  # see `_ClassifierFree`
        self.scale = 0.0  # the first of `_both` is guided already

    def _both(self, what: str, x_t: Tensor, t: Tensor, u: U) -> tuple[tuple, tuple]:
        if u is None:
            raise ValueError("Guidance needs a condition u, and None was given.")
        w, w_p = self.scales
        w, w_p = w_p if u.tokens is None else w, w if u.planes is None else w_p
        every = torch.ones(len(u), dtype=torch.bool, device=x_t.device)
        neither, picture = (u.replaced(self.u_null, every, part) for part in (None, "tokens"))
        more = [(1 - w_k, u.without(block, every)) for w_k, block in self.blocks]
        own = w - sum(c for c, _ in more)
        terms = [(1 - w_p, neither), (w_p - w, picture), *more, (own, u)]
        terms = [(c, v) for c, v in terms if c or (v is u and self.interval is not None)]
        given = Condition.stack([term for _, term in terms])
        values = under(len(terms), given, self.denoiser, what, x_t, t)
        guided = [
            sum(c * d for (c, _), d in zip(terms, of, strict=True))
            for of in zip(*values, strict=True)
        ]
        return tuple(guided), values[-1]


class _Autoguided(Guided):
    def __init__(self, denoiser: Denoiser, weak: Denoiser, guidance: Guidance) -> None:
        super().__init__(denoiser, guidance)
        self.weak = weak

    def _both(self, what: str, x_t: Tensor, t: Tensor, u: U) -> tuple[tuple, tuple]:
        weak, strong = (getattr(one, what)(x_t, t, u) for one in (self.weak, self.denoiser))
        return _tuple(weak), _tuple(strong)


def under(
    n: int, conditions: Condition, denoiser: Denoiser, what: str, x_t: Tensor, t: Tensor
) -> list[tuple[Tensor, ...]]:
    """What a method of a denoiser gives under each of n conditions of every row, (n · B), in one
    batch.
    """
    rows, t = x_t.repeat(n, *[1] * (x_t.ndim - 1)), t.repeat(n) if t.ndim else t
    values = _tuple(getattr(denoiser, what)(rows, t, conditions))
    return list(zip(*(value.chunk(n) for value in values), strict=True))


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
