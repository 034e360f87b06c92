"""`report`: what each layer got, and how much the quantization of each of its tensors costs."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .attention import QMultiheadAttention
from .backward import Coded
from .control import control_of, layers_of
from .integer import CODES, describe
from .layers import LayerQuant, Quantized
from .quantizer import Quantizer, watching
from .recipe import Chunked

__all__ = ["Report", "Row", "report"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of one layer; figures are NaN where nothing was measured."""

    layer: str
    kind: str
    role: str
    """W, A, E, G, U, `result`, `states` (of the optimizer), or the operand of a product such as `grad_w_right`; a
    product (`out`, `grad_a`, `grad_w`), whose format is that of its sums; `-` for a layer left in float."""
    format: str
    bits: float
    """Stored bits of an element, 32 for float."""
    scale: float = math.nan
    """Mean of the scales."""
    sqnr: float = math.nan
    """10 log10(sum x^2 / sum (x - q)^2), in dB; infinite where nothing is lost."""
    clipped: float = math.nan
    """Fraction of elements beyond the ends of the grid."""
    zero: float = math.nan
    """Fraction of elements that became 0 and were not."""
    note: str = ""
    """Why a layer is in float; how a product runs, and why."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows in the order of the model's layers."""

    recipe: str
    rows: tuple[Row, ...]

    def bits(self) -> dict[str, float]:
        """Mean stored bits of each role over the converted layers; a role that such a layer leaves in float counts 32,
        a layer that a rule leaves in float does not count."""
        named: dict[str, list[float]] = {r: [] for r in "WAEGU"}
        layers = list(dict.fromkeys(r.layer for r in self.rows if r.kind != "other"))
        by = {(r.layer, r.role): r.bits for r in self.rows}
        for layer in layers:
            for role in named:
                named[role].append(by.get((layer, role), 32.0))
        return {k: sum(v) / len(v) for k, v in named.items() if v}

    def to_list(self) -> list[dict[str, Any]]:
        """Rows as plain data; NaN becomes None."""
        rows = [dataclasses.asdict(r) for r in self.rows]
        return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in r.items()} for r in rows]

    def __str__(self) -> str:
        head = ("layer", "kind", "role", "format", "bits", "scale", "SQNR dB", "clipped", "to zero", "note")
        body = [head]
        for r in self.rows:
            figures = [f"{v:.3g}" if not math.isnan(v) else "" for v in (r.bits, r.scale, r.sqnr, r.clipped, r.zero)]
            body.append((r.layer, r.kind, r.role, r.format, *figures, r.note))  # type: ignore[arg-type]
        widths = [max(len(row[i]) for row in body) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in body]
        return "\n".join([f"recipe {self.recipe}", *lines])


@dataclasses.dataclass
class Tally:
    """Sums over every use of one quantizer."""

    signal: float = 0.0
    noise: float = 0.0
    clipped: int = 0
    zeroed: int = 0
    count: int = 0
    scale: float = 0.0
    uses: int = 0

    def add(self, x: Tensor, q: Tensor, coded: Coded) -> None:
        x64, q64 = x.double(), q.double()
        if coded.divisor is not None:
            x64 = x64 / coded.divisor
        self.signal += float(x64.square().sum())
        self.noise += float((x64 - q64).square().sum())
        shift = 0 if coded.zero is None else coded.zero
        if not coded.extra:  # where the blocks were transformed, ends of the grid are not ends of x
            low, high = (coded.format.min - shift) * coded.scale, (coded.format.max - shift) * coded.scale
            self.clipped += int(((x64 < low) | (x64 > high)).sum())
        self.zeroed += int(((q == 0) & (x != 0)).sum())
        self.count += x.numel()
        self.scale += float(coded.scale.double().mean())
        self.uses += 1

    @property
    def figures(self) -> dict[str, float]:
        if not self.count:
            return {}
        sqnr = math.inf if self.noise == 0 else 10 * math.log10(max(self.signal, 1e-300) / self.noise)
        return {
            "scale": self.scale / self.uses,
            "sqnr": sqnr,
            "clipped": self.clipped / self.count,
            "zero": self.zeroed / self.count,
        }


