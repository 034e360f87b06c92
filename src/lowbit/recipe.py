"""Recipes: a method with its hyper-parameters, as plain frozen data, JSON both ways.

Five tensors are quantized: `W` weight, `A` activation, `E` error (gradient of a layer's output), `G` weight gradient,
`U` stored weight after an update. A layer has three products, each with a left and a right operand:

| product  | left | right | computes                        |
|----------|------|-------|---------------------------------|
| `out`    | A    | W     | the layer's output              |
| `grad_a` | E    | W     | the gradient of the layer input |
| `grad_w` | E    | A     | the weight gradient             |

An operand without an override reuses the values of its role: W and A as quantized in the forward pass, E as quantized
once for both backward products. An override quantizes that operand anew from the float tensor; `Keep()` leaves it so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from .formats import Float
from .quantizer import QSpec
from .serial import from_data, nearest, spec, to_data

__all__ = [
    "Chunked",
    "Float32",
    "Int32",
    "Keep",
    "LossScale",
    "Product",
    "Products",
    "Recipe",
    "Roles",
    "Rule",
    "Stage",
    "Step",
    "Swap",
    "Update",
]

LAYERS = ("linear", "conv", "embedding", "attention")
VERSION = 1


@spec
class Roles:
    """The quantizer of each role in one layer; None leaves it float."""

    W: QSpec | None = None
    A: QSpec | None = None
    E: QSpec | None = None
    G: QSpec | None = None
    U: QSpec | None = None

    def named(self) -> dict[str, QSpec]:
        """The roles that are quantized."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None}


@spec
class Keep:
    """Override of an operand: the float tensor as it is."""


@spec
class Chunked:
    """Accumulator: sums of `chunk` products, then the sum of those, rounded to `format` after every addition (Wang et
    al. 2018, arXiv 1812.08011)."""

    chunk: int = 64
    format: Float = Float(6, 9)

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"an accumulator's chunk is at least 1; got {self.chunk}")


@spec
class Float32:
    """Accumulator: float32 sums of real values, even where the operands' codes could be multiplied."""


@spec
class Int32:
    """Accumulator: products of integer codes, summed exactly in int32; a sum longer than `split` is cut into pieces
    that can't overflow and the pieces are added in float64."""

    split: int = 131_071  # (2^31 - 1) // 128^2: safe for codes of -128 as well

    def __post_init__(self) -> None:
        if not 1 <= self.split <= 131_071:
            raise ValueError(f"a sum of {self.split} products of int8 codes may overflow int32; use at most 131071")


@spec
class Product:
    """Operand overrides and accumulator of one product."""

    left: QSpec | Keep | None = None
    right: QSpec | Keep | None = None
    accumulator: Chunked | Int32 | Float32 | None = None
    """None multiplies integer codes, summed in int32, where both operands have them and that is faster, and real
    values, summed in float32, everywhere else: the two differ by the rounding of float sums."""
    samples: int = 1
    """Independent draws of a stochastic E whose products are averaged; `grad_w` only."""
    same_draw: bool = False
    """Whether a stochastic `left` takes the random numbers of the role E, if that is stochastic, instead of its own:
    one draw then serves two encodings. Each keeps its distribution; only their errors depend on each other. `grad_w`
    only."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"a product averages at least 1 sample; got {self.samples}")
        if self.same_draw and not (isinstance(self.left, QSpec) and self.left.stochastic):
            raise ValueError("same_draw needs a left operand of its own that rounds stochastically; leave it out")


@spec
class Products:
    """The three products of a layer."""

    out: Product = Product()
    grad_a: Product = Product()
    grad_w: Product = Product()
    result: QSpec | None = None
    """Quantizer of the layer's output, bias included; None leaves it float."""
    error_at: Literal["output", "input", "both"] = "output"
    """Where E is quantized: as it enters the layer at its output, as it leaves at its input (WAGE), or at both."""

    def __post_init__(self) -> None:
        if self.error_at not in ("output", "input", "both"):
            raise ValueError(f"unknown place {self.error_at!r}; {nearest(self.error_at, ('output', 'input'))}")
        for product in (self.out, self.grad_a):
            if product.samples != 1:
                raise ValueError("only grad_w averages samples; set samples=1 on out and grad_a")
            if product.same_draw:
                raise ValueError("only grad_w takes the draw of E; leave same_draw out of out and grad_a")


@spec
class Rule:
    """An exception. Every condition given must hold; the last rule that matches a layer decides what it gives."""

    name: str = "*"
    """Shell-style pattern on the layer's name, for example `blocks.*.fc2`."""
    type: Literal["any", "linear", "conv", "embedding", "attention"] = "any"
    where: Literal["any", "first", "last"] = "any"
    """The first or last linear or convolution layer of the model, in the order of registration."""
    roles: Roles | None = None
    """Roles instead of the recipe's; None keeps them."""
    products: Products | None = None
    """Products instead of the recipe's; None keeps them."""

    def __post_init__(self) -> None:
        for given, allowed in ((self.type, ("any", *LAYERS)), (self.where, ("any", "first", "last"))):
            if given not in allowed:
                raise ValueError(f"unknown word {given!r} in a rule; {nearest(given, allowed)}")


