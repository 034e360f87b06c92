"""The registry of methods. One paper, one file: a function that returns a `Recipe`, under a decorator with its card.

Importing this package imports every file in it; adding a method edits nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from .. import kinds  # noqa: F401  (kinds of quantizer that methods share are known by name)
from ..recipe import Recipe, Rule
from ..serial import nearest

__all__ = ["Card", "create", "list_methods", "method"]

COMMON = ("layers", "rules", "seed")
"""Options of every method: kinds of layer to quantize, further rules, seed of its random streams."""


@dataclasses.dataclass(frozen=True)
class Card:
    """What a table or a page says of a method that is not its code."""

    name: str
    title: str
    year: int
    arxiv: str
    """arXiv number, or where the paper appeared."""
    area: str
    """`training` (all products quantized), `activations`, `weights`, `binary` or `baseline`."""
    headline: tuple[str, ...] = ()
    """Results of the paper, one sentence each."""
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Training settings the method needs to be itself, where a float recipe's would not do (optimizer, lr, ...)."""
    roles: tuple[str, ...] = ()
    """Roles that are quantized by default; filled in by the registry."""
    summary: str = ""
    """First line of the method's documentation; filled in by the registry."""


@dataclasses.dataclass(frozen=True)
class Entry:
    card: Card
    function: Callable[..., Recipe]
    doc: str


METHODS: dict[str, Entry] = {}


def method(card: Card) -> Callable[[Callable[..., Recipe]], Callable[..., Recipe]]:
    """Register the function below as the method that `card` describes."""

    def register(function: Callable[..., Recipe]) -> Callable[..., Recipe]:
        if card.name in METHODS and METHODS[card.name].function.__module__ != function.__module__:
            raise ValueError(f"two methods are named {card.name!r}; rename one")
        doc = inspect.getdoc(function) or inspect.getdoc(importlib.import_module(function.__module__)) or ""
        recipe = function()
        roles = set(recipe.roles.named())
        for which, right in (("out", "W"), ("grad_a", "W"), ("grad_w", "A")):
            product = getattr(recipe.products, which)
            left = "A" if which == "out" else "E"
            roles |= {r for r, o in ((left, product.left), (right, product.right)) if type(o).__name__ == "QSpec"}
        full = dataclasses.replace(card, roles=tuple(r for r in "WAEGU" if r in roles), summary=doc.split("\n")[0])
        METHODS[card.name] = Entry(full, function, doc)
        return function

    return register


def create(name: str, **options: Any) -> Recipe:
    """The recipe of method `name` with the given options; the defaults are the paper's.

    Every method also takes `layers` (kinds of layer to quantize), `rules` (exceptions added after its own) and `seed`.

    Raises:
        ValueError: unknown method or option, or a value the method refuses; the message names the nearest match.
    """
    entry = find(name)
    signature = inspect.signature(entry.function)
    allowed = set(signature.parameters) | set(COMMON)
    for option in options:
        if option not in allowed:
            raise ValueError(f"method {name!r} has no option {option!r}; {nearest(option, allowed)}")
    own = {k: v for k, v in options.items() if k in signature.parameters}
    recipe = entry.function(**own)
    changes: dict[str, Any] = {"options": dict(options)}
    if "layers" in options and "layers" not in own:
        changes["layers"] = tuple(options["layers"])
    if "rules" in options and "rules" not in own:
        rules = tuple(options["rules"])
        if bad := [r for r in rules if not isinstance(r, Rule)]:
            raise TypeError(f"rules must be lowbit.Rule; got {bad[0]!r}")
        changes["rules"] = recipe.rules + rules
    if "seed" in options and "seed" not in own:
        changes["seed"] = int(options["seed"])
    return dataclasses.replace(recipe, **changes)


def list_methods(area: str | None = None, role: str | None = None) -> list[Card]:
    """Cards of the methods, by name; only those of an area, and those that quantize a role (W, A, E, G, U).

    Raises:
        ValueError: an area or role that no method has.
    """
    cards = [METHODS[name].card for name in sorted(METHODS)]
    areas = {c.area for c in cards}
    if area is not None and area not in areas:
        raise ValueError(f"unknown area {area!r}; {nearest(area, areas)}")
    if role is not None and role not in tuple("WAEGU"):
        raise ValueError(f"unknown role {role!r}; {nearest(role, 'WAEGU')}")
    return [c for c in cards if area in (None, c.area) and (role is None or role in c.roles)]


def find(name: str) -> Entry:
    """The registry entry of a method.

    Raises:
        ValueError: unknown method.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]


for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
