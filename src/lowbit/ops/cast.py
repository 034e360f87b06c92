"""Casts: a float32 tensor to its grid and back in one pass, with the scales of its blocks.

    t = (x - offset) / scale + zero        grid = snap(t)        q = (grid - zero) * step + offset

Element x[i0, i1, ...] belongs to block sum(i_d * block_strides[d]); an axis that lies inside the blocks has stride 0.
`scale`, `zero`, `offset` and `step` have one value a block; `zero` and `offset` may be left out, and `step` is `scale`
unless given. The uniform of an element is that of `lowbit::uniform` at its row-major index
in the shape of x, whatever the strides of x, so the result does not depend on the memory format.

What `snap` is, the operators learn as plain values, from `cast_arguments(format, rounding)`:

    kind     numbers                                        table                          snap
    int      low, high, fl                                                                 Int, Fixed (2^-fl)
    even     bits                                                                          Even
    float    emin, mantissa bits, max, 1 if -0 exists                                      Float, the way of its bits
    log2     kmin, kmax                                                                    Log of base 2, "stochastic"
    table    smallest magnitude if 0 is no level, else 0    values, even flags, switches   Log, Codebook

A table is float64 (3, n), n at most 256: the values, ascending; 1 where the code of the value is even; the switch point
to the next value in the nearest modes, between the two (the last is not used).

A NaN in a result has no sign and no payload. Not differentiable: gradient rules are a quantizer's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.formats import (
    Codebook,
    Even,
    Fixed,
    Float,
    Format,
    Int,
    Log,
    _snap_float,
    _snap_octaves,
    _snap_table,
    _toward_zero,
)
from lowbit.rounding import ROUNDINGS, round_to_int
from lowbit.serial import nearest

from .backends import Operator, declare
from .uniform import uniform

__all__ = ["block_absmax", "block_minmax", "cast", "cast_absmax", "cast_absmax_pair", "cast_arguments"]

KINDS = {"int": 3, "even": 1, "float": 4, "log2": 2, "table": 1}
"""How many numbers each kind has."""
RESULTS = ("values", "grid", "codes")
LEVELS = 256  # of the largest table
DIMENSIONS = 8  # of the largest tensor
RUNS = 32  # of rows that are summed by themselves


# ---- formats as plain values -----------------------------------------------------------------------------------------

_tables: dict[Format, tuple[list[float], Tensor]] = {}
"""Numbers and table of the formats seen; formats are immutable."""


def cast_arguments(fmt: Format, rounding: str) -> tuple[str, list[float], Tensor | None] | None:
    """Kind, numbers and table of a format for the operators of this file; None where they don't have it.

    They have all but: Float formats that are unsigned, without subnormals or mantissa, that overflow to infinity, that
    reach to the ends of the range of float32 (BF16), or in another rounding than "half_even" and "stochastic"; tables
    of more than 256 levels.
    """
    if isinstance(fmt, Int):
        return "int", [*_bounds(fmt), 0.0], None
    if isinstance(fmt, Fixed):
        return "int", [*_bounds(fmt._integer), float(fmt.fl)], None
    if isinstance(fmt, Even):
        return "even", [float(fmt.bits)], None
    if isinstance(fmt, Float):
        probe = torch.empty(0)
        if not fmt._by_bits(probe, rounding, probe):
            return None
        return "float", [float(fmt._emin), float(fmt.mantissa), fmt.max, float(fmt.specials != "fnuz")], None
    if isinstance(fmt, Log) and rounding == "stochastic" and fmt._octaves and fmt.kmax < 127:
        return "log2", [float(fmt.kmin), float(fmt.kmax)], None
    count = _levels(fmt)
    if count is None or count > LEVELS:
        return None
    if fmt in _tables:
        return "table", *_tables[fmt]
    numbers, table = _table(fmt)
    if type(table) is Tensor:  # not the fake one of a tracer
        _tables[fmt] = numbers, table
    return "table", numbers, table


def _bounds(fmt: Int) -> tuple[float, float]:
    low, high = (float(_toward_zero(bound, torch.float32)) for bound in fmt._range)
    return low, high


def _levels(fmt: Format) -> int | None:
    if isinstance(fmt, Codebook):
        return len(fmt.values)
    return (fmt.kmax - fmt.kmin + 1) * (1 + fmt.signed) + fmt.zero if isinstance(fmt, Log) else None


def _table(fmt: Format) -> tuple[list[float], Tensor]:
    values, least, switch = fmt.levels(), 0.0, None
    even = torch.arange(len(values)) % 2 == 0
    if isinstance(fmt, Log):
        values, codes, mids = fmt._table
        even, switch = codes % 2 == 0, mids if fmt.nearest == "log" else None
        if fmt.signed and not fmt.zero:
            least = values[len(values) // 2].item()
    rounded = values.to(torch.float32).to(torch.float64)
    if switch is None:
        switch = 0.5 * rounded[:-1] + 0.5 * rounded[1:]
    return [least], torch.stack([rounded, even.to(torch.float64), torch.cat([switch, switch.new_zeros(1)])])


def _snap(
    t: Tensor, kind: str, numbers: Sequence[float], table: Tensor | None, rounding: str, u: Tensor | None
) -> Tensor:
    """`Format.snap` of the format that `cast_arguments` described; rounding other than "stochastic" has no `u`."""
    if kind == "int":
        low, high, fl = numbers
        return (round_to_int((t * 2.0**fl).clamp(low, high), rounding, u) + 0.0) * 2.0**-fl
    if kind == "even":
        return Even(int(numbers[0])).snap(t, rounding, u)
    if kind == "float":
        y = _snap_float(t, int(numbers[0]), int(numbers[1]), numbers[2], u)
        return y if numbers[3] else y + 0.0
    if kind == "log2":
        assert u is not None
        return _snap_octaves(t, int(numbers[0]), int(numbers[1]), u)
    assert table is not None
    values, even, switch = table.to(t.device)
    least = torch.tensor(numbers[0], dtype=t.dtype, device=t.device)
    t = torch.where(t.abs() < least, torch.where(t < 0, -least, least), t)
    return _snap_table(t, values, even != 0, rounding, u, switch[:-1])


# ---- definitions -----------------------------------------------------------------------------------------------------


def _per_element(block: Tensor, x: Tensor, block_strides: Sequence[int]) -> Tensor:
    """The value of each element's block, as a view of the shape of `x`."""
    return block.as_strided(tuple(x.shape), tuple(block_strides))


