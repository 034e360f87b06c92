"""Scale and zero point from the ends of blocks.

    low, high to low <= 0 <= high if `code`        span = high - low
    scale = span / denominator, |high| where span = 0, then 1 where that is 0
    zero = -low / scale, if `code` rounded, ties to even, and clamped to [0, denominator]

Where the span overflows, scale is high / denominator - low / denominator. Scales are made for every tensor in every
step, and twenty steps on one number each take PyTorch longer than the statistics of a million.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Operator, declare

__all__ = ["affine"]


def _definition(low: Tensor, high: Tensor, denominator: float, code: bool) -> tuple[Tensor, Tensor]:
    _check(low, high, denominator)
    low, high = low.contiguous(), high.contiguous()
    if code:
        low, high = low.clamp(max=0), high.clamp(min=0)
    span = high - low
    step = torch.where(span.isinf(), high / denominator - low / denominator, span / denominator)
    scale = torch.where(span == 0, high.abs(), step)
    scale = scale.masked_fill(scale == 0, 1)
    zero = -low / scale
    if code:
        zero = zero.round().clamp(0, denominator)
    return _tidy(scale), _tidy(zero + 0.0)


def _tidy(x: Tensor) -> Tensor:
    return x.masked_fill(x.isnan(), torch.nan)


_op = Operator(
    "lowbit::affine", _definition, "(Tensor low, Tensor high, float denominator, bool code) -> (Tensor, Tensor)"
)


@_op.register_fake
def _(low: Tensor, high: Tensor, denominator: float, code: bool) -> tuple[Tensor, Tensor]:
    _check(low, high, denominator)
    return low.new_empty(low.shape), low.new_empty(low.shape)


declare("lowbit::affine", _definition, {"cpu": "C++"})


def affine(low: Tensor, high: Tensor, denominator: float, code: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of blocks that reach from `low` to `high`.

    Args:
        low, high: float32 or float64 of one shape; the least and the largest element of each block.
        denominator: steps between the ends, positive.
        code: whether the zero point is an integer code, so that 0 is exact; otherwise code 0 is `low`.

    Returns:
        scale, zero: shape and dtype of `low`, contiguous; NaN where an end is.
    """
    _check(low, high, denominator)
    if low.dtype == torch.float64:
        return _definition(low, high, denominator, code)
    return torch.ops.lowbit.affine(low, high, denominator, code)


def _check(low: Tensor, high: Tensor, denominator: float) -> None:
    if low.dtype not in (torch.float32, torch.float64) or high.dtype != low.dtype:
        raise TypeError(f"low and high must both be float32 or float64; got {low.dtype} and {high.dtype}")
    if low.shape != high.shape:
        raise ValueError(f"low and high must have one shape; got {tuple(low.shape)} and {tuple(high.shape)}")
    if not denominator > 0:
        raise ValueError(f"the denominator must be positive; got {denominator}")
