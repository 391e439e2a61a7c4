r"""Samplers that walk: a kernel's Markov chain on the law that a denoiser describes at one level,
at many, or between the steps of another sampler.

At noise ratio s a denoiser describes the law of :math:`y = x_t / \alpha_t = x + s n`. A kernel is
given that law in the units of its noise, :math:`z = y / s = x_t / \sigma_t`. A step size μ of ULA
is then the walk

.. math:: y \leftarrow y + \mu s^2 \phi_s(y) + \sqrt{2 \mu} \, s \, n

so that one number serves at every level and under every schedule, as the steps in proportion to
:math:`s^2` of annealed Langevin do; and `HalfDenoising` with σ = 1 is at each level its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.condition import U
from pipeline.denoisers import Denoiser, Extrapolated
from pipeline.mcmc.kernels import HMC, HalfDenoising, Kernel, MetropolisHastings
from pipeline.mcmc.nuts import NUTS
from pipeline.mcmc.targets import Scaled
from pipeline.noise import Noise
from pipeline.samplers.base import Sampler, State
from pipeline.samplers.diffusion import DDIM
from pipeline.schedules import Schedule

__all__ = ["AnnealedLangevin", "Langevin", "PredictorCorrector"]


class Langevin(Sampler):
    r"""A chain at one noise ratio, or at none: with a score extrapolated to zero noise.

    From :math:`y \sim N(0, \text{start}^2 I)`, N updates of a kernel, with the smallest ratio as
    its unit s. With `ULA` this is the lecture's equation (5), Langevin with the learned score,

    .. math:: y \leftarrow y + \mu s^2 \phi(y) + \sqrt{2 \mu} \, s \, n

    With one ratio φ is the score at that ratio, and what is drawn keeps the noise the score was
    learned with: the smaller s, the less. But s² in :math:`\phi = (D - y) / s^2` magnifies the
    errors of D as it shrinks, and the chain needs updates in proportion to :math:`1 / s^2`. There
    are three ways out, of which one may be taken: `HalfDenoising`, which removes the noise to
    first order in s²; several ratios, from which `Extrapolated` takes the score at zero noise; and
    D at the end, which moves y to the mean and so draws too narrow a law.

    References:
        | Roberts & Tweedie, 1996; https://doi.org/10.2307/3318418
        | Hyvärinen, 2024; https://arxiv.org/abs/2410.05837

    Arguments:
        kernel: How the chain moves, its numbers in units of the smallest ratio; one that accepts
            and rejects needs a denoiser with a density.
        ratios: The noise ratios; the law at the first alone, or extrapolated from all.
        steps: The number N of updates.
        start: The standard deviation of the start; that of the data serves.
        denoise: Whether to end with D.

    Raises:
        ValueError: More than one of the three is asked for, or a number is not positive.
    """

    def __init__(
        self,
        kernel: Kernel,
        ratios: Sequence[float] = (0.1,),
        steps: int = 500,
        start: float = 0.5,
        denoise: bool = False,
    ) -> None:
        super().__init__(steps, rho=1.0)  # its grid is one time
        if not ratios or not min(ratios) > 0 or not start > 0:
            raise ValueError(f"ratios = {ratios} and start = {start} must be positive.")
        if (len(ratios) > 1) + isinstance(kernel, HalfDenoising) + denoise > 1:
            raise ValueError(
                f"ratios = {ratios}, {type(kernel).__name__} and denoise = {denoise} remove the "
                f"noise more than once; choose one of several ratios, HalfDenoising and denoise."
            )
        self.kernel, self.ratios = checked(kernel), tuple(ratios)
        self.start, self.denoise = start, denoise

    @property
    def evaluations(self) -> int:
        return len(self.ratios) * cost(self.kernel, self.steps) + self.denoise

    def grid(self, schedule: Schedule) -> Tensor:
        """The time of the smallest ratio, N times over."""
        ratio = torch.tensor(min(self.ratios), dtype=torch.float64)
        return schedule.time(ratio).repeat(self.steps)

    def init(self, denoiser: Denoiser, like: Tensor, t: Tensor, u: U, noise: Noise) -> State:
        alpha_t, sigma_t = denoiser.schedule.at(t)
        law = Scaled(Extrapolated(denoiser, self.ratios, u), sigma_t / alpha_t)
        y = self.start * noise.normal(like)
        return State(alpha_t * y, (law, self.kernel.init(law, y * alpha_t / sigma_t)))

    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        law, chain = state.memory
        chain, info = self.kernel.step(law, chain, noise)
        return State(denoiser.schedule.at(t)[1] * chain.x, (law, chain), info.acceptance)

    def last(self, denoiser: Denoiser, state: State, t: Tensor, u: U, noise: Noise) -> State:
        state = self.step(denoiser, state, t, t, u, noise)
        return state._replace(x=clean(self.denoise, denoiser, state.x, t, u))


class AnnealedLangevin(Sampler):
    r"""Annealed Langevin: a chain at each noise ratio in turn, from the largest to the smallest,
    each from where the one before ended.

    .. math:: y \leftarrow y + \mu s_i^2 \phi_{s_i}(y) + \sqrt{2 \mu} \, s_i \, n,
        \quad \text{`updates` times for each } i = 1, …, N

    The paper's step :math:`\alpha_i / 2 = \epsilon \sigma_i^2 / 2 \sigma_L^2` with
    :math:`\epsilon` = 2e-5 and :math:`\sigma_L` = 0.01 is the step size 0.1 of ULA here, and its
    updates are 100.

    References:
        | Song & Ermon, 2019, algorithm 1; https://arxiv.org/abs/1907.05600
        | Adversarial score matching and improved sampling for image generation
        |   (Jolicoeur-Martineau et al., 2021), section 3.1, for D at the end
        | https://arxiv.org/abs/2009.05475

    Arguments:
        kernel: How the chains move, its numbers in units of each ratio; one that accepts and
            rejects needs a denoiser with a density.
        updates: The number of updates at each ratio, at least 1.
        steps: The number N of ratios.
        rho: The exponent of the grid; see `Sampler`.
        denoise: Whether to end with D.
    """

    def __init__(
        self,
        kernel: Kernel,
        updates: int = 10,
        steps: int = 50,
        rho: float = 7.0,
        denoise: bool = True,
    ) -> None:
        super().__init__(steps, rho)
        self.kernel, self.updates, self.denoise = checked(kernel, updates), updates, denoise

    @property
    def evaluations(self) -> int:
        return self.steps * cost(self.kernel, self.updates) + self.denoise

    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        state = walk(self.kernel, self.updates, denoiser, state.x, t, u, noise)
        return state._replace(x=denoiser.schedule.at(s)[0] / denoiser.schedule.at(t)[0] * state.x)

    def last(self, denoiser: Denoiser, state: State, t: Tensor, u: U, noise: Noise) -> State:
        state = walk(self.kernel, self.updates, denoiser, state.x, t, u, noise)
        return state._replace(x=clean(self.denoise, denoiser, state.x, t, u))


class PredictorCorrector(DDIM):
    r"""Predictor–corrector: after each step of `DDIM`, the predictor, a chain at the new level
    brings x back to the law of that level.

    The paper sets its Langevin step by a ratio r = 0.16 of the norms of score and noise. Where
    noise dominates, :math:`\|\phi\| = \|n\| / s`, that is :math:`\mu = 2 r^2`, the step size 0.05
    of ULA here.

    A corrector is right if it keeps the law of its level: ULA for small steps, MALA at any, not
    `HalfDenoising`.

    References:
        | Song et al., 2021, algorithms 1, 4, 5; https://arxiv.org/abs/2011.13456

    Arguments:
        kernel: The corrector, its numbers in units of each ratio; one that accepts and rejects
            needs a denoiser with a density.
        updates: The number of its updates after each step, at least 1.
        steps: The number of times.
        eta: The stochasticity of the predictor; see `DDIM`.
        rho: The exponent of the grid; see `Sampler`.
        denoise: Whether to end with D.
    """

    def __init__(
        self,
        kernel: Kernel,
        updates: int = 1,
        steps: int = 50,
        eta: float = 0.0,
        rho: float = 7.0,
        denoise: bool = True,
    ) -> None:
        super().__init__(steps, eta, rho)
        if isinstance(kernel, HalfDenoising):
            raise ValueError("HalfDenoising does not keep the law of a level: correct with ULA.")
        self.kernel, self.updates, self.denoise = checked(kernel, updates), updates, denoise

    @property
    def evaluations(self) -> int:
        return (self.steps - 1) * (1 + cost(self.kernel, self.updates)) + self.denoise

    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        x_s = super().step(denoiser, state, t, s, u, noise).x
        return walk(self.kernel, self.updates, denoiser, x_s, s, u, noise)

    def last(self, denoiser: Denoiser, state: State, t: Tensor, u: U, noise: Noise) -> State:
        return State(clean(self.denoise, denoiser, state.x, t, u))


def checked(kernel: Kernel, updates: int = 1) -> Kernel:
    """A kernel that can walk in a sampler."""
    if isinstance(kernel, NUTS):
        raise ValueError(
            "NUTS draws as often as the longest trajectory of the batch needs, so a picture would "
            "depend on those beside it; use HMC."
        )
    if updates < 1:
        raise ValueError(f"updates = {updates} must be at least 1.")
    if isinstance(kernel, HalfDenoising) and kernel.sigma != 1:
        raise ValueError(
            f"sigma = {kernel.sigma} of HalfDenoising must be 1 here: the noise of a level is the "
            f"unit of its chain."
        )
    return kernel


def cost(kernel: Kernel, updates: int) -> int:
    """The evaluations of the law in a chain of some updates."""
    each = kernel.steps if isinstance(kernel, HMC) else 1
    return isinstance(kernel, MetropolisHastings) + updates * each


def walk(
    kernel: Kernel,
    updates: int,
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    u: U,
    noise: Noise,
) -> State:
    """The state after some updates of a chain at time t, with their mean acceptance."""
    sigma_t = denoiser.schedule.at(t)[1]
    law = Scaled(denoiser.at(t, u), sigma_t)
    chain, accepted = kernel.init(law, x_t / sigma_t), []
    for _ in range(updates):
        chain, info = kernel.step(law, chain, noise)
        accepted.append(info.acceptance)
    acceptance = None if accepted[0] is None else torch.stack(accepted).mean(dim=0)
    return State(sigma_t * chain.x, acceptance=acceptance)


def clean(denoise: bool, denoiser: Denoiser, x_t: Tensor, t: Tensor, u: U) -> Tensor:
    r"""What is drawn: D, or :math:`x_t / \alpha_t` as it is."""
    return denoiser(x_t, t, u) if denoise else x_t / denoiser.schedule.at(t)[0]
