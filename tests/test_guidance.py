"""Guidance: a linear combination of two scores, at the cost of one batch."""

import math

import pytest
import torch
from energies import one_hot
from torch import Tensor, nn

from pipeline.codec import Columns
from pipeline.condition import Condition, U
from pipeline.denoisers import EDM, Denoiser, Energy, ScoreDenoiser
from pipeline.errors import UserError
from pipeline.generator import Generator
from pipeline.guidance import Autoguidance, ByPart, ClassifierFree
from pipeline.mcmc.targets import GaussianMixture, NoDensity
from pipeline.networks import MLP, Network
from pipeline.noise import Noise, PictureNoise
from pipeline.samplers import DDIM, DPMSolver, Heun, UniPC
from pipeline.schedules import VE, VP, Cosine, Rectified, Schedule

SCHEDULES = [VP(), Cosine(), VE(), Rectified()]
NULL = Condition(torch.zeros(1, 1, 3, dtype=torch.float64))
CLOSE = 1e-9  # float64; D at the noise end cancels numbers of a thousand


def named(schedule: Schedule) -> str:
    return type(schedule).__name__


class Gaussians:
    """N(m, s² I) under any condition but null, which is N(0, S² I)."""

    m, s, S = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.5, 1.5

    def diffuse(self, alpha: Tensor, sigma: Tensor, u: U) -> GaussianMixture:
        assert u is not None and u.tokens is not None
        given = (u.tokens != 0).any(dim=-1)  # (B, 1)
        means = torch.where(given[..., None], self.m, 0.0)  # (B, 1, 2)
        stds = torch.where(given, self.s, self.S).double()
        clean = GaussianMixture(means, stds)
        return clean.diffuse(alpha, sigma)


