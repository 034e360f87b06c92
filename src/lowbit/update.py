"""`attach`: what happens around the optimizer's step. Roles G and U, loss scaling, stages of a schedule.

Everything is done by the optimizer's own hooks, so the training loop does not change:

    before the step   skip it if a gradient is not finite (dynamic loss scale)  ->  G on each gradient
    the step          torch.optim's, on the gradients as they are now; or, with `Update.axpy`, three rounded updates
    after the step    per-layer step size  ->  clip  ->  U on each weight, states on their grid  ->  count the step

Gradients are those accumulated since the last `zero_grad`, already divided by the loss scale, so clipping and
accumulation in the user's loop see true values.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from .attention import PROJECTIONS, QMultiheadAttention
from .control import Control, control_of, quantizers_of
from .layers import LayerQuant, Quantized
from .model import set_stage, unscale_parameters
from .quantizer import Quantizer

__all__ = ["attach"]


@dataclasses.dataclass
class Stored:
    """A weight, or the part of a packed one, that a layer's G and U act on."""

    param: nn.Parameter
    part: slice
    quant: LayerQuant
    weight: nn.Parameter
    """The layer's weight, also where `param` is its bias; its shape gives the Glorot bound."""

    def slot(self, role: str) -> Quantizer | None:
        """The quantizer of G, U or `states`; all work in the type of the parameter."""
        return self.quant.role(role)


def attach(model: nn.Module, optimizer: Any) -> Any:
    """Put the recipe's roles G and U, its loss scale and its schedule around the steps of `optimizer`.

    Call it once, after `apply` and after the optimizer was made. Parameters that the method learns (steps, clips) are
    added to the optimizer if they are missing, and never decay: what the paper wants there is in `lowbit.penalty`.

    Args:
        model: a model that a recipe was applied to; also inside DDP or `torch.compile`.
        optimizer: any `torch.optim.Optimizer`, or Accelerate's wrapper of one.

    Returns:
        `optimizer`.

    Raises:
        ValueError: no recipe was applied, an optimizer is attached already, the recipe needs another optimizer, or the
            type of the parameters can't hold the grid of U.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"attach needs a torch.optim.Optimizer, got {type(optimizer).__name__}")
    control = control_of(model)
    if control.is_attached:
        raise ValueError("an optimizer is attached to this model already; apply the recipe to a fresh model")
    update = control.recipe.update
    entries = stored(model, control)
    axpy = update.axpy and isinstance(inner, torch.optim.SGD)
    _check_sgd(inner, entries, axpy)
    _check_types(entries)
    _learned_groups(model, inner)
    hooks = _Hooks(model, control, entries, axpy)
    inner.register_step_pre_hook(hooks.before)
    inner.register_step_post_hook(hooks.after)
    if control.recipe.loss_scale is not None:
        unscale_parameters(model)
    control.attached = id(control)
    return optimizer


def stored(model: nn.Module, control: Control) -> list[Stored]:
    """Every trained weight, and bias where the recipe says so, that the optimizer's step treats specially."""
    found: list[Stored] = []
    seen: set[tuple[int, int | None]] = set()
    update, schedule = control.recipe.update, control.recipe.schedule
    biases = update.biases
    every = update.clip is not None or update.lr_scale != "none"
    staged = any(s.roles is not None and (s.roles.G or s.roles.U) for s in schedule)

    def add(param: Any, part: slice, quant: LayerQuant, weight: Any) -> None:
        has = every or staged or any(r in quant.slots for r in ("G", "U"))
        if isinstance(param, nn.Parameter) and param.requires_grad and (id(param), part.start) not in seen and has:
            seen.add((id(param), part.start))  # a tied weight is stepped once
            found.append(Stored(param, part, quant, weight))

    whole = slice(None)
    for module in model.modules():
        if isinstance(module, QMultiheadAttention):
            packed = module._qkv_same_embed_dim
            for i, name in enumerate(PROJECTIONS):
                if name not in module.projections:
                    continue
                quant: Any = module.projections[name]
                rows = slice(i * module.embed_dim, (i + 1) * module.embed_dim) if i < 3 else whole
                if i == 3:
                    weight, bias = module.out_proj.weight, module.out_proj.bias
                else:
                    weight = module.in_proj_weight if packed else getattr(module, f"{name}_weight")
                    bias = module.in_proj_bias
                add(weight, rows if packed else whole, quant, weight)
                if biases:
                    add(bias, rows, quant, weight)
        elif isinstance(module, Quantized) and getattr(module, "weight", None) is not None:
            add(module.weight, whole, module.quant, module.weight)
            if biases:
                add(getattr(module, "bias", None), whole, module.quant, module.weight)
    return found


