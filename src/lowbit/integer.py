"""Integer execution: products of int8 codes instead of real values.

Codes are multiplied where both operands have them, their scales are constant along the summed axis, and a kernel makes
it worth while. A layer whose products all run so (or on the float tensors themselves, where a recipe leaves a product
in float) never forms the real values: autograd keeps int8 codes, a quarter of the bytes. The result is that of the
simulated products but for the rounding of float sums: out = float32(sum of codes) * (left scale * right scale) + bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from .blocks import PerChannel, PerGroup, PerRow, PerTensor, PerTile
from .ops.backends import compiled_isas
from .products import ConvProduct, ConvTransposeProduct, LinearProduct, ProductOps
from .quantizer import Quantizer
from .recipe import Chunked, Float32, Int32, Keep

if TYPE_CHECKING:
    from .layers import LayerQuant, Run

__all__ = [
    "CODES",
    "OPERANDS",
    "Codes",
    "IntegerProduct",
    "constant_scales",
    "describe",
    "executions",
    "fast_products",
    "integer_product",
    "legal_blocks",
    "plan",
]

T = TypeVar("T")
OPERANDS = {"out": ("A", "W"), "grad_a": ("E", "W"), "grad_w": ("E", "A")}
FAST = ("avx512amx", "avx512vnni")
"""Instruction sets whose int8 products are faster than float32 ones."""
CODES = "int8 codes, int32 sums"
"""How a product on codes is described."""
Codes = tuple[Tensor, Tensor]
"""int8 codes in the operand's own shape, and scales `(blocks,)`."""


def fast_products(device: str = "cpu") -> bool:
    """Whether int8 products are faster than float32 ones on this kind of device, here."""
    return device == "cpu" and compiled_isas()[:1] in [(isa,) for isa in FAST]


def legal_blocks(which: str, side: str) -> type[PerRow] | type[PerChannel]:
    """The finest blocks whose scales are constant along the summed axis of an operand."""
    return PerChannel if which == "grad_w" or (which, side) == ("grad_a", "right") else PerRow


def constant_scales(q: Quantizer, which: str, side: str, ndim: int) -> bool:
    """Whether the scales of an operand of `ndim` axes are constant along the summed axis."""
    blocks = q.spec.blocks
    if isinstance(blocks, PerTensor):
        return True
    legal = legal_blocks(which, side)()
    return not isinstance(blocks, (PerGroup, PerTile)) and blocks.kept(ndim, q.layout) == legal.kept(ndim, q.layout)


def _reason(q: Quantizer | Keep | None, which: str, side: str, ndim: int) -> str:
    """Why an operand can't enter an integer product; empty if it can."""
    role = OPERANDS[which][side == "right"]
    if not isinstance(q, Quantizer):
        return f"{role} is float"
    if why := q.why_no_codes():
        return f"{role}: {why}"
    if not constant_scales(q, which, side, ndim):
        return f"{role}: the scales of {q.spec.blocks} are not constant along the summed axis"
    return ""


def executions(layer: LayerQuant, weight_dims: int, device: str = "cpu") -> dict[str, str]:
    """Of each product of a layer, at its present stage: why it runs on real values; empty where it runs on codes.

    `weight_dims`: axes of the weight; 2 for a linear layer, 4 for a convolution over images. `device`: its kind.
    """
    found = {}
    for which, sides in OPERANDS.items():
        how = getattr(layer.products, which)
        reason = ""
        if isinstance(how.accumulator, Chunked):
            reason = "chunked accumulator"
        elif isinstance(how.accumulator, Float32):
            reason = "the recipe asks for float32 sums"
        elif layer.kind == "attention":
            reason = "attention"
        elif weight_dims not in (2, 3, 4):
            reason = f"convolution over {weight_dims - 2} axes"
        elif how.samples > 1:
            reason = "averages samples"
        elif how.accumulator is None and not fast_products(device):
            reason = "no int8 kernel for this CPU" if device == "cpu" else f"no int8 kernel for {device}"
        for side, role in zip(("left", "right"), sides, strict=True):
            override = layer.override(which, side)
            q = layer.coding(role) if override is None else override
            if role == "E" and override is None and layer.products.error_at == "input":
                q = None
            reason = reason or _reason(q, which, side, weight_dims)
        found[which] = reason
    return found


Plan = dict[str, Literal["codes", "raw", "values"]]
"""How each product of a layer runs: on int8 codes, on the float tensors as they are, or on real values on a grid."""