class Counter(Denoiser):
    """A denoiser that counts its calls and their rows."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner.schedule)
        self.inner, self.rows = inner, []

    def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        self.rows.append(len(x_t))
        return self.inner(x_t, t, u)


def inputs(schedule: Schedule, t: Tensor) -> tuple[Tensor, Condition, Condition]:
    x_t = Noise("guidance").normal(torch.zeros(6, 2, dtype=torch.float64))
    sigma_t = schedule(t)[1]
    return x_t * (1 + sigma_t.reshape(-1, 1)), one_hot(torch.arange(6) % 3, 3), NULL


TIMES = [torch.tensor(0.4).double(), torch.linspace(0.05, 0.95, 6, dtype=torch.float64)]


def test_scale_1_is_the_denoiser_itself(mixture: GaussianMixture) -> None:
    denoiser = ScoreDenoiser(mixture, VP())
    assert ClassifierFree()(denoiser, NULL) is denoiser
    assert ClassifierFree(1)(denoiser, NULL) is denoiser
    assert ClassifierFree(1.0)(denoiser, None) is denoiser
    with pytest.raises(ValueError, match="scale = 3.0 needs a null condition"):
        ClassifierFree(3.0)(denoiser, None)


@pytest.mark.parametrize("t", TIMES, ids=["()", "(B,)"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_scale_0_is_the_unconditional_denoiser(
    schedule: Schedule, t: Tensor, mixture: GaussianMixture
) -> None:
    counter = Counter(ScoreDenoiser(mixture, schedule))
    x_t, u, null = inputs(schedule, t)
    guided = ClassifierFree(0.0)(counter, null)(x_t, t, u)
    assert counter.rows == [6]  # one evaluation
    assert torch.equal(guided, counter.inner(x_t, t, null.expand(6)))
    assert torch.equal(guided, counter.inner(x_t, t))  # of this law: the whole mixture
    assert not torch.allclose(guided, counter.inner(x_t, t, u), rtol=1e-3)


@pytest.mark.parametrize("t", TIMES, ids=["()", "(B,)"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_linear_in_the_scale(schedule: Schedule, t: Tensor, mixture: GaussianMixture) -> None:
    counter = Counter(ScoreDenoiser(mixture, schedule))
    x_t, u, null = inputs(schedule, t)
    d, d_null = counter.inner(x_t, t, u), counter.inner(x_t, t)
    for w in (-1.0, 0.0, 0.3, 1.0, 2.0, 7.5):
        guided = ClassifierFree(w)(counter, null)(x_t, t, u)
        assert torch.allclose(guided, d_null + w * (d - d_null), rtol=CLOSE, atol=CLOSE)
    # scales 0 and 1 cost one evaluation, every other two in one batch
    assert counter.rows == [12, 6, 12, 6, 12, 12]


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_guided_score_of_two_gaussians(schedule: Schedule, w: float) -> None:
    """(1 − w) φ_∅ + w φ_u, with the scores of N(α m, α² s² + σ²) written out."""
    law = Gaussians()
    denoiser = ScoreDenoiser(law, schedule)  # type: ignore[arg-type]
    for t in TIMES:
        x_t, u, null = inputs(schedule, t)
        alpha, sigma = (v.reshape(-1, 1) for v in schedule(t))
        phi_null = -x_t / (alpha**2 * law.S**2 + sigma**2)
        phi_u = (alpha * law.m - x_t) / (alpha**2 * law.s**2 + sigma**2)
        guided = ClassifierFree(w)(denoiser, null)
        expected = (1 - w) * phi_null + w * phi_u
        assert torch.allclose(guided.score(x_t, t, u), expected, rtol=1e-7, atol=CLOSE)
        assert torch.allclose(guided.at(t, u).score(x_t), expected, rtol=1e-7, atol=CLOSE)


def test_guided_score_is_that_of_a_power_of_the_likelihood(mixture: GaussianMixture) -> None:
    """φ_w = ∇ [log p(x) + w log p(u | x)], p(u = k | x) by Bayes' rule; by autograd."""
    schedule, t, w, k = Cosine(), torch.tensor(0.3).double(), 2.5, 1
    x_t, _, null = inputs(schedule, t)
    u = one_hot(torch.full((6,), k), 3)
    alpha, sigma = schedule(t)
    x_t.requires_grad_()
    log_p = mixture.diffuse(alpha, sigma).log_prob(x_t)
    likelihood = mixture.diffuse(alpha, sigma, u).log_prob(x_t) - log_p
    (expected,) = torch.autograd.grad((log_p + w * likelihood).sum(), x_t)
    x_t = x_t.detach()
    guided = ClassifierFree(w)(ScoreDenoiser(mixture, schedule), null)
    assert torch.allclose(guided.score(x_t, t, u), expected, rtol=CLOSE, atol=CLOSE)


def random_network(seed: int, u_dim: int) -> Network:
    torch.manual_seed(seed)
    network = MLP(2, u_dim=u_dim, width=16, depth=1).double()
    nn.init.normal_(network.output.weight)
    return network


