"""Rows → batches.

A source is N rows and, where the model is conditional, one value (prompt, class, vector) per row.
Pictures are decoded once to a uint8 memory map and every *distinct* value is embedded once; the
loader then only gathers rows and indices, and x and u are made of them on the device.
"""

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.building import Part
from pipeline.codec import Codec
from pipeline.condition import Condition, U, mirror
from pipeline.conditioning import Conditioning, Given, Picture, Table, embed_distinct, hashable
from pipeline.data.order import Draw, Order, Pass, in_rounds
from pipeline.distributed import share
from pipeline.errors import UserError
from pipeline.files import cache_folder
from pipeline.noise import Noise, PictureNoise

__all__ = ["Batch", "DataModule", "Raw", "Rows", "Source"]


class Batch(NamedTuple):
    """What the model sees.

    Arguments:
        x: Clean data in [-1, 1], with shape :math:`(B, *)`.
        u: Its condition, or None. Tokens are as many as the longest of the whole data set has, so
            shapes are static.
        u_null: The null condition, of one row, or None.
        weight: 1, or 0 for the padding rows of the last validation batch, with shape :math:`(B,)`.
    """

    x: Tensor
    u: U
    u_null: U
    weight: Tensor


class Source(NamedTuple):
    """N rows: x with shape :math:`(N, *)`, uint8 or float32, in memory or mapped, and one value
    per row, or None.

    A row may have more values (several captions of a picture): one of all is drawn each time that
    it is trained on, and `values` are the first of each. `given` are the others of pairs, as x.
    """

    x: np.ndarray
    values: Sequence | None
    more: Sequence[Sequence] | None = None
    given: np.ndarray | None = None

    def every(self) -> list[tuple]:
        """All the values of each row."""
        more = self.more or [()] * len(self.x)
        return [(first, *rest) for first, rest in zip(self.values or (), more, strict=True)]


class Index(NamedTuple):
    """The rows of the table that belong to row i of x: `rows[starts[i] : starts[i + 1]]`."""

    rows: Tensor
    starts: Tensor

    def __call__(self, x: np.ndarray, which: np.ndarray) -> Tensor:
        """The row of the table for each row of x, chosen by a number in [0, 1)."""
        first, end = self.starts[x], self.starts[x + 1]
        return self.rows[first + (torch.from_numpy(which) * (end - first)).long()]


class Raw(NamedTuple):
    """A batch as the loader yields it: u is indices into a table (B,), conditions, or values."""

    x: Tensor
    u: Tensor | U | list[str]
    flip: Tensor
    weight: Tensor
    given: Tensor | None = None


