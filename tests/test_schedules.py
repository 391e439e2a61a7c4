"""The schedules against their definitions, and their inverse."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chi2, kstest, norm
from torch import Tensor

from pipeline.noise import Noise
from pipeline.schedules import VE, VP, Cosine, DiscreteVP, Rectified, Schedule, expand_as_batch

SCHEDULES = [
    VP(),
    VP(0.5, 12.0, 1e-2),
    Cosine(),
    Cosine(0.05),
    VE(),
    VE(0.1, 3.0),
    Rectified(),
    Rectified(0.1),
    DiscreteVP(),
    DiscreteVP(10, 0.01, 0.5),
]
DEFAULTS = [VP(), Cosine(), VE(), Rectified(), DiscreteVP()]
T = torch.linspace(0, 1, 1001, dtype=torch.float64)
EPS = torch.finfo(torch.float64).eps


def named(schedule: Schedule) -> str:
    numbers = tuple(value for name, value in vars(schedule).items() if name[0] != "_")
    return f"{type(schedule).__name__}{numbers}"


@pytest.mark.parametrize(("low", "high", "clip"), [(0.1, 20.0, 1e-4), (0.5, 12.0, 0.01)])
def test_vp_is_the_integral_of_beta(low: float, high: float, clip: float) -> None:
    schedule = VP(low, high, clip)
    for t in (0.0, 0.01, 0.2, 0.5, 0.9, 1.0):
        end = clip + (1 - clip) * t
        integral, _ = quad(lambda r: low + (high - low) * r, 0, end, epsabs=0, epsrel=1e-13)
        alpha_t, sigma_t = schedule(torch.tensor(t, dtype=torch.float64))
        # quad's own error 1e-13, times an integral of up to 10
        assert alpha_t.item() == pytest.approx(math.exp(-integral / 2), rel=1e-11)
        assert sigma_t.item() == pytest.approx(math.sqrt(-math.expm1(-integral)), rel=1e-11)


def test_vp_is_the_limit_of_the_random_walk() -> None:
    """Equation (7): x_k = √(1 − β_k) x_{k−1} + √β_k n, with β_k = β(r_k) / N and N → ∞."""
    schedule = VP(0.1, 20.0)
    alpha_t, sigma_t = schedule(torch.tensor(1.0, dtype=torch.float64))
    errors = []
    for n in (20_000, 40_000):
        r = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        beta = (0.1 + 19.9 * r) / n
        walked = torch.log1p(-beta).cumsum(0)  # of α_k² = ∏ (1 − β_j)
        # the walk's own σ²: the noise of step k shrinks by the (1 − β) of the later steps
        variance = (beta * torch.exp(walked[-1] - walked)).sum()
        assert variance.item() == pytest.approx(-math.expm1(walked[-1].item()), rel=1e-10)
        assert variance.item() == pytest.approx(sigma_t.item() ** 2, abs=1e-6)
        errors.append((2 * alpha_t.log() - walked[-1]).item())
    # log(1 − β/N) = −β/N − β²/2N² …: the sum is off by ∫β²/2N = 67/N, here 0.0034, then half of it
    bound = (0.1**2 + 0.1 * 20 + 20**2) / 3 / 2 / 20_000
    assert errors[0] == pytest.approx(bound, rel=0.01)  # the next term is β/N = 0.1% of it
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.01)


WALKS = [(1000, 1e-4, 0.02), (10, 0.01, 0.5)]


def walk(steps: int, low: float, high: float) -> list[float]:
    return [low + (high - low) * k / (steps - 1) for k in range(steps)]


@pytest.mark.parametrize(("steps", "low", "high"), WALKS)
def test_discrete_vp_is_the_random_walk(steps: int, low: float, high: float) -> None:
    """Equation (7) step by step: what one step does to a mean and to a variance, K times."""
    schedule, mean, variance = DiscreteVP(steps, low, high), 1.0, 0.0
    for k, beta in enumerate(walk(steps, low, high)):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        t = torch.tensor(k / (steps - 1), dtype=torch.float64)
        alpha_t, sigma_t = schedule(t)
        # K roundings of factors near 1, and that of t, which the slope of log α² carries on
        assert alpha_t.item() == pytest.approx(mean, rel=1e-11)
        assert sigma_t.item() ** 2 == pytest.approx(variance, rel=1e-11)
        assert schedule.time(schedule.ratio(t)).item() == pytest.approx(t.item(), abs=1e-13)
        if k:  # and the step between them: α_k / α_{k−1} = √(1 − β_k)
            before = schedule(t - 1 / (steps - 1))[0]
            assert (alpha_t / before).item() == pytest.approx(math.sqrt(1 - beta), rel=1e-11)
    assert alpha_t.item() == pytest.approx(schedule(T[-1])[0].item(), rel=1e-14)


@pytest.mark.parametrize(("steps", "low", "high"), WALKS)
def test_the_random_walk_has_the_law_of_discrete_vp(steps: int, low: float, high: float) -> None:
    """Equation (7) drawn: x_k is normal with the mean α_k x and the variance σ_k²."""
    n, noise, schedule, tests = 4096, Noise("walk"), DiscreteVP(steps, low, high), []
    x_0 = 0.7
    x = torch.full((n,), x_0, dtype=torch.float64)
    for k, beta in enumerate(walk(steps, low, high)):
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * noise.normal(x)
        if k + 1 in (1, 10, 100, 1000):
            alpha_t, sigma_t = schedule(torch.tensor(k / (steps - 1), dtype=torch.float64))
            z = ((x - alpha_t * x_0) / sigma_t).numpy()
            total = (z**2).sum()
            tests += [
                2 * norm.sf(abs(z.mean()) * n**0.5),
                2 * min(chi2.sf(total, n), chi2.cdf(total, n)),
                kstest(z, "norm").pvalue,
            ]
    # at most 12 tests: all hold but in one of a thousand seeds. 1 % too much variance is p = 0.65,
    # 10 % is 1e-5; the steps themselves are compared above, to 1e-11
    assert min(tests) > 1e-3 / len(tests), tests


def written(schedule: Schedule, t: float) -> tuple[float, float]:
    """α_t and σ_t of the three schedules without an integral, from their papers."""
    if isinstance(schedule, Cosine):
        angle = schedule.clip * (1 - t) + (math.pi / 2 - schedule.clip) * t
        return math.cos(angle), math.cos(math.pi / 2 - angle)
    if isinstance(schedule, VE):
        return 1.0, schedule.sigma_min * (schedule.sigma_max / schedule.sigma_min) ** t
    assert isinstance(schedule, Rectified)
    sigma_t = schedule.clip * (1 - t) + (1 - schedule.clip) * t
    return 1 - sigma_t, sigma_t


@pytest.mark.parametrize("schedule", SCHEDULES[2:8], ids=named)
def test_definitions(schedule: Schedule) -> None:
    for t in (0.0, 0.003, 0.25, 0.5, 0.8, 1.0):
        alpha_t, sigma_t = schedule(torch.tensor(t, dtype=torch.float64))
        alpha, sigma = written(schedule, t)
        # rounding of a scale near 1 seen at the least scale, 1e-3: 1e3 eps, and some room
        assert alpha_t.item() == pytest.approx(alpha, rel=1e-12)
        assert sigma_t.item() == pytest.approx(sigma, rel=1e-12)


def test_default_ends() -> None:
    """What every saved model was trained with: a changed default would change it silently."""
    ends = {
        VP: (math.sqrt(0.1e-4 + 9.95e-8), math.exp(-(0.1 + 20) / 4)),
        Cosine: (math.sin(1e-3), math.sin(1e-3)),
        VE: (2e-3, 1.0),
        Rectified: (1e-3, 1e-3),
        DiscreteVP: (1e-2, math.sqrt(math.prod(1 - beta for beta in walk(*WALKS[0])))),
    }
    for family, (sigma_0, alpha_1) in ends.items():
        schedule = family()
        assert schedule(T[0])[1].item() == pytest.approx(sigma_0, rel=1e-5)  # σ² ≈ the integral
        assert schedule(T[-1])[0].item() == pytest.approx(alpha_1, rel=1e-12)
    assert VE()(T[-1])[1].item() == pytest.approx(80, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES[:4] + SCHEDULES[8:], ids=named)
def test_variance_is_preserved(schedule: Schedule) -> None:
    alpha_t, sigma_t = schedule(T)
    assert (alpha_t**2 + sigma_t**2 - 1).abs().max() < 8 * EPS  # two squares, two roundings each


@pytest.mark.parametrize("schedule", SCHEDULES[6:8], ids=named)
def test_the_straight_path_adds_to_one(schedule: Schedule) -> None:
    alpha_t, sigma_t = schedule(T)
    assert (alpha_t + sigma_t - 1).abs().max() < 4 * EPS


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_ratio_increases_and_ends_are_clipped(schedule: Schedule) -> None:
    for t in (T, T.float()):
        alpha_t, sigma_t = schedule(t)
        assert (alpha_t > 0).all() and (sigma_t > 0).all()
        ratio = schedule.ratio(t)
        assert torch.equal(ratio, sigma_t / alpha_t)
        assert (ratio.diff() > 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_time_inverts_ratio(schedule: Schedule) -> None:
    t = schedule.time(schedule.ratio(T))
    assert (t - T).abs().max() < 1e-12  # measured 3e-15; VP's slope in t may cost a factor 100
    r = torch.logspace(*schedule.ratio(T[[0, -1]]).log10().tolist(), 501, dtype=torch.float64)
    # a time near 1 is known to eps, and the ratio moves 1e3 / clip times as fast as t
    assert (schedule.ratio(schedule.time(r)) / r - 1).abs().max() < 1e-9


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_float32_keeps_its_digits(schedule: Schedule) -> None:
    """The accuracy networks and samplers see: 1e-6 in t, 1e-4 in the scales at their least."""
    t = T.float()
    assert (schedule.time(schedule.ratio(t)) - t).abs().max() < 2e-6  # 16 float32 eps
    for scale, exact in zip(schedule(t), schedule(t.double()), strict=True):
        # Cosine is the worst: cos near π/2 is 1e-3 with an absolute error of 1e-7
        tolerance = 2e-4 if isinstance(schedule, Cosine) else 4e-6
        assert (scale / exact - 1).abs().max() < tolerance


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_a_ratio_out_of_range_gives_the_nearest_end(schedule: Schedule) -> None:
    low, high = schedule.ratio(T[[0, -1]])
    ratio = torch.stack((low / 100, low / 1.01, high * 1.01, high * 100))
    assert schedule.time(ratio).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("schedule", DEFAULTS, ids=named)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_any_shape(schedule: Schedule, shape: tuple[int, ...]) -> None:
    t = torch.full(shape, 0.3)
    for z in (*schedule(t), schedule.ratio(t), schedule.time(t)):
        assert z.shape == shape and z.dtype == torch.float32


@pytest.mark.parametrize(
    "make",
    [
        lambda: VP(0.0, 20.0),
        lambda: VP(20.0, 0.1),
        lambda: VP(clip=0.0),
        lambda: VP(clip=1.0),
        lambda: Cosine(0.0),
        lambda: Cosine(1.0),
        lambda: VE(0.0, 1.0),
        lambda: VE(2.0, 1.0),
        lambda: VE(float("nan"), 1.0),
        lambda: Rectified(0.0),
        lambda: Rectified(0.5),
        lambda: DiscreteVP(1),
        lambda: DiscreteVP(beta_min=0.0),
        lambda: DiscreteVP(beta_min=0.02, beta_max=0.01),
        lambda: DiscreteVP(beta_max=1.0),
    ],
)
def test_bad_arguments(make: Callable[[], Schedule]) -> None:
    with pytest.raises(ValueError, match="must satisfy"):
        make()


@pytest.mark.parametrize("x", [torch.zeros(4, 2), torch.zeros(4, 3, 8, 8)])
def test_expand_as_batch(x: Tensor) -> None:
    scale = torch.arange(4.0)
    scaled = expand_as_batch(scale, x) * (x + 1)
    assert scaled.shape == x.shape
    assert torch.equal(scaled.flatten(1).mean(dim=1), scale)  # row i times number i
    assert (expand_as_batch(torch.tensor(2.0), x) * (x + 1)).eq(2).all()
