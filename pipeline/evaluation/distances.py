r"""How far two sets of features lie from each other.

====================  ====================================  ====================================
Fréchet               two Gaussians with the sets' moments  too large, by about :math:`1/n`
kernel distance       all moments up to the third           unbiased, with an interval
precision, recall     who lies in whose neighbourhood       fidelity and diversity apart
density, coverage     the same, around the data only        likewise; an outlier does no harm
Inception score       class probabilities of one set        deaf to the data
====================  ====================================  ====================================

torchmetrics has most of these, and the tests compare with it. They are written again here because
there the result takes the features' precision (bfloat16 in, bfloat16 out), statistics of a data
set cannot be kept, subsets are drawn from the global generator, and the eigenvalues of a product
of covariances, which is not symmetric, take many times as long.
"""

import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.evaluation.statistics import Statistics
from pipeline.noise import Noise

__all__ = ["DensityCoverage", "Interval", "PrecisionRecall", "density_coverage", "frechet"]
__all__ += ["frechet_by_class", "inception_score", "kernel_distance", "precision_recall"]

CHUNK = 2048  # rows of a matrix of pairs that are held at a time


def frechet(a: Statistics, b: Statistics) -> float:
    r"""The squared Fréchet (2-Wasserstein) distance of two Gaussians, never negative.

    .. math:: \|m_a - m_b\|^2 + \operatorname{tr}\left( C_a + C_b - 2 (C_a C_b)^{1/2} \right)

    With :math:`C_a = L L^\top`, the matrix :math:`C_a C_b` has the eigenvalues of the symmetric
    :math:`L^\top C_b L`, so a Cholesky factor and symmetric eigenvalues give the trace of the
    root. With any factors, :math:`C_a = A A^\top` and :math:`C_b = B B^\top`, that trace is also
    the sum of the singular values of :math:`A^\top B`. This is used where a covariance is
    singular, as with no more features than dimensions: there the eigenvalues that should be 0
    come out as :math:`10^{-16}`, and their roots would add up.

    References:
        | Dowson and Landau, 1982; https://doi.org/10.1016/0047-259X(82)90077-X
        | Heusel et al., 2017, equation (6); https://arxiv.org/abs/1706.08500

    Raises:
        ValueError: The features are of different lengths, or fewer than two.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"The features have {len(a.mean)} and {len(b.mean)} dimensions; expected as many."
        )
    c_a, c_b = a.covariance, b.covariance.to(a.mean.device)
    lower = cholesky(c_a)
    if lower is not None and cholesky(c_b) is not None:
        root = torch.linalg.eigvalsh(lower.T @ c_b @ lower).clamp(min=0).sqrt().sum()
    else:
        root = torch.linalg.svdvals(factor(c_a).T @ factor(c_b)).sum()
    means = (a.mean - b.mean.to(a.mean.device)).square().sum()
    return max((means + c_a.trace() + c_b.trace() - 2 * root).item(), 0.0)


def cholesky(c: Tensor) -> Tensor | None:
    """The factor L of C = L Lᵀ, or None where C is singular or nearly so."""
    lower, failed = torch.linalg.cholesky_ex(c)
    pivots = lower.diagonal().square()
    least = len(c) * torch.finfo(c.dtype).eps * c.diagonal().max()
    return None if failed or pivots.min() <= least else lower


def factor(c: Tensor) -> Tensor:
    """A, with shape (D, rank), such that C = A Aᵀ."""
    values, vectors = torch.linalg.eigh(c)
    kept = values > len(c) * torch.finfo(c.dtype).eps * values.max()
    return vectors[:, kept] * values[kept].sqrt()


def frechet_by_class(
    real: Mapping[Hashable, Statistics], generated: Mapping[Hashable, Statistics]
) -> dict[Hashable, float]:
    """The Fréchet distance within each class that was generated, of what `by_class` says.

    Raises:
        ValueError: A class was generated that the data do not have.
    """
    unknown = [label for label in generated if label not in real]
    if unknown:
        raise ValueError(
            f"Class {unknown[0]!r} was generated, and the data have {list(real)[:20]}."
        )
    return {label: frechet(real[label], of_class) for label, of_class in generated.items()}


class Interval(NamedTuple):
    """An estimate, which may be negative, and the ends of an interval around it."""

    value: float
    low: float
    high: float


def kernel_distance(
    real: Tensor, generated: Tensor, noise: Noise, resamples: int = 400, level: float = 0.95
) -> Interval:
    r"""The kernel distance (KID, with Inception features): an unbiased estimate of the squared
    maximum mean discrepancy of the cubic kernel.

    .. math:: k(x, y) = \left( \tfrac{1}{D} x^\top y + 1 \right)^3, \qquad
        \operatorname*{mean}_{i \ne j} k(x_i, x_j) + \operatorname*{mean}_{i \ne j} k(y_i, y_j)
        - 2 \operatorname*{mean}_{i, j} k(x_i, y_j)

    All pairs are used. The published value is the mean of this over random subsets of 1000: it
    estimates the same number, less well, and its spread is not that of the mean.

    The interval is that of the bootstrap. Each resample draws both sets with replacement, as a
    weight for every feature: how often it was drawn. A feature is never paired with itself, nor
    with its own copies, which would look like a distance. Where the laws are equal the estimate's
    first-order term vanishes and the interval is too wide: at a level of 0.95 it held 0 in all of
    200 trials (N = M = 100). An interval without 0 is then a difference more surely than it says.

    References:
        | Bińkowski et al., 2018, section 4; https://arxiv.org/abs/1801.01401
        | Gretton et al., 2012, equation (3); https://jmlr.org/papers/v13/gretton12a.html

    Arguments:
        real: Features of the data, with shape :math:`(N, D)`, N at least 2.
        generated: Generated features, with shape :math:`(M, D)`, M at least 2.
        noise: Decides the resamples.
        resamples: The number of resamples.
        level: The probability of the interval, in (0, 1).

    Raises:
        ValueError: A set has fewer than two features, or `level` or `resamples` is out of range.
    """
    if len(real) < 2 or len(generated) < 2:
        raise ValueError(
            f"The kernel distance needs at least 2 features of each set, not {len(real)} and "
            f"{len(generated)}."
        )
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(
            f"level is {level} and resamples {resamples}; expected a number in (0, 1) and at "
            "least 1."
        )
    x, y = real.double(), generated.to(real.device).double()
    # row 0 is the sample itself
    w = torch.cat([x.new_ones(1, len(x)), counts(noise, resamples, len(x)).to(x)])
    v = torch.cat([y.new_ones(1, len(y)), counts(noise, resamples, len(y)).to(y)])
    values = within(x, w) + within(y, v) - 2 * pairs(x, w, y, v) / (len(x) * len(y))
    ends = values.new_tensor([(1 - level) / 2, (1 + level) / 2])
    low, high = values[1:].quantile(ends).tolist()
    return Interval(values[0].item(), low, high)


def counts(noise: Noise, resamples: int, n: int) -> Tensor:
    """How often each of n is drawn in n draws with replacement, with shape (resamples, n)."""
    drawn = (noise.uniform(resamples * n).double() * n).long().view(resamples, n)
    weights = torch.zeros(resamples, n, dtype=torch.float64, device=drawn.device)
    return weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def within(x: Tensor, w: Tensor) -> Tensor:
    """The weighted mean of k(x_i, x_j) over i ≠ j, for each row of weights w (R, N)."""
    itself = (x.square().sum(1) / x.shape[1] + 1) ** 3
    weight = w.sum(1).square() - w.square().sum(1)
    return (pairs(x, w, x, w) - w.square() @ itself) / weight


def pairs(x: Tensor, w: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Σ_ij w_i v_j k(x_i, y_j) for each row of the weights w (R, N) and v (R, M)."""
    total = w.new_zeros(len(w))
    for start in range(0, len(x), CHUNK):
        some = slice(start, start + CHUNK)
        kernel = (x[some] @ y.T / x.shape[1]).add_(1).pow_(3)
        total += ((w[:, some] @ kernel) * v).sum(1)
    return total


