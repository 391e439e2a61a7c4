"""Targets against closed forms, torch.distributions and their own exact draws."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import (
    Beta,
    Categorical,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    HalfCauchy,
    HalfNormal,
    Independent,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    Uniform,
)

from pipeline.condition import Condition
from pipeline.errors import UserError
from pipeline.mcmc import (
    HMC,
    NUTS,
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
    run,
    sample,
    unbounded,
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


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


BOUNDED: list[Distribution] = [
    Gamma(double(2.0, 0.8), double(1.0, 3.0)),
    Beta(double(0.7, 3.0), double(1.5, 2.0)),
    Uniform(double(-1.0, 2.0), double(1.0, 2.5)),
    HalfNormal(double(2.0, 1.0)),
    HalfCauchy(double(1.0, 0.5)),
    LogNormal(double(0.0, 1.0), double(1.0, 0.3)),
    Independent(Exponential(double(2.0, 0.5)), 1),
    Dirichlet(double(2.0, 0.8, 3.0)),
]


@pytest.mark.filterwarnings("ignore:NUTS diverged")  # after so short a warm-up
@pytest.mark.parametrize("law", BOUNDED, ids=lambda law: type(law).__name__)
def test_a_bounded_law_is_drawn_in_its_support(law: Distribution) -> None:
    """Chains that start with the law have it after some steps too: by Kolmogorov and Smirnov."""
    density = Density(law.log_prob)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start, truth = law.sample(torch.Size([2000])), law.sample(torch.Size([20_000]))
    x = run(density, HMC(0.4, 4), start, 15, 0, Noise("bounded")).x[-1]
    assert (x - start).abs().median() > 0.05  # they did not stay where they were
    assert density.dim == law.sample().shape[-1] and Density(law).dim == density.dim
    assert law.support.check(x).all()  # type: ignore[union-attr]
    for column, true in zip(x.unbind(1), truth.unbind(1), strict=True):
        # seeded; one level for all some 20 columns, by Bonferroni
        assert stats.ks_2samp(column.numpy(), true.numpy()).pvalue > 1e-3 / 20
    x = sample(density, NUTS(0.5), chains=3, draws=4, warmup=20).x
    assert x.shape == (4, 3, density.dim) and law.support.check(x).all()  # type: ignore[union-attr]


def test_unbounded_coordinates_have_the_stretch_of_their_map() -> None:
    """z = log x of a Gamma law, z = logit x of a Beta law, in closed form."""
    a, b, z = 2.5, 1.7, points()[:, :1]
    gamma = unbounded(Density(Gamma(double(a), double(b)).log_prob)).log_prob(z)
    expected = a * math.log(b) - math.lgamma(a) + a * z - b * z.exp()
    assert torch.allclose(gamma, expected[:, 0], rtol=CLOSE, atol=CLOSE)
    beta = unbounded(Density(Beta(double(a), double(b)).log_prob)).log_prob(z)
    log_norm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_sigmoid = torch.nn.functional.logsigmoid
    expected = log_norm + a * log_sigmoid(z) + b * log_sigmoid(-z)
    assert torch.allclose(beta, expected[:, 0], rtol=1e-10, atol=1e-10)  # 1 − x loses digits
    plain = Density(Normal(MEAN, 1.0).log_prob)
    assert unbounded(plain) is plain  # what has no bounds is left alone


def test_a_start_out_of_bounds_is_named() -> None:
    for law, outside in ((Uniform(0.0, 1.0), 2.0), (Gamma(2.0, 1.0), -0.5)):
        x = torch.tensor([[0.5], [outside]], dtype=torch.float64)
        with pytest.raises(UserError, match=rf"Chain 1 starts at x = \[{outside:g}\]"):
            run(Density(law.log_prob), NUTS(0.1), x, 1, 0, Noise(0))


def test_a_support_that_is_not_mapped_is_refused() -> None:
    with pytest.raises(UserError, match="Poisson has the support IntegerGreaterThan.*unbounded"):
        Density(Poisson(3.0).log_prob)
    mixture = reference(LINE)
    assert Density(mixture.log_prob).bounds is None  # a mixture of what has no bounds has none


def raises(x: Tensor) -> Tensor:
    raise KeyError("no such key")


def in_place(x: Tensor) -> Tensor:
    y = x.exp()
    y *= 2
    return y.mul_(y).sum(dim=1)


@pytest.mark.parametrize(
    ("function", "came"),
    [
        (lambda x: -x.square().sum(), r"shape \(\) for x with shape \(3, 2\)"),
        (lambda x: -x.square().sum(dim=0), r"shape \(2,\) for x with shape \(3, 2\)"),
        (lambda x: torch.zeros(len(x)), r"shape \(3,\) that does not depend on x"),
        (lambda x: -x.detach().square().sum(dim=1), "that does not depend on x"),
        (lambda x: torch.ones(3, requires_grad=True), "gave a tensor of torch.float32"),
        (lambda x: x.detach().numpy()[:, 0], "gave ndarray"),
        (lambda x: -x.numpy(), "failed at .*RuntimeError: Can't call numpy"),
        (lambda x: 1, "gave int 1 for"),
        (lambda x: None, "gave NoneType None for"),
        (lambda x: (x.long() + x.sum(dim=1, keepdim=True).long())[:, 0], "torch.int64"),
        (lambda x: x[:, 0] + 1j, "torch.complex128"),
        (lambda x, y: x, "failed at .*TypeError: .*missing 1 required"),
        (raises, "test_targets.raises failed at .*KeyError"),
        (in_place, "test_targets.in_place failed at .*RuntimeError: .*inplace"),
        (
            lambda x: Gamma(2.0, 1.0, validate_args=True).log_prob(x).sum(dim=1),
            r"failed at .* in chain 1 at \[-1, 0.5\] \(ValueError.*support.*torch.distributions",
        ),
    ],
)
def test_a_density_that_is_none_is_refused_in_a_sentence(
    function: Callable[[Tensor], Tensor], came: str
) -> None:
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [-2.0, 0.0]], dtype=torch.float64)
    with pytest.raises(UserError, match=came) as error:
        run(Density(function), NUTS(0.1), x, 1, 0, Noise(0))
    assert "expected log p of each row" in str(error.value) or "any real x" in str(error.value)


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
