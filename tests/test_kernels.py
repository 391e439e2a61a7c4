"""Kernels: the law each leaves alone, the bias of those not exact, and wrong ones seen."""

import math
from typing import Any

import pytest
import torch
from arviz_stats.base.array import array_stats
from scipy import stats
from torch import Tensor

from pipeline.errors import UserError
from pipeline.mcmc import (
    HMC,
    MALA,
    NUTS,
    ULA,
    Banana,
    Density,
    Funnel,
    Gaussian,
    GaussianMixture,
    HalfDenoising,
    Kernel,
    Laplace,
    Law,
    Metropolis,
    State,
    StudentT,
    Target,
    nuts,
    run,
)
from pipeline.noise import Noise, PictureNoise

LAWS: list[Law] = [
    Gaussian([0.5, -0.3], [[1.0, 0.8], [0.8, 1.0]]),
    Laplace(2),
    GaussianMixture([[-0.7, -0.3], [0.6, -0.4], [0.1, 0.8]], [0.3, 0.5, 0.2], [0.5, 0.3, 0.2]),
    StudentT(2, 5),
    Banana(0.3, 2.0),
    Funnel(3, 1.5),
]
EXACT: list[Kernel] = [Metropolis(0.7), MALA(0.15), HMC(0.4, 5), HMC(0.4, 5, 0.0), NUTS(0.4, 5)]
STEPS = {Metropolis: 60, MALA: 60, HMC: 15, NUTS: 10}
CHAINS, TRUTH = 2000, 20_000
P = 1e-3  # a law is rejected below; the draws are seeded, so a test that passes keeps passing


def of(thing: object) -> str:
    return type(thing).__name__


def exact(law: Law, n: int, *key: int | str) -> Tensor:
    return law.draw(Noise("exact", *key), n).double()


def last(kernel: Kernel, law: Target, x: Tensor, steps: int) -> Tensor:
    """The last states of independent chains from x."""
    with torch.inference_mode():
        return kernel.draw(law, kernel.init(law, x), steps, Noise("chains"))[0].x


def pvalue(x: Tensor, truth: Tensor) -> float:
    """The least p-value of Kolmogorov and Smirnov of each coordinate, of the distance from the
    centre and of a difference of coordinates, times their number (Bonferroni).
    """
    centre = truth.median(dim=0).values
    views = [lambda x: x[:, 0] - x[:, 1], lambda x: (x - centre).norm(dim=1)]
    views += [lambda x, i=i: x[:, i] for i in range(x.shape[1])]
    each = [stats.ks_2samp(view(x).numpy(), view(truth).numpy()).pvalue for view in views]
    return min(each) * len(each)


@pytest.mark.parametrize("law", LAWS, ids=of)
@pytest.mark.parametrize("kernel", EXACT, ids=of)
def test_exact_kernels_leave_the_law_alone(kernel: Kernel, law: Law) -> None:
    """Chains that start with the law have it after some steps too, on the funnel as elsewhere."""
    start = exact(law, CHAINS, "start")
    x = last(kernel, law, start, STEPS[type(kernel)])
    assert pvalue(x, exact(law, TRUTH, "truth")) > P
    assert (x - start).norm(dim=1).median() > 0.1  # they did not stay where they were


@pytest.mark.parametrize("law", LAWS[:4], ids=of)
@pytest.mark.parametrize("kernel", EXACT, ids=of)
def test_exact_kernels_reach_the_law(kernel: Kernel, law: Law) -> None:
    """Chains that start elsewhere have the law when they have forgotten where."""
    start = 1.0 + 0.1 * Noise("elsewhere").normal(
        torch.zeros(CHAINS, law.dim, dtype=torch.float64)
    )
    truth = exact(law, TRUTH, "truth")
    assert pvalue(start, truth) < P
    assert pvalue(last(kernel, law, start, 4 * STEPS[type(kernel)]), truth) > P


