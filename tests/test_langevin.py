"""Walks with a score: where they stand still, in closed form; and the score they are given."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from energies import normal_energy
from torch import Tensor

from pipeline.building import brief
from pipeline.codec import Columns
from pipeline.condition import Condition, U
from pipeline.denoisers import Denoiser, Extrapolated, ScoreDenoiser
from pipeline.errors import UserError
from pipeline.generator import Bar, Generator
from pipeline.guidance import ClassifierFree
from pipeline.mcmc import HMC, MALA, NUTS, ULA, GaussianMixture, HalfDenoising, Kernel
from pipeline.noise import Noise, PictureNoise
from pipeline.samplers import AnnealedLangevin, Langevin, PredictorCorrector, Sampler, State
from pipeline.schedules import VE, VP, Cosine, Rectified, Schedule

SCHEDULES = [VP(), Cosine(), VE(), Rectified()]
NORMAL = GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), [1.0])


def named(thing: object) -> str:
    return type(thing).__name__


def empty(n: int, dim: int = 2) -> Tensor:
    return torch.zeros(n, dim, dtype=torch.float64)


def onehot(k: int, n: int) -> Condition:
    return Condition(torch.eye(3, dtype=torch.float64)[k].expand(n, 1, 3))


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


class Told(Noise):
    """A noise that is what it was told, call by call."""

    def __init__(self, *values: float) -> None:
        self.values: Iterator[float] = iter(values)

    def normal(self, like: Tensor) -> Tensor:
        return torch.full_like(like, next(self.values))


class Plain(Denoiser):
    """The exact mean, and nothing else: no density."""

    def __init__(self, law: GaussianMixture, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.exact = ScoreDenoiser(law, schedule)

    def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        return self.exact(x_t, t, u)


# --- the extrapolated score -------------------------------------------------------------------


class Polynomial(Denoiser):
    """A denoiser whose score of y is the polynomial Σ_i c_i s²ⁱ y at noise ratio s."""

    def __init__(self, schedule: Schedule, coefficients: Sequence[float]) -> None:
        super().__init__(schedule)
        self.coefficients = coefficients

    def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        square = self.schedule.ratio(t) ** 2
        phi = sum(c * square**i for i, c in enumerate(self.coefficients))
        return (1 + square * phi) * x_t / self.schedule(t)[0]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("ratios", [[0.3], [0.3, 0.6], [0.8, 0.2], [0.2, 0.5, 0.4]])
def test_extrapolation_is_exact_on_polynomials(schedule: Schedule, ratios: list[float]) -> None:
    y = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    law = Extrapolated(Polynomial(schedule, [-0.7, 1.9, -0.4][: len(ratios)]), ratios)
    # D cancels to s² φ: eps / 0.04, times weights of up to 7
    assert torch.allclose(law.score(y), -0.7 * y, rtol=1e-10)
    # one power more is missed by (−1)^(K − 1) Π s_k², the remainder of the interpolation at zero
    more = Extrapolated(Polynomial(schedule, [0.0] * len(ratios) + [1.0]), ratios)
    missed = (-1) ** (len(ratios) - 1) * math.prod(ratios) ** 2
    assert torch.allclose(more.score(y), missed * y, rtol=1e-10)


def test_two_ratios_are_the_formula(mixture: GaussianMixture) -> None:
    denoiser, y, u = ScoreDenoiser(mixture, Cosine()), Noise("y").normal(empty(16)), onehot(1, 16)
    one, two = (mixture.diffuse(f64(1.0), f64(s), u).score(y) for s in (0.5, 1.0))
    expected = (1.0 * one - 0.25 * two) / (1.0 - 0.25)
    assert torch.allclose(Extrapolated(denoiser, [0.5, 1.0], u).score(y), expected, rtol=1e-10)


def test_extrapolation_has_the_order_of_its_ratios(mixture: GaussianMixture) -> None:
    denoiser, (y, _) = ScoreDenoiser(mixture, VE()), mixture.sample(Noise("order"), 256)

    def error(*ratios: float) -> float:
        return (Extrapolated(denoiser, ratios).score(y) - mixture.score(y)).abs().mean().item()

    for k in (1, 2, 3):
        errors = [error(*(h * (1 + i) for i in range(k))) for h in (0.01, 0.005)]
        # halving all ratios divides the error by 4^K, up to the next order's 10% at these
        assert math.log2(errors[0] / errors[1]) == pytest.approx(2 * k, abs=0.15)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_extrapolated_density_has_the_extrapolated_score(
    schedule: Schedule, mixture: GaussianMixture
) -> None:
    law = Extrapolated(ScoreDenoiser(mixture, schedule), [0.2, 0.3, 0.5], onehot(0, 8))
    y = Noise("y").normal(empty(8)).requires_grad_()
    (slope,) = torch.autograd.grad(law.log_prob(y).sum(), y)
    log_prob, score = law.log_prob_and_score(y)
    assert torch.allclose(slope, law.score(y), rtol=1e-9)
    assert torch.equal(score, law.score(y)) and torch.equal(log_prob, law.log_prob(y))


@pytest.mark.parametrize(
    ("ratios", "words"),
    [([], "at least one"), ([0.1, 0.1], "different"), ([0.001], "0.01 and 50"), ([60.0], "60.0")],
)
def test_bad_ratios(ratios: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Extrapolated(ScoreDenoiser(NORMAL, VE(0.01, 50.0)), ratios)
    Extrapolated(ScoreDenoiser(NORMAL, VE(0.01, 50.0)), [0.01, 50.0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_exact_laws_agree_with_their_mean(schedule: Schedule, mixture: GaussianMixture) -> None:
    """`Denoiser.score`, from D, against the score of the noisy mixture, from its density."""
    denoiser, t, u = ScoreDenoiser(mixture, schedule), f64(0.5), onehot(2, 16)
    x_t = Noise("x").normal(empty(16))
    law = denoiser.at(t, u)
    assert torch.allclose(Denoiser.score(denoiser, x_t, t, u), law.score(x_t), rtol=1e-9)
    x_t.requires_grad_()
    (slope,) = torch.autograd.grad(law.log_prob(x_t).sum(), x_t)
    assert torch.allclose(slope, law.score(x_t), rtol=1e-9)


# --- one level: noise bias and step bias ------------------------------------------------------

# On N(0, 1) with the score at s = 0.5 and the step μ s² = s² / 2: what is said of each walk, and
# the same from its recursion y ← a y + c n, whose variance is c² / (1 − a²).
WALKS: list[tuple[Kernel, list[float], float]] = [
    (ULA(0.5), [0.5], 1.3158),  # the noise is kept: 1.25, and the step's own bias
    (HalfDenoising(1.0), [0.5], 1.0658),
    (ULA(0.5), [0.5, 1.0], 1.1773),
    (ULA(0.5 / 0.02**2 * 0.5**2), [0.02], 1.0667),  # the score of clean data: the step's bias
]


def walk(
    kernel: Kernel, ratios: list[float], schedule: Schedule, law: GaussianMixture = NORMAL
) -> tuple[float, float, float]:
    """One step is a y + b + c n: its a, b and c."""
    sampler, denoiser = Langevin(kernel, ratios, steps=1, start=1.0), ScoreDenoiser(law, schedule)
    like = empty(1, law.means.shape[1])
    b, a, c = (
        sampler(denoiser, like, None, Told(*told)).flatten()[0].item()
        for told in ((0, 0), (1, 0), (0, 1))
    )
    return a - b, b, c - b


@pytest.mark.parametrize("schedule", [VP(), Cosine(), VE(0.01), Rectified()], ids=named)
@pytest.mark.parametrize(("kernel", "ratios", "expected"), WALKS)
def test_stationary_variance_by_recursion(
    kernel: Kernel, ratios: list[float], expected: float, schedule: Schedule
) -> None:
    a, b, c = walk(kernel, ratios, schedule)
    # four decimals are stated, and 0.02² of the noise is left in what stands for none
    assert c**2 / (1 - a**2) == pytest.approx(expected, abs=5e-5 + (5e-4 if 0.02 in ratios else 0))
    assert b == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("kernel", "ratios", "expected"), WALKS)
def test_stationary_variance_of_many_chains(
    kernel: Kernel, ratios: list[float], expected: float
) -> None:
    n = 100_000
    sampler = Langevin(kernel, ratios, steps=60, start=1.0)
    y = sampler(ScoreDenoiser(NORMAL, Cosine()), empty(n, 1), None, Noise("chains", str(ratios)))
    # the start is forgotten to 0.9^120; the chains are independent, so the variance of a Gaussian
    # is known to expected √(2 / n), here 0.5 %
    assert y.var().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / n))
    assert y.mean().abs() < 4 * math.sqrt(expected / n)


def test_one_level_reaches_the_noisy_law() -> None:
    """As μ → 0 ULA's variance is 1 + s²."""
    for s in (0.5, 0.25):
        a, _, c = walk(ULA(1e-5), [s], VE())
        assert c**2 / (1 - a**2) == pytest.approx(1 + s**2, rel=1e-5)  # the step's bias, μ s² / 2


