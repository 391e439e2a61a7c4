r"""Mean and covariance of features, gathered batch by batch in float64.

What is kept is n, the mean m and the scatter :math:`M = \sum_i (f_i - m)(f_i - m)^\top`. Two sets
a and b make one by

.. math:: \delta = m_b - m_a, \qquad n = n_a + n_b, \qquad m = m_a + \frac{n_b}{n} \delta,
    \qquad M = M_a + M_b + \frac{n_a n_b}{n} \delta \delta^\top

which, unlike :math:`\sum f f^\top - n m m^\top`, subtracts no large numbers from each other: a
mean far from zero costs no digits. The rule is exact, so it does not matter in which order, in
what batches or on how many devices the features came.

References:
    | Chan, Golub and LeVeque, 1979, equations (1.5)
    | http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from pipeline.distributed import place, total

__all__ = ["Statistics", "by_class"]


class Statistics:
    """n, mean and scatter of features, float64.

    Arguments:
        dim: The length D of a feature.
        device: Where they are gathered. Among processes that talk through NCCL, a GPU.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, features: Tensor) -> "Statistics":
        """Adds features, of any precision, with shape :math:`(B, D)`; B may be 0.

        A batch costs one matrix product: :math:`\\delta`, scaled, is one more row of it, centred.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(
                f"Features have shape {tuple(features.shape)}; expected (B, {len(self.mean)})."
            )
        b = len(features)
        if b == 0:
            return self
        rows = features.new_empty(b + 1, features.shape[1], dtype=torch.float64)
        rows = rows.to(self.mean.device)
        rows[:b] = features
        mean = rows[:b].mean(0)
        delta = mean - self.mean
        rows[:b] -= mean
        rows[b] = (self.n * b / (self.n + b)) ** 0.5 * delta
        self.scatter.addmm_(rows.T, rows)
        self.n += b
        self.mean += b / self.n * delta
        return self

    @property
    def covariance(self) -> Tensor:
        r"""The unbiased covariance :math:`M / (n - 1)`, with shape :math:`(D, D)`.

        Raises:
            ValueError: There are fewer than two features.
        """
        if self.n < 2:
            raise ValueError(f"A covariance needs at least 2 features, and there are {self.n}.")
        return self.scatter / (self.n - 1)

    def reduce(self) -> "Statistics":
        """The statistics of all processes together, the same in each; a process may have none.

        Every process has to call it. Without `torch.distributed`, a copy.
        """
        whole = Statistics(len(self.mean), self.mean.device)
        whole.n, whole.mean, whole.scatter = self.n, self.mean.clone(), self.scatter.clone()
        if place()[1] == 1:
            return whole
        sums = total(torch.cat([self.mean.new_tensor([self.n]), self.n * self.mean]))
        whole.n = int(sums[0])
        whole.mean = sums[1:] / max(whole.n, 1)
        delta = self.mean - whole.mean
        whole.scatter.addr_(delta, delta, alpha=self.n)
        total(whole.scatter)
        return whole


def by_class(features: Tensor, labels: Sequence[Hashable]) -> dict[Hashable, Statistics]:
    """The statistics of each class, of features (N, D) and the class of each."""
    if len(features) != len(labels):
        raise ValueError(
            f"There are {len(features)} features and {len(labels)} labels; expected as many."
        )
    rows: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    how = features.shape[1], features.device
    return {label: Statistics(*how).update(features[some]) for label, some in rows.items()}