@pytest.mark.parametrize("law", LAWS[:4], ids=of)
@pytest.mark.parametrize("kernel", EXACT, ids=of)
def test_estimates_are_within_their_errors(kernel: Kernel, law: Law) -> None:
    """Mean, variance and quantiles of 16 chains within 4 standard errors, from the effective
    sample size of each.
    """
    noise = Noise("estimates")
    start = noise.normal(torch.zeros(16, law.dim, dtype=torch.float64))
    draws = 4000 if isinstance(kernel, Metropolis | MALA) else 400
    x = run(law, kernel, start, draws, 100, noise).x
    truth = exact(law, 200_000, "moments")
    for i in range(law.dim):
        column, true = x[:, :, i], truth[:, i]
        values = [(column, true), ((column - true.mean()) ** 2, (true - true.mean()) ** 2)]
        for q in (0.05, 0.25, 0.5, 0.75, 0.95):
            edge = true.quantile(q)
            values.append(((column < edge).double(), (true < edge).double()))
        for estimate, expected in values:
            ess = array_stats.ess(estimate.T.numpy(), method="mean")
            error = estimate.std().item() * math.sqrt(1 / ess + 1 / len(true))
            assert abs(estimate.mean() - expected.mean()) < 4 * error


def test_fixed_steps_do_not_reach_the_funnel() -> None:
    """They are reported, not passed: the neck is too narrow for a step that suits the mouth."""
    from pipeline.mcmc.diagnostics import summarise

    law, noise = Funnel(10, 3.0), Noise("funnel")
    for kernel in (Metropolis(0.1), MALA(0.01), HMC(0.1, 10)):
        start = noise.normal(torch.zeros(16, law.dim, dtype=torch.float64))
        with pytest.warns(UserWarning):
            x = run(law, kernel, start, 1000, 300, noise).x
            assert summarise(x).r_hat.max() > 1.01


# What is wrong on purpose ------------------------------------------------------------------------


def always(kernel: Kernel) -> Kernel:
    """The kernel with its acceptance left out."""

    class Always(type(kernel)):
        def propose(self, *args: Any) -> Any:
            proposal, log_ratio, gradients = super().propose(*args)
            return proposal, torch.zeros_like(log_ratio), gradients

    kernel.__class__ = Always
    return kernel


class NoCorrection(MALA):
    """MALA that forgets that its proposal is not symmetric."""

    def propose(self, target: Target, state: State, noise: Any) -> Any:
        proposal, _, gradients = super().propose(target, state, noise)
        return proposal, proposal.log_prob - state.log_prob, gradients


class WrongSign(MALA):
    """MALA with its correction the wrong way round."""

    def propose(self, target: Target, state: State, noise: Any) -> Any:
        proposal, log_ratio, gradients = super().propose(target, state, noise)
        difference = proposal.log_prob - state.log_prob
        return proposal, 2 * difference - log_ratio, gradients


class NoKinetic(HMC):
    """HMC that forgets the energy of its momentum."""

    def propose(self, target: Target, state: State, noise: Any) -> Any:
        proposal, _, gradients = super().propose(target, state, noise)
        return proposal, proposal.log_prob - state.log_prob, gradients


@pytest.mark.parametrize(
    "kernel",
    [
        always(Metropolis(0.3)),
        always(MALA(0.15)),
        always(HMC(0.6, 5)),
        NoCorrection(0.15),
        WrongSign(0.15),
        NoKinetic(0.4, 5),
    ],
    ids=["Metropolis", "MALA", "HMC", "NoCorrection", "WrongSign", "NoKinetic"],
)
def test_a_wrong_kernel_is_seen(kernel: Kernel) -> None:
    """By the test that the right ones pass, and by a wide margin."""
    for law in (LAWS[0], LAWS[2]):
        x = last(kernel, law, exact(law, 4000, "start"), 40)
        assert pvalue(x, exact(law, TRUTH, "truth")) < P / 1000