def _reduce(x: Tensor, block_strides: Sequence[int], blocks: int, how: str) -> Tensor:
    inside = [d for d, stride in enumerate(block_strides) if stride == 0]
    if inside:
        x = x.amax(inside, keepdim=True) if how == "amax" else x.amin(inside, keepdim=True)
    index = _per_element(torch.arange(blocks, device=x.device), x, block_strides)
    result = x.new_empty(blocks).scatter_reduce(0, index.reshape(-1), x.reshape(-1), how, include_self=False)
    return result.masked_fill(result.isnan(), torch.nan)


def _absmax_definition(x: Tensor, block_strides: Sequence[int], blocks: int) -> Tensor:
    _check_blocks("block_absmax", x, block_strides, blocks)
    return _reduce(x.abs(), block_strides, blocks, "amax") if x.numel() else x.new_zeros(blocks)


def _minmax_definition(x: Tensor, block_strides: Sequence[int], blocks: int) -> tuple[Tensor, Tensor]:
    _check_blocks("block_minmax", x, block_strides, blocks)
    if x.numel() == 0:
        return x.new_zeros(blocks), x.new_zeros(blocks)
    # + 0: the sign of a smallest or largest zero would depend on the order of elements
    return _reduce(x, block_strides, blocks, "amin") + 0.0, _reduce(x, block_strides, blocks, "amax") + 0.0


