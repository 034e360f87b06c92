"""Applying a recipe to a model.

`apply` first plans, which changes nothing and may raise; then it converts layers in place. A failure half-way is
undone, so the model is either converted or as it was.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from . import attention, huggingface, layers
from .backward import as_output
from .control import Control, Left, control_of, find_control, layers_of, quantizers_of
from .layers import LayerQuant, Layouts
from .quantizer import Quantizer
from .recipe import Products, Recipe, Roles, Stage
from .serial import nearest
from .swaps import SWAPS

__all__ = ["apply", "calibrate", "penalty", "quantizer"]

KINDS: dict[type[nn.Module], tuple[str, type[nn.Module], Layouts]] = {
    nn.Linear: ("linear", layers.QLinear, layers.LINEAR),
    nn.Conv1d: ("conv", layers.QConv1d, layers.CONV),
    nn.Conv2d: ("conv", layers.QConv2d, layers.CONV),
    nn.Conv3d: ("conv", layers.QConv3d, layers.CONV),
    nn.ConvTranspose2d: ("conv", layers.QConvTranspose2d, layers.CONV_TRANSPOSE),
    nn.Embedding: ("embedding", layers.QEmbedding, layers.LINEAR),
}


@dataclasses.dataclass
class Item:
    """One weight of the model that a recipe may quantize."""

    name: str
    module: nn.Module
    kind: str
    layouts: Layouts
    weight: Tensor | None
    convert: type[nn.Module] | None = None
    """Class of the converted layer; None for a part of an attention module."""
    quant: LayerQuant | None = None


def apply(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Convert `model` in place as `recipe` says and return it.

    Parameters keep their names, shapes and ties; a float checkpoint loads before or after. Layers that stay in float
    are listed by `lowbit.report(model)` with the reason.

    Raises:
        TypeError: `recipe` is no `Recipe`.
        ValueError: a recipe was applied before, the recipe matches no layer, or a layer can't do what it asks. The
            model is as it was.
    """
    convert(model, recipe)
    return model


