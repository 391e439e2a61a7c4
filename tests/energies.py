"""Energies whose law is known."""

import math

import torch
from torch import Tensor, nn

from pipeline.condition import Condition, U
from pipeline.denoisers import Energy
from pipeline.networks import Network
from pipeline.schedules import Schedule


class Affine(Network):
    """f = A_k z + b_k for class k, so that an energy is quadratic: every normal law has one."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.u_dim = classes
        self.a = nn.Parameter(torch.zeros(classes, dim, dim, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(classes, dim, dtype=torch.float64))

    def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
        assert u is not None and u.tokens is not None
        a, b = (torch.einsum("bk,k...->b...", u.tokens[:, 0], p) for p in (self.a, self.b))
        return torch.einsum("bij,bj->bi", a, x) + b


def normal_energy(
    schedule: Schedule, t: Tensor, means: Tensor, covariances: Tensor, sigma_d: float = 0.5
) -> Energy:
    """The energy that is at time t the normal law of each class, with the means (K, D) and the
    covariances (K, D, D) of x_t, its constant included.

    −‖z‖²/2 + k zᵀ (A z + b) with z = c x_t is −(x_t − m)ᵀ Λ (x_t − m) / 2 + mᵀ Λ m / 2 where
    A = (I − Λ / c²) / 2 k and b = Λ m / c k.
    """
    energy = Energy(Affine(*means.shape), schedule, sigma_d, normalised=True).double()
    s = schedule.ratio(t)
    c, k = energy.scales(s)[0] / schedule(t)[0], sigma_d / s
    precision, eye = covariances.inverse(), torch.eye(means.shape[1]).double()
    peak = torch.einsum("kij,ki,kj->k", precision, means, means) / 2
    energy.network.a.data = (eye - precision / c**2) / (2 * k)
    energy.network.b.data = torch.einsum("kij,kj->ki", precision, means) / (c * k)
    log_z = peak + torch.logdet(2 * math.pi * covariances) / 2
    last = nn.Linear(1 + len(means), 1, bias=False).double()
    last.weight.data = torch.cat(
        (torch.zeros(1).double(), log_z + means.shape[1] * torch.log(c / math.sqrt(2 * math.pi)))
    )[None]
    energy.normaliser = nn.Sequential(last)
    return energy


def one_hot(k: Tensor, classes: int) -> Condition:
    return Condition(torch.eye(classes, dtype=torch.float64)[k][:, None])
