"""A folder of pictures: which files it holds, and what metadata say of them.

The files are listed here and not by `datasets`, which takes a word such as *train* in a name for a
split, [ ] in a path for a pattern, and the words *null* and *007* of a CSV file for other things.
"""

import csv
import io
import json
import os
import posixpath
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from pipeline.errors import UserError

if TYPE_CHECKING:
    import datasets

__all__ = ["Listing", "canonical", "is_picture", "list_folder", "read_folder", "say"]

STUBS = {"BUFR", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # known to Pillow, but not decoded by it
WORDS = {
    "training": "train",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def canonical(split: str) -> str:
    """One name for all the ways to write a split: `Validation`, `valid` and `dev` are `val`."""
    return WORDS.get(split.lower(), split.lower())


def is_picture(name: str) -> bool:
    Image.init()
    kind = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return kind in Image.OPEN and kind not in STUBS


class Listing(NamedTuple):
    """The files below a folder, by their sorted paths from it: pictures, or what else the noun
    says, metadata, captions of one picture each, others, and what is hidden or linked to again,
    which is not looked into.
    """

    root: Path
    pictures: list[str]
    metadata: list[str]
    captions: list[str]
    others: list[str]
    hidden: list[str]
    again: list[str]
    noun: str = "picture"


def list_folder(
    root: Path, noun: str = "picture", wanted: Callable[[str], bool] = is_picture
) -> Listing:
    """Lists a folder and all below, linked folders too, each folder once."""
    found = Listing(root, [], [], [], [], [], [], noun)
    seen = {os.path.realpath(root)}

    def kind(entry: os.DirEntry) -> list[str]:
        if entry.name.startswith("."):
            return found.hidden
        if entry.name in READERS:
            return found.metadata
        # a link to nothing is a picture too: it stops the run as an unreadable one does
        file = entry.is_file() or entry.is_symlink() and not os.path.exists(entry.path)
        return found.pictures if file and wanted(entry.name) else found.others

    def visit(folder: str) -> None:
        with os.scandir(root / folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            name = folder + entry.name
            if entry.name.startswith(".") or not entry.is_dir():
                kind(entry).append(name)
                continue
            real = os.path.realpath(entry.path)
            inside = entry.is_symlink() and Path(real).is_relative_to(os.path.realpath(root))
            if inside or real in seen:
                found.again.append(name)
            else:
                seen.add(real)
                visit(f"{name}/")

    try:
        visit("")
    except OSError as error:
        raise UserError(
            f"data.path {str(root)!r} cannot be read ({error}); give a folder that can be."
        ) from error
    stems = {os.path.splitext(name)[0] for name in found.pictures}
    if not found.metadata:
        own = [f for f in found.others if f.endswith(".txt") and f[:-4] in stems]
        found.captions.extend(own)
        found.others[:] = set(found.others).difference(own)
    for names in found[1:-1]:
        names.sort()
    for name in found.pictures:
        if name != name.encode("utf-8", "replace").decode():
            raise UserError(f"{str(root)!r} holds {name!a}, a name that is not UTF-8; rename it.")
    return found


def read_folder(found: Listing, asked: Iterable[str]) -> "dict[str, datasets.Dataset]":
    """The splits of a folder of pictures, and `all`. Says how many pictures there are, and what is
    left out of the splits that are asked for: no picture is, of `all`.
    """
    asked = {canonical(name) for name in asked}
    rows, unlisted = read_captions(found) if found.captions else read_metadata(found)
    # the folder directly below the root that a picture lies in, if it does
    splits = [canonical(name.split("/")[0]) if "/" in name else "" for name in found.pictures]
    divided = bool((asked - {"train"}) & set(splits)) or set(splits) <= {"train", "val", "test"}
    members: dict[str, list[int]] = {} if divided else {"train": []}
    for row, (name, split) in enumerate(zip(found.pictures, splits, strict=True)):
        if name not in unlisted and (split or not divided):
            members.setdefault(split if divided else "train", []).append(row)
    members["all"] = [*range(len(splits))]
    read = {row for name in asked for row in members.get(name, [])}
    rest = [name for row, name in enumerate(found.pictures) if row not in read]
    left_out = {
        "not in the metadata": [name for name in rest if name in unlisted],
        "in no split that is read": [name for name in rest if name not in unlisted],
        f"not {found.noun}s": found.others,
        "hidden": found.hidden,
        "linked to again": found.again,
    }
    tell(found, left_out)
    table = make_table(found, rows, divided)
    return {split: table.select(places) for split, places in members.items()}


def tell(found: Listing, left_out: dict[str, list[str]]) -> None:
    reasons = [
        f"{len(names)} {why} ({', '.join(names[:3])}{', …' if names[3:] else ''})"
        for why, names in left_out.items()
        if names
    ]
    said = f"; left out: {', '.join(reasons)}" if reasons else ""
    many = "" if len(found.pictures) == 1 else "s"
    say(f"{len(found.pictures)} {found.noun}{many} in {found.root}{said}.")


@rank_zero_only
def say(line: str) -> None:
    """Writes a line that no log level silences."""
    print(line, file=sys.stderr)


def make_table(
    found: Listing, rows: dict[str, dict[str, Any]], divided: bool
) -> "datasets.Dataset":
    """Pictures by their paths, with the metadata's columns or, without any, class folders."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as Images

    columns: dict[str, Any] = {"image": [str(found.root / name) for name in found.pictures]}
    types: dict[str, Any] = {"image": Images(decode=False)}
    for column in dict.fromkeys(name for row in rows.values() for name in row):
        columns[column] = [rows.get(name, {}).get(column) for name in found.pictures]
        types[column] = type_of(column, columns[column], found)
    folders = [name.split("/")[:-1] for name in found.pictures]
    depths = {len(folder) for folder in folders}
    if not (found.metadata or found.captions) and len(depths) == 1 and min(depths) > divided:
        labels = [folder[-1] for folder in folders]
        columns["label"] = labels
        types["label"] = ClassLabel(names=sorted(set(labels)))
    return Dataset.from_dict(columns, features=Features(types))


def type_of(column: str, values: list[Any], found: Listing) -> Any:
    from datasets import Dataset

    try:
        return Dataset.from_dict({column: values}).features[column]
    except Exception as error:  # pyarrow has a family of errors, and Unicode its own
        raise UserError(
            f"Column {column!r} of the metadata in {str(found.root)!r} holds values that do not "
            f"go together ({' '.join(str(error).split())[:120]}); write all of them as strings."
        ) from error


def read_metadata(found: Listing) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """What the metadata say of each picture, and the pictures they should list and do not."""
    pictures, rows, first = set(found.pictures), {}, {}
    folders = [posixpath.dirname(name) for name in found.metadata]
    for name, folder in zip(found.metadata, folders, strict=True):
        file = found.root / name
        if folders.count(folder) > 1:
            both = [one for one in found.metadata if posixpath.dirname(one) == folder]
            raise UserError(f"{str(found.root)!r} holds {' and '.join(both)}; keep one of them.")
        for number, row in READERS[file.name](file):
            picture = place(row, folder, pictures, file, number, found.noun)
            if picture in rows:
                fail(file, number, f"lists {picture!r} again, after {first[picture]}; keep one")
            rows[picture], first[picture] = row, f"line {number} of {name}"
    below = tuple(f"{folder}/" if folder else "" for folder in folders)
    return rows, {name for name in pictures if name not in rows and name.startswith(below)}


def read_captions(found: Listing) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """The captions in the file beside each picture, one on each line; no picture is unlisted."""
    lines = {
        name[:-4]: [line.strip() for line in text(found.root / name).splitlines() if line.strip()]
        for name in found.captions
    }
    said = {name: lines.get(os.path.splitext(name)[0], []) for name in found.pictures}
    several = max(map(len, said.values())) > 1
    captions = {name: some if several else "".join(some) for name, some in said.items()}
    return {name: {"caption": some} for name, some in captions.items()}, set()


def place(
    row: dict[str, Any], folder: str, pictures: set[str], file: Path, number: int, noun: str
) -> str:
    """Takes a row's `file_name`, and finds the picture."""
    if "image" in row:
        fail(file, number, "has a column 'image', which is the pictures' own; rename it")
    if "file_name" not in row:
        has = ", ".join(map(repr, row)) or "none"
        fail(file, number, f"has no column 'file_name' to name a picture; its columns: {has}")
    said = row.pop("file_name")
    if not isinstance(said, str) or not said.strip():
        fail(file, number, f"has {said!r} as file_name; name a picture")
    for written in (said, said.replace("\\", "/")):  # as Windows writes it
        path = posixpath.normpath(written)
        if path.startswith(("/", "../")):
            fail(file, number, f"names {said!r}, which lies outside of {str(file.parent)!r}")
        if (picture := posixpath.join(folder, path)) in pictures:
            return picture
    what = f"names {said!r}, which is no {noun} in {str(file.parent)!r}"
    fail(file, number, f"{what}; mend the name or remove the line")


def fail(file: Path, number: int, what: str) -> NoReturn:
    raise UserError(f"{file}, line {number}: it {what}.")


def text(file: Path) -> str:
    """A file's text, without the mark that some editors put before it."""
    data = b""
    try:
        data = file.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(file, data.count(b"\n", 0, error.start) + 1, "is not UTF-8; save it as such")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); mend it.") from error


def read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text(file).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                reason = str(error).split(": line")[0]
                fail(file, number, f"is not JSON ({reason}); each holds one")
            if not isinstance(row, dict):
                fail(file, number, 'is no object such as {"file_name": …}')
            yield number, row


def read_csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Words stay as they are typed: none of them is a number or missing."""
    lines = csv.reader(io.StringIO(text(file), newline=""), strict=True)
    try:
        names = next(lines, [])
        if len(set(names)) < len(names) or "file_name" not in names:
            fail(file, 1, f"is to name columns, each once and 'file_name' among them: {names}")
        for fields in lines:
            if fields and len(fields) != len(names):
                fail(file, lines.line_num, f"has {len(fields)} fields, and line 1 {len(names)}")
            if fields:
                yield lines.line_num, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        fail(file, lines.line_num, f"is not CSV ({error}); mend its quotes")


def read_parquet(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow.parquet import read_table

    try:
        rows = read_table(file).to_pylist()
    except Exception as error:  # pyarrow raises whatever a broken file provokes
        raise UserError(f"{file} is not a parquet file ({error}); write it anew.") from error
    yield from enumerate(rows, 1)


READERS = {
    "metadata.jsonl": read_jsonl,
    "metadata.csv": read_csv,
    "metadata.parquet": read_parquet,
}