class NoWeights(nuts.Forest):
    """Every leaf has the same chance: no acceptance."""

    def leap(self, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        leaf, p, gain = super().leap(target)
        return leaf, p, torch.zeros_like(gain)


class LastHalf(nuts.Forest):
    """The subtree that was added last is always preferred."""

    def uniform(self, noise: Noise) -> list[Tensor]:
        chance, share, side = super().uniform(noise)
        return [chance, torch.zeros_like(share), side]


class LastLeaf(nuts.Forest):
    """In a subtree the last leaf is always drawn."""

    def uniform(self, noise: Noise) -> list[Tensor]:
        chance, share, side = super().uniform(noise)
        return [torch.zeros_like(chance), share, side]


@pytest.mark.parametrize("forest", [NoWeights, LastHalf, LastLeaf])
def test_a_wrong_nuts_is_seen(forest: type, monkeypatch: pytest.MonkeyPatch) -> None:
    law = LAWS[2]
    start, truth = exact(law, 8000, "start"), exact(law, 100_000, "truth")
    assert pvalue(last(NUTS(0.9, 4), law, start, 8), truth) > P
    monkeypatch.setattr(nuts, "Forest", forest)
    assert pvalue(last(NUTS(0.9, 4), law, start, 8), truth) < P / 1000


# The bias of those that are not exact ------------------------------------------------------------


@pytest.mark.parametrize(("std", "mu"), [(1.0, 0.1), (1.0, 0.8), (0.5, 0.1), (2.0, 3.0)])
def test_ula_has_the_bias_of_its_step(std: float, mu: float) -> None:
    """x' = (1 − μ/s²) x + √(2μ) n has variance s² / (1 − μ / 2s²)."""
    law, n = Gaussian([1.0], [std**2]), 40_000
    steps = math.ceil(math.log(1e-6) / math.log(abs(1 - mu / std**2) ** 2 + 1e-12))
    x = last(ULA(mu), law, torch.zeros(n, 1, dtype=torch.float64), steps)
    variance = std**2 / (1 - mu / (2 * std**2))
    assert variance == pytest.approx(2 * mu / (1 - (1 - mu / std**2) ** 2), rel=1e-12)
    # 4 standard errors of a mean and of a variance: √(v/n) and v √(2/n)
    assert x.mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(variance / n) + 1e-3)
    assert x.var().item() == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / n))


class Linear(Target):
    """The score −a x, and no density."""

    def __init__(self, a: float) -> None:
        self.a = a

    def score(self, x: Tensor) -> Tensor:
        return -self.a * x


SIGMA = 0.5
NOISY, NOISIER = 1 / (1 + SIGMA**2), 1 / (1 + 1.0**2)  # slopes of the scores at two levels
EXTRAPOLATED = (1.0 * NOISY - SIGMA**2 * NOISIER) / (1.0 - SIGMA**2)
MU = SIGMA**2 / 2
BIASES = [
    (ULA(MU), NOISY, 1.3158),
    (HalfDenoising(SIGMA), NOISY, 1.0658),
    (ULA(MU), EXTRAPOLATED, 1.1773),
    (ULA(MU), 1.0, 1.0667),
]


@pytest.mark.parametrize(("kernel", "slope", "variance"), BIASES)
def test_noise_bias_and_step_bias(kernel: Kernel, slope: float, variance: float) -> None:
    """Data N(0, 1), the exact score of the level σ = 0.5, μ = σ²/2: by recursion and by chains."""
    shrink = 1 - MU * slope
    v = 0.0
    for _ in range(400):
        half = isinstance(kernel, HalfDenoising)
        v = shrink**2 * (v + SIGMA**2) if half else shrink**2 * v + SIGMA**2
    assert v == pytest.approx(variance, abs=5e-5)  # it is stated to 4 digits
    n = 200_000
    x = last(kernel, Linear(slope), torch.zeros(n, 1, dtype=torch.float64), 80)
    # 80 steps shrink the start by 0.9^160; 4 standard errors of a variance are 4 v √(2/n) = 0.017
    # at most, and the nearest two of the four are 0.0009 apart by design: clean score and half-
    # denoising agree to first order
    assert x.var().item() == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / n))


def test_half_denoising_has_the_bias_of_its_step() -> None:
    """v = a² (v + σ²) with a = 1 − σ² / 2 (1 + σ²): (v − 1) / σ² → 1/4, not 0."""
    for sigma in (0.1, 0.01):
        a = 1 - sigma**2 / (2 * (1 + sigma**2))
        v = a**2 * sigma**2 / (1 - a**2)
        # the next order is some σ², and 1 − a² loses digits: eps / σ⁴
        assert (v - 1) / sigma**2 == pytest.approx(0.25, abs=sigma**2)
        y = HalfDenoising(sigma).step(Linear(1 / (1 + sigma**2)), State(torch.ones(1, 1)), Still())
        assert y[0].x.item() == pytest.approx(a, rel=1e-6)  # float32


class Still(Noise):
    """No noise."""

    def __init__(self) -> None:
        super().__init__(0)

    def normal(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)


def squares(kernel: Kernel) -> float:
    """The autocorrelation of x² from a step to the next, on N(0, 1)."""
    law = Gaussian([0.0], [1.0])
    x = exact(law, 20_000, "x")
    y = last(kernel, law, x, 1)
    return torch.corrcoef(torch.cat((x, y), dim=1).mT.square())[0, 1].item()


