"""Exact product of int8 matrices.

Sums run in int32. A sum of more than `split` products is cut into pieces that can't overflow, and the pieces are added
in int64: |a * b| <= 128^2, so 131,071 products fit int32 whatever the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Operator, declare

__all__ = ["int8_mm"]

SAFE = 131_071  # (2^31 - 1) // 128^2


def _definition(a: Tensor, b: Tensor, split: int) -> Tensor:
    _check(a, b, split)
    depth = a.shape[1]
    exact = a.to(torch.float64) @ b.to(torch.float64)  # below 2^53: exact in any order
    return exact.to(torch.int32 if depth <= split else torch.int64)


_op = Operator("lowbit::int8_mm", _definition, "(Tensor a, Tensor b, int split) -> Tensor")


@_op.register_fake
def _(a: Tensor, b: Tensor, split: int) -> Tensor:
    _check(a, b, split)
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.int32 if a.shape[1] <= split else torch.int64)


@_op.register_kernel("cpu")
def _(a: Tensor, b: Tensor, split: int) -> Tensor:
    _check(a, b, split)
    (m, depth), n = a.shape, b.shape[1]
    if 0 in (m, n, depth):
        return a.new_zeros(m, n, dtype=torch.int32 if depth <= split else torch.int64)
    if depth <= split:
        return torch._int_mm(_rows(a), _rows(b))
    total = torch.zeros(m, n, dtype=torch.int64)
    for k in range(0, depth, split):
        total += torch._int_mm(_rows(a[:, k : k + split]), _rows(b[k : k + split]))
    return total


def _rows(x: Tensor) -> Tensor:
    """`x` with strides (columns, 1) exactly. A single row with another stride counts as contiguous too, but
    `torch._int_mm` takes that stride for the distance of columns and reads beside the matrix."""
    return x.contiguous().reshape(-1).reshape(x.shape)


declare("lowbit::int8_mm", _definition, {"cpu": "oneDNN (torch._int_mm)"})


def int8_mm(a: Tensor, b: Tensor, split: int = SAFE) -> Tensor:
    """`a (M, K) @ b (K, N)`, both int8, as int32 (int64 where K > split). Not differentiable.

    Raises:
        TypeError: an operand that is not int8.
        ValueError: shapes that don't match, or a split that could overflow int32.
    """
    _check(a, b, split)
    return torch.ops.lowbit.int8_mm(a, b, split)


def _check(a: Tensor, b: Tensor, split: int) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.dtype != torch.int8:
            raise TypeError(f"int8_mm needs int8 operands, got {name} of {x.dtype}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"int8_mm needs a (M, K) and b (K, N), got {tuple(a.shape)} and {tuple(b.shape)}")
    if not 1 <= split <= SAFE:
        raise ValueError(f"a sum of {split} products may overflow int32; split at most at {SAFE}")
