"""Objectives: the laws of levels, where each is least, and that it learns."""

import math
from collections.abc import Sequence

import pytest
import torch
from energies import normal_energy, one_hot
from scipy import stats
from torch import Tensor, nn

from pipeline.condition import Condition, U
from pipeline.denoisers import (
    EDM,
    Clean,
    Denoiser,
    Energy,
    Flow,
    Preconditioned,
    ScoreDenoiser,
)
from pipeline.mcmc.targets import GaussianMixture
from pipeline.networks import MLP, Network
from pipeline.noise import Noise
from pipeline.objectives import (
    DSM,
    NCE,
    ConditionalNCE,
    Levels,
    LogNormal,
    MinSNR,
    Objective,
    OneLevelDSM,
    ScoreMatching,
    SlicedScoreMatching,
    Uniform,
    UniformTime,
    UnitVariance,
    Velocity,
    Weight,
)
from pipeline.schedules import VE, VP, Cosine, Rectified, Schedule

SCHEDULES = [VP(), Cosine(), VE(), Rectified()]
WIDE = VE(1e-9, 1e9)  # holds every level, so that nothing is clamped


def named(schedule: Schedule) -> str:
    return type(schedule).__name__


def midpoints(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


class At(Levels):
    """Every time is one time."""

    def __init__(self, t: float) -> None:
        self.t = t

    def times(self, schedule: Schedule, q: Tensor) -> Tensor:
        return torch.full_like(q, self.t)


class Zero(Network):
    def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
        return torch.zeros_like(x)


class Exact(Network):
    """The network whose denoiser is exact, times 1 + a, plus b: F = (D − c_skip y) / c_out."""

    def __init__(self, mixture: GaussianMixture, schedule: Schedule) -> None:
        super().__init__()
        self.exact, self.a, self.b = ScoreDenoiser(mixture, schedule), 0.0, 0.0
        self.denoiser: Preconditioned | None = None

    def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
        assert self.denoiser is not None
        s = level.exp()
        c_in, c_skip, c_out = (c[:, None] for c in self.denoiser.scales(s))
        y, t = x / c_in, self.exact.schedule.time(s)
        d = self.exact(self.exact.schedule(t)[0][:, None] * y, t, u)
        return ((1 + self.a) * d + self.b - c_skip * y) / c_out


def exact(mixture: GaussianMixture, schedule: Schedule, family: type = EDM) -> Preconditioned:
    network = Exact(mixture, schedule)
    denoiser = family(network, schedule)
    object.__setattr__(network, "denoiser", denoiser)  # not a child of its own child
    return denoiser


@pytest.mark.parametrize(
    ("means", "stds"),
    [((-1.2,), (1.2,)), ((1.0, -2.0), (0.5, 1.5)), ((0.0, 3.0, -3.0), (1.0, 0.2, 0.7))],
)
def test_lognormal_quantiles(means: Sequence[float], stds: Sequence[float]) -> None:
    """The levels at evenly spread quantiles have the mixture's law, up to the grid's own 1 / n."""
    n = 3000
    level = WIDE.ratio(LogNormal(means, stds).times(WIDE, midpoints(n))).log()

    def cdf(x: Tensor) -> Tensor:
        parts = [stats.norm.cdf(x, m, s) for m, s in zip(means, stds, strict=True)]
        return sum(parts) / len(parts)

    # n midpoints of one law are 1 / 2n from it; each part has its own n / parts, so parts / 2n
    assert stats.kstest(level.numpy(), cdf).statistic < (len(means) + 1) / (2 * n)
    for i, part in enumerate(level.chunk(len(means))):  # part i has the i-th interval of q
        assert (part.diff() > 0).all()
        assert part.median().item() == pytest.approx(means[i], abs=0.01)  # 1 / n of a density ~1


def test_lognormal_is_edm_s_law_by_default() -> None:
    q = torch.tensor([0.5, stats.norm.cdf(1.0)], dtype=torch.float64)
    level = WIDE.ratio(LogNormal().times(WIDE, q)).log()
    # 2⁻²⁴ is the grid of quantiles at the ends only; rounding of a level in a range of 41
    assert torch.allclose(level, torch.tensor([-1.2, 0.0]).double(), atol=1e-7)


def test_lognormal_does_not_depend_on_the_schedule() -> None:
    q = midpoints(200) * 0.8 + 0.1  # levels that all four reach
    levels = [s.ratio(LogNormal().times(s, q)).log() for s in SCHEDULES]
    for level in levels[1:]:
        assert torch.allclose(level, levels[0], atol=1e-9)  # a time is known to eps


def test_a_logit_normal_time_on_the_straight_path() -> None:
    """Esser et al., section 3.1: logit t ~ N(m, s²), t the fraction of noise."""
    schedule = Rectified(1e-6)
    t = LogNormal((0.5,), (1.0,)).times(schedule, midpoints(1000))
    fraction = schedule(t)[1]  # on this path, σ
    logit = torch.special.logit(fraction).numpy()
    assert stats.kstest(logit, stats.norm(0.5, 1.0).cdf).statistic < 1 / 1000  # 1 / 2n and room


def test_lognormal_is_finite_at_the_ends() -> None:
    for dtype in (torch.float32, torch.float64):
        q = torch.tensor([0.0, 1e-30, 0.5, 1 - 2**-24, 1.0], dtype=dtype)
        for levels in (LogNormal(), LogNormal((0.0, 1.0), (1.0, 1.0))):
            t = levels.times(VP(), q)
            assert t.dtype == dtype and t.isfinite().all() and (t >= 0).all() and (t <= 1).all()


def test_uniform_time() -> None:
    q = midpoints(10)
    for schedule in SCHEDULES:
        assert torch.equal(UniformTime().times(schedule, q), q)


@pytest.mark.parametrize(
    ("means", "stds"), [((), ()), ((0.0,), (1.0, 1.0)), ((0.0,), (0.0,)), ((0.0,), (-1.0,))]
)
def test_lognormal_bad_arguments(means: Sequence[float], stds: Sequence[float]) -> None:
    with pytest.raises(ValueError, match="equally long"):
        LogNormal(means, stds)


def test_bands_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="bands = 0"):
        DSM(UniformTime(), bands=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_value_for_gaussian_data(schedule: Schedule, t: float, shape: tuple[int, ...]) -> None:
    """x ~ N(0, σ_d²) and F = 0. EDM's D is then the exact mean, whose error s² σ_d² / (s² + σ_d²)
    is c_out²: the loss is 1 at each level. Flow is left with E (n − x)² = 1 + σ_d².
    """
    n, sigma_d = 4000, 0.5
    noise = Noise("gaussian", t)
    x = sigma_d * noise.normal(torch.zeros(n, *shape, dtype=torch.float64))
    dsm = DSM(At(t))
    for denoiser, value in (
        (EDM(Zero(), schedule, sigma_d), 1.0),
        (Flow(Zero(), schedule), 1 + sigma_d**2),
        (EDM(Zero(), schedule, 1.0), None),
    ):
        if value is None:  # a linear D = k y with another k: (k − 1)² σ_d² + k² s², over c_out²
            s = schedule.ratio(torch.tensor(t).double()).item()
            k, c_out = 1 / (1 + s**2), s / math.sqrt(1 + s**2)
            value = ((k - 1) ** 2 * sigma_d**2 + k**2 * s**2) / c_out**2
        loss = dsm(denoiser, x, None, noise)
        assert loss.shape == (n,)
        standard_error = loss.std().item() / n**0.5
        assert loss.mean().item() == pytest.approx(value, abs=4 * standard_error)


def test_value_example_by_example(mixture: GaussianMixture) -> None:
    """The formula with the same draws: w(t) |D(α x + σ n) − x|² / d."""
    schedule = Rectified()
    x, k = mixture.sample(Noise("x"), 32)
    u = one_hot(k, 3)
    levels = LogNormal((0.0,), (1.0,))
    for family in (EDM, Flow, Clean):
        denoiser = exact(mixture, schedule, family)
        noise = Noise("same")
        t = levels.times(schedule, noise.spread(32).double())
        alpha, sigma = (v[:, None] for v in schedule(t))
        error = denoiser(alpha * x + sigma * noise.normal(x), t, u) - x
        c_out = denoiser.scales(schedule.ratio(t))[2]
        expected = (error**2).sum(dim=1) / 2 / c_out**2
        loss = DSM(levels)(denoiser, x, u, Noise("same"))
        assert torch.allclose(loss, expected, rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_a_weight_is_the_error_in_another_output_s_units(
    schedule: Schedule, mixture: GaussianMixture
) -> None:
    """The same D has the loss of EDM, of flow, of ε-prediction and of x, whichever head it has."""
    x, k = mixture.sample(Noise("x"), 64)
    u, levels = one_hot(k, 3), LogNormal((0.0,), (1.5,))
    edm, flow, clean = (exact(mixture, schedule, family) for family in (EDM, Flow, Clean))

    def loss(denoiser: Preconditioned, weight: Weight | None = None) -> Tensor:
        return DSM(levels, weight=weight)(denoiser, x, u, Noise("same"))

    # D is the same up to the rounding of c_skip y + c_out F where F is made to give it
    close = {"rtol": 1e-6, "atol": 1e-9}
    assert torch.allclose(loss(clean, UnitVariance(0.5)), loss(edm), **close)
    assert torch.allclose(loss(clean, Velocity(1e-9)), loss(flow), **close)
    assert torch.allclose(loss(edm, Uniform()), loss(clean), **close)
    t = levels.times(schedule, Noise("same").spread(64).double())
    s = schedule.ratio(t)
    snr = loss(edm, MinSNR(1e12)) / loss(edm, Uniform())
    assert torch.allclose(snr, s**-2, rtol=1e-6)


def test_weights() -> None:
    s = torch.tensor([0.01, 0.05, 0.5, 1.0, 20.0], dtype=torch.float64)
    for weight, expected in (
        (Uniform(), [1, 1, 1, 1, 1]),
        (Velocity(), [20.2**2, 21**2, 9, 4, 1.05**2]),
        (Velocity(0.5), [2.02**2, 2.1**2, 9, 4, 1.05**2]),
        (UnitVariance(0.5), [1e4 + 4, 404, 8, 5, 1 / 400 + 4]),
        (MinSNR(5.0), [5, 5, 4, 1, 1 / 400]),
    ):
        assert torch.allclose(weight(s), torch.tensor(expected, dtype=s.dtype), rtol=1e-12)
    for make, name in ((Velocity, "least"), (UnitVariance, "sigma_data"), (MinSNR, "gamma")):
        with pytest.raises(ValueError, match=f"{name} = 0"):
            make(0.0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("family", [EDM, Flow, Clean])
def test_the_exact_denoiser_is_the_minimum(
    family: type, schedule: Schedule, mixture: GaussianMixture
) -> None:
    n = 8192
    x, k = mixture.sample(Noise("min"), n)
    u = one_hot(k, 3)
    dsm, denoiser = DSM(LogNormal((-1.0,), (1.0,))), exact(mixture, schedule, family)
    network: Exact = denoiser.network  # type: ignore[assignment]

    def loss(a: Tensor | float, b: Tensor | float) -> Tensor:
        network.a, network.b = a, b  # type: ignore[assignment]
        return dsm(denoiser, x, u, Noise("draws"))

    least = loss(0.0, 0.0).mean()
    for a, b in ((0.1, 0.0), (-0.1, 0.0), (0.0, 0.1), (0.0, -0.1)):
        assert loss(a, b).mean() > 1.01 * least  # the same draws: no noise in the comparison

    def gradient(a: float, b: float) -> Tensor:
        """Of each example with respect to its own a and b, in standard errors of the mean."""
        a_i = torch.full((n, 1), a, dtype=torch.float64, requires_grad=True)
        b_i = torch.full((n, 2), b, dtype=torch.float64, requires_grad=True)
        g = torch.cat(torch.autograd.grad(loss(a_i, b_i).sum(), (a_i, b_i)), dim=1)
        return g.mean(dim=0) / (g.std(dim=0) / n**0.5)

    assert (gradient(0.0, 0.0).abs() < 4).all()  # standard errors
    assert (gradient(0.1, 0.1).abs() > 5).all()  # and elsewhere it is not zero: 7 or more


@pytest.mark.parametrize(
    "levels",
    [LogNormal(), LogNormal((2.0, -2.0), (1.0, 0.5)), UniformTime()],
    ids=["EDM", "two parts", "uniform"],
)
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_bands_are_equally_likely_and_in_order(levels: Levels, bands: int) -> None:
    n = 4096
    dsm = DSM(levels, bands)
    assert dsm.bands == tuple(f"band_{k}" for k in range(bands))
    denoiser = Flow(Seen(), VE(1e-4, 1e4))
    loss, band = dsm.validate(denoiser, torch.zeros(n, 2, dtype=torch.float64), None, Noise("b"))
    assert loss.shape == band.shape == (n,) and band.dtype == torch.long
    counts = torch.bincount(band, minlength=bands)
    assert len(counts) == bands
    # the edges are known to one of 1024 quantiles: n / 1024 = 4 examples, on either side
    assert (counts - n / bands).abs().max() <= 8
    level = denoiser.network.level
    for k in range(bands - 1):
        assert level[band == k].max() < level[band == k + 1].min()  # low noise first


class Seen(Zero):
    def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
        self.level = level
        return super().forward(x, level, u)


def test_validate_is_the_same_loss(mixture: GaussianMixture) -> None:
    x, k = mixture.sample(Noise("v"), 64)
    u = one_hot(k, 3)
    denoiser, dsm = exact(mixture, VP()), DSM(LogNormal())
    loss, _ = dsm.validate(denoiser, x, u, Noise("same"))
    assert torch.equal(loss, dsm(denoiser, x, u, Noise("same")))
    assert not torch.equal(loss, dsm(denoiser, x, u, Noise("other")))


def test_an_objective_without_levels_has_one_band() -> None:
    class Size(Objective):
        def __call__(self, denoiser: Preconditioned, x: Tensor, u: U, noise: Noise) -> Tensor:
            return x.square().sum(dim=1)

    x = torch.arange(8.0).reshape(4, 2)
    loss, band = Size().validate(Flow(Zero(), VP()), x, None, Noise(0))
    assert loss.tolist() == [1, 13, 41, 85] and band.tolist() == [0, 0, 0, 0]


def test_two_devices_have_the_losses_of_one(mixture: GaussianMixture) -> None:
    x, _ = mixture.sample(Noise("d"), 12)
    denoiser, dsm = exact(mixture, VP()), DSM(LogNormal())
    whole = dsm(denoiser, x, None, Noise("key", rows=(0, 12)))
    parts = [dsm(denoiser, x[i : i + 6], None, Noise("key", rows=(i, 12))) for i in (0, 6)]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-12)


def score_error(
    learned: Denoiser, mixture: GaussianMixture, level: float, k: int | None, guess: int | None
) -> float:
    """E σ² |φ̂(x_t | guess) − φ(x_t | k)|² over E σ² |φ(x_t | k)|² at one level; None is null."""
    noise, schedule = Noise("error", level, str(k)), learned.schedule
    x, component = mixture.sample(noise, 8000)
    x = (x if k is None else x[component == k])[:1000]
    t = schedule.time(torch.tensor(level, dtype=torch.float64).exp())
    alpha, sigma = schedule(t)
    x_t = alpha * x + sigma * noise.normal(x)

    def token(k: int | None) -> Condition:
        row = torch.zeros(3) if k is None else torch.eye(3)[k]
        return Condition(row.expand(len(x_t), 1, 3))

    truth = mixture.diffuse(alpha, sigma, token(k)).score(x_t)
    phi = learned.score(x_t.float(), t.float(), token(guess)).double()
    return ((phi - truth).square().sum() / truth.square().sum()).item()


@pytest.mark.parametrize("family", [EDM, Flow, Clean])
def test_it_recovers_the_score_given_u(family: type, mixture: GaussianMixture) -> None:
    """Equation (6): the score given u and, by condition dropout, the score without it."""
    torch.manual_seed(0)
    denoiser = family(MLP(2, u_dim=3, width=64, depth=2), Rectified())
    levels = (-2.0, -1.0, 0.0, 1.0)
    conditions = (0, 1, 2, None)
    with torch.no_grad():
        untrained = [score_error(denoiser, mixture, v, k, k) for v in levels for k in conditions]

    weight = Velocity() if family is Clean else None
    steps, dsm = 800, DSM(LogNormal((-0.8,), (1.2,)), weight=weight)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in range(steps):
        noise = Noise("train", i)
        x, k = mixture.sample(noise, 512)
        u = torch.eye(3)[k] * (noise.uniform(512) > 0.25)[:, None]  # condition dropout
        loss = dsm(denoiser, x.float(), Condition(u[:, None]), noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()

    with torch.no_grad():
        learned = [score_error(denoiser, mixture, v, k, k) for v in levels for k in conditions]
        swapped = [
            score_error(denoiser, mixture, v, k, (k + 1) % 3) for v in levels for k in range(3)
        ]
        dropped = [score_error(denoiser, mixture, v, k, None) for v in levels for k in range(3)]
    # measured 0.023 at worst and 0.003 on average after training, 0.4 on average before it; the
    # wrong class is off by 8 on average, the null condition by 0.2; clean x passes nothing of y
    # beside the network, and is off by 0.065 at the lowest level
    assert max(learned) < (0.15 if family is Clean else 0.05)
    assert sum(learned) < sum(untrained) / 20
    assert sum(swapped) / 12 > 1
    assert sum(dropped) / 12 > 0.05

    x, k = mixture.sample(Noise("validation"), 2000)
    u = torch.eye(3)[k][:, None]
    with torch.no_grad():
        own, other = (
            dsm.validate(denoiser, x.float(), Condition(given), Noise("validate"))[0]
            for given in (u, u.roll(1, 0))
        )
    gap = other - own  # on the same noise and levels: a paired comparison
    assert gap.mean() > 10 * gap.std() / 2000**0.5


# What follows is exact: expectations over normal laws are sums over nodes, and the model holds
# every normal law of each class.

CLASSES = torch.tensor([[-0.5, 0.3], [0.4, 0.6]], dtype=torch.float64)  # means, deviations
CONTRAST = GaussianMixture(torch.tensor([[0.1]], dtype=torch.float64), [0.8])
SMOOTH = [VE(0.1, 10.0), Rectified(0.05), VP(clip=0.05)]  # their first noise ratio is about 0.1


class Nodes(Noise):
    """Normal numbers that are the nodes of a quadrature, whatever is asked for."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def normal(self, like: Tensor) -> Tensor:
        return self.values.reshape(like.shape)

    def uniform(self, n: int) -> Tensor:
        return torch.zeros(n)


def quadrature(drawn: bool) -> tuple[Tensor, Condition, Noise, Tensor]:
    """Nodes of x of either class, their u, the noise, and the weights that make sums means.

    With `drawn` the noise n is independent of x, as in x + σ n; else a node has its own number,
    as where terms in x and terms in n are added. The trapezoid rule is exact to rounding for a
    normal law times what is smooth on the scale of its steps.
    """
    nodes = torch.linspace(-8, 8, 49 if drawn else 801, dtype=torch.float64)
    weights = torch.softmax(-(nodes**2) / 2, dim=0)
    z = noise = nodes
    if drawn:
        z, noise = (v.flatten() for v in torch.meshgrid(nodes, nodes, indexing="ij"))
        weights = torch.outer(weights, weights).flatten()
    x = torch.cat([m + s * z for m, s in CLASSES])[:, None]
    u = one_hot(torch.arange(2).repeat_interleave(len(z)), 2)
    return x, u, Nodes(noise.repeat(2)), weights.repeat(2) / 2


def at_time(schedule: Schedule, t: Tensor, sigma: float = 0.0) -> Energy:
    """The energy that is exact at time t for the laws of the classes with noise sigma."""
    alpha, (means, stds) = schedule(t)[0], CLASSES.T[:, :, None]
    return normal_energy(schedule, t, alpha * means, (alpha**2 * (stds**2 + sigma**2))[..., None])


ZERO = torch.zeros((), dtype=torch.float64)
MEMBERS = [  # objective, the noise of the law that it learns, whether noise is added to x
    (OneLevelDSM(0.4), 0.4, True),
    (ScoreMatching(), 0.0, False),
    (SlicedScoreMatching(), 0.0, False),
    (NCE(CONTRAST), 0.0, False),
    (NCE(CONTRAST, draws=3), 0.0, False),
    (ConditionalNCE(0.5), 0.0, True),
    (ConditionalNCE(0.5, draws=2), 0.0, True),
]


@pytest.mark.parametrize("schedule", SMOOTH, ids=named)
@pytest.mark.parametrize(("objective", "sigma", "drawn"), MEMBERS)
def test_the_minimum_is_the_law(
    objective: Objective, sigma: float, drawn: bool, schedule: Schedule
) -> None:
    """From another law to the least value: the score of each class, of clean data or of noisy
    data, and for NCE the density with its constant.
    """
    x, u, noise, weights = quadrature(drawn)
    t = objective.time(schedule) if isinstance(objective, OneLevelDSM) else ZERO
    exact, learned = at_time(schedule, t, sigma), at_time(schedule, t, sigma)

    def loss(energy: Energy) -> Tensor:
        return weights @ objective(energy, x, u, noise)

    # the slope vanishes at the law itself; float64, times slopes of the parameters near (σ_d/s)²
    least = loss(exact)
    least.backward()
    slopes = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    assert slopes.abs().max() < 1e-5

    for p in learned.network.parameters():
        p.data = 0.8 * p.data
    if isinstance(objective, NCE):
        learned.normaliser[0].weight.data *= 0.9  # type: ignore[index, operator]
    assert loss(learned) > least + 1e-3
    optimizer = torch.optim.LBFGS(
        learned.parameters(), 1.0, 200, 400, 1e-12, 1e-15, 20, "strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(learned)
        value.backward()
        return value

    optimizer.step(closure)
    alpha = schedule(t)[0]
    phi, truth = learned.score(alpha * x, t, u), exact.score(alpha * x, t, u)
    # the optimizer stops at changes of 1e-12 of a loss near 1: 1e-6 of its arguments
    assert torch.allclose(phi, truth, rtol=1e-4, atol=1e-4)
    if isinstance(objective, NCE):
        log_p = torch.cat([stats_log_prob(k, rows) for k, rows in enumerate(x.chunk(2))])
        gap = learned.log_prob(alpha * x, t, u) + torch.log(alpha) - log_p
        assert gap.abs().max() < 1e-3


def stats_log_prob(k: int, x: Tensor) -> Tensor:
    mean, std = CLASSES[k].tolist()
    return torch.from_numpy(stats.norm(mean, std).logpdf(x[:, 0].numpy()))


def test_noisy_law_or_clean_law() -> None:
    """What the members differ in: the variance that each learns, s² + σ² or s²."""
    schedule, sigma = SMOOTH[0], 0.4
    for s in CLASSES[:, 1].tolist():
        x = torch.tensor([[0.1], [0.2]]).double()
        u = one_hot(torch.tensor([0, 0]) if s == 0.3 else torch.tensor([1, 1]), 2)
        t = OneLevelDSM(sigma).time(schedule)
        noisy, clean = at_time(schedule, t, sigma), at_time(schedule, ZERO)
        for energy, time, variance in ((noisy, t, s**2 + sigma**2), (clean, ZERO, s**2)):
            slope = energy.score(x, time, u).diff(dim=0).item() / 0.1  # −1 / variance
            assert slope == pytest.approx(-1 / variance, rel=1e-6)


def test_values_in_closed_form() -> None:
    schedule = SMOOTH[0]
    stds, sigma = CLASSES[:, 1], 0.4

    def mean(objective: Objective, energy: Energy, drawn: bool) -> float:
        x, u, noise, weights = quadrature(drawn)
        return (weights @ objective(energy, x, u, noise)).item()

    # equation (4): what is left of x when x̃ is known, s² σ² / (s² + σ²)
    t = OneLevelDSM(sigma).time(schedule)
    left = (stds**2 * sigma**2 / (stds**2 + sigma**2)).mean().item()
    value = mean(OneLevelDSM(sigma), at_time(schedule, t, sigma), True)
    assert value == pytest.approx(left, rel=1e-6)  # the time of a ratio, to float64 and a slope
    # ½ E φ² − 1 / s² = −1 / 2 s²
    clean = at_time(schedule, ZERO)
    for objective in (ScoreMatching(), SlicedScoreMatching()):
        value = mean(objective, clean, False)
        assert value == pytest.approx(-(0.5 / stds**2).mean().item(), rel=1e-9)
    # data like the noise: h = 1 / (1 + ν) everywhere
    x, u, noise, weights = quadrature(False)
    variance = (CONTRAST.stds**2).repeat(2)[:, None, None]
    same = normal_energy(schedule, ZERO, CONTRAST.means.repeat(2, 1), variance)
    for draws in (1, 3):
        value = weights @ NCE(CONTRAST, draws)(same, x, u, noise)
        expected = (1 + draws) * math.log(1 + draws) - draws * math.log(draws)
        assert value.item() == pytest.approx(expected, rel=1e-9)
    # no noise: p(y) = p(x)
    value = mean(ConditionalNCE(1e-9, draws=2), clean, True)
    assert value == pytest.approx(2 * math.log(2), rel=1e-6)


def test_conditional_nce_example_by_example() -> None:
    schedule = Rectified(0.05)
    energy, alpha = at_time(schedule, ZERO), schedule(ZERO)[0]
    x = Noise("x").normal(torch.zeros(6, 1, dtype=torch.float64))
    u = one_hot(torch.arange(6) % 2, 2)
    noise = Noise("same")
    y = [x + 0.3 * noise.normal(x) for _ in range(2)]
    p, *q = (energy.log_prob(alpha * v, ZERO, u).exp() for v in (x, *y))
    expected = sum(torch.log(1 + q_k / p) for q_k in q)  # 2 / κ = 1
    loss = ConditionalNCE(0.3, draws=2)(energy, x, u, Noise("same"))
    assert torch.allclose(loss, expected, rtol=1e-9)


@pytest.mark.parametrize("make", [EDM, Flow, Energy], ids=["EDM", "Flow", "Energy"])
def test_score_matching_by_finite_differences(make: type[EDM]) -> None:
    """½ |φ|² + tr ∇φ of a network, on pictures; the signs of the slices together are the trace."""
    torch.manual_seed(0)

    class Net(Network):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4).double()

        def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
            assert u is not None and u.tokens is not None
            shift = u.tokens.sum(dim=(1, 2))[:, None]
            return torch.tanh(self.layer(x.flatten(1)) + shift).view_as(x)

    schedule = VE(0.1, 10.0)
    denoiser = make(Net(), schedule)
    noise = Noise("sm")
    x = noise.normal(torch.zeros(5, 1, 2, 2, dtype=torch.float64))
    u = Condition(torch.arange(5).double()[:, None, None] / 5)
    phi = denoiser.score(x, ZERO, u)
    trace = torch.zeros(5).double()
    for i in range(4):
        h = 1e-5 * torch.eye(4).double()[i].view(1, 1, 2, 2)
        slope = (denoiser.score(x + h, ZERO, u) - denoiser.score(x - h, ZERO, u)) / 2e-5
        trace += slope.flatten(1)[:, i]
    expected = phi.square().flatten(1).sum(dim=1) / 2 + trace
    exact = ScoreMatching()(denoiser, x, u, noise)
    # h² of the third derivative, and rounding / h, of slopes near 100
    assert torch.allclose(exact, expected, rtol=1e-5, atol=1e-5)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 4)
    sliced = [
        SlicedScoreMatching()(denoiser, x, u, Nodes(v.expand(5, 4).reshape(-1))) for v in signs
    ]
    assert torch.allclose(torch.stack(sliced).mean(dim=0), exact, rtol=1e-10, atol=1e-10)
    loss = exact.mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in denoiser.parameters())
    with torch.no_grad():
        assert torch.allclose(ScoreMatching()(denoiser, x, u, noise), exact)


@pytest.mark.parametrize(("objective", "sigma", "drawn"), MEMBERS)
def test_two_devices_have_the_losses_of_one_without_levels(
    objective: Objective, sigma: float, drawn: bool
) -> None:
    energy = at_time(SMOOTH[0], ZERO)
    x = Noise("x").normal(torch.zeros(8, 1, dtype=torch.float64))
    u = one_hot(torch.arange(8) % 2, 2)
    whole = objective(energy, x, u, Noise("key", rows=(0, 8)))
    assert whole.shape == (8,)
    parts = [
        objective(energy, x[i : i + 4], u[i : i + 4], Noise("key", rows=(i, 8))) for i in (0, 4)
    ]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-9)


def test_signs_have_no_variance_where_the_jacobian_is_diagonal() -> None:
    """And 2 Σ_{i≠j} S_ij², S the symmetric part, where it is not, in closed form."""
    n, d = 40_000, 3
    x = Noise("x").normal(torch.zeros(n, d, dtype=torch.float64)).requires_grad_()
    diagonal = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    full = torch.diag(diagonal) + torch.tensor(
        [[0, 0.4, 0], [0.2, 0, -0.6], [0, 0, 0]], dtype=torch.float64
    )
    for jacobian in (torch.diag(diagonal), full):
        traces = SlicedScoreMatching().trace(x @ jacobian.mT, x, Noise("signs"), False)
        symmetric = (jacobian + jacobian.mT) / 2
        variance = 2 * (symmetric.square().sum() - diagonal.square().sum()).item()
        # 4 standard errors of a mean, and of a variance whose kurtosis is at most 9
        assert traces.mean().item() == pytest.approx(1.5, abs=4 * (variance / n) ** 0.5 + 1e-12)
        assert traces.var().item() == pytest.approx(variance, abs=0.06 * variance + 1e-24)


def test_what_an_objective_needs_is_one_sentence() -> None:
    x, u = torch.zeros(2, 2), Condition(torch.eye(3)[:2][:, None])
    network, contrast = MLP(2, 3, width=8, depth=1), GaussianMixture([[0.0, 0.0]], [1.0])
    for denoiser in (EDM(network, VP()), Energy(network, VP())):
        with pytest.raises(ValueError, match="normalised: true"):
            NCE(contrast)(denoiser, x, u, Noise(0))
    with pytest.raises(ValueError, match="EDM has a score and no density"):
        ConditionalNCE(0.1)(EDM(network, VP()), x, u, Noise(0))
    with pytest.raises(ValueError, match=r"sigma = 0.001 must lie between 0.002 and 80"):
        OneLevelDSM(0.001)(EDM(network, VE()), x, u, Noise(0))
    for make, sentence in (
        (lambda: OneLevelDSM(0.0), "sigma = 0.0 must be positive"),
        (lambda: NCE(contrast, 0), "draws = 0"),
        (lambda: ConditionalNCE(-1.0), "sigma = -1.0"),
        (lambda: ConditionalNCE(1.0, 0), "draws = 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()


LEARNERS = [  # objective, head, largest error of the score, largest deviation of log p
    (OneLevelDSM(0.2), Flow, 0.02, None),
    (OneLevelDSM(0.2), Energy, 0.02, 0.15),
    (ScoreMatching(), EDM, 0.05, None),
    (SlicedScoreMatching(), EDM, 0.05, None),
    (SlicedScoreMatching(), Energy, 0.3, 0.6),
    (NCE(GaussianMixture([[0.0, 0.0]], [0.8]), draws=4), Energy, 0.2, 0.5),
    (ConditionalNCE(0.3, draws=4), Energy, 0.05, 0.3),
]


@pytest.mark.parametrize(("objective", "head", "error", "deviation"), LEARNERS)
def test_every_objective_learns_each_class(
    objective: Objective,
    head: type,
    error: float,
    deviation: float | None,
    mixture: GaussianMixture,
) -> None:
    """The score, and where there is one the density, of each class; of noisy or of clean data."""
    torch.manual_seed(0)
    schedule = VE(0.05, 10.0)
    settings = {"normalised": True} if isinstance(objective, NCE) else {}
    denoiser = head(MLP(2, u_dim=3, width=64, depth=2), schedule, **settings)
    steps = 300
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in range(steps):
        noise = Noise("train", i)
        x, k = mixture.sample(noise, 256)
        loss = objective(denoiser, x.float(), Condition(torch.eye(3)[k][:, None]), noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()

    one_level = isinstance(objective, OneLevelDSM)
    t = objective.time(schedule).float() if one_level else torch.zeros(())
    errors, swapped, gaps = [], [], []
    given = [Condition(row.expand(500, 1, 3)) for row in torch.eye(3)]
    for k in range(3):
        std = torch.hypot(mixture.stds[k], torch.tensor(0.2 if one_level else 0.0))
        law = GaussianMixture(mixture.means[k : k + 1], std[None])
        x = law.draw(Noise("test", k), 500)
        phi = law.score(x)
        with torch.no_grad():
            for found, guess in ((errors, k), (swapped, (k + 1) % 3)):
                learned = denoiser.score(x.float(), t, given[guess])
                found.append(((learned - phi).square().sum() / phi.square().sum()).item())
            if deviation is not None:
                log_p = denoiser.log_prob(x.float(), t, given[k])
                gap = log_p - law.log_prob(x)
                if not isinstance(objective, NCE):  # it alone learns the constant
                    gap = gap - gap.mean()
                gaps.append(gap.square().mean().sqrt().item())
    # measured: at most half of what each row allows; for the wrong class 2 or more, 0.57 for the
    # energy that was matched by slices, the noisiest of all objectives
    assert max(errors) < error
    assert min(swapped) > 0.4
    assert deviation is None or max(gaps) < deviation
