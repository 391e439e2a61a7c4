"""Samplers on laws whose denoiser is exact: the law they reach, their orders, their invariance."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from test_denoisers import OUTPUTS, SCHEDULES
from torch import Tensor

from pipeline.condition import Condition, U
from pipeline.denoisers import (
    Denoiser,
    Preconditioned,
    ScoreDenoiser,
)
from pipeline.mcmc import HMC, MALA, ULA, GaussianMixture, HalfDenoising, Target
from pipeline.networks import Network
from pipeline.noise import Noise, PictureNoise
from pipeline.samplers import (
    DDIM,
    Adaptive,
    AnnealedLangevin,
    DPMSolver,
    Heun,
    Langevin,
    PredictorCorrector,
    Sampler,
    State,
    UniPC,
)
from pipeline.schedules import VE, VP, Cosine, Rectified, Schedule

SAMPLERS = [
    DDIM(64),
    DDIM(256, eta=1.0),
    Heun(32),
    Heun(48, churn=20.0),
    DPMSolver(48),
    DPMSolver(96, eta=1.0),
    UniPC(48),
    UniPC(48, order=3),
    Adaptive(1e-3, 64),
    PredictorCorrector(ULA(0.05), steps=64),
    PredictorCorrector(MALA(0.5), steps=64),
]
WALKERS = [  # too short to arrive: for what must hold at any length
    Langevin(ULA(0.3), [0.3], steps=8, denoise=True),
    Langevin(HalfDenoising(1.0), [0.2], steps=8),
    Langevin(ULA(0.3), [0.2, 0.3, 0.5], steps=8),
    Langevin(MALA(0.3), [0.3, 0.5], steps=8),
    AnnealedLangevin(ULA(0.1), updates=3, steps=8),
    AnnealedLangevin(MALA(0.5), updates=3, steps=8, denoise=False),
    AnnealedLangevin(HMC(0.5, 3), updates=2, steps=8),
    PredictorCorrector(ULA(0.1), updates=2, steps=8, denoise=False),
    PredictorCorrector(MALA(0.5), updates=2, steps=8),
]
N = 2048


def named(thing: Schedule | Sampler) -> str:
    kernel = type(getattr(thing, "kernel", None)).__name__.replace("NoneType", "")
    steps = f"({kernel}{thing.steps})" if isinstance(thing, Sampler) else ""
    return type(thing).__name__ + steps


def empty(n: int, *shape: int) -> Tensor:
    return torch.zeros(n, *(shape or (2,)), dtype=torch.float64)


def onehot(k: int | None, n: int) -> Condition:
    row = torch.zeros(3) if k is None else torch.eye(3)[k]
    return Condition(row.double().expand(n, 1, 3))


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|A − B| − E|A − A'| − E|B − B'|, unbiased: 0 on average for one law."""

    def within(z: Tensor) -> Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return (2 * torch.cdist(a, b).mean() - within(a) - within(b)).item()


FOUND: dict[tuple[int | None, int], float] = {}


def floor(mixture: GaussianMixture, k: int | None, n: int) -> float:
    """The scale of the distance between two exact samples: its root mean square."""
    if (k, n) not in FOUND:
        sides = [[exact(mixture, k, n, i, side) for side in "ab"] for i in range(8)]
        FOUND[k, n] = math.sqrt(sum(energy_distance(a, b) ** 2 for a, b in sides) / len(sides))
    return FOUND[k, n]


def exact(mixture: GaussianMixture, k: int | None, n: int, *key: int | str) -> Tensor:
    x, component = mixture.sample(Noise("exact", *key), n if k is None else 12 * n)
    return (x if k is None else x[component == k])[:n]


# The distance of two exact samples is about 0 ± floor: 4 of these standard deviations. Right
# samplers were measured between −1.3 and 1.9 floors, the broken ones below between 44 and 630.
FLOORS = 4


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=named)
def test_sampler_recovers_mixture(
    sampler: Sampler, schedule: Schedule, mixture: GaussianMixture
) -> None:
    drawn = sampler(ScoreDenoiser(mixture, schedule), empty(N), None, Noise("draw"))
    distance = energy_distance(drawn, exact(mixture, None, N, "truth"))
    assert distance < FLOORS * floor(mixture, None, N)


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=named)
def test_sampler_recovers_each_class(sampler: Sampler, k: int, mixture: GaussianMixture) -> None:
    n = 512
    denoiser = ScoreDenoiser(mixture, Cosine())
    drawn = sampler(denoiser, empty(n), onehot(k, n), Noise("draw"))
    assert energy_distance(drawn, exact(mixture, k, n, "truth")) < FLOORS * floor(mixture, k, n)
    other = exact(mixture, (k + 1) % 3, n, "truth")
    assert energy_distance(drawn, other) > 100 * floor(mixture, k, n)