class PrecisionRecall(NamedTuple):
    """The part of the generated set that lies where the data are, and the reverse."""

    precision: float
    recall: float


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> PrecisionRecall:
    r"""Improved precision and recall.

    A set covers the balls around its members that just reach their k-th nearest neighbour.
    Precision is the part of the generated set covered by the data, recall the part of the data
    covered by the generated set.

    .. math:: \text{precision} = \operatorname*{mean}_j \,
        1\left[ \exists i : \|y_j - x_i\| \le r_k(x_i) \right]

    References:
        | Kynkäänniemi et al., 2019, equations (1) and (2); https://arxiv.org/abs/1904.06991

    Arguments:
        real: Features of the data, with shape :math:`(N, D)`, N more than k.
        generated: Generated features, with shape :math:`(M, D)`, M more than k. Published values
            are of equally many.
        k: Which neighbour; the paper takes 3.

    Raises:
        ValueError: A set has no k-th neighbour.
    """
    x, y = centred(real, generated)
    precise, recalled = covered(y, x, radii(x, k)), covered(x, y, radii(y, k))
    return PrecisionRecall(precise.double().mean().item(), recalled.double().mean().item())


class DensityCoverage(NamedTuple):
    """How many neighbourhoods of the data a generated feature lies in, on average and in units of
    k; and the part of the data with a generated feature in its neighbourhood.
    """

    density: float
    coverage: float


