"""Signals: WAV and npy files, and chirps whose captions can be read back from them."""

import warnings
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from pipeline.codec import Signals
from pipeline.conditioning import Conditioning
from pipeline.data.base import DataModule, Source
from pipeline.data.folder import say
from pipeline.data.hub import Hub
from pipeline.data.shapes import SPLITS, known, sampled

__all__ = ["Chirps", "Sequences"]

RATE, LENGTH = 4000, 1024  # of a chirp: a quarter of a second
EDGE = 0.01  # seconds in which a tone swells and fades
NAMED = {
    "loudness": {"quiet": 0.25, "loud": 0.8},  # the largest value
    "duration": {"short": 0.07, "long": 0.2},  # seconds
    "direction": {"rising": 1.0, "steady": 0.0, "falling": -1.0},  # octaves, from first to last
    "pitch": {"deep": 150.0, "low": 300.0, "high": 600.0, "shrill": 1200.0},  # Hz, halfway
}


class Sequences(Hub):
    """A folder of WAV or npy files, with captions or class folders as
    :class:`pipeline.data.Hub` reads them of pictures.

    An npy file is an array of one dimension, or of channels by samples, of int16 or of numbers
    from −1 to 1. Of a file the first `length` samples are taken, or all and then zeros, which is
    said. Samples of 8, 24 and 32 bits and floating-point numbers become 16 bits. A file of
    another rate or number of channels stops the run.

    Arguments:
        path: The folder.
        length: The number of samples. A network folds it: a power of 2 is good.
        channels: 1 takes the mean of a file's channels; else as many as each file has.
        rate: The samples in a second of every file; an npy file does not say its own.
        others: See :class:`pipeline.data.Hub`.
    """

    kind = np.int16
    holds = "WAV or npy file", lambda name: name.lower().endswith((".wav", ".npy"))

    def __init__(
        self,
        path: str,
        conditioning: Conditioning | None,
        caption: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        length: int = 16384,
        channels: int = 1,
        rate: int = 16000,
        batch_size: int = 32,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        named = {"caption": caption, "split": split, "val_split": val_split, "seed": seed}
        super().__init__(path, conditioning, batch_size=batch_size, cache_dir=cache_dir, **named)
        self.codec, self.lengths = Signals(channels, length, rate), list[int]()
        self.frame = self.codec.shape
        warnings.filterwarnings("ignore", "Chunk .*not understood")  # a title, an author

    def fingerprint(self, split: str) -> str:
        return f"{super().fingerprint(split)} {self.shape} {self.codec.rate}"

    def source(self, split: str, together: bool = False) -> Source:
        self.lengths.clear()
        found, length = super().source(split, together), self.shape[1]
        cut, filled = (sum(s * n > s * length for n in self.lengths) for s in (1, -1))
        if cut or filled:
            of = f"Of {len(found.x)} signals for {split!r}, {cut} are cut at data.length {length}"
            say(f"{of} and {filled} are filled up to it with zeros.")
        return found

    def read(self, image: dict | None) -> np.ndarray:
        """A WAV or npy file → int16 (C, L)."""
        from scipy.io import wavfile

        path, (channels, length) = (image or {})["path"], self.shape
        if path.lower().endswith(".npy"):
            rate, samples = self.codec.rate, checked(np.load(path, allow_pickle=False))
        else:
            rate, samples = wavfile.read(path)
            samples = samples.reshape(len(samples), -1)  # (L, C)
        if rate != self.codec.rate:
            raise ValueError(f"{rate} samples a second: set data.rate to it, or resample it")
        if channels not in (1, samples.shape[1]):
            raise ValueError(f"{samples.shape[1]} channels where data.channels is {channels}")
        self.lengths.append(len(samples))
        unit = {"uint8": 256, "int16": 1, "int32": 2**-16}.get(samples.dtype.name, 32767)
        k = (samples[:length].astype(np.float64) - 128 * (unit == 256)) * unit
        k = np.pad(k if channels > 1 else k.mean(1, keepdims=True), ((0, length - len(k)), (0, 0)))
        return k.T.round().clip(-32768, 32767).astype(np.int16)


def checked(x: np.ndarray) -> np.ndarray:
    """An array of an npy file, (C, L) or (L,) → (L, C)."""
    if x.ndim not in (1, 2) or not (x.dtype == np.int16 or x.dtype.kind == "f"):
        raise ValueError(
            f"an array {x.shape} of {x.dtype}; expected (samples,) or (channels, samples), of "
            "int16 or floating-point numbers"
        )
    if x.dtype.kind == "f" and not (abs(x) <= 1).all():
        raise ValueError("numbers outside of -1 to 1, or none; divide by the largest of all files")
    return np.atleast_2d(x).T


class Chirps(DataModule):
    r"""Tones between silences, "a loud short rising low tone": 1,024 samples, 4,000 in a second.

    .. math:: x(s) = a \, e(s) \sin \Big( \varphi + 2 \pi \int f \Big), \quad
        f(s) = f_c \, 2^{d (s / T - 1/2)}, \; 0 \le s \le T

    with a raised cosine e of 10 ms on both sides; loudness a, duration T and pitch f_c vary a
    little about their names, phase φ and beginning are random. Of the 48 combinations a quarter,
    a Latin pattern on shuffled words, is in the split `unseen` alone; `train` and `val` share the
    others.

    Arguments:
        per_combination: Training rows of each seen combination; an eighth in `val` and `unseen`.
        seed: What decides the held-out quarter, the tones and the order.
        others: See :class:`pipeline.data.DataModule`.
    """

    def __init__(
        self,
        conditioning: Conditioning | None,
        per_combination: int = 64,
        batch_size: int = 32,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        codec = Signals(1, LENGTH, RATE)
        super().__init__(codec, conditioning, batch_size, seed, cache_dir=cache_dir)
        if per_combination < 1:
            raise ValueError(f"per_combination is {per_combination}; it must be at least 1.")
        self.per_combination = per_combination

    def combinations(self, split: str) -> list[tuple[str, ...]]:
        """Words; for each loudness, duration and direction one pitch is held out of training."""
        order, unseen = np.random.default_rng((self.seed, 0)), known(split) == "unseen"
        words = [order.permutation(list(values)).tolist() for values in NAMED.values()]
        places = product(*(range(len(of)) for of in words))
        chosen = [p for p in places if ((p[0] + p[1] + 2 * p[2]) % 4 == p[3]) == unseen]
        return sorted(tuple(of[i] for of, i in zip(words, p, strict=True)) for p in chosen)

    def source(self, split: str) -> Source:
        times = self.per_combination if split == "train" else max(1, self.per_combination // 8)
        plan = self.combinations(split) * times
        x = render(plan, np.random.default_rng((self.seed, 1 + SPLITS.index(split))))
        return Source(x, [f"a {' '.join(one)} tone" for one in plan])

    def held_out(self, number: int) -> tuple[list[str], Tensor]:
        """Unseen combinations, and tones of them, made anew."""
        order = np.random.default_rng(0)
        plan = sampled(self.combinations("unseen"), number, order)
        return [f"a {' '.join(one)} tone" for one in plan], torch.from_numpy(render(plan, order))


def render(plan: Sequence[tuple[str, ...]], generator: np.random.Generator) -> np.ndarray:
    """Combinations → int16 signals (N, 1, L)."""
    said = [[of[word] for of, word in zip(NAMED.values(), one, strict=True)] for one in plan]
    a, duration, octaves, pitch = np.array(said).T[:, :, None]  # each (N, 1)
    off = generator.uniform(-1, 1, (5, len(plan), 1))
    duration, pitch = duration * (1 + 0.06 * off[0]), pitch * 2 ** (0.1 * off[1])
    s = np.arange(LENGTH) / RATE - (LENGTH / RATE - duration) * (1 + off[2]) / 2  # (N, L)
    turns = np.cumsum(pitch * 2 ** (octaves * (s / duration - 0.5)), axis=1) / RATE
    edge = (np.minimum(s, duration - s) / EDGE).clip(0, 1)
    x = a * (1 + 0.06 * off[3]) * (1 - np.cos(np.pi * edge)) / 2
    x = x * np.sin(2 * np.pi * turns + np.pi * off[4])
    return (x * 32767).round().astype(np.int16)[:, None]