class Exact(Network):
    """A network that is exact whichever output it is asked for."""

    def __init__(self, mixture: GaussianMixture) -> None:
        super().__init__()
        self.law = ScoreDenoiser(mixture, VE(1e-4, 1e4))
        self.scales = lambda s: (s, s, s)

    def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
        c_in, c_skip, c_out = (c[:, None] for c in self.scales(level.exp()))
        y = x / c_in
        return (self.law(y, self.law.schedule.time(level.exp()), u) - c_skip * y) / c_out


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("family", OUTPUTS)
def test_every_output_draws_the_same(
    family: type[Preconditioned], schedule: Schedule, mixture: GaussianMixture
) -> None:
    """What is drawn above with the exact law, whatever the network is asked for."""
    network = Exact(mixture)
    denoiser = family(network, schedule)
    network.scales = denoiser.scales
    for sampler in SAMPLERS:
        if "MALA" in named(sampler):  # needs a density
            continue
        short = copy.copy(sampler)
        short.steps = 12
        drawn, expected = (
            short(one, empty(16), None, Noise("same"))
            for one in (denoiser, ScoreDenoiser(mixture, schedule))
        )
        # D is a difference of numbers near 1e3: eps times that, and what the flow makes of it
        assert torch.allclose(drawn, expected, rtol=1e-7, atol=1e-7), named(sampler)


class NoSigma(DDIM):
    """Wrong on purpose: the noise keeps its old scale."""

    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        alpha_t, sigma_t = denoiser.schedule(t)
        alpha_s, sigma_s = denoiser.schedule(s)
        d = denoiser(state.x, t, u)
        return State(alpha_s * d + 0.97 * sigma_s / sigma_t * (state.x - alpha_t * d))


class TooNoisy(DDIM):
    """Wrong on purpose: fresh noise without shrinking the old."""

    def step(
        self, denoiser: Denoiser, state: State, t: Tensor, s: Tensor, u: U, noise: Noise
    ) -> State:
        x_s = super().step(denoiser, state, t, s, u, noise).x
        return State(x_s + 0.2 * denoiser.schedule(s)[1] * noise.normal(x_s))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("sampler", [NoSigma(64), TooNoisy(64)], ids=named)
def test_a_broken_sampler_is_seen(
    sampler: Sampler, schedule: Schedule, mixture: GaussianMixture
) -> None:
    drawn = sampler(ScoreDenoiser(mixture, schedule), empty(N), None, Noise("draw"))
    distance = energy_distance(drawn, exact(mixture, None, N, "truth"))
    assert distance > 5 * FLOORS * floor(mixture, None, N)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_orders(schedule: Schedule, mixture: GaussianMixture) -> None:
    """Halving the steps divides the error by 2 to the order."""
    denoiser, like = ScoreDenoiser(mixture, schedule), empty(64)

    def draw(sampler: Sampler) -> Tensor:
        return sampler(denoiser, like, None, Noise("orders"))

    truth = draw(UniPC(1025, order=3))  # its error is 2e-8; what differs from it by less than
    families = (  # that is of no family here
        (DDIM, 1, (64, 128, 256)),
        (Heun, 2, (32, 64, 128)),
        (DPMSolver, 2, (128, 256, 512)),
        (lambda n: UniPC(n, order=1), 2, (128, 256, 512)),
        (UniPC, 3, (256, 512)),
        (lambda n: UniPC(n, order=3), 4, (128, 256)),
        (lambda n: Adaptive(1e-14, n), 3, (64, 128)),  # too small a tolerance: n − 1 equal steps
    )
    for family, order, counts in families:
        errors = [(draw(family(n + 1)) - truth).square().mean().sqrt() for n in counts]
        slopes = -torch.tensor(errors).log2().diff()
        # the next order's share at these steps, seen to fall as the steps grow
        assert (slopes - order).abs().max() < (0.4 if order == 4 else 0.25), (order, slopes)


