"""Targets against closed forms, torch.distributions and their own exact draws."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from pipeline.condition import Condition
from pipeline.mcmc import (
    Banana,
    Density,
    Funnel,
    Gaussian,
    GaussianMixture,
    Laplace,
    Law,
    NoDensity,
    Scaled,
    StudentT,
    Target,
)
from pipeline.noise import Noise

LINE = GaussianMixture(
    torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64), [0.3, 0.5, 0.1], [0.2, 0.5, 0.3]
)
CLOSE = 1e-12  # float64: some hundred roundings of numbers near 1


def reference(mixture: GaussianMixture) -> MixtureSameFamily:
    stds = mixture.stds[..., None].expand(mixture.means.shape)
    return MixtureSameFamily(
        Categorical(mixture.weights), Independent(Normal(mixture.means, stds), 1)
    )


def points(n: int = 200) -> Tensor:
    return 1.5 * Noise("points").normal(torch.zeros(n, 2, dtype=torch.float64))


def test_log_prob(mixture: GaussianMixture) -> None:
    x = points()
    assert (mixture.log_prob(x) - reference(mixture).log_prob(x)).abs().max() < CLOSE * 100
    # log-densities here reach −100


def test_log_prob_integrates_to_one() -> None:
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    total = torch.trapezoid(LINE.log_prob(x[:, None]).exp(), x)
    assert total.item() == pytest.approx(1, abs=1e-12)  # the rule is exact on smooth tails


def test_score_is_the_gradient_of_log_prob(mixture: GaussianMixture) -> None:
    x = points().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    x = x.detach()
    assert ((mixture.score(x) - gradient).abs() < CLOSE * (1 + gradient.abs())).all()
    # and of another's log_prob, so that a wrong density cannot excuse a wrong score
    x.requires_grad_()
    (other,) = torch.autograd.grad(reference(mixture).log_prob(x).sum(), x)
    assert ((mixture.score(x.detach()) - other).abs() < CLOSE * (1 + other.abs())).all()


def test_weights_are_equal_by_default() -> None:
    mixture = GaussianMixture([[0.0], [1.0], [2.0], [3.0]], [0.1, 0.2, 0.3, 0.4])
    assert mixture.weights.tolist() == [0.25] * 4


def test_whole_numbers_may_be_given() -> None:
    mixture = GaussianMixture([[0, 0], [1, 2]], [0.5, 1], [0.25, 0.75])
    assert mixture.stds.tolist() == [0.5, 1] and mixture.weights.tolist() == [0.25, 0.75]
    assert GaussianMixture([[0], [1]], [1, 1]).weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("stds", [[0.1], [0.1, 0.0], [0.1, -1.0], [0.1, 0.1, 0.1]])
def test_one_positive_std_each(stds: list[float]) -> None:
    with pytest.raises(ValueError, match="one positive standard deviation each"):
        GaussianMixture([[0.0], [1.0]], stds)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.4), (0.8, 0.6), (0.05, 1.5)])
def test_diffuse_is_a_convolution(alpha: float, sigma: float) -> None:
    """p_t(y) = ∫ p(x) N(y; α x, σ²) dx, by the trapezoid rule."""
    x = torch.linspace(-5, 6, 6001, dtype=torch.float64)
    y = torch.linspace(-4, 4, 41, dtype=torch.float64)
    kernel = Normal(alpha * x, sigma).log_prob(y[:, None]).exp()  # (41, 6001)
    density = torch.trapezoid(kernel * LINE.log_prob(x[:, None]).exp(), x)
    noisy = LINE.diffuse(torch.tensor(alpha).double(), torch.tensor(sigma).double())
    # torch.tensor(0.8) is rounded to float32 first: 1e-7, times a slope of up to 10
    assert (noisy.log_prob(y[:, None]).exp() - density).abs().max() < 1e-6


def test_diffuse_is_the_law_of_noisy_samples() -> None:
    noise = Noise("diffuse")
    x, _ = LINE.sample(noise, 20_000)
    x_t = (0.7 * x + 0.5 * noise.normal(x))[:, 0].numpy()

    def cdf(law: GaussianMixture, y: Tensor) -> Tensor:
        z = (torch.as_tensor(y)[:, None] - law.means[0, :, 0]) / law.stds[0]
        return torch.special.ndtr(z) @ law.weights[0]

    noisy = LINE.diffuse(torch.tensor(0.7).double(), torch.tensor(0.5).double())
    assert stats.kstest(x_t, lambda y: cdf(noisy, y).numpy()).pvalue > 1e-3  # seeded
    wrong = LINE.diffuse(torch.tensor(0.7).double(), torch.tensor(0.4).double())
    assert stats.kstest(x_t, lambda y: cdf(wrong, y).numpy()).pvalue < 1e-3


def test_diffuse_takes_a_time_per_example(mixture: GaussianMixture) -> None:
    x = points(3)
    alpha, sigma = torch.tensor([1.0, 0.6, 0.1]).double(), torch.tensor([0.1, 0.8, 2.0]).double()
    together = mixture.diffuse(alpha, sigma)
    for i in range(3):
        alone = mixture.diffuse(alpha[i], sigma[i])
        row = slice(i, i + 1)
        assert torch.allclose(together.log_prob(x)[row], alone.log_prob(x[row]), rtol=CLOSE)
        assert torch.allclose(together.score(x)[row], alone.score(x[row]), rtol=CLOSE)


def test_a_class_is_one_component_and_null_is_the_whole(mixture: GaussianMixture) -> None:
    alpha, sigma = torch.tensor(0.8).double(), torch.tensor(0.6).double()
    tokens = torch.cat((torch.eye(3), torch.zeros(1, 3)))[:, None]  # float32 as encoders do
    x = points(4)
    law = mixture.diffuse(alpha, sigma, Condition(tokens))
    for k in range(3):
        std = torch.sqrt((0.8 * mixture.stds[k]) ** 2 + 0.6**2)
        one = Independent(Normal(0.8 * mixture.means[k], std), 1)
        # 0.8 and 0.6 were rounded to float32: 1e-7 of log-densities near 10
        assert law.log_prob(x)[k].item() == pytest.approx(one.log_prob(x[k]).item(), abs=1e-5)
        score = (0.8 * mixture.means[k] - x[k]) / std**2
        assert torch.allclose(law.score(x)[k], score, atol=1e-5)
    whole = mixture.diffuse(alpha, sigma)
    assert torch.equal(law.log_prob(x)[3], whole.log_prob(x)[3])
    assert torch.equal(law.score(x)[3], whole.score(x)[3])


def test_a_class_is_not_the_whole_when_all_are_asked(mixture: GaussianMixture) -> None:
    """One time, one class per example: what a sampler asks at every step."""
    k = torch.tensor([0, 0, 1, 2, 1])
    u, x = Condition(torch.eye(3)[k][:, None]), points(5)
    law = mixture.diffuse(torch.ones(()).double(), torch.tensor(0.3).double(), u)
    score = (mixture.means[k] - x) / (mixture.stds[k, None] ** 2 + 0.3**2)
    assert torch.allclose(law.score(x), score, rtol=1e-6)  # 0.3 was rounded to float32


def test_sample_has_the_weights_and_moments(mixture: GaussianMixture) -> None:
    n = 20_000
    x, k = mixture.sample(Noise("sample"), n)
    assert x.shape == (n, 2) and x.dtype == torch.float64 and k.shape == (n,)
    counts = torch.bincount(k, minlength=3)
    assert stats.chisquare(counts.numpy(), (mixture.weights * n).numpy()).pvalue > 1e-3  # seeded
    for j in range(3):
        own = x[k == j]
        std, m = mixture.stds[j].item(), len(own)
        # 4 standard errors: s/√m of a mean, s/√(2m) of a standard deviation
        assert (own.mean(dim=0) - mixture.means[j]).abs().max() < 4 * std / m**0.5
        assert (own.std(dim=0) - std).abs().max() < 4 * std / (2 * m) ** 0.5
        z = (own - mixture.means[j]) / std
        assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3


def test_sample_never_takes_a_component_of_weight_zero() -> None:
    mixture = GaussianMixture([[0.0], [1.0], [2.0]], [0.1, 0.1, 0.1], [0.0, 1.0, 0.0])
    assert mixture.sample(Noise(0), 1000)[1].unique().tolist() == [1]

    class Zero(Noise):
        def uniform(self, n: int) -> Tensor:
            return torch.zeros(n)  # it is one of the numbers that may be drawn

    assert mixture.sample(Zero(0), 10)[1].unique().tolist() == [1]


def test_expected_score_is_zero(mixture: GaussianMixture) -> None:
    """E[φ] = 0 and E[x φᵀ] = −I, by integration by parts: sample and score are of one law."""
    n = 40_000
    x, _ = mixture.sample(Noise("stein"), n)
    phi = mixture.score(x)
    standard_error = phi.std(dim=0) / n**0.5
    assert (phi.mean(dim=0).abs() < 4 * standard_error).all()
    products = x[:, :, None] * phi[:, None, :]
    standard_error = products.std(dim=0) / n**0.5
    assert ((products.mean(dim=0) + torch.eye(2)).abs() < 4 * standard_error).all()


COVARIANCE = torch.tensor([[2.0, -0.6], [-0.6, 0.5]], dtype=torch.float64)
MEAN = torch.tensor([0.3, -1.0], dtype=torch.float64)
LAWS: list[Law] = [
    Gaussian(MEAN, COVARIANCE),
    Gaussian(MEAN, torch.tensor([2.0, 0.1], dtype=torch.float64)),
    Laplace(2),
    Banana(0.3, 2.0),
    Funnel(3, 1.5),
    StudentT(2, 5),
]


def of(law: object) -> str:
    return type(law).__name__


ZERO = torch.zeros((), dtype=torch.float64)  # distributions of numbers alone are float32


def normal(mean: Tensor | float, std: Tensor | float, x: Tensor) -> Tensor:
    return Normal(ZERO + mean, ZERO + std).log_prob(x)


def banana(x: Tensor) -> Tensor:
    return normal(0, 2, x[:, 0]) + normal(0.3 * (x[:, 0] ** 2 - 4), 1, x[:, 1])


def funnel(x: Tensor) -> Tensor:
    return normal(0, 1.5, x[:, 0]) + normal(0, torch.exp(x[:, :1] / 2), x[:, 1:]).sum(dim=1)


def student(x: Tensor) -> Tensor:
    return torch.from_numpy(stats.multivariate_t([0, 0], torch.eye(2), df=5).logpdf(x))


REFERENCES: list[Callable[[Tensor], Tensor]] = [
    MultivariateNormal(MEAN, COVARIANCE).log_prob,
    lambda x: normal(MEAN, torch.tensor([2.0, 0.1], dtype=torch.float64).sqrt(), x).sum(dim=1),
    lambda x: torch.distributions.Laplace(ZERO, ZERO + math.sqrt(0.5)).log_prob(x).sum(dim=1),
    banana,
    funnel,
    student,
]


@pytest.mark.parametrize("i", range(len(LAWS)))
def test_law_has_the_log_prob(i: int) -> None:
    law = LAWS[i]
    x = 1.5 * Noise("laws").normal(torch.zeros(200, law.dim, dtype=torch.float64))
    expected = REFERENCES[i](x)
    assert ((law.log_prob(x) - expected).abs() < 10 * CLOSE * (1 + expected.abs())).all()


@pytest.mark.parametrize("law", LAWS, ids=of)
def test_law_has_the_score(law: Law) -> None:
    x = 1.5 * Noise("laws").normal(torch.zeros(200, law.dim, dtype=torch.float64))
    log_prob, score = law.log_prob_and_score(x)
    assert torch.equal(log_prob, law.log_prob(x)) and torch.equal(score, law.score(x))
    gradient = Density(law.log_prob).score(x)
    assert ((score - gradient).abs() < 10 * CLOSE * (1 + gradient.abs())).all()


@pytest.mark.parametrize("law", LAWS, ids=of)
def test_law_is_what_it_draws(law: Law) -> None:
    """E[φ] = 0 and E[x φᵀ] = −I, by integration by parts: draws and score are of one law."""
    n = 40_000
    x = law.draw(Noise("stein"), n).double()
    phi = law.score(x)
    assert x.shape == (n, law.dim)
    assert (phi.mean(dim=0).abs() < 4 * phi.std(dim=0) / n**0.5).all()  # 4 standard errors
    products = x[:, :, None] * phi[:, None, :]
    standard_error = products.std(dim=0) / n**0.5
    assert ((products.mean(dim=0) + torch.eye(law.dim)).abs() < 4 * standard_error).all()


def test_marginals() -> None:
    """Where a coordinate's law has a name, the draws follow it."""
    marginals = [
        (Gaussian(MEAN, COVARIANCE), 1, stats.norm(-1.0, math.sqrt(0.5))),
        (Laplace(2), 0, stats.laplace(0, 1 / math.sqrt(2))),
        (Laplace(2), 1, stats.laplace(0, 1 / math.sqrt(2))),
        (Banana(0.3, 2.0), 0, stats.norm(0, 2)),
        (Funnel(3, 1.5), 0, stats.norm(0, 1.5)),
        (StudentT(2, 5), 1, stats.t(5)),
    ]
    for law, i, marginal in marginals:
        x = law.draw(Noise("marginal"), 20_000)[:, i]
        p = stats.kstest(x.numpy(), marginal.cdf).pvalue
        assert p > 1e-3 / len(marginals), law  # seeded; one level for all, by Bonferroni


