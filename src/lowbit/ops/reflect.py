"""Rows reflected within groups.

    reflect          y = diag(after) H diag(before) x
    reflect_minmax   least and largest element of each row of H diag(before) x
    reflect_cast     diag(1 / factor) H cast(H diag(factor) x), with a scale and an offset for each row

H = 1 - 2 v v^T / |v|^2 within each group of rows, and 1 where v = 0; it is its own inverse. Computed in the type of x,
y_i = a_i x_i - b_i (sum of c_j x_j over the group, row after row), with a = after before, b = after (v (2 / |v|^2)) and
c = v before rounded from float64. The last two operators keep the reflected rows in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import Operator, declare
from .cast import _cast_definition, _check_cast

__all__ = ["reflect", "reflect_cast", "reflect_minmax"]


def _definition(x: Tensor, group: Tensor, v: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
    _check(x, group, v, before, after)
    if x.numel() == 0:
        return _empty(x)
    if not 0 <= int(group.min()) <= int(group.max()) < len(x):
        wrong = group[(group < 0) | (group >= len(x))]
        raise ValueError(f"a group is 0 to rows - 1 = {len(x) - 1}; got {int(wrong[0])}")
    rows = x.reshape(len(x), -1)
    v = v.double()
    first, last = (torch.ones_like(v) if t is None else t.double() for t in (before, after))
    norm = _totals(v.square()[:, None], group)
    factor = 2 / torch.where(norm == 0, 1, norm)[:, 0]
    own, spread, collect = (t.to(x.dtype)[:, None] for t in (last * first, last * (v * factor), v * first))
    y = (own * rows - spread * _totals(collect * rows, group)).reshape(x.shape)
    return _empty(x).copy_(y.masked_fill(y.isnan(), torch.nan))


def _minmax_definition(x: Tensor, group: Tensor, v: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    _check(x, group, v, before, None, wide=False)
    y = _definition(x, group, v, before, None)
    if x.numel() == 0:
        return x.new_zeros(len(x)), x.new_zeros(len(x))
    rows = y.reshape(len(y), -1)
    # + 0: the sign of a smallest or largest zero would depend on the order of elements
    return rows.amin(1) + 0.0, rows.amax(1) + 0.0


def _reflect_cast_definition(
    x: Tensor, group: Tensor, v: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, *how: Any
) -> Tensor:
    """`how`: key, kind, numbers, table, rounding."""
    _check_both(x, group, v, factor, scale, offset, *how)
    y = _definition(x, group, v, factor, None)
    return _definition(_cast_definition(y, *_rows_cast(x, scale, offset, *how)), group, v, None, 1 / factor)


def _rows_cast(x: Tensor, scale: Tensor, offset: Tensor, key: Tensor | None, *how: Any) -> tuple[Any, ...]:
    """The arguments after the tensor of a cast to values with one block a row of `x`."""
    return scale, None, key, None, [1] + [0] * (x.dim() - 1), *how, "values", offset


def _totals(rows: Tensor, group: Tensor) -> Tensor:
    """For each row the sum over its group, first row first."""
    sums = torch.zeros_like(rows)
    order = group.argsort(stable=True)
    sorted_group = group[order]
    place = torch.arange(len(order), device=order.device) - torch.searchsorted(sorted_group, sorted_group)
    for i in range(int(place.max()) + 1 if len(place) else 0):  # the i-th row of every group
        ith = order[place == i]
        sums[group[ith]] = sums[group[ith]] + rows[ith]
    return sums[group]


def _empty(x: Tensor) -> Tensor:
    """Memory for the result: the strides of `x` where its elements lie row after row, otherwise contiguous."""
    if x.numel() == 0:
        return x.new_empty(x.shape)
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride()[1:], x.shape[1:], strict=True) if n != 1):
        if stride != expected:
            return x.new_empty(x.shape)
        expected *= size
    if x.shape[0] != 1 and x.stride(0) != expected:
        return x.new_empty(x.shape)
    return x.new_empty_strided(x.shape, x.stride())


_op = Operator(
    "lowbit::reflect",
    _definition,
    "(Tensor x, Tensor group, Tensor v, Tensor? before, Tensor? after) -> Tensor",
)


@_op.register_fake
def _(x: Tensor, group: Tensor, v: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
    _check(x, group, v, before, after)
    return _empty(x)


_minmax_op = Operator(
    "lowbit::reflect_minmax",
    _minmax_definition,
    "(Tensor x, Tensor group, Tensor v, Tensor before) -> (Tensor, Tensor)",
)


@_minmax_op.register_fake
def _(x: Tensor, group: Tensor, v: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    _check(x, group, v, before, None, wide=False)
    return x.new_empty(x.shape[0]), x.new_empty(x.shape[0])


_cast_op = Operator(
    "lowbit::reflect_cast",
    _reflect_cast_definition,
    "(Tensor x, Tensor group, Tensor v, Tensor factor, Tensor scale, Tensor offset, Tensor? key, str kind, "
    "float[] numbers, Tensor? table, str rounding) -> Tensor",
)


@_cast_op.register_fake
def _(x: Tensor, group: Tensor, v: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, *how: Any) -> Tensor:
    _check_both(x, group, v, factor, scale, offset, *how)
    return _empty(x)


declare("lowbit::reflect", _definition, {"cpu": "C++"})
declare("lowbit::reflect_minmax", _minmax_definition, {"cpu": "C++"})
declare("lowbit::reflect_cast", _reflect_cast_definition, {"cpu": "C++"})


def reflect(x: Tensor, group: Tensor, v: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
    """The rows of `x`, reflected within their groups. Not differentiable.

    Args:
        x: float32 or float64 (rows, ...).
        group: int64 (rows,), from 0 to rows - 1.
        v: (rows,) of the type of x; each group's part is the normal of its mirror.
        before, after: (rows,) of the type of x, factors of the rows before and after the reflection; None is 1.

    Returns:
        Shape and dtype of x; its strides where its elements lie row after row in memory, otherwise contiguous.
    """
    _check(x, group, v, before, after)
    if x.dtype == torch.float64:
        return _definition(x, group, v, before, after)
    return torch.ops.lowbit.reflect(x, group, v, before, after)


def reflect_minmax(x: Tensor, group: Tensor, v: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest element of each row of `reflect(x, group, v, before)`; NaN where the row holds one.

    Args:
        x: float32 (rows, ...).
        group, v, before: as in `reflect`.

    Returns:
        Two float32 (rows,); zeros where x is empty.
    """
    _check(x, group, v, before, None, wide=False)
    return torch.ops.lowbit.reflect_minmax(x, group, v, before)


