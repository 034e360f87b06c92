"""Rounding: how a real number becomes one of its two neighbours on a grid.

With floor(t) <= t and r = t - trunc(t) (exact in floating point):

    half_even     rint(t)                                        2.5 -> 2   -2.5 -> -2
    half_away     trunc(t) + sign(t) [|r| >= 0.5]                2.5 -> 3   -2.5 -> -3
    half_up       trunc(t) + [r >= 0.5] - [r < -0.5]             2.5 -> 3   -2.5 -> -2
    half_down     trunc(t) + [r > 0.5] - [r <= -0.5]             2.5 -> 2   -2.5 -> -3
    floor         floor(t)
    truncate      trunc(t)
    stochastic    floor(t) + [u < t - floor(t)], u uniform in [0, 1)

`half_down` is the nearest rounding of Gupta et al. (2015, arXiv 1502.02551): floor(t) + [t - floor(t) > 0.5].
The nearest modes use r because t - floor(t) is itself rounded for small negative t: -0.49999997 would become
a tie. `stochastic` is unbiased, and a number on the grid never moves; floor(t + u) would move it in float32. It is
the ceiling of t - u, exact for float32 t and u.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lowbit.serial import nearest

__all__ = ["ROUNDINGS", "Rounding", "round_between", "round_to_int"]

Rounding = Literal["half_even", "half_away", "half_up", "half_down", "floor", "truncate", "stochastic"]
"""Type of a rounding mode."""

ROUNDINGS: tuple[str, ...] = get_args(Rounding)
"""Every rounding mode."""


def _check(t: Tensor, mode: str, u: Tensor | None) -> None:
    if not t.is_floating_point():
        raise TypeError(f"rounding needs a floating-point tensor; got {t.dtype}")
    if mode not in ROUNDINGS:
        raise ValueError(f"unknown rounding {mode!r}; {nearest(mode, ROUNDINGS)}")
    if mode == "stochastic":
        shape = tuple(t.shape)
        if u is None:
            raise ValueError(f"stochastic rounding needs uniforms u in [0, 1) of shape {shape}; got u=None")
        if u.shape != t.shape:
            raise ValueError(f"u must have the shape of the rounded tensor, {shape}; got {tuple(u.shape)}")


def round_to_int(t: Tensor, mode: str = "half_even", u: Tensor | None = None) -> Tensor:
    """Round to integers.

    Args:
        t: any floating dtype, any shape. NaN and infinity pass through.
        mode: one of `ROUNDINGS`.
        u: uniforms in [0, 1) of the shape of `t`; used by "stochastic" only.

    Returns:
        Integers as floats, dtype and shape of `t`.

    Raises:
        TypeError: `t` is not floating point.
        ValueError: unknown mode; "stochastic" without `u` or with a `u` of another shape.
    """
    _check(t, mode, u)
    if mode == "half_even":
        return torch.round(t)
    if mode == "floor":
        return torch.floor(t)
    if mode == "stochastic":
        assert u is not None
        # the same as in the table, where t - floor(t) would be rounded; + 0 because the ceiling of -0.3 is -0
        return torch.ceil(t.to(torch.float64) - u).to(t.dtype) + 0.0
    whole = torch.trunc(t)
    if mode == "truncate":
        return whole
    rest = t - whole  # exact; NaN where t is infinite, and then no comparison below is true
    up, down = rest >= 0.5, rest <= -0.5
    if mode == "half_up":
        down = rest < -0.5
    elif mode == "half_down":
        up = rest > 0.5
    return whole + up.to(t.dtype) - down.to(t.dtype)


def round_between(
    t: Tensor,
    lo: Tensor,
    hi: Tensor,
    mode: str = "half_even",
    u: Tensor | None = None,
    lo_even: Tensor | bool = True,
    mid: Tensor | None = None,
) -> Tensor:
    """Round to one of two neighbouring grid values; the same choice as `round_to_int` on an uneven grid.

    Nearest modes compare with the midpoint in float64; the modes differ in a tie only. "stochastic" takes
    `hi` with probability (t - lo) / (hi - lo), so its mean is `t`. "truncate" takes the neighbour nearer to
    zero, but never
    crosses zero: between -1 and +1 it keeps the sign of `t` (0 counts as positive).

    Args:
        t: any floating dtype, any shape, lo <= t <= hi. NaN passes through.
        lo, hi: the neighbours, dtype and shape of `t` (or broadcastable to it); equal where there is only
            one.
        mode: one of `ROUNDINGS`.
        u: uniforms in [0, 1) of the shape of `t`; used by "stochastic" only.
        lo_even: where the code of `lo` is even: "half_even" sends a tie to the even code.
        mid: the switch points of the nearest modes in float64, if not the arithmetic midpoints.

    Returns:
        `lo` or `hi`, dtype and shape of `t`.

    Raises:
        TypeError: `t` is not floating point.
        ValueError: as `round_to_int`.
    """
    _check(t, mode, u)
    if mode == "stochastic":
        assert u is not None
        up = u < (t - lo) / (hi - lo)  # 0/0 = NaN where lo == hi: false
    elif mode == "floor":
        up = t >= hi
    elif mode == "truncate":
        up = torch.where(t >= 0, (lo < 0) | (t >= hi), (hi <= 0) & (t > lo))
    else:
        if mid is None:
            mid = 0.5 * lo.to(torch.float64) + 0.5 * hi.to(torch.float64)
        x = t.to(torch.float64)
        tie = x == mid
        if mode == "half_even":
            tie = tie & ~torch.as_tensor(lo_even, device=t.device)
        elif mode == "half_away":
            tie = tie & (t >= 0)
        elif mode == "half_down":
            tie = torch.zeros_like(tie)
        up = (x > mid) | tie
    return torch.where(t.isnan(), t, torch.where(up, hi, lo))
