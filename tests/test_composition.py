"""Composition: AND, OR and NOT of the classes of a mixture, whose law is known on a grid."""

import pytest
import torch
from energies import one_hot
from torch import Tensor

from pipeline.composition import Composed
from pipeline.condition import Condition
from pipeline.denoisers import EDM, ScoreDenoiser
from pipeline.errors import UserError
from pipeline.mcmc import MALA, GaussianMixture
from pipeline.mcmc.targets import NoDensity
from pipeline.networks import MLP
from pipeline.noise import Noise
from pipeline.samplers import AnnealedLangevin, Heun
from pipeline.schedules import VE, VP

# two classes whose product lies between them, and a third that is wider than both
LAW = GaussianMixture(
    torch.tensor([[-0.5, 0.0], [0.5, 0.2], [0.0, 0.0]], dtype=torch.float64),
    [0.3, 0.4, 1.0],
    [0.3, 0.3, 0.4],
)
SCHEDULE = VE(0.02, 20.0)
NULL = torch.zeros(1, 1, 3, dtype=torch.float64)


def classes(*k: int) -> Condition:
    """The null condition, and classes: what a composition is called with."""
    tokens = one_hot(torch.tensor(k), 3).tokens
    assert tokens is not None
    return Condition(torch.cat((NULL, tokens)))


def compose(guidance: Composed, *others: int, law: GaussianMixture = LAW):  # noqa: ANN201
    return guidance(ScoreDenoiser(law, SCHEDULE), classes(*others))


CASES = [  # the composition, its other classes, and log p of the parts (∅, 0, 1, 2)
    (Composed(also=["b"]), (1,), lambda p: p[1] + p[2] - p[0]),
    (Composed(also=["b"], scale=2.0), (1,), lambda p: 2 * p[1] + 2 * p[2] - 3 * p[0]),
    (Composed(also=["b", "c"]), (1, 2), lambda p: p[1] + p[2] + p[3] - 2 * p[0]),
    (Composed(without=["c"]), (2,), lambda p: p[1] - p[3] + p[0]),
    (Composed(either=["b"]), (1,), lambda p: torch.logaddexp(p[1], p[2])),
    (
        Composed(either=["b"], also=["c"], without=["b"], scale=0.5),
        (1, 2, 1),
        lambda p: p[0] + 0.5 * (torch.logaddexp(p[1], p[2]) - p[0] + p[3] - p[2]),
    ),
]


@pytest.mark.parametrize("t", [torch.tensor(0.3), torch.linspace(0.1, 0.9, 5)], ids=["()", "(B,)"])
@pytest.mark.parametrize(("guidance", "others", "truth"), CASES)
def test_densities_scores_and_means(guidance, others, truth, t) -> None:  # noqa: ANN001
    """log p as written, the score by autograd, D by Tweedie's formula."""
    t = t.double()
    x = (2 * Noise("x").normal(torch.empty(5, 2).double())).requires_grad_()
    u = one_hot(torch.zeros(5).long(), 3)
    conditions = [None, *(one_hot(torch.full((5,), k), 3) for k in range(3))]
    parts = torch.stack([LAW.diffuse(*SCHEDULE(t), c).log_prob(x) for c in conditions])
    expected = truth(parts)
    (score,) = torch.autograd.grad(expected.sum(), x)
    x, denoiser = x.detach(), compose(guidance, *others)
    assert torch.allclose(denoiser.log_prob(x, t, u), expected, rtol=1e-9)
    assert torch.allclose(denoiser.score(x, t, u), score, rtol=1e-7, atol=1e-9)
    sigma = SCHEDULE(t)[1].reshape(-1, 1)
    assert torch.allclose(denoiser(x, t, u), x + sigma**2 * score, rtol=1e-7, atol=1e-7)
    log_p, phi = denoiser.log_prob_and_score(x, t, u)
    assert torch.allclose(log_p, expected, rtol=1e-9) and torch.allclose(phi, score, rtol=1e-7)


def moments(law, n: int = 401) -> tuple[Tensor, Tensor]:  # noqa: ANN001
    """Mean and variance of a density of the plane, added up on a grid."""
    line = torch.linspace(-4, 4, n, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    p = torch.softmax(law(x), dim=0)[:, None]
    mean = (p * x).sum(dim=0)
    return mean, (p * (x - mean) ** 2).sum(dim=0)


@pytest.mark.parametrize("case", ["and", "not"])
def test_chains_draw_the_product_that_a_diffusion_sampler_misses(case: str) -> None:
    n = 600
    guidance, other = (Composed(also=["b"]), 1) if case == "and" else (Composed(without=["c"]), 2)
    denoiser, u = compose(guidance, other), one_hot(torch.zeros(n).long(), 3)
    t, first = torch.zeros(()).double(), one_hot(torch.zeros(1).long(), 3)
    mean, variance = moments(lambda x: denoiser.log_prob(x, t, first.expand(len(x))))

    def off(x: Tensor) -> float:
        """The error of the mean and of the variance, in standard errors, at most."""
        errors = (x.mean(dim=0) - mean) / (variance / n).sqrt()
        spread = (x.var(dim=0) / variance - 1) / (2 / n) ** 0.5
        return torch.cat((errors, spread)).abs().max().item()

    like = torch.empty(n, 2, dtype=torch.float64)
    chains = AnnealedLangevin(MALA(0.5), updates=6, steps=40, denoise=False)
    # 4 standard errors, and as much for a chain that has not ended and a kurtosis that is not 3
    assert off(chains(denoiser, like, u, Noise("chains"))) < 6
    assert off(Heun(24)(denoiser, like, u, Noise("heun"))) > 8


def test_what_is_needed_is_one_sentence() -> None:
    u = one_hot(torch.tensor([0, 1]), 3)
    x, t = torch.zeros(2, 2).double(), torch.tensor(0.5).double()
    with pytest.raises(UserError, match="None was given"):
        compose(Composed(also=["b"]), 1)(x, t, None)
    denoiser = EDM(MLP(2, 3, width=8, depth=1).double(), VP())
    assert Composed(also=["b"])(denoiser, classes(1))(x, t, u).isfinite().all()
    with pytest.raises(NoDensity, match="use pipeline.denoisers.Energy"):
        Composed(either=["b"])(denoiser, classes(1))(x, t, u)
