"""Plain data → objects.

A *node* names a class and its arguments, and stands where an object is wanted:

    class_path: pipeline.samplers.Heun
    init_args: {steps: 18, rho: 5.0}

What may stand there is said by the annotation of the argument it is for, such as `Sampler`: its
*family*. A `Resolver` checks all of it against the signatures before anything is made, and gives
plans; `make` makes what a plan says.

A YAML file may name any class, and is code. What comes from a checkpoint may name members of the
wanted families in this package and in those that are trusted, and nothing else.
"""

import difflib
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pipeline.building.annotations import Kind, concrete, hints_of, near, shown, signature
from pipeline.errors import UserError
from pipeline.files import configuration

__all__ = ["OURS", "At", "Plan", "Resolver", "build", "dump", "explain", "make", "plain_path"]

T = TypeVar("T")
At = tuple[str, ...]  # the keys that lead to a value

OURS = __name__.split(".")[0]


def plain_path(at: At) -> At:
    """The keys as a person types them."""
    return tuple(name for name in at if name != "init_args")


class Plan(NamedTuple):
    """A class and its arguments, each a value or a plan; a factory lacks some, still to come."""

    cls: Callable
    arguments: dict[str, Any]
    is_factory: bool
    error: Callable[[str], UserError]


class Named(NamedTuple):
    """A function, and the path by which it was named: a method does not know its object's."""

    path: str
    function: Callable


