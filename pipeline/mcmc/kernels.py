r"""Kernels: one step of a Markov chain whose stationary law is the target, or near it.

Each row of x, with shape :math:`(B, *)`, is a chain; all take their step at once. The unadjusted
members need the score alone, and their step leaves a bias. The others accept or reject by the
density and are exact at any step size:

.. math:: \alpha = \min\Big( 1, \frac{p(y) \, q(x \mid y)}{p(x) \, q(y \mid x)} \Big)

for a proposal y drawn from :math:`q(y \mid x)`.

References:
    | Equation of State Calculations by Fast Computing Machines (Metropolis et al., 1953)
    | Monte Carlo sampling methods using Markov chains and their applications (Hastings, 1970)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.building import Part
from pipeline.errors import UserError
from pipeline.mcmc.compiled import compiled
from pipeline.mcmc.targets import NoDensity, Target
from pipeline.noise import Noise
from pipeline.schedules import expand_as_batch

__all__ = ["HMC", "MALA", "ULA", "HalfDenoising", "Info", "Kernel", "Metropolis"]
__all__ += ["MetropolisHastings", "State", "dot"]

LOST = 1000.0  # an energy error of this size is called a divergence, as Stan does


class State(NamedTuple):
    """Where the chains are, and what is known of the target there.

    Attributes:
        x: The points, with shape :math:`(B, *)`.
        log_prob: The log-density up to a constant, with shape (B,); `None` where it is not used.
        score: The score, with the shape of x; `None` where it is not used.
    """

    x: Tensor
    log_prob: Any = None
    score: Any = None


class Info(NamedTuple):
    """What happened in a step, or in many: then with a dimension of draws in front.

    Attributes:
        gradients: The evaluations of the target, the same for each chain.
        acceptance: The probability α, with shape (B,); `None` for an unadjusted kernel.
        diverged: Where the density was no number or the energy was lost, with shape (B,); `None`
            for an unadjusted kernel.
    """

    gradients: int = 1
    acceptance: Any = None
    diverged: Any = None


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row, with shape (B,)."""
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def choose(first: Tensor, a: State, b: State) -> State:
    """Row by row a where `first`, with shape (B,), else b."""
    row = expand_as_batch(first, a.x)
    return State(
        torch.where(row, a.x, b.x),
        torch.where(first, a.log_prob, b.log_prob),
        None if a.score is None else torch.where(row, a.score, b.score),
    )


def positive(value: float, name: str) -> float:
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be positive.")
    return value


class Kernel(Part, ABC):
    """A step of many chains. It holds numbers only and is given the target when called.

    Attributes:
        aim: The mean acceptance at which adaptation sets `step_size`; `None` if nothing is to be
            adapted.
    """

    aim: float | None = None
    step_size: float

    def init(self, target: Target, x: Tensor) -> State:
        """The state of chains that start at x, with shape :math:`(B, *)`.

        Raises:
            UserError: The kernel needs a density and the target has none.
        """
        try:
            return State(x, *target.log_prob_and_score(x))
        except NoDensity:
            raise UserError(
                f"{type(self).__name__} accepts or rejects by p(x), and this target has a score "
                "only; use ULA, or an energy head."
            ) from None

    @abstractmethod
    def step(self, target: Target, state: State, noise: Noise) -> tuple[State, Info]:
        """One step of every chain, on the target that the state was made with."""

    def draw(
        self,
        target: Target,
        state: State,
        draws: int,
        noise: Noise,
        progress: Callable[[], object] | None = None,
        compile: bool = False,
    ) -> tuple[State, Tensor, Info]:
        """Many steps, at least 1: the last state, the points with shape (draws, B, *), and what
        happened. Where they are `compiled`, they are the same but for rounding.
        """
        step = self.stepper(target, compile)
        points, infos = [], []
        for _ in range(draws):
            state, info = step(state, noise)
            points.append(state.x)
            infos.append(info)
            if progress is not None:
                progress()
        gradients, *rest = zip(*infos, strict=True)
        stacked = [None if part[0] is None else torch.stack(part) for part in rest]
        return state, torch.stack(points), Info(sum(gradients), *stacked)

    def stepper(
        self, target: Target, compile: bool = False
    ) -> Callable[[State, Noise], tuple[State, Info]]:
        """`step` on one target; `compiled`, if it is to be."""
        if not compile:
            return partial(self.step, target)
        gradients = 0

        def flat(parts: Sequence[Any], noise: Noise) -> Sequence[Any]:
            nonlocal gradients
            state, (gradients, *happened) = self.step(target, State(*parts), noise)
            return *state, *happened

        program = compiled(flat)

        def step(state: State, noise: Noise) -> tuple[State, Info]:
            *parts, acceptance, diverged = program(state, noise)
            return State(*parts), Info(gradients, acceptance, diverged)

        return step


