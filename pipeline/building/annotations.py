"""What an annotation wants, and whether a value is that."""

import collections.abc
import difflib
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["Kind", "concrete", "hints_of", "near", "shown", "signature"]

PLAIN = (bool, int, float, str, bytes, type(None), list, tuple, dict, set, object, Path)


class Kind:
    """An annotation taken apart.

    Arguments:
        annotation: The annotation.
    """

    def __init__(self, annotation: Any) -> None:
        self.annotation = annotation
        union = get_origin(annotation) in (Union, types.UnionType)
        inner = [Kind(one).members for one in get_args(annotation)] if union else [[annotation]]
        self.members: list[Any] = [one for some in inner for one in some]
        self.origins = [get_origin(one) or one for one in self.members]

    @cached_property
    def families(self) -> list[type]:
        """The classes whose members may stand here."""
        classes = [k for k in self.members if isinstance(k, type) and not get_args(k)]
        return [k for k in classes if k not in PLAIN and k is not Any]

    @cached_property
    def is_function(self) -> bool:
        return collections.abc.Callable in self.origins

    @cached_property
    def products(self) -> list[type]:
        """What the factories that may stand here make."""
        made = [get_args(k)[-1] for k in self.members if Kind(k).is_function and get_args(k)]
        return [one for k in made for one in Kind(k).families]

    @cached_property
    def items(self) -> Any:
        """What the items of a list are, where some of them are objects; else `None`."""
        both = zip(self.members, self.origins, strict=True)
        kinds = [(k, of) for k, of in both if isinstance(of, type) and of is not dict]
        lists = [k for k, of in kinds if issubclass(of, Iterable)]
        items = [one for k in lists for arg in get_args(k) for one in Kind(arg).members]
        whole = Union[tuple(items)] if items else None  # noqa: UP007
        return whole if Kind(whole).families else None

    @cached_property
    def entries(self) -> Any:
        """What the values of a dictionary are, where some of them are objects; else `None`."""
        found = [get_args(k)[1] for k in self.members if get_origin(k) is dict]
        return found[0] if found and Kind(found[0]).families else None

    def check(self, value: Any) -> tuple[bool, Any]:
        """Whether plain data are of the kind, and the data as that kind: 2 as a float is 2.0."""
        from pydantic import ConfigDict, TypeAdapter, ValidationError
        from pydantic.errors import PydanticSchemaGenerationError

        if isinstance(value, list) and tuple in self.origins and list not in self.origins:
            value = tuple(value)
        if isinstance(value, str) and Iterable in self.origins and str not in self.members:
            return False, None  # whose letters pydantic would look at later
        how = ConfigDict(arbitrary_types_allowed=True, strict=True)
        try:
            return True, TypeAdapter(self.annotation, config=how).validate_python(value)
        except ValidationError:
            return False, None
        except PydanticSchemaGenerationError:  # a kind that cannot be checked
            return True, value

    def __str__(self) -> str:
        """As a person would say it."""
        if len(self.members) > 1:
            return " or ".join(dict.fromkeys(str(Kind(one)) for one in self.members))
        if self.annotation in (None, type(None)):
            return "null"
        if self.origins == [Literal]:
            return " or ".join(map(str, get_args(self.annotation)))
        name = getattr(self.origins[0], "__name__", str(self.annotation))
        args = [str(Kind(one)) for one in get_args(self.annotation) if one is not ...]
        return f"{name.lower()} of {', '.join(args)}" if args else name


def signature(function: Callable) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def hints_of(function: Callable) -> dict[str, Any]:
    """The annotations of the arguments of a function or a class, where they can be read."""
    is_class = isinstance(function, type)
    try:
        found = get_type_hints(function.__init__ if is_class else function)
    except (NameError, TypeError):  # a name that only type checkers import
        return {}
    return hints_of(function.__base__) | found if is_class and "more" in found else found  # type: ignore


def concrete(family: type) -> Iterator[type]:
    """The members of a family that can be made."""
    if not inspect.isabstract(family) and not family.__name__.startswith("_"):
        yield family
    for cls in family.__subclasses__():
        yield from concrete(cls)


def near(name: str, names: Iterable[str]) -> str:
    """The names that one may stand for, to end a sentence."""
    names = [one for one in names if not one.startswith("_")]
    if close := difflib.get_close_matches(name, names, n=3):
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are {', '.join(names)}" if 0 < len(names) <= 24 else ""


def shown(value: Any) -> str:
    """A value in a sentence."""
    plain = value is None or isinstance(value, bool)
    text = {None: "null", True: "true", False: "false"}[value] if plain else repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
