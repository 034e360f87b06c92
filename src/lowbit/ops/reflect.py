"""Rows reflected within groups.

    y = diag(after) H diag(before) x        H = 1 - 2 v v^T / |v|^2 within each group of rows, 1 where v = 0

Computed in float64 and rounded once: y_i = a_i x_i - b_i (sum of c_j x_j over the group, row after row), with
a = after before, b = after (v (2 / |v|^2)) and c = v before. H is its own inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Operator, declare

__all__ = ["reflect"]


def _definition(x: Tensor, group: Tensor, v: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
    _check(x, group, v, before, after)
    if x.numel() == 0:
        return _empty(x)
    if not 0 <= int(group.min()) <= int(group.max()) < len(x):
        wrong = group[(group < 0) | (group >= len(x))]
        raise ValueError(f"a group is 0 to rows - 1 = {len(x) - 1}; got {int(wrong[0])}")
    rows = x.double().reshape(len(x), -1)
    first, last = (torch.ones_like(v) if t is None else t for t in (before, after))
    norm = _totals(v.square()[:, None], group)
    factor = 2 / torch.where(norm == 0, 1, norm)[:, 0]
    own, spread, collect = last * first, last * (v * factor), v * first
    y = own[:, None] * rows - spread[:, None] * _totals(collect[:, None] * rows, group)
    y = y.to(x.dtype).reshape(x.shape)
    return _empty(x).copy_(y.masked_fill(y.isnan(), torch.nan))


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


declare("lowbit::reflect", _definition, {"cpu": "C++"})


def reflect(x: Tensor, group: Tensor, v: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
    """The rows of `x`, reflected within their groups. Not differentiable.

    Args:
        x: float32 or float64 (rows, ...).
        group: int64 (rows,), from 0 to rows - 1.
        v: float64 (rows,); each group's part is the normal of its mirror.
        before, after: float64 (rows,), factors of the rows before and after the reflection; None is 1.

    Returns:
        Shape and dtype of x; its strides where its elements lie row after row in memory, otherwise contiguous.
    """
    _check(x, group, v, before, after)
    if x.dtype == torch.float64:
        return _definition(x, group, v, before, after)
    return torch.ops.lowbit.reflect(x, group, v, before, after)


def _check(x: Tensor, group: Tensor, v: Tensor, before: Tensor | None, after: Tensor | None) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"reflect needs float32 or float64; got {x.dtype}: convert with x.float()")
    if x.dim() == 0:
        raise ValueError("reflect needs rows; got a scalar")
    for name, t, dtype in (
        ("group", group, torch.int64),
        ("v", v, torch.float64),
        ("before", before, torch.float64),
        ("after", after, torch.float64),
    ):
        if t is not None and (t.dtype != dtype or t.shape != x.shape[:1] or not t.is_contiguous()):
            raise ValueError(
                f"{name} must be contiguous {dtype} of shape (rows,) = ({len(x)},); got {t.dtype} {tuple(t.shape)}"
            )
