"""Each distinct value is embedded once, and kept on disk between runs.

A data set repeats its captions, and an encoder is far dearer than a look-up: what training needs
is a table of the K distinct embeddings and, per example, an index into it. The table is written by
shards of 1,024 values as they are made, so that a kill loses one of them; processes that work
together share the shards out among them. A shard holds the tokens of its values one after the
other, without padding, and is read through a memory map: a batch costs what it needs.

The folder's name is a digest of the conditioning and of the values, so a stale table cannot be
read; a checksum in each file is of its name and its numbers, so a changed one is not.
"""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pipeline.condition import Condition
from pipeline.conditioning.base import Conditioning
from pipeline.distributed import barrier, on_machine, place
from pipeline.files import digest, whole

__all__ = ["Table", "embed_distinct", "hashable"]

VERSION = 4  # of what a folder holds
ROWS = 1024  # values of a shard


class Shard(NamedTuple):
    """The conditions of a run of values.

    Arguments:
        lengths: How many tokens each has, int64 (n,).
        tokens: Those of all values, one after the other, float32 (T, E).
        planes: With shape (n, C, H, W).
    """

    lengths: Tensor
    tokens: Tensor | None = None
    planes: Tensor | None = None

    @staticmethod
    def of(u: Condition) -> "Shard":
        """The same without padding, whose tokens are exactly zero."""
        if u.tokens is None:
            return Shard(torch.zeros(len(u), dtype=torch.int64), None, u.planes)
        places = torch.arange(1, u.tokens.shape[1] + 1)
        lengths = ((u.tokens != 0).any(dim=2) * places).amax(dim=1)  # of the last that is not zero
        return Shard(lengths, u.tokens[places <= lengths[:, None]], u.planes)