class Resolver:
    """Checks plain data against annotations.

    Arguments:
        error: Makes an error of a place and what is wrong there.
        trust: The packages whose classes may be named; any by default.
        openers: How to open a member of a family that is named by a file.
    """

    def __init__(
        self,
        error: Callable[[At, str], UserError],
        trust: Sequence[str] | None = None,
        openers: Mapping[type, Callable[[str], Any]] | None = None,
    ) -> None:
        self.error, self.trust, self.openers = error, trust, openers or {}

    def value(self, value: Any, annotation: Any, at: At) -> Any:
        """A value, with a `Plan` for each object in it.

        Raises:
            UserError: It is not what the annotation wants.
        """
        kind = Kind(annotation)
        if any(isinstance(value, family) for family in kind.families):
            return value
        # what was typed is text where text is wanted, else YAML
        typed = [value.parsed(), str(value)] if hasattr(value, "parsed") else [value]
        node = typed[0]
        is_node = isinstance(node, dict) and ("class_path" in node or dict not in kind.origins)
        if is_node and (kind.families or kind.products):
            return self.node(node, kind, at)
        if isinstance(node, list) and kind.items is not None:
            return [self.value(one, kind.items, (*at, str(k))) for k, one in enumerate(node)]
        if isinstance(node, dict) and kind.entries is not None:
            return {k: self.value(one, kind.entries, (*at, k)) for k, one in node.items()}
        if isinstance(node, str) and kind.is_function and self.trust is None:
            return self.function(node, at)
        for family, opener in self.openers.items():
            if isinstance(node, str) and family in kind.families:
                found = opener(node)
                object.__setattr__(found, "_source", node)  # which describes it
                return found
        for one in typed:
            fits, checked = kind.check(one)
            if fits:
                return checked
        choices = self.choices(kind.families, node, at) if kind.families else ""
        if node is None and not choices.startswith("; choose"):
            choices = f"; set it by --{'.'.join(plain_path(at))}"
        raise self.error(at, f"is {shown(node)}; expected {kind}{choices}")

    def node(self, node: dict, kind: Kind, at: At) -> Plan:
        families, products = kind.families, kind.products
        if "class_path" in node:
            cls, given = self.load(node["class_path"], at), node.get("init_args") or {}
            if isinstance(given, dict):  # or they stand beside the class
                own = {k: v for k, v in node.items() if k not in ("class_path", "init_args")}
                given = given | own
        elif len(families) == 1 and not inspect.isabstract(families[0]):
            cls, given = families[0], node
        else:
            raise self.error(
                at, f"names no class_path{self.choices(families or products, node, at)}"
            )
        is_factory = not issubclass(cls, tuple(families))
        if is_factory and not issubclass(cls, tuple(products)):
            wanted = " or ".join(one.__name__ for one in families or products)
            choices = self.choices(families, node, at)
            raise self.error(at, f"is {public_path(cls)}, which is no {wanted}{choices}")
        if inspect.isabstract(cls):
            raise self.error(
                at, f"is {cls.__name__}, which is a family{self.choices([cls], node, at)}"
            )
        if not isinstance(given, dict):
            raise self.error(at, f"has the init_args {shown(given)}; expected keys and values")
        arguments = self.arguments(cls, given, at, is_factory)
        return Plan(cls, arguments, is_factory, functools.partial(self.error, at))

    def arguments(
        self, cls: Callable, given: dict, at: At, is_factory: bool = False
    ) -> dict[str, Any]:
        """The arguments of a class or a function, those that are left out at their defaults."""
        parameters, hints = signature(cls), hints_of(cls)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return dict(given)
        for name in given:
            if name not in parameters:
                said = f"is not an argument of {cls.__name__}{near(name, parameters)}"
                raise self.error((*at, name), said)
        found = {}
        for name, parameter in parameters.items():
            default = parameter.default
            if name in given:
                found[name] = self.value(given[name], hints.get(name, Any), (*at, name))
            elif default is parameter.empty and not is_factory:
                raise self.error((*at, name), f"is needed by {cls.__name__} and is not set")
            elif default is None or isinstance(default, bool | int | float | str | tuple):
                found[name] = default
        return found

    def load(self, path: Any, at: At) -> type:
        """The class of a path, if it may be named."""
        if not isinstance(path, str) or not all(p.isidentifier() for p in path.split(".")):
            raise self.error(at, f"has the class_path {shown(path)}, which is none")
        self.check_trust(path, path, at)
        found = self.find(path, at)
        if not isinstance(found, type):
            raise self.error(at, f"names {path}, which is not a class")
        self.check_trust(f"{found.__module__}.", path, at)
        return found

    def check_trust(self, path: str, named: str, at: At) -> None:
        if self.trust is None or any(path.startswith(f"{one}.") for one in self.trust):
            return
        said = f"names {named}, which is not in a trusted package ({', '.join(self.trust)})"
        raise self.error(at, f"{said}; allow one of yours with --trust PACKAGE")

    def find(self, path: str, at: At) -> Any:
        """What a dotted path names: in the longest part of it that is a module."""
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # where a class of the user's own may lie
        parts = path.split(".")
        for n in range(len(parts) - 1, 0, -1):
            name = ".".join(parts[:n])
            try:
                found: Any = importlib.import_module(name)
            except Exception as error:  # whatever a module of the user's does
                missing = error.name if isinstance(error, ModuleNotFoundError) else None
                if missing and f"{name}.".startswith(f"{missing}."):
                    continue
                said = f"names {path}: {name} cannot be imported: {error}"
                raise self.error(at, said) from error
            for part in parts[n:]:
                if not hasattr(found, part):
                    said = f"names {path}, and {name} has no {part}{near(part, dir(found))}"
                    raise self.error(at, said)
                found, name = getattr(found, part), f"{name}.{part}"
            return found
        raise self.error(at, f"names {path}: there is no module {parts[0]}")

    def function(self, path: str, at: At) -> Named:
        found = self.find(path, at) if "." in path else None
        if not callable(found):
            raise self.error(at, f"is {path}; expected the path of a function, MODULE.NAME")
        return Named(path, found)

    def choices(self, families: Sequence[type], node: Any, at: At) -> str:
        """What may stand at a place, to end a sentence: files in conf/, else members; those that
        are named like what stands there come first.
        """
        name = (*plain_path(at), "")[-2] if at else ""
        for folder in (Path("conf") / one for one in (name, name[:-1]) if one):
            if files := sorted(configuration(folder).glob("*.yaml")):
                alike = difflib.get_close_matches(str(node), [file.stem for file in files])
                files.sort(key=lambda file: file.stem not in alike)
                listed = ", ".join(f"{folder}/{file.name}" for file in files[:8])
                return f"; choose a file such as {listed}, or name a class_path"
        known = sorted({public_path(one) for family in families for one in concrete(family)})
        return f"; there are {', '.join(known[:12])}" if known else "; name a class_path"


