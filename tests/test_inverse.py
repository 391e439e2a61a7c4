"""Inverse problems: posteriors in closed form, and what is known kept."""

import math
from pathlib import Path

import pytest
import torch
from energies import one_hot
from PIL import Image
from torch import Tensor, nn

from pipeline.composition import MomentMatching
from pipeline.condition import U
from pipeline.denoisers import Clean, Denoiser, Energy, ScoreDenoiser
from pipeline.errors import UserError
from pipeline.guidance import ClassifierFree
from pipeline.mcmc import HMC, MALA, GaussianMixture, Kernel, Measurement, Posterior, run
from pipeline.networks import MLP, UNet
from pipeline.noise import Noise
from pipeline.samplers import DDIM, Heun, Sampler
from pipeline.schedules import VE, VP, Cosine, Rectified, Schedule, expand_as_batch

NAN = torch.nan


def named(value: object) -> str:
    return type(value).__name__


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def empty(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float64)


def posterior(law: GaussianMixture, y: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (K,), means and variances (K, D) of the mixture that the posterior is."""
    known, s = ~y.isnan(), law.stds[:, None] ** 2
    total, r = s + noise**2, y.nan_to_num(0) - law.means
    log_w = -(r**2 / total + total.log())[:, known].sum(dim=1) / 2
    weights = torch.softmax(law.weights.log() + log_w, dim=0)
    means = torch.where(known, law.means + s / total * r, law.means)
    return weights, means, torch.where(known, s * noise**2 / total, s.expand_as(means))


class Correlated(Denoiser):
    """N(m, C) with any covariance: D = m + α C (α² C + σ²)⁻¹ (x − α m)."""

    def __init__(self, mean: Tensor, covariance: Tensor, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.mean, self.covariance = mean, covariance

    def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
        alpha, sigma = (s.reshape(-1, 1, 1) for s in self.schedule(t))
        total = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean))
        offset = (x_t - alpha[..., 0] * self.mean)[..., None]
        gain = alpha * self.covariance @ torch.linalg.solve(total, offset)
        return self.mean + gain[..., 0]


def correlated(schedule: Schedule) -> tuple[Correlated, Tensor, Tensor]:
    root = Noise("root").normal(empty(4, 4))
    mean, covariance = f64([0.3, -0.5, 0.1, 0.8]), root @ root.mT / 4 + 0.1 * torch.eye(4)
    return Correlated(mean, covariance, schedule), mean, covariance


# --- the target ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [MALA(0.02), HMC(0.1, 5)], ids=["MALA", "HMC"])
def test_chains_draw_the_posterior_of_a_mixture(kernel: Kernel, mixture: GaussianMixture) -> None:
    wide = GaussianMixture(mixture.means, 2.5 * mixture.stds, mixture.weights)
    y, noise = f64([0.2, NAN]), 0.3
    weights, means, variances = posterior(wide, y, noise)
    chains, steps = 64, 150 if isinstance(kernel, HMC) else 300
    drawn = run(
        Posterior(wide, y, noise), kernel, wide.draw(Noise("a"), chains), steps, 200, Noise("b")
    )
    exact = (
        (weights[:, None] * means).sum(dim=0),
        (weights[:, None] * (variances + means**2)).sum(0),
    )
    for power, truth in zip((1, 2), exact, strict=True):
        each = (drawn.x**power).mean(dim=0)  # chains are independent: an error bar without ESS
        error = each.std(dim=0) / math.sqrt(chains)
        assert ((each.mean(dim=0) - truth).abs() < 4 * error).all()
        assert (error < 0.05).all()  # or the bar would allow anything
    prior = (mixture.weights[:, None] * mixture.means).sum(dim=0)
    assert (exact[0] - prior).abs().max() > 0.05


def test_a_posterior_is_prior_and_likelihood(mixture: GaussianMixture) -> None:
    """By Bayes' rule, up to one constant; its score by autograd."""
    target = Posterior(mixture, [0.2, None], 0.3)
    weights, means, variances = posterior(mixture, f64([0.2, NAN]), 0.3)
    x = Noise("x").normal(empty(8, 2)).requires_grad_()
    square = ((x[:, None] - means) ** 2 / variances + variances.log()).sum(dim=-1)
    truth = torch.logsumexp(weights.log() - square / 2, dim=1)
    gap = target.log_prob(x) - truth
    assert torch.allclose(gap, gap[:1], rtol=1e-9)
    (score,) = torch.autograd.grad(truth.sum(), x)
    assert torch.allclose(target.score(x), score, rtol=1e-9)
    log_p, phi = target.log_prob_and_score(x)
    assert torch.equal(log_p, target.log_prob(x)) and torch.equal(phi, target.score(x))
    assert target.dim == 2


def test_a_measurement_and_its_transpose() -> None:
    """⟨A x, r⟩ = ⟨x, Aᵀ r⟩, and f² Aᵀ r has A x = r; areas by hand."""
    y = Noise("y").normal(empty(3, 2, 4))
    y[:, 0, 1] = NAN
    law = Measurement(y, 0.1)
    x, r = Noise("x").normal(empty(5, 3, 6, 12)), Noise("r").normal(empty(5, 3, 2, 4))
    assert law.factor(x) == 3
    assert law(x)[2, 1, 1, 2] == pytest.approx(x[2, 1, 3:6, 6:9].mean().item())
    assert (law(x)[:, :, 0, 1] == 0).all() and (law.residual(x)[:, :, 0, 1] == 0).all()
    left, right = (law(x) * r).sum(), (x * law.back(r, 3)).sum()
    assert left.item() == pytest.approx(right.item(), rel=1e-12)
    known = r * law.known
    assert torch.allclose(law(9 * law.back(r, 3)), known, rtol=1e-12)
    assert torch.allclose(law.residual(x), y.nan_to_num(0) * law.known - law(x))


# --- the guidance -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule", [VP(), Cosine(), VE(), Rectified()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_mean_is_exact_on_a_gaussian(noise: float, schedule: Schedule) -> None:
    """E[x | x_t, y] written out, with one and with two coordinates known; as a score too."""
    denoiser, mean, covariance = correlated(schedule)
    y = f64([0.7, NAN, -0.4, NAN])
    a = torch.eye(4, dtype=torch.float64)[[0, 2]]
    t = f64([0.2, 0.5, 0.8])
    x_t = Noise("x").normal(empty(3, 4))
    alpha, sigma = schedule(t)
    guided = MomentMatching(y, noise, iterations=2)(denoiser, None)
    found = guided(x_t, t)
    for i in range(3):  # x_t and y are two linear measurements of one Gaussian x
        h = torch.cat((alpha[i] * torch.eye(4), a)).double()
        spread = torch.diag(torch.cat((sigma[i].expand(4) ** 2, f64([noise**2] * 2))))
        seen = torch.cat((x_t[i], y[[0, 2]]))
        gain = covariance @ h.mT @ torch.linalg.inv(h @ covariance @ h.mT + spread)
        exact = mean + gain @ (seen - h @ mean)
        # conjugate gradients end after as many iterations as equations, up to rounding
        assert torch.allclose(found[i], exact, rtol=1e-6, atol=1e-6)
    score = (expand_as_batch(alpha, found) * found - x_t) / expand_as_batch(sigma, found) ** 2
    assert torch.allclose(guided.score(x_t, t), score, rtol=1e-9)


@pytest.mark.parametrize("sampler", [DDIM(60, eta=1.0), Heun(24)], ids=["DDPM", "Heun"])
def test_draws_of_a_gaussian_posterior(sampler: Sampler) -> None:
    n, y, noise = 2000, f64([0.2, NAN]), 0.3
    law = GaussianMixture(f64([[-0.7, 0.4]]), [0.5])
    _, means, variances = posterior(law, y, noise)
    guided = MomentMatching(y, noise)(ScoreDenoiser(law, VE(0.005, 20.0)), None)
    x = sampler(guided, empty(n, 2), None, Noise("draw"))
    assert ((x.mean(dim=0) - means[0]).abs() < 4 * (variances[0] / n).sqrt()).all()
    # 4 standard errors of a variance, and what so few steps leave of it
    assert torch.allclose(x.var(dim=0), variances[0], rtol=4 * math.sqrt(2 / n) + 0.05)


def test_a_mixture_is_nearer_with_it(mixture: GaussianMixture) -> None:
    """Not exact: what is known is right, what is not is nearer than without it."""
    y, noise = f64([0.6, NAN]), 0.1
    weights, means, _ = posterior(mixture, y, noise)
    truth = (weights[:, None] * means).sum(dim=0)
    denoiser = ScoreDenoiser(mixture, VE(0.005, 20.0))
    guided = MomentMatching(y, noise)(denoiser, None)
    x, free = (
        Heun(24)(d, empty(500, 2), None, Noise("m")).mean(dim=0) for d in (guided, denoiser)
    )
    assert (x - truth).norm() < (free - truth).norm() / 2  # 0.35 of 0.80


def test_what_is_known_is_kept() -> None:
    """By a network that knows nothing, and by an energy, whose D is a slope."""
    torch.manual_seed(0)
    y = torch.full((3, 8, 8), NAN)
    y[:, 2:5] = torch.randint(0, 256, (3, 3, 8)) / 127.5 - 1
    denoiser = Clean(UNet(channels=3, widths=[8, 8], blocks=1, attention=[]), Rectified())
    energy = Energy(MLP(3, width=8, depth=1), Rectified())
    for p in (*denoiser.parameters(), *energy.parameters()):
        nn.init.normal_(p, std=0.1)  # the last layers are 0 at first
    for model, known in ((denoiser, y), (energy, torch.tensor([0.5, NAN, -0.25]))):
        guided = MomentMatching(known)(model.eval().requires_grad_(False), None)
        x = Heun(4)(guided, torch.empty(2, *known.shape), None, Noise("kept"))
        seen = known.isfinite()
        assert x.isfinite().all() and torch.allclose(
            x[:, seen], known[seen].expand(2, -1), atol=1e-3
        )
        assert not torch.allclose(x[0][~seen], x[1][~seen], atol=1e-2)


def test_means_of_areas_are_kept() -> None:
    torch.manual_seed(0)
    small = torch.rand(1, 4, 4) - 0.5
    denoiser = Clean(UNet(channels=1, widths=[8, 8], blocks=1, attention=[]), Rectified()).eval()
    x = Heun(4)(MomentMatching(small)(denoiser, None), torch.empty(2, 1, 8, 8), None, Noise(0))
    assert torch.allclose(Measurement(small, 0.0)(x), small.expand(2, 1, 4, 4), atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_classifier_free_guidance_comes_first(scale: float, mixture: GaussianMixture) -> None:
    denoiser, null = (
        ScoreDenoiser(mixture, VP()),
        one_hot(f64([0]).long(), 3).map(torch.zeros_like),
    )
    x_t, u, t = Noise("x").normal(empty(6, 2)), one_hot(torch.arange(6) % 3, 3), f64(0.4)
    found = MomentMatching([0.2, None], 0.3, scale=scale)(denoiser, null)(x_t, t, u)
    first = ClassifierFree(scale)(denoiser, null)
    assert torch.allclose(
        found, MomentMatching([0.2, None], 0.3)(first, None)(x_t, t, u), rtol=1e-9
    )
    with pytest.raises(UserError, match="the model has no condition"):
        MomentMatching([0.2, None], scale=2.0)(denoiser, None)


def test_a_derivative_that_is_no_covariance_does_nothing() -> None:
    """Where D falls as x_t grows, as it does for no law, the denoiser is left as it is."""

    class Falling(Denoiser):
        def forward(self, x_t: Tensor, t: Tensor, u: U = None) -> Tensor:
            return -x_t

    x_t, t = Noise("x").normal(empty(3, 2)), f64(0.4)
    guided = MomentMatching([0.2, None], 0.01)(Falling(VP()), None)
    assert torch.equal(guided(x_t, t), -x_t)


def picture(path: Path, mode: str, size: int) -> Path:
    image = Image.new("RGBA", (size, size), (255, 0, 51, 255))
    for i in range(size if "A" in mode else 0):
        for j in range(size // 2):
            image.putpixel((i, j), (0, 0, 0, 128))
    image.convert(mode).save(path)
    return path


def test_a_picture_is_read(tmp_path: Path) -> None:
    """Transparent pixels are not known, in colour and in grey."""
    path = str(picture(tmp_path / "a.png", "RGBA", 4))
    law = MomentMatching(path).measurement
    assert law.factor(torch.zeros(1, 3, 8, 8)) == 2
    assert law.y[:, 3, 1].tolist() == pytest.approx([1, -1, 51 / 127.5 - 1])
    assert not law.known[:, :2].any() and law.known[:, 2:].all()
    grey = MomentMatching(str(picture(tmp_path / "b.png", "LA", 4))).measurement
    assert grey.y.shape == (1, 4, 4) and -1 < grey.y[0, 3, 3] < 0
    assert grey.known.sum() == 8


def test_what_does_not_fit_is_a_sentence(tmp_path: Path) -> None:
    guidance = MomentMatching(str(picture(tmp_path / "a.png", "RGB", 5)))
    with pytest.raises(UserError, match="smaller by a whole factor"):
        guidance(Clean(UNet(channels=3, widths=[8], blocks=1), VP()), None)(
            torch.zeros(1, 3, 8, 8), torch.tensor(0.5)
        )
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "missing.png"):
        with pytest.raises(UserError, match="no picture that can be read"):
            MomentMatching(str(tmp_path / name))
    for make, words in (
        (lambda: MomentMatching([0.1], iterations=0), "iterations = 0"),
        (lambda: MomentMatching([0.1], noise=-1.0), "noise = -1.0"),
        (lambda: Posterior(GaussianMixture([[0.0]], [1.0]), [0.1], 0.0), "positive"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
