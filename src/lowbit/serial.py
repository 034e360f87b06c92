"""Specifications as data: frozen dataclasses to plain JSON values and back.

A class decorated with `spec` may appear in a recipe. Only such classes are ever built from a file, so a recipe
from a stranger can name no other code.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from typing_extensions import dataclass_transform

__all__ = ["SPECS", "from_data", "nearest", "spec", "to_data"]

SPECS: dict[str, type] = {}
"""Name of every class that a recipe file may contain."""
TAG = "spec"
"""Key of the class name in the data; no field of a specification may have this name."""

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def spec(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass of plain values and allow it in recipe files."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    if SPECS.setdefault(cls.__name__, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"two specifications are named {cls.__name__!r}; rename one")
    SPECS[cls.__name__] = cls
    return cls


def nearest(name: str, allowed: Any) -> str:
    """The tail of an error message about an unknown name: the nearest match and what is allowed."""
    names = sorted(map(str, allowed))
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(names)}"


def to_data(value: Any) -> Any:
    """Plain JSON values of a specification.

    Raises:
        TypeError: a value that is neither plain nor a `spec` class.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        if SPECS.get(name) is not type(value):
            raise TypeError(f"{name} is not a registered specification; decorate it with lowbit.serial.spec")
        return {TAG: name} | {f.name: to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_data(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): to_data(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {TAG: "float", "value": repr(value)}  # JSON has no infinity
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} ({type(value).__name__}) is no plain value and can't go into a recipe")


def from_data(data: Any) -> Any:
    """The specification that `to_data` wrote; lists come back as tuples.

    Raises:
        ValueError: an unknown class or field name, or a field the class refuses.
    """
    if isinstance(data, Mapping):
        fields = dict(data)
        name = fields.pop(TAG, None)
        if name is None:
            return {k: from_data(v) for k, v in fields.items()}
        if name == "float":
            return float(fields["value"])
        if name not in SPECS:
            raise ValueError(f"unknown specification {name!r}; {nearest(name, SPECS)}")
        cls = SPECS[name]
        allowed = {f.name for f in dataclasses.fields(cls)}
        for field in fields:
            if field not in allowed:
                raise ValueError(f"{name} has no field {field!r}; {nearest(field, allowed)}")
        return cls(**{k: from_data(v) for k, v in fields.items()})
    if isinstance(data, (list, tuple)):
        return tuple(from_data(v) for v in data)
    return data