def reflect_cast(
    x: Tensor,
    group: Tensor,
    v: Tensor,
    factor: Tensor,
    scale: Tensor,
    offset: Tensor,
    key: Tensor | None,
    kind: str,
    numbers: Sequence[float],
    table: Tensor | None,
    rounding: str,
) -> Tensor:
    """`reflect(x, group, v, before=factor)`, cast, and reflected back (`after=1 / factor`).

    Args:
        x: float32 (rows, ...), at most 8 dimensions.
        group, v, factor: as in `reflect`; factor stands for `before`.
        scale, offset: contiguous float32 (rows,), as in `ops.cast.cast`.
        key, kind, numbers, table, rounding: as in `ops.cast.cast`.

    Returns:
        As `reflect`.
    """
    _check_both(x, group, v, factor, scale, offset, key, kind, numbers, table, rounding)
    return torch.ops.lowbit.reflect_cast(x, group, v, factor, scale, offset, key, kind, list(numbers), table, rounding)


def _check_both(x: Tensor, group: Tensor, v: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, *how: Any) -> None:
    _check(x, group, v, factor, None, wide=False)
    if scale.shape != x.shape[:1]:
        raise ValueError(f"scale must have one value a row, shape ({len(x)},); got {tuple(scale.shape)}")
    _check_cast(x, *_rows_cast(x, scale, offset, *how))


def _check(x: Tensor, group: Tensor, v: Tensor, before: Tensor | None, after: Tensor | None, wide: bool = True) -> None:
    if x.dtype != torch.float32 and not (wide and x.dtype == torch.float64):
        needed = "float32 or float64" if wide else "float32"
        raise TypeError(f"reflect needs {needed}; got {x.dtype}: convert with x.float()")
    if x.dim() == 0:
        raise ValueError("reflect needs rows; got a scalar")
    for name, t, dtype in (
        ("group", group, torch.int64),
        ("v", v, x.dtype),
        ("before", before, x.dtype),
        ("after", after, x.dtype),
    ):
        if t is not None and (t.dtype != dtype or t.shape != x.shape[:1] or not t.is_contiguous()):
            raise ValueError(
                f"{name} must be contiguous {dtype} of shape (rows,) = ({len(x)},); got {t.dtype} {tuple(t.shape)}"
            )