@pytest.mark.parametrize("half_periods", [1, 2])
def test_jitter_breaks_the_resonance_of_a_fixed_length(half_periods: int) -> None:
    """Half a period of N(0, 1) is π: the leapfrog of step ε has 2 arcsin(ε / 2) for ε."""
    step = 2 * math.sin(half_periods * math.pi / 10 / 2)
    assert squares(HMC(step, 10, jitter=0.0)) > 0.999
    # cos² of a length spread evenly over [l / 2, 3 l / 2] is 1/2 on average, a correlation of 0.5
    assert squares(HMC(step, 10)) < 0.6


def test_one_step_is_its_formula() -> None:
    """With the noise known, to the last digits."""
    x = Noise("x").normal(torch.zeros(5, 3, dtype=torch.float64))
    n, law = Noise("n").normal(x), Linear(0.7)
    ula = ULA(0.1).step(law, State(x), Noise("n"))[0].x
    assert torch.allclose(ula, x - 0.1 * 0.7 * x + math.sqrt(0.2) * n, rtol=1e-13, atol=1e-14)
    half = HalfDenoising(0.4).step(law, State(x), Noise("n"))[0].x
    y = x + 0.4 * n
    assert torch.allclose(half, y - 0.08 * 0.7 * y, rtol=1e-13, atol=1e-14)


# How each goes about it --------------------------------------------------------------------------


def test_mala_accepts_small_steps_and_refuses_large_ones() -> None:
    law, x = LAWS[2], exact(LAWS[2], 500, "x")
    for mu, low, high in ((1e-4, 0.99, 1.0), (1.0, 0.0, 0.5)):
        kernel = MALA(mu)
        _, info = kernel.step(law, kernel.init(law, x), Noise("accept"))
        assert info.acceptance is not None and low < info.acceptance.mean() < high


def test_leapfrog_error_is_of_second_order() -> None:
    law, x = LAWS[0], exact(LAWS[0], 200, "x")
    errors = []
    for step_size, steps in ((0.1, 8), (0.05, 16), (0.025, 32)):
        kernel = HMC(step_size, steps)
        _, log_ratio, gradients = kernel.propose(law, kernel.init(law, x), Noise("p"))
        assert gradients == steps
        errors.append(log_ratio.abs().mean())
    slopes = -torch.stack(errors).log2().diff()
    assert (slopes - 2).abs().max() < 0.1  # the next order is a hundredth of it at these steps


def test_trajectories_turn_at_half_a_period() -> None:
    """On N(0, 1) half a period is π, 31 leaves of 0.1: doublings end at 31 or 63, or at 15 and
    before where a half turns by itself.
    """
    law, kernel = Gaussian([0.0], [1.0]), NUTS(0.1)
    state = kernel.init(law, exact(law, 1, "x"))
    _, _, info = kernel.draw(law, state, 200, Noise("turn"))
    assert 15 < info.gradients / 200 < 45


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_max_depth_bounds_a_trajectory(depth: int) -> None:
    """With steps too small to turn, a transition has 2^depth − 1 leaves."""
    law, kernel = Gaussian([0.0] * 3, [1.0] * 3), NUTS(1e-4, depth)
    x = exact(law, 4, "x")
    _, _, info = kernel.draw(law, kernel.init(law, x), 80, Noise("depth"))
    leaves = 80 * (2**depth - 1)
    assert info.gradients == 8 * math.ceil(leaves / 8)  # no chain waits, but for the last look


def test_the_digits_of_a_leaf_say_its_trees() -> None:
    """Slots hold the first leaves of the balanced trees that an odd leaf ends."""
    forest = nuts.Forest(
        State(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, 1)), 0.1, 6, 1, Noise(0)
    )
    kept = [0] * 7
    for m in range(1, 64):
        depth = m.bit_length() - 1
        first = 2**depth  # of this doubling
        trees = [m + 1 - 2**k for k in range(1, depth + 1) if (m + 1) % 2**k == 0]
        expected = {start for start in trees if start >= first}
        whole = m + 1 == 2 * first
        kinds = forest.kinds[m].tolist()
        assert {kept[slot] for slot in range(1, 6) if kinds[slot]} == expected
        assert kinds[0] == whole == kinds[-2] and kinds[-1] == (m == 63)
        kept[int(forest.slots[m])] = m
        assert (forest.slots[m] == 6) == (m % 2 == 1)  # odd leaves are not kept


