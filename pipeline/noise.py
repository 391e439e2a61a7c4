"""Where randomness comes from.

Everything that draws is given a `Noise`, so that what is drawn is a function of what is written in
its key: of (seed, batches seen, index in the global batch) in training, of (seed of the picture)
in sampling. Nothing here or above touches the global generators.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Noise", "PictureNoise", "mix"]


def mix(*key: int | str) -> int:
    """A seed in [0, 2⁶³) from a key: different keys give unrelated seeds, the same on every
    machine.
    """
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Noise:
    r"""One stream of random numbers, or this device's rows of a stream that all devices share.

    With `rows` = (start, total), each call draws for `total` examples and returns those of rows
    start, start + 1, …: 2 devices of 16 rows draw what 1 device of 32 would.

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
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(mix(*key))
        self.rows = rows

    def _ours(self, drawn: Tensor, n: int) -> Tensor:
        return drawn if self.rows is None else drawn[self.rows[0] : self.rows[0] + n]

    def _total(self, n: int) -> int:
        return n if self.rows is None else self.rows[1]

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers with the shape (B, *), type and device of another tensor."""
        shape = like.shape if self.rows is None else (self.rows[1], *like.shape[1:])
        drawn = torch.randn(shape, generator=self.generator, device=self.device, dtype=like.dtype)
        return self._ours(drawn, len(like)).to(like.device)

    def uniform(self, n: int) -> Tensor:
        """Numbers uniform in [0, 1), independent, with shape (B,)."""
        drawn = torch.rand(self._total(n), generator=self.generator, device=self.device)
        return self._ours(drawn, n)

    def spread(self, n: int) -> Tensor:
        r"""Numbers uniform in [0, 1), one in each of as many equal cells as there are rows, with
        shape (B,).

        .. math:: q_i = (\pi(i) + v) / B, \quad v \sim U(0, 1), \quad
            \pi \text{ a random permutation}

        Each is uniform by itself; together they cover the interval evenly, so that an average over
        the batch has less variance.

        References:
            | Variational Diffusion Models (Kingma et al., 2021), appendix I.1
            | https://arxiv.org/abs/2107.00630
        """
        total = self._total(n)
        offset = torch.rand((), generator=self.generator, device=self.device)
        cells = (
            torch.randperm(total, generator=self.generator, device=self.device) + offset
        ) / total
        return self._ours(
            cells.clamp(max=1 - 2**-24), n
        )  # float32 may round the last cell up to 1


class PictureNoise(Noise):
    """One stream per picture: row i is a function of its seed, at any batch size and on any number
    of devices.

    The numbers are drawn on the CPU, so that a picture's noise does not depend on the device
    either.

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
        """Standard normal numbers with the shape (B, *), type and device of another tensor; B =
        number of seeds.
        """
        self._check(len(like))
        rows = [
            torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in self.generators
        ]
        return torch.stack(rows).to(like.device)

    def uniform(self, n: int) -> Tensor:
        """Numbers uniform in [0, 1), independent, with shape (B,); B = number of seeds."""
        self._check(n)
        return torch.stack([torch.rand((), generator=g) for g in self.generators])

    def spread(self, n: int) -> Tensor:
        """The same as `uniform`: each picture is a batch of its own."""
        return self.uniform(n)
