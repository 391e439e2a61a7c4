r"""What stands between the rows that a person has, x, and what a person gets back.

A row is what the data hold: a picture of bytes, a line of numbers. A model is trained on x, which
is about in [-1, 1] whatever the rows are, and what it draws is made into rows again. Nobody else
knows how: the data module owns the codec, the checkpoint carries it, and the generator decodes.
"""

import csv
import json
import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline import png
from pipeline.building import Part
from pipeline.errors import UserError
from pipeline.noise import Noise

__all__ = ["Codec", "Columns", "Pixels", "Signals", "Standardised"]

LARGEST = 65_536  # pixels of a side


class Codec(Part, ABC):
    """Rows → x → rows.

    Attributes:
        shape: The shape of one x.
        plural: What rows are called.
        sizes: The arguments of a network that the shape decides.
        pictures: Whether a row is a uint8 picture (C, H, W), which can be seen and measured.
    """

    shape: tuple[int, ...]
    plural: str
    sizes: dict[str, int]
    pictures = False

    @abstractmethod
    def encode(self, rows: Tensor) -> Tensor:
        """x, float32 with shape (B, \\*shape), of rows, on their device."""

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """The rows of x."""

    @abstractmethod
    def write(self, rows: Tensor, first: int, folder: Path, about: list, settings: dict) -> None:
        """Write drawn rows into a folder.

        Arguments:
            first: How many rows were written before.
            about: Of each row, before and now: its prompt and its seed. Where a row has a file of
                its own, "file" is added.
            settings: How all rows were drawn.
        """

    def sheet(self, rows: Tensor, captions: Sequence[str], columns: int) -> Image.Image | None:
        """All rows at one look, or `None` where there is nothing to see."""
        return None


class Pixels(Codec):
    r"""Pictures of bytes.

    .. math:: x = k / 127.5 - 1, \quad k \in \{0, …, 255\}

    Back to the nearest; values outside are clipped.

    Arguments:
        channels: 3 for colour, 1 for grey.
        height: The height in pixels.
        width: The width in pixels.
    """

    plural = "pictures"
    pictures = True

    def __init__(self, channels: int, height: int, width: int) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}; it must be 3 (colour) or 1 (grey).")
        if not (0 < height <= LARGEST and 0 < width <= LARGEST):
            said = f"A picture of {height}×{width} cannot be; its sides are from 1 to {LARGEST}"
            raise ValueError(f"{said} pixels.")
        self.shape = (channels, height, width)
        self.sizes = {"channels": channels, "dims": 2}

    def encode(self, rows: Tensor) -> Tensor:
        return rows.float() / 127.5 - 1

    def decode(self, x: Tensor) -> Tensor:
        return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)

    def write(self, rows: Tensor, first: int, folder: Path, about: list, settings: dict) -> None:
        """One PNG for each picture, with how it was made in its text fields."""
        for i, picture in enumerate(rows, start=first):
            text = {"Title": about[i]["prompt"], "Settings": json.dumps(about[i] | settings)}
            png.save(picture, folder / f"{i:05d}.png", text)
            about[i]["file"] = f"{i:05d}.png"

    def sheet(self, rows: Tensor, captions: Sequence[str], columns: int) -> Image.Image:
        return png.contact_sheet(rows, captions, columns)

    def dequantise(self, rows: Tensor, noise: Noise) -> Tensor:
        r"""x of uint8 rows (B, C, H, W), drawn uniformly from the cell of each value k.

        .. math:: x = \frac{k + v}{127.5} - 1, \quad v \sim U(-\tfrac{1}{2}, \tfrac{1}{2})
        """
        k = rows.float()
        return (k + torch.special.ndtr(noise.normal(k)) - 0.5) / 127.5 - 1

    def bits(self, log_prob: Tensor) -> Tensor:
        r"""The log-likelihood of x, in nats with shape (B,), as bits for each value k.

        .. math:: - \frac{\log p(x \mid u)}{d \log 2} + \log_2 127.5, \quad d = C H W

        On average no less than the bits that a code for the pictures needs, if x is one of theirs
        after `dequantise`. Of x itself it is a density's value and no bound: a law may be narrow
        about the 256 values.

        References:
            | Theis et al., 2016, section 3.1; https://arxiv.org/abs/1511.01844
        """
        return math.log2(127.5) - log_prob / (math.prod(self.shape) * math.log(2))


