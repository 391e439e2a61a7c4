"""Pictures as what a frozen autoencoder makes of them."""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pipeline.codec import Pixels
from pipeline.errors import UserError
from pipeline.files import model_folder, sha256

__all__ = ["Latents"]

FILES = ("config.json", "diffusion_pytorch_model.safetensors")
ROWS = 8  # pictures that the autoencoder is given at once


class Latents(Pixels):
    r"""Pictures of bytes, of which x is the latents: latent diffusion.

    .. math:: x = a \, (E(p) - m), \qquad p = G(x / a + m)

    with the mean E of a frozen `AutoencoderKL` of `diffusers` for a picture p in [-1, 1], its
    decoder G, and the scale a and the shift m that its configuration names.

    References:
        | Rombach et al., 2022; https://arxiv.org/abs/2112.10752

    Arguments:
        name: The autoencoder: a folder, or a name on the Hugging Face hub.
        channels, height, width: See :class:`pipeline.codec.Pixels`.
        weights: The sha256 that its weights are to have; by default of those that are there.

    Raises:
        UserError: It is not there, is another than `weights` says, or does not take such pictures.
    """

    def __init__(
        self, name: str, channels: int, height: int, width: int, weights: str | None = None
    ) -> None:
        super().__init__(channels, height, width)
        self.picture, self.name = self.shape, name
        self.folder = model_folder(name, FILES, lacks, "The autoencoder", "an AutoencoderKL")
        found = sha256(self.folder / FILES[1])
        if weights not in (None, found):
            raise UserError(
                f"The autoencoder {name!r} is another than the model was trained with: put back "
                f"the one whose {FILES[1]} has the sha256 {weights}."
            )
        self.weights = found
        self._given = (type(self), (name, channels, height, width), {"weights": found})
        said = json.loads((self.folder / FILES[0]).read_text())
        self.scale, self.shift = said["scaling_factor"], said.get("shift_factor") or 0.0
        fold = 2 ** (len(said["block_out_channels"]) - 1)
        if said["in_channels"] != channels or height % fold or width % fold:
            raise UserError(
                f"The autoencoder {name!r} takes pictures of {said['in_channels']} channels whose "
                f"sides are multiples of {fold}; data.channels is {channels} and data.size "
                f"{height}×{width}."
            )
        self.shape = (said["latent_channels"], height // fold, width // fold)
        self.sizes |= {"channels": said["latent_channels"]}

    @cached_property
    def autoencoder(self) -> Any:
        try:
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        except ImportError as error:
            raise UserError(
                "Latents need the package diffusers: install it by pip install diffusers."
            ) from error
        how = {"use_safetensors": True, "local_files_only": True}
        return AutoencoderKL.from_pretrained(self.folder, **how).eval().requires_grad_(False)

    def means(self, rows: Tensor) -> Tensor:
        """The means E of pictures (B, C, H, W), before scale and shift, (B, \\*shape)."""
        model = self.autoencoder.to(rows.device)
        parts = super().encode(rows).split(ROWS)
        return torch.cat([model.encode(part).latent_dist.mode() for part in parts])

    def kept(self, rows: Any, device: torch.device) -> Iterator[Any]:
        """The means of uint8 pictures, an array or a memory map, one by one."""
        for start in range(0, len(rows), ROWS):
            some = torch.from_numpy(rows[start : start + ROWS].copy()).to(device)
            yield from self.means(some).cpu().numpy()

    def encode(self, rows: Tensor) -> Tensor:
        """x of uint8 pictures, or of their means."""
        means = self.means(rows) if rows.dtype == torch.uint8 else rows
        return (means - self.shift) * self.scale

    def decode(self, x: Tensor) -> Tensor:
        model = self.autoencoder.to(x.device)
        parts = (x.float() / self.scale + self.shift).split(ROWS)
        return super().decode(torch.cat([model.decode(part).sample for part in parts]))

    def dequantise(self, rows: Tensor, noise: object) -> NoReturn:
        raise UserError(
            "A model of latents has no likelihood of pictures; leave --likelihood out."
        )


def lacks(folder: Path) -> list[str]:
    return [name for name in FILES if not (folder / name).is_file()]
