"""Objects → plain data: a `Part` knows what it was made of."""

import inspect
from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

__all__ = ["Part", "brief", "describe", "replace"]


class Part:
    """What a node can name and a checkpoint describe: it remembers its class and its arguments.

    `**more` of a constructor are the arguments of the class above that have defaults, but for
    those that the class itself has as attributes: it passes them on.
    """

    def __init_subclass__(cls, **how: Any) -> None:
        super().__init_subclass__(**how)
        # of the constructor: early releases of Python 3.11 read that of `__new__` where it is
        # inherited, which takes anything
        told: Any = cls.__init__
        names = {} if told is object.__init__ else dict(inspect.signature(told).parameters)
        names.pop("self", None)
        if names.pop("more", None) is not None:
            for name, one in inspect.signature(cls.__base__).parameters.items():  # type: ignore
                if name not in names and name not in vars(cls) and one.default is not one.empty:
                    names[name] = one.replace(kind=one.KEYWORD_ONLY)
        cls.__signature__ = inspect.Signature(list(names.values()))

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        # FSDP gives a network another class
        object.__setattr__(self, "_given", (cls, args, kwargs))
        return self


def describe(value: Any) -> Any:
    """Plain data from which `pipeline.building.build` makes an equal value.

    Raises:
        UserError: It is, or was made with, something that is neither plain data nor a `Part`.
    """
    if isinstance(value, Part):
        if hasattr(value, "_source"):  # it was opened from a file
            return value._source  # type: ignore[attr-defined]
        cls, args, kwargs = value._given  # type: ignore[attr-defined]
        bound = inspect.signature(cls).bind(*args, **kwargs)
        bound.apply_defaults()
        path = f"{cls.__module__}.{cls.__qualname__}"
        return {"class_path": path, "init_args": describe(bound.arguments)}
    if isinstance(value, Mapping):
        return {str(key): describe(v) for key, v in value.items()}
    if isinstance(value, list | tuple | range):
        return [describe(v) for v in value]
    if hasattr(value, "tolist"):  # a tensor, an array
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"{value!r} cannot be described in a checkpoint: it is no pipeline.building.Part. Derive "
        "its class from that of its family, such as pipeline.networks.Network."
    )


def replace(value: Any, **arguments: Any) -> Any:
    """A part made anew with other arguments, which its constructor checks.

    An attribute that is set on a part is in no description of it.
    """
    cls, args, kwargs = value._given
    return cls(**inspect.signature(cls).bind(*args, **kwargs).arguments | arguments)


def brief(value: Any) -> Any:
    """A description for people: the class of each part by its name, its arguments beside it."""
    node = value if isinstance(value, dict | list) else describe(value)
    if isinstance(node, list):
        return [brief(one) for one in node]
    if isinstance(node, dict) and "class_path" in node:
        given = {name: brief(one) for name, one in node["init_args"].items()}
        return {"class": node["class_path"].rpartition(".")[2], **given}
    return node
