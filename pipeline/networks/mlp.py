"""A network for plain vectors."""

import torch
from torch import Tensor, nn

from pipeline.condition import U
from pipeline.networks.base import Network
from pipeline.networks.layers import LevelEmbedding, check_condition, pool, zero

__all__ = ["MLP"]


class MLP(Network):
    r"""A residual multilayer perceptron on the concatenation :math:`(x, u, \text{level})`.

    The network of the lecture's equation (6): u, its tokens averaged, is one more part of x.

    Arguments:
        x_dim: The width D of a data vector.
        u_dim: The width E of the condition; 0 for an unconditional network.
        width: The width of the hidden layers.
        depth: The number of residual blocks.
    """

    def __init__(self, x_dim: int, u_dim: int = 0, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.x_dim, self.u_dim = x_dim, u_dim
        self.level = LevelEmbedding(32)
        self.input = nn.Linear(x_dim + u_dim + 32, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
            )
            for _ in range(depth)
        )
        self.output = nn.Linear(width, x_dim)
        zero(self.output)

    def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
        check_condition(u, self.u_dim)
        given = [] if u is None or u.tokens is None else [pool(u.tokens)]
        h = self.input(torch.cat([x, *given, self.level(level)], dim=-1))  # (B, width)
        for block in self.blocks:
            h = h + block(h)
        return self.output(nn.functional.silu(h))
