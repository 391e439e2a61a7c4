"""A transformer for pictures and signals."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.condition import U
from pipeline.networks.base import Network
from pipeline.networks.layers import (
    LevelEmbedding,
    attend,
    check_condition,
    check_sides,
    fold,
    pool,
    unfold,
    with_planes,
    zero,
)

__all__ = ["DiT"]

BASE = 100.0  # of the rotary frequencies: the slowest turns once in some 500 patches

Turn = tuple[Tensor, Tensor]  # cosine and sine of each angle of each token, (N, head_width / 2)


def turned(x: Tensor, turn: Turn) -> Tensor:
    """Each pair of channels (k, k + half) of x (…, N, C) turned by its angle."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = (part.to(x.dtype) for part in turn)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Self-attention among tokens, queries and keys normalised and then turned by their place."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads = width // head_width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.scale_q = nn.Parameter(torch.ones(head_width))
        self.scale_k = nn.Parameter(torch.ones(head_width))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, turn: Turn, mask: Tensor | None) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts  # each (B, heads, N, head_width)
        q, k = (
            turned(F.rms_norm(z, z.shape[-1:], scale.to(z.dtype), 1e-6), turn)
            for z, scale in ((q, self.scale_q), (k, self.scale_k))
        )
        return self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """A gated feed-forward layer, with as many weights as one four times as wide as its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 16 * math.ceil(8 * width / 48)
        self.both, self.out = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and a feed-forward layer, each normalised, modulated, gated and added."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, head_width)
        self.norm_2 = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.feed = SwiGLU(width)
        self.modulation = nn.Linear(width, 6 * width)
        zero(self.modulation)

    def forward(self, x: Tensor, c: Tensor, turn: Turn, mask: Tensor | None) -> Tensor:
        a, shift_a, gate_a, f, shift_f, gate_f = self.modulation(c)[:, None].chunk(6, dim=-1)
        h = torch.addcmul(shift_a, self.norm_1(x), 1 + a)
        x = torch.addcmul(x, gate_a, self.attention(h, turn, mask))
        h = torch.addcmul(shift_f, self.norm_2(x), 1 + f)
        return torch.addcmul(x, gate_f, self.feed(h))


class DiT(Network):
    r"""A transformer over the patches of a picture or a signal and the tokens of u, all in one
    sequence.

    A patch of p × p pixels, or p samples, is a token; its place is added to it and turns its
    queries and keys (rotary, in a picture half of a head's channels by y and half by x), so that
    attention sees both where a patch is and how far others are. The tokens of u stand before the
    patches and are turned by nothing: every block attends to every word. Tokens that are exactly
    zero are padding and are masked. Level and averaged tokens modulate each block, which adds
    nothing at first.

    References:
        | Peebles & Xie, 2023: adaLN-zero; https://arxiv.org/abs/2212.09748
        | Shazeer, 2020: SwiGLU; https://arxiv.org/abs/2002.05202
        | Heo et al., 2024: the axial form; https://arxiv.org/abs/2403.13298
        | Dehghani et al., 2023: queries and keys normalised; https://arxiv.org/abs/2302.05442

    Arguments:
        channels: The number C of channels of the picture, 3 for RGB, 1 for grey, or the signal.
        u_dim, planes: See :class:`pipeline.networks.Network`.
        width: The width of a token in the network.
        depth: The number of blocks.
        patch: The side p of a patch: 2 for pictures of 32, 4 for 64, 8 for signals of 1,024.
        head_width: The number of channels of a head, a multiple of 4 that divides the width.
        dims: 2 for pictures (C, H, W), 1 for signals (C, L).

    Raises:
        ValueError: head_width is no multiple of 4 or does not divide the width.
    """

    def __init__(
        self,
        channels: int = 3,
        u_dim: int = 0,
        width: int = 384,
        depth: int = 12,
        patch: int = 2,
        head_width: int = 64,
        planes: int = 0,
        dims: Literal[1, 2] = 2,
    ) -> None:
        super().__init__()
        if head_width % 4 or width % head_width:
            raise ValueError(
                f"head_width = {head_width} must be a multiple of 4 that divides the width "
                f"{width}."
            )
        self.channels, self.u_dim, self.planes = channels, u_dim, planes
        self.patch, self.head_width, self.dims = patch, head_width, dims
        self.level = LevelEmbedding(width)
        self.norm_u = nn.RMSNorm(u_dim, eps=1e-6) if u_dim else None
        self.tokens = nn.Linear(u_dim, width) if u_dim else None
        self.modulate = nn.Linear(u_dim, width) if u_dim else None
        self.input = nn.Linear((channels + planes) * patch**dims, width)
        self.blocks = nn.ModuleList(Block(width, head_width) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, channels * patch**dims)
        zero(self.modulation)
        zero(self.output)

    def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
        advice = f"divide into patches of {self.patch}; change the size or the patch."
        check_sides(x, self.dims, self.patch, advice)
        check_condition(u, self.u_dim, self.planes)
        h = fold(with_planes(x, u), self.patch)  # (B, C·p², H/p, W/p)
        places, sides = _places(h), h.shape[2:]  # (N, dims)
        h = self.input(h.flatten(2).transpose(1, 2))  # (B, N, width)
        waves = _angles(places, h.shape[-1])  # (N, width / 2)
        h = h + torch.cat((waves.cos(), waves.sin()), dim=-1)
        c, mask = self.level(level), None
        if self.norm_u is not None and u is not None and u.tokens is not None:
            assert self.tokens is not None and self.modulate is not None
            tokens = self.norm_u(u.tokens)  # (B, L, E); padding stays zero
            c = c + self.modulate(pool(tokens))
            h = torch.cat((self.tokens(tokens), h), dim=1)
            words = (u.tokens != 0).any(dim=-1)
            mask = F.pad(words, (0, len(places)), value=True)[:, None, None]  # (B, 1, 1, L + N)
            places = F.pad(places, (0, 0, tokens.shape[1], 0))
        c, angles = F.silu(c), _angles(places, self.head_width)
        turn = angles.cos(), angles.sin()
        for block in self.blocks:
            h = block(h, c, turn, mask)
        scale, shift = self.modulation(c)[:, None].chunk(2, dim=-1)
        h = h[:, -math.prod(sides) :]
        h = self.output(torch.addcmul(shift, self.norm(h), 1 + scale)).transpose(1, 2)
        return unfold(h.unflatten(2, sides), self.patch)


def _places(h: Tensor) -> Tensor:
    """The row and column of each place of a map, or its sample, from the middle, (N, dims)."""
    sides = (torch.arange(n, dtype=h.dtype, device=h.device) - (n - 1) / 2 for n in h.shape[2:])
    return torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, -2)


def _angles(places: Tensor, width: int) -> Tensor:
    """The angles of each place, half by row and half by column, with shape (N, width / 2)."""
    count = width // (2 * places.shape[1])
    steps = torch.arange(count, dtype=places.dtype, device=places.device) / count
    return (places[:, :, None] * BASE**-steps).flatten(1)
