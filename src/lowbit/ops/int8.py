"""Products of int8 codes with their scales, bias and conversion in one pass: the matrix product and the three products
of a convolution.

    out = dtype(float32(sum) * (left_scale * right_scale) + bias)

`sum` is the exact integer sum of the products of codes, rounded once to float32; the two scales are multiplied first;
all of it is float32 until the last conversion. So every bit of a result is defined, whatever the tiles, the threads and
the instruction set (a NaN has no payload). None of these operators is differentiable: a layer states its three products
itself.

Left and right follow the names: `int8_conv(x, w)`, `int8_conv_grad_a(e, w)`, `int8_conv_grad_w(e, x)` with `x (N, C, H,
W)`, `w (O, C / groups, kh, kw)` and `e (N, O, OH, OW)`. A scale has one element, or one for each index of the axis that
it shares with the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import Operator, declare

__all__ = ["int8_conv", "int8_conv_grad_a", "int8_conv_grad_w", "int8_matmul"]


def _finish(total: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`total` float64 and exact; the others shaped to broadcast to it."""
    out = (total + 0.0).to(torch.float32) * (left * right)  # an integer has no -0
    return (out if bias is None else out + bias).to(dtype)


def _matmul(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_matmul(a, b, a_scale, b_scale, bias, dtype)
    # codes are at most 128 in magnitude, so a float64 sum is exact in any order while it has under 2^39 terms
    total = a.to(torch.float64) @ b.to(torch.float64)
    return _finish(total, a_scale.reshape(-1, 1), b_scale, bias, dtype)


def _conv(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    shape = _check_conv(x, w, x_scale, w_scale, bias, *how)
    stride, padding, dilation, groups, dtype = how
    total = x.new_zeros(shape, dtype=torch.float64)
    if total.numel() and x.numel() and w.numel():
        total = torch.ops.aten.convolution(_real(x), _real(w), None, stride, padding, dilation, False, [0, 0], groups)
    bias = None if bias is None else bias.reshape(1, -1, 1, 1)
    return _channels_last(_finish(total, x_scale.reshape(-1, 1, 1, 1), w_scale.reshape(1, -1, 1, 1), bias, dtype))


def _conv_grad_a(e: Tensor, w: Tensor, e_scale: Tensor, w_scale: Tensor, a_shape: Sequence[int], *how: Any) -> Tensor:
    _check_grad_a(e, w, e_scale, w_scale, a_shape, *how)
    stride, padding, dilation, groups, dtype = how
    total = e.new_zeros(list(a_shape), dtype=torch.float64)
    if total.numel() and e.numel() and w.numel():
        wanted = [True, False, False]  # of the operand that is not multiplied only the shape counts
        total = torch.ops.aten.convolution_backward(
            _real(e), total, _real(w), None, stride, padding, dilation, False, [0, 0], groups, wanted
        )[0]
    right = w_scale if len(w_scale) == 1 else w_scale.repeat(groups)
    return _channels_last(_finish(total, e_scale.reshape(-1, 1, 1, 1), right.reshape(1, -1, 1, 1), None, dtype))


def _conv_grad_w(e: Tensor, x: Tensor, e_scale: Tensor, x_scale: Tensor, w_shape: Sequence[int], *how: Any) -> Tensor:
    *how, channels_last = how  # type: ignore[assignment]
    _check_grad_w(e, x, e_scale, x_scale, w_shape, *how)
    stride, padding, dilation, groups, dtype = how
    total = e.new_zeros(list(w_shape), dtype=torch.float64)
    if total.numel() and e.numel() and x.numel():
        wanted = [False, True, False]
        total = torch.ops.aten.convolution_backward(
            _real(e), _real(x), total, None, stride, padding, dilation, False, [0, 0], groups, wanted
        )[1]
    right = x_scale.reshape(-1, 1, 1, 1)
    if len(x_scale) != 1:  # input channel c / groups of group g meets the output channels of group g
        per_group = x_scale.reshape(groups, 1, -1).expand(-1, w_shape[0] // groups, -1)
        right = per_group.reshape(w_shape[0], w_shape[1], 1, 1)
    result = _finish(total, e_scale.reshape(-1, 1, 1, 1), right, None, dtype)
    return _channels_last(result) if channels_last else result.contiguous()


def _real(codes: Tensor) -> Tensor:
    return codes.to(torch.float64).contiguous()


def _channels_last(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).copy_(x)


_HOW = "int[] stride, int[] padding, int[] dilation, int groups, ScalarType dtype"
"""The last arguments of every convolution, `*how` in this file."""
_int8_matmul = Operator(
    "lowbit::int8_matmul",
    _matmul,
    "(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, ScalarType dtype) -> Tensor",
)
_int8_conv = Operator(
    "lowbit::int8_conv",
    _conv,
    f"(Tensor x, Tensor w, Tensor x_scale, Tensor w_scale, Tensor? bias, {_HOW}) -> Tensor",
)
_int8_conv_grad_a = Operator(
    "lowbit::int8_conv_grad_a",
    _conv_grad_a,
    f"(Tensor e, Tensor w, Tensor e_scale, Tensor w_scale, SymInt[] a_shape, {_HOW}) -> Tensor",
)
_int8_conv_grad_w = Operator(
    "lowbit::int8_conv_grad_w",
    _conv_grad_w,
    f"(Tensor e, Tensor x, Tensor e_scale, Tensor x_scale, SymInt[] w_shape, {_HOW}, bool channels_last) -> Tensor",
)


@_int8_matmul.register_fake
def _(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_matmul(a, b, a_scale, b_scale, bias, dtype)
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


@_int8_conv.register_fake
def _(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    shape = _check_conv(x, w, x_scale, w_scale, bias, *how)
    return torch.empty(shape, dtype=how[-1], device=x.device, memory_format=torch.channels_last)


@_int8_conv_grad_a.register_fake
def _(e: Tensor, w: Tensor, e_scale: Tensor, w_scale: Tensor, a_shape: Sequence[int], *how: Any) -> Tensor:
    _check_grad_a(e, w, e_scale, w_scale, a_shape, *how)
    return torch.empty(a_shape, dtype=how[-1], device=e.device, memory_format=torch.channels_last)


@_int8_conv_grad_w.register_fake
def _(e: Tensor, x: Tensor, e_scale: Tensor, x_scale: Tensor, w_shape: Sequence[int], *how: Any) -> Tensor:
    *how, channels_last = how  # type: ignore[assignment]
    _check_grad_w(e, x, e_scale, x_scale, w_shape, *how)
    order = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(w_shape, dtype=how[-1], device=e.device, memory_format=order)


declare("lowbit::int8_matmul", _matmul, {"cpu": "C++"})
declare("lowbit::int8_conv", _conv, {"cpu": "C++"})
declare("lowbit::int8_conv_grad_a", _conv_grad_a, {"cpu": "C++"})
declare("lowbit::int8_conv_grad_w", _conv_grad_w, {"cpu": "C++"})


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`a (M, K) @ b (K, N)` of int8 codes, in any memory order; `a_scale (M,)`, `b_scale (N,)`, either may be (1,).

    Raises:
        TypeError: a dtype that is not as stated above; a result is float32 or bfloat16.
        ValueError: shapes that don't match.
    """
    _check_matmul(a, b, a_scale, b_scale, bias, dtype)
    return torch.ops.lowbit.int8_matmul(a, b, a_scale, b_scale, bias, dtype)


def int8_conv(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Convolution of int8 codes, channels-last in memory; `x_scale (N,)`, `w_scale (O,)`, either may be (1,).

    Raises:
        TypeError, ValueError: as `int8_matmul`.
    """
    _check_conv(x, w, x_scale, w_scale, bias, stride, padding, dilation, groups, dtype)
    geometry = (list(stride), list(padding), list(dilation), groups)
    return torch.ops.lowbit.int8_conv(x, w, x_scale, w_scale, bias, *geometry, dtype)


def int8_conv_grad_a(
    e: Tensor,
    w: Tensor,
    e_scale: Tensor,
    w_scale: Tensor,
    a_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The convolution's gradient for its input of shape `a_shape`, channels-last in memory; `e_scale (N,)` and
    `w_scale (C / groups,)`, one for each input channel of a group, either may be (1,).

    Raises:
        TypeError, ValueError: as `int8_matmul`.
    """
    _check_grad_a(e, w, e_scale, w_scale, a_shape, stride, padding, dilation, groups, dtype)
    geometry = (list(stride), list(padding), list(dilation), groups)
    return torch.ops.lowbit.int8_conv_grad_a(e, w, e_scale, w_scale, list(a_shape), *geometry, dtype)


def int8_conv_grad_w(
    e: Tensor,
    x: Tensor,
    e_scale: Tensor,
    x_scale: Tensor,
    w_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """The convolution's gradient for its weight of shape `w_shape`, contiguous or channels-last in memory;
    `e_scale (O,)`, `x_scale (C,)`, either may be (1,).

    Raises:
        TypeError, ValueError: as `int8_matmul`.
    """
    _check_grad_w(e, x, e_scale, x_scale, w_shape, stride, padding, dilation, groups, dtype)
    geometry = (list(stride), list(padding), list(dilation), groups)
    return torch.ops.lowbit.int8_conv_grad_w(e, x, e_scale, x_scale, list(w_shape), *geometry, dtype, channels_last)


def _check_codes(op: str, dims: int, dtype: torch.dtype, **codes: Tensor) -> None:
    for name, x in codes.items():
        if x.dtype != torch.int8:
            raise TypeError(f"{op} needs int8 codes, got {name} of {x.dtype}")
        if x.dim() != dims:
            raise ValueError(f"{op} needs operands with {dims} axes, got {name} of shape {tuple(x.shape)}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{op} gives float32 or bfloat16, not {dtype}; convert its result")
    left, right = (x.device for x in codes.values())
    if left != right:
        raise ValueError(f"{op} needs operands on one device, got {left} and {right}")


def _check_vector(op: str, name: str, x: Tensor, axis: str, n: int, like: Tensor, one: bool = True) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"{op} needs {name} in float32, got {x.dtype}")
    if x.dim() != 1 or (x.shape[0] != n and not (one and x.shape[0] == 1)):
        allowed = f"({n},), one for each {axis}" + (", or (1,)" if one else "")
        raise ValueError(f"{op} needs {name} of shape {allowed}; got {tuple(x.shape)}")
    if not x.is_contiguous():
        raise ValueError(f"{op} needs a contiguous {name}; call .contiguous()")
    if x.device != like.device:
        raise ValueError(f"{op} needs operands on one device, got {like.device} and {name} on {x.device}")


def _check_matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> None:
    op = "int8_matmul"
    _check_codes(op, 2, dtype, a=a, b=b)
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"{op} needs a (M, K) and b (K, N), got {tuple(a.shape)} and {tuple(b.shape)}")
    _check_vector(op, "a_scale", a_scale, "row of a", a.shape[0], a)
    _check_vector(op, "b_scale", b_scale, "column of b", b.shape[1], a)
    if bias is not None:
        _check_vector(op, "bias", bias, "column of b", b.shape[1], a, one=False)


def _check_geometry(
    op: str,
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """The output's shape."""
    for name, shape in (("input", x_shape), ("weight", w_shape)):
        if len(shape) != 4 or min(shape) < 0:
            raise ValueError(f"{op} needs an {name} with 4 axes, got shape {tuple(shape)}".replace("an w", "a w"))
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{op} needs a {name} of two numbers of at least {least}, got {tuple(pair)}")
    if groups < 1 or w_shape[0] % groups:
        raise ValueError(f"{op}: groups must divide the {w_shape[0]} output channels, got {groups}")
    if x_shape[1] != w_shape[1] * groups:
        expected = f"the weight {tuple(w_shape)} with {groups} groups takes {w_shape[1] * groups} channels"
        raise ValueError(f"{op}: {expected}, got an input of shape {tuple(x_shape)}")
    if w_shape[2] < 1 or w_shape[3] < 1:
        raise ValueError(f"{op}: the weight {tuple(w_shape)} has an empty kernel")
    rows, columns = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x_shape[2:], w_shape[2:], stride, padding, dilation, strict=True)
    )
    if rows < 1 or columns < 1:
        raise ValueError(f"{op}: the kernel of {tuple(w_shape)} is larger than the padded input {tuple(x_shape)}")
    return x_shape[0], w_shape[0], rows, columns


def _check_conv(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, *how: Any
) -> tuple[int, int, int, int]:
    op = "int8_conv"
    _check_codes(op, 4, how[-1], x=x, w=w)
    shape = _check_geometry(op, x.shape, w.shape, *how[:-1])
    _check_vector(op, "x_scale", x_scale, "sample", x.shape[0], x)
    _check_vector(op, "w_scale", w_scale, "output channel", w.shape[0], x)
    if bias is not None:
        _check_vector(op, "bias", bias, "output channel", w.shape[0], x, one=False)
    return shape


def _check_grad_a(e: Tensor, w: Tensor, e_scale: Tensor, w_scale: Tensor, a_shape: Sequence[int], *how: Any) -> None:
    op = "int8_conv_grad_a"
    _check_codes(op, 4, how[-1], e=e, w=w)
    _check_error(op, e, _check_geometry(op, a_shape, w.shape, *how[:-1]))
    _check_vector(op, "e_scale", e_scale, "sample", e.shape[0], e)
    _check_vector(op, "w_scale", w_scale, "input channel of a group", w.shape[1], e)


def _check_grad_w(e: Tensor, x: Tensor, e_scale: Tensor, x_scale: Tensor, w_shape: Sequence[int], *how: Any) -> None:
    op = "int8_conv_grad_w"
    _check_codes(op, 4, how[-1], e=e, x=x)
    _check_error(op, e, _check_geometry(op, x.shape, w_shape, *how[:-1]))
    _check_vector(op, "e_scale", e_scale, "output channel", e.shape[1], e)
    _check_vector(op, "x_scale", x_scale, "input channel", x.shape[1], e)


def _check_error(op: str, e: Tensor, shape: tuple[int, int, int, int]) -> None:
    if tuple(e.shape) != shape:
        raise ValueError(f"{op}: this convolution gives {shape}, but e has shape {tuple(e.shape)}")