def plan(layer: LayerQuant, weight_dims: int, needed: Sequence[str], device: str = "cpu") -> Plan | None:
    """How the products `needed` run, `out` being one of them, where `out` runs on codes; None if it does not, or if
    the others want what an integer execution does not have."""
    reasons = executions(layer, weight_dims, device)
    if reasons["out"]:
        return None
    found: Plan = {"out": "codes"}
    if len(needed) > 1:
        roles = [q for r in "AW" if (q := layer.role(r)) is not None]
        if layer.products.error_at != "output" or any(q.spec.backward.by_block for q in roles):
            return None  # E is quantized between layers; the gradient rules need the tensors
        for which in needed[1:]:
            how = getattr(layer.products, which)
            if not reasons[which]:
                found[which] = "codes"
            elif isinstance(how.accumulator, (Chunked, Int32)) or how.samples > 1:
                return None
            elif _on_raw(layer, which):
                found[which] = "raw"
            elif layer.training:
                return None  # a second quantization in the backward pass would cost more than integers save
            else:
                found[which] = "values"
    return found


def describe(layer: LayerQuant, weight_dims: int, device: str = "cpu") -> dict[str, str]:
    """How each product of a layer runs at its present stage, in words; empty for an embedding, which has none."""
    if layer.kind == "embedding":
        return {}
    reasons = executions(layer, weight_dims, device)
    words = {which: f"real values: {reason}" if reason else CODES for which, reason in reasons.items()}
    if not reasons["out"] and plan(layer, weight_dims, tuple(OPERANDS), device) is None:
        # training needs real values of the layer's operands, so no product of it runs on codes there
        why = next((f"{which}: {reason}" for which, reason in reasons.items() if reason), "the gradient rule")
        words = {w: text if reasons[w] else "real values: other products need them" for w, text in words.items()}
        words["out"] = f"int8 codes in evaluation, real values in training ({why})"
    return words


def _on_raw(layer: LayerQuant, which: str) -> bool:
    """Whether a product multiplies the float tensors themselves."""
    return all(
        isinstance(o := layer.override(which, side), Keep) or (o is None and layer.role(role) is None)
        for side, role in zip(("left", "right"), OPERANDS[which], strict=True)
    )


def _matrix(x: Tensor) -> Tensor:
    """All axes but the last as one; a reshape that changes nothing would take microseconds."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def integer_product(
    ops: ProductOps, which: str, left: Codes, right: Codes, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Product `which` of codes, scaled; `bias (outputs,)` for `out`."""
    kernels = torch.ops.lowbit  # which check what they get themselves
    (a, a_scale), (b, b_scale), to = left, right, dtype or torch.float32
    if isinstance(ops, LinearProduct):
        if which == "grad_w":
            rows, columns = _matrix(a), _matrix(b)
            if ops.transposed:
                rows, columns, a_scale, b_scale = columns, rows, b_scale, a_scale
            return kernels.int8_matmul(rows.t(), columns, a_scale, b_scale, None, to)
        w = b if (which == "out") == ops.transposed else b.t()
        y = kernels.int8_matmul(_matrix(a), w, a_scale, b_scale, bias, to)
        return y if a.dim() == 2 else y.reshape(*a.shape[:-1], y.shape[-1])
    if isinstance(ops, ConvTransposeProduct):
        return _transposed(ops, which, left, right, bias, to)
    assert isinstance(ops, ConvProduct)
    if len(ops.stride) == 1:  # over one axis: an image of one row
        flat = ConvProduct(
            torch.Size((*ops.a_shape[:2], 1, *ops.a_shape[2:])),
            torch.Size((*ops.w_shape[:2], 1, *ops.w_shape[2:])),
            (1, *ops.stride),
            (0, *ops.padding),
            (1, *ops.dilation),
            ops.groups,
        )
        return integer_product(flat, which, (a.unsqueeze(2), a_scale), (b.unsqueeze(2), b_scale), bias, to).squeeze(2)
    geometry = (ops.stride, ops.padding, ops.dilation, ops.groups, to)
    if which == "out":
        return kernels.int8_conv(a, b, a_scale, b_scale, bias, *geometry)
    if which == "grad_a":
        return kernels.int8_conv_grad_a(a, b, a_scale, b_scale, ops.a_shape, *geometry)
    return kernels.int8_conv_grad_w(a, b, a_scale, b_scale, ops.w_shape, *geometry, ops.channels_last)


