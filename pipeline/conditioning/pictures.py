r"""A picture as a condition: planes as large as x.

.. math:: u = (m \odot A(x), \; m)

A(x) is what is observed of x, and m ∈ {0, 1} a plane that says where. In training both are made of
x on its device, and nothing is stored. The null condition is m = 0, which no picture has. Tokens
of a prompt may stand beside the planes; each part is dropped by itself, and may be left out.

References:
    | Saharia et al., 2021: A(x) beside x_t; https://arxiv.org/abs/2104.07636
    | Saharia et al., 2022; https://arxiv.org/abs/2111.05826
"""

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from pipeline.building import brief, describe
from pipeline.condition import Condition
from pipeline.conditioning.base import Conditioning
from pipeline.errors import UserError
from pipeline.files import digest
from pipeline.noise import Noise

__all__ = ["Downsampled", "Given", "Grey", "Masked", "Paired", "Picture"]


@dataclass(frozen=True, eq=False)
class Given:
    """What is drawn from: a prompt ("" for none) and the planes (P, H, W) of a picture."""

    prompt: Any
    planes: Tensor

    def __str__(self) -> str:
        return str(self.prompt)


class Picture(Conditioning, ABC):
    """A picture, with a prompt beside it or alone. What is embedded is a `Given`, or a prompt.

    Arguments:
        prompt: What makes tokens of a row's prompt; null for the picture alone.

    Attributes:
        pairs: Whether the planes are made of another picture that the data have for each x.
        shape: The shape (C, H, W) of x.
        wants: What x has to be.

    Raises:
        UserError: The rows are no pictures, or a prompt is given where none is taken.
    """

    pairs, wants = False, "pictures"
    shape: tuple[int, ...] = ()

    def __init__(self, prompt: Conditioning | None = None) -> None:
        self.prompt = prompt

    def observe(self, x: Tensor) -> Tensor:
        """A(x) of pictures (B, C, H, W), with shape (B, P − 1, H, W)."""
        return x

    def known(self, x: Tensor, noise: Noise) -> Tensor:
        """m of each picture, with shape (B, 1, H, W)."""
        return torch.ones_like(x[:, :1])

    def __call__(self, x: Tensor, known: Tensor) -> Tensor:
        """The planes of pictures (B, C, H, W), with shape (B, P, H, W)."""
        return torch.cat((known * self.observe(x), known), dim=1)

    def read(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        """A person's RGBA picture as rows (1, C, H, W), uint8, and m; else `ValueError`."""
        channels, height, width = self.shape
        if picture.size != (width, height):
            raise ValueError(f"it is of {picture.width}×{picture.height}, not {width}×{height}")
        flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        pixels = torch.from_numpy(np.array(flat.convert("L" if channels == 1 else "RGB")))
        rows = pixels.reshape(1, height, width, channels).movedim(-1, 1)
        return rows, torch.ones(1, 1, height, width)

    def see(self, shape: tuple[int, ...]) -> None:
        """Take the shape of x."""
        if len(shape) != 3 or not self.fits(*shape):
            raise UserError(f"{brief(self)} is of {self.wants}, and x has the shape {shape}.")
        self.shape = shape

    def fits(self, channels: int, height: int, width: int) -> bool:
        return True

    @property
    def planes(self) -> int:  # type: ignore[override]
        return self.shape[0] + 1

    @property
    def dim(self) -> int:
        return self.prompt.dim if self.prompt else 0

    def embed(self, values: Sequence[Any]) -> Condition:
        nothing = torch.zeros(self.planes, *self.shape[1:])
        given = [v if isinstance(v, Given) else Given(v, nothing) for v in values]
        return Condition.stack([Condition(self._tokens(v.prompt), v.planes[None]) for v in given])

    def _tokens(self, prompt: Any) -> Tensor | None:
        if self.prompt is not None:
            return (self.prompt.null() if prompt == "" else self.prompt.embed([prompt])).tokens
        if prompt != "":
            raise UserError(f"The model is given a picture alone: leave out {prompt!r}.")
        return None

    def null(self) -> Condition:
        return self.embed([""])

    def fingerprint(self) -> str:
        about = describe(self)
        about["init_args"]["prompt"] = self.prompt and self.prompt.fingerprint()
        return digest("Picture", 1, about)


class Downsampled(Picture):
    """Super-resolution: A(x) is the mean of each square of pixels, at all of them. A person's
    picture is small, or as large as x and then made so.

    Arguments:
        factor: The side of a square, at least 2; it divides the sides of x.
    """

    wants = "pictures whose sides its factor, 2 or more, divides"

    def __init__(self, factor: int = 4, prompt: Conditioning | None = None) -> None:
        super().__init__(prompt)
        self.factor = factor

    def fits(self, channels: int, height: int, width: int) -> bool:
        return self.factor > 1 and not (height % self.factor or width % self.factor)

    def observe(self, x: Tensor) -> Tensor:
        small = avg_pool2d(x, self.factor)
        return small.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)

    def read(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        if (picture.height * self.factor, picture.width * self.factor) == self.shape[1:]:
            size = picture.width * self.factor, picture.height * self.factor
            picture = picture.resize(size, Image.Resampling.NEAREST)
        return super().read(picture)


class Masked(Picture):
    r"""Inpainting: A(x) = x, and m = 0 in a box. Its sides are shares of those of x, each
    :math:`U(\text{least}, 1)`, so that halves are among them, and its place is uniform among those
    inside of x. A person's picture is transparent where it is to be drawn.

    Arguments:
        least: The least share, in (0, 1).
    """

    def __init__(self, least: float = 0.25, prompt: Conditioning | None = None) -> None:
        super().__init__(prompt)
        if not 0 < least < 1:
            raise ValueError(f"least = {least} must lie in (0, 1).")
        self.least = least

    def known(self, x: Tensor, noise: Noise) -> Tensor:
        inside = []
        for side in x.shape[2:]:
            share, place = (noise.uniform(len(x)).to(x.device)[:, None] for _ in range(2))
            length = ((self.least + (1 - self.least) * share) * side).round().clamp(min=1)
            k = torch.arange(side, device=x.device) - (place * (side - length + 1)).floor()
            inside.append((k >= 0) & (k < length))  # (B, side)
        return 1 - (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(x)

    def read(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        rows, known = super().read(picture)
        known[0, 0] = torch.from_numpy(np.array(picture.getchannel("A")) >= 128)
        if known.all():
            raise ValueError("it has no transparent part, which would be drawn")
        return rows, known


class Grey(Picture):
    r"""Colouring: :math:`A(x) = 0.299 R + 0.587 G + 0.114 B`, the luma of ITU-R BT.601, one
    plane; x is in colour.
    """

    wants, planes = "pictures in colour", 2  # type: ignore[assignment]

    def fits(self, channels: int, height: int, width: int) -> bool:
        return channels == 3

    def observe(self, x: Tensor) -> Tensor:
        return torch.einsum("c,bchw->bhw", x.new_tensor([0.299, 0.587, 0.114]), x)[:, None]


class Paired(Picture):
    """Image to image: A(x) is another picture, of the column `data.condition_image`."""

    pairs = True