def density_coverage(real: Tensor, generated: Tensor, k: int = 5) -> DensityCoverage:
    r"""Density and coverage.

    .. math:: \text{density} = \frac{1}{kM} \sum_{i, j} 1\left[ \|y_j - x_i\| < r_k(x_i) \right],
        \qquad \text{coverage} = \operatorname*{mean}_i \,
        1\left[ \exists j : \|y_j - x_i\| < r_k(x_i) \right]

    Only balls around data count, so a single outlier among the generated widens nothing. For two
    sets from one law the density is 1 on average, and the coverage
    :math:`1 - \frac{(N-1) \cdots (N-k)}{(M+N-1) \cdots (M+N-k)}`, whatever the law.

    References:
        | Naeem et al., 2020, equations (5), (6) and (9); https://arxiv.org/abs/2002.09797

    Arguments:
        real: Features of the data, with shape :math:`(N, D)`, N more than k.
        generated: Generated features, with shape :math:`(M, D)`.
        k: Which neighbour; the paper takes 5.

    Raises:
        ValueError: The data have no k-th neighbour.
    """
    x, y = centred(real, generated)
    radius, inside, hit = radii(x, k), 0, []
    for start in range(0, len(x), CHUNK):
        some = slice(start, start + CHUNK)
        ball = torch.cdist(x[some], y) < radius[some, None]
        inside += int(ball.sum())
        hit.append(ball.any(1))
    return DensityCoverage(inside / (k * len(y)), torch.cat(hit).double().mean().item())


def centred(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in float64 around the data's mean: a common offset would drown differences."""
    x, y = real.double(), generated.to(real.device).double()
    return x - x.mean(0), y - x.mean(0)


def radii(x: Tensor, k: int) -> Tensor:
    """The distance of each from its k-th nearest neighbour, with shape (N,)."""
    if not 1 <= k < len(x):
        raise ValueError(f"k is {k}; expected 1 to {len(x) - 1}, there being {len(x)} features.")
    found = []
    for start in range(0, len(x), CHUNK):
        apart = torch.cdist(x[start : start + CHUNK], x)
        rows = torch.arange(len(apart), device=x.device)
        apart[rows, start + rows] = torch.inf  # itself is no neighbour
        found.append(apart.kthvalue(k, dim=1).values)
    return torch.cat(found)


def covered(y: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    """Whether each y lies in a ball around an x, with shape (M,)."""
    chunks = y.split(CHUNK)
    return torch.cat([(torch.cdist(some, x) <= radius).any(1) for some in chunks])


def inception_score(logits: Tensor, noise: Noise, splits: int = 10) -> tuple[float, float]:
    r"""The Inception score of class logits: its mean and standard deviation over the splits.

    .. math:: \exp \operatorname*{mean}_i \, \mathrm{KL}\left( p(c \mid x_i) \,\|\, p(c) \right),
        \qquad p(c) = \operatorname*{mean}_i p(c \mid x_i)

    from 1 (no class is ever clear, or all pictures show the same) to the number of classes. It
    grows with the number of pictures, and says nothing of the data.

    References:
        | Salimans et al., 2016, section 4; https://arxiv.org/abs/1606.03498

    Arguments:
        logits: Class logits of generated pictures, with shape :math:`(M, K)`.
        noise: Decides who is in which split.
        splits: In how many equal parts the set is cut; published scores are of 10 with 5,000 each.

    Raises:
        ValueError: There are fewer logits than splits.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits is {splits}; expected 1 to {len(logits)}, one logit each.")
    order = noise.uniform(len(logits)).argsort().to(logits.device)
    scores = []
    for some in logits[order].double().log_softmax(1).tensor_split(splits):
        marginal = some.logsumexp(0) - math.log(len(some))
        scores.append((some.exp() * (some - marginal)).sum(1).mean().exp())
    found = torch.stack(scores)
    return found.mean().item(), found.std(correction=0).item()