def test_half_denoising_removes_the_noise_to_first_order() -> None:
    """1 + s² / 4 + O(s⁴), which is the step's bias, as of ULA with the score of clean data."""
    for s in (0.1, 0.05):
        a, _, c = walk(HalfDenoising(1.0), [s], VE())
        assert c**2 / (1 - a**2) == pytest.approx(1 + s**2 / 4, abs=s**4)


def test_a_small_level_is_unstable_and_extrapolation_is_not() -> None:
    """D wrong by δ y is a score wrong by δ y / s²: at s² < δ the walk runs away."""

    class Wrong(Plain):
        def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
            return super().forward(x_t, t, u) + 0.002 * x_t / self.schedule(t)[0]

    def variance(*ratios: float) -> float:
        s = min(ratios)
        sampler = Langevin(ULA(0.05 / s**2), ratios, steps=200, start=1.0)
        draw = sampler(Wrong(NORMAL, VE(0.01)), empty(4000, 1), None, Noise("wrong"))
        return draw.var().item()

    assert variance(0.02) > 1e6  # the slope is −1 + 0.002 / 0.0004 = 4: it grows 1.2-fold a step
    # −φ / y = w_1 (1 / 1.25 − 0.008) + w_2 (1 / 2 − 0.002) = 0.89: 1 / 0.89 / (1 − μ 0.89 / 2)
    assert variance(0.5, 1.0) == pytest.approx(1.149, rel=4 * math.sqrt(2 / 4000))