def report(model: nn.Module, batch: Any = None, loss: Callable[[Any], Tensor] | None = None) -> Report:
    """What each layer of `model` got from its recipe, and the error of each quantized tensor.

    Args:
        model: a model that a recipe was applied to; it is not changed (figures are taken on a copy).
        batch: input for one forward and backward pass in training mode (a tensor, a tuple or a dict); without it only
            weights have figures.
        loss: from the model's output to a scalar; the mean of its squares if None.

    Raises:
        ValueError: no recipe was applied.
    """
    control = control_of(model)
    tallies = _measure(model, batch, loss)
    rows: list[Row] = []
    weights = {id(layer): (weight.dim(), weight.device.type) for layer, weight, _ in _weights(model)}
    for name, layer in layers_of(model).items():
        for slot, quant in layer.slots.items():
            assert isinstance(quant, Quantizer)
            figures = tallies[name, slot].figures if (name, slot) in tallies else {}
            note = "the right operand, as A" if layer.kind == "attention" and slot == "W" else ""
            rows.append(
                Row(name, layer.kind, slot, str(quant.spec.format), float(quant.spec.format.bits), note=note, **figures)
            )
        for which, how in describe(layer, *weights.get(id(layer), (2, "cpu"))).items():
            chunked = getattr(layer.products, which).accumulator
            if isinstance(chunked, Chunked):
                rows.append(
                    Row(name, layer.kind, which, str(chunked.format), float(chunked.format.bits), note=str(chunked))
                )
            else:
                sums = "int32" if how == CODES else "float32"
                rows.append(Row(name, layer.kind, which, sums, 32.0, note=how))
    rows += [Row(left.name, "other", "-", "float", 32.0, note=f"{left.type}: {left.reason}") for left in control.left]
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    place = {name: order.get(name, order.get(name.rsplit(".", 1)[0], 0)) for name in (r.layer for r in rows)}
    rows.sort(key=lambda r: place[r.layer])
    return Report(control.recipe.name, tuple(rows))


def _measure(model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None) -> dict[tuple[str, str], Tally]:
    # a weight that a hook computes (pruning, the older weight_norm) is no leaf, which deepcopy refuses
    computed = [v for m in model.modules() for v in m.__dict__.values() if isinstance(v, Tensor) and not v.is_leaf]
    twin = copy.deepcopy(model, {id(v): v.detach().clone() for v in computed})
    owner = {id(q): (layer.name, slot) for layer in layers_of(twin).values() for slot, q in layer.slots.items()}
    tallies: dict[tuple[str, str], Tally] = {}

    def watch(quant: Quantizer, x: Tensor, q: Tensor, coded: Coded) -> None:
        if id(quant) in owner:
            tallies.setdefault(owner[id(quant)], Tally()).add(x.detach(), q, coded)

    found = [q for layer in layers_of(twin).values() for q in layer.slots.values() if isinstance(q, Quantizer)]
    with watching(found, watch):
        if batch is not None:
            twin.train()
            output = _call(twin, batch)
            if loss is None:
                parts = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
                total = torch.stack([t.float().square().mean() for t in parts]).sum() if parts else None
            else:
                total = loss(output)
            control = control_of(twin)
            scale = 1.0 if control.recipe.loss_scale is None else float(control.loss_scale)
            if total is not None and total.requires_grad:
                (total * scale).backward()
            _gradients(twin, scale)
        else:
            twin.eval()
            for quant, weight, _ in _weights(twin):
                _run_weight(quant, weight)
    return tallies


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _weights(model: nn.Module) -> Iterator[tuple[LayerQuant, Tensor, Tensor | None]]:
    """Every converted weight, or part of a packed one, with its quantizers and its gradient."""
    for module in model.modules():
        if isinstance(module, QMultiheadAttention):
            for (name, (weight, _)), grad in zip(module.parts().items(), module.grads(), strict=True):
                if name in module.projections:
                    yield module.projections[name], weight.detach(), grad  # type: ignore[misc]
        elif isinstance(module, Quantized) and isinstance(own := getattr(module, "weight", None), Tensor):
            yield module.quant, own.detach(), own.grad if own.is_leaf else None


@torch.no_grad()
def _run_weight(layer: LayerQuant, weight: Tensor) -> None:
    quant = layer.role("W")
    if quant is not None:
        quant.quantize(weight)


@torch.no_grad()
def _gradients(model: nn.Module, loss_scale: float) -> None:
    for layer, weight, grad in _weights(model):
        if (quant := layer.role("G")) is not None and grad is not None:
            quant.gradient(grad / loss_scale, 1.0, quant.update_key())
        if (quant := layer.role("U")) is not None:
            quant.quantize(weight, quant.update_key())