class ULA(Kernel):
    r"""The unadjusted Langevin algorithm.

    .. math:: x \leftarrow x + \mu \, \phi(x) + \sqrt{2 \mu} \, n

    The lecture's equation (1). Its stationary law is the target's as μ → 0; on a Gaussian of
    variance :math:`s^2` it has variance :math:`s^2 / (1 - \mu / 2 s^2)`, for :math:`\mu < 2 s^2`.

    References:
        | Roberts & Tweedie, 1996, section 1.4; https://doi.org/10.2307/3318418

    Arguments:
        step_size: The step μ, positive.
    """

    def __init__(self, step_size: float = 0.01) -> None:
        self.step_size = positive(step_size, "step_size")

    def init(self, target: Target, x: Tensor) -> State:
        return State(x)

    def step(self, target: Target, state: State, noise: Noise) -> tuple[State, Info]:
        x, mu = state.x, self.step_size
        x = torch.add(x, target.score(x), alpha=mu)
        return State(torch.add(x, noise.normal(x), alpha=(2 * mu) ** 0.5)), Info()


class HalfDenoising(Kernel):
    r"""Langevin steps that denoise by half, for the score of the noisy law.

    .. math:: y = x + \sigma n, \quad x \leftarrow y + \tfrac{\sigma^2}{2} \, \phi_\sigma(y)

    The target is the law of the data with noise of standard deviation σ added. The chain's law has
    none of that noise to first order in σ², where ULA with the same score keeps all of it; what is
    left is the bias of its own step, of first order in σ² too. On data N(0, 1) its variance is 1
    + σ²/4 + O(σ⁴), that of ULA with the step σ²/2 and the score of the clean data, and that of ULA
    with the noisy score 1 + 5σ²/4; at σ = 0.5 they are 1.066, 1.067 and 1.316.

    References:
        | Hyvärinen, 2024; https://arxiv.org/abs/2410.05837

    Arguments:
        sigma: The standard deviation σ of the noise in the target, positive.
    """

    def __init__(self, sigma: float) -> None:
        self.sigma = positive(sigma, "sigma")

    def init(self, target: Target, x: Tensor) -> State:
        return State(x)

    def step(self, target: Target, state: State, noise: Noise) -> tuple[State, Info]:
        y = state.x + self.sigma * noise.normal(state.x)
        return State(y + 0.5 * self.sigma**2 * target.score(y)), Info()


class MetropolisHastings(Kernel):
    """A proposal that is accepted with probability α; a member is its `propose`."""

    @abstractmethod
    def propose(self, target: Target, state: State, noise: Noise) -> tuple[State, Tensor, int]:
        r"""The proposed state, :math:`\log \frac{p(y) q(x \mid y)}{p(x) q(y \mid x)}` with shape
        (B,), and the number of evaluations.
        """

    def diverged(self, log_ratio: Tensor) -> Tensor:
        """Where the ratio is no number."""
        return log_ratio.isnan()

    def step(self, target: Target, state: State, noise: Noise) -> tuple[State, Info]:
        proposal, log_ratio, gradients = self.propose(target, state, noise)
        diverged = self.diverged(log_ratio)
        acceptance = log_ratio.clamp(max=0).exp().masked_fill_(diverged, 0)
        accepted = noise.uniform(len(state.x)).to(acceptance.device) < acceptance
        return choose(accepted, proposal, state), Info(gradients, acceptance, diverged)


class Metropolis(MetropolisHastings):
    r"""The random-walk Metropolis algorithm.

    .. math:: y = x + \mu n, \quad \alpha = \min(1, p(y) / p(x))

    References:
        | Weak convergence and optimal scaling of random walk Metropolis algorithms (Roberts,
        |   Gelman & Gilks, 1997), for the acceptance 0.234
        | https://doi.org/10.1214/aoap/1034625254

    Arguments:
        step_size: The standard deviation μ of a step, positive.
    """

    aim = 0.234

    def __init__(self, step_size: float = 0.1) -> None:
        self.step_size = positive(step_size, "step_size")

    def init(self, target: Target, x: Tensor) -> State:
        return super().init(target, x)._replace(score=None)

    def propose(self, target: Target, state: State, noise: Noise) -> tuple[State, Tensor, int]:
        y = state.x + self.step_size * noise.normal(state.x)
        log_prob = target.log_prob(y)
        return State(y, log_prob), log_prob - state.log_prob, 1


