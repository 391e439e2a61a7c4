r"""The order of rows, the same on every machine.

The training stream is the endless concatenation of permutations: row j of the stream is place
:math:`j \bmod N` of permutation :math:`\pi(\text{seed}, \lfloor j / N \rfloor)`, and global
batch b is rows :math:`[bG, (b + 1)G)` of the stream. Rank r of W takes the r-th of W equal parts
of it. Nothing is dropped, N < G is no special case, and the order is a function of (seed, batches
seen): a resumed run needs no loader state, and W devices see what one would. The permutation is
a function too and no table: a share of a batch costs the same for 10⁹ rows as for 10⁴.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from pipeline.noise import hashed, mix, permuted

__all__ = ["Draw", "Order", "Pass", "Windows", "in_rounds"]


class Draw(NamedTuple):
    """A rank's share of a batch: rows, which are mirrored, which caption in [0, 1), weights."""

    rows: np.ndarray
    flip: np.ndarray
    caption: np.ndarray
    weight: np.ndarray


class Order(Sampler[Draw]):
    """The training order from batch number `start()` on, without end.

    A row's flip and caption are functions of (seed, place in the stream).

    Arguments:
        rows: The number N of rows.
        batch_size: The size G of a global batch.
        seed: What decides the permutations.
        start: Tells how many batches were seen; asked when the first batch is wanted.
        rank: Which share of each global batch to take.
        world: The number of shares.
        flip: Whether half of the rows are mirrored.
        again: So many batches, the first ones, are all there are: they come again and again.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int = 0,
        start: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world: int = 1,
        flip: bool = False,
        again: int | None = None,
    ) -> None:
        self.rows, self.batch_size, self.seed, self.start = rows, batch_size, seed, start
        self.rank, self.share, self.flip = rank, batch_size // world, flip
        self.again = again

    def __len__(self) -> int:
        """How many batches Lightning calls an epoch."""
        return max(1, self.rows // self.batch_size)

    def __iter__(self) -> Iterator[Draw]:
        yield from map(self.draw, itertools.count(self.start()))

    def draw(self, batch: int) -> Draw:
        batch = batch % self.again if self.again else batch
        first = batch * self.batch_size + self.rank * self.share
        stream = np.arange(first, first + self.share)
        epochs, places = np.divmod(stream, self.rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self.permuted(places[here], epoch)
        flip = hashed(stream, mix("flip", self.seed)) < 2**63 if self.flip else stream < 0
        caption = (hashed(stream, mix("caption", self.seed)) >> np.uint64(11)) * 2.0**-53
        return Draw(rows, flip, caption, np.ones(self.share, np.float32))

    def permuted(self, places: np.ndarray, epoch: int) -> np.ndarray:
        """The rows at these places of the permutation of an epoch."""
        return permuted(places, self.rows, "order", self.seed, epoch)


class Windows(Order):
    r"""The training order of rows that lie in files, a few of which are read at a time.

    The files of an epoch come in the order of a permutation, and so many of them, a window, have
    their rows permuted together. Every row comes once in an epoch, and the order is a function of
    (seed, batches seen) as before; but rows of two windows are never near each other.

    Arguments:
        counts: The number of rows of each file.
        window: The number of files in a window.
        batch_size: As of `Order`, as all others.
        how: The rest of them.
    """

    def __init__(self, counts: Sequence[int], window: int, batch_size: int, **how: Any) -> None:
        super().__init__(sum(counts), batch_size, **how)
        self.counts, self.window = np.asarray(counts), window

    def permuted(self, places: np.ndarray, epoch: int) -> np.ndarray:
        files = len(self.counts)
        order = permuted(np.arange(files), files, "files", self.seed, epoch)
        ends = self.counts[order].cumsum()
        edges = np.append(ends[self.window - 1 : -1 : self.window], ends[-1])
        for w in np.unique(of := np.searchsorted(edges, places, "right")).tolist():
            first = edges[w - 1] if w else 0
            key = "window", self.seed, epoch, w
            here = of == w
            places[here] = first + permuted(places[here] - first, int(edges[w] - first), *key)
        k = np.searchsorted(ends, places, "right")
        # place in the order of this epoch → place in the files' own order
        within = places - (ends[k] - self.counts[order[k]])
        return (self.counts.cumsum() - self.counts)[order[k]] + within


class Pass(Sampler[Draw]):
    """One pass in order, first captions; the last batch wraps around with weight 0, for all."""

    def __init__(self, rows: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.rank, self.share = rank, batch_size // world

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[Draw]:
        for batch in range(len(self)):
            first = batch * self.batch_size + self.rank * self.share
            places = np.arange(first, first + self.share)
            weight = (places < self.rows).astype(np.float32)
            unmoved = np.zeros(self.share, bool), np.zeros(self.share)
            yield Draw(places % self.rows, *unmoved, weight)


def in_rounds(total: int, number: int, order: np.random.Generator) -> np.ndarray:
    """So many of `total` in random order, each once before any twice."""
    rounds = [order.permutation(total) for _ in range(-(-number // total))]
    return np.concatenate(rounds)[:number]