class Impulses:
    """Noise whose k-th draw is 1 in row k and 0 in the others: what a sampler, linear on Gaussian
    data, makes of each of its numbers.
    """

    def __init__(self) -> None:
        self.drawn = 0

    def normal(self, like: Tensor) -> Tensor:
        drawn = torch.zeros_like(like)
        drawn[self.drawn] = 1
        self.drawn += 1
        return drawn


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_orders_in_law(schedule: Schedule) -> None:
    """The variance that a stochastic sampler draws from N(0, v), exactly: its error's order."""
    v = 0.2
    denoiser = ScoreDenoiser(GaussianMixture([[0.0]], [v**0.5], [1.0]), schedule)
    high, low = (schedule.ratio(one).item() ** 2 for one in times(1, 0))

    def error(sampler: Sampler, eta: float) -> float:
        noise: Noise = Impulses()  # type: ignore[assignment]
        drawn = sampler(denoiser, empty(sampler.steps + 1, 1), None, noise)
        # it starts with r_1² for v + r_1², of which the equation leaves this
        left = v * ((v + low) / (v + high)) ** (1 + eta**2)
        return abs(drawn.square().sum().item() / ((v + low - left) * (v / (v + low)) ** 2) - 1)

    families = (
        (lambda n: DDIM(n, eta=1.0), 1.0, 1),
        (lambda n: DPMSolver(n, eta=1.0), 1.0, 2),
        (lambda n: DPMSolver(n, eta=0.5), 0.5, 2),
        (lambda n: Heun(n, churn=8.0), 0.0, 2),
    )
    for family, eta, order in families:
        errors = torch.tensor([error(family(n + 1), eta) for n in (128, 256, 512)])
        # the next order's share; and what churn leaves of the start, less than the 1e-5 of η = 0
        assert (-errors.log2().diff() - order).abs().max() < 0.25, (order, errors)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_gaussian_data_has_a_closed_form_flow(schedule: Schedule) -> None:
    """On N(m, s² I) the flow keeps (x_t − α m) / √(α² s² + σ²), and D follows at t = 0."""
    m, std = torch.tensor([[0.8, -0.5]], dtype=torch.float64), 0.4
    denoiser = ScoreDenoiser(GaussianMixture(m, [std], [1.0]), schedule)
    like = empty(32)
    ends = [schedule(torch.tensor(t, dtype=torch.float64)) for t in (1.0, 0.0)]
    (alpha_1, sigma_1), (alpha_0, sigma_0) = ends
    z = sigma_1 * Noise("flow").normal(like) - alpha_1 * m
    z = z / torch.sqrt(alpha_1**2 * std**2 + sigma_1**2)
    # D of x_0 = α m + z √(α² s² + σ²) is m + z α s² / √(α² s² + σ²)
    expected = m + z * alpha_0 * std**2 / torch.sqrt(alpha_0**2 * std**2 + sigma_0**2)
    # the methods' own errors, 33 / N² and 4 / N at most: measured 2e-4 and 5e-3, and twice that
    for sampler, tolerance in (
        (Heun(401), 4e-4),
        (DPMSolver(401), 4e-4),
        (DDIM(801), 1e-2),
        (UniPC(201), 2e-4),  # measured 1e-4
        (Adaptive(1e-5, 200), 5e-5),  # measured 2.7 tolerances
    ):
        drawn = sampler(denoiser, like, None, Noise("flow"))
        assert (drawn - expected).abs().max() < tolerance


class Fixed:
    """A noise that is what it was told."""

    def __init__(self, value: float) -> None:
        self.value = value

    def normal(self, like: Tensor) -> Tensor:
        return torch.full_like(like, self.value)


class Known(Denoiser):
    """A denoiser that knows x."""

    def __init__(self, schedule: Schedule, x: float) -> None:
        super().__init__(schedule)
        self.x = x

    def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        return torch.full_like(x_t, self.x)


def coefficients(sampler: Sampler, schedule: Schedule, t: Tensor, s: Tensor) -> list[float]:
    """A step is a x_t + b x + c n when D = x: its a, b and c."""
    values = []
    for x_t, x, n in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        noise: Noise = Fixed(n)  # type: ignore[assignment]
        state = State(empty(1, 1) + x_t)
        values.append(sampler.step(Known(schedule, x), state, t, s, None, noise).x.item())
    return values


PAIRS = [(1.0, 0.97), (0.8, 0.3), (0.3, 0.29), (0.05, 0.0), (1.0, 0.0)]


