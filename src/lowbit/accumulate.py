"""Accumulators: how the sums inside a product are carried out.

- `Float32`, and None where `integer.py` does not take the product: PyTorch's float operator on grid values (float32
  sums, float64 for float64 operands).
- `Chunked`: a low-precision float accumulator, rounded after every addition.
- `Int32`: the product runs on integer codes with int32 sums; the scales are applied to the result. Both operands need
  integer grids without a zero point, and scales that are constant along the summed axis.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .backward import Coded
from .blocks import PerTensor
from .formats import Int
from .integer import constant_scales, legal_blocks
from .ops.chunked import chunked_mm
from .ops.int8_mm import int8_mm
from .products import ConvProduct, ConvTransposeProduct, LinearProduct, MatmulProduct, ProductOps, Views
from .quantizer import Quantizer
from .recipe import Chunked, Float32, Int32

__all__ = ["Operand", "multiply"]


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand of a product."""

    values: Tensor
    coded: Coded | None = None
    """Its codes and scales, where it was quantized."""
    quantizer: Quantizer | None = None


def multiply(
    ops: ProductOps, which: str, accumulator: Chunked | Int32 | Float32 | None, left: Operand, right: Operand, name: str
) -> Tensor:
    """Product `which` (out, grad_a, grad_w) of two operands.

    Raises:
        ValueError: an operand that the accumulator can't take.
    """
    function = getattr(ops, which)
    if accumulator is None or isinstance(accumulator, Float32) or not left.values.numel() or not right.values.numel():
        return function(left.values, right.values)
    if isinstance(accumulator, Chunked):
        fmt = accumulator.format
        bias = 2 ** (fmt.exponent - 1) - 1 if fmt.bias is None else fmt.bias

        def chunked(a: Tensor, b: Tensor, row_axes: int, depth_axes: int) -> Tensor:
            arguments = accumulator.chunk, fmt.exponent, fmt.mantissa, bias, row_axes, depth_axes
            return chunked_mm(a.float(), b.float(), *arguments)

        return function(left.values, right.values, Views(chunked)).to(left.values.dtype)
    where = f"{name}.{which}"
    codes = _codes(left, where), _codes(right, where)
    scale = _scale(ops, which, "left", left, where) * _scale(ops, which, "right", right, where)

    def integer(a: Tensor, b: Tensor) -> Tensor:
        return int8_mm(a, b, accumulator.split)

    sums = function(*codes, integer)
    return sums.to(left.values.dtype) * scale


def _codes(operand: Operand, where: str) -> Tensor:
    """The operand's codes as int8, in its shape. NaN has none; the scale of its block is NaN and tells."""
    coded, q = operand.coded, operand.quantizer
    if coded is None or q is None or not isinstance(coded.format, Int) or coded.format.bits > 8 or coded.extra:
        raise ValueError(
            f"{where}: an int32 accumulator needs operands on an integer grid of at most 8 bits, set both "
            "roles or use another accumulator"
        )
    if coded.zero is not None:
        raise ValueError(f"{where}: an int32 accumulator needs symmetric grids; this one has a zero point")
    if coded.format.max > 127:
        raise ValueError(f"{where}: codes up to {coded.format.max:g} don't fit int8; use a signed grid")
    return q.spec.blocks.unview(coded.grid.to(torch.int8), operand.values.shape, q.layout)


def _scale(ops: ProductOps, which: str, side: str, operand: Operand, where: str) -> Tensor:
    """The operand's scale, shaped to multiply the product's result."""
    assert operand.coded is not None and operand.quantizer is not None
    scale, blocks, shape = operand.coded.scale, operand.quantizer.spec.blocks, operand.values.shape
    if isinstance(blocks, PerTensor):
        return scale.reshape(())
    if not constant_scales(operand.quantizer, which, side, len(shape)):
        raise ValueError(
            f"{where}: the {side} operand's scale must be constant along the summed axis, so its blocks "
            f"are {legal_blocks(which, side).__name__} or PerTensor; got {blocks}"
        )
    if isinstance(ops, LinearProduct):
        # a row scale of the left operand multiplies rows of the result, every other one its columns or rows
        if which == "grad_w":
            down = (side == "left") != ops.transposed
            return scale.reshape(-1, 1) if down else scale.reshape(1, -1)
        return scale.reshape(*shape[:-1], 1) if side == "left" else scale.reshape(-1)
    if isinstance(ops, (ConvProduct, ConvTransposeProduct)):
        return _conv_scale(ops, which, side, scale)
    assert isinstance(ops, MatmulProduct)
    if ops.a_shape[:-2] != ops.w_shape[:-2]:
        batch = f"{tuple(ops.a_shape[:-2])} and {tuple(ops.w_shape[:-2])}"
        raise ValueError(
            f"{where}: an attention product whose batch axes broadcast ({batch}) accumulates in int32 "
            "with PerTensor scales only"
        )
    down = (which != "grad_w") == (side == "left")
    return scale.reshape(*shape[:-2], *((-1, 1) if down else (1, -1)))


def _conv_scale(ops: ConvProduct | ConvTransposeProduct, which: str, side: str, scale: Tensor) -> Tensor:
    tail = [1] * (len(ops.w_shape) - 2)
    transposed = isinstance(ops, ConvTransposeProduct)
    if which == "grad_w":  # the result is (first, second / groups, ...)
        if (side == "left") != transposed:
            return scale.reshape(-1, 1, *tail)
        first = ops.w_shape[0]
        per_group = scale.reshape(ops.groups, 1, -1).expand(-1, first // ops.groups, -1)
        return per_group.reshape(first, -1, *tail)
    if side == "left":
        return scale.reshape(-1, 1, *tail)
    if (which == "out") == transposed:  # this axis of the weight numbers channels within their group
        scale = scale.flatten().repeat(ops.groups)
    return scale.reshape(1, -1, *tail)