# --- each class, from one batch that holds them all --------------------------------------------


def fixed(sampler: Langevin, std: float) -> float:
    """The variance of a walk on N(0, std²), from its recursion."""
    law = GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), [std])
    a, _, c = walk(sampler.kernel, list(sampler.ratios), VE(), law)
    return c**2 / (1 - a**2)


def level(sampler: Langevin, std: float) -> float:
    """The variance of the law itself, of which an exact kernel has no bias."""
    law = Extrapolated(ScoreDenoiser(NORMAL, VE()), sampler.ratios)
    precision = (w / (std**2 + s**2) for w, s in zip(law.weights, sampler.ratios, strict=True))
    return 1 / sum(precision)


def annealed(sampler: AnnealedLangevin, std: float) -> float:
    """The variance after all updates of ULA on N(0, std²), each y ← a y + c n."""
    ratios = VP().ratio(sampler.grid(VP())).tolist()
    mu, variance = float(sampler.kernel.step_size), ratios[0] ** 2
    for s in ratios:
        a = 1 - mu * s**2 / (std**2 + s**2)
        for _ in range(sampler.updates):
            variance = a**2 * variance + 2 * mu * s**2
    return variance


def clean(sampler: Sampler, std: float) -> float:
    return std**2


CHAINS = [
    (Langevin(ULA(0.2), [0.1], steps=300), fixed),
    (Langevin(HalfDenoising(1.0), [0.1], steps=150), fixed),
    (Langevin(ULA(0.2), [0.1, 0.2], steps=300), fixed),
    (Langevin(ULA(0.2), [0.3, 0.1, 0.2], steps=300), fixed),
    (Langevin(MALA(0.7), [0.1], steps=150), level),
    (Langevin(HMC(0.7, 3), [0.1], steps=50), level),
    (Langevin(MALA(0.5), [0.1, 0.2], steps=150), level),
    (AnnealedLangevin(ULA(0.2), updates=20, steps=40, denoise=False), annealed),
    (AnnealedLangevin(MALA(0.7), updates=15, steps=40), clean),
    (PredictorCorrector(ULA(0.05), steps=256, eta=1.0), clean),
    (PredictorCorrector(MALA(0.5), steps=64), clean),
]


