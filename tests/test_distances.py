"""Distances against closed forms, and against torchmetrics and scipy."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from pipeline.evaluation import distances
from pipeline.evaluation.distances import (
    density_coverage,
    frechet,
    frechet_by_class,
    inception_score,
    kernel_distance,
    precision_recall,
)
from pipeline.evaluation.statistics import Statistics, by_class
from pipeline.noise import Noise


def gaussian(mean: Tensor, covariance: Tensor) -> Statistics:
    """The statistics of a Gaussian."""
    found = Statistics(len(mean))
    found.n, found.mean, found.scatter = 2, mean.double(), covariance.double()
    return found


def normal(key: str, *shape: int) -> Tensor:
    return Noise(key).normal(torch.empty(*shape, dtype=torch.float64))


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(normal("rotation", d, d))[0]


# 1e-12 of traces of the order of 10: float64 and a few hundred operations


def test_frechet_in_one_dimension() -> None:
    a = gaussian(torch.tensor([1.0]), torch.tensor([[4.0]]))
    b = gaussian(torch.tensor([3.0]), torch.tensor([[0.25]]))
    assert frechet(a, b) == pytest.approx((1 - 3) ** 2 + (2 - 0.5) ** 2, rel=1e-12)


def test_frechet_of_commuting_covariances() -> None:
    q, s, t = rotation(6), torch.arange(1.0, 7.0).double(), torch.linspace(0.1, 9, 6).double()
    a, b = (gaussian(torch.zeros(6), q * of @ q.T) for of in (s, t))
    expected = (s.sqrt() - t.sqrt()).square().sum().item()
    assert frechet(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_plane_gaussians() -> None:
    """Two by two, the trace of a root is √(tr P + 2 √det P)."""
    c, d = torch.tensor([[2.0, 0.9], [0.9, 0.7]]), torch.tensor([[0.5, -0.4], [-0.4, 3.0]])
    c, d, shift = c.double(), d.double(), torch.tensor([1.0, -2.0])
    root = ((c @ d).trace() + 2 * (c @ d).det().sqrt()).sqrt()
    expected = (5 + c.trace() + d.trace() - 2 * root).item()
    assert frechet(gaussian(shift, c), gaussian(0 * shift, d)) == pytest.approx(
        expected, rel=1e-12
    )


def test_frechet_of_rank_deficient_gaussians() -> None:
    """A line against anything: tr √(a aᵀ C) = √(aᵀ C a); planes at right angles: 0."""
    q, a = rotation(6), normal("line", 6)
    c = q * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0, 0.0]) @ q.T
    line, plane, zero = a.outer(a), q[:, 4:] @ q[:, 4:].T, torch.zeros(6)
    full = q * torch.arange(1.0, 7.0) @ q.T
    for other in (c, full):
        expected = (line.trace() + other.trace() - 2 * (a @ other @ a).sqrt()).item()
        for pair in ((line, other), (other, line)):
            found = frechet(*(gaussian(zero, of) for of in pair))
            assert found == pytest.approx(expected, rel=1e-12)
    assert frechet(gaussian(zero, c), gaussian(zero, plane)) == pytest.approx(8.5, rel=1e-12)
    point = gaussian(zero + 1, torch.zeros(6, 6))
    assert frechet(point, gaussian(zero, c)) == pytest.approx(6 + 6.5, rel=1e-12)


def test_what_counts_as_singular() -> None:
    """A pivot that may be rounding: its factor would be noise."""
    for least, singular in ((1e-3, False), (1e-12, False), (1e-17, True), (0.0, True)):
        c = torch.tensor([[1.0, 0.0], [0.0, least]], dtype=torch.float64)
        assert (distances.cholesky(c) is None) == singular


class Rows(nn.Module):
    """What torchmetrics takes for a feature network: here the features are given."""

    num_features = 24

    def forward(self, x: Tensor) -> Tensor:
        return x


def two_sets(n: int = 200, m: int = 150) -> tuple[Tensor, Tensor]:
    mix = normal("mix", 24, 24) / 5
    return normal("x", n, 24), 1.2 * normal("y", m, 24) @ (torch.eye(24) + mix) + 0.3


def test_frechet_equals_torchmetrics_and_scipy() -> None:
    x, y = two_sets()
    theirs = FrechetInceptionDistance(feature=Rows())
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    a, b = Statistics(24).update(x), Statistics(24).update(y)
    found = frechet(a, b)
    assert found == pytest.approx(theirs.compute().item(), rel=1e-9)
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root).real
    assert found == pytest.approx((a.mean - b.mean).square().sum().item() + trace, rel=1e-9)


@pytest.mark.parametrize("n", [12, 24, 25, 200])
def test_a_set_against_itself_is_0(n: int) -> None:
    """Fewer features than dimensions, as many, one more, many."""
    x = two_sets(n)[0]
    a, b = (
        Statistics(24).update(x[order]) for order in (torch.arange(n), torch.arange(n).flip(0))
    )
    # of a trace of 24; with one more than dimensions the least eigenvalue is 1e-3 or so
    assert 0 <= frechet(a, b) < 1e-9


def test_frechet_of_another_length() -> None:
    with pytest.raises(ValueError, match="2 and 3 dimensions"):
        frechet(*(gaussian(torch.zeros(d), torch.eye(d)) for d in (2, 3)))


def test_frechet_by_class() -> None:
    x, y = two_sets()
    labels = ["cat", "dog"] * 100
    real, generated = by_class(x, labels), by_class(y, labels[:150])
    found = frechet_by_class(real, generated)
    expected = frechet(Statistics(24).update(x[1::2]), Statistics(24).update(y[1::2]))
    assert set(found) == {"cat", "dog"} and found["dog"] == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="Class 'cat' was generated"):
        frechet_by_class({"dog": real["dog"]}, generated)


def discrepancy(x: Tensor, y: Tensor) -> float:
    """The kernel distance, pair by pair."""

    def k(a: Tensor, b: Tensor) -> float:
        return ((a @ b / len(a)).item() + 1) ** 3

    def within(z: Tensor) -> float:
        n = len(z)
        pairs = [k(z[i], z[j]) for i in range(n) for j in range(n) if i != j]
        return sum(pairs) / len(pairs)

    across = [k(a, b) for a in x for b in y]
    return within(x) + within(y) - 2 * sum(across) / len(across)


def test_kernel_distance_pair_by_pair() -> None:
    x, y = two_sets(11, 8)
    found = kernel_distance(x, y, Noise("resamples"))
    assert found.value == pytest.approx(discrepancy(x, y), rel=1e-12)


def test_kernel_distance_equals_torchmetrics() -> None:
    x, y = two_sets(150, 150)
    theirs = KernelInceptionDistance(feature=Rows(), subsets=1, subset_size=150)
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    found = kernel_distance(x, y, Noise("resamples"))
    # torchmetrics computes in float32: 24 terms of 1e-7, cubed, of sums near 30 times the value
    assert found.value == pytest.approx(theirs.compute()[0].item(), rel=1e-4)


def test_kernel_distance_is_unbiased_and_covered() -> None:
    """In one dimension k = 1 + 3xy + 3x²y² + x³y³, so the squared discrepancy of two laws is
    3 (μ₁ − ν₁)² + 3 (μ₂ − ν₂)² + (μ₃ − ν₃)² in their moments.
    """
    shift = 0.5  # N(0, 1) and N(shift, 1), with moments 0, 1, 0 and s, 1 + s², s³ + 3s
    truth = 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2
    rounds, n = 100, 150
    found = [
        kernel_distance(normal(f"x{i}", n, 1), normal(f"y{i}", n, 1) + shift, Noise(i), 200)
        for i in range(rounds)
    ]
    values = torch.tensor([one.value for one in found])
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(rounds)
    inside = sum(one.low <= truth <= one.high for one in found) / rounds
    assert 0.85 < inside  # 0.95 is the aim; three standard deviations of 100 rounds are 0.07


def test_intervals_are_nested() -> None:
    x, y = two_sets()
    wide, narrow = (kernel_distance(x, y, Noise("r"), level=level) for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_interval_is_too_wide_where_the_laws_are_equal() -> None:
    """As it is stated: at a level of 0.95 it then holds 0 always, and is no exact one."""
    held = 0
    for i in range(100):
        found = kernel_distance(normal(f"e{i}", 60, 4), normal(f"f{i}", 60, 4), Noise(i), 200)
        held += found.low <= 0 <= found.high
    assert held >= 99  # of an exact interval 99 or more have a chance of 0.04; seeded


def test_kernel_distance_of_one_law_is_0_on_average() -> None:
    rounds = 200
    found = [
        kernel_distance(normal(f"a{i}", 40, 4), normal(f"b{i}", 30, 4), Noise(i), 1)
        for i in range(rounds)
    ]
    values = torch.tensor([one.value for one in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(rounds)
    # with the diagonals the mean would be near 2 (E k(x, x) − E k(x, y)) / 35 = 0.6
    assert values.std() / math.sqrt(rounds) < 0.05


def test_a_resample_never_pairs_a_feature_with_its_copy() -> None:
    """Drawn as (0, 0, 1), only k(x_0, x_1) is between two features."""
    x = two_sets(3)[0]
    found = distances.within(x, torch.tensor([[2.0, 1.0, 0.0]]).double())
    assert found.item() == pytest.approx(((x[0] @ x[1]).item() / 24 + 1) ** 3, rel=1e-12)


@pytest.mark.parametrize(
    ("n", "resamples", "level", "said"),
    [(1, 9, 0.9, "at least 2"), (5, 0, 0.9, "resamples 0"), (5, 9, 1.0, "level is 1.0")],
)
def test_kernel_distance_of_bad_input(n: int, resamples: int, level: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kernel_distance(normal("x", n, 2), normal("y", 5, 2), Noise(0), resamples, level)


LINE = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # 1st neighbours at 1, 1, 2, 4; 2nd 3, 2, 3, 6
MADE = torch.tensor([[0.5], [1.9], [11.0]])  # 1st neighbours at 1.4, 1.4, 9.1


def test_precision_and_recall_by_hand() -> None:
    """Balls of the data with k = 1: [-1, 1], [0, 2], [1, 5], [3, 11]; of the generated:
    [-0.9, 1.9], [0.5, 3.3], [1.9, 20.1].
    """
    found = precision_recall(LINE, MADE, k=1)
    assert found == (1.0, 1.0)  # 11 lies on the edge of a ball, and that counts
    assert precision_recall(LINE, MADE + torch.tensor([[0.0], [0.0], [0.1]]), k=1)[0] == 2 / 3
    assert precision_recall(LINE, torch.tensor([[3.0], [3.2], [3.1]]), k=1) == (1.0, 0.25)


def test_density_and_coverage_by_hand() -> None:
    """0.5 lies in two balls, 1.9 in two, 11 on an edge, which is outside: one ball is empty."""
    found = density_coverage(LINE, MADE, k=1)
    assert found == (pytest.approx(4 / 3), 0.75)
    # with k = 2, radii 3, 2, 3, 6: 0.5 in 3 balls, 1.9 in 4, 11 in 1
    assert density_coverage(LINE, MADE, k=2) == (pytest.approx(8 / 6), 1.0)


def test_a_set_and_itself_and_a_far_one() -> None:
    x = two_sets()[0]
    assert precision_recall(x, x) == (1, 1) and density_coverage(x, x)[1] == 1
    assert precision_recall(x, x + 100) == (0, 0) and density_coverage(x, x + 100) == (0, 0)


def test_fidelity_and_diversity_are_told_apart() -> None:
    """Half of the law, drawn well: precise, not complete."""
    x, y = normal("whole", 400, 2), normal("half", 400, 2)
    half = torch.cat([y[:, :1].abs(), y[:, 1:]], 1)
    precision, recall = precision_recall(x, half)
    density, coverage = density_coverage(x, half)
    assert precision > 0.95 and recall < 0.65
    assert density > 0.9 and coverage < 0.65
    assert precision_recall(half, x) == (recall, precision)


def test_density_and_coverage_of_one_law() -> None:
    """Naeem et al., lemmas 1 and 2: whatever the law and its dimension."""
    n, m, k, rounds = 60, 40, 5, 40
    expected = 1 - math.prod((n - i) / (m + n - i) for i in range(1, k + 1))
    for d in (1, 8):
        found = torch.tensor(
            [
                density_coverage(normal(f"{d}n{i}", n, d), normal(f"{d}m{i}", m, d), k)
                for i in range(rounds)
            ]
        )
        errors = 3 * found.std(0) / math.sqrt(rounds)
        assert abs(found[:, 0].mean() - 1) < errors[0]
        assert abs(found[:, 1].mean() - expected) < errors[1]


def test_a_common_offset_changes_nothing() -> None:
    x, y = two_sets()
    for distance in (precision_recall, density_coverage):
        assert distance(x + 1e8, y + 1e8) == distance(x, y)


def test_neighbours_there_are_not() -> None:
    with pytest.raises(ValueError, match="k is 4; expected 1 to 3"):
        precision_recall(LINE, LINE, k=4)


@pytest.mark.parametrize(
    "distance",
    [
        lambda x, y: kernel_distance(x, y, Noise("r"), 20),
        precision_recall,
        density_coverage,
    ],
)
def test_chunks_change_nothing(
    distance: Callable[[Tensor, Tensor], tuple[float, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = two_sets()
    whole = distance(x, y)
    monkeypatch.setattr(distances, "CHUNK", 37)
    assert distance(x, y) == pytest.approx(whole, rel=1e-12)  # sums in another order


def test_inception_score_limits() -> None:
    clear = 50 * torch.eye(10).repeat(20, 1)  # each class alike often, without doubt
    assert inception_score(clear, Noise(0), 1)[0] == pytest.approx(10, rel=1e-9)
    assert inception_score(clear[:1].repeat(20, 1), Noise(0), 2) == pytest.approx((1, 0))
    assert inception_score(torch.zeros(20, 10), Noise(0), 1)[0] == pytest.approx(1)
    # two classes, each with probability 3/4 in half of the pictures
    logits = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]]).repeat(8, 1)
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    found, spread = inception_score(logits, Noise(0), 1)
    assert found == pytest.approx(math.exp(divergence), rel=1e-6) and spread == 0
    with pytest.raises(ValueError, match="splits is 21"):
        inception_score(torch.zeros(20, 10), Noise(0), 21)


def test_inception_score_equals_torchmetrics() -> None:
    logits = 3 * normal("logits", 100, 24)
    theirs = InceptionScore(feature=Rows(), splits=1)
    theirs.update(logits)
    found, _ = inception_score(logits, Noise(0), 1)
    assert found == pytest.approx(theirs.compute()[0].item(), rel=1e-9)


def test_inception_score_is_the_mean_over_splits() -> None:
    """Splits of one picture each have score 1, whatever it shows."""
    assert inception_score(normal("logits", 12, 4), Noise(0), 12) == pytest.approx((1, 0))
