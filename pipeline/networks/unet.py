"""A convolutional network for pictures."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.condition import U
from pipeline.networks.base import Network
from pipeline.networks.layers import (
    CrossAttention,
    LevelEmbedding,
    SelfAttention,
    check_condition,
    check_planes,
    pool,
    width_groups,
    zero,
)

__all__ = ["UNet"]


class Block(nn.Module):
    """Two convolutions, the second modulated by the level and the condition, beside a skip."""

    def __init__(self, width_in: int, width: int, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(width_groups(width_in), width_in)
        self.conv_1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm_2 = nn.GroupNorm(width_groups(width), width, affine=False)
        self.modulation = nn.Linear(dim, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)
        zero(self.conv_2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = torch.addcmul(shift, self.norm_2(h), 1 + scale)
        return self.skip(x) + self.conv_2(self.dropout(F.silu(h)))


class Stage(nn.Module):
    """A block, then self-attention and cross-attention where the stage has them."""

    def __init__(
        self, width_in: int, width: int, dim: int, attention: bool, u_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.block = Block(width_in, width, dim, dropout)
        self.attention = SelfAttention(width) if attention else nn.Identity()
        self.cross = CrossAttention(width, u_dim) if u_dim else None

    def forward(self, x: Tensor, c: Tensor, tokens: Tensor | None) -> Tensor:
        x = self.attention(self.block(x, c))
        return x if self.cross is None or tokens is None else self.cross(x, tokens)


class UNet(Network):
    r"""A convolutional network with skips between equal resolutions, conditioned on u in one way
    or several.

    The picture is folded first (pixel-unshuffle), since most of the cost of a convolutional
    network lies in its finest maps. Stage k then works at 1 / (patch · 2ᵏ) of the picture's
    resolution.

    References:
        | U-Net: Convolutional Networks for Biomedical Image Segmentation (Ronneberger et al.,
        |   2015)
        | https://arxiv.org/abs/1505.04597
        | Diffusion Models Beat GANs on Image Synthesis (Dhariwal & Nichol, 2021): the modulation
        |   by scale and shift
        | https://arxiv.org/abs/2105.05233
        | An Intriguing Failing of Convolutional Neural Networks and the CoordConv Solution (Liu et
        |   al., 2018): the coordinates
        | https://arxiv.org/abs/1807.03247

    Arguments:
        channels: The number C of channels of the picture; 3 for RGB, 1 for grey.
        u_dim: The width E of a token of u; 0 for an unconditional network.
        widths: The number of channels of each stage, the finest first.
        blocks: The number of blocks of each stage, on the way down and again on the way up.
        patch: The side of the squares of pixels folded into channels; 1 folds nothing.
        attention: The stages with self-attention.
        concat: The lecture's (x, u): the number of channels the averaged tokens are projected to
            and joined to the picture as; 0 for none.
        modulate: Whether the averaged tokens join the level embedding.
        attend: The stages with cross-attention to the tokens.
        coordinates: Whether each place is told where it is, as two more channels in [-1, 1]. A
            convolution knows a place only by its distance from the border; captions that name
            places are learned sooner with it.
        planes: The number of planes of u, which are joined to the picture: the lecture's (x, u)
            where u is a picture.
        dropout: The share of a block's numbers that are left out in training, for data that a
            network could learn by heart.
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
    ) -> None:
        super().__init__()
        for name, stages in (("attention", attention), ("attend", attend)):
            if any(k not in range(len(widths)) for k in stages):
                raise ValueError(
                    f"{name} = {list(stages)} names a stage outside 0 … {len(widths) - 1}."
                )
        if not u_dim and (concat or attend):
            raise ValueError(
                "concat and attend need a condition: set u_dim to the width of its tokens."
            )
        if u_dim and not (concat or modulate or attend):
            raise ValueError(f"u_dim = {u_dim} but u is not used: set concat, modulate or attend.")
        self.patch, self.widths = patch, tuple(widths)
        self.channels, self.u_dim, self.planes = channels, u_dim, planes
        dim = 4 * widths[0]

        def stage(k: int, width_in: int) -> Stage:
            of_u = u_dim if k in attend else 0
            return Stage(width_in, widths[k], dim, k in attention, of_u, dropout)

        self.level = LevelEmbedding(dim)
        self.modulate = (
            nn.Sequential(nn.RMSNorm(u_dim, eps=1e-6), nn.Linear(u_dim, dim))
            if u_dim and modulate
            else None
        )
        self.concat = nn.Linear(u_dim, concat) if concat else None
        self.coordinates = coordinates
        width_in = (channels + planes) * patch**2 + concat + 2 * coordinates
        self.input = nn.Conv2d(width_in, widths[0], 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        width = widths[0]
        for k in range(len(widths)):
            self.down.append(
                nn.ModuleList(stage(k, width if i == 0 else widths[k]) for i in range(blocks))
            )
            width = widths[k]
            if k + 1 < len(widths):
                self.downsample.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        self.middle = stage(len(widths) - 1, width)
        for k in reversed(range(len(widths))):
            self.up.append(
                nn.ModuleList(
                    stage(k, (width if i == 0 else widths[k]) + widths[k]) for i in range(blocks)
                )
            )
            width = widths[k]
            if k:
                self.upsample.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm = nn.GroupNorm(width_groups(width), width)
        self.output = nn.Conv2d(width, channels * patch**2, 3, padding=1)
        zero(self.output)

    def forward(self, x: Tensor, level: Tensor, u: U = None) -> Tensor:
        r"""The network's output, with the shape of x.

        Arguments:
            x: A scaled noisy picture, with shape (B, C, H, W).
            level: The noise level :math:`\log \sigma / \alpha`, with shape (B,).
            u: The condition, its planes of the picture's height and width; `None` where u_dim and
                planes are 0.
        """
        self._check(x)
        check_condition(u, self.u_dim, self.planes)
        tokens, planes = (None, None) if u is None else (u.tokens, u.planes)
        if planes is not None:
            check_planes(planes, x)
            x = torch.cat((x, planes), dim=1)
        h = F.pixel_unshuffle(x, self.patch)  # (B, C·p², H/p, W/p)
        c = self.level(level)
        if self.modulate is not None and tokens is not None:
            c = c + self.modulate(pool(tokens))
        if self.concat is not None and tokens is not None:
            same = self.concat(pool(tokens))[:, :, None, None].expand(-1, -1, *h.shape[2:])
            h = torch.cat((h, same), dim=1)
        if self.coordinates:
            h = torch.cat((h, _places(h)), dim=1)
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
        return F.pixel_shuffle(self.output(F.silu(self.norm(h))), self.patch)

    def _check(self, x: Tensor) -> None:
        fold = self.patch * 2 ** (len(self.widths) - 1)
        if x.shape[-1] % fold or x.shape[-2] % fold:
            raise ValueError(
                f"A picture of {x.shape[-2]}×{x.shape[-1]} does not fold {len(self.widths)} "
                f"stages deep: "
                f"its sides must be multiples of {fold}; change the size, patch or the number "
                f"of widths."
            )


def _places(h: Tensor) -> Tensor:
    """The coordinates y and x of each place of a map, from -1 to 1, with shape (B, 2, H, W)."""
    y, x = (torch.linspace(-1, 1, n, dtype=h.dtype, device=h.device) for n in h.shape[2:])
    return torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(len(h), -1, -1, -1)