def convert(model: nn.Module, recipe: Recipe) -> Callable[[], None]:
    """As `apply`; returns what makes the model again what it was."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f"apply needs a Recipe, got {type(recipe).__name__}; lowbit.create({str(recipe)!r}) makes one")
    if find_control(model) is not None:
        raise ValueError(f"recipe {control_of(model).recipe.name!r} was applied before; apply to a fresh copy")
    if unknown := [s for swap in recipe.swaps for s in (swap.old, swap.new) if s not in SWAPS]:
        raise ValueError(f"unknown layer {unknown[0]!r} in a swap; {nearest(unknown[0], SWAPS)}")

    items, left = _plan(model, recipe)
    wanted = bool(recipe.roles.named() or any(r.roles and r.roles.named() for r in recipe.rules))
    if wanted and not any(item.quant is not None for item in items):
        why = "; ".join(f"{entry.name or 'the model'}: {entry.reason}" for entry in left[:3]) or "it has no layer"
        raise ValueError(f"recipe {recipe.name!r} matches no layer of this model ({why})")
    undo: list[Callable[[], None]] = []
    try:
        _swap(model, recipe, undo)
        _convert(items, undo)
        _no_fast_path(model, undo)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        control = Control(recipe, tuple(left), device)
        control.train(model.training)
        home = next((i.quant for i in items if i.quant is not None), None)
        if home is not None:
            home.add_module("control", control)
        else:
            model.__dict__[Control.ATTRIBUTE] = control
            undo.append(lambda: model.__dict__.pop(Control.ATTRIBUTE))
        if recipe.loss_scale is not None:
            undo.append(model.register_forward_hook(scale_outputs).remove)
            undo.append(model.register_forward_pre_hook(unscale_inputs, with_kwargs=True).remove)
        if recipe.schedule:
            undo.append(model.register_forward_pre_hook(follow_schedule).remove)
        if recipe.steps:
            undo.append(_snapshot(model))
        for step in recipe.steps:
            step.run(model, {i.name: i for i in items if i.quant is not None})
    except BaseException:
        _take_back(undo)
        raise
    return lambda: _take_back(undo)


def _take_back(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


def _plan(model: nn.Module, recipe: Recipe) -> tuple[list[Item], list[Left]]:
    items, left = _items(model)
    names = [i.name for i in items] + [entry.name for entry in left]
    for rule in recipe.rules:
        if not any(c in rule.name for c in "*?[") and rule.name not in names:
            raise ValueError(f"a rule names {rule.name!r}, which this model lacks; {nearest(rule.name, names)}")
    numbered = [i.name for i in items if i.kind in ("linear", "conv")]
    ends = {"first": numbered[:1], "last": numbered[-1:]}
    for item in items:
        roles, products, rule_hit = recipe.roles, recipe.products, None
        for rule in recipe.rules:
            if (
                fnmatch.fnmatchcase(item.name, rule.name)
                and rule.type in ("any", item.kind)
                and (rule.where == "any" or item.name in ends[rule.where])
            ):
                rule_hit = rule
                roles = roles if rule.roles is None else rule.roles
                products = products if rule.products is None else rule.products
        reason = None
        if item.kind not in recipe.layers:
            reason = f"{item.kind!r} is not among the recipe's layers ({', '.join(recipe.layers)})"
        elif item.kind == "embedding":
            roles, products = Roles(W=roles.W, G=roles.G, U=roles.U), Products()
        elif item.kind == "attention":
            roles = Roles(A=roles.A, E=roles.E)  # both operands are activations
        if reason is None and not roles.named() and products == Products():
            reason = "a rule leaves it in float" if rule_hit is not None else "the recipe quantizes no role of it"
        if reason is not None:
            left.append(Left(item.name, type(item.module).__name__, reason))
            continue
        stages = recipe.schedule if roles.named() else ()
        item.quant = LayerQuant(
            item.kind, item.name, roles, products, item.layouts, item.weight, stages, recipe.seed, recipe.update.states
        )
        item.quant.train(item.module.training)
        if (sample := next(item.module.parameters(), None)) is not None:
            item.quant.to(sample.device)
    return items, left


def _items(model: nn.Module) -> tuple[list[Item], list[Left]]:
    """Every weight that could be quantized, in order of registration, and the modules that can't be converted."""
    items: list[Item] = []
    left: list[Left] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if any(isinstance(p, nn.UninitializedParameter) for p in module.parameters(recurse=False)):
            raise ValueError(f"the weight of {name!r} has no shape yet; run one batch through the model before apply")
        if isinstance(module, nn.MultiheadAttention):
            inside.add(id(module.out_proj))  # its weight is read by the attention module itself
            if why := attention.refusal(module):
                left.append(Left(name, type(module).__name__, why))
                continue
            named = {k: w for k, (w, _) in attention.QMultiheadAttention.parts(module).items()}  # type: ignore
            for part, weight in named.items():
                items.append(Item(_join(name, part), module, "linear", layers.LINEAR, weight))
            for part in attention.PRODUCTS:
                items.append(Item(_join(name, part), module, "attention", layers.MATMUL, None))
            continue
        if huggingface.has_interface(module):
            for part in attention.PRODUCTS:
                items.append(Item(_join(name, part), module, "attention", layers.MATMUL, None))
        elif why := huggingface.own_attention(module):
            left.append(Left(name, type(module).__name__, why))
        found = _kind(module)
        if isinstance(found, str):
            left.append(Left(name, type(module).__name__, found))
        elif found is not None:
            kind, cls, layouts = found
            items.append(Item(name, module, kind, layouts, module.weight, cls))  # type: ignore[arg-type]
    return items, left


