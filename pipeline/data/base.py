r"""Rows → batches, the same batches on every machine.

A source is N rows x and, where the model is conditional, one value (prompt, class, vector) per
row. Pictures are decoded once to a uint8 memory map and every *distinct* value is embedded once;
the loader then only gathers rows and indices, and x in [-1, 1] and u are made on the device.

**Order.** The training stream is the endless concatenation of permutations: row j of the stream is
place :math:`j \bmod N` of permutation :math:`\pi(\text{seed}, \lfloor j / N \rfloor)`, and global
batch b is rows :math:`[bG, (b + 1)G)` of the stream. Rank r of W takes the r-th of W equal parts
of it. Nothing is dropped, N < G is no special case, and the order is a function of (seed, batches
seen): a resumed run needs no loader state, and W devices see what one would.
"""

import itertools
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.conditioning.base import Conditioning
from pipeline.errors import UserError

__all__ = ["Batch", "DataModule", "Order", "Pass", "Rows", "Source"]


class Batch(NamedTuple):
    """What the model sees.

    Arguments:
        x: Clean data in [-1, 1], with shape :math:`(B, *)`.
        u: Its condition, with shape :math:`(B, L, E)`, or None. L is the longest of the whole data
            set, so shapes are static.
        u_null: The null condition, with shape :math:`(1, L_0, E)`, or None.
        weight: 1, or 0 for the padding rows of the last validation batch, with shape :math:`(B,)`.
    """

    x: Tensor
    u: Tensor | None
    u_null: Tensor | None
    weight: Tensor


class Source(NamedTuple):
    """N rows: x with shape :math:`(N, *)`, uint8 or float32, in memory or mapped, and one value
    per row, or None.
    """

    x: np.ndarray
    values: Sequence | None


class Draw(NamedTuple):
    """One rank's share of a global batch: which rows, which of them mirrored, what each weighs."""

    rows: np.ndarray
    flip: np.ndarray
    weight: np.ndarray


class Raw(NamedTuple):
    """A batch as the loader yields it; u is int64 indices into the table (B,), or the embeddings
    themselves (B, L, E).
    """

    x: Tensor
    u: Tensor | None
    flip: Tensor
    weight: Tensor


class Order(Sampler[Draw]):
    """The training order from batch number `start()` on, without end.

    A row's flip comes from the generator of its permutation, so it too is a function of (seed,
    batches seen, place).

    Arguments:
        rows: The number N of rows.
        batch_size: The size G of a global batch.
        seed: What decides the permutations.
        start: Tells how many batches were seen; asked when the first batch is wanted.
        rank: Which share of each global batch to take.
        world: The number of shares.
        flip: Whether half of the rows are mirrored.
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
    ) -> None:
        self.rows, self.batch_size, self.seed, self.start = rows, batch_size, seed, start
        self.rank, self.share, self.flip = rank, batch_size // world, flip
        self._epoch = -1

    def __len__(self) -> int:
        """How many batches Lightning calls an epoch."""
        return max(1, self.rows // self.batch_size)

    def __iter__(self) -> Iterator[Draw]:
        yield from map(self.draw, itertools.count(self.start()))

    def draw(self, batch: int) -> Draw:
        first = batch * self.batch_size + self.rank * self.share
        epochs, places = np.divmod(np.arange(first, first + self.share), self.rows)
        rows, flip = np.empty_like(places), np.zeros(self.share, bool)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            permutation, mirrored = self.permutation(int(epoch))
            rows[here], flip[here] = permutation[places[here]], mirrored[places[here]]
        return Draw(rows, flip & self.flip, np.ones(self.share, np.float32))

    def permutation(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch != self._epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._now = generator.permutation(self.rows), generator.random(self.rows) < 0.5
            self._epoch = epoch
        return self._now


class Pass(Sampler[Draw]):
    """One pass in fixed order; the last global batch wraps around, with weight 0, so every rank
    makes equal calls.
    """

    def __init__(self, rows: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.rows, self.batch_size, self.rank, self.share = (
            rows,
            batch_size,
            rank,
            batch_size // world,
        )

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[Draw]:
        for batch in range(len(self)):
            first = batch * self.batch_size + self.rank * self.share
            places = np.arange(first, first + self.share)
            weight = (places < self.rows).astype(np.float32)
            yield Draw(places % self.rows, np.zeros(self.share, bool), weight)


class Rows(Dataset):
    """Gathers a whole draw at once: no Python work per row.

    Arguments:
        x: The rows, with shape :math:`(N, *)`.
        index: The row of the table that each x is conditioned on, with shape :math:`(N,)`, or
            None.
        table: The embeddings, with shape :math:`(K, L, E)`, if they are to be gathered here and
            not on the device.
    """

    def __init__(
        self, x: np.ndarray, index: Tensor | None = None, table: Tensor | None = None
    ) -> None:
        self.x, self.index, self.table = x, index, table

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, draw: Draw) -> Raw:
        rows = torch.from_numpy(draw.rows)
        u = None if self.index is None else self.index[rows]
        if u is not None and self.table is not None:
            u = self.table[u]
        x = torch.from_numpy(np.asarray(self.x[draw.rows]))
        return Raw(x, u, torch.from_numpy(draw.flip), torch.from_numpy(draw.weight))

    def __getstate__(self) -> dict[str, Any]:
        # pickling a memory map copies the whole of it: a spawned worker is told the file instead
        mapped = isinstance(self.x, np.memmap) and str(self.x.filename).endswith(".npy")
        return self.__dict__ | ({"x": str(self.x.filename)} if mapped else {})  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        x = state["x"]
        self.__dict__ |= state | ({"x": np.load(x, mmap_mode="r")} if isinstance(x, str) else {})


class Loader(DataLoader):
    """A loader with nothing to remember.

    Lightning calls a loader resumable if it has these two methods. Ours is, because the order is a
    function of the batches seen, which Lightning's own progress counts.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def identity(raw: Raw) -> Raw:
    return raw