def _check_sgd(optimizer: torch.optim.Optimizer, entries: list[Stored], axpy: bool) -> None:
    plain = any("G" in e.quant.slots and e.quant.slots["G"].plain_sgd for e in entries)
    if plain and not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f"this recipe's gradients are finished updates: they need torch.optim.SGD, not {type(optimizer).__name__}"
        )
    refused = ("momentum", "weight_decay") if plain else ("dampening", "nesterov", "maximize") if axpy else ()
    for group in optimizer.param_groups:
        for name in refused:
            if group[name]:
                raise ValueError(f"this recipe's update has no {name}; make SGD without it (got {group[name]})")


def _check_types(entries: list[Stored]) -> None:
    """Stored weights must be able to hold their grid."""
    for entry in entries:
        grid, kind = entry.slot("U"), entry.param.dtype
        if grid is not None and kind in (torch.bfloat16, torch.float16) and grid.spec.format.bits > 8:
            raise ValueError(
                f"{entry.quant.name}: {kind} can't hold stored weights of {grid.spec.format.bits} bits; keep the model "
                "in float32 (autocast is fine)"
            )


def _learned_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Steps and clips in groups of their own, without weight decay."""
    learned = [p for q in quantizers_of(model) for p in q.parameters(recurse=False) if p.requires_grad]
    names = {id(p): name for name, p in model.named_parameters()}
    named = "param_names" in optimizer.param_groups[0]
    ids = {id(p) for p in learned}
    missing = dict.fromkeys(p for p in learned)

    def add(params: list[nn.Parameter], settings: dict[str, Any]) -> None:
        optimizer.add_param_group({"params": [(names[id(p)], p) for p in params] if named else params} | settings)

    for group in list(optimizer.param_groups):
        inside = [p for p in group["params"] if id(p) in ids]
        for p in inside:
            missing.pop(p, None)
        if inside and group.get("weight_decay"):
            if named:
                kept = [n for n, p in zip(group["param_names"], group["params"], strict=True) if id(p) not in ids]
                group["param_names"] = kept
            group["params"] = [p for p in group["params"] if id(p) not in ids]
            add(inside, {k: v for k, v in group.items() if k not in ("params", "param_names")} | {"weight_decay": 0.0})
    if missing:
        add(list(missing), {"weight_decay": 0.0} if "weight_decay" in optimizer.defaults else {})


class _Hooks:
    """The two hooks of one optimizer."""

    def __init__(self, model: nn.Module, control: Control, entries: list[Stored], axpy: bool) -> None:
        self.model, self.control, self.stored, self.axpy = model, control, entries, axpy
        self.update, self.recipe = control.recipe.update, control.recipe
        self.drawn = [q for q in quantizers_of(model) if q.weight and q.spec.stochastic]
        self.skipped = False
        self.before_step: list[Tensor] = []
        self.put_back: list[tuple[nn.Parameter, Tensor | None]] = []
        self.rates: list[tuple[dict[str, Any], Any]] = []

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
            raise ValueError("an attached optimizer takes no closure: gradients must be complete before the step")
        set_stage(self.model)
        self.skipped = self._not_finite(optimizer)
        if self.skipped:
            return
        self._rates(optimizer)
        groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        for entry in self.stored:
            group, quant = groups.get(id(entry.param)), entry.slot("G")
            if quant is not None and group is not None and entry.param.grad is not None:
                grad = entry.param.grad[entry.part]
                grad.copy_(quant.gradient(grad, float(group["lr"]), quant.update_key()))
        if self.update.lr_scale == "glorot":
            self.before_step = [e.param[e.part].clone() for e in self.stored]
        if self.axpy:
            self._axpy(optimizer, groups)

    def _not_finite(self, optimizer: torch.optim.Optimizer) -> bool:
        dynamic = self.recipe.loss_scale is not None and self.recipe.loss_scale.growth_interval is not None
        if not dynamic:
            return False
        assert self.recipe.loss_scale is not None and self.recipe.loss_scale.growth_interval is not None
        params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if all(bool(torch.isfinite(p.grad).all()) for p in params):  # type: ignore[arg-type]
            self.control.good_steps += 1
            if int(self.control.good_steps) >= self.recipe.loss_scale.growth_interval:
                self.control.loss_scale *= 2
                self.control.good_steps.zero_()
            return False
        self.control.loss_scale /= 2
        self.control.good_steps.zero_()
        for p in params:  # an optimizer leaves a parameter without gradient alone
            self.put_back.append((p, p.grad))
            p.grad = None
        return True

    def _rates(self, optimizer: torch.optim.Optimizer) -> None:
        _, stage = self.control.stage()
        if stage is None or stage.lr is None or stage.stop is None:
            return
        low, high = stage.lr
        middle = (stage.stop - stage.start) / 2
        far = abs(int(self.control.step) - stage.start - middle) / middle
        for group in optimizer.param_groups:
            self.rates.append((group, group["lr"]))
            group["lr"] = high - (high - low) * far

    def _axpy(self, optimizer: torch.optim.Optimizer, groups: dict[int, dict[str, Any]]) -> None:
        """g <- R(g + decay * w); v <- R(momentum * v + g); w <- R(w - lr * v). The optimizer then skips w."""
        parts: dict[int, list[tuple[slice, Quantizer | None, Quantizer | None]]] = {}
        for entry in self.stored:
            if (weight := entry.slot("U")) is not None:
                parts.setdefault(id(entry.param), []).append((entry.part, weight, entry.slot("states") or weight))
        params = {id(e.param): e.param for e in self.stored}
        for key, rounded in parts.items():
            p, group = params[key], groups.get(key)
            if group is None or p.grad is None:
                continue
            decay, momentum, lr = group["weight_decay"], group["momentum"], float(group["lr"])
            memory = None
            if momentum:
                memory = optimizer.state[p].get("momentum_buffer")
                if memory is None:
                    memory = optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for part, weight, state in rounded + _rest(p, [r[0] for r in rounded]):
                w, g = p[part], p.grad[part]
                if decay:
                    g = _round(state, g + decay * w)
                if memory is not None:
                    g = _round(state, momentum * memory[part] + g)
                    memory[part] = g
                p[part] = _round(weight, w - lr * g)
            self.put_back.append((p, p.grad))
            p.grad = None

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for group, lr in self.rates:
            group["lr"] = lr
        axpy = {id(p) for p, _ in self.put_back}
        for p, grad in self.put_back:
            p.grad = grad
        self.rates, self.put_back = [], []
        if self.skipped:
            return
        groups = {id(p) for g in optimizer.param_groups for p in g["params"]}
        for i, entry in enumerate(self.stored):
            if id(entry.param) not in groups:  # another optimizer's
                continue
            w = entry.param[entry.part]
            if self.update.lr_scale == "glorot":
                old = self.before_step[i]
                w.copy_(old + (w - old) * _glorot(entry.weight, optimizer))
            if self.update.clip is not None:
                w.clamp_(-self.update.clip, self.update.clip)
            quant = entry.slot("U")
            if quant is not None and id(entry.param) not in axpy:
                w.copy_(_round(quant, w))
            state = entry.slot("states")
            if state is not None and id(entry.param) not in axpy:
                for value in optimizer.state[entry.param].values():
                    if isinstance(value, Tensor) and value.shape == entry.param.shape:
                        value[entry.part] = _round(state, value[entry.part])
        self.before_step = []
        for drawn in self.drawn:
            drawn.redraw()  # fused optimizers change weights without telling autograd
        self.control.step += 1


def _round(quant: Quantizer | None, x: Tensor) -> Tensor:
    return x if quant is None else quant.quantize(x, quant.update_key())


def _rest(p: Tensor, parts: list[slice]) -> list[tuple[slice, Quantizer | None, Quantizer | None]]:
    """The rows of a packed parameter that no part covers: projections left in float."""
    gaps, end = [], 0
    for part in sorted(parts, key=lambda s: s.start or 0):
        gaps.append(slice(end, part.start or 0))
        end = len(p) if part.stop is None else part.stop
    gaps.append(slice(end, len(p)))
    return [(g, None, None) for g in gaps if g.start < g.stop]


def _glorot(weight: Tensor, optimizer: torch.optim.Optimizer) -> float:
    # BinaryConnect's released code: the step is scaled by 1 / sqrt(1.5 / (fan_in + fan_out)), squared for SGD
    receptive = math.prod(weight.shape[2:])
    factor = 1 / math.sqrt(1.5 / (weight.shape[1] * receptive + weight.shape[0] * receptive))
    return factor**2 if isinstance(optimizer, torch.optim.SGD) else factor
