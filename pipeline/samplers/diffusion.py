"""Samplers that follow the reverse of a diffusion."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeline.condition import U
from pipeline.denoisers import Denoiser
from pipeline.noise import Noise
from pipeline.samplers.base import Sampler, State, crosses
from pipeline.schedules import Schedule

__all__ = ["DDIM", "DPMSolver", "Heun", "UniPC"]

LONG = 10.0  # the ratio r_t / r_s above which a step is DDIM's; 18 times have at most 8.9
# Gauss's rule on [-1, 1]; exact to 1e-11 for polynomials times e^(τ h / 2), h up to 11
NODES, SHARES = np.polynomial.legendre.leggauss(16)


class DDIM(Sampler):
    r"""Denoising diffusion implicit models.

    .. math:: x_s = \alpha_s D + \sigma_s \left( \sqrt{1 - \eta^2 \tau} \,
        \frac{x_t - \alpha_t D}{\sigma_t} + \eta \sqrt{\tau} \, n \right), \quad
        \tau = 1 - \frac{\alpha_t^2 \sigma_s^2}{\alpha_s^2 \sigma_t^2}

    η = 0 is Euler's method on the probability-flow equation, of order 1; η = 1 is DDPM, the
    reverse of the lecture's equation (7), whose step is the exact posterior of :math:`x_s` given
    :math:`x_t` and x = D.

    References:
        | Song et al., 2021, equations (12), (16); https://arxiv.org/abs/2010.02502
        | Ho et al., 2020, equation (7); https://arxiv.org/abs/2006.11239

    Arguments:
        steps: The number of times, which is the number of evaluations.
        eta: The stochasticity η in [0, 1].
        rho: The exponent of the grid; see `Sampler`.
    """

    def __init__(self, steps: int = 50, eta: float = 0.0, rho: float = 7.0) -> None:
        super().__init__(steps, rho)
        self.eta = stochasticity(eta)

    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.schedule.at(t), denoiser.schedule.at(s)
        tau = 1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2
        keep = sigma_s / sigma_t * math.sqrt(1 - self.eta**2 * tau)  # of x_t; the rest is of D
        x_s = torch.add(keep * state.x, denoiser(state.x, t, u), alpha=alpha_s - alpha_t * keep)
        if self.eta:
            x_s.add_(noise.normal(x_s), alpha=sigma_s * self.eta * math.sqrt(tau))
        return State(x_s)


class Heun(Sampler):
    r"""Heun's method on the probability-flow equation, of order 2.

    With :math:`y = x_t / \alpha_t`, r the noise ratio and :math:`f(y, r) = (y - D) / r`, a step
    from :math:`r_t` to
    :math:`r_s` is

    .. math:: \tilde y = y_t + (r_s - r_t) \, f(y_t, r_t), \quad
        y_s = y_t + \tfrac{r_s - r_t}{2} \big( f(y_t, r_t) + f(\tilde y, r_s) \big)

    A step with :math:`r_t > 10 \, r_s` is Euler's, that of `DDIM`, of one evaluation. On Gaussian
    data Euler never draws a law too wide, and Heun may by the factor :math:`r_t / 5 \, r_s` about:
    the slope that falls to 0 at :math:`r_s` says nothing of most of a long step. The times of the
    default have no such step; two or three would end a hundred times too wide.

    With churn S each step first goes back to more noise, by fresh noise, and starts from there:

    .. math:: \hat r_t = (1 + \gamma) \, r_t, \quad \gamma = \min(S / N, \sqrt 2 - 1), \quad
        \hat y = y_t + k \sqrt{\hat r_t^2 - r_t^2} \, n

    never to more than the schedule's last ratio. With k = 1 that keeps the law: its order is 2.

    References:
        | Karras et al., 2022, algorithms 1, 2; https://arxiv.org/abs/2206.00364

    Arguments:
        steps: The number of times N; 2 N − 1 evaluations, one less for each long step.
        rho: The exponent of the grid; see `Sampler`.
        churn: The paper's :math:`S_\text{churn} \geq 0`; 0 is the probability-flow equation.
        interval: The least and the greatest noise ratio at which noise is added, the paper's
            :math:`S_\min` and :math:`S_\max`; `None` for all.
        inflate: The scale k > 0 of the fresh noise, the paper's :math:`S_\text{noise}`.
    """

    def __init__(
        self,
        steps: int = 18,
        rho: float = 7.0,
        churn: float = 0.0,
        interval: Sequence[float] | None = None,
        inflate: float = 1.0,
    ) -> None:
        super().__init__(steps, rho)
        ends = tuple(interval or (0.0, math.inf))
        if not (churn >= 0 and inflate > 0 and len(ends) == 2 and 0 <= ends[0] < ends[1]):
            raise ValueError(
                f"churn = {churn} must be at least 0, inflate = {inflate} positive, and interval ="
                f" {interval} the least and the greatest noise ratio, 0 ≤ least < greatest."
            )
        self.churn, self.interval, self.inflate = churn, ends, inflate

    @property
    def evaluations(self) -> int:
        return 2 * self.steps - 1

    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        x_t = state.x
        if self.churn:
            x_t, t = self._churned(denoiser.schedule, x_t, t, noise)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.schedule.at(t), denoiser.schedule.at(s)
        k = sigma_s * alpha_t / (alpha_s * sigma_t)  # r_s / r_t
        d, x = denoiser(x_t, t, u), alpha_s / alpha_t * k * x_t
        ahead = torch.add(x, d, alpha=alpha_s * (1 - k))
        if k * LONG < 1 or crosses(denoiser, sigma_t / alpha_t, sigma_s / alpha_s):
            return State(ahead)
        # y_s above, as a combination of y_t, D and D at the end
        share = alpha_s * (1 - k) / (2 * k)
        x.add_(d, alpha=share * (2 * k - 1)).add_(denoiser(ahead, s, u), alpha=share)
        return State(x)

    def _churned(
        self, schedule: Schedule, x_t: Tensor, t: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """x with more noise, and the time at which there is as much."""
        r_t, (least, greatest) = schedule.ratio(t), self.interval
        more = schedule.time(r_t * (1 + min(self.churn / self.steps, math.sqrt(2) - 1)))
        more = torch.where((least <= r_t) & (r_t <= greatest), more, t)
        fresh = (schedule.ratio(more) ** 2 - r_t**2).clamp(min=0).sqrt().item()
        y = x_t / schedule.at(t)[0] + self.inflate * fresh * noise.normal(x_t)
        return schedule.at(more)[0] * y, more


class DPMSolver(Sampler):
    r"""DPM-Solver++(2M), a two-step method on the probability-flow equation, of order 2.

    In :math:`y = x_t / \alpha_t` and the noise ratio r, whose logarithm is minus the paper's
    :math:`\lambda`, the equation is linear but for D. D is held at its value in the middle of the
    step, to which a straight line in :math:`\lambda` through its last two values leads, and the
    rest is solved exactly:

    .. math:: y_s = \tfrac{r_s}{r_t} \, y_t + \big(1 - \tfrac{r_s}{r_t}\big) \Big( D_t
        + \tfrac{h}{2 h'} (D_t - D_{t'}) \Big), \quad h = \log \tfrac{r_t}{r_s}, \quad
        h' = \log \tfrac{r_{t'}}{r_t}

    where :math:`t' > t` is the time before. The first step has none, and is DDIM's; so is one with
    :math:`r_t > 10 \, r_s`, for at low noise D settles, and a line leads past it.

    With η the equation is the stochastic one of the same marginals, its noise solved exactly too:

    .. math:: y_s = e^{-(1 + \eta^2) h} \, y_t + \big(1 - e^{-(1 + \eta^2) h}\big) \Big( D_t
        + \tfrac{h}{2 h'} (D_t - D_{t'}) \Big) + r_s \sqrt{1 - e^{-2 \eta^2 h}} \, n

    η = 1 is the paper's SDE-DPM-Solver++(2M), whose first step is DDPM's. On Gaussian data the
    order of its variance is 2.

    References:
        | Lu et al., 2022, algorithm 2 and section 5; https://arxiv.org/abs/2211.01095

    Arguments:
        steps: The number of times, which is the number of evaluations.
        rho: The exponent of the grid; see `Sampler`.
        eta: The stochasticity η in [0, 1]; that of `DDIM` where steps are small.
    """

    def __init__(self, steps: int = 25, rho: float = 7.0, eta: float = 0.0) -> None:
        super().__init__(steps, rho)
        self.eta = stochasticity(eta)

    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.schedule.at(t), denoiser.schedule.at(s)
        r_t, d = sigma_t / alpha_t, denoiser(state.x, t, u)
        shrink = sigma_s / alpha_s / r_t
        keep = shrink**self.eta**2
        x_s, share = alpha_s / alpha_t * shrink * keep * state.x, alpha_s * (1 - shrink * keep)
        r_before, d_before = state.memory or (r_t, d)
        if r_before == r_t or shrink * LONG < 1 or crosses(denoiser, r_before, r_t):
            x_s.add_(d, alpha=share)
        else:
            line = math.log(shrink) / (2 * math.log(r_t / r_before))
            x_s.add_(d, alpha=share * (1 + line)).add_(d_before, alpha=-share * line)
        if self.eta:
            x_s.add_(noise.normal(x_s), alpha=sigma_s * math.sqrt(1 - keep**2))
        return State(x_s, (r_t, d))


class UniPC(Sampler):
    r"""UniPC, a multistep predictor–corrector on the probability-flow equation, of order p + 1.

    In :math:`\lambda = -\log r` and :math:`y = x_t / \alpha_t`, with a polynomial P in λ in
    place of D,

    .. math:: y_s = e^{-h} \, y_t + \int_0^h e^{-(h - \tau)} \, P(\lambda_t + \tau) \, d\tau,
        \quad h = \lambda_s - \lambda_t

    The predictor's P goes through the last p values of D. At the point it leads to D is evaluated,
    once: that value corrects the step that led there, whose P now goes through p + 1 values, and
    begins the next. The first steps have fewer values, the last is not corrected, and one with
    :math:`r_t > 10 \, r_s` is `DDIM`'s. Through two values P is held at its value in the middle
    of the step, the paper's :math:`\tfrac12` with :math:`B_2(h)`; through more the paper's system
    is solved exactly, and B leaves no trace.

    References:
        | Zhao et al., 2023, algorithms 5 to 8; https://arxiv.org/abs/2302.04867

    Arguments:
        steps: The number of times, which is the number of evaluations.
        order: The number p ≥ 1 of values that the predictor goes through.
        rho: The exponent of the grid; see `Sampler`.
    """

    def __init__(self, steps: int = 16, order: int = 2, rho: float = 7.0) -> None:
        super().__init__(steps, rho)
        if order < 1:
            raise ValueError(f"order = {order} must be at least 1.")
        self.order = order

    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = denoiser.schedule.at(t), denoiser.schedule.at(s)
        here, there = math.log(alpha_t / sigma_t), math.log(alpha_s / sigma_s)
        y, values = state.x / alpha_t, [(here, denoiser(state.x, t, u))]
        y_before, before = state.memory or (y, [])
        if before and not crosses(denoiser, math.exp(-before[0][0]), math.exp(-here)):
            values += before
            y = integrated(y_before, before[0][0], here, values)
        values = values[: self.order]
        return State(alpha_s * integrated(y, here, there, values), (y, values))


def integrated(
    y: Tensor, here: float, there: float, values: Sequence[tuple[float, Tensor]]
) -> Tensor:
    """y brought from one λ to another by the polynomial through the values (λ, D)."""
    y = math.exp(here - there) * y
    weights = shares(here, there, tuple(place for place, _ in values))
    for weight, (_, d) in zip(weights, values, strict=True):
        y.add_(d, alpha=weight)
    return y


@lru_cache(maxsize=4096)
def shares(here: float, there: float, places: tuple[float, ...]) -> list[float]:
    """The weight in that integral of each D, by its λ; computed once."""
    h, tau = there - here, (1 + NODES) / 2
    kernel = SHARES / 2 * h * np.exp((tau - 1) * h)
    if len(places) == 2:
        tau, kernel = np.array([0.5]), -np.expm1([-h])
    if h > math.log(LONG):
        tau = 0 * tau  # D where the step begins
    others = [[other for other in places if other is not place] for place in places]
    return [
        float(math.prod([(here + tau * h - b) / (a - b) for b in rest], start=kernel).sum())
        for a, rest in zip(places, others, strict=True)
    ]


def stochasticity(eta: float) -> float:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta} must lie between 0 (deterministic) and 1 (DDPM).")
    return eta
