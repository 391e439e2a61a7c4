"""YAML files and options → one tree of plain data, which knows where each value is from.

A value that ends in .yaml stands for the content of that file, found from the file (or, on the
command line, from the folder) in which it is named.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.building.annotations import near, shown, signature
from pipeline.building.plan import At, Plan, Resolver, plain_path
from pipeline.errors import UserError
from pipeline.files import configuration

__all__ = ["Config", "Text"]


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number."""


Loader.yaml_implicit_resolvers = {k: list(v) for k, v in Loader.yaml_implicit_resolvers.items()}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


class Text(str):
    """A value as it was typed on the command line: YAML, or text where text is wanted."""

    def parsed(self) -> Any:
        try:
            return yaml.load(self, Loader)
        except yaml.YAMLError:
            return str(self)


class Config:
    """A tree of plain data, the later over the earlier.

    A node with another class takes the place of the one before, with all its arguments; lists
    replace. `init_args` may be left out of keys. `KEY+` appends to a list.

    Arguments:
        files: YAML files.
        options: What stands on the command line, `--KEY VALUE` or `--KEY=VALUE`, KEY dotted.

    Raises:
        UserError: A file cannot be read, or an option is none.
    """

    def __init__(self, files: Sequence[str | Path] = (), options: Sequence[str] = ()) -> None:
        self.tree: dict[str, Any] = {}
        self.origin: dict[At, str] = {}
        for file in files:
            found = load(Path(file), f"{file}")
            if not isinstance(found, dict):
                raise UserError(f"{file} holds {shown(found)}; expected keys and values.")
            self._merge(found, str(file))
        self.add(options)

    def add(self, options: Sequence[str]) -> None:
        """Put what stands on the command line."""
        for key, text in pairs(options):
            self.set(key, Text(text))

    def set(self, key: str, value: Any, origin: str = "") -> None:
        """Put a value at a dotted key."""
        key, more = key.removesuffix("+"), key.endswith("+")
        if isinstance(value, Text) and is_file_name(value):
            value = load(Path(value).expanduser(), f"--{key} {value}")
        elif isinstance(value, Text) and (more or isinstance(value.parsed(), dict)):
            value = value.parsed()
        if more:
            value = [*(self.get(key) or []), *(value if isinstance(value, list) else [value])]
        for name in reversed(key.split(".")):
            value = {name: value}
        self._merge(value, origin)

    def get(self, key: str) -> Any:
        """The value at a dotted key, or `None`."""
        found: Any = self.tree
        for name in key.split("."):
            if isinstance(found, dict) and "class_path" in found and name != "init_args":
                found = found.get("init_args")
            found = found.get(name) if isinstance(found, dict) else None
        return found.parsed() if isinstance(found, Text) else found

    def _merge(self, new: Any, origin: str) -> None:
        self.tree = merge(self.tree, new)
        self.origin |= dict.fromkeys(paths(new), origin)

    def known(self, function: Callable) -> None:
        """Raise `UserError` where the tree has a key that is no argument of a function."""
        names = signature(function)
        for key in self.tree:
            if key not in names:
                raise self.error((key,), f"is not known{near(key, names)}")

    def resolve(self, key: str, kind: Any, **how: Any) -> Any:
        """What stands at a key, checked against what is wanted there; see `Resolver`."""
        return Resolver(self.error, **how).value(self.get(key), kind, tuple(key.split(".")))

    def call(self, function: Callable, **how: Any) -> Plan:
        """The whole tree as the arguments of a function; see `Resolver`."""
        arguments = Resolver(self.error, **how).arguments(function, self.tree, ())
        return Plan(function, arguments, False, functools.partial(self.error, ()))

    def fill(self, key: str, values: Mapping[str, Any]) -> None:
        """Give the node at a key what its class takes and the tree leaves out, or has as null."""
        for name in self.parameters(key):
            if name in values and self.get(f"{key}.{name}") is None:
                self.set(f"{key}.{name}", values[name])

    def parameters(self, key: str) -> list[str]:
        """The names of the arguments of the class that is named at a key."""
        node = self.get(key)
        if not isinstance(node, dict) or "class_path" not in node:
            return []
        return list(signature(Resolver(self.error).load(node["class_path"], (key,))))

    def error(self, at: At, said: str) -> UserError:
        """What is wrong at a place, with where it is from."""
        at = plain_path(at)
        origin = next((o for n in range(len(at), 0, -1) if (o := self.origin.get(at[:n]))), "")
        where = f" (from {origin})" if origin else ""
        return UserError(f"{'.'.join(at)} {said}{where}".strip() + "." * (said[-1:] != "?"))


def load(file: Path, named: str, inside: tuple[Path, ...] = ()) -> Any:
    """What a YAML file holds, with all that it includes."""
    file = configuration(file)
    if not file.is_file():
        names = [one.name for one in sorted(file.parent.glob("*.yaml"))]
        close = ", ".join(difflib.get_close_matches(file.name, names) or names[:8])
        has = f"; {file.parent} has {close}" if close else ""
        raise UserError(f"{named}: there is no such file{has}.")
    if file.resolve() in inside:
        raise UserError(f"{named} includes itself.")
    try:
        found = yaml.load(file.read_text("utf-8-sig"), Loader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{named} cannot be read as YAML: {reason}.") from error
    return included(found, file, (*inside, file.resolve()))


def included(value: Any, file: Path, inside: tuple[Path, ...]) -> Any:
    if isinstance(value, dict):
        return {str(k): included(v, file, inside) for k, v in value.items()}
    if isinstance(value, list):
        return [included(v, file, inside) for v in value]
    if isinstance(value, str) and is_file_name(value):
        return load(file.parent / value, f"{value} in {file}", inside)
    return value


def is_file_name(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) and "\n" not in text


def pairs(options: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The keys and values of `--key value` and `--key=value`."""
    rest = list(options)
    while rest:
        word = rest.pop(0)
        key, equals, value = word[2:].partition("=")
        if not word.startswith("--") or not key:
            raise UserError(
                f"{word!r} is no option: expected --KEY VALUE, with dots between keys, such as "
                "--data.batch_size 64."
            )
        if not equals and not rest:
            raise UserError(f"--{key} has no value; expected --{key} VALUE.")
        yield key, value if equals else rest.pop(0)


def merge(old: Any, new: Any) -> Any:
    """Two trees, the later over the earlier."""
    new = node(new)
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if new.get("class_path", old.get("class_path")) != old.get("class_path"):
        return new
    if "class_path" in old:
        new = node({"class_path": old["class_path"], **new})
    return old | {key: merge(old.get(key), value) for key, value in new.items()}


def node(tree: Any) -> Any:
    """A node whose arguments stand beside its class, with them in `init_args`."""
    if not isinstance(tree, dict) or "class_path" not in tree:
        return tree
    own = {k: v for k, v in tree.items() if k not in ("class_path", "init_args")}
    given = tree.get("init_args") or {}
    return {"class_path": tree["class_path"], "init_args": merge(given, own) if own else given}


def paths(tree: Any, at: At = ()) -> Iterator[At]:
    """The keys that lead to each value of a tree."""
    if at:
        yield plain_path(at)
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield from paths(value, (*at, str(key)))
