"""Layers that several networks share."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.condition import U
from pipeline.errors import UserError

__all__ = ["CONV", "CrossAttention", "LevelEmbedding", "SelfAttention", "attend"]
__all__ += ["check_condition", "check_sides", "fold", "pool", "unfold", "width_groups"]
__all__ += ["with_planes", "zero"]

CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}


def pool(tokens: Tensor) -> Tensor:
    """Mean over tokens (B, L, E) that are not padding, with shape (B, E); 0 where all are."""
    count = (tokens != 0).any(dim=-1).sum(dim=-1, keepdim=True)  # (B, 1)
    return tokens.sum(dim=1) / count.clamp(min=1)


class LevelEmbedding(nn.Module):
    r"""Features of a noise level :math:`\log \sigma / \alpha`, then two linear layers.

    .. math:: \big( \cos \omega_k \ell, \, \sin \omega_k \ell \big)_k, \quad
        \omega_k \text{ geometric from } 1/16 \text{ to } 8

    The slowest wave is nearly linear over the levels in use (about −7 to 7), the fastest separates
    levels 0.1 apart.

    Arguments:
        dim: The width of the embedding, even.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.omega: Tensor
        self.register_buffer("omega", torch.logspace(-4, 3, dim // 2, base=2.0), persistent=False)
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, level: Tensor) -> Tensor:
        angle = level[:, None] * self.omega.to(level.dtype)  # (B, dim / 2)
        return self.layers(torch.cat((angle.cos(), angle.sin()), dim=-1))


def check_condition(u: U, u_dim: int, planes: int = 0) -> None:
    """Raise `ValueError` unless u has the width and the number of planes that are taken."""
    have = 0 if u is None or u.tokens is None else u.tokens.shape[-1]
    if have != u_dim:
        raise ValueError(f"The network takes a condition of width {u_dim} and was given {have}.")
    have = 0 if u is None or u.planes is None else u.planes.shape[1]
    if have != planes:
        raise ValueError(f"The network takes {planes} planes of u and was given {have}.")


def with_planes(x: Tensor, u: U) -> Tensor:
    """x with the planes of u as further channels; `ValueError` where their sides are others."""
    if u is None or u.planes is None:
        return x
    if u.planes.shape[2:] != x.shape[2:]:
        sides, of_x = _sides(u.planes), _sides(x)
        raise ValueError(f"The planes of u are of {sides} and x is of {of_x}; they must be equal.")
    return torch.cat((x, u.planes), dim=1)


def check_sides(x: Tensor, dims: int, multiple: int, advice: str) -> None:
    """Raise `UserError` unless x has so many sides, all of them such multiples."""
    if x.ndim != dims + 2 or any(side % multiple for side in x.shape[2:]):
        raise UserError(f"A {('signal', 'picture')[dims - 1]} of {_sides(x)} does not {advice}")


def _sides(x: Tensor) -> str:
    return "×".join(map(str, x.shape[2:]))


def fold(x: Tensor, patch: int) -> Tensor:
    """Patches as channels, (B, C·p², H/p, W/p) or (B, C·p, L/p)."""
    if x.ndim == 4:
        return F.pixel_unshuffle(x, patch)
    return x.unflatten(2, (-1, patch)).transpose(2, 3).flatten(1, 2)


def unfold(x: Tensor, patch: int) -> Tensor:
    """The inverse of `fold`."""
    if x.ndim == 4:
        return F.pixel_shuffle(x, patch)
    return x.unflatten(1, (-1, patch)).transpose(2, 3).flatten(2)


def zero(layer: nn.Module) -> None:
    """Make a layer give 0, so that the branch it ends adds nothing when training begins."""
    for p in layer.parameters():
        nn.init.zeros_(p)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Attention, :math:`\operatorname{softmax}(q k^T / \sqrt{C}) \, v`; 0 where all is masked.

    The fused kernel of a processor takes, in bfloat16, two to ten times as long on its way back as
    plain products do, which this has there instead.

    Arguments:
        q: Queries, with shape (B, heads, N, C).
        k: Keys, with shape (B, heads, L, C).
        v: Values, with the shape of k.
        mask: Which keys may be seen, with shape (B, 1, 1, L), or None for all.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, L)
    if mask is None:
        return weights.softmax(dim=-1) @ v
    lowest = torch.finfo(weights.dtype).min
    return weights.masked_fill(~mask, lowest).softmax(dim=-1).mul(mask) @ v


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, L, C / heads)


class SelfAttention(nn.Module):
    """Self-attention among the places of a map, added to it.

    Arguments:
        width: The number of channels C.
        head_width: The number of channels of a head; C must be a multiple of it.
    """

    def __init__(self, width: int, head_width: int = 32) -> None:
        super().__init__()
        self.heads = max(width // head_width, 1)
        self.norm = nn.GroupNorm(1, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, H·W, C)
        q, k, v = (_heads(z, self.heads) for z in self.qkv(tokens).chunk(3, dim=-1))
        mixed = attend(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(mixed).transpose(1, 2).reshape(x.shape)


class CrossAttention(nn.Module):
    """Attention of the places of a map to the tokens of a condition, added to it.

    Tokens that are exactly zero are padding and are masked; a row with no other gets nothing.

    Arguments:
        width: The number of channels C of the map.
        u_dim: The width E of a token.
        head_width: The number of channels of a head; C must be a multiple of it.
    """

    def __init__(self, width: int, u_dim: int, head_width: int = 32) -> None:
        super().__init__()
        self.heads = max(width // head_width, 1)
        self.norm = nn.GroupNorm(1, width)
        # not LayerNorm, which would leave of a token (1, v) the sign of v - 1 alone
        self.norm_u = nn.RMSNorm(u_dim, eps=1e-6)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(u_dim, 2 * width)
        # without a bias a row with nothing to attend to gets exactly 0
        self.out = nn.Linear(width, width, bias=False)
        zero(self.out)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        mask = (tokens != 0).any(dim=-1)[:, None, None, :]  # (B, 1, 1, L)
        q = _heads(self.q(self.norm(x).flatten(2).transpose(1, 2)), self.heads)
        k, v = (_heads(z, self.heads) for z in self.kv(self.norm_u(tokens)).chunk(2, dim=-1))
        mixed = attend(q, k, v, mask).transpose(1, 2).flatten(2)
        return x + self.out(mixed).transpose(1, 2).reshape(x.shape)


def width_groups(width: int) -> int:
    """The number of groups of a group norm: of 16 channels, or of the next divisor below."""
    return width // math.gcd(width, 16)