def _cast_definition(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    key: Tensor | None,
    u: Tensor | None,
    block_strides: Sequence[int],
    kind: str,
    numbers: Sequence[float],
    table: Tensor | None,
    rounding: str,
    result: str,
    offset: Tensor | None = None,
    step: Tensor | None = None,
) -> Tensor:
    _check_cast(x, scale, zero, key, u, block_strides, kind, numbers, table, rounding, result, offset, step)
    out = _result(x, result)
    if x.numel() == 0:
        return out
    if key is not None:
        u = uniform(key, x.shape)
    zero, offset = (None if b is None else _per_element(b, x, block_strides) for b in (zero, offset))
    t = (x if offset is None else x - offset) / _per_element(scale, x, block_strides)
    if zero is not None:
        t = t + zero
    q = _snap(t, kind, numbers, table, rounding, u)
    if result == "codes":
        return out.copy_(q.masked_fill(q.isnan(), 0.0))
    if result == "values":
        q = (q if zero is None else q - zero) * _per_element(scale if step is None else step, x, block_strides)
        q = q if offset is None else q + offset
    return out.copy_(q.masked_fill(q.isnan(), torch.nan))


def _cast_absmax_definition(
    x: Tensor, key: Tensor | None, block_strides: Sequence[int], blocks: int, denominator: float, *how: Any
) -> tuple[Tensor, Tensor]:
    _check_absmax("cast_absmax", x, block_strides, blocks, denominator, how[-1])
    x = _float32(x)
    scale = _absmax_definition(x, block_strides, blocks) / denominator
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return _cast_definition(x, scale, None, key, None, block_strides, *how), scale


