"""The Gaussian mixture, on which everything else is tested, against torch.distributions."""

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from pipeline.mcmc import GaussianMixture
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
    u = torch.cat((torch.eye(3), torch.zeros(1, 3)))[:, None]  # (4, 1, 3), float32 as encoders do
    x = points(4)
    law = mixture.diffuse(alpha, sigma, u)
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
    u = torch.eye(3)[[0, 0, 1, 2, 1]][:, None]
    x = points(5)
    law = mixture.diffuse(torch.ones(()).double(), torch.tensor(0.3).double(), u)
    k = u[:, 0].argmax(dim=-1)
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