def _transposed(
    ops: ConvTransposeProduct, which: str, left: Codes, right: Codes, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """A transposed convolution: the products of the convolution whose `grad_a` it is, operands exchanged."""
    if which == "grad_w":
        y = integer_product(ops.mirror, "grad_w", (ops.fit(right[0]), right[1]), left, None, dtype)
    elif which == "grad_a":
        y = integer_product(ops.mirror, "out", left, right, None, dtype)
        inside = (slice(None), slice(None), *(slice(n) for n in ops.a_shape[2:]))
        y = y[inside]
    else:
        y = integer_product(ops.mirror, "grad_a", (ops.fit(left[0]), left[1]), right)
        y = (y if bias is None else y + bias.reshape(1, -1, *[1] * (y.dim() - 2))).to(dtype)
    return y


def outside_autocast(device: str, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` with autocast off for this kind of device; entering `torch.autocast` takes a while where it
    is not on."""
    if not torch.is_autocast_enabled(device):
        return function(*args)
    with torch.autocast(device, enabled=False):
        return function(*args)


class IntegerProduct(torch.autograd.Function):
    """A layer's three products where each runs on codes or on the float tensors themselves."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor, bias: Tensor | None, run: Run, *keys: Tensor | None) -> Tensor:
        by_slot = run.by_slot(keys)
        codes_w = run.weight_codes("out", w, by_slot)
        flat = bias if bias is None or bias.dim() == 1 else bias.reshape(-1)
        codes_a, kept = run.activation(a, by_slot)  # a product follows its cast at once: the codes are in the caches
        y = integer_product(run.ops, "out", codes_a, codes_w, flat, run.dtype)
        ctx.run, ctx.count, ctx.bias, ctx.dtype = run, len(keys), None if bias is None else bias.shape, a.dtype
        raw = a if run.plan.get("grad_w", "codes") != "codes" else None
        ctx.save_for_backward(w if "grad_a" in run.plan else None, raw, *(kept or (None, None)), *keys)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.run.flow.check_derivative()
        return outside_autocast(grads[0].device.type, IntegerProduct.gradients, ctx, grads[0])

    @staticmethod
    def gradients(ctx: Any, e: Tensor) -> Any:
        """Those that are asked for, one for each argument of `forward`."""
        run: Run = ctx.run
        w, a, codes, scale, *keys = ctx.saved_tensors
        by_slot = run.by_slot(keys)
        grad_a = grad_w = grad_bias = sums = None
        wanted = [w for w, needed in (("grad_a", 0), ("grad_w", 1)) if ctx.needs_input_grad[needed]]
        on_codes = [which for which in wanted if run.plan[which] == "codes"]
        biased = ctx.bias is not None and ctx.needs_input_grad[2]
        codes_w = run.weight_codes("grad_a", w, by_slot) if "grad_a" in on_codes else None
        error: dict[str, Codes] = {}
        if len(on_codes) == 2:
            summed = biased and isinstance(run.ops, LinearProduct)  # whose bias belongs to the last axis
            *pair, sums = run.both_codes(("grad_a", "left"), ("grad_w", "left"), e, by_slot, summed)
            error = dict(zip(on_codes, pair, strict=True))
        elif on_codes:
            error = {which: run.codes(which, "left", e, by_slot) for which in on_codes}
        if codes_w is not None:
            grad_a = integer_product(run.ops, "grad_a", error["grad_a"], codes_w, None, ctx.dtype)
        elif "grad_a" in wanted:
            real = run.real("grad_a", "left", e.float(), by_slot), run.real("grad_a", "right", w, by_slot)
            grad_a = run.ops.grad_a(*real).to(ctx.dtype)
        if "grad_w" in error:
            grad_w = integer_product(run.ops, "grad_w", error["grad_w"], (codes, scale))
        elif "grad_w" in wanted:
            real = run.real("grad_w", "left", e.float(), by_slot), run.real("grad_w", "right", a.float(), by_slot)
            grad_w = run.ops.grad_w(*real)
        if biased:
            if sums is None:
                grad_bias = e.float().sum_to_size(ctx.bias)
            else:
                grad_bias = sums if len(ctx.bias) == 1 else sums.reshape(ctx.bias)
        return grad_a, grad_w, grad_bias, None, *(None,) * ctx.count