def test_stated_moments() -> None:
    n = 100_000
    x = Banana(0.03, 10.0).draw(Noise("banana"), n).double()
    # 4 standard errors; the fourth central moment of x₂ is taken from the draws
    for i, variance in enumerate((100.0, 1 + 2 * 0.03**2 * 10**4)):
        square = x[:, i] ** 2
        assert abs(x[:, i].mean()) < 4 * math.sqrt(variance / n)
        assert abs(square.mean() - variance) < 4 * square.std() / n**0.5
    assert Laplace(3).draw(Noise("laplace"), n).var().item() == pytest.approx(
        1,
        abs=4 * math.sqrt(5 / (3 * n)),  # the square of a Laplace variable has variance 6 − 1
    )


def test_density_takes_a_function_and_a_distribution() -> None:
    x = points(50)
    law = Gaussian(MEAN, COVARIANCE)
    for density in (
        Density(MultivariateNormal(MEAN, COVARIANCE).log_prob),
        Density(lambda x: -0.5 * ((x - MEAN) @ law.precision * (x - MEAN)).sum(dim=1)),
    ):
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                log_prob, score = density.log_prob_and_score(x.clone())
            assert torch.allclose(score, law.score(x), rtol=1e-11, atol=1e-11)
            assert not score.requires_grad and not log_prob.requires_grad
            difference = log_prob - law.log_prob(x)  # up to a constant
            assert (difference - difference[0]).abs().max() < 1e-11
    # independent coordinates need not be said to be one event
    coordinates = Density(Normal(MEAN, 0.7).log_prob)
    whole = Independent(Normal(MEAN, 0.7), 1).log_prob(x)
    assert torch.allclose(coordinates.log_prob(x), whole, rtol=CLOSE)
    picture = Density(Normal(0, 1).log_prob)
    assert picture.log_prob(torch.zeros(2, 1, 3, 3)).shape == (2,)


