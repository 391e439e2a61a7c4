"""Each distinct value is embedded once, and kept on disk between runs.

A data set repeats its captions, and an encoder is far dearer than a look-up: what training needs
is a table of the K distinct embeddings and, per example, an index into it. The file's name is a
digest of the conditioning and of the values, so a stale table cannot be read; a checksum in it is
of its name and its numbers, so a changed one is not.
"""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.condition import Condition
from pipeline.conditioning.base import Conditioning
from pipeline.files import digest, whole

__all__ = ["embed_distinct", "hashable"]

VERSION = 3  # of what a file holds


def embed_distinct(
    conditioning: Conditioning,
    values: Sequence[Any] | Tensor,
    cache_dir: str | Path | None,
) -> tuple[Condition, Tensor]:
    """The embeddings of the K distinct values among N, in the order they are first seen.

    Processes may call this at once: a file appears whole or not at all, and whichever is written
    last holds the same. A file that cannot be read is made anew, one that cannot be written is
    done without, each with a warning.

    Arguments:
        conditioning: What embeds.
        values: N prompts, classes or vectors (a sequence, an array or a tensor).
        cache_dir: The folder of cached tables; None keeps nothing.

    Returns:
        The table, float32 with K rows, and the index of each value in it, int64 (N,).
    """
    keys = [hashable(value) for value in values]
    place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    index = torch.tensor([place[key] for key in keys], dtype=torch.int64)
    distinct = list(place)
    if cache_dir is None:
        return conditioning.embed(distinct), index
    path = _path(conditioning, distinct, Path(cache_dir))
    table = _read(path, len(distinct))
    if table is None:
        table = conditioning.embed(distinct)
        _write(path, table)
    return table, index


def hashable(value: Any) -> Any:
    """A value by which it can be looked up: an array or a list as tuples."""
    if hasattr(value, "tolist"):  # an array, a tensor or one of their numbers
        value = value.tolist()
    return tuple(map(hashable, value)) if isinstance(value, list) else value


def _path(conditioning: Conditioning, distinct: list[Any], folder: Path) -> Path:
    key = digest("embeddings", VERSION, conditioning.fingerprint(), distinct)
    return folder / f"{key}.safetensors"


def _read(path: Path, rows: int) -> Condition | None:
    try:
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            parts = {name: file.get_tensor(name) for name in file.keys()}
            said = (file.metadata() or {}).get("checksum")
        table = Condition(**parts)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        reason = f"it holds {[(part.dtype, tuple(part.shape)) for part in parts.values()]}"
        if parts and all(
            part.ndim == dims and len(part) == rows and part.dtype == torch.float32
            for part, dims in ((table.tokens, 3), (table.planes, 4))
            if part is not None
        ):
            if said == _checksum(path, parts):
                return table
            reason = "its bytes are not those that were written"
    warnings.warn(f"The cached embeddings {path} are made anew ({reason}).", stacklevel=3)
    return None


def _write(path: Path, table: Condition) -> None:
    made = {"tokens": table.tokens, "planes": table.planes}
    parts = {name: x.cpu().contiguous() for name, x in made.items() if x is not None}
    try:
        with whole(path) as part:
            save_file(parts, part, {"checksum": _checksum(path, parts)})
    except (OSError, SafetensorError) as error:
        warnings.warn(f"The embeddings could not be kept in {path} ({error}).", stacklevel=3)


def _checksum(path: Path, parts: dict[str, Tensor]) -> str:
    found = hashlib.sha256(path.name.encode())
    for name, part in sorted(parts.items()):
        found.update(f"{name} {tuple(part.shape)} ".encode())
        found.update(part.detach().numpy().data)
    return found.hexdigest()
