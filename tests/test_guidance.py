"""Guidance: a linear combination of two scores, at the cost of one batch."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.denoisers import EDM, Denoiser, ScoreDenoiser
from pipeline.guidance import ClassifierFree
from pipeline.mcmc.targets import GaussianMixture
from pipeline.networks import MLP
from pipeline.noise import Noise
from pipeline.schedules import VE, VP, Cosine, Rectified, Schedule

SCHEDULES = [VP(), Cosine(), VE(), Rectified()]
CLOSE = 1e-9  # float64; D at the noise end cancels numbers of a thousand


def named(schedule: Schedule) -> str:
    return type(schedule).__name__


class Gaussians:
    """N(m, s² I) under any condition but null, which is N(0, S² I)."""

    m, s, S = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.5, 1.5

    def diffuse(self, alpha: Tensor, sigma: Tensor, u: Tensor | None) -> GaussianMixture:
        assert u is not None
        given = (u != 0).any(dim=-1)  # (B, 1)
        means = torch.where(given[..., None], self.m, 0.0)  # (B, 1, 2)
        stds = torch.where(given, self.s, self.S).double()
        clean = GaussianMixture(means, stds)
        return clean.diffuse(alpha, sigma)


class Counter(Denoiser):
    """A denoiser that counts its calls and their rows."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner.schedule)
        self.inner, self.rows = inner, []

    def forward(self, x_t: Tensor, t: Tensor, u: Tensor | None = None) -> Tensor:
        self.rows.append(len(x_t))
        return self.inner(x_t, t, u)


def inputs(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x_t = Noise("guidance").normal(torch.zeros(6, 2, dtype=torch.float64))
    sigma_t = schedule(t)[1]
    u = torch.eye(3, dtype=torch.float64)[torch.arange(6) % 3][:, None]
    return x_t * (1 + sigma_t.reshape(-1, 1)), u, torch.zeros(1, 1, 3, dtype=torch.float64)


TIMES = [torch.tensor(0.4).double(), torch.linspace(0.05, 0.95, 6, dtype=torch.float64)]


def test_scale_1_is_the_denoiser_itself(mixture: GaussianMixture) -> None:
    denoiser = ScoreDenoiser(mixture, VP())
    assert ClassifierFree()(denoiser, torch.zeros(1, 1, 3)) is denoiser
    assert ClassifierFree(1)(denoiser, torch.zeros(1, 1, 3)) is denoiser
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
    assert torch.equal(guided, counter.inner(x_t, t, null.expand(6, 1, 3)))
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
    u = torch.eye(3, dtype=torch.float64)[k].expand(6, 1, 3)
    alpha, sigma = schedule(t)
    x_t.requires_grad_()
    log_p = mixture.diffuse(alpha, sigma).log_prob(x_t)
    likelihood = mixture.diffuse(alpha, sigma, u).log_prob(x_t) - log_p
    (expected,) = torch.autograd.grad((log_p + w * likelihood).sum(), x_t)
    x_t = x_t.detach()
    guided = ClassifierFree(w)(ScoreDenoiser(mixture, schedule), null)
    assert torch.allclose(guided.score(x_t, t, u), expected, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize(("length", "null_length"), [(1, 4), (4, 1), (3, 3)])
def test_tokens_of_another_length(length: int, null_length: int) -> None:
    torch.manual_seed(0)
    network = MLP(2, u_dim=5, width=16, depth=1).double()
    nn.init.normal_(network.output.weight)
    denoiser = EDM(network, VP())
    noise = Noise("tokens")
    x_t = noise.normal(torch.zeros(6, 2, dtype=torch.float64))
    u = noise.normal(torch.zeros(6, length, 5, dtype=torch.float64))
    null = noise.normal(torch.zeros(1, null_length, 5, dtype=torch.float64))
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    d_null, d = denoiser(x_t, t, null.expand(6, -1, -1)), denoiser(x_t, t, u)
    for w in (0.0, 4.0):
        guided = ClassifierFree(w)(denoiser, null)(x_t, t, u)
        assert torch.allclose(guided, d_null + w * (d - d_null), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_guidance_needs_a_condition(w: float, mixture: GaussianMixture) -> None:
    guided = ClassifierFree(w)(ScoreDenoiser(mixture, VP()), torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match="needs a condition"):
        guided(torch.zeros(2, 2), torch.tensor(0.5), None)


def test_pictures_are_guided_too() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor, level: Tensor, u: Tensor | None = None) -> Tensor:
            assert u is not None
            return x + u.sum(dim=(1, 2))[:, None, None, None]

    x_t = Noise(0).normal(torch.zeros(3, 1, 4, 4, dtype=torch.float64))
    u = torch.arange(1.0, 4.0, dtype=torch.float64)[:, None, None]
    denoiser = EDM(Plain(), Rectified())
    t = torch.tensor([0.2, 0.5, 0.8]).double()
    d, d_null = denoiser(x_t, t, u), denoiser(x_t, t, 0 * u)
    guided = ClassifierFree(2.0)(denoiser, 0 * u[:1])(x_t, t, u)
    assert torch.allclose(guided, 2 * d - d_null, rtol=CLOSE)