@pytest.mark.parametrize(("sampler", "variance"), CHAINS)
def test_each_class_has_its_law(
    sampler: Sampler, variance: Callable[[Any, float], float], mixture: GaussianMixture
) -> None:
    n = 1500
    u = Condition.stack([onehot(k, n) for k in range(3)])
    denoiser = ScoreDenoiser(mixture, VP())
    drawn = sampler(denoiser, empty(3 * n), u, Noise("classes")).view(3, n, 2)
    for k in range(3):
        expected = variance(sampler, mixture.stds[k].item())
        # 4 standard errors; and, where no closed form says it, a bias of finite steps of 5 %
        lag = 0.05 if variance is clean else 0.0
        found = (drawn[k] - mixture.means[k]).square().mean().item()
        assert found == pytest.approx(expected, rel=4 / math.sqrt(n) + lag)
        error = (drawn[k].mean(dim=0) - mixture.means[k]).abs().max()
        assert error < 4 * math.sqrt(expected / n) + lag * mixture.stds[k]


def test_annealing_finds_the_weights_that_one_level_does_not(mixture: GaussianMixture) -> None:
    n = 4000
    denoiser = ScoreDenoiser(mixture, VE(0.01, 20.0))

    def weights(sampler: Sampler) -> Tensor:
        drawn = sampler(denoiser, empty(n), None, Noise("weights"))
        nearest = torch.cdist(drawn, mixture.means).argmin(dim=1)
        return torch.bincount(nearest, minlength=3) / n

    found = weights(AnnealedLangevin(MALA(1.0), updates=20, steps=40))
    assert (found - mixture.weights).abs().max() < 4 * 0.5 / math.sqrt(n)  # 4 s.e. of a half
    # between the classes, many widths apart at so little noise, no chain ever goes
    stuck = weights(Langevin(MALA(1.0), [0.05], steps=200))
    assert (stuck - mixture.weights).abs().max() > 0.1