def test_scaled_is_a_change_of_units() -> None:
    scale = torch.tensor([0.5, 3.0], dtype=torch.float64)
    law, z = Banana(0.3, 2.0), points(50)
    scaled = Scaled(law, scale)
    log_prob, score = scaled.log_prob_and_score(z)
    assert torch.allclose(score, Density(scaled.log_prob).score(z), rtol=1e-11)
    assert torch.equal(scaled.score(z), score) and torch.equal(scaled.log_prob(z), log_prob)
    assert torch.equal(log_prob, law.log_prob(scale * z))


def test_a_target_may_have_a_score_only() -> None:
    class Pull(Target):
        def score(self, x: Tensor) -> Tensor:
            return -x

    for ask in (Pull().log_prob, Pull().log_prob_and_score):
        with pytest.raises(NoDensity, match="Pull has a score and no density"):
            ask(torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("covariance", "reason"),
    [
        ([[1.0, 0.0]], "must be"),
        ([1.0, 2.0, 3.0], "must be"),
        ([1.0, 0.0], "positive definite"),
        ([[1.0, 2.0], [2.0, 1.0]], "positive definite"),
        ([[1.0, 0.5], [0.4, 1.0]], "symmetric"),
    ],
)
def test_a_covariance_is_checked(covariance: list, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Gaussian([0.0, 0.0], covariance)


def test_arguments_are_checked() -> None:
    for make in (
        lambda: Banana(std=0),
        lambda: Funnel(1),
        lambda: Funnel(2, -1.0),
        lambda: StudentT(0),
        lambda: StudentT(2, 0),
        lambda: Laplace(0),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()