class DataModule(L.LightningDataModule):
    """Batches of (x, u) for Lightning; a subclass says what the rows are.

    Arguments:
        conditioning: What turns a row's value into u, or None for an unconditional model.
        batch_size: The size of a global batch: all devices together.
        seed: What decides the order, and what a subclass draws.
        workers: Loader processes. Gathering rows takes microseconds, so 0 is right for all but a
            slow file system.
        cache_dir: Where decoded pictures and embeddings are kept; by default
            `~/.cache/conditional-pipeline`.
        table_gib: Up to this size, the table of distinct embeddings is moved to the device; above,
            the loader gathers from it.
    """

    splits = ("train", "val")
    flip = False

    def __init__(
        self,
        conditioning: Conditioning | None,
        batch_size: int = 32,
        seed: int = 0,
        workers: int = 0,
        cache_dir: str | None = None,
        table_gib: float = 1.0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self.conditioning, self.batch_size, self.seed, self.workers = (
            conditioning,
            batch_size,
            seed,
            workers,
        )
        self.cache = Path(cache_dir).expanduser() if cache_dir else default_cache()
        self.table_gib = table_gib
        self._rows: dict[str, Source] = {}
        self._table: Tensor | None = None
        self._index: dict[str, Tensor] = {}
        self._on_device: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of one x: (C, H, W) or (D,)."""

    @abstractmethod
    def source(self, split: str) -> Source:
        """The rows of a split; made and cached at the first call."""

    def rows(self, split: str) -> Source:
        if split not in self._rows:
            self._rows[split] = self.source(split)
        return self._rows[split]

    def prepare_data(self) -> None:
        """Decodes and embeds, once per node."""
        for split in self.splits:
            self.rows(split)
        self.embed()

    def setup(self, stage: str | None = None) -> None:
        """Opens what `prepare_data` made."""
        for split in self.splits:
            self.rows(split)
        if self._table is None:
            self.embed()

    def embed(self) -> None:
        """One table (K, L, E) for all splits, and every row's index into it."""
        if self.conditioning is None:
            return
        from pipeline.conditioning import embed_distinct

        values = [self.rows(split).values for split in self.splits]
        if any(of_split is None for of_split in values):
            raise UserError(
                "These rows carry no value to condition on; set data.conditioning to null."
            )
        lengths = [len(of_split) for of_split in values]  # type: ignore[arg-type]
        every = list(itertools.chain(*values))  # type: ignore[arg-type]
        self._table, index = embed_distinct(self.conditioning, every, self.cache / "embeddings")
        self._index = dict(zip(self.splits, index.split(lengths), strict=True))

    def train_dataloader(self) -> Loader:
        rank, world = self.place()
        rows = len(self.rows("train").x)
        return self.loader(
            "train", Order(rows, self.batch_size, self.seed, self.seen, rank, world, self.flip)
        )

    def val_dataloader(self) -> Loader:
        return self.loader("val", Pass(len(self.rows("val").x), self.batch_size, *self.place()))

    def loader(self, split: str, order: Sampler[Draw]) -> Loader:
        # gathering takes microseconds: Lightning's advice to add processes would slow it down
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        rows = Rows(
            self.rows(split).x, self._index.get(split), None if self.fits_device() else self._table
        )
        return Loader(
            rows,
            batch_sampler=order,  # type: ignore[arg-type]
            collate_fn=identity,  # type: ignore[arg-type]
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def seen(self) -> int:
        """Training batches seen by the run, across epochs and restarts."""
        if self.trainer is None:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore

    def place(self) -> tuple[int, int]:
        """This process's rank among the W that share a global batch, and W."""
        shares = self.trainer and self.trainer.distributed_sampler_kwargs
        rank, world = (shares["rank"], shares["num_replicas"]) if shares else (0, 1)
        if self.batch_size % world:
            raise UserError(
                f"data.batch_size is {self.batch_size}, the size of a global batch, which {world} "
                f"devices cannot share equally; make it a multiple of {world}."
            )
        connector = self.trainer and self.trainer._accelerator_connector
        if world > 1 and connector and connector.use_distributed_sampler:
            raise UserError(
                "The data module shares batches among devices by itself; set "
                "trainer.use_distributed_sampler to false."
            )
        return rank, world

    def fits_device(self) -> bool:
        return self._table is None or self._table.nbytes <= self.table_gib * 2**30

    def conditions(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The table (None if the loader gathers) and the null condition, moved there once."""
        if self.conditioning is None:
            return None, None
        if device not in self._on_device:
            table = self._table if self.fits_device() else None
            null = self.conditioning.null().to(device)
            self._on_device[device] = None if table is None else table.to(device), null
        return self._on_device[device]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """uint8 → [-1, 1] and index → u, on the device and without waiting for it."""
        if not isinstance(batch, Raw):
            return batch
        x, u, flip, weight = batch
        if x.dtype == torch.uint8:
            x = x.float() / 127.5 - 1
        if self.flip:
            x = torch.where(flip.reshape(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)
        table, u_null = self.conditions(x.device)
        if u is not None and table is not None:
            u = table[u]
        return Batch(x, u, u_null, weight)


def default_cache() -> Path:
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "conditional-pipeline"
    )