class Signals(Codec):
    r"""Signals of 16 bits: sound, or what else is sampled evenly.

    .. math:: x = k / 32767, \quad k \in \{-32768, …, 32767\}

    Back to the nearest; values outside are clipped.

    Arguments:
        channels: 1 for mono, 2 for stereo, or any number.
        length: The number of samples of a channel.
        rate: The number of samples in a second.
    """

    plural = "signals"

    def __init__(self, channels: int, length: int, rate: int) -> None:
        if min(channels, length, rate) < 1:
            raise ValueError(f"channels {channels}, length {length} and rate {rate} must be > 0.")
        self.shape, self.rate = (channels, length), rate
        self.sizes = {"channels": channels, "dims": 1}

    def encode(self, rows: Tensor) -> Tensor:
        return rows.float() / 32767

    def decode(self, x: Tensor) -> Tensor:
        return (x.float() * 32767).round().clamp(-32768, 32767).to(torch.int16)

    def write(self, rows: Tensor, first: int, folder: Path, about: list, settings: dict) -> None:
        """One WAV for each signal, and all of them in `samples.npz` under the same names."""
        from scipy.io import wavfile

        with zipfile.ZipFile(folder / "samples.npz", "a" if first else "w") as together:
            for i, row in enumerate(rows.cpu().numpy(), start=first):
                about[i]["file"] = f"{i:05d}.wav"
                wavfile.write(folder / f"{i:05d}.wav", self.rate, row.T)
                with together.open(f"{i:05d}.npy", "w") as file:
                    np.save(file, row)

    def sheet(self, rows: Tensor, captions: Sequence[str], columns: int) -> Image.Image:
        """The waveforms, and below each its first channel's frequencies, over 60 decibels."""
        x, (wide, high) = rows.float() / 32767, (160, 64)
        top, low = (sign * F.adaptive_max_pool1d(sign * x, wide) for sign in (1, -1))
        y = torch.linspace(1, -1, high, device=x.device)[:, None]  # (H, 1)
        top, low = top.amax(1)[:, None] + 1.1 / high, low.amin(1)[:, None] - 1.1 / high
        window = torch.hann_window(min(2 ** round(math.log2(x.shape[2]) / 2 + 1), x.shape[2]))
        how: Any = {"window": window.to(x), "pad_mode": "constant", "return_complex": True}
        spectrum = torch.stft(x[:, 0], len(window), max(x.shape[2] // wide, 1), **how).abs()
        level = (spectrum / spectrum.amax((1, 2), keepdim=True).clamp(min=1e-9)).clamp(min=1e-3)
        tint = F.interpolate(level.log10()[:, None].flip(2) / 3 + 1, (high, wide))
        wave = ((low <= y) & (y <= top))[:, None]
        shown = torch.cat((wave, tint), dim=2)  # (N, 1, 2 H, W), in [0, 1]
        return png.contact_sheet((255 - 255 * shown).to(torch.uint8), captions, columns)


class Columns(Codec):
    """Lines of numbers, as they are: they are to be of about unit size.

    Arguments:
        dim: The number of columns.
    """

    plural = "vectors"

    def __init__(self, dim: int) -> None:
        self.shape, self.sizes = (dim,), {"x_dim": dim}
        self.names = [f"x_{k}" for k in range(dim)]

    def encode(self, rows: Tensor) -> Tensor:
        return rows.float()

    def decode(self, x: Tensor) -> Tensor:
        return x

    def columns(self, rows: Tensor, about: list[dict]) -> dict[str, list]:
        """Drawn rows by column: what was asked for, their seeds, their numbers."""
        asked = [one.get("u") or {"prompt": one["prompt"]} for one in about]
        u = {name: [one[name] for one in asked] for name in asked[0]}
        x = dict(zip(self.names, rows.T.tolist(), strict=True))
        own = "seed" if "seed" not in {*u, *x} else "seed of the draw"
        return u | {own: [one["seed"] for one in about]} | x

    def write(self, rows: Tensor, first: int, folder: Path, about: list, settings: dict) -> None:
        """One line of `samples.csv` for each row."""
        columns = self.columns(rows, about[first : first + len(rows)])
        with (folder / "samples.csv").open("a", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            if not first:
                lines.writerow(columns)
            lines.writerows(zip(*columns.values(), strict=True))


class Standardised(Columns):
    r"""Columns of a person's own units.

    .. math:: x = \frac{v - m}{2 s}

    so that x has the standard deviation 1/2, EDM's :math:`\sigma_d`, and lies mostly in [-1, 1].
    Back to as many decimals as the data have: whole numbers come back whole.

    Arguments:
        names: The name of each column.
        mean: The mean m of each; left out, it is learned from the data, as the next two are.
        std: The standard deviation s of each.
        decimals: The decimals of each that are kept, `None` for all of them.

    Raises:
        UserError: A column is constant, or too far from 0 for float32 to tell its rows apart.
    """

    plural = "rows"

    def __init__(
        self,
        names: Sequence[str],
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        decimals: Sequence[int | None] = (),
    ) -> None:
        super().__init__(len(names))
        self.names, self.decimals = list(names), list(decimals)
        self.mean = torch.tensor(list(mean), dtype=torch.float64)
        self.std = torch.tensor(list(std), dtype=torch.float64)

    def learn(self, rows: Tensor) -> None:
        """Take all of these from rows, float64 with shape (N, D)."""
        mean, std = rows.mean(dim=0), rows.std(dim=0, correction=0)
        for name, column, s in zip(self.names, rows.T, std, strict=True):
            if (column.float() - column).abs().max() >= s / 100:
                raise UserError(
                    f"Column {name!r} varies by {s:g} about {column.mean():g}, too little to be "
                    "learned; leave it out, or subtract a constant from it."
                )
        self.mean, self.std, self.decimals = mean, std, [places(column) for column in rows.T]
        self._given = (type(self), (self.names, mean.tolist(), std.tolist(), self.decimals), {})

    def encode(self, rows: Tensor) -> Tensor:
        mean, std = (one.to(rows.device, torch.float32) for one in (self.mean, self.std))
        return (rows.float() - mean) / (2 * std)

    def decode(self, x: Tensor) -> Tensor:
        """The rows, float64 on the CPU."""
        rows = x.cpu().double() * 2 * self.std + self.mean
        for k, decimals in enumerate(self.decimals):
            if decimals is not None:
                rows[:, k] = rows[:, k].round(decimals=decimals)
        return rows

    def columns(self, rows: Tensor, about: list[dict]) -> dict[str, list]:
        found = super().columns(rows, about)
        for name, decimals in zip(self.names, self.decimals, strict=True):
            if decimals == 0:
                found[name] = [int(v) for v in found[name]]
        return found


def places(column: Tensor) -> int | None:
    """The decimals of numbers that have no more than 6, else `None`."""
    return next((k for k in range(7) if torch.equal(column.round(decimals=k), column)), None)
