"""Where randomness comes from.

Everything that draws is given a `Noise`, so that what is drawn is a function of what is written in
its key: of (seed, batches seen, index in the global batch) in training, of (seed of the picture)
in sampling. Nothing here or above touches the global generators.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Noise", "PictureNoise", "hashed", "mix", "permuted"]

BLOCK = 32  # rows that share a generator
TABLE = 1024  # the largest permutation that is made whole
ROUNDS = 8


def mix(*key: int | str) -> int:
    """A seed in [0, 2⁶³) from a key: unrelated for different keys, the same everywhere."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def hashed(i: np.ndarray, seed: int) -> np.ndarray:
    """Numbers uniform in [0, 2⁶⁴), uint64, each a function of the seed and of one number i ≥ 0.

    References:
        | Steele et al., 2014: SplitMix64; https://doi.org/10.1145/2660193.2660195
    """
    z = (i.astype(np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permuted(i: np.ndarray, n: int, *key: int | str) -> np.ndarray:
    r"""The places :math:`\pi(i)` of a random permutation π of 0 … n − 1, a function of its key: no
    table is made, but where n is so small that it costs nothing.

    A number i of :math:`a b \ge n` is a pair, :math:`(\lfloor i / b \rfloor, i \bmod b)`, of which
    each round adds a hash of one half to the other and changes their places; what leaves 0 … n − 1
    goes round again until it is back, as fewer than :math:`\sqrt n` of all do.

    References:
        | Black & Rogaway, 2002, section 5; https://doi.org/10.1007/3-540-45760-7_9

    Arguments:
        i: Numbers in 0 … n − 1, of any shape.
        n: The length of the permutation, up to 2⁶².
        key: What decides it.
    """
    if n <= TABLE:
        return np.random.default_rng(mix(*key)).permutation(n)[i]
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    seeds = [mix(*key, k) for k in range(ROUNDS)]
    found = around(np.asarray(i, np.int64), a, b, seeds)
    while (out := found >= n).any():
        found[out] = around(found[out], a, b, seeds)
    return found


def around(i: np.ndarray, a: int, b: int, seeds: Sequence[int]) -> np.ndarray:
    """One walk through the rounds of `permuted`; their number is even."""
    left, right = np.divmod(i, b)
    sizes = a, b
    for k, seed in enumerate(seeds):
        size = sizes[k % 2]
        added = (hashed(right, seed) % np.uint64(size)).astype(np.int64)
        left, right = right, (left + added) % size
    return left * b + right


class Noise:
    r"""One stream of random numbers, or this device's rows of a stream that all devices share.

    With `rows` = (start, total), each call draws rows start, start + 1, … of `total`: 2 devices of
    16 rows draw what 1 device of 32 would. Then rows have their generators by blocks of 32, so
    that a device draws its own rows and at most 62 others, whatever the total is.

    Arguments:
        key: What decides the stream: numbers and words.
        device: Where the numbers are drawn. The stream of a GPU is not that of a CPU.
        rows: The first row that is ours and the number of rows in the global batch; every row is
            ours by default.
    """

    def __init__(
        self,
        *key: int | str,
        device: torch.device | str = "cpu",
        rows: tuple[int, int] | None = None,
    ) -> None:
        self.key, self.device, self.rows = key, torch.device(device), rows
        self.streams: dict[tuple[int, ...], torch.Generator] = {}
        self.spreads = 0

    def _draw(self, draw: Callable[..., Tensor], n: int, *shape: int, **kind: Any) -> Tensor:
        """n rows of a shape, each block drawn as on the device that has all of its rows."""
        if self.rows is None:
            return draw((n, *shape), generator=self._generator(), device=self.device, **kind)
        start, total = self.rows
        first, last = start // BLOCK, -(-(start + n) // BLOCK)
        blocks = []
        for block in range(first, last):
            size, generator = min(BLOCK, total - block * BLOCK), self._generator(block)
            blocks.append(draw((size, *shape), generator=generator, device=self.device, **kind))
        return torch.cat(blocks)[start - first * BLOCK :][:n]

    def _generator(self, *block: int) -> torch.Generator:
        if block not in self.streams:
            made = torch.Generator(self.device).manual_seed(mix(*self.key, *block))
            self.streams[block] = made
        return self.streams[block]

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers with the shape (B, *), type and device of another tensor."""
        drawn = self._draw(torch.randn, len(like), *like.shape[1:], dtype=like.dtype)
        return drawn.to(like.device)

    def uniform(self, n: int) -> Tensor:
        """Numbers uniform in [0, 1), independent, with shape (B,)."""
        return self._draw(torch.rand, n)

    def spread(self, n: int) -> Tensor:
        r"""Numbers uniform in [0, 1), one in each of as many equal cells as there are rows, with
        shape (B,).

        .. math:: q_i = (\pi(i) + v) / B, \quad v \sim U(0, 1), \quad
            \pi \text{ a random permutation}

        Each is uniform by itself; together they cover the interval evenly, so that an average over
        the batch has less variance.

        References:
            | Kingma et al., 2021, appendix I.1; https://arxiv.org/abs/2107.00630
        """
        start, total = self.rows or (0, n)
        key = (*self.key, "spread", self.spreads)
        self.spreads += 1
        cells = permuted(np.arange(start, start + n), total, *key)
        drawn = (cells + mix(*key, "offset") / 2**63) / total
        # float32 may round the last cell up to 1
        return torch.from_numpy(drawn).float().clamp(max=1 - 2**-24).to(self.device)


class PictureNoise(Noise):
    """One stream per picture: row i is a function of its seed, at any batch size, on any devices.

    The numbers are drawn on the CPU, so that a picture's noise does not depend on the device
    either; a sampler with noise at every step waits for them, about 10 ns a number.

    Arguments:
        seeds: The seed of each picture.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(mix("picture", seed)) for seed in seeds]

    def _check(self, n: int) -> None:
        if n != len(self.generators):
            raise ValueError(
                f"{n} rows of noise were asked for with {len(self.generators)} seeds."
            )

    def normal(self, like: Tensor) -> Tensor:
        """The same, row by row; B is the number of seeds."""
        self._check(len(like))
        shape, kind = like.shape[1:], like.dtype
        rows = [torch.randn(shape, generator=g, dtype=kind) for g in self.generators]
        return torch.stack(rows).to(like.device)

    def uniform(self, n: int) -> Tensor:
        """Numbers uniform in [0, 1), independent, with shape (B,); B = number of seeds."""
        self._check(n)
        return torch.stack([torch.rand((), generator=g) for g in self.generators])

    def spread(self, n: int) -> Tensor:
        """The same as `uniform`: each picture is a batch of its own."""
        return self.uniform(n)