def times(t: float, s: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(t, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)


@pytest.mark.parametrize(("t", "s"), PAIRS)
@pytest.mark.parametrize("schedule", [VP(), Cosine()], ids=named)
def test_ddim_with_eta_1_is_ddpm(schedule: Schedule, t: float, s: float) -> None:
    """Ho et al., equations (6) and (7), with ᾱ = α_t² and β the noise of the step s → t."""
    bar_t, bar_s = (schedule(v)[0].item() ** 2 for v in times(t, s))
    alpha = bar_t / bar_s
    beta = 1 - alpha
    a = math.sqrt(alpha) * (1 - bar_s) / (1 - bar_t)
    b = math.sqrt(bar_s) * beta / (1 - bar_t)
    variance = (1 - bar_s) / (1 - bar_t) * beta
    found = coefficients(DDIM(2, eta=1.0), schedule, *times(t, s))
    # 1 − ᾱ is formed here by subtraction: eps / 1e-6 at the clean end
    assert found == pytest.approx([a, b, math.sqrt(variance)], rel=1e-8)


@pytest.mark.parametrize(("t", "s"), PAIRS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_ddim_with_eta_1_is_the_posterior(schedule: Schedule, t: float, s: float) -> None:
    """x_s given x_t and x, under any schedule: the prior N(α_s x, σ_s²) times the likelihood of
    x_t = (α_t / α_s) x_s + noise, as a product of Gaussians.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([w.item() for w in schedule(v)] for v in times(t, s))
    gain = alpha_t / alpha_s
    fresh = sigma_t**2 - gain**2 * sigma_s**2  # the variance of the step s → t
    precision = 1 / sigma_s**2 + gain**2 / fresh
    expected = [gain / fresh / precision, alpha_s / sigma_s**2 / precision, precision**-0.5]
    found = coefficients(DDIM(2, eta=1.0), schedule, *times(t, s))
    assert found == pytest.approx(expected, rel=1e-8)  # eps, amplified by ratios of up to 1e6


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(("t", "s"), PAIRS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_every_eta_keeps_the_marginals(schedule: Schedule, t: float, s: float, eta: float) -> None:
    """From N(α_t x, σ_t²) to N(α_s x, σ_s²), with the fresh noise of Song et al., (16)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([w.item() for w in schedule(v)] for v in times(t, s))
    a, b, c = coefficients(DDIM(2, eta=eta), schedule, *times(t, s))
    assert a * alpha_t + b == pytest.approx(alpha_s, rel=1e-10)
    assert (a * sigma_t) ** 2 + c**2 == pytest.approx(sigma_s**2, rel=1e-10)
    ratio = sigma_s * alpha_t / (sigma_t * alpha_s)
    assert c == pytest.approx(eta * sigma_s * math.sqrt(1 - ratio**2), rel=1e-10, abs=1e-15)
    assert a > 0 or eta == 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_heun_step(schedule: Schedule, mixture: GaussianMixture) -> None:
    """Algorithm 1 of Karras et al. in y and r, with the score dy/dr = −r ∇ log p(y; r)."""
    t, s = times(0.6, 0.5)
    r_t, r_s = schedule.ratio(t), schedule.ratio(s)
    one = torch.ones((), dtype=torch.float64)
    y = r_t * Noise("heun").normal(empty(16))

    def slope(y: Tensor, r: Tensor) -> Tensor:
        return -r * mixture.diffuse(one, r).score(y)

    first = slope(y, r_t)
    second = slope(y + (r_s - r_t) * first, r_s)
    expected = y + (r_s - r_t) * (first + second) / 2
    denoiser = ScoreDenoiser(mixture, schedule)
    state = Heun(2).step(denoiser, State(schedule(t)[0] * y), t, s, None, Noise(0))
    assert torch.allclose(state.x, schedule(s)[0] * expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_few_heun_steps_do_not_overshoot(schedule: Schedule, mixture: GaussianMixture) -> None:
    """Where the noise falls more than tenfold in a step, the step is Euler's."""
    denoiser = ScoreDenoiser(mixture, schedule)
    truth = exact(mixture, None, N, "truth")
    for n in (2, 3, 4, 6, 8):
        heun, ddim = (
            sampler(denoiser, empty(N), None, Noise("few")) for sampler in (Heun(n), DDIM(n))
        )
        # without it up to 2000 at n = 2, and 8 at n = 4; the mixture reaches 1.3
        assert heun.abs().max() < 3
        assert energy_distance(heun, truth) < 3 * energy_distance(ddim, truth)  # at most 2.1
        if n < 4:
            assert torch.allclose(heun, ddim, rtol=1e-9, atol=1e-9)
    ratios = schedule.ratio(Heun().grid(schedule))
    assert (ratios[:-1] / ratios[1:]).max() < 9  # the default has no such step


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_long_steps_of_several_values_are_ddim(
    schedule: Schedule, mixture: GaussianMixture
) -> None:
    """Where the noise falls more than tenfold in a step, the values before say nothing of it."""
    denoiser = ScoreDenoiser(mixture, schedule)
    for family in (DPMSolver, UniPC, lambda n: UniPC(n, order=3)):
        for n in (3, 5, 8):
            drawn, ddim = (
                sampler(denoiser, empty(64), None, Noise("few"))
                for sampler in (family(n), DDIM(n))
            )
            assert torch.allclose(drawn, ddim, rtol=1e-9, atol=1e-9) == (n == 3)


def test_a_long_heun_step_on_a_gaussian() -> None:
    """D = y v / (v + r²) in closed form: Heun's factor at a ratio up to 10, Euler's above it."""
    schedule, v = VE(1e-3, 1e3), 1.0
    denoiser = ScoreDenoiser(GaussianMixture([[0.0]], [1.0]), schedule)
    for r_t, r_s in ((9.9, 1.0), (10.1, 1.0), (3e2, 1e-2)):
        t, s = (schedule.time(torch.tensor(r, dtype=torch.float64)) for r in (r_t, r_s))
        euler = (v + r_s * r_t) / (v + r_t**2)
        slopes = r_t / (v + r_t**2) + euler * r_s / (v + r_s**2)
        expected = euler if r_t > 10 * r_s else 1 - (r_t - r_s) * slopes / 2
        found = Heun().step(denoiser, State(empty(1, 1) + 1), t, s, None, Noise(0)).x.item()
        assert found == pytest.approx(expected, rel=1e-8)  # times are known to eps


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_dpm_solver_step(schedule: Schedule) -> None:
    """Algorithm 2 of Lu et al. for D = a + b λ, whose value in the middle of a step is known."""
    a, b = 0.3, -0.2

    class Straight(Denoiser):
        def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
            return torch.full_like(x_t, a) - b * self.schedule.ratio(t).log()

    solver, denoiser, noise = DPMSolver(4), Straight(schedule), Noise(0)
    t_before, t, s = (torch.tensor(v, dtype=torch.float64) for v in (0.7, 0.4, 0.2))
    first = solver.step(denoiser, State(empty(1, 1) + 0.6), t_before, t, None, noise)
    ddim = DDIM(4).step(denoiser, State(empty(1, 1) + 0.6), t_before, t, None, noise)
    second = solver.step(denoiser, first, t, s, None, noise)
    lambda_t, lambda_s = (-schedule.ratio(v).log() for v in (t, s))
    (_, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    middle = a + b * (lambda_t + lambda_s) / 2
    expected = sigma_s / sigma_t * ddim.x - alpha_s * torch.expm1(lambda_t - lambda_s) * middle
    # all to rounding; the first step has no line to continue
    assert torch.allclose(first.x, ddim.x, rtol=1e-12)
    assert torch.allclose(second.x, expected, rtol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_a_stochastic_dpm_solver_step(schedule: Schedule) -> None:
    """Lu et al.'s SDE-DPM-Solver++(2M) for D = a + b λ, whose middle value is known; its first
    step is DDPM's, and every η keeps the marginals of one x.
    """
    a, b, n = 0.3, -0.2, 0.7

    class Straight(Denoiser):
        def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
            return torch.full_like(x_t, a) - b * self.schedule.ratio(t).log()

    solver, noise = DPMSolver(4, eta=1.0), Fixed(n)
    t_before, t, s = (torch.tensor(v, dtype=torch.float64) for v in (0.7, 0.4, 0.2))
    first = State(empty(1, 1) + 0.6)
    first = solver.step(Straight(schedule), first, t_before, t, None, noise)  # type: ignore
    second = solver.step(Straight(schedule), first, t, s, None, noise)  # type: ignore
    lambda_t, lambda_s = (-schedule.ratio(v).log() for v in (t, s))
    (_, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    h = lambda_s - lambda_t
    expected = sigma_s / sigma_t * torch.exp(-h) * first.x
    expected = expected + alpha_s * (1 - torch.exp(-2 * h)) * (a + b * (lambda_t + lambda_s) / 2)
    expected = expected + sigma_s * torch.sqrt(1 - torch.exp(-2 * h)) * n
    assert torch.allclose(second.x, expected, rtol=1e-10)
    for pair in PAIRS:
        ddpm = coefficients(DDIM(2, eta=1.0), schedule, *times(*pair))
        assert coefficients(solver, schedule, *times(*pair)) == pytest.approx(ddpm, rel=1e-7)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            [w.item() for w in schedule(v)] for v in times(*pair)
        )
        for eta in (0.0, 0.5, 1.0):
            a_x, b_x, c_n = coefficients(DPMSolver(2, eta=eta), schedule, *times(*pair))
            assert a_x * alpha_t + b_x == pytest.approx(alpha_s, rel=1e-10)
            assert (a_x * sigma_t) ** 2 + c_n**2 == pytest.approx(sigma_s**2, rel=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_churn(schedule: Schedule, mixture: GaussianMixture) -> None:
    """Algorithm 2 of Karras et al.: to r̂ = (1 + γ) r by fresh noise, then Heun's step from r̂."""
    denoiser, (t, s) = ScoreDenoiser(mixture, schedule), times(0.6, 0.5)
    state = State(Noise("churn").normal(empty(16)))

    def step(sampler: Heun, n: float) -> Tensor:
        return sampler.step(denoiser, state, t, s, None, Fixed(n)).x  # type: ignore[arg-type]

    r = schedule.ratio(t)
    for churn, gamma in ((2.0, 0.2), (100.0, 2**0.5 - 1)):
        more = schedule.time((1 + gamma) * r)
        y = state.x / schedule(t)[0] + 1.1 * 0.3 * r * math.sqrt((1 + gamma) ** 2 - 1)
        noisy = State(schedule(more)[0] * y)
        expected = Heun(10).step(denoiser, noisy, more, s, None, Noise(0)).x
        # times are known to eps, at slopes of up to 1e3
        assert torch.allclose(step(Heun(10, churn=churn, inflate=1.1), 0.3), expected, rtol=1e-8)
    plain = step(Heun(10), 0.3)
    outside = step(Heun(10, churn=2.0, interval=(2 * r.item(), 1e9)), 0.3)
    assert torch.allclose(outside, plain, rtol=1e-12)
    assert not torch.allclose(step(Heun(10, churn=2.0, interval=(r.item() / 2, 1e9)), 0.3), plain)
    end = Heun(10, churn=5.0)._churned(schedule, state.x, times(1, 0)[0], Noise(0))
    assert torch.equal(end[1], times(1, 0)[0]) and torch.allclose(end[0], state.x, rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_unipc_step(schedule: Schedule) -> None:
    """Of D = a + b λ + c λ² three values say all: from the third on a step is its integral, and
    so is a correction by three.
    """

    def d(place: float) -> float:
        return 0.3 - 0.2 * place + 0.05 * place**2

    class Bent(Denoiser):
        def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
            return torch.full_like(x_t, d(-self.schedule.ratio(t).log().item()))

    def exact(y: Tensor, t: Tensor, s: Tensor) -> Tensor:
        start, end = (-schedule.ratio(v).log().item() for v in (t, s))
        more, _ = quad(lambda v: math.exp(v - end) * d(v), start, end, epsabs=0, epsrel=1e-13)
        return math.exp(start - end) * y + more

    grid = [torch.tensor(v, dtype=torch.float64) for v in (0.8, 0.65, 0.5, 0.3, 0.1)]
    for order in (2, 3):
        solver, state = UniPC(5, order=order), State(empty(1, 1) + 0.6)
        states = []
        for t, s in zip(grid[:-1], grid[1:], strict=True):
            state = solver.step(Bent(schedule), state, t, s, None, Noise(0))
            states.append(state)
        ddim = DDIM(4).step(Bent(schedule), State(empty(1, 1) + 0.6), *grid[:2], None, Noise(0))
        assert torch.allclose(states[0].x, ddim.x, rtol=1e-12)
        for i in (2, 3):
            corrected, before = states[i].memory[0], states[i - 1].memory[0]
            # Gauss's rule and quad: 1e-11
            assert torch.allclose(corrected, exact(before, *grid[i - 1 : i + 1]), rtol=1e-9)
            ahead = exact(corrected, *grid[i : i + 2]) * schedule(grid[i + 1])[0]
            assert torch.allclose(states[i].x, ahead, rtol=1e-9) == (order == 3)


def test_adaptive_step(mixture: GaussianMixture) -> None:
    """Bogacki and Shampine's tableau, by scipy's; of the third order and the error."""
    schedule = VE(0.01, 10.0)
    denoiser = ScoreDenoiser(mixture, schedule)
    sampler, (t, s) = Adaptive(1e9, 2), times(1, 0)
    start = sampler.init(denoiser, empty(4), t, None, Noise("tableau"))
    y, k, last, left, h, tries = start.memory
    assert tries == 1 and torch.allclose(h, left / 8)
    near = (y, k, last, torch.full_like(left, 0.5), h * 0 + 0.5, 1)
    y_0 = 0.01 * math.exp(0.5) * Noise("near").normal(empty(4))

    def f(r: float, y: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(y).reshape(4, 2)
        when = schedule.time(torch.tensor(r, dtype=torch.float64))
        return ((x - denoiser(x, when)) / r).flatten().numpy()

    from scipy.integrate._ivp.rk import RK23, rk_step

    r, r_s = 0.01 * math.exp(0.5), 0.01
    flat = y_0.flatten().numpy()
    stages = np.empty((4, 8))
    new, slope = rk_step(f, r, flat, f(r, flat), r_s - r, RK23.A, RK23.B, RK23.C, stages)
    k_1 = torch.from_numpy(f(r, flat)).reshape(4, 2)
    near = (y_0, k_1, last, left * 0 + 0.5, h * 0 + 0.5, 1)
    state = sampler.step(denoiser, State(y_0, near), t, s, None, Noise(0))
    assert torch.allclose(state.x.flatten(), torch.from_numpy(new), rtol=1e-9)
    assert torch.allclose(state.memory[1].flatten(), torch.from_numpy(slope), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_adaptive_keeps_its_tolerance(schedule: Schedule, mixture: GaussianMixture) -> None:
    """The error falls with the tolerance, at a cost that grows by its third root about."""
    truth = UniPC(257, order=3)(ScoreDenoiser(mixture, schedule), empty(64), None, Noise("far"))
    errors, costs = [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        counter = Counter(ScoreDenoiser(mixture, schedule))
        sampler = Adaptive(tolerance, 400)
        drawn = sampler(counter, empty(64), None, Noise("far"))
        errors.append((drawn - truth).square().mean().sqrt().item())
        costs.append(len(counter.times))
        assert len(counter.times) < sampler.evaluations and counter.times[-1] < 1e-12
    # measured: errors of 2 to 3, of 2 to 20 and of 3 to 5 tolerances
    assert errors[0] < 0.05 and errors[1] < 2.5e-3 and errors[2] < 2e-5, errors
    assert costs[0] < 70 and 1.5 < costs[1] / costs[0] < 4.7 and 2 < costs[2] / costs[1] < 4.7


def test_adaptive_tries_again(mixture: GaussianMixture) -> None:
    """A step that errs too much is not taken, and the next is shorter; the last try arrives."""
    denoiser, (t, s) = ScoreDenoiser(mixture, VP()), times(1, 0)
    sampler = Adaptive(1e-6, 40)
    state = sampler.init(denoiser, empty(4), t, None, Noise(0))
    *rest, left, h, tries = state.memory
    long = State(state.x, (*rest, left, left.clone(), tries))
    tried = sampler.step(denoiser, long, t, s, None, Noise(0))
    assert torch.allclose(tried.x, state.x, rtol=1e-12) and torch.equal(tried.memory[3], left)
    assert torch.allclose(tried.memory[4], 0.2 * left)
    forced = State(state.x, (*rest, left, h, 1))
    assert (sampler.step(denoiser, forced, t, s, None, Noise(0)).memory[3] == 0).all()


def same_ends() -> list[Schedule]:
    """Four schedules whose noise ratios run from 0.01 to 100."""
    low, high = 0.01, 100.0
    beta_min, total = 0.1, math.log1p(high**2)
    beta_max = 2 * total - beta_min
    slope = (beta_max - beta_min) / 2
    start = math.log1p(low**2)
    clip = (math.sqrt(beta_min**2 + 4 * slope * start) - beta_min) / (2 * slope)
    return [
        VE(low, high),
        Cosine(math.atan(low)),
        Rectified(low / (1 + low)),
        VP(beta_min, beta_max, clip),
    ]


@pytest.mark.parametrize("schedule", same_ends()[1:], ids=named)
@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(16),
        DDIM(16, eta=1.0),
        DDIM(16, eta=0.5, rho=3.0),
        Heun(16),
        Heun(16, churn=4.0),
        DPMSolver(16),
        DPMSolver(16, eta=1.0),
        UniPC(16),
        UniPC(16, order=3),
        Adaptive(),
        *WALKERS,
    ],
    ids=named,
)
def test_sampling_does_not_depend_on_the_schedule(
    sampler: Sampler, schedule: Schedule, mixture: GaussianMixture
) -> None:
    reference = same_ends()[0]
    assert torch.allclose(schedule.ratio(times(0, 1)[0]), torch.tensor(0.01).double(), rtol=1e-6)
    u = onehot(1, 32)
    for condition in (None, u):
        draws = [
            sampler(ScoreDenoiser(mixture, s), empty(32), condition, Noise("same"))
            for s in (reference, schedule)
        ]
        # times are known to eps and the flow of a mixture may part two paths a thousandfold
        assert torch.allclose(*draws, rtol=1e-8, atol=1e-8)


class Counter(Denoiser):
    """Counts what is asked of a denoiser, or of the law it gives."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner.schedule)
        self.inner, self.times = inner, []

    def count(self, t: Tensor, u: U) -> None:
        assert t.ndim <= 1  # one for all, or of each row
        self.times.append(t.max().item())
        self.u = u

    def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        assert t.dtype == x_t.dtype
        self.count(t, u)
        return self.inner(x_t, t, u)

    def at(self, t: Tensor, u: U = None) -> Target:
        counter, law = self, self.inner.at(t, u)

        class Counted(Target):
            def score(self, x: Tensor) -> Tensor:
                return self.log_prob_and_score(x)[1]

            def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
                assert t.dtype == x.dtype
                counter.count(t, u)
                return law.log_prob_and_score(x)

        return Counted()


ONCE = [
    DDIM(1),
    DDIM(9, eta=1.0),
    Heun(1),
    Heun(9),
    Heun(9, churn=4.0),
    DPMSolver(9),
    DPMSolver(9, eta=1.0),
    UniPC(1),
    UniPC(9),
    Adaptive(steps=1),
    Adaptive(1e-9, steps=9),
]


@pytest.mark.parametrize("sampler", [*ONCE, *WALKERS], ids=named)
def test_evaluations_are_counted(sampler: Sampler, mixture: GaussianMixture) -> None:
    counter, progress = Counter(ScoreDenoiser(mixture, Cosine())), []
    u = onehot(0, 4)
    drawn = sampler(counter, empty(4), u, Noise(0), progress.append)
    r = Cosine().ratio(sampler.grid(Cosine()))
    saved = (r[:-1] > 10 * r[1:]).sum() if isinstance(sampler, Heun) else 0  # a long step's second
    assert len(counter.times) == sampler.evaluations - saved
    assert len(progress) == sampler.steps and progress[-1].x is drawn
    assert counter.u is u and drawn.shape == (4, 2) and not drawn.requires_grad
    if not isinstance(sampler, Langevin):
        assert counter.times[0] == 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("family", [DDIM, Heun, DPMSolver, UniPC, Adaptive])
def test_one_step_is_the_mean_at_the_noise_end(
    family: type[DDIM | Heun | DPMSolver | UniPC | Adaptive],
    schedule: Schedule,
    mixture: GaussianMixture,
) -> None:
    denoiser = ScoreDenoiser(mixture, schedule)
    drawn = family(steps=1)(denoiser, empty(8), None, Noise("one"))
    t = torch.ones((), dtype=torch.float64)
    expected = denoiser(schedule(t)[1] * Noise("one").normal(empty(8)), t)
    if family is Adaptive:  # it keeps the slope (y − D) / r: eps times r
        assert torch.allclose(drawn, expected, atol=1e-11)
    else:
        assert torch.equal(drawn, expected)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_the_last_step_is_the_mean_at_the_data_end(
    schedule: Schedule, mixture: GaussianMixture
) -> None:
    counter = Counter(ScoreDenoiser(mixture, schedule))
    sampler, noise = DDIM(2), Noise("two")
    t, s = times(1.0, 0.0)
    start = sampler.init(counter, empty(8), t, None, noise)
    x_s = sampler.step(counter, start, t, s, None, noise).x
    drawn = sampler(counter, empty(8), None, Noise("two"))
    assert torch.equal(drawn, counter.inner(x_s, s))
    assert counter.times[-1] == 0


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_grid(schedule: Schedule, rho: float) -> None:
    n = 10
    t = DDIM(n, rho=rho).grid(schedule)
    assert t.dtype == torch.float64 and t[0] == 1 and t[-1] == 0 and (t.diff() < 0).all()
    high, low = (schedule.ratio(v).item() for v in times(1, 0))
    for i in range(n):  # Karras et al., equation (5)
        a, b = high ** (1 / rho), low ** (1 / rho)
        expected = (a + i / (n - 1) * (b - a)) ** rho
        # rounding of ρ-th powers, and of a time near 1 whose ratio moves 1e3 times as fast
        assert schedule.ratio(t[i]).item() == pytest.approx(expected, rel=1e-9)
    assert DDIM(1).grid(schedule).tolist() == [1]
    assert Heun(2).grid(schedule).tolist() == [1, 0]
    assert DDIM(5).grid(schedule).equal(DDIM(5, rho=7.0).grid(schedule))  # the default


SHORT = [
    DDIM(8),
    DDIM(8, eta=1.0),
    Heun(8),
    Heun(8, churn=4.0),
    DPMSolver(8),
    DPMSolver(8, eta=1.0),
    UniPC(8),
    Adaptive(),
]


@pytest.mark.parametrize("sampler", [*SHORT, *WALKERS], ids=named)
def test_a_picture_is_the_same_in_any_company(sampler: Sampler, mixture: GaussianMixture) -> None:
    denoiser = ScoreDenoiser(mixture, VP())

    def draw(*seeds: int) -> Tensor:
        u = Condition.stack([onehot(seed % 3, 1) for seed in seeds])
        return sampler(denoiser, empty(len(seeds)), u, PictureNoise(seeds))

    alone = draw(7)[0]
    for seeds in ((7, 1, 2), (1, 2, 3, 4, 7), (5, 7)):
        # sums over rows may be vectorised otherwise: some eps, amplified on the way
        assert torch.allclose(draw(*seeds)[seeds.index(7)], alone, rtol=1e-9, atol=1e-11)
    assert torch.equal(draw(3, 7), draw(3, 7))
    assert not torch.allclose(draw(8)[0], alone, rtol=1e-3)


def test_float32_stays_float32(mixture: GaussianMixture) -> None:
    ours = [DDIM(32), DDIM(32, eta=1.0), Heun(16), Heun(32, churn=8.0), DPMSolver(32)]
    ours += [DPMSolver(48, eta=1.0), UniPC(32), UniPC(32, order=3), Adaptive()]
    for sampler in (*ours, *WALKERS):
        for schedule in SCHEDULES:
            denoiser = ScoreDenoiser(mixture, schedule)
            drawn = sampler(denoiser, empty(64).float(), None, Noise("f32"))
            assert drawn.dtype == torch.float32 and drawn.isfinite().all()
            # the law's own reach: its means and 4 of its widths
            assert sampler in WALKERS or drawn.abs().max() < 2


@pytest.mark.parametrize("make", [lambda: DDIM(0), lambda: Heun(-1), lambda: Heun(4, rho=0.0)])
def test_bad_steps(make: object) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_bad_eta(eta: float) -> None:
    for family in (DDIM, DPMSolver):
        with pytest.raises(ValueError, match="eta"):
            family(4, eta=eta)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Heun(4, churn=-1.0), "churn = -1.0"),
        (lambda: Heun(4, inflate=0.0), "inflate = 0.0"),
        (lambda: Heun(4, churn=1.0, interval=[2.0, 1.0]), r"interval = \[2.0, 1.0\]"),
        (lambda: UniPC(4, order=0), "order = 0"),
        (lambda: Adaptive(tolerance=0.0), "tolerance = 0.0"),
    ],
)
def test_bad_arguments(make: Callable[[], Sampler], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()
