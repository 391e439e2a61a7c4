"""Likelihoods against densities in closed form, and what must hold for any denoiser."""

import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.condition import Condition, U
from pipeline.denoisers import EDM, Denoiser, Energy, ScoreDenoiser
from pipeline.guidance import ClassifierFree
from pipeline.mcmc.targets import Gaussian, GaussianMixture
from pipeline.networks import MLP, Network
from pipeline.noise import Noise, PictureNoise
from pipeline.samplers import Likelihood
from pipeline.schedules import VE, VP, Cosine, Rectified, Schedule

SCHEDULES = [VP(), Cosine(), VE(), Rectified(), VE(0.1, 1e3)]
EXACT = Likelihood(128, probes=None)


def named(schedule: Schedule) -> str:
    _, sigma_0 = schedule(torch.tensor(0.0))
    return f"{type(schedule).__name__}({sigma_0:.3f})"


def ends(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """The least and the largest noise ratio."""
    low, high = schedule.ratio(torch.tensor([0.0, 1.0], dtype=torch.float64))
    return low, high


def onehot(k: int | None, n: int) -> Condition:
    row = torch.zeros(3) if k is None else torch.eye(3)[k]
    return Condition(row.double().expand(n, 1, 3))


def exact(mixture: GaussianMixture, schedule: Schedule, x: Tensor, u: U = None) -> Tensor:
    """The log-density of x + s_0 n."""
    return mixture.diffuse(torch.ones((), dtype=x.dtype), ends(schedule)[0], u).log_prob(x)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@pytest.mark.parametrize("k", [None, 0, 1, 2])
def test_density_of_a_mixture(k: int | None, schedule: Schedule, mixture: GaussianMixture) -> None:
    x, component = mixture.sample(Noise("x"), 64)
    x = x if k is None else x[component == k]
    u = onehot(k, len(x))
    error = EXACT(ScoreDenoiser(mixture, schedule), x, u, Noise(0)) - exact(
        mixture, schedule, x, u
    )
    # of order 2 in the step, at most 0.035 here; and |E x| / s_1 at most 0.011 times a normal
    # number. A forgotten factor 2, sign or log s_0 is worth more than 1 on average
    assert error.abs().max() < 0.05
    assert error.mean().abs() < 0.02


def test_density_is_that_of_the_least_noise(mixture: GaussianMixture) -> None:
    """Not that of x: with s_0 = 0.1 the two differ by more than the errors above."""
    x, _ = mixture.sample(Noise("x"), 64)
    schedule = SCHEDULES[-1]
    assert (exact(mixture, schedule, x) - mixture.log_prob(x)).abs().mean() > 0.2


def test_order_is_two(mixture: GaussianMixture) -> None:
    schedule = VE(0.1, 1e4)  # so far that the error of the start, 3e-5, does not count
    x, _ = mixture.sample(Noise("x"), 64)
    denoiser, truth = ScoreDenoiser(mixture, schedule), exact(mixture, schedule, x)
    errors = [
        (Likelihood(1 + n, None)(denoiser, x, None, Noise(0)) - truth).square().mean().sqrt()
        for n in (64, 128, 256)
    ]
    orders = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    assert all(abs(order - 2) < 0.15 for order in orders), orders  # 2 in the limit of short steps


def test_schedule_does_not_matter(mixture: GaussianMixture) -> None:
    """Schedules with the same first and last noise ratio have the same grid of ratios."""
    clip = 2e-3
    low = clip / (1 - clip)
    x, _ = mixture.sample(Noise("x"), 16)
    a, b, c = (
        Likelihood(32, probes=2)(ScoreDenoiser(mixture, schedule), x, None, Noise("probes"))
        for schedule in (Rectified(clip), VE(low, 1 / low), Cosine(math.atan(low)))
    )
    # D = (x_t + σ² φ) / α cancels digits: 1e-13 at the ratio 500, summed over the grid
    assert torch.allclose(a, b, rtol=0, atol=1e-9)
    assert torch.allclose(a, c, rtol=0, atol=1e-9)


class TwoWidths(GaussianMixture):
    """Two classes about 0, which guidance keeps Gaussian."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(2, 2, dtype=torch.float64), [0.6, 0.3])


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_guided_gaussian(scale: float) -> None:
    r"""A guided flow of two widths v, v' about 0 is :math:`dy/ds = s y ((1 - w) / (s^2 + v) +
    w / (s^2 + v'))`: it stretches by a product of powers.
    """
    schedule = VE(0.01, 100.0)
    s_0, s_1 = ends(schedule)
    wide, narrow = (Condition(row) for row in torch.eye(2, dtype=torch.float64)[:, None, None])
    denoiser = ClassifierFree(scale)(ScoreDenoiser(TwoWidths(), schedule), wide)
    stretch = math.prod(
        ((s_1**2 + std**2) / (s_0**2 + std**2)) ** (weight / 2)
        for std, weight in ((0.6, 1 - scale), (0.3, scale))
    )
    law = Gaussian(torch.zeros(2).double(), ((s_1 / stretch) ** 2).expand(2))
    x = law.draw(Noise("x"), 32)
    found = EXACT(denoiser, x, narrow.expand(32), Noise(0))
    assert (found - law.log_prob(x)).abs().max() < 0.03  # of order 2 in the step


def grid(side: float, n: int) -> tuple[Tensor, float]:
    """The points of a square of a given half side, and the area of each."""
    line = torch.linspace(-side, side, n, dtype=torch.float64)
    return torch.cartesian_prod(line, line), (2 * side / (n - 1)) ** 2


def random_network() -> Denoiser:
    """A denoiser of nothing, whose J has no symmetry."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MLP(2, u_dim=0, width=16, depth=2)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    return EDM(network.double(), VE(0.1, 80.0), sigma_data=0.5)


def guided_mixture(mixture: GaussianMixture) -> Denoiser:
    return ClassifierFree(2.0)(ScoreDenoiser(mixture, VE(0.1, 80.0)), onehot(None, 1))


@pytest.mark.parametrize("kind", ["guided", "network"])
def test_density_is_normalised(kind: str, mixture: GaussianMixture) -> None:
    """Whatever D is, it is a density that the flow makes of the normal law."""
    denoiser = guided_mixture(mixture) if kind == "guided" else random_network()
    points, area = grid(2.5, 33)
    u = onehot(0, len(points)) if kind == "guided" else None
    total = EXACT(denoiser, points, u, Noise(0)).exp().sum() * area
    assert abs(total - 1) < 0.02, total  # of order 2 in the step; the sum's own error is 1e-5


@pytest.mark.parametrize("schedule", [VP(), Cosine(), VE(), Rectified()], ids=named)
def test_excess_of_few_steps(schedule: Schedule) -> None:
    """The integral is 1 in the limit only: above it, by a quarter with twice the steps."""
    law = GaussianMixture(
        torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64), [0.3, 0.5, 0.1], [0.2, 0.5, 0.3]
    )
    x = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    denoiser = ScoreDenoiser(law, schedule)
    few, default = (
        torch.trapezoid(Likelihood(n, None)(denoiser, x[:, None], None, Noise(0)).exp(), x) - 1
        for n in (64, 128)
    )
    assert 0.005 < few < 0.013 and 0.001 < default < 0.0035  # as it is stated
    assert few / default == pytest.approx(4, abs=0.2)  # of order 2; the next order's share


class Quadratic(Network):
    r"""The output :math:`f = A(s) z` that makes `Energy` the energy of a Gaussian about 0 of any
    covariance C.

    .. math:: A = \frac{s}{2 \sigma_d} \big( I - (s^2 + \sigma_d^2) (C + s^2 I)^{-1} \big)
    """

    def __init__(self, covariance: Tensor, sigma_data: float) -> None:
        super().__init__()
        self.covariance, self.sigma_data = covariance, sigma_data

    def forward(self, x: Tensor, level: Tensor, u: U) -> Tensor:
        s = level[0].exp()
        eye = torch.eye(2, dtype=x.dtype)
        precision = torch.linalg.inv(self.covariance + s**2 * eye)
        a = s / (2 * self.sigma_data) * (eye - (s**2 + self.sigma_data**2) * precision)
        return x @ a


def test_energy_agrees_with_its_own_flow() -> None:
    covariance = torch.tensor([[0.2, 0.1], [0.1, 0.3]], dtype=torch.float64)
    denoiser = Energy(Quadratic(covariance, 0.5), VE(0.01, 200.0), sigma_data=0.5)
    law = Gaussian(torch.zeros(2).double(), covariance + 0.01**2 * torch.eye(2))
    x = law.draw(Noise("x"), 32)
    found = EXACT(denoiser, x, None, Noise(0))
    stated = denoiser.log_prob(x, torch.tensor(0.0).double())
    assert torch.allclose(stated - stated[0], law.log_prob(x) - law.log_prob(x)[0])
    # of order 2 in the step
    assert (found - law.log_prob(x)).abs().max() < 0.05
    assert ((found - found[0]) - (stated - stated[0])).abs().max() < 0.05


class Zero(Network):
    def forward(self, x: Tensor, level: Tensor, u: U) -> Tensor:
        return 0 * x


@pytest.mark.parametrize("probes", [None, 1, 3])
def test_pictures(probes: int | None) -> None:
    """With a network of zeros EDM is the denoiser of N(0, σ_d² I); J is then a multiple of I, of
    which a single probe sees the exact trace.
    """
    denoiser = EDM(Zero(), VE(0.01, 200.0), sigma_data=0.5)
    law = torch.distributions.Normal(torch.zeros(()).double(), math.hypot(0.5, 0.01))
    x = 0.5 * Noise("x").normal(torch.empty(8, 3, 4, 4, dtype=torch.float64))
    truth = law.log_prob(x).flatten(1).sum(dim=1)
    found = Likelihood(256, probes)(denoiser, x, None, Noise("probes"))
    assert (found - truth).abs().max() < 48 * 0.002  # of order 2, for each of 48 values


def test_probes_are_unbiased(mixture: GaussianMixture) -> None:
    n = 4096
    denoiser = ScoreDenoiser(mixture, VE(0.1, 80.0))
    x = torch.tensor([[-0.1, -0.3]], dtype=torch.float64)  # between two classes: J is not diagonal
    truth = Likelihood(24, None)(denoiser, x, None, Noise(0))
    spread = []
    for probes in (1, 4):
        found = Likelihood(24, probes)(denoiser, x.expand(n, 2), None, Noise("probes", probes))
        spread.append(found.std())
        # four standard errors of the mean of n independent estimates
        assert (found.mean() - truth).abs() < 4 * spread[-1] / math.sqrt(n)
    assert spread[0] > 0.05
    assert abs(spread[0] / spread[1] - 2) < 0.1  # the variance of K probes is 1 / K of one's


def test_probes_differ_between_times(mixture: GaussianMixture) -> None:
    """A probe kept along the path would not average out: with twice the times the spread would
    stay; it falls by the square root of 2.
    """
    denoiser = ScoreDenoiser(mixture, VE(0.1, 80.0))
    x = torch.tensor([[-0.1, -0.3]], dtype=torch.float64).expand(4096, 2)
    few, many = (
        Likelihood(steps, 1)(denoiser, x, None, Noise("probes")).std() for steps in (33, 65)
    )
    assert abs(few / many - math.sqrt(2)) < 0.1


def test_picture_noise_is_of_each_row(mixture: GaussianMixture) -> None:
    denoiser = ScoreDenoiser(mixture, VP())
    x, _ = mixture.sample(Noise("x"), 4)
    together = Likelihood(8)(denoiser, x, None, PictureNoise([3, 1, 4, 5]))
    alone = Likelihood(8)(denoiser, x[2:3], None, PictureNoise([4]))
    assert torch.allclose(together[2:3], alone, rtol=0, atol=1e-10)


class Product(Network):
    """A network whose derivative is its condition."""

    def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
        assert u is not None and u.tokens is not None
        return x * u.tokens[:, 0]


def test_leaves_inference_mode() -> None:
    """And comes back without gradients."""
    denoiser = EDM(Product(), VE(0.1, 80.0))
    n = torch.empty(4, 2, dtype=torch.float64)

    def given() -> tuple[Tensor, Condition]:
        return Noise("x").normal(n), Condition(Noise("u").normal(n)[:, None])

    outside = EXACT(denoiser, *given(), Noise(0))
    with torch.inference_mode():
        x, u = given()
        assert torch.equal(EXACT(denoiser, x, u, Noise(0)), outside)
    assert not outside.requires_grad


def test_float32_is_enough(mixture: GaussianMixture) -> None:
    x, _ = mixture.sample(Noise("x"), 16)
    double = EXACT(random_network(), x, None, Noise(0))
    single = EXACT(random_network().float(), x.float(), None, Noise(0))
    assert (double - single).abs().max() < 1e-3  # 128 steps, each a few ulps of numbers near 5


@pytest.mark.parametrize("wrong", [{"steps": 1}, {"probes": 0}, {"rho": 0.0}])
def test_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        Likelihood(**wrong)  # type: ignore[arg-type]
