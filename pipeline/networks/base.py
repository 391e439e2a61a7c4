"""What every network is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor, nn

from pipeline.building import Part
from pipeline.condition import U

__all__ = ["Network", "blocks"]


class Network(Part, nn.Module, ABC):
    r"""A network F(x, level, u), whose output has the shape of x.

    Attributes:
        u_dim: The width E of a token of u; 0 where it takes none.
        planes: The number C of planes of u, which are joined to x: the lecture's (x, u) where u
            is a picture; 0 where it takes none.
    """

    u_dim: int = 0
    planes: int = 0

    @abstractmethod
    def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
        r"""The network's output.

        Arguments:
            x: A scaled noisy example, with shape :math:`(B, *)`.
            level: The noise level :math:`\log \sigma / \alpha`, with shape (B,).
            u: The condition of each, its planes with the sides of x; `None` where it takes none.
        """


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """What a network computes one after the other: the members of its lists of modules."""
    for child in network.children():
        if isinstance(network, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from blocks(child)