def build(node: Any, kind: type[T], trust: Sequence[str] = (), **how: Any) -> T:
    """The object that a node names, of a wanted family, from this package or a trusted one.

    Arguments:
        trust: Packages, or modules, beside our own whose classes may be named.
        how: See `Resolver`.

    Raises:
        UserError: It names anything else, or does not fit the signature of what it names.
    """

    def error(at: At, said: str) -> UserError:
        return UserError(f"{'.'.join(plain_path(at))} {said}" + "." * (said[-1:] != "?"))

    resolver = Resolver(error, (OURS, *trust), **how)
    return make(resolver.value(node, kind, (kind.__name__.lower(),)))


def make(plan: Any) -> Any:
    """What a plan says, its arguments first.

    Raises:
        UserError: A constructor refuses its arguments: the sentence is the constructor's.
    """
    if isinstance(plan, list):
        return [make(one) for one in plan]
    if isinstance(plan, dict):
        return {key: make(one) for key, one in plan.items()}
    if isinstance(plan, Named):
        return plan.function
    if not isinstance(plan, Plan):
        return plan
    arguments = {name: make(value) for name, value in plan.arguments.items()}
    if plan.is_factory:
        return functools.partial(plan.cls, **arguments)
    try:
        return plan.cls(**arguments)
    except UserError:
        raise
    except Exception as error:  # a constructor of a library refuses in its own way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise plan.error(f"cannot be made: {reason.rstrip('.!')}") from error


def dump(plan: Any) -> Any:
    """A plan as plain data."""
    if isinstance(plan, Plan):
        return {"class_path": public_path(plan.cls), "init_args": dump(plan.arguments)}
    if isinstance(plan, Named):
        return plan.path
    if isinstance(plan, list | tuple):
        return [dump(one) for one in plan]
    if isinstance(plan, dict):
        return {key: dump(value) for key, value in plan.items()}
    if plan is None or isinstance(plan, bool | int | float | str):
        return plan
    return str(plan)


def explain(plan: Any, at: At = ()) -> Iterator[str]:
    """Every option below a plan, with its value, what may stand there, and what it does."""
    inner = dict(enumerate(plan)) if type(plan) is list else plan
    for k, one in inner.items() if isinstance(inner, dict) else ():
        yield from explain(one, (*at, str(k)))
    if not isinstance(plan, Plan):
        return
    family = plan.cls.__mro__ if isinstance(plan.cls, type) else [plan.cls]
    texts = [inspect.getdoc(text) or "" for one in family for text in (one, one.__init__)]
    hints, said = hints_of(plan.cls), "\n".join(texts)
    if at:
        yield f"\n{'.'.join(at)}: {public_path(plan.cls)}"
    for name in signature(plan.cls):
        value = plan.arguments.get(name)
        is_node = "Plan(" in repr(value)
        told = re.search(rf"^ +{name}: (.*(?:\n {{5,}}.*)*)", said, re.MULTILINE)
        text = " ".join(told[1].split()) if told else ""
        now = "" if is_node else f" {shown(dump(value))}"
        yield f"  --{'.'.join((*at, name))}{now}  ({Kind(hints.get(name, Any))})  {text}".rstrip()
    for name, value in plan.arguments.items():
        yield from explain(value, (*at, name))


def public_path(cls: Any) -> str:
    """The shortest path by which a class can be imported."""
    parts = cls.__module__.split(".")
    for n in range(1, len(parts)):
        if getattr(sys.modules.get(".".join(parts[:n])), cls.__qualname__, None) is cls:
            return ".".join([*parts[:n], cls.__qualname__])
    return f"{cls.__module__}.{cls.__qualname__}"
