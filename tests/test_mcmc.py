"""Runs: adaptation and its freezing, diagnostics, and what is said when something goes wrong."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.mcmc import (
    HMC,
    MALA,
    NUTS,
    ULA,
    Density,
    Gaussian,
    Info,
    Kernel,
    Metropolis,
    State,
    Target,
    run,
)
from pipeline.mcmc.adaptation import DualAveraging, Moments, windows
from pipeline.mcmc.diagnostics import summarise, table
from pipeline.noise import Noise

STDS = torch.logspace(-1, 1, 5, dtype=torch.float64)
LAW = Gaussian(torch.zeros(5, dtype=torch.float64), STDS**2)


def start(chains: int = 16, dim: int = 5) -> Tensor:
    return Noise("start").normal(torch.zeros(chains, dim, dtype=torch.float64))


def of(kernel: Kernel) -> str:
    return type(kernel).__name__


@pytest.mark.parametrize("first", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("make", [Metropolis, MALA, HMC, NUTS])
def test_warmup_finds_step_and_units(make: type[Kernel], first: float) -> None:
    """From any start: the acceptance is near its aim and the units are the standard deviations."""
    kernel = make(first)
    drawn = run(LAW, kernel, start(), 300, 400, Noise("adapt"))
    assert drawn.acceptance is not None and drawn.scale is not None
    # dual averaging leaves a few hundredths; HMC's acceptance is steep in the step
    assert drawn.acceptance.mean().item() == pytest.approx(kernel.aim, abs=0.1)
    # the last window has some 250 steps of 16 chains: the error of a standard deviation is
    # 1 / √(2 ESS), and the ESS of the slowest, the random walk, is some 100
    assert ((drawn.scale / STDS).log().abs() < 0.4).all()
    assert kernel.step_size == first != drawn.kernel.step_size  # ours is left as it was


def test_step_and_units_are_frozen_for_the_draws() -> None:
    steps: list[tuple[float, Target]] = []

    class Watched(MALA):
        def step(self, target: Target, state: State, noise: Noise) -> tuple[State, Info]:  # type: ignore[override]
            steps.append((self.step_size, target))
            return super().step(target, state, noise)

    run(LAW, Watched(0.1), start(), 50, 100, Noise("frozen"))
    assert len(steps) == 150
    assert len(set(steps[:100])) > 50 and len(set(steps[100:])) == 1


def test_without_warmup_the_kernel_is_as_given() -> None:
    drawn = run(LAW, MALA(0.003), start(), 10, 0, Noise(0))
    assert drawn.kernel.step_size == 0.003 and drawn.scale is None and drawn.warmup_gradients == 0


def test_gradients_are_those_computed() -> None:
    """Those of every chain, counted where the target is asked."""
    asked = [0]

    class Counted(Gaussian):
        def _offset_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
            asked[0] += len(x)
            return super()._offset_and_score(x)

    law = Counted(torch.zeros(5, dtype=torch.float64), STDS**2)
    for kernel in (MALA(0.01), HMC(0.1, 7), NUTS(0.1, 4)):
        asked[0] = 0
        drawn = run(law, kernel, start(), 20, 60, Noise("count"))
        assert asked[0] == drawn.gradients + drawn.warmup_gradients + 16  # the start is one more


def test_same_noise_same_draws() -> None:
    for kernel in (ULA(1e-3), NUTS(0.1, 3)):
        a, b, c = (run(LAW, kernel, start(), 10, 30, Noise(seed)).x for seed in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_progress_is_called_for_each_step() -> None:
    for kernel in (ULA(1e-3), MALA(0.01), NUTS(0.1, 3)):
        ticks: list[None] = []
        run(LAW, kernel, start(), 21, 30, Noise(0), lambda ticks=ticks: ticks.append(None))
        assert len(ticks) == 51


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    run(LAW, NUTS(0.1, 3), start(), 5, 20, Noise(0))
    assert torch.equal(torch.get_rng_state(), before)


# Adaptation --------------------------------------------------------------------------------------


def test_dual_averaging_is_as_published() -> None:
    """Against the sums of the paper's section 3.2, written out."""
    averaging, first = DualAveraging(0.65), 0.3
    acceptances = [0.1, 0.9, 0.7, 0.65, 1.0, 0.0]
    state, average = averaging.init(first), 0.0
    for t, acceptance in enumerate(acceptances, start=1):
        state = averaging.update(state, acceptance)
        total = sum(0.65 - a for a in acceptances[:t])
        log_step = math.log(10 * first) - math.sqrt(t) / 0.05 / (t + 10) * total
        average = t**-0.75 * log_step + (1 - t**-0.75) * average  # the first share is 1
        assert state.log_step == pytest.approx(log_step, rel=1e-12)
        assert state.log_average == pytest.approx(average, rel=1e-12)


