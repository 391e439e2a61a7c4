"""Denoisers: conditional means of exact laws, and the preconditionings against their papers."""

import math

import pytest
import torch
from energies import one_hot
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pipeline.condition import Condition, U
from pipeline.denoisers import (
    EDM,
    Clean,
    Denoiser,
    Epsilon,
    Flow,
    Preconditioned,
    ScoreDenoiser,
    V,
)
from pipeline.mcmc.targets import GaussianMixture, Target
from pipeline.networks import MLP, Network
from pipeline.noise import Noise
from pipeline.schedules import VE, VP, Cosine, DiscreteVP, Rectified, Schedule

SCHEDULES = [VP(), Cosine(), VE(), Rectified(), DiscreteVP()]
OUTPUTS = [EDM, Flow, Clean, Epsilon, V]
TIMES = [0.0, 0.1, 0.5, 0.9, 1.0]
EPS = torch.finfo(torch.float64).eps


def named(schedule: Schedule) -> str:
    return type(schedule).__name__


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def noisy(
    mixture: GaussianMixture, schedule: Schedule, t: Tensor, n: int = 64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, its class k, x_t and the noise n."""
    noise = Noise("noisy")
    x, k = mixture.sample(noise, n)
    eps = noise.normal(x)
    alpha_t, sigma_t = schedule(t)
    return x, k, alpha_t.reshape(-1, 1) * x + sigma_t.reshape(-1, 1) * eps, eps


def posterior_mean(
    mixture: GaussianMixture, x_t: Tensor, alpha: Tensor, sigma: Tensor, k: int | None = None
) -> Tensor:
    """E[x | x_t] by Bayes' rule on (component, x): the linear-Gaussian formulas, in the
    information form, weighed by the evidence of each component.
    """
    eye = torch.eye(x_t.shape[-1], dtype=torch.float64)
    means, evidence = [], []
    for j in range(len(mixture.weights)):
        m, v = mixture.means[j], mixture.stds[j] ** 2
        precision = 1 / v + alpha**2 / sigma**2
        means.append((m / v + alpha * x_t / sigma**2) / precision)
        law = MultivariateNormal(alpha * m, (alpha**2 * v + sigma**2) * eye)
        evidence.append(mixture.weights[j].log() + law.log_prob(x_t))
    if k is not None:
        return means[k]
    share = torch.stack(evidence).softmax(dim=0)  # (K, B)
    return torch.einsum("kb,kbd->bd", share, torch.stack(means))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("t", TIMES)
def test_score_denoiser_is_the_posterior_mean(
    schedule: Schedule, t: float, mixture: GaussianMixture
) -> None:
    denoiser, time = ScoreDenoiser(mixture, schedule), f64(t)
    _, _, x_t, _ = noisy(mixture, schedule, time)
    alpha, sigma = schedule(time)
    exact = posterior_mean(mixture, x_t, alpha, sigma)
    # x_t + σ² φ cancels to α D: eps |x_t| / α, and |x_t| / α reaches some thousands at t = 1
    assert (denoiser(x_t, time) - exact).abs().max() < 1e-10
    for k in range(3):
        u = Condition(torch.eye(3)[k].expand(len(x_t), 1, 3))
        exact = posterior_mean(mixture, x_t, alpha, sigma, k)
        assert (denoiser(x_t, time, u) - exact).abs().max() < 1e-10


def test_score_denoiser_by_quadrature() -> None:
    """E[x | x_t] = ∫ x p(x) N(x_t; α x, σ²) dx / ∫ p(x) N(x_t; α x, σ²) dx, on the line."""
    line = GaussianMixture(f64([[-1.0], [0.5]]), [0.2, 0.4], [0.3, 0.7])  # type: ignore[arg-type]
    x = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    x_t = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    for schedule in SCHEDULES:
        t = schedule.time(f64(0.7))
        alpha, sigma = schedule(t)
        joint = line.log_prob(x[:, None]) - (x_t - alpha * x) ** 2 / (2 * sigma**2)
        joint = (joint - joint.max(dim=1, keepdim=True).values).exp()  # (21, 8001)
        exact = torch.trapezoid(x * joint, x) / torch.trapezoid(joint, x)
        d = ScoreDenoiser(line, schedule)(x_t, t)[:, 0]
        assert (d - exact).abs().max() < 1e-10  # the rule is exact to rounding: 8001 · eps


def test_the_mean_is_the_best_guess(mixture: GaussianMixture) -> None:
    """E[(x − D) f(x_t)] = 0 for every f: D is a conditional mean under sampling itself."""
    n = 40_000
    t, schedule = f64(0.4), Cosine()
    x, _, x_t, _ = noisy(mixture, schedule, t, n)
    error = x - ScoreDenoiser(mixture, schedule)(x_t, t)
    for f in (torch.ones_like(x_t), x_t, torch.sin(3 * x_t), x_t.flip(1) ** 2):
        products = error * f
        assert (products.mean(dim=0).abs() < 4 * products.std(dim=0) / n**0.5).all()  # 4 s.e.


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("t", TIMES)
def test_score_inverts_score_denoiser(
    schedule: Schedule, t: float, mixture: GaussianMixture
) -> None:
    denoiser, time = ScoreDenoiser(mixture, schedule), f64(t)
    _, k, x_t, _ = noisy(mixture, schedule, time)
    alpha, sigma = schedule(time)
    for u in (None, Condition(torch.eye(3)[k][:, None])):
        exact = mixture.diffuse(alpha, sigma, u).score(x_t)
        # α D − x_t cancels at low noise: some eps |x_t|, divided by σ²
        tolerance = 1e-10 + 16 * EPS * x_t.abs().max() / sigma**2
        assert (denoiser.score(x_t, time, u) - exact).abs().max() < tolerance
        assert torch.equal(denoiser.at(time, u).score(x_t), denoiser.score(x_t, time, u))
        assert isinstance(denoiser.at(time, u), Target)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_a_time_per_example(schedule: Schedule, mixture: GaussianMixture) -> None:
    t = torch.linspace(0, 1, 8, dtype=torch.float64)
    _, _, x_t, _ = noisy(mixture, schedule, t, 8)
    for denoiser in (ScoreDenoiser(mixture, schedule), edm(schedule), flow(schedule)):
        u = one_hot(torch.arange(8) % 3, 3)
        together, score = denoiser(x_t, t, u), denoiser.score(x_t, t, u)
        for i in range(8):
            row = slice(i, i + 1)
            # one row or eight: matrix products may sum in another order; / σ² for the score
            assert torch.allclose(together[row], denoiser(x_t[row], t[i], u[row]), atol=1e-10)
            alone = denoiser.score(x_t[row], t[i], u[row])
            assert torch.allclose(score[row], alone, rtol=1e-6, atol=1e-6)


class Recorder(Network):
    """A network that remembers what it was given and answers a smooth function of it."""

    def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
        self.x, self.level = x, level
        shift = 0 if u is None else u.tokens.sum(dim=(1, 2)).reshape(-1, *[1] * (x.ndim - 1))
        self.output = torch.sin(2 * x + level.reshape(-1, *[1] * (x.ndim - 1))) + shift
        return self.output


def edm(schedule: Schedule, sigma_data: float = 0.5) -> EDM:
    return EDM(Recorder(), schedule, sigma_data)


def flow(schedule: Schedule) -> Flow:
    return Flow(Recorder(), schedule)


def clean(schedule: Schedule, sigma_data: float = 0.5) -> Clean:
    return Clean(Recorder(), schedule, sigma_data)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("schedule", [VP(), Cosine(), DiscreteVP()], ids=named)
def test_epsilon_and_v_are_their_papers_(schedule: Schedule, t: float) -> None:
    """Under a variance-preserving schedule the network sees x_t itself, and x = (x_t − σ ε) / α
    (Ho et al.) or α x_t − σ v (Salimans & Ho).
    """
    x_t = Noise("outputs").normal(torch.zeros(6, 3, 2, 2, dtype=torch.float64))
    alpha, sigma = schedule(f64(t))
    for family in (Epsilon, V):
        denoiser = family(Recorder(), schedule)
        d, f = denoiser(x_t, f64(t)), denoiser.network.output
        assert torch.allclose(denoiser.network.x, x_t, rtol=1e-9)
        expected = (x_t - sigma * f) / alpha if family is Epsilon else alpha * x_t - sigma * f
        assert torch.allclose(d, expected, rtol=1e-9, atol=1e-9)  # s² ≤ 1e6 times eps


def test_epsilon_and_v_of_the_true_noise_are_the_data(mixture: GaussianMixture) -> None:
    class Known(Network):
        def __init__(self, answer: Tensor) -> None:
            super().__init__()
            self.answer = answer

        def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
            return self.answer

    t = torch.linspace(0, 1, 64, dtype=torch.float64)
    for schedule in SCHEDULES:
        x_0, _, x_t, n = noisy(mixture, schedule, t)
        s = schedule.ratio(t)[:, None]
        alpha = (1 + s**2) ** -0.5  # of the variance-preserving schedule at this ratio
        for family, answer in ((Epsilon, n), (V, alpha * n - s * alpha * x_0)):
            # y = x + s n is 1e3 at most: eps times that
            assert (family(Known(answer), schedule)(x_t, t) - x_0).abs().max() < 1e-11


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("family", OUTPUTS)
def test_one_network_gives_one_d_by_every_output(
    family: type[Preconditioned], schedule: Schedule
) -> None:
    """EDM's network, wrapped to answer what another output asks for, is the same D at every
    level.
    """
    edm_ = edm(schedule)
    other = family(nn.Identity(), schedule)

    class Wrapped(Network):
        def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
            s = level.exp()
            (a, b, c), (c_in, c_skip, c_out) = (
                [v[:, None] for v in one.scales(s)] for one in (other, edm_)
            )
            y = x / a
            return (c_skip * y + c_out * edm_.network(c_in * y, level, u) - b * y) / c

    other.network = Wrapped()
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    x_t = Noise("agree").normal(torch.zeros(101, 2, dtype=torch.float64))
    u = one_hot(torch.arange(101) % 3, 3)
    # y = x_t / α reaches 1e3, and D is a difference of its multiples: eps times that
    assert torch.allclose(other(x_t, t, u), edm_(x_t, t, u), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("t", TIMES)
def test_clean_is_the_network_s_output(schedule: Schedule, t: float) -> None:
    x_t = Noise("x").normal(torch.zeros(5, 3, 2, 2, dtype=torch.float64))
    denoiser = clean(schedule, 0.7)
    d = denoiser(x_t, f64(t))
    alpha, sigma = schedule(f64(t))
    assert torch.equal(d, denoiser.network.output)
    expected = x_t / alpha / torch.hypot(sigma / alpha, f64(0.7))
    assert torch.allclose(denoiser.network.x, expected, rtol=1e-12)
    assert denoiser.weight(f64(t)) == 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("sigma_d", [0.5, 1.3])
def test_edm_is_table_1(schedule: Schedule, t: float, sigma_d: float) -> None:
    """Karras et al. write D(y; σ) for y = x + σ n; here y = x_t / α_t and σ = σ_t / α_t."""
    x_t = Noise("x").normal(torch.zeros(5, 3, 2, 2, dtype=torch.float64))
    denoiser = edm(schedule, sigma_d)
    d = denoiser(x_t, f64(t))
    alpha, sigma = (v.item() for v in schedule(f64(t)))
    y, s = x_t / alpha, sigma / alpha
    network = denoiser.network
    norm = math.hypot(s, sigma_d)
    # float64 rounding of sums and roots of numbers that reach 1e3
    assert torch.allclose(network.x, y / norm, rtol=1e-12)
    assert torch.allclose(network.level, torch.full((5,), math.log(s)).double(), atol=1e-6)
    expected = y * (sigma_d / norm) ** 2 + s * sigma_d / norm * network.output
    assert torch.allclose(d, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_edm_scales_to_unit_variance(schedule: Schedule, t: float) -> None:
    """Appendix B.6: the input and the target of the network have variance 1, and c_skip is where
    c_out is least.
    """
    s = schedule.ratio(f64(t))
    for sigma_d in (0.3, 1.0, 2.0):
        c_in, c_skip, c_out = edm(schedule, sigma_d).scales(s)
        # the target (x − c_skip y) / c_out of y = x + s n; float64 rounding of 1 + s², s² ≤ 1e6
        target = ((1 - c_skip) ** 2 * sigma_d**2 + c_skip**2 * s**2) / c_out**2
        assert target.item() == pytest.approx(1, abs=1e-9)
        assert (c_in**2 * (sigma_d**2 + s**2)).item() == pytest.approx(1, abs=1e-12)
        least = 2 * (c_skip - 1) * sigma_d**2 + 2 * c_skip * s**2
        assert abs(least.item()) < 1e-9


def test_edm_network_sees_unit_variance() -> None:
    n, t = 20_000, torch.linspace(0, 1, 20_000, dtype=torch.float64)
    noise, schedule = Noise("unit"), VP()
    x = 0.5 * noise.normal(torch.zeros(n, 2, dtype=torch.float64))
    alpha, sigma = (v[:, None] for v in schedule(t))
    denoiser = edm(schedule, 0.5)
    denoiser(alpha * x + sigma * noise.normal(x), t)
    # 4 standard errors of a variance of 2n normal numbers, √(2 / 2n)
    assert denoiser.network.x.var().item() == pytest.approx(1, abs=4 / n**0.5)


@pytest.mark.parametrize("schedule", [VP(), Cosine()], ids=named)
@pytest.mark.parametrize("t", TIMES)
def test_edm_with_unit_data_is_v_prediction(schedule: Schedule, t: float) -> None:
    """v = α n − σ x (Salimans & Ho, 2022): x = α x_t − σ v, and the network gives −v."""
    x_t = Noise("v").normal(torch.zeros(6, 2, dtype=torch.float64))
    denoiser = edm(schedule, 1.0)
    d = denoiser(x_t, f64(t))
    alpha, sigma = schedule(f64(t))
    assert torch.allclose(denoiser.network.x, x_t, rtol=1e-9)  # it sees x_t itself
    v = -denoiser.network.output
    assert torch.allclose(d, alpha * x_t - sigma * v, rtol=1e-9, atol=1e-9)  # s² ≤ 1e6 times eps
    unit, other = (
        one.scales(schedule.ratio(f64(t))) for one in (denoiser, V(Recorder(), schedule))
    )
    for c, k in zip(unit, (*other[:2], -other[2]), strict=True):
        assert c.item() == pytest.approx(k.item(), rel=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("t", TIMES)
def test_flow_follows_the_straight_path(schedule: Schedule, t: float) -> None:
    r"""D = x̄ − t̄ v(x̄), where x̄ is what the straight path has at the same noise ratio."""
    x_t = Noise("flow").normal(torch.zeros(5, 3, 2, 2, dtype=torch.float64))
    denoiser = flow(schedule)
    d = denoiser(x_t, f64(t))
    alpha, sigma = schedule(f64(t))
    t_bar = sigma / (alpha + sigma)
    x_bar = x_t / (alpha + sigma)  # (1 − t̄) x + t̄ n
    assert torch.allclose(denoiser.network.x, x_bar, rtol=1e-12)
    assert torch.allclose(d, x_bar - t_bar * denoiser.network.output, rtol=1e-11, atol=1e-12)


def test_flow_of_the_true_velocity_is_the_data(mixture: GaussianMixture) -> None:
    class Velocity(Network):
        def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
            return n - x_0

    t = torch.linspace(0, 1, 64, dtype=torch.float64)
    for schedule in SCHEDULES:
        x_0, _, x_t, n = noisy(mixture, schedule, t)
        d = Flow(Velocity(), schedule)(x_t, t)
        assert (d - x_0).abs().max() < 1e-12  # float64 rounding of numbers near 1


@pytest.mark.parametrize("family", OUTPUTS)
@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=named)
def test_rescheduling_leaves_d_unchanged(
    family: type[Preconditioned], schedule: Schedule, mixture: GaussianMixture
) -> None:
    def make(schedule: Schedule) -> Preconditioned:
        return family(Recorder(), schedule)

    reference = VP()
    t = torch.linspace(0.1, 0.9, 16, dtype=torch.float64)  # ratios that all schedules reach
    s = schedule.time(reference.ratio(t))
    assert 0 < s.min() and s.max() < 1
    _, k, x_t, _ = noisy(mixture, reference, t, 16)
    x_s = (schedule(s)[0] / reference(t)[0])[:, None] * x_t
    u = one_hot(k, 3)
    # the time of a ratio is known to eps: 1e-10 leaves room for a slope of 1e5
    assert (make(reference)(x_t, t, u) - make(schedule)(x_s, s, u)).abs().max() < 1e-10
    exact = ScoreDenoiser(mixture, reference)(x_t, t, u)
    assert (ScoreDenoiser(mixture, schedule)(x_s, s, u) - exact).abs().max() < 1e-10
    assert torch.allclose(make(reference).weight(t), make(schedule).weight(s), rtol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_weight_puts_the_error_in_units_of_the_network(schedule: Schedule) -> None:
    """w |D − x|² = |F − F*|², where F* is the output that gives D = x."""
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    x_t = Noise("w").normal(torch.zeros(9, 2, dtype=torch.float64))
    for denoiser in (family(Recorder(), schedule) for family in OUTPUTS):
        d = denoiser(x_t, t)
        f = denoiser.network.output

        class Nudged(Network):
            def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
                return f + 1  # noqa: B023 (used in this turn of the loop only)

        denoiser.network = Nudged()
        moved = ((denoiser(x_t, t) - d) ** 2).mean(dim=1)
        # D reaches 1e3 and moves by c_out ≥ 1e-3: eps · 1e6, squared against 1
        assert torch.allclose(denoiser.weight(t) * moved, torch.ones_like(t), rtol=1e-8)
    assert torch.allclose(edm(schedule).weight(t), 4 + schedule.ratio(t) ** -2, rtol=1e-9)
    assert torch.allclose(flow(schedule).weight(t), (1 + 1 / schedule.ratio(t)) ** 2, rtol=1e-9)
    snr = schedule.ratio(t) ** -2  # ε's own weight, and v's: SNR + 1 (Salimans & Ho, section 4)
    assert torch.allclose(Epsilon(Recorder(), schedule).weight(t), snr, rtol=1e-9)
    assert torch.allclose(V(Recorder(), schedule).weight(t), snr + 1, rtol=1e-9)


@pytest.mark.parametrize("family", OUTPUTS)
def test_a_low_precision_network_leaves_the_sum_in_float32(family: type[Preconditioned]) -> None:
    torch.manual_seed(0)
    seen = []
    network = MLP(2, width=16, depth=1)
    nn.init.normal_(network.output.weight)
    network.output.register_forward_hook(lambda m, a, y: seen.append(y.dtype))
    denoiser = family(network, Rectified())
    x_t = Noise("bf16").normal(torch.zeros(32, 2))
    t = torch.linspace(0, 1, 32)
    full = denoiser(x_t, t)
    denoiser.precision = torch.bfloat16
    low = denoiser(x_t, t)
    assert seen == [torch.float32, torch.bfloat16]
    assert low.dtype == full.dtype == torch.float32
    # the difference is the network's, so it shrinks with c_out: F is near 1, bfloat16 has 8 bits
    c_out = denoiser.scales(denoiser.schedule.ratio(t))[2].abs()[:, None]
    difference = (low - full).abs()
    assert 0 < difference.max() and (difference < 2**-4 * c_out).all()
    nn.init.zeros_(network.output.weight)
    y = x_t / denoiser.schedule(t)[0][:, None]
    c_skip = denoiser.scales(denoiser.schedule.ratio(t))[1][:, None]
    assert torch.equal(denoiser(x_t, t), c_skip * y)  # nothing of the skip was rounded to 8 bits


def test_float32_and_float64_agree() -> None:
    """The preconditioning in float32, as training has it, to the accuracy of its scales."""
    t = torch.linspace(0, 1, 64)
    x_t = Noise("f32").normal(torch.zeros(64, 2))
    for schedule in SCHEDULES:
        for denoiser in (family(Recorder(), schedule) for family in OUTPUTS):
            low, exact = denoiser(x_t, t), denoiser(x_t.double(), t.double())
            # Cosine knows α_1 = 1e-3 to 1e-4 in float32, and D is its multiple; else 30 eps
            tolerance = 1e-3 if isinstance(schedule, Cosine) else 5e-5
            assert ((low - exact).abs() < tolerance * (1 + exact.abs())).all()


def test_u_and_level_reach_the_network() -> None:
    class Probe(Network):
        def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
            assert u is not None and level.shape == (len(x),)
            return x * 0 + u.tokens[:, 0, :1]

    u = Condition(torch.tensor([1.0, 2.0, 3.0])[:, None, None])
    denoiser = Flow(Probe(), VE())
    x, null = torch.zeros(3, 2), u.map(torch.zeros_like)
    difference = denoiser(x, torch.tensor(0.5), u) - denoiser(x, torch.tensor(0.5), null)
    c_out = denoiser.scales(VE().ratio(torch.tensor(0.5)))[2]
    assert torch.allclose(difference, c_out * u.tokens[:, 0])


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, float("nan")])
def test_sigma_data_is_positive(sigma_data: float) -> None:
    with pytest.raises(ValueError, match="sigma_data"):
        EDM(nn.Identity(), VP(), sigma_data)
    with pytest.raises(ValueError, match="sigma_data"):
        Clean(nn.Identity(), VP(), sigma_data)


def test_a_denoiser_is_abstract() -> None:
    with pytest.raises(TypeError):
        Denoiser(VP())  # type: ignore[abstract]
