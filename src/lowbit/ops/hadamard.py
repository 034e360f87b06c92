"""Block Hadamard transform, with random signs where they are wanted.

    y = (x diag(s)) (H ⊕ H ⊕ ...)        inverse: y = (x (H ⊕ H ⊕ ...)) diag(s)

H = Sylvester's matrix of order `size`, H_1 = (1), H_2n = ((H_n, H_n), (H_n, -H_n)), times 1 / sqrt(size): symmetric and
orthogonal, so it is its own inverse, and the inverse of the transform with signs is also its transpose.

The order of additions is that of the butterfly with strides 1, 2, 4, ..., each one float32 addition or subtraction; the
factor comes last, in one multiplication by the float32 number nearest to it (exact where size is a power of four).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import Operator, declare

__all__ = ["LARGEST", "hadamard"]

LARGEST = 4096
"""Largest block."""


def _definition(x: Tensor, size: int, signs: Tensor | None, inverse: bool) -> Tensor:
    _check(x, size, signs)
    y = x * _along(signs, x) if signs is not None and not inverse else x
    y = y.reshape(-1, size)
    stride = 1
    while stride < size:
        a, b = y.reshape(-1, size // (2 * stride), 2, stride).unbind(2)
        y = torch.stack((a + b, a - b), 2)
        stride *= 2
    y = y.reshape(x.shape) * size**-0.5
    if signs is not None and inverse:
        y = y * _along(signs, x)
    return y.masked_fill(y.isnan(), torch.nan)  # NaNs have no payload


def _along(signs: Tensor, x: Tensor) -> Tensor:
    return signs.repeat(x.shape[-1] // signs.shape[0])


_op = Operator(
    "lowbit::hadamard",
    _definition,
    "(Tensor x, int size, Tensor? signs, bool inverse) -> Tensor",
)


@_op.register_fake
def _(x: Tensor, size: int, signs: Tensor | None, inverse: bool) -> Tensor:
    _check(x, size, signs)
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.size, signs, ctx.inverse = inputs
    ctx.save_for_backward(*([] if signs is None else [signs]))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    signs = ctx.saved_tensors[0] if ctx.saved_tensors else None
    return torch.ops.lowbit.hadamard(grad, ctx.size, signs, not ctx.inverse), None, None, None


_op.register_autograd(_backward, setup_context=_keep)

declare("lowbit::hadamard", _definition, {"cpu": "C++"})


def hadamard(x: Tensor, size: int, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """Every run of `size` elements along the last axis, times the normalized Hadamard matrix.

    Two operands that are transformed along the axis that their product reduces give the same product: (x H)(w H)^T =
    x w^T. Differentiable in `x`; its gradient is the inverse transform of the gradient.

    Args:
        x: float32 (..., n).
        size: a power of two, 1 to 4096, that divides n.
        signs: float32 of length `size` or n, all 1 or -1: multiplies x before the transform, or, with `inverse`, the
            result after it. The values are not checked: with others the inverse is only the transpose.
        inverse: undo the transform; without signs the transform is its own inverse.

    Raises:
        TypeError: x or signs are not float32.
        ValueError: a size or a shape that does not fit.
    """
    _check(x, size, signs)
    return torch.ops.lowbit.hadamard(x, size, signs, inverse)


def _check(x: Tensor, size: int, signs: Tensor | None) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"hadamard needs float32; got {x.dtype}")
    if not 1 <= size <= LARGEST or size & (size - 1):
        raise ValueError(f"size must be a power of two, 1 to {LARGEST}; got {size}")
    if x.dim() == 0 or x.shape[-1] % size:
        raise ValueError(f"the last axis must be a multiple of size {size}; got shape {tuple(x.shape)}")
    if signs is None:
        return
    if signs.dtype != torch.float32:
        raise TypeError(f"signs are float32; got {signs.dtype}")
    if signs.dim() != 1 or signs.shape[0] not in (size, x.shape[-1]):
        raise ValueError(f"signs must have length {size} or {x.shape[-1]}; got shape {tuple(signs.shape)}")
    if signs.device != x.device:
        raise ValueError(f"signs must be on the device of x; got {signs.device} and {x.device}")
