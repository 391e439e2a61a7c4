"""The rooms of the package: who may import whom."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import ROOT

from pipeline.cli import DOORS

# a room imports rooms to its left only
ROOMS = (
    "errors files averaging distributed building schedules noise optimizers condition networks "
    "mcmc conditioning png codec latents denoisers guidance composition objectives samplers "
    "exported checkpoint generator data tracking figures evaluation engines module callbacks "
    "experiment interop doors cli __main__"
).split()
FILES = sorted(path for path in (ROOT / "pipeline").rglob("*.py") if path.parent.name)


def room(dotted: str) -> str:
    """The room of a module: pipeline.samplers.base → samplers."""
    return (dotted.split(".") + [""])[1]


def imports(file: Path) -> Iterator[str]:
    """The modules of ours that a file imports, at the top or in a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("pipeline."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline."):
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            yield from (f"pipeline.{name.name}" for name in node.names)


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=module)
def test_a_room_imports_rooms_to_its_left(file: Path) -> None:
    own = room(module(file))
    for name in imports(file):
        assert own == "" or room(name) == own or ROOMS.index(room(name)) < ROOMS.index(own), name


def test_every_room_is_known() -> None:
    assert {room(module(file)) for file in FILES} - {""} == set(ROOMS)


def test_no_door_imports_a_door() -> None:
    doors = {file.stem for file in (ROOT / "pipeline/doors").glob("*.py")} - {"__init__", "shared"}
    assert doors == set(DOORS)
    for file in (ROOT / "pipeline/doors").glob("*.py"):
        assert not {name.split(".")[-1] for name in imports(file) if "doors" in name} & doors


def test_no_module_imports_itself_in_a_circle() -> None:
    """Within a room too."""
    names = {module(file): file for file in FILES}
    below = {name: {one for one in imports(file) if one in names} for name, file in names.items()}
    for package in [name for name, file in names.items() if file.name == "__init__.py"]:
        below[package] = set()  # it re-exports
    done: set[str] = set()
    while ready := {name for name in below if name not in done and below[name] <= done}:
        done |= ready
    assert done == set(below), f"circles among {sorted(set(below) - done)}"
