"""Each distinct value is embedded once, and kept on disk between runs.

A data set repeats its captions, and an encoder is far dearer than a look-up: what training needs
is a table of the K distinct embeddings and, per example, an index into it. The file's name is a
digest of the conditioning and of the values, so a stale table cannot be read.
"""

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.conditioning.base import Conditioning

__all__ = ["embed_distinct"]


def embed_distinct(
    conditioning: Conditioning,
    values: Sequence[Any] | Tensor,
    cache_dir: str | Path | None,
) -> tuple[Tensor, Tensor]:
    """The embeddings of the K distinct values among N, in the order they are first seen.

    Processes may call this at once: a file appears whole or not at all, and whichever is written
    last holds the same. A file that cannot be read is made anew, one that cannot be written is
    done without, each with a warning.

    Arguments:
        conditioning: What embeds.
        values: N prompts, classes or vectors (a sequence, an array or a tensor).
        cache_dir: The folder of cached tables; None keeps nothing.

    Returns:
        The table, float32 with shape (K, L, E), and the index of each value in it, int64 (N,).
    """
    keys = [_hashable(value) for value in values]
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


def _hashable(value: Any) -> Any:
    if hasattr(value, "tolist"):  # an array, a tensor or one of their numbers
        value = value.tolist()
    return tuple(value) if isinstance(value, list) else value


def _path(conditioning: Conditioning, distinct: list[Any], folder: Path) -> Path:
    key = json.dumps([conditioning.fingerprint(), distinct])
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def _read(path: Path, rows: int) -> Tensor | None:
    try:
        if not path.exists():
            return None
        table = load_file(path)["table"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        reason = f"it holds {table.dtype} of shape {tuple(table.shape)}"
        if table.ndim == 3 and len(table) == rows and table.dtype == torch.float32:
            return table
    warnings.warn(f"The cached embeddings {path} are made anew ({reason}).", stacklevel=3)
    return None


def _write(path: Path, table: Tensor) -> None:
    whole = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"table": table.contiguous()}, whole)
        os.replace(whole, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            whole.unlink(missing_ok=True)
        warnings.warn(f"The embeddings could not be kept in {path} ({error}).", stacklevel=3)