class Flat(Target):
    """All points are alike: every step is accepted."""

    def score(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def log_prob(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x))


class Point(Target):
    """There is one point: no step is accepted."""

    def score(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.where((x == 0).all(dim=1), 0.0, -torch.inf).to(x)


@pytest.mark.filterwarnings("ignore:.*diverged in")
@pytest.mark.parametrize("kernel", [Metropolis(), MALA(), HMC(0.1, 3), NUTS(0.1, 3)], ids=of)
def test_steps_stay_numbers_where_all_or_none_are_accepted(kernel: Kernel) -> None:
    x = torch.zeros(4, 2, dtype=torch.float64)
    for law, accepted in ((Flat(), 1.0), (Point(), 0.0)):
        drawn = run(law, kernel, x, 10, 1000, Noise("extreme"))
        assert drawn.acceptance is not None
        # MALA's proposal and its way back differ by rounding, far from 0
        assert drawn.acceptance.mean().item() == pytest.approx(accepted, abs=0.01)
        assert abs(math.log(drawn.kernel.step_size)) <= 30 and drawn.x.isfinite().all()
    averaging = DualAveraging(0.8)
    for acceptance in (0.0, 1.0):
        state = averaging.init(0.1)
        for _ in range(100_000):
            state = averaging.update(state, acceptance)
        assert abs(state.log_step) == 30 and abs(state.log_average) <= 30


@pytest.mark.parametrize("aim", [0.0, 1.0, -0.2])
def test_an_aim_is_a_probability(aim: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        DualAveraging(aim)


def test_moments_are_those_of_all_points() -> None:
    x = 1e6 + Noise("moments").normal(torch.zeros(60, 3, 2, dtype=torch.float64))
    moments = Moments.empty(x)
    for part in x.split([1, 20, 7, 32]):
        moments = moments.update(part)
    assert moments.count == 60
    assert torch.allclose(moments.mean, x.mean(dim=0), rtol=1e-12)
    # far from 0, where the naive sum of squares would lose all digits
    assert torch.allclose(moments.square / 59, x.var(dim=0), rtol=1e-8)
    scale = torch.sqrt((60 * x.var(dim=0) + 5e-3) / 65)
    assert torch.allclose(moments.scale(), scale, rtol=1e-8)


def test_windows_double_and_leave_a_fifth() -> None:
    assert windows(500) == [10, 30, 70, 150, 400]
    assert windows(1000) == [10, 30, 70, 150, 310, 800]
    assert windows(50) == [10, 40] and windows(20) == [16] and windows(10) == []


# Diagnostics -------------------------------------------------------------------------------------


def test_summary_of_independent_draws() -> None:
    x = Noise("iid").normal(torch.zeros(1000, 4, 3, dtype=torch.float64))
    x = 2 + 3 * x
    summary = summarise(x)
    n = 4000
    assert np.abs(summary.mean - 2).max() < 4 * 3 / n**0.5  # 4 standard errors
    assert np.abs(summary.std - 3).max() < 4 * 3 / (2 * n) ** 0.5
    # a quantile's error is √(p (1 − p) / n) over the density there, 3.4 / √n ⋅ 3 standard errors
    assert np.abs(summary.low - (2 - 1.645 * 3)).max() < 4 * 2.11 * 3 / n**0.5
    assert np.abs(summary.high - (2 + 1.645 * 3)).max() < 4 * 2.11 * 3 / n**0.5
    assert (summary.ess_bulk > 0.8 * n).all() and (summary.ess_tail > 0.8 * n).all()
    assert (summary.r_hat < 1.01).all()


def test_effective_sample_size_of_an_autoregression() -> None:
    """x' = ρ x + √(1 − ρ²) n is worth (1 − ρ) / (1 + ρ) of its draws."""
    rho, noise = 0.8, Noise("ar")
    x = [noise.normal(torch.zeros(8, 1, dtype=torch.float64))]
    for _ in range(4999):
        x.append(rho * x[-1] + math.sqrt(1 - rho**2) * noise.normal(x[-1]))
    ess = summarise(torch.stack(x)).ess_bulk[0]
    assert ess == pytest.approx(40_000 * (1 - rho) / (1 + rho), rel=0.1)  # its own error: 3 %


def test_chains_apart_are_warned_of() -> None:
    x = Noise("apart").normal(torch.zeros(200, 4, 2, dtype=torch.float64))
    x[:, 0, 1] += 1
    with pytest.warns(UserWarning, match=r"R-hat is 1\.\d+ in coordinate 1, above 1.01"):
        summarise(x)
    with pytest.raises(ValueError, match="at least 4"):
        summarise(x[:3])


def warned(x: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summarise(x)
    return [str(warning.message) for warning in caught]


def test_one_chain_and_chains_that_never_move_are_told_in_words() -> None:
    """And by nothing else: NumPy's warnings of 0 / 0 are not for people."""
    x = Noise("words").normal(torch.zeros(200, 4, 2, dtype=torch.float64))
    assert warned(x) == []
    (one,) = warned(x[:, :1])
    assert "R-hat needs at least two chains, and there is one" in one
    still = x.clone()
    still[:, 1:3, 1] = 0.5
    few = warned(still)
    assert few[0].startswith("2 of 4 chains never moved in coordinate 1") and len(few) <= 2
    (none,) = warned(torch.zeros(200, 4, 1))
    assert none.startswith("4 of 4 chains never moved in coordinate 0")
    apart = warned(torch.arange(4.0).expand(200, 1, 4).mT)
    assert apart[0].startswith("4 of 4 chains never moved") and "nan" not in "".join(apart)
    assert len(warned(torch.zeros(200, 1, 1))) == 2


@pytest.mark.filterwarnings("ignore:R-hat")  # so few draws
def test_table_shows_the_worst() -> None:
    drawn = run(LAW, NUTS(0.1), start(), 200, 200, Noise("table"))
    text = table(drawn)
    assert all(f"x_{i}" in text for i in range(5)) and "divergences 0" in text
    short = table(drawn, most=2).splitlines()
    assert len(short) == 5 and short[3] == "and 3 coordinates with more ESS"


# What goes wrong ---------------------------------------------------------------------------------


def test_ula_that_runs_away_says_where() -> None:
    law = Density(lambda x: -(x**4).sum(dim=1))
    x = start(4, 2) / 10
    x[2] = torch.tensor([10.0, 0.0])
    with pytest.raises(UserError, match=r"ULA left the finite numbers in chain 2 at step \d+"):
        run(law, ULA(0.05), x, 100, 0, Noise("away"))
    with pytest.raises(UserError, match=r"chain 2 at step \d+, from x = \["):
        run(law, ULA(0.05), x, 1, 100, Noise("away"))


class Half(Target):
    """A Gaussian whose density is no number beyond a wall."""

    def score(self, x: Tensor) -> Tensor:
        return -x

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 1.0, torch.nan, -0.5 * x.square().sum(dim=1))


@pytest.mark.parametrize("kernel", [Metropolis(0.5), MALA(0.3), HMC(0.3, 5), NUTS(0.3)], ids=of)
def test_a_density_that_is_no_number_says_where(kernel: Kernel) -> None:
    x = torch.zeros(4, 2, dtype=torch.float64)
    reason = rf"{of(kernel)} diverged in \d+ of 2000 steps, first in chain \d at step \d+, near x"
    with pytest.warns(UserWarning, match=reason):
        drawn = run(Half(), kernel, x, 500, 0, Noise("wall"))
    assert drawn.x.isfinite().all() and (drawn.x[:, :, 0] <= 1).all()
    assert drawn.diverged is not None and drawn.diverged.any()


def test_hmc_that_loses_energy_says_where() -> None:
    for kernel in (HMC(5.0, 20), NUTS(5.0)):
        with pytest.warns(UserWarning, match=f"{of(kernel)} diverged in 160 of 160 steps"):
            drawn = run(LAW, kernel, start(), 10, 0, Noise("lost"))
        assert torch.equal(drawn.x[-1], start())  # every proposal was refused


def test_a_start_without_density_is_refused() -> None:
    x = torch.zeros(3, 2, dtype=torch.float64)
    x[1, 0] = 2.0
    with pytest.raises(UserError, match=r"Chain 1 starts at x = \[2, 0\]"):
        run(Half(), NUTS(0.1), x, 10, 0, Noise(0))
    x[1, 0] = math.inf
    with pytest.raises(UserError, match=r"Chain 1 starts at x = \[inf, 0\]"):
        run(Half(), ULA(0.1), x, 10, 0, Noise(0))


@pytest.mark.parametrize(("draws", "warmup"), [(0, 0), (-1, 5), (5, -1)])
def test_counts_are_checked(draws: int, warmup: int) -> None:
    with pytest.raises(UserError, match="at least 1 and 0"):
        run(LAW, ULA(0.1), start(), draws, warmup, Noise(0))