def test_a_chain_does_not_depend_on_its_neighbours() -> None:
    """With a stream for each row, a chain is the same in any company, lengths and all."""
    law = Funnel(3, 1.5)
    x = exact(law, 3, "x")
    for kernel in EXACT:
        alone = kernel.draw(law, kernel.init(law, x[:1]), 20, PictureNoise([5]))[1]
        among = kernel.draw(law, kernel.init(law, x), 20, PictureNoise([5, 6, 7]))[1]
        assert torch.allclose(alone[:, 0], among[:, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", [*EXACT, ULA(0.1), HalfDenoising(0.3)], ids=of)
def test_pictures_are_vectors(kernel: Kernel) -> None:
    """(B, C, H, W) as (B, C H W): the noise is the same, so are the draws."""
    density = Density(lambda x: -(x**4).reshape(len(x), -1).sum(dim=1))
    x = Noise("pictures").normal(torch.zeros(5, 2, 3, 2, dtype=torch.float64))
    state, pictures, _ = kernel.draw(density, kernel.init(density, x), 10, Noise(1))
    flat = kernel.init(density, x.flatten(1))
    _, vectors, _ = kernel.draw(density, flat, 10, Noise(1))
    assert pictures.shape == (10, 5, 2, 3, 2)
    assert torch.allclose(pictures.flatten(2), vectors, rtol=1e-9, atol=1e-9)
    assert torch.equal(state.x, pictures[-1])


@pytest.mark.parametrize(
    "kernel", [Metropolis(0.7), MALA(0.15), HMC(0.4, 3), NUTS(0.4, 5)], ids=of
)
def test_compiled_draws_are_the_same(kernel: Kernel) -> None:
    """A density that torch differentiates is one program with its kernel."""
    density = Density(lambda x: -(x**4).reshape(len(x), -1).sum(dim=1))
    x = Noise("pictures").normal(torch.zeros(5, 1, 2, 3, dtype=torch.float64))
    with torch.inference_mode():
        state = kernel.init(density, x)
        plain = kernel.draw(density, state, 40, Noise(1))
        found = kernel.draw(density, state, 40, Noise(1), compile=True)
    assert found[2].gradients == plain[2].gradients
    pairs = zip(
        (found[1], *found[0], *found[2][1:]), (plain[1], *plain[0], *plain[2][1:]), strict=True
    )
    for ours, theirs in pairs:
        assert ours is theirs is None or torch.allclose(
            ours.double(), theirs.double(), rtol=1e-8, atol=1e-8
        )


def test_what_cannot_be_compiled_is_said() -> None:
    density = Density(lambda x: -(x**2).sum(dim=1) if x.sum() > -1e9 else -x.sum(dim=1))
    with pytest.raises(UserError, match="cannot be compiled.*leave compile out"):
        run(density, HMC(0.2, 2), torch.zeros(2, 3), 3, 0, Noise(1), compile=True)


@pytest.mark.parametrize("kernel", EXACT, ids=of)
def test_the_state_knows_its_target(kernel: Kernel) -> None:
    law = Banana(0.3, 2.0)
    state, _, _ = kernel.draw(law, kernel.init(law, exact(law, 50, "x")), 5, Noise(2))
    log_prob, score = law.log_prob_and_score(state.x)
    assert torch.allclose(state.log_prob, log_prob, rtol=1e-12)
    assert state.score is None or torch.allclose(state.score, score, rtol=1e-12)


@pytest.mark.parametrize("kernel", EXACT, ids=of)
def test_without_a_density_the_reason_is_given(kernel: Kernel) -> None:
    reason = f"{of(kernel)} accepts or rejects by p\\(x\\), and this target has a score only; use"
    with pytest.raises(UserError, match=reason):
        kernel.init(Linear(1.0), torch.zeros(2, 2))


@pytest.mark.parametrize("make", [ULA, HalfDenoising, Metropolis, MALA, HMC, NUTS])
def test_arguments_are_checked(make: Any) -> None:
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be positive"):
            make(value)


def test_counts_are_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        HMC(0.1, 0)
    with pytest.raises(ValueError, match="at least 1"):
        NUTS(0.1, 0)