FLOAT = Roles()


def float_ends(first: bool = True, last: bool = True) -> tuple[Rule, ...]:
    """Rules that leave the first and the last layer in float."""
    ends: list[tuple[Literal["first", "last"], bool]] = [("first", first), ("last", last)]
    return tuple(Rule(where=w, roles=FLOAT, products=Products()) for w, on in ends if on)


@spec
class Swap:
    """Another layer in place of one: `old` is the class name of a torch.nn module, `new` what stands there after
    `apply` (a class of torch.nn without required arguments, or a swap that the library registers)."""

    old: str
    new: str


class Step:
    """Base of what a method does to a model once, when it is applied. Subclasses are `spec` classes with `run`."""

    def run(self, model: Any, layers: Mapping[str, Any]) -> None:
        """Change `model` in place; `layers` maps names to the quantized layers."""
        raise TypeError(f"{type(self).__name__} does nothing")


@spec
class Update:
    """How the optimizer's step is carried out in low precision, beside the roles G and U."""

    states: QSpec | None = None
    """Grid of the optimizer's state (momentum), rounded after each step."""
    axpy: bool = False
    """torch.optim.SGD as three updates, each rounded to the grid of U or of the state: g + decay * w, momentum * v + g,
    w - lr * v (Wang et al. 2018). Any other optimizer steps as it is; then its state and the weights are rounded."""
    clip: float | None = None
    """Stored weights are clipped to ±clip after the step."""
    lr_scale: Literal["none", "glorot"] = "none"
    """`glorot`: a weight's step is divided by its Glorot bound sqrt(1.5 / (fan_in + fan_out)); squared for SGD."""
    biases: bool = False
    """Whether G and U hold for biases of quantized layers too."""


@spec
class LossScale:
    """The loss is multiplied by `value` in the backward pass and every gradient divided again before it is
    accumulated, so the user's loop never sees it: the model's outputs multiply, its parameters and inputs divide (so a
    term of the loss that is made of parameters alone, past the model's outputs, would only be divided). With
    `growth_interval` the scale is dynamic: halved, and the step skipped, when a gradient is not finite; doubled after
    that many good steps in a row."""

    value: float = 1000.0
    growth_interval: int | None = None

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise ValueError(f"a loss scale is positive; got {self.value}")


@spec
class Stage:
    """A change that holds from optimizer step `start` to `stop` (None: to the end). Counted by `attach`."""

    start: int
    stop: int | None = None
    off: tuple[str, ...] = ()
    """Roles that stay in float during the stage."""
    roles: Roles | None = None
    """Roles that replace the recipe's during the stage (only those given); each must have been float before or share
    its kind, see `model.attach`."""
    result: QSpec | None = None
    """Quantizer of the layer's output during the stage; None keeps `Products.result`."""
    lr: tuple[float, float] | None = None
    """(low, high): the learning rate climbs linearly from low to high at the middle of the stage and back."""

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise ValueError(f"a stage runs from a step >= 0 to a later one; got {self.start} to {self.stop}")
        if self.lr is not None and self.stop is None:
            raise ValueError("a stage with a learning rate triangle needs a stop")


@spec
class Recipe:
    """One method with its hyper-parameters."""

    name: str
    roles: Roles = Roles()
    products: Products = Products()
    rules: tuple[Rule, ...] = ()
    layers: tuple[str, ...] = ("linear", "conv")
    """Kinds of layer that are quantized: linear (with the projections of attention), conv, embedding, attention (its
    two products)."""
    swaps: tuple[Swap, ...] = ()
    steps: tuple[Any, ...] = ()
    update: Update = Update()
    loss_scale: LossScale | None = None
    schedule: tuple[Stage, ...] = ()
    criterion: str | None = None
    """Loss the paper trains with, where it is not the task's usual one: `sse`, `squared_hinge`."""
    seed: int = 0
    """Seed of every random stream of the method."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The options `create` was called with, for the record."""

    def __post_init__(self) -> None:
        for layer in self.layers:
            if layer not in LAYERS:
                raise ValueError(f"unknown kind of layer {layer!r}; {nearest(layer, LAYERS)}")

    def to_json(self, indent: int | None = 2) -> str:
        """The recipe as JSON text."""
        return json.dumps({"lowbit": VERSION} | to_data(self), indent=indent)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises:
            ValueError: no JSON, another version, or a name that no specification of this library has.
        """
        from . import methods  # noqa: F401  (a method's own specifications are known once its file is imported)

        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a recipe: {error}") from None
        version = data.pop("lowbit", None) if isinstance(data, dict) else None
        if version != VERSION:
            raise ValueError(f"this is no recipe of version {VERSION}: found {version!r}; save it again with this one")
        recipe = from_data(data)
        if not isinstance(recipe, Recipe):
            raise ValueError(f"the file holds a {type(recipe).__name__}, not a Recipe")
        return recipe