def _kind(module: nn.Module) -> tuple[str, type[nn.Module], Layouts] | str | None:
    """How a module is converted; a text says why it can't be; None: it has no weights of its own to speak of."""
    cls = type(module)
    for base, (kind, converted, layouts) in KINDS.items():
        if isinstance(module, base):
            if cls is base:
                return kind, converted, layouts
            if cls.forward is base.forward:  # a subclass that computes what its base does, parametrizations included
                made = type(f"Q{cls.__name__}", (converted, cls), {"__doc__": cls.__doc__})
                return kind, made, layouts
            return f"{cls.__name__} overrides the forward of {base.__name__}"
    if cls.__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None:
        return "linear", layers.transposed_linear(cls), layers.CONV1D
    if isinstance(module, parametrize.ParametrizationList):
        return None  # what the weight of the module above is made of
    computed = parametrize.is_parametrized(module)
    if computed or any(p.dim() >= 2 for p in module.parameters(recurse=False)):
        return f"{cls.__name__} has no quantized version"
    return None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _swap(model: nn.Module, recipe: Recipe, undo: list[Callable[[], None]]) -> None:
    for swap in recipe.swaps:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__ == swap.old:
                    new = SWAPS[swap.new](child)
                    new.train(child.training)
                    setattr(parent, name, new)
                    undo.append(lambda parent=parent, name=name, child=child: setattr(parent, name, child))  # type: ignore


def _convert(items: list[Item], undo: list[Callable[[], None]]) -> None:
    grouped: dict[int, tuple[nn.Module, dict[str, LayerQuant], dict[str, LayerQuant]]] = {}
    for item in items:
        if item.quant is None:
            continue
        module, before = item.module, item.module.__class__
        if item.convert is None:
            _, projections, products = grouped.setdefault(id(module), (module, {}, {}))
            (projections if item.kind == "linear" else products)[item.name.rsplit(".", 1)[-1]] = item.quant
            continue
        module.__class__ = item.convert
        module.add_module("quant", item.quant)
        undo.append(lambda m=module, c=before: _restore(m, c, "quant"))  # type: ignore[misc]
    for module, projections, products in grouped.values():
        if not isinstance(module, nn.MultiheadAttention):
            huggingface.convert(module, products, undo)
            continue
        before = module.__class__
        attention.convert(module, projections, products)
        undo.append(lambda m=module, c=before: _restore(m, c, "projections", "products"))  # type: ignore[misc]


