r"""A picture as a condition: planes as large as x.

.. math:: u = (m \odot A(x), \; m)

A(x) is what is observed of x, and m ∈ {0, 1} a plane that says where. Nothing is stored: in
training both are made of x, on its device. The null condition is m = 0, which no picture has.
Tokens of a prompt may stand beside the planes; either part can be left out when drawing, and is
dropped by itself in training.

References:
    | Image Super-Resolution via Iterative Refinement (Saharia et al., 2021): A(x) beside x_t
    | https://arxiv.org/abs/2104.07636
    | Palette: Image-to-Image Diffusion Models (Saharia et al., 2022)
    | https://arxiv.org/abs/2111.05826
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

from pipeline.building import describe
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

    Raises:
        UserError: The rows are no pictures, or a prompt is given where none is taken.
    """

    pairs = False
    shape: tuple[int, ...] = ()

    def __init__(self, prompt: Conditioning | None = None) -> None:
        self.prompt, self._known = prompt, dict[Any, Tensor]()

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
        """Rows (1, C, H, W), uint8, and m, of a person's picture in RGBA.

        Raises:
            ValueError: It does not fit; the message goes on where its name ends.
        """
        channels, height, width = self.shape
        if picture.size != (width, height):
            raise ValueError(f"is of {picture.size[0]}×{picture.size[1]}, not {width}×{height}")
        white = Image.new("RGBA", picture.size, "white")
        flat = Image.alpha_composite(white, picture).convert("L" if channels == 1 else "RGB")
        rows = torch.from_numpy(np.array(flat)).reshape(1, height, width, channels)
        return rows.movedim(-1, 1), torch.ones(1, 1, height, width)

    def see(self, shape: Sequence[int]) -> None:
        if len(shape) != 3:
            raise UserError(f"{type(self).__name__} is of pictures, and x has shape {shape}.")
        self.shape = tuple(shape)

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
        """Of each distinct prompt once: pictures differ where prompts do not."""
        if self.prompt is None and prompt != "":
            raise UserError(
                f"The model is given a picture alone and takes no prompt, such as {prompt!r}: "
                "leave it out."
            )
        if self.prompt is not None and prompt not in self._known:
            u = self.prompt.null() if prompt == "" else self.prompt.embed([prompt])
            assert u.tokens is not None
            self._known[prompt] = u.tokens
        return self._known.get(prompt)

    def null(self) -> Condition:
        return self.embed([""])

    def fingerprint(self) -> str:
        about = describe(self)
        about["init_args"]["prompt"] = self.prompt and self.prompt.fingerprint()
        return digest("Picture", 1, about)


class Downsampled(Picture):
    """Super-resolution: A(x) is the mean of each square of pixels, at all of its pixels. A person's
    picture is small, or as large as x and then made so.

    Arguments:
        factor: The side of a square, at least 2; it divides the sides of x.
        prompt: See `Picture`.
    """

    def __init__(self, factor: int = 4, prompt: Conditioning | None = None) -> None:
        super().__init__(prompt)
        self.factor = factor

    def see(self, shape: Sequence[int]) -> None:
        super().see(shape)
        if self.factor < 2 or any(side % self.factor for side in shape[1:]):
            raise UserError(
                f"factor = {self.factor} must be at least 2 and divide the sides of a picture, "
                f"{shape[1]} and {shape[2]}."
            )

    def observe(self, x: Tensor) -> Tensor:
        small = avg_pool2d(x, self.factor)
        return small.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)

    def read(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        _, height, width = self.shape
        if picture.size == (width // self.factor, height // self.factor):
            picture = picture.resize((width, height), Image.Resampling.NEAREST)
        return super().read(picture)


class Masked(Picture):
    r"""Inpainting: A(x) = x, and m = 0 in a box. The sides of the box are shares of those of x,
    each :math:`U(\text{least}, 1)`, so that halves are among them, and its place is uniform among
    those inside of x. A person's picture is transparent where it is to be drawn.

    Arguments:
        least: The least share, in (0, 1).
        prompt: See `Picture`.
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
        rows, columns = inside
        return 1 - (rows[:, None, :, None] & columns[:, None, None, :]).to(x)

    def read(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        rows, known = super().read(picture)
        opaque = torch.from_numpy(np.array(picture.getchannel("A")) >= 128)
        if opaque.all():
            raise ValueError("has no transparent part, which would be drawn")
        return rows, opaque.to(known)[None, None]


class Grey(Picture):
    r"""Colouring: :math:`A(x) = 0.299 R + 0.587 G + 0.114 B`, the luma of ITU-R BT.601, one
    plane; x is in colour.

    Arguments:
        prompt: See `Picture`.
    """

    planes = 2  # type: ignore[assignment]

    def see(self, shape: Sequence[int]) -> None:
        super().see(shape)
        if shape[0] != 3:
            raise UserError("Grey is of pictures in colour; set data.channels to 3.")

    def observe(self, x: Tensor) -> Tensor:
        weights = x.new_tensor([0.299, 0.587, 0.114])
        return (x * weights[:, None, None]).sum(dim=1, keepdim=True)


class Paired(Picture):
    """Image to image: A(x) is another picture, of a column that the data name
    (`data.condition_image`).

    Arguments:
        prompt: See `Picture`.
    """

    pairs = True
