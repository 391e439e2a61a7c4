"""A convolutional network for pictures and signals."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.condition import U
from pipeline.networks.base import Network
from pipeline.networks.layers import (
    CONV,
    CrossAttention,
    LevelEmbedding,
    SelfAttention,
    check_condition,
    check_sides,
    fold,
    pool,
    unfold,
    width_groups,
    with_planes,
    zero,
)

__all__ = ["UNet"]


class Block(nn.Module):
    """Two convolutions, the second modulated by the level and the condition, beside a skip."""

    def __init__(
        self, width_in: int, width: int, dim: int, dropout: float = 0.0, dims: int = 2
    ) -> None:
        super().__init__()
        conv = CONV[dims]
        self.norm_1 = nn.GroupNorm(width_groups(width_in), width_in)
        self.conv_1 = conv(width_in, width, 3, padding=1)
        self.norm_2 = nn.GroupNorm(width_groups(width), width, affine=False)
        self.modulation = nn.Linear(dim, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = conv(width, width, 3, padding=1)
        self.skip = nn.Identity() if width_in == width else conv(width_in, width, 1)
        zero(self.conv_2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(c)[..., *[None] * (x.ndim - 2)].chunk(2, dim=1)
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = torch.addcmul(shift, self.norm_2(h), 1 + scale)
        return self.skip(x) + self.conv_2(self.dropout(F.silu(h)))


class Stage(nn.Module):
    """A block, then self-attention and cross-attention where the stage has them."""

    def __init__(self, block: Block, width: int, attention: bool, u_dim: int) -> None:
        super().__init__()
        self.block = block
        self.attention = SelfAttention(width) if attention else nn.Identity()
        self.cross = CrossAttention(width, u_dim) if u_dim else None

    def forward(self, x: Tensor, c: Tensor, tokens: Tensor | None) -> Tensor:
        x = self.attention(self.block(x, c))
        return x if self.cross is None or tokens is None else self.cross(x, tokens)


class UNet(Network):
    r"""A convolutional network with skips between equal resolutions, conditioned on u in one way
    or several.

    The picture is folded first (pixel-unshuffle), since most of the cost of a convolutional
    network lies in its finest maps. Stage k then works at 1 / (patch · 2ᵏ) of its resolution.

    References:
        | Ronneberger et al., 2015; https://arxiv.org/abs/1505.04597
        | Dhariwal & Nichol, 2021: the modulation; https://arxiv.org/abs/2105.05233
        | Liu et al., 2018: the coordinates; https://arxiv.org/abs/1807.03247

    Arguments:
        channels: The number C of channels of the picture, 3 for RGB, 1 for grey, or the signal.
        u_dim, planes: See :class:`pipeline.networks.Network`.
        widths: The number of channels of each stage, the finest first.
        blocks: The number of blocks of each stage, on the way down and again on the way up.
        patch: The side of the squares of pixels, or the length of the pieces of a signal, that
            are folded into channels; 1 folds nothing.
        attention: The stages with self-attention.
        concat: The lecture's (x, u): the number of channels the averaged tokens are projected to
            and joined to the picture as; 0 for none.
        modulate: Whether the averaged tokens join the level embedding.
        attend: The stages with cross-attention to the tokens.
        coordinates: Whether each place is told where it is, as `dims` more channels in [-1, 1]. A
            convolution knows a place only by its distance from the border; captions that name
            places are learned sooner with it.
        dropout: The share of a block's numbers that are left out in training, for data that a
            network could learn by heart.
        dims: 2 for pictures (C, H, W), 1 for signals (C, L).
    """

    def __init__(
        self,
        channels: int = 3,
        u_dim: int = 0,
        widths: Sequence[int] = (48, 96),
        blocks: int = 2,
        patch: int = 2,
        attention: Sequence[int] = (),
        concat: int = 0,
        modulate: bool = True,
        attend: Sequence[int] = (),
        coordinates: bool = False,
        planes: int = 0,
        dropout: float = 0.0,
        dims: Literal[1, 2] = 2,
    ) -> None:
        super().__init__()
        for name, stages in (("attention", attention), ("attend", attend)):
            if any(k not in range(len(widths)) for k in stages):
                raise ValueError(
                    f"{name} = {list(stages)} names a stage outside 0 … {len(widths) - 1}."
                )
        if not u_dim and (concat or attend):
            raise ValueError(
                f"concat = {concat} and attend = {list(attend)} need a condition, and u_dim is 0: "
                'without one, concat is 0 and attend is "[]".'
            )
        if u_dim and not (concat or modulate or attend):
            raise ValueError(f"u_dim = {u_dim} but u is not used: set concat, modulate or attend.")
        self.patch, self.widths = patch, tuple(widths)
        self.channels, self.u_dim, self.planes = channels, u_dim, planes
        self.dims, conv, dim = dims, CONV[dims], 4 * widths[0]

        def stage(k: int, width_in: int) -> Stage:
            of_u = u_dim if k in attend else 0
            block = Block(width_in, widths[k], dim, dropout, dims)
            return Stage(block, widths[k], k in attention, of_u)

        self.level = LevelEmbedding(dim)
        self.modulate = None
        if u_dim and modulate:
            self.modulate = nn.Sequential(nn.RMSNorm(u_dim, eps=1e-6), nn.Linear(u_dim, dim))
        self.concat = nn.Linear(u_dim, concat) if concat else None
        self.coordinates = coordinates
        width_in = (channels + planes) * patch**dims + concat + dims * coordinates
        self.input = conv(width_in, widths[0], 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        width = widths[0]
        for k in range(len(widths)):
            stages = (stage(k, width if i == 0 else widths[k]) for i in range(blocks))
            self.down.append(nn.ModuleList(stages))
            width = widths[k]
            if k + 1 < len(widths):
                self.downsample.append(conv(width, width, 3, stride=2, padding=1))
        self.middle = stage(len(widths) - 1, width)
        for k in reversed(range(len(widths))):
            sums = ((width if i == 0 else widths[k]) + widths[k] for i in range(blocks))
            self.up.append(nn.ModuleList(stage(k, n) for n in sums))
            width = widths[k]
            if k:
                self.upsample.append(conv(width, width, 3, padding=1))
        self.norm = nn.GroupNorm(width_groups(width), width)
        self.output = conv(width, channels * patch**dims, 3, padding=1)
        zero(self.output)

    def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
        stages = len(self.widths)
        multiple = self.patch * 2 ** (stages - 1)
        advice = f"fold {stages} stages deep: its sides must be multiples of {multiple}; "
        advice += "change the size, patch or the number of widths."
        check_sides(x, self.dims, multiple, advice)
        check_condition(u, self.u_dim, self.planes)
        tokens = None if u is None else u.tokens
        h = fold(with_planes(x, u), self.patch)  # (B, C·p², H/p, W/p)
        c = self.level(level)
        if self.modulate is not None and tokens is not None:
            c = c + self.modulate(pool(tokens))
        if self.concat is not None and tokens is not None:
            same = self.concat(pool(tokens))[..., *[None] * (h.ndim - 2)]
            same = same.expand(-1, -1, *h.shape[2:])
            h = torch.cat((h, same), dim=1)
        if self.coordinates:
            h = torch.cat((h, _places(h)), dim=1)
        if self.dims == 2:  # the layout of oneDNN's and cuDNN's fast convolutions
            h = h.contiguous(memory_format=torch.channels_last)
        c = F.silu(c)
        h, skips = self.input(h), []
        for k, stages in enumerate(self.down):
            for stage in stages:  # type: ignore[union-attr]
                h = stage(h, c, tokens)
                skips.append(h)
            if k < len(self.downsample):
                h = self.downsample[k](h)
        h = self.middle(h, c, tokens)
        for k, stages in enumerate(self.up):
            for stage in stages:  # type: ignore[union-attr]
                h = stage(torch.cat((h, skips.pop()), dim=1), c, tokens)
            if k < len(self.upsample):
                h = self.upsample[k](F.interpolate(h, scale_factor=2.0))
        return unfold(self.output(F.silu(self.norm(h))), self.patch)


def _places(h: Tensor) -> Tensor:
    """The coordinates of each place of a map, from -1 to 1, with shape (B, dims, H, W)."""
    sides = (torch.linspace(-1, 1, n, dtype=h.dtype, device=h.device) for n in h.shape[2:])
    return torch.stack(torch.meshgrid(*sides, indexing="ij")).expand(len(h), *[-1] * (h.ndim - 1))
