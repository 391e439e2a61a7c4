"""Files: written whole or not at all, known by a digest, or found in an installed package."""

import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.errors import UserError

__all__ = [
    "cache_folder",
    "check_writable",
    "configuration",
    "digest",
    "fresh",
    "model_folder",
    "new_folder",
]
__all__ += ["packaged", "sha256", "whole"]


@contextmanager
def whole(path: str | Path, alone: bool = False) -> Iterator[Path]:
    """A place beside a file to write to. It becomes the file when all is written and on the disk;
    on an error nothing is left, and the file is as it was.

    Processes may do this at once: whichever ends last is kept.

    Arguments:
        path: The file; its folder is made.
        alone: Whether no other process may be writing it: then what one that was killed has left
            of it is removed.

    Raises:
        OSError: The system refuses it, as a full disk does, whatever the writer makes of that.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    for left in path.parent.glob(f"{path.name}.*.part") if alone else ():
        left.unlink(missing_ok=True)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except UserError:
        raise
    except Exception as error:
        if (code := refusal(error)) is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def refusal(error: BaseException | None) -> int | None:
    """The number of the system's error behind another: torch's context, safetensors' words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if said := re.search(r"os error (\d+)", str(error)):
            return int(said[1])
        error = error.__cause__ or error.__context__
    return None


def configuration(path: Path) -> Path:
    """A path in conf/: where it is here, else in the conf/ that came with the package, which lies
    in it when it is installed and beside it in the repository.
    """
    if path.parts[:1] != ("conf",) or path.exists():
        return path
    places = (folder / path for folder in Path(__file__).parents[:2])
    return next((place for place in places if place.exists()), path)


def digest(*said: object) -> str:
    """The sha256 of plain data, in hexadecimal."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def sha256(*files: Path) -> str:
    """The sha256 of files one after the other, in hexadecimal."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                found.update(block)
    return found.hexdigest()


@functools.cache
def packaged(module: str, name: str, expected: str, requirement: str, otherwise: str) -> Path:
    """A file of weights in an installed package, which is not imported; its sha256 is checked once
    a process. `requirement` is the package as pip knows it, `otherwise` what one can do without.

    Raises:
        UserError: The package is not installed, or the file is another.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        lacks = f"The package {requirement} is needed and not installed"
        raise UserError(f"{lacks}; run `make setup`, or {otherwise}.")
    file = Path(spec.origin).parent / name
    if not file.is_file() or sha256(file) != expected:
        raise UserError(
            f"{file} is not there or does not hold the weights of {requirement} (their sha256 "
            f"begins with {expected[:16]}); reinstall {requirement}, as `make setup` does."
        )
    return file


def model_folder(
    name: str, files: Sequence[str], lacks: Callable[[Path], list[str]], what: str, example: str
) -> Path:
    """The folder of a `transformers` model: one here, or one of the Hugging Face hub, from its
    local cache where it is whole there. `files` are patterns of what is fetched, and `lacks` says
    what a folder lacks; `what` is looked for, and `example` could be given, in a sentence.

    Raises:
        UserError: It is not there, or lacks something.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or name.startswith((".", "~")):
            raise UserError(f"{what} {name!r} is not a folder; give {example}, or a hub name.")
        folder = from_hub(name, files, lacks, f"{what} {name!r} was not found: {example}")
    if missing := lacks(folder):
        names = sorted(file.name for file in folder.iterdir())
        listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if names[12:] else "")
        raise UserError(
            f"The model in {folder} lacks {' and '.join(missing)}: it holds "
            f"{listed or 'nothing'}; save all of it there with save_pretrained."
        )
    return folder


def from_hub(
    name: str, files: Sequence[str], lacks: Callable[[Path], list[str]], sentence: str
) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    patterns = list(files)
    with suppress(Exception):  # not cached, or in part: whatever the reason, it is to be fetched
        cached = snapshot_download(name, allow_patterns=patterns, local_files_only=True)
        if not lacks(Path(cached)):
            return Path(cached)
    try:
        HfApi().model_info(name, timeout=10)  # the download itself can wait forever for an answer
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # HTTP, connection, offline mode, name: each has its own family
        reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        raise UserError(
            f"{sentence}, or a Hugging Face hub name that is cached or can be reached, was "
            f"expected ({reason})."
        ) from error


def cache_folder() -> Path:
    """`~/.cache/conditional-pipeline`, or as `XDG_CACHE_HOME` says: what can be made again."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "conditional-pipeline"


def check_writable(folder: Path, out: object) -> None:
    """Make a folder where there is none.

    Raises:
        UserError: Files cannot be made in it, which `--out` asks for.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".{uuid.uuid4().hex}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written to: {error.strerror}; name another folder."
        ) from error


@contextmanager
def new_folder(out: str | None, results: Sequence[str]) -> Iterator[Path]:
    """A folder for results, which can be written to, holds none of before, and is no other
    process's as long as this one lives; where nothing comes of it, it is not left behind.

    Arguments:
        out: The folder; by default a new one, `outputs/TIME`.
        results: Patterns of the files that will be written.

    Raises:
        UserError: It cannot be written to, holds results, or is being written to.
    """
    if out is not None and (not out.strip() or "\0" in out):
        raise UserError(f"--out is {out!r}, which names no folder; name one.")
    folder = Path(out or f"outputs/{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    try:
        made = [f for f in (folder, *folder.parents) if not f.exists()]
    except OSError as error:  # such as a name that is too long
        raise UserError(
            f"--out {out} cannot be a folder: {error.strerror}; name another."
        ) from error
    with ExitStack() as held:
        held.callback(_remove, made)
        check_writable(folder if out else folder.parent, folder)
        if out is None:
            named, folder = folder, fresh(folder, "-")
            made[:] = [folder, *(f for f in made if f != named)]
        opened = os.open(folder, os.O_RDONLY)
        held.callback(os.close, opened)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {folder} is being written to by another process; name another folder."
            ) from None
        except OSError:  # a file system without locks
            pass
        if any(next(folder.glob(pattern), None) for pattern in results):
            raise UserError(
                f"--out {folder} holds results already; name another folder, so that none is lost."
            )
        yield folder


def fresh(folder: Path, between: str) -> Path:
    """A folder made anew, of this name or, where one is there, with a number behind it."""
    names = (folder.with_name(f"{folder.name}{between}{k}") for k in itertools.count(2))
    for one in itertools.chain([folder], names):
        with suppress(FileExistsError):
            one.mkdir(parents=True)
            return one
    raise AssertionError  # the count has no end


def _remove(folders: list[Path]) -> None:
    """Remove folders, from the innermost on, as long as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