def _no_fast_path(model: nn.Module, undo: list[Callable[[], None]]) -> None:
    # In evaluation nn.TransformerEncoderLayer may hand its raw weights to one fused operator, past the layers in it.
    for module in model.modules():
        for cls, name, off in (
            (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
            (nn.TransformerEncoder, "use_nested_tensor", False),
        ):
            if isinstance(module, cls) and getattr(module, name, off) != off:
                before = getattr(module, name)
                undo.append(lambda m=module, n=name, v=before: setattr(m, n, v))  # type: ignore[misc]
                setattr(module, name, off)


def _restore(module: nn.Module, cls: type[nn.Module], *names: str) -> None:
    module.__class__ = cls
    for name in names:
        delattr(module, name)


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that brings back every module and the values of every tensor as they are now."""
    modules = [
        (m, m.__class__, {k: dict(v) if isinstance(v, dict) else v for k, v in m.__dict__.items()})
        for m in model.modules()
    ]
    values = [(t, t.detach().clone(), t.requires_grad) for t in (*model.parameters(), *model.buffers())]

    def restore() -> None:
        for module, cls, state in modules:
            module.__class__ = cls
            for key in set(module.__dict__) - set(state):
                del module.__dict__[key]
            for key, value in state.items():
                now = module.__dict__.get(key)
                if isinstance(value, dict) and isinstance(now, dict):
                    now.clear()
                    now.update(value)
                else:
                    module.__dict__[key] = value
        with torch.no_grad():
            for tensor, value, learns in values:
                if tensor.shape == value.shape:
                    tensor.copy_(value)
                else:
                    tensor.data = value
                tensor.requires_grad_(learns)

    return restore


def penalty(model: nn.Module) -> Tensor:
    """The method's extra loss term, a scalar; 0 where it has none. Add it to the loss."""
    terms = [t for q in quantizers_of(model) if (t := q.penalty()) is not None]
    if terms:
        return _scale(torch.stack([t.reshape(()) for t in terms]).sum(), control_of(model))
    return torch.zeros((), device=next((p.device for p in model.parameters()), None))


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Set learned and tracked scales from data, without training.

    Args:
        model: a model that a recipe was applied to; runs in evaluation mode and returns to its own.
        batches: inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments each. A pair
            (input, target) as a data loader gives it is used without its target.

    Raises:
        ValueError: no recipe was applied, or no batch was given.
    """
    control_of(model)
    modes = {m: m.training for m in model.modules()}
    found = list(quantizers_of(model))
    model.eval()
    for q in found:
        q.calibrating = True
    count = 0
    try:
        for batch in batches:
            count += 1
            if isinstance(batch, dict):
                model(**batch)
            elif isinstance(batch, (tuple, list)):
                model(batch[0])
            else:
                model(batch)
    finally:
        for q in found:
            q.calibrating = False
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise ValueError("calibrate was given no batch")
    return model


def quantizer(name: str, role: str, **options: Any) -> Quantizer:
    """One role of a method on its own, for analysis and tests: `quantizer("twn", "W")(w)`.

    Raises:
        ValueError: unknown method, option or role, or a role the method leaves in float.
    """
    from .methods import create

    recipe = create(name, **options)
    if role not in tuple("WAEGU"):
        raise ValueError(f"unknown role {role!r}; {nearest(role, 'WAEGU')}")
    named = recipe.roles.named()
    if role not in named:
        raise ValueError(f"method {name!r} leaves role {role} in float; it quantizes {', '.join(named) or 'nothing'}")
    return Quantizer.make(named[role], layers.LINEAR.of(role), f"{name}.{role}", seed=recipe.seed)


class _Scaled(torch.autograd.Function):
    """The identity whose gradient is multiplied by `scale`, or divided."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, divide: bool) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.divide = divide
        return as_output(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (scale,) = ctx.saved_tensors
        scale = scale.to(grads[0].dtype)
        return grads[0] / scale if ctx.divide else grads[0] * scale, None, None


class _Unscale:
    """Hook of a parameter: its gradient without the loss scale."""

    def __init__(self, control: Control) -> None:
        self.control = control

    def __call__(self, grad: Tensor) -> Tensor:
        return grad / self.control.loss_scale.to(grad.dtype)


def _scale(x: Any, control: Control, divide: bool = False) -> Any:
    """A tensor whose gradient carries the loss scale from here on, or no longer; anything else as it is."""
    if control.recipe.loss_scale is None or not control.is_attached:
        return x
    scale = control.loss_scale.clone()

    def scaled(t: Any) -> Any:
        floating = isinstance(t, Tensor) and t.requires_grad and t.is_floating_point()
        return _Scaled.apply(t, scale, divide) if floating else t

    return tree_map(scaled, x)


def scale_outputs(model: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: the loss scale enters the backward pass at the model's outputs, once an optimizer is attached."""
    return _scale(output, control_of(model))


def unscale_inputs(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Forward pre-hook: the loss scale leaves the backward pass at the model's inputs and parameters."""
    control = control_of(model)
    if not torch.is_grad_enabled() or not control.is_attached:
        return None
    if not torch.compiler.is_compiling():
        unscale_parameters(model)  # those that were frozen until now
    return _scale((args, kwargs), control, divide=True)


def unscale_parameters(model: nn.Module) -> None:
    """Divide the gradients of the parameters inside by the loss scale, each once."""
    control = control_of(model)
    for module in model.modules():
        if unscale_inputs not in module._forward_pre_hooks.values():
            continue
        for p in module.parameters():
            hooks = (p._backward_hooks or {}).values()
            if p.requires_grad and not any(isinstance(h, _Unscale) and h.control is control for h in hooks):
                p.register_hook(_Unscale(control))


def follow_schedule(model: nn.Module, args: Any) -> None:
    """Forward pre-hook: the stage of the schedule holds from the first forward pass of its first step."""
    set_stage(model)


def set_stage(model: nn.Module) -> Stage | None:
    """Tell every layer which stage of the schedule holds at the present step."""
    control = control_of(model)
    if not control.recipe.schedule:
        return None
    index, stage = control.stage()
    for layer in layers_of(model).values():
        layer.stage, layer.off = index, () if stage is None else stage.off
    return stage