class Table:
    """The conditions of K distinct values, float32: by row, or all of them.

    Arguments:
        shards: Each with the conditions of 1,024 values, the last with those that are left: its
            file, or itself where it could not be kept.
        opened: The same, opened.
    """

    def __init__(self, shards: Sequence[Path | Shard], opened: Sequence[Shard]) -> None:
        self.shards = shards
        self._open(opened)

    def _open(self, opened: Sequence[Shard]) -> None:
        self.lengths = torch.cat([shard.lengths for shard in opened])
        self.starts = torch.cat([s.lengths.cumsum(0) - s.lengths for s in opened])
        self.longest = max(1, int(self.lengths.max()))  # tokens that a row is padded to
        # as arrays, whose slices cost a microsecond, and those of tensors several
        arrays = [
            {k: p if p is None else p.numpy() for k, p in s._asdict().items()} for s in opened
        ]
        self.opened: list[Any] = [SimpleNamespace(**of) for of in arrays]

    def __getstate__(self) -> dict[str, Any]:  # pickling a memory map copies the whole of it
        return {"shards": self.shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shards = state["shards"]
        self._open([load(s)[0] if isinstance(s, Path) else s for s in self.shards])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """The bytes of all rows, padded."""
        first = self.opened[0]
        tokens = 0 if first.tokens is None else 4 * self.longest * first.tokens.shape[1]
        planes = 0 if first.planes is None else first.planes[0].nbytes
        return len(self) * (tokens + planes)

    def __getitem__(self, rows: Tensor) -> Condition:
        """Some rows, int64 (B,), their tokens padded with zeros to the longest of all rows."""
        first, tokens, planes = self.opened[0], None, None
        if first.tokens is not None:
            tokens = torch.zeros(len(rows), self.longest, first.tokens.shape[1])
        if first.planes is not None:
            planes = torch.empty(len(rows), *first.planes.shape[1:])
        starts, lengths = self.starts[rows].tolist(), self.lengths[rows].tolist()
        for i, (row, start, n) in enumerate(zip(rows.tolist(), starts, lengths, strict=True)):
            here = self.opened[row // ROWS]
            if tokens is not None:
                tokens.numpy()[i, :n] = here.tokens[start : start + n]
            if planes is not None:
                planes.numpy()[i] = here.planes[row % ROWS]
        return Condition(tokens, planes)

    def dense(self) -> Condition:
        """All rows."""
        return self[torch.arange(len(self))]


def embed_distinct(
    conditioning: Conditioning, values: Sequence[Any] | Tensor, cache_dir: str | Path | None
) -> tuple[Table, Tensor]:
    """The embeddings of the K distinct values among N, in the order they are first seen.

    Every process of a group has to call it; each makes its share of what is missing. Groups may
    call this at once: a file appears whole or not at all, and whichever is written last holds the
    same. What cannot be read is made anew, what cannot be written is done without, with a warning.

    Arguments:
        values: N prompts, classes or vectors (a sequence, an array or a tensor).
        cache_dir: The folder of cached tables; None keeps nothing.

    Returns:
        The table of K rows, and the index of each value in it, int64 (N,).
    """
    keys = [hashable(value) for value in values]
    rows = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    index = torch.tensor([rows[key] for key in keys], dtype=torch.int64)
    distinct = list(rows)
    parts = [distinct[k : k + ROWS] for k in range(0, len(distinct), ROWS)]
    files: list[Path | None] = [None] * len(parts)
    if cache_dir is not None:
        name = digest("embeddings", VERSION, conditioning.fingerprint(), distinct)
        files = [Path(cache_dir) / name / f"{k:05d}.safetensors" for k in range(len(parts))]
    sizes = [len(part) for part in parts]
    found = [file and read(file, size) for file, size in zip(files, sizes, strict=True)]
    barrier()  # all have found the same missing
    made: dict[int, Shard] = {}  # what could not be kept
    with tqdm(total=len(distinct), desc="Embedding", disable=len(parts) < 2) as bar:
        bar.update(sum(size for shard, size in zip(found, sizes, strict=True) if shard))
        # shared by all; by those of this machine, where each has a disk of its own; by none, where
        # nothing can be kept
        here, ranks = on_machine()
        for turn, (rank, world) in enumerate((place(), (here, len(ranks)), (0, 1))):
            missing = [k for k, shard in enumerate(found) if shard is None]
            for k in missing[rank::world]:
                shard, file = Shard.of(conditioning.embed(parts[k])), files[k]
                if turn == 2 or file is None or not write(file, shard):
                    made[k] = found[k] = shard
                bar.update(sizes[k])
            barrier()
            for k in missing:
                found[k] = found[k] or (files[k] and read(files[k], sizes[k]))  # type: ignore
    opened: Any = found
    return Table([made.get(k) or file for k, file in enumerate(files)], opened), index  # type: ignore


def hashable(value: Any) -> Any:
    """A value by which it can be looked up: an array or a list as tuples."""
    if hasattr(value, "tolist"):  # an array, a tensor or one of their numbers
        value = value.tolist()
    return tuple(map(hashable, value)) if isinstance(value, list) else value


def load(path: Path) -> tuple[Shard, str | None]:
    """What a file holds, through a memory map, and its checksum."""
    with safe_open(path, "pt") as file:
        parts = {name: file.get_tensor(name) for name in file.keys()}
        return Shard(**parts), (file.metadata() or {}).get("checksum")


def read(path: Path, rows: int) -> Shard | None:
    """A shard of so many rows, None where it is missing or damaged."""
    try:
        if not path.exists():
            return None
        shard, said = load(path)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        if len(shard.lengths) == rows and said == checksum(path, shard):
            return shard
        reason = "its bytes are not those that were written"
    warnings.warn(f"The cached embeddings {path} are made anew ({reason}).", stacklevel=3)
    return None


def write(path: Path, shard: Shard) -> bool:
    """Keep a shard; whether that could be done."""
    parts = {k: x.contiguous() for k, x in shard._asdict().items() if x is not None}
    try:
        with whole(path) as part:
            save_file(parts, part, {"checksum": checksum(path, shard)})
        return True
    except (OSError, SafetensorError) as error:
        warnings.warn(f"The embeddings could not be kept in {path} ({error}).", stacklevel=3)
        return False


def checksum(path: Path, shard: Shard) -> str:
    found = hashlib.sha256(path.name.encode() + path.parent.name.encode())
    for name, part in shard._asdict().items():
        if part is not None:
            found.update(f"{name} {part.dtype} {tuple(part.shape)} ".encode())
            found.update(part.detach().contiguous().numpy().data)
    return found.hexdigest()