@pytest.mark.parametrize(("length", "null_length"), [(1, 4), (4, 1), (3, 3)])
def test_tokens_of_another_length(length: int, null_length: int) -> None:
    denoiser = EDM(random_network(0, 5), VP())
    noise = Noise("tokens")
    x_t = noise.normal(torch.zeros(6, 2, dtype=torch.float64))
    u = Condition(noise.normal(torch.zeros(6, length, 5, dtype=torch.float64)))
    null = Condition(noise.normal(torch.zeros(1, null_length, 5, dtype=torch.float64)))
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    d_null, d = denoiser(x_t, t, null.expand(6)), denoiser(x_t, t, u)
    for w in (0.0, 4.0):
        guided = ClassifierFree(w)(denoiser, null)(x_t, t, u)
        assert torch.allclose(guided, d_null + w * (d - d_null), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_guidance_needs_a_condition(w: float, mixture: GaussianMixture) -> None:
    guided = ClassifierFree(w)(ScoreDenoiser(mixture, VP()), NULL)
    with pytest.raises(ValueError, match="needs a condition"):
        guided(torch.zeros(2, 2), torch.tensor(0.5), None)


def test_pictures_are_guided_too() -> None:
    class Plain(Network):
        def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
            assert u is not None and u.tokens is not None
            return x + u.tokens.sum(dim=(1, 2))[:, None, None, None]

    x_t = Noise(0).normal(torch.zeros(3, 1, 4, 4, dtype=torch.float64))
    u = Condition(torch.arange(1.0, 4.0, dtype=torch.float64)[:, None, None])
    null = u[:1].map(torch.zeros_like)
    denoiser = EDM(Plain(), Rectified())
    t = torch.tensor([0.2, 0.5, 0.8]).double()
    d, d_null = denoiser(x_t, t, u), denoiser(x_t, t, null.expand(3))
    guided = ClassifierFree(2.0)(denoiser, null)(x_t, t, u)
    assert torch.allclose(guided, 2 * d - d_null, rtol=CLOSE)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("w", [0.0, 3.0])
def test_null_planes_are_the_weaker_half(w: float, tokens: bool) -> None:
    seen = []

    class Beside(Network):
        planes = 1

        def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
            assert u is not None and u.planes is not None
            seen.append(u.planes)
            given = 0 if u.tokens is None else u.tokens.sum(dim=(1, 2))[:, None, None, None]
            return torch.sin(x * u.planes) + given

    noise = Noise("planes")
    x_t, planes, null_planes = (
        noise.normal(torch.zeros(n, 1, 4, 4, dtype=torch.float64)) for n in (3, 3, 1)
    )
    u = Condition(torch.ones(3, 1, 2).double() if tokens else None, planes)
    null = Condition(torch.zeros(1, 4, 2).double() if tokens else None, null_planes)
    denoiser, t = EDM(Beside(), Rectified()), torch.tensor([0.2, 0.5, 0.8]).double()
    guided = ClassifierFree(w)(denoiser, null)(x_t, t, u)
    assert torch.equal(seen[0][:3], null_planes.expand(3, -1, -1, -1))
    assert torch.equal(seen[0][3:], planes[: 3 if w else 0])
    d, d_null = denoiser(x_t, t, u), denoiser(x_t, t, null.expand(3))
    assert torch.allclose(guided, d_null + w * (d - d_null), rtol=CLOSE, atol=CLOSE)


class Parts(Gaussians):
    """N(m, v I): tokens and planes each move the mean, and each divides the variance."""

    def diffuse(self, alpha: Tensor, sigma: Tensor, u: U) -> GaussianMixture:
        assert u is not None
        c, p = (torch.zeros(len(u), 1, dtype=torch.bool) for _ in range(2))
        c = c if u.tokens is None else (u.tokens != 0).any(dim=-1)[:, :1]
        p = p if u.planes is None else u.planes.flatten(1).any(dim=1, keepdim=True)
        return GaussianMixture(*self.law(c, p)).diffuse(alpha, sigma)

    def law(self, c: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.where(c[..., None], self.m, 0.0) + torch.where(p[..., None], -3.0, 0.0)
        return mean, 1.5 / (1 + c.double() + 2 * p.double()).sqrt()  # (B, 1, 2), (B, 1)


def in_parts(schedule: Schedule, t: Tensor) -> tuple[Tensor, Condition, Condition]:
    x_t, u, null = inputs(schedule, t)
    planes = torch.ones(6, 1, 2, 2, dtype=torch.float64)
    return x_t, Condition(u.tokens, planes), Condition(null.tokens, torch.zeros_like(planes[:1]))


@pytest.mark.parametrize(("w", "w_p"), [(2.0, 1.5), (3.0, 1.0), (1.0, 2.0), (0.0, 2.0), (1, 1)])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_guided_score_by_part_of_gaussians(schedule: Schedule, w: float, w_p: float) -> None:
    """φ(∅,∅) + w_p (φ(∅,p) − φ(∅,∅)) + w (φ(c,p) − φ(∅,p)), the scores written out."""
    law = Parts()
    counter = Counter(ScoreDenoiser(law, schedule))  # type: ignore[arg-type]
    guided = ByPart(w, w_p)(counter, in_parts(schedule, TIMES[0])[2])
    for t in TIMES:
        x_t, u, _ = in_parts(schedule, t)
        alpha, sigma = (v.reshape(-1, 1) for v in schedule(t))

        def phi(c: bool, p: bool) -> Tensor:
            mean, std = law.law(*(torch.full((6, 1), given) for given in (c, p)))
            return (alpha * mean[:, 0] - x_t) / (alpha**2 * std**2 + sigma**2)  # noqa: B023

        none, picture, both = phi(False, False), phi(False, True), phi(True, True)
        expected = none + w_p * (picture - none) + w * (both - picture)
        assert torch.allclose(guided.score(x_t, t, u), expected, rtol=1e-7, atol=CLOSE)
        assert torch.allclose(guided.at(t, u).score(x_t), expected, rtol=1e-7, atol=CLOSE)
    counter.rows.clear()
    guided(x_t, t, u)
    terms = sum(abs(c) > 0 for c in (1 - w_p, w_p - w, w))
    assert counter.rows == [6 * terms]  # no more is evaluated than counts


@pytest.mark.parametrize("part", ["tokens", "planes"])
def test_guidance_by_part_of_one_part_is_classifier_free(part: str) -> None:
    t = TIMES[1]
    x_t, u, null = (in_parts(VP(), t)[k] for k in range(3))
    u, null = (Condition(**{part: getattr(one, part)}) for one in (u, null))
    counter = Counter(ScoreDenoiser(Parts(), VP()))  # type: ignore[arg-type]
    scales = {"scale": 3.0, "planes_scale": 0.5} if part == "tokens" else {"planes_scale": 3.0}
    found = ByPart(**scales)(counter, null)(x_t, t, u)
    expected = ClassifierFree(3.0)(counter.inner, null)(x_t, t, u)
    assert torch.allclose(found, expected, rtol=CLOSE, atol=CLOSE) and counter.rows == [12]


@pytest.mark.parametrize("t", TIMES[:2])
def test_guidance_of_one_part_of_several(t: Tensor) -> None:
    """φ of p(x | a, b) p(b | x, a)² / p(a | x, b), with Gaussian likelihoods of both."""
    schedule, blocks = VP(), {"a": slice(0, 1), "b": slice(1, 3)}
    x_t, u, null = inputs(schedule, t)
    tokens = torch.rand(len(x_t), 1, 3, generator=torch.Generator().manual_seed(1)).to(x_t) + 0.5

    class Likelihoods(Denoiser):
        """φ of N(x; 0, 1) N(a; Σx, 1) N(b; x, 1), of the parts that are not null: D is linear in
        it, and stands for it here.
        """

        def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
            assert u is not None and u.tokens is not None
            a, b = u.tokens[:, 0, :1], u.tokens[:, 0, 1:]
            return -x_t + (a - x_t.sum(1, keepdim=True)) * (a != 0) + (b - x_t) * (b != 0)

    denoiser = Counter(Likelihoods(schedule))
    guidance = ByPart(1.0, parts={"b": 3.0, "a": 0.0})
    guidance.blocks = blocks
    b = tokens[:, 0, 1:]
    expected = -x_t + 3 * (b - x_t)  # and 0 times that of a
    found = guidance(denoiser, Condition(torch.zeros(1, 1, 3).double()))
    assert torch.allclose(found(x_t, t, Condition(tokens)), expected, rtol=CLOSE, atol=CLOSE)
    assert denoiser.rows == [3 * len(x_t)]  # u, and u without each
    guidance.blocks = {}
    with pytest.raises(UserError, match="guidance.parts names 'a'.*are none"):
        guidance(denoiser, null)


def test_guidance_by_part_has_an_interval_and_a_density() -> None:
    schedule = VP()
    t = schedule.time(torch.tensor([0.1, 0.29, 0.31, 1.0, 1.99, 2.1]).double())
    inside = torch.tensor([False, False, True, True, True, False])
    x_t, u, null = in_parts(schedule, t)
    denoiser = ScoreDenoiser(Parts(), schedule)  # type: ignore[arg-type]
    for ask in ("__call__", "log_prob"):
        always, some = (
            getattr(ByPart(2.0, 1.5, where)(denoiser, null), ask)(x_t, t, u)
            for where in (None, [0.3, 2.0])
        )
        plain = getattr(denoiser, ask)(x_t, t, u)
        where = inside.reshape(-1, *[1] * (plain.ndim - 1))
        assert torch.allclose(some, torch.where(where, always, plain), rtol=CLOSE, atol=CLOSE)
        assert not torch.allclose(always, plain, rtol=1e-3)
    with pytest.raises(ValueError, match="needs a null condition"):
        ByPart()(denoiser, None)
    with pytest.raises(ValueError, match="needs a condition u"):
        ByPart()(denoiser, null)(x_t, t, None)


@pytest.mark.parametrize("schedule", [VP(), Rectified()], ids=named)
@pytest.mark.parametrize(
    ("family", "order"), [(DDIM, 1), (Heun, 2), (DPMSolver, 2), (UniPC, 3)], ids=str
)
def test_samplers_keep_their_order_where_guidance_begins_and_ends(
    family: type[DDIM | Heun | DPMSolver | UniPC], order: int, schedule: Schedule
) -> None:
    """Of D that jumps at two noise ratios: without a time there, and with steps that look across,
    errors fall by a factor of 3 for four times the steps.
    """
    denoiser = ScoreDenoiser(Gaussians(), schedule)  # type: ignore[arg-type]
    guided = ClassifierFree(3.0, [0.3, 2.0])(denoiser, NULL)
    assert guided.jumps == (0.3, 2.0)
    u, like = one_hot(torch.zeros(4).long(), 3), torch.empty(4, 2, dtype=torch.float64)

    def drawn(sampler: DDIM | Heun | DPMSolver | UniPC) -> Tensor:
        return sampler(guided, like, u, Noise("order"))

    truth = drawn(UniPC(1600))
    error = [(drawn(family(n)) - truth).abs().max().item() for n in (100, 400)]
    assert math.log2(error[0] / error[1]) > 2 * order - 0.5  # 1600 steps are 60 times nearer


@pytest.mark.parametrize("family", [Heun, DPMSolver])
def test_times_lie_just_below_the_jumps(family: type[Heun | DPMSolver]) -> None:
    denoiser = ScoreDenoiser(Gaussians(), VP())  # type: ignore[arg-type]
    for interval, moved in (([0.3, 2.0], 2), ([0.3, 1e6], 1), ([1e-9, 1e6], 0)):
        guided = ClassifierFree(3.0, interval)(denoiser, NULL)
        for steps in (1, 2, 3, 4, 18):
            t, grid = family(steps).times(guided), family(steps).grid(VP())
            r = VP().ratio(t)
            assert (t.diff() < 0).all() and len(t) == steps
            assert t[0] == 1 and (steps == 1 or t[-1] == 0)
            if steps < 2 + moved or not moved:
                assert torch.equal(t, grid)
                continue
            for jump in interval[:moved]:
                below = r[r < jump].max()
                assert 0 < 1 - below / jump < 1e-6  # as near as the time can say


@pytest.mark.parametrize("kind", ["classifier-free", "autoguidance"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_an_interval_leaves_the_rest_as_it_is(
    schedule: Schedule, kind: str, mixture: GaussianMixture
) -> None:
    """In D, in the score and in the density; a time outside costs one evaluation of one row."""
    weak, strong = pair("mixtures", schedule, mixture)
    interval = [0.3, 2.0]
    guidances = [
        Autoguidance(weak, 3.0, where) if kind == "autoguidance" else ClassifierFree(3.0, where)
        for where in (interval, None)
    ]
    t = schedule.time(torch.tensor([0.1, 0.29, 0.31, 1.0, 1.99, 2.1]).double())
    inside = torch.tensor([False, False, True, True, True, False])
    x_t, u, null = inputs(schedule, t)
    for ask in ("__call__", "score", "log_prob"):
        some, always = (getattr(guide(strong, null), ask)(x_t, t, u) for guide in guidances)
        plain = getattr(strong, ask)(x_t, t, u)
        where = inside.reshape(-1, *[1] * (plain.ndim - 1))
        assert torch.allclose(some, torch.where(where, always, plain), rtol=CLOSE, atol=CLOSE)
        assert not torch.allclose(always, plain, rtol=1e-3)
    counter = Counter(strong)
    guided = guidances[0](counter, null)
    for time in (t[0], t[3]):
        guided(x_t, time, u)
    assert counter.rows == [6, 6 if kind == "autoguidance" else 12]


def test_at_scale_0_there_is_no_interval(mixture: GaussianMixture) -> None:
    """The prompt is ignored, and not at some noise ratios only."""
    counter = Counter(ScoreDenoiser(mixture, VP()))
    x_t, u, null = inputs(VP(), TIMES[1])
    assert torch.equal(
        ClassifierFree(0.0, [0.5, 2])(counter, null)(x_t, TIMES[1], u),
        ClassifierFree(0.0)(counter, null)(x_t, TIMES[1], u),
    )
    assert counter.rows == [6, 6]


@pytest.mark.parametrize("interval", [[0.5], [2.0, 0.5], [-1.0, 1.0], [1.0, 1.0], [1, 2, 3]])
def test_an_interval_is_two_ratios(interval: list[float]) -> None:
    with pytest.raises(ValueError, match=r"interval = \[.*\] must be the least and the greatest"):
        ClassifierFree(2.0, interval)


# --- autoguidance -------------------------------------------------------------------------------


def pair(kind: str, schedule: Schedule, mixture: GaussianMixture) -> tuple[Denoiser, Denoiser]:
    """A weaker denoiser and a better one, both with a density."""
    if kind == "energies":
        weak, strong = (Energy(random_network(seed, 3), schedule).double() for seed in (0, 1))
        return weak, strong
    wider = GaussianMixture(mixture.means, 2 * mixture.stds, mixture.weights)
    return ScoreDenoiser(wider, schedule), ScoreDenoiser(mixture, schedule)


@pytest.mark.parametrize("t", TIMES, ids=["()", "(B,)"])
@pytest.mark.parametrize("kind", ["mixtures", "energies"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_autoguidance_is_linear(
    schedule: Schedule, kind: str, t: Tensor, mixture: GaussianMixture
) -> None:
    """In D, in the score and in the density; scale 1 is D and scale 0 is D' to the last bit."""
    weak, strong = pair(kind, schedule, mixture)
    x_t, u, null = inputs(schedule, t)
    for ask in ("__call__", "score", "log_prob"):
        a, b = (getattr(denoiser, ask)(x_t, t, u) for denoiser in (weak, strong))
        assert not torch.allclose(a, b, rtol=1e-3)
        for w in (-1.0, 0.0, 0.3, 1.0, 2.0, 7.5):
            found = getattr(Autoguidance(weak, w)(strong, null), ask)(x_t, t, u)
            assert torch.allclose(found, a + w * (b - a), rtol=CLOSE, atol=CLOSE)
            assert w not in (0, 1) or torch.equal(found, b if w else a)
    law = Autoguidance(weak, 2.0)(strong, null).at(t, u)
    log_p, score = law.log_prob_and_score(x_t)
    assert torch.equal(log_p, law.log_prob(x_t)) and torch.equal(score, law.score(x_t))


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_autoguided_score_of_two_gaussians(schedule: Schedule, w: float) -> None:
    """(1 − w) φ' + w φ of N(0, v) and N(0, 1), written out; without a condition."""
    v, center = 2.5, torch.zeros(1, 2, dtype=torch.float64)
    weak, strong = (
        ScoreDenoiser(GaussianMixture(center, [variance**0.5]), schedule) for variance in (v, 1.0)
    )
    guided = Autoguidance(weak, w)(strong, None)
    for t in TIMES:
        x_t, _, _ = inputs(schedule, t)
        alpha, sigma = (s.reshape(-1, 1) for s in schedule(t))
        phi_weak, phi = (-x_t / (alpha**2 * variance + sigma**2) for variance in (v, 1.0))
        expected = (1 - w) * phi_weak + w * phi
        assert torch.allclose(guided.score(x_t, t), expected, rtol=1e-7, atol=CLOSE)
        assert torch.allclose(guided.at(t).score(x_t), expected, rtol=1e-7, atol=CLOSE)
        d = (x_t + sigma**2 * expected) / alpha
        assert torch.allclose(guided(x_t, t, None), d, rtol=1e-7, atol=CLOSE)


@pytest.mark.parametrize("other", [Cosine(), VP(clip=1e-3)], ids=["Cosine", "VP"])
def test_autoguidance_needs_one_schedule(other: Schedule, mixture: GaussianMixture) -> None:
    guidance = Autoguidance(ScoreDenoiser(mixture, VP()))
    with pytest.raises(ValueError, match="needs one for both"):
        guidance(ScoreDenoiser(mixture, other), None)
    guidance(ScoreDenoiser(mixture, VP(0.1, 20.0)), None)  # the defaults, written out


def test_autoguidance_has_a_density_where_both_have(mixture: GaussianMixture) -> None:
    exact, learned = ScoreDenoiser(mixture, VP()), EDM(random_network(0, 3), VP())
    x_t, u, null = inputs(VP(), TIMES[0])
    for weak, strong in ((exact, learned), (learned, exact)):
        guided = Autoguidance(weak)(strong, null)
        assert guided.score(x_t, TIMES[0], u).isfinite().all()
        with pytest.raises(NoDensity, match="EDM has a score and no density"):
            guided.log_prob(x_t, TIMES[0], u)


def test_the_weaker_denoiser_is_not_trained() -> None:
    weak, strong = (EDM(random_network(seed, 0), VP()) for seed in (0, 1))
    x_t, _, _ = inputs(VP(), TIMES[0])
    Autoguidance(weak)(strong, None)(x_t, TIMES[0]).sum().backward()
    assert not weak.training and all(p.grad is None for p in weak.parameters())
    assert strong.training and any(p.grad is not None for p in strong.parameters())


def test_an_unconditional_model_is_guided_by_a_weaker_one(mixture: GaussianMixture) -> None:
    """And by no null condition, which it does not have."""
    assert ClassifierFree.needs_condition and not Autoguidance.needs_condition
    weak, strong = pair("mixtures", VP(), mixture)
    seeds, like = [3, 1, 4], torch.zeros(3, 2)

    def drawn(guidance: Autoguidance | ClassifierFree | None) -> Tensor:
        generator = Generator(strong, None, Columns(2), Heun(8), guidance)
        return torch.cat(list(generator([None] * 3, seeds, micro_batch=3)))

    guided = Heun(8)(Autoguidance(weak, 3.0)(strong, None), like, None, PictureNoise(seeds))
    assert torch.equal(drawn(Autoguidance(weak, 3.0)), guided)
    assert not torch.allclose(drawn(None), guided, rtol=1e-3)
    assert torch.equal(drawn(ClassifierFree(3.0)), drawn(None))