# --- the algorithms, written out ---------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_annealed_langevin_is_algorithm_1(schedule: Schedule, mixture: GaussianMixture) -> None:
    """Song & Ermon in y, with α_i = 2 μ s_i²."""
    sampler = AnnealedLangevin(ULA(0.1), updates=3, steps=6, denoise=False)
    denoiser, u, mu = ScoreDenoiser(mixture, schedule), onehot(1, 16), 0.1
    drawn = sampler(denoiser, empty(16), u, Noise("written"))
    noise = Noise("written")
    ratios = schedule.ratio(sampler.grid(schedule))
    y = ratios[0] * noise.normal(empty(16))
    for s in ratios:
        alpha = 2 * mu * s**2
        for _ in range(3):
            phi = mixture.diffuse(f64(1.0), s, u).score(y)
            y = y + alpha / 2 * phi + alpha.sqrt() * noise.normal(y)
    # rounding of times near 1, and of x_t / α_t there
    assert torch.allclose(drawn, y, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_predictor_corrector_is_ancestral_steps_and_langevin(
    schedule: Schedule, mixture: GaussianMixture
) -> None:
    """Song et al., equation (47), the predictor of variance exploding, and algorithm 4, in y."""
    sampler = PredictorCorrector(ULA(0.1), updates=2, steps=6, eta=1.0, denoise=False)
    denoiser, u = ScoreDenoiser(mixture, schedule), onehot(1, 16)
    drawn = sampler(denoiser, empty(16), u, Noise("written"))
    noise = Noise("written")
    ratios = schedule.ratio(sampler.grid(schedule))
    y = ratios[0] * noise.normal(empty(16))
    for r, s in zip(ratios[:-1], ratios[1:], strict=True):
        phi = mixture.diffuse(f64(1.0), r, u).score(y)
        gain = r**2 - s**2
        y = y + gain * phi + (s**2 * gain / r**2).sqrt() * noise.normal(y)
        for _ in range(2):
            phi = mixture.diffuse(f64(1.0), s, u).score(y)
            y = y + 0.1 * s**2 * phi + (2 * 0.1 * s**2).sqrt() * noise.normal(y)
    assert torch.allclose(drawn, y, rtol=1e-7, atol=1e-7)


def test_the_mean_at_the_end(mixture: GaussianMixture) -> None:
    denoiser, u = ScoreDenoiser(mixture, Cosine()), onehot(2, 8)
    for make in (
        lambda denoise: Langevin(ULA(0.2), [0.3], steps=5, denoise=denoise),
        lambda denoise: AnnealedLangevin(ULA(0.2), updates=2, steps=5, denoise=denoise),
        lambda denoise: PredictorCorrector(ULA(0.2), updates=2, steps=5, denoise=denoise),
    ):
        sampler = make(False)
        y = sampler(denoiser, empty(8), u, Noise("end"))
        t = sampler.grid(denoiser.schedule)[-1]
        d = denoiser(denoiser.schedule(t)[0] * y, t, u)
        # the same up to a multiplication and a division by α
        assert torch.allclose(make(True)(denoiser, empty(8), u, Noise("end")), d, rtol=1e-9)


def test_the_states_are_seen(mixture: GaussianMixture) -> None:
    """A walk gives its x_t after each step, and what its kernel accepted."""
    denoiser, states = ScoreDenoiser(mixture, VP()), list[State]()
    y = Langevin(MALA(0.5), [0.3], steps=7)(denoiser, empty(5), None, Noise("seen"), states.append)
    alpha_t, _ = denoiser.schedule(denoiser.schedule.time(f64(0.3)))
    assert len(states) == 7 and torch.equal(states[-1].x, y)
    moved = [(b.x - a.x).abs().amax() for a, b in zip(states[:-2], states[1:-1], strict=True)]
    assert 0 < min(moved) < max(moved) < 2
    start = Langevin(MALA(0.5), [0.3], steps=7, start=2.0).init(
        denoiser, empty(5), denoiser.schedule.time(f64(0.3)), None, Noise("seen")
    )
    assert torch.allclose(start.x, alpha_t * 2 * Noise("seen").normal(empty(5)))


def test_acceptance_is_reported_for_each_level(mixture: GaussianMixture) -> None:
    def acceptance(sampler: Sampler) -> list[Tensor | None]:
        states: list[State] = []
        sampler(ScoreDenoiser(mixture, Cosine()), empty(256), None, Noise("a"), states.append)
        return [state.acceptance for state in states]

    for step_size, low, high in ((1e-3, 0.99, 1.0), (0.5, 0.7, 1.0), (3.0, 0.0, 0.3)):
        for sampler in (
            AnnealedLangevin(MALA(step_size), updates=4, steps=9, rho=3.0),
            PredictorCorrector(MALA(step_size), updates=4, steps=9, rho=3.0),
        ):
            *levels, last = acceptance(sampler)
            for one in levels[:5]:  # below, the step is small against the law
                assert one is not None and one.shape == (256,)
                assert low < one.mean() < high
            # the corrector's last level is that of the last step; the mean proposes nothing
            assert (last is None) == isinstance(sampler, PredictorCorrector)
    assert acceptance(AnnealedLangevin(ULA(0.1), updates=2, steps=3)) == [None] * 3


# --- guidance, and what cannot be ---------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_guides_the_walk(scale: float, mixture: GaussianMixture) -> None:
    """One step along φ(y) + w (φ(y | u) − φ(y))."""
    n, s = 8, 0.4
    denoiser, u = ScoreDenoiser(mixture, Cosine()), onehot(1, n)
    guided = ClassifierFree(scale)(denoiser, onehot(0, 1).map(torch.zeros_like))
    y = Langevin(ULA(0.2), [s], steps=1, start=0.8)(guided, empty(n), u, Noise("guided"))
    noise = Noise("guided")
    start = 0.8 * noise.normal(empty(n))
    free, bound = (mixture.diffuse(f64(1.0), f64(s), c).score(start) for c in (None, u))
    phi = free + scale * (bound - free)
    expected = start + 0.2 * s**2 * phi + math.sqrt(0.4) * s * noise.normal(start)
    assert torch.allclose(y, expected, rtol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("kernel", [ULA(0.5), MALA(0.5), HMC(0.5, 3)], ids=named)
def test_a_walk_on_an_energy(kernel: Kernel, scale: float, mixture: GaussianMixture) -> None:
    """An energy and the mixture of the same classes, at one level, give the same walk."""
    schedule, t = VP(), f64(0.3)
    alpha_t, sigma_t = schedule(t)
    variances = (alpha_t * mixture.stds) ** 2 + sigma_t**2
    covariances = variances[:, None, None] * torch.eye(2, dtype=torch.float64)
    energy = normal_energy(schedule, t, alpha_t * mixture.means, covariances)
    u = Condition.stack([onehot(k, 4) for k in (0, 1)])
    sampler = Langevin(kernel, [schedule.ratio(t).item()], steps=10)
    one, two = (
        sampler(ClassifierFree(scale)(d, onehot(2, 1)), empty(8), u, PictureNoise(range(8)))
        for d in (energy.requires_grad_(False), ScoreDenoiser(mixture, schedule))
    )
    assert torch.allclose(one, two, rtol=1e-8, atol=1e-8)  # rounding, along 30 steps


@pytest.mark.parametrize(
    "sampler",
    [
        Langevin(MALA(0.1), [0.1], steps=2),
        Langevin(MALA(0.1), [0.1, 0.2], steps=2),
        AnnealedLangevin(MALA(0.1), steps=2),
        PredictorCorrector(MALA(0.1), steps=2),
    ],
)
def test_a_score_alone_cannot_be_accepted(sampler: Sampler, mixture: GaussianMixture) -> None:
    with pytest.raises(UserError, match="score only; use ULA"):
        sampler(Plain(mixture, Cosine()), empty(4), None, Noise(0))


def test_a_ratio_that_the_schedule_does_not_reach(mixture: GaussianMixture) -> None:
    with pytest.raises(ValueError, match="between 0.01 and 50"):
        Langevin(ULA(), [1e-3])(ScoreDenoiser(mixture, VE(0.01, 50.0)), empty(4), None, Noise(0))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Langevin(ULA(), [], steps=5), "ratios"),
        (lambda: Langevin(ULA(), [0.0], steps=5), "ratios"),
        (lambda: Langevin(ULA(), [0.1], start=0.0), "start"),
        (lambda: Langevin(ULA(), [0.1], steps=0), "at least 1"),
        (lambda: Langevin(ULA(), [0.1, 0.2], denoise=True), "choose one"),
        (lambda: Langevin(HalfDenoising(1.0), [0.1, 0.2]), "choose one"),
        (lambda: Langevin(HalfDenoising(1.0), [0.1], denoise=True), "choose one"),
        (lambda: Langevin(HalfDenoising(0.5), [0.1]), "must be 1"),
        (lambda: AnnealedLangevin(HalfDenoising(0.5)), "must be 1"),
        (lambda: AnnealedLangevin(NUTS()), "use HMC"),
        (lambda: AnnealedLangevin(ULA(), updates=0), "updates = 0"),
        (lambda: PredictorCorrector(ULA(), updates=0), "updates = 0"),
        (lambda: PredictorCorrector(HalfDenoising(1.0)), "keep"),
    ],
)
def test_bad_settings(make: Callable[[], Sampler], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_sampler_with_a_kernel_is_brief() -> None:
    about = brief(AnnealedLangevin(MALA(0.5), updates=3))
    assert json.loads(json.dumps(about))["kernel"] == {"class": "MALA", "step_size": 0.5}
    assert brief(None) is None


def test_the_manifest_says_what_was_accepted(mixture: GaussianMixture) -> None:
    denoiser, states = ScoreDenoiser(mixture, VP()), list[State]()
    sampler = PredictorCorrector(MALA(1.0), steps=5)
    bar = Bar.over(Generator(denoiser, None, Columns(2), sampler), 32, 16)
    assert bar.total == 10 and bar.acceptance() == {}
    for seed in (0, 1):
        sampler(denoiser, empty(16), None, Noise(seed), bar.watch)
        sampler(denoiser, empty(16), None, Noise(seed), states.append)
    seen = [state.acceptance for state in states]
    expected = [(seen[i] + seen[5 + i]).mean().item() / 2 for i in range(4)]  # type: ignore
    assert bar.n == 10 and bar.acceptance()["acceptance"] == pytest.approx(expected, abs=1e-4)
    bar.accepted = bar.accepted[:2]
    assert len(bar.acceptance()["acceptance"]) == 2  # stopped on the way
    bar.accepted = [None] * 10
    assert bar.acceptance() == {}
    bar.close()