class MALA(MetropolisHastings):
    r"""The Metropolis-adjusted Langevin algorithm: ULA, then accept or reject.

    .. math:: y = x + \mu \, \phi(x) + \sqrt{2 \mu} \, n, \quad
        \log q(y \mid x) = - \frac{|y - x - \mu \, \phi(x)|^2}{4 \mu}

    References:
        | Roberts & Tweedie, 1996, section 1.4; https://doi.org/10.2307/3318418
        | Optimal scaling of discrete approximations to Langevin diffusions (Roberts & Rosenthal,
        |   1998), for the acceptance 0.574
        | https://doi.org/10.1111/1467-9868.00123

    Arguments:
        step_size: The step μ, positive.
    """

    aim = 0.574

    def __init__(self, step_size: float = 0.01) -> None:
        self.step_size = positive(step_size, "step_size")

    def propose(self, target: Target, state: State, noise: Noise) -> tuple[State, Tensor, int]:
        x, mu, n = state.x, self.step_size, noise.normal(state.x)
        y = torch.add(torch.add(x, state.score, alpha=mu), n, alpha=(2 * mu) ** 0.5)
        log_prob, score = target.log_prob_and_score(y)
        back = torch.sub(x - y, score, alpha=mu)
        # |y − x − μ φ(x)|² / 4 μ is |n|² / 2
        moved = torch.sub(0.5 * dot(n, n), dot(back, back), alpha=1 / (4 * mu))
        return State(y, log_prob, score), log_prob - state.log_prob + moved, 1


class HMC(MetropolisHastings):
    r"""Hamiltonian Monte Carlo: L leapfrog steps of x with a fresh momentum p, then accept or
    reject.

    .. math:: p \leftarrow p + \tfrac{\epsilon}{2} \phi(x), \quad
        x \leftarrow x + \epsilon p, \quad
        p \leftarrow p + \tfrac{\epsilon}{2} \phi(x), \qquad
        \log \alpha = \min\big( 0, \, \Delta [ \log p(x) - \tfrac{1}{2} |p|^2 ] \big)

    The mass is one: `Scaled` gives each coordinate its own.

    Each chain draws its step anew from :math:`\epsilon (1 \pm \text{jitter})`, evenly and without
    a look at x, so the kernel is a mixture of exact ones. A fixed length ε L that is near the
    period of a coordinate, 2 π times its standard deviation, brings it back to where it was, and
    near half of it to the point opposite, where means are quick and squares never move.

    References:
        | Neal, 2011; https://arxiv.org/abs/1206.1901 (section 3.2 for the jitter)
        | Optimal tuning of the hybrid Monte Carlo algorithm (Beskos et al., 2013), for the
        |   acceptance 0.651, of which 0.8 is a safe side
        | https://arxiv.org/abs/1001.4460

    Arguments:
        step_size: The step ε of the leapfrog, positive.
        steps: The number L of leapfrog steps, at least 1.
        jitter: How far the step of a chain may be from ε, as a share of it, in [0, 1).
    """

    aim = 0.8

    def __init__(self, step_size: float = 0.1, steps: int = 10, jitter: float = 0.5) -> None:
        if steps < 1:
            raise ValueError(f"steps is {steps}; it must be at least 1.")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter is {jitter}; it must be at least 0 and below 1.")
        self.jitter = jitter
        self.step_size, self.steps = positive(step_size, "step_size"), steps

    def diverged(self, log_ratio: Tensor) -> Tensor:
        """Where the energy is lost: the leapfrog is unstable there."""
        return ~(log_ratio > -LOST)

    def propose(self, target: Target, state: State, noise: Noise) -> tuple[State, Tensor, int]:
        p = noise.normal(state.x)
        energy = state.log_prob - 0.5 * dot(p, p)
        step_size = torch.as_tensor(self.step_size).to(p)
        if self.jitter:
            share = 2 * noise.uniform(len(p)).to(p) - 1
            step_size = expand_as_batch(step_size * (1 + self.jitter * share), p)
        x, half = state.x, step_size / 2
        p = torch.addcmul(p, half, state.score)
        for _ in range(self.steps - 1):  # two half steps of p meet in one
            x = torch.addcmul(x, step_size, p)
            p = torch.addcmul(p, step_size, target.score(x))
        x = torch.addcmul(x, step_size, p)
        log_prob, score = target.log_prob_and_score(x)
        p = torch.addcmul(p, half, score)
        return State(x, log_prob, score), log_prob - 0.5 * dot(p, p) - energy, self.steps