def _pair_definition(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *casts, sums = rest
    first, second = _both(casts)
    _check_sums(x, sums)
    return *_cast_absmax_definition(x, *first), *_cast_absmax_definition(x, *second), _sums(x, sums)


def _sums(x: Tensor, wanted: bool) -> Tensor:
    """Sums over all axes but the last, in the order that `cast_absmax_pair` tells; empty if not wanted."""
    if not wanted:
        return x.new_empty(0, dtype=torch.float32)
    rows = x.float().flatten(0, -2) if x.dim() > 1 else x.float()[None]
    each = max(1, -(-len(rows) // RUNS))
    runs = F.pad(rows, (0, 0, 0, RUNS * each - len(rows))).unflatten(0, (RUNS, each))
    parts, total = runs.new_zeros(RUNS, rows.shape[1]), runs.new_zeros(rows.shape[1])
    for i in range(each):
        parts += runs[:, i]
    for part in parts:
        total += part
    return total.masked_fill(total.isnan(), torch.nan)


def _both(rest: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of `cast_absmax` after x for each of a pair's casts, from those of the pair."""
    key1, key2, strides1, blocks1, strides2, blocks2, *shared, rounding1, rounding2 = rest
    first = key1, strides1, blocks1, *shared, rounding1, "codes"
    return first, (key2, strides2, blocks2, *shared, rounding2, "codes")


def _result(x: Tensor, result: str) -> Tensor:
    """Memory for the result: the strides of `x` where it is dense, otherwise contiguous."""
    dtype = torch.int8 if result == "codes" else torch.float32
    if x.numel() == 0 or not _dense(x):
        return x.new_empty(tuple(x.shape), dtype=dtype)
    return x.new_empty_strided(tuple(x.shape), x.stride(), dtype=dtype)


def _float32(x: Tensor) -> Tensor:
    """`x` in float32, with its strides where it is dense, otherwise contiguous."""
    return x if x.dtype == torch.float32 else x.float() if _dense(x) else x.contiguous().float()


def _dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


# ---- operators -------------------------------------------------------------------------------------------------------

_CAST = "str kind, float[] numbers, Tensor? table, str rounding, str result"
"""The last arguments of every cast but the pair, `*how` in this file."""

_absmax_op = Operator(
    "lowbit::block_absmax",
    _absmax_definition,
    "(Tensor x, SymInt[] block_strides, SymInt blocks) -> Tensor",
)
_minmax_op = Operator(
    "lowbit::block_minmax",
    _minmax_definition,
    "(Tensor x, SymInt[] block_strides, SymInt blocks) -> (Tensor, Tensor)",
)
_cast_op = Operator(
    "lowbit::cast",
    _cast_definition,
    f"(Tensor x, Tensor scale, Tensor? zero, Tensor? key, Tensor? u, SymInt[] block_strides, {_CAST}, "
    "Tensor? offset=None, Tensor? step=None) -> Tensor",
)
_cast_absmax_op = Operator(
    "lowbit::cast_absmax",
    _cast_absmax_definition,
    f"(Tensor x, Tensor? key, SymInt[] block_strides, SymInt blocks, float denominator, {_CAST}) -> (Tensor, Tensor)",
)
_pair_op = Operator(
    "lowbit::cast_absmax_pair",
    _pair_definition,
    "(Tensor x, Tensor? key1, Tensor? key2, SymInt[] strides1, SymInt blocks1, SymInt[] strides2, SymInt blocks2, "
    "float denominator, str kind, float[] numbers, Tensor? table, str rounding1, str rounding2, bool sums) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_absmax_op.register_fake
def _(x: Tensor, block_strides: Sequence[int], blocks: int) -> Tensor:
    _check_blocks("block_absmax", x, block_strides, blocks)
    return x.new_empty(blocks)


@_minmax_op.register_fake
def _(x: Tensor, block_strides: Sequence[int], blocks: int) -> tuple[Tensor, Tensor]:
    _check_blocks("block_minmax", x, block_strides, blocks)
    return x.new_empty(blocks), x.new_empty(blocks)


@_cast_op.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    key: Tensor | None,
    u: Tensor | None,
    block_strides: Sequence[int],
    kind: str,
    numbers: Sequence[float],
    table: Tensor | None,
    rounding: str,
    result: str,
    offset: Tensor | None = None,
    step: Tensor | None = None,
) -> Tensor:
    _check_cast(x, scale, zero, key, u, block_strides, kind, numbers, table, rounding, result, offset, step)
    return _result(x, result)


@_cast_absmax_op.register_fake
def _cast_absmax_fake(
    x: Tensor, key: Tensor | None, block_strides: Sequence[int], blocks: int, denominator: float, *how: Any
) -> tuple[Tensor, Tensor]:
    _check_absmax("cast_absmax", x, block_strides, blocks, denominator, how[-1])
    x = _float32(x)
    scale = x.new_empty(blocks)
    _check_cast(x, scale, None, key, None, block_strides, *how)
    return _result(x, how[-1]), scale


@_pair_op.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *casts, sums = rest
    first, second = _both(casts)
    _check_sums(x, sums)
    summed = x.new_empty(x.shape[-1] if sums else 0, dtype=torch.float32)
    return *_cast_absmax_fake(x, *first), *_cast_absmax_fake(x, *second), summed


declare("lowbit::block_absmax", _absmax_definition, {"cpu": "C++"})
declare("lowbit::block_minmax", _minmax_definition, {"cpu": "C++"})
declare("lowbit::cast", _cast_definition, {"cpu": "C++"})
declare("lowbit::cast_absmax", _cast_absmax_definition, {"cpu": "C++"})
declare("lowbit::cast_absmax_pair", _pair_definition, {"cpu": "C++"})


# ---- public functions ------------------------------------------------------------------------------------------------


def block_absmax(x: Tensor, block_strides: Sequence[int], blocks: int) -> Tensor:
    """max|x| of each block, float32 (blocks,); NaN where a block has one.

    Args:
        x: float32, any strides, at most 8 dimensions.
        block_strides: one for each axis of x: see the top of this file. Every block must have an element.
        blocks: how many there are.
    """
    _check_blocks("block_absmax", x, block_strides, blocks)
    return torch.ops.lowbit.block_absmax(x, list(block_strides), blocks)


def block_minmax(x: Tensor, block_strides: Sequence[int], blocks: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest element of each block; arguments as for `block_absmax`."""
    _check_blocks("block_minmax", x, block_strides, blocks)
    return torch.ops.lowbit.block_minmax(x, list(block_strides), blocks)


def cast(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    key: Tensor | None,
    u: Tensor | None,
    block_strides: Sequence[int],
    kind: str,
    numbers: Sequence[float],
    table: Tensor | None,
    rounding: str,
    result: str = "values",
    offset: Tensor | None = None,
    step: Tensor | None = None,
) -> Tensor:
    """`x` on the grid.

    Args:
        x: float32, any strides, at most 8 dimensions.
        scale, zero: contiguous float32 (blocks,); zero None is 0.
        key: int64 (3,), the key of the uniforms of "stochastic", see `lowbit.ops.uniform`.
        u: those uniforms themselves, in [0, 1), float32 of the shape of x; one of the two, and none in other roundings.
        block_strides: one for each axis of x: see the top of this file.
        kind, numbers, table: from `cast_arguments`.
        rounding: one of `lowbit.rounding.ROUNDINGS`.
        result: "values" is q, "grid" the grid values, both float32; "codes" the int8 codes of kind "int" with fl = 0
            and bounds in [-128, 127], where NaN becomes 0.
        offset, step: like scale; offset None is 0, step None is scale.

    Returns:
        The shape of x, and its strides where x is dense; otherwise contiguous.
    """
    _check_cast(x, scale, zero, key, u, block_strides, kind, numbers, table, rounding, result, offset, step)
    return torch.ops.lowbit.cast(
        x, scale, zero, key, u, list(block_strides), kind, list(numbers), table, rounding, result, offset, step
    )


def cast_absmax(
    x: Tensor,
    key: Tensor | None,
    block_strides: Sequence[int],
    blocks: int,
    denominator: float,
    kind: str,
    numbers: Sequence[float],
    table: Tensor | None,
    rounding: str,
    result: str = "codes",
) -> tuple[Tensor, Tensor]:
    """`cast` with the scale max|x| / denominator of each block, 1 where that is 0; returns the scales too.

    For "codes" x may be bfloat16: the result is that of x.float().
    """
    _check_absmax("cast_absmax", x, block_strides, blocks, denominator, result)
    return torch.ops.lowbit.cast_absmax(
        x, key, list(block_strides), blocks, denominator, kind, list(numbers), table, rounding, result
    )


def cast_absmax_pair(
    x: Tensor,
    key1: Tensor | None,
    key2: Tensor | None,
    strides1: Sequence[int],
    blocks1: int,
    strides2: Sequence[int],
    blocks2: int,
    denominator: float,
    kind: str,
    numbers: Sequence[float],
    table: Tensor | None,
    rounding1: str,
    rounding2: str,
    sums: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of `cast_absmax` for two partitions into blocks, each with its own key and rounding.

    It reads x twice, not four times, and draws once for equal keys, where the blocks of one partition are the rows or
    samples of a dense x.

    Returns:
        codes and scales of the first partition, of the second; and, if asked for with `sums`, float32 sums of x over
        all axes but the last, `(x.shape[-1],)`, otherwise an empty tensor. They are made in one order whatever the
        threads: the rows are cut into 32 runs of equal length, each is summed row by row, then the runs are.
    """
    _check_absmax("cast_absmax_pair", x, strides1, blocks1, denominator, "codes")
    _check_absmax("cast_absmax_pair", x, strides2, blocks2, denominator, "codes")
    _check_sums(x, sums)
    blocks = list(strides1), blocks1, list(strides2), blocks2
    return torch.ops.lowbit.cast_absmax_pair(
        x, key1, key2, *blocks, denominator, kind, list(numbers), table, rounding1, rounding2, sums
    )


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_blocks(operator: str, x: Tensor, block_strides: Sequence[int], blocks: int, bfloat16: bool = False) -> None:
    if x.dtype != torch.float32 and not (bfloat16 and x.dtype == torch.bfloat16):
        needed = "float32, or bfloat16 for codes" if bfloat16 else "float32"
        raise TypeError(f"{operator} needs {needed}, got {x.dtype}; convert with x.float()")
    if x.dim() > DIMENSIONS:
        raise ValueError(f"{operator} takes at most {DIMENSIONS} dimensions, got {x.dim()}; join axes with reshape")
    if len(block_strides) != x.dim():
        raise ValueError(f"{operator} needs a block stride for each of {x.dim()} axes, got {list(block_strides)}")
    if any(stride < 0 for stride in block_strides):
        raise ValueError(f"block strides are at least 0, got {list(block_strides)}")
    if x.numel():
        last = sum((n - 1) * stride for n, stride in zip(x.shape, block_strides, strict=True))
        if last >= blocks:
            raise ValueError(f"{operator}: an element belongs to block {last}, but there are {blocks} blocks")


def _check_cast(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    key: Tensor | None,
    u: Tensor | None,
    block_strides: Sequence[int],
    kind: str,
    numbers: Sequence[float],
    table: Tensor | None,
    rounding: str,
    result: str,
    offset: Tensor | None = None,
    step: Tensor | None = None,
) -> None:
    _check_blocks("cast", x, block_strides, scale.numel())
    for name, value in (("scale", scale), ("zero", zero), ("offset", offset), ("step", step)):
        if value is not None and not (
            value.dtype == torch.float32 and value.shape == (scale.numel(),) and value.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be contiguous float32 of shape (blocks,) = ({scale.numel()},), "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}; {nearest(rounding, ROUNDINGS)}")
    if (key is not None) + (u is not None) != (rounding == "stochastic"):
        raise ValueError("stochastic rounding needs exactly one of key and u, other roundings neither")
    if key is not None and (key.dtype != torch.int64 or key.shape != (3,)):
        raise ValueError(f"a key is int64 (seed, stream, step); got {key.dtype} of shape {tuple(key.shape)}")
    if u is not None and (u.dtype != torch.float32 or u.shape != x.shape):
        raise ValueError(f"u must be float32 of the shape of x, {tuple(x.shape)}; got {u.dtype} {tuple(u.shape)}")
    _check_kind(kind, numbers, table, rounding)
    if result not in RESULTS:
        raise ValueError(f"unknown result {result!r}; {nearest(result, RESULTS)}")
    if result == "codes" and not (kind == "int" and numbers[2] == 0 and -128 <= numbers[0] and numbers[1] <= 127):
        raise ValueError(f"codes are int8: of kind 'int' with fl = 0 in -128 to 127; got {kind!r} {list(numbers)}")


def _check_kind(kind: str, numbers: Sequence[float], table: Tensor | None, rounding: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; {nearest(kind, KINDS)}")
    if len(numbers) != KINDS[kind]:
        raise ValueError(f"kind {kind!r} has {KINDS[kind]} numbers, got {list(numbers)}")
    if (table is not None) != (kind == "table"):
        raise ValueError("kind 'table' needs a table, other kinds have none")
    if table is not None and not (
        table.dtype == torch.float64 and table.dim() == 2 and table.shape[0] == 3 and 2 <= table.shape[1] <= LEVELS
    ):
        raise ValueError(f"a table is float64 (3, 2 to {LEVELS}); got {table.dtype} of shape {tuple(table.shape)}")
    if kind == "float" and rounding not in ("half_even", "stochastic"):
        raise ValueError(f"kind 'float' rounds 'half_even' or 'stochastic', not {rounding!r}; use Float.snap")
    if kind == "log2" and rounding != "stochastic":
        raise ValueError(f"kind 'log2' rounds 'stochastic', not {rounding!r}; use kind 'table'")
    if not _possible(kind, *numbers):
        raise ValueError(f"numbers {list(numbers)} of kind {kind!r} describe no format; take them from cast_arguments")


def _possible(kind: str, first: float, second: float = 0.0, third: float = 0.0, _: float = 0.0) -> bool:
    """Whether the numbers of a kind are those of a format that its kernel holds for."""
    if kind == "int":
        return -(2.0**31) <= first <= second <= 2.0**32 and -96 <= third <= 126
    if kind == "even":
        return 1 <= first <= 16
    if kind == "float":
        return 1 <= second <= 22 and -126 < first - second and 2.0**first <= third < 2.0 ** (104 + second)
    if kind == "log2":
        return -126 < first <= second < 127
    return first >= 0


def _check_absmax(
    operator: str, x: Tensor, block_strides: Sequence[int], blocks: int, denominator: float, result: str
) -> None:
    _check_blocks(operator, x, block_strides, blocks, bfloat16=result == "codes")
    if not denominator > 0:
        raise ValueError(f"the denominator must be positive; got {denominator}")


def _check_sums(x: Tensor, sums: bool) -> None:
    if sums and x.dim() == 0:
        raise ValueError("cast_absmax_pair: sums are over all axes but the last, and x has none; leave sums out")