class Rows(Dataset):
    """Gathers a whole draw at once: no Python work per row.

    Arguments:
        x: The rows, with shape :math:`(N, *)`.
        index: The rows of the table that each x is conditioned on, or None.
        table: The K distinct conditions, if they are to be gathered here and not on the device.
        values: In place of both, what each x is conditioned on.
        given: Of pairs, the other pictures.
    """

    def __init__(
        self,
        x: np.ndarray,
        index: Index | None = None,
        table: Table | None = None,
        values: Sequence | None = None,
        given: np.ndarray | None = None,
    ) -> None:
        self.x, self.index, self.table, self.values = x, index, table, values
        self.given = given

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, draw: Draw) -> Raw:
        x = torch.from_numpy(np.asarray(self.x[draw.rows]))
        index = None if self.index is None else self.index(draw.rows, draw.caption)
        u: Any = index if index is None or self.table is None else self.table[index]
        if self.values is not None:
            u = [self.values[k] for k in draw.rows.tolist()]
        flip, weight = torch.from_numpy(draw.flip), torch.from_numpy(draw.weight)
        other = None if self.given is None else torch.from_numpy(self.given[draw.rows])
        return Raw(x, u, flip, weight, other)

    def __getstate__(self) -> dict[str, Any]:
        # pickling a memory map copies the whole of it: a spawned worker is told the file instead
        maps = {k: str(v.filename) for k, v in vars(self).items() if isinstance(v, np.memmap)}
        return vars(self) | {k: file for k, file in maps.items() if file.endswith(".npy")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        files = {k: np.load(v, mmap_mode="r") for k, v in state.items() if isinstance(v, str)}
        self.__dict__ |= state | files


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


class DataModule(Part, L.LightningDataModule, ABC):
    """Batches of (x, u) for Lightning; a subclass says what the rows are.

    Arguments:
        codec: What makes x of a row.
        conditioning: What turns a row's value into u, or None for an unconditional model.
        batch_size: The size of a global batch: all devices together.
        seed: What decides the order, the flips, and what a subclass draws.
        workers: Loader processes. Gathering rows takes microseconds, so 0 is right for all but a
            slow file system.
        cache_dir: Where decoded pictures and embeddings are kept; by default
            `~/.cache/conditional-pipeline`.
        table_gib: Up to this size, the table of distinct embeddings is moved to the device; above,
            the loader gathers from the disk.
    """

    splits = ("train", "val")
    flip = False
    condition_image: str | None = None  # of pairs, the column of the other pictures

    def __init__(
        self,
        codec: Codec,
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
        self.codec, self.conditioning = codec, conditioning
        # what makes planes of u, of pictures, and what makes u, or its tokens, of a row's value
        self.picture = conditioning if isinstance(conditioning, Picture) else None
        self.prompt = conditioning if self.picture is None else self.picture.prompt
        if self.picture is not None:
            self.picture.see(codec.shape)
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.cache = Path(cache_dir).expanduser() if cache_dir else cache_folder()
        self.table_gib = table_gib
        self._rows: dict[str, Source] = {}
        self._table: Table | None = None
        self._index: dict[str, Index] = {}
        self._on_device: dict[torch.device, tuple[U, U]] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one x."""
        return self.codec.shape

    @abstractmethod
    def source(self, split: str) -> Source:
        """The rows of a split; made and cached at the first call."""

    def rows(self, split: str, **how: Any) -> Source:
        if split not in self._rows:
            self._rows[split] = self.source(split, **how)
        return self._rows[split]

    def values(self, split: str) -> Sequence | None:
        """What each row of a split is conditioned on."""
        return self.rows(split).values

    def more(self, split: str) -> Sequence[Sequence] | None:
        """What else each row may be conditioned on instead; None where each has one value."""
        return self.rows(split).more

    def names(self) -> list[str]:
        """The names of the distinct values that rows are conditioned on."""
        first = [self.values(split) or () for split in self.splits]
        rest = [values for split in self.splits for values in self.more(split) or ()]
        return sorted({str(value) for value in itertools.chain(*first, *rest)})

    def learn(self) -> None:
        """Tells the conditioning what it takes from the data."""
        if (self.condition_image is not None) != getattr(self.picture, "pairs", False):
            raise UserError(
                f"data.condition_image is {self.condition_image!r} and data.conditioning a "
                f"{type(self.conditioning).__name__}: pairs are a column and a `Paired`."
            )
        if self.prompt is not None and self.prompt.open:
            self.prompt.learn(self.names() or self.no_values())

    def no_values(self) -> NoReturn:
        raise UserError(
            "These rows carry no value to condition on; set data.conditioning to null."
        )

    def sizes(self) -> dict[str, int]:
        """The arguments of a network that x and u decide."""
        self.learn()
        u = self.conditioning
        return {"u_dim": u.dim if u else 0, "planes": u.planes if u else 0, **self.codec.sizes}

    def prompts(self, number: int = 16) -> list[Any]:
        """Distinct values of `val` to look at, evenly spaced, each with a row's picture."""
        source, first = self.rows("val"), dict[Any, int]()
        values = [""] if source.values is None else source.values
        alone = self.picture is not None and self.prompt is None
        for row, value in enumerate(range(len(source.x)) if alone else values):
            first.setdefault(hashable(value), row)
        distinct = list(first)
        distinct = distinct[:: max(len(distinct) // number, 1)][:number]
        return self.given(distinct, source, [first[value] for value in distinct])

    def given(self, values: list[Any], source: Source, rows: Any) -> list[Any]:
        """Values, each with the planes of a row, where the model is given a picture."""
        if self.picture is None:
            return values
        pictures = source.x if source.given is None else source.given
        x = self.codec.encode(torch.from_numpy(np.asarray(pictures[rows])))
        planes = self.picture(x, self.picture.known(x, PictureNoise(range(len(x)))))
        prompts = values if self.prompt is not None else [""] * len(values)
        return [Given(*one) for one in zip(prompts, planes, strict=True)]

    def asked(self, number: int) -> np.ndarray:
        """Rows of `val` to ask a model for, in one random order, each once before any twice."""
        return in_rounds(len(self.rows("val").x), number, np.random.default_rng(0))

    def held_out(self, number: int) -> tuple[list[Any], Tensor]:
        """So many values to ask a model for when it is measured, and true rows, each once."""
        source, taken = self.rows("val"), self.asked(number)
        x, values = source.x, source.values
        asked = [""] * number if values is None else [values[k] for k in taken]
        return self.given(asked, source, taken), torch.from_numpy(x[taken[: len(x)]])

    def labelled(self, split: str) -> dict[str, list[str]]:
        """What else is known of each row and may be read back from a picture, label by label."""
        return {}

    def wanted(self, number: int, order: np.random.Generator) -> list[Any] | None:
        """What else to ask a model for, if it can be read back: each has a `caption`."""
        return None

    def prepare_data(self) -> None:
        """Decodes, once per node."""
        for split in self.splits:
            self.rows(split)

    def setup(self, stage: str | None = None) -> None:
        """Opens what `prepare_data` made, and embeds: all processes together."""
        for split in self.splits:
            self.rows(split)
        if self._table is None:
            self.embed()

    def embed(self) -> None:
        """One table for all splits, and every row's index into it."""
        if self.prompt is None:
            return
        sources = [self.rows(split) for split in self.splits]
        if any(source.values is None for source in sources):
            self.no_values()
        self.learn()
        every = [source.every() for source in sources]
        flat = [value for of_split in every for values in of_split for value in values]
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        self.prompt.to(device)
        self._table, index = embed_distinct(self.prompt, flat, self.cache / "embeddings")
        self.prompt.to("cpu")  # the device's memory is for the training
        counts = [torch.tensor([0, *map(len, of_split)]) for of_split in every]
        parts = index.split([int(count.sum()) for count in counts])
        for split, rows, count in zip(self.splits, parts, counts, strict=True):
            self._index[split] = Index(rows, count.cumsum(0))

    def train_dataloader(self) -> Loader:
        rank, world = self.place()
        rows = len(self.rows("train").x)
        order = Order(rows, self.batch_size, self.seed, self.seen, rank, world, self.flip)
        order.again = self.again(len(order))
        return self.loader("train", order)

    def val_dataloader(self) -> Loader:
        return self.loader("val", Pass(len(self.rows("val").x), self.batch_size, *self.place()))

    def loader(self, split: str, order: Sampler[Draw]) -> Loader:
        # gathering takes microseconds: Lightning's advice to add processes would slow it down
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        return Loader(
            self.gathering(split),
            batch_sampler=order,  # type: ignore[arg-type]
            collate_fn=identity,  # type: ignore[arg-type]
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def gathering(self, split: str) -> Rows:
        """What gives a `Raw` batch for a `Draw`."""
        table = None if self.fits_device() else self._table
        source = self.rows(split)
        return Rows(source.x, self._index.get(split), table, given=source.given)

    def seen(self) -> int:
        """Training batches seen by the run, across epochs and restarts."""
        if self.trainer is None:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore

    def again(self, epoch: int) -> int | None:
        """How many batches come again and again, by the trainer's overfitting or limit, if any."""
        if self.trainer is None:
            return None
        limit = self.trainer.limit_train_batches  # overfit_batches sets it too
        count = limit if isinstance(limit, int) else max(1, int(epoch * limit))
        part = count <= epoch if isinstance(limit, int) else limit < 1
        return count if part or self.trainer.overfit_batches else None  # type: ignore

    def place(self) -> tuple[int, int]:
        """This process's rank among the W that share a global batch, and W."""
        rank, world = share(self.trainer)
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

    def conditions(self, device: torch.device) -> tuple[U, U]:
        """The table (None if the loader gathers) and the null condition, moved there once."""
        if self.conditioning is None:
            return None, None
        if device not in self._on_device:
            table = self._table.dense().to(device) if self._table and self.fits_device() else None
            self._on_device[device] = table, self.conditioning.null().to(device)
        return self._on_device[device]

    def noise(self, x: Tensor) -> Noise:
        """What the planes of a batch are drawn with: the same in every validation."""
        n, (rank, world) = len(x), share(self.trainer)
        key = self.seen() if self.trainer is None or self.trainer.training else "val"
        return Noise(self.seed, "planes", key, device=x.device, rows=(rank * n, world * n))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Rows → x and index → u, on the device and without waiting for it."""
        if not isinstance(batch, Raw):
            return batch
        rows, u, flip, weight, given = batch
        x = self.codec.encode(rows)
        table, u_null = self.conditions(x.device)
        if isinstance(u, list):
            assert self.prompt is not None
            u = self.prompt.embed(u).to(x.device)
        elif isinstance(u, Tensor):
            u = None if table is None else table[u]
        if self.picture is not None:
            y = x if given is None else self.codec.encode(given)
            planes = self.picture(y, self.picture.known(y, self.noise(y)))
            u = Condition(None if u is None else u.tokens, planes)
        if self.flip:
            x, u = mirror(x, flip), None if u is None else u.mirrored(flip)
        return Batch(x, u, u_null, weight)
