"""Largest magnitude, sum of magnitudes and sum of squares of each block, in one sweep.

The sums are float64, in the order of `ops/rules.py`: chunks of 1024 elements, then their totals, by halves. Squares of
float32 numbers neither vanish nor overflow there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Operator, declare
from .rules import _block_sums

__all__ = ["magnitudes"]


def _definition(x: Tensor) -> Tensor:
    _check(x)
    if x.numel() == 0:
        return x.new_empty(len(x), 3, dtype=torch.float64)
    size = x.abs().double()
    found = torch.stack([size.amax(1), _block_sums(size), _block_sums(size.square())], 1)
    return found.masked_fill(found.isnan(), torch.nan)


_op = Operator("lowbit::magnitudes", _definition, "(Tensor x) -> Tensor")


@_op.register_fake
def _(x: Tensor) -> Tensor:
    _check(x)
    return x.new_empty(len(x), 3, dtype=torch.float64)


declare("lowbit::magnitudes", _definition, {"cpu": "C++"})


def magnitudes(x: Tensor) -> Tensor:
    """max|x|, sum |x| and sum x^2 of each row of a contiguous float32 matrix `(blocks, n)`, as float64 `(blocks, 3)`;
    NaN where a row has one."""
    _check(x)
    return torch.ops.lowbit.magnitudes(x)


def _check(x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"magnitudes needs float32; got {x.dtype}: convert with x.float()")
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"magnitudes needs a contiguous matrix (blocks, n); got shape {tuple(x.shape)}")
    if x.shape[1] == 0 and len(x):
        raise ValueError(f"magnitudes needs an element in each block; got shape {tuple(x.shape)}")
