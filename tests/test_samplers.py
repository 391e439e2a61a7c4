"""Samplers on laws whose denoiser is exact: the law they reach, their orders, their invariance."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.condition import Condition, U
from pipeline.denoisers import Denoiser, ScoreDenoiser
from pipeline.mcmc import HMC, MALA, ULA, GaussianMixture, HalfDenoising, Target
from pipeline.noise import Noise, PictureNoise
from pipeline.samplers import (
    DDIM,
    AnnealedLangevin,
    DPMSolver,
    Heun,
    Langevin,
    PredictorCorrector,
    Sampler,
    State,
)
from pipeline.schedules import VE, VP, Cosine, Rectified, Schedule

SCHEDULES = [VP(), Cosine(), VE(), Rectified()]
SAMPLERS = [
    DDIM(64),
    DDIM(256, eta=1.0),
    Heun(32),
    DPMSolver(48),
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


def floor(mixture: GaussianMixture, k: int | None, n: int) -> float:
    """The scale of the distance between two exact samples: its root mean square."""
    pairs = [
        energy_distance(*(exact(mixture, k, n, i, side) for side in "ab")) ** 2 for i in range(8)
    ]
    return math.sqrt(sum(pairs) / len(pairs))


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
    """Halving the steps halves DDIM's error and quarters Heun's and DPM-Solver's."""
    denoiser, like = ScoreDenoiser(mixture, schedule), empty(64)

    def draw(sampler: Sampler) -> Tensor:
        return sampler(denoiser, like, None, Noise("orders"))

    truth = draw(Heun(1025))
    families = (
        (DDIM, 1, (64, 128, 256)),
        (Heun, 2, (32, 64, 128)),
        (DPMSolver, 2, (128, 256, 512)),
    )
    for family, order, counts in families:
        errors = [(draw(family(n + 1)) - truth).square().mean().sqrt() for n in counts]
        slopes = -torch.tensor(errors).log2().diff()
        # 0.25: the next order's share at these steps, seen to fall as the steps grow
        assert (slopes - order).abs().max() < 0.25, slopes


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
    for sampler, tolerance in ((Heun(401), 4e-4), (DPMSolver(401), 4e-4), (DDIM(801), 1e-2)):
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
    t_before, t, s = (torch.tensor(v, dtype=torch.float64) for v in (0.7, 0.4, 0.15))
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
    [DDIM(16), DDIM(16, eta=1.0), DDIM(16, eta=0.5, rho=3.0), Heun(16), DPMSolver(16), *WALKERS],
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
        assert t.shape == ()
        self.times.append(t.item())
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


ONCE = [DDIM(1), DDIM(9, eta=1.0), Heun(1), Heun(9), DPMSolver(9)]


@pytest.mark.parametrize("sampler", [*ONCE, *WALKERS], ids=named)
def test_evaluations_are_counted(sampler: Sampler, mixture: GaussianMixture) -> None:
    counter, progress = Counter(ScoreDenoiser(mixture, Cosine())), []
    u = onehot(0, 4)
    drawn = sampler(counter, empty(4), u, Noise(0), progress.append)
    assert len(counter.times) == sampler.evaluations
    assert len(progress) == sampler.steps and progress[-1].x is drawn
    assert counter.u is u and drawn.shape == (4, 2) and not drawn.requires_grad
    if not isinstance(sampler, Langevin):
        assert counter.times[0] == 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("family", [DDIM, Heun, DPMSolver])
def test_one_step_is_the_mean_at_the_noise_end(
    family: type[DDIM | Heun | DPMSolver], schedule: Schedule, mixture: GaussianMixture
) -> None:
    denoiser = ScoreDenoiser(mixture, schedule)
    drawn = family(steps=1)(denoiser, empty(8), None, Noise("one"))
    t = torch.ones((), dtype=torch.float64)
    assert torch.equal(drawn, denoiser(schedule(t)[1] * Noise("one").normal(empty(8)), t))


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


@pytest.mark.parametrize(
    "sampler", [DDIM(8), DDIM(8, eta=1.0), Heun(8), DPMSolver(8), *WALKERS], ids=named
)
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
    for sampler in (DDIM(32), DDIM(32, eta=1.0), Heun(16), DPMSolver(32), *WALKERS):
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
    with pytest.raises(ValueError, match="eta"):
        DDIM(4, eta=eta)
