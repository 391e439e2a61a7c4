"""The reference of a data set, made once and found again.

A reference is known by its content. Its file says the sha256 of the pixels, so that it can be
taken to another machine, and cannot be used when the data, the size of the pictures or the
features have changed since.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pipeline.data import DataModule
from pipeline.errors import UserError
from pipeline.evaluation.features import Features
from pipeline.evaluation.statistics import Statistics
from pipeline.files import digest, whole

__all__ = ["Reference", "digest_of", "reference_of"]

VERSION = 1  # of what a reference holds
SEAL = hashlib.sha256().digest_size  # bytes; see `pipeline.data.pictures.seal`
KEPT = 10_000  # pictures whose features are kept one by one


class Reference(NamedTuple):
    """What generated pictures are compared with: the statistics of a data set, and some of its
    features for the distances that need them one by one.

    Arguments:
        statistics: Of all N pictures.
        features: Features of K of them, float32, with shape :math:`(K, D)`.
        rows: Which these are, ascending, int64, with shape :math:`(K,)`.
        about: What decides all this, as names and words: the data's digest, the features'
            fingerprint, …
    """

    statistics: Statistics
    features: Tensor
    rows: Tensor
    about: dict[str, str]

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all; `about` is its metadata."""
        tensors = {
            "n": torch.tensor(self.statistics.n),
            "mean": self.statistics.mean.cpu(),
            "scatter": self.statistics.scatter.cpu(),
            "features": self.features.float().cpu().contiguous(),
            "rows": self.rows.cpu(),
        }
        try:
            with whole(path) as part:
                save_file(tensors, part, metadata=self.about)
        except (OSError, SafetensorError) as error:
            raise UserError(f"The reference cannot be written to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path, about: dict[str, str]) -> "Reference":
        """Reads a file written by :meth:`save`, if it is about what is asked for.

        Arguments:
            about: What has to be the same in its metadata; further entries of it may be anything.

        Raises:
            UserError: It is another kind of file or cut short, or it is about something else.
        """
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
                for key, value in about.items():
                    if told.get(key) != value:
                        raise UserError(
                            f"The reference {path} is about {key} {told.get(key)!r}, and "
                            f"{value!r} is asked for; make one with `python -m pipeline "
                            "reference`."
                        )
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            statistics = Statistics(len(tensors["mean"]))
            statistics.n = int(tensors["n"])
            statistics.mean, statistics.scatter = tensors["mean"], tensors["scatter"]
            return cls(statistics, tensors["features"], tensors["rows"], told)
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"{path} cannot be read as a reference ({json.dumps(str(error)[:100])}); it may "
                "be cut short or another kind of file."
            ) from error


def reference_of(
    data: DataModule,
    split: str,
    features: Features,
    number: int | None = None,
    batch_size: int = 64,
    path: str | Path | None = None,
) -> tuple[Reference, Path]:
    """The reference of a split, read where it was made before.

    Arguments:
        split: `train`, `val`, or another that the data module knows.
        number: Take so many pictures, drawn at random by a fixed seed; all by default.
        path: The file; by default one in the cache, named after all that decides it.

    Raises:
        UserError: The data are not pictures or too few, or the file is about something else.
    """
    x = data.rows(split).x
    if not data.codec.pictures:
        raise UserError(
            f"{type(data).__name__} has rows of {x.dtype} with shape {x.shape[1:]}; a reference "
            "is made of pictures."
        )
    number = len(x) if number is None else number
    if not 2 <= number <= len(x):
        has = f"split {split!r} has {len(x)} pictures"
        raise UserError(f"--number is {number}; {has}, and at least 2 are needed.")
    about = describe(x, split, features, number)
    if path is None:
        path = data.cache / "references" / f"{digest(about)[:32]}.safetensors"
    path = Path(path)
    if path.exists():
        return Reference.load(path, about), path
    found = make(x, features, number, batch_size, about)
    found.save(path)
    return found, path


def digest_of(x: np.ndarray) -> str:
    """The sha256 of pictures and their shape, or what they say instead. That of a sealed map is
    kept beside it, with the seal.
    """
    if hasattr(x, "digest"):
        return x.digest  # type: ignore[attr-defined]
    if isinstance(x, np.memmap) and (mark := seal_of(x)):
        kept = Path(str(x.filename)).with_suffix(".sha256")
        said = kept.read_text().split() if kept.is_file() else []
        if len(said) != 2 or said[0] != mark:
            said = [mark, digest_of(np.asarray(x))]
            with suppress(OSError), whole(kept) as part:  # or the cache is only read
                part.write_text(" ".join(said))
        return said[1]
    pixels = hashlib.sha256(str(x.shape).encode())
    for start in range(0, len(x), 1024):
        pixels.update(x[start : start + 1024].tobytes())
    return pixels.hexdigest()


def seal_of(x: np.memmap) -> str | None:
    """The seal at the end of a map's file, if these are all of its rows."""
    file = Path(str(x.filename))
    if file.stat().st_size != x.offset + x.nbytes + SEAL:
        return None
    with file.open("rb") as opened:
        opened.seek(-SEAL, 2)
        return opened.read().hex()


def describe(x: np.ndarray, split: str, features: Features, number: int) -> dict[str, str]:
    """All that decides a reference."""
    return {
        "version": str(VERSION),
        "data": digest_of(x),
        "split": split,
        "pictures": f"{number} of {len(x)} pictures of {' x '.join(map(str, x.shape[1:]))}",
        "features": features.name,
        "protocol": features.protocol,
        "fingerprint": features.fingerprint(),
    }


def make(
    x: np.ndarray, features: Features, number: int, batch_size: int, about: dict[str, str]
) -> Reference:
    """Reads pictures in an order drawn by a fixed seed, and keeps the first features."""
    order = np.random.default_rng(0).permutation(len(x))[:number]
    order = np.concatenate([np.sort(some) for some in np.split(order, [KEPT])])
    kept, statistics = [], Statistics(features.dim, features.device)
    with tqdm(total=number, desc=features.name, unit=" pictures", disable=None) as bar:
        for start in range(0, number, batch_size):
            found = features(torch.as_tensor(x[order[start : start + batch_size]]))
            statistics.update(found)
            kept.append(found[: max(KEPT - start, 0)].cpu())
            bar.update(len(found))
    rows = torch.as_tensor(order[:KEPT].astype(np.int64))
    return Reference(statistics, torch.cat(kept), rows, about)
