"""Products with weights that stay packed in 1, 2 or 4 bits: inference with few rows, bound by reading the weights.

A weight (N, K) is a row of packed codes for every output, in the layout of `lowbit.packing`, filled up with code 0 to a
multiple of 32 columns (`pack_weight`, `unpack_weight`). It stands for scale * level(code), with one scale for a row or
one for `group` columns of it.

    y[m, n] = sum_k x[m, k] * scale[n, k // group] * level(code[n, k])

Activations are float32 (`packed_mm`), or int8 codes made inside with a scale for each row (`packed_mm_int8`).

The order of additions is part of the definition, so results don't depend on threads or instructions. A run is 16 lanes
of 32 / bits columns that follow each other: 128 columns of 4 bits, 256 of 2, 512 of 1. A lane adds its products column
by column, from run to run as long as no lane's scale changes: that is a segment, `group` columns where it is a multiple
of the run, otherwise one run. A segment's sum is multiplied by the lane's scale and added to the lane's total, and the
totals of the 16 lanes are added as 8 + 8, 4 + 4, 2 + 2, 1 + 1. With one scale for a row, the lanes are added first and
multiplied once.

With int8 activations the sums of a segment are exact integers (those of all lanes, where a row has one scale), and the
row's activation scale is multiplied at the end:

    scale_x = max(max_k |x| / 127, 2^-126)        code = x / scale_x, to nearest even        y = scale_x * (...)

A row with a value that is not finite gives NaN.

Where it pays, for a layer of 4096 x 4096 on a Sapphire Rapids processor (benchmarks/inference.py --only packed_mm):

- Float activations: faster than a float32 product up to about 32 rows (16 with 4 bits in groups), 4 to 6 times with
  one row; slower beyond, because a weight is looked up and multiplied without fused additions. Faster than bfloat16 up
  to about 16 rows, with AMX up to 4.
- int8 activations, one scale for a row: faster than float32 and than bfloat16 without AMX at every size tried, 1 to 256
  rows, 11 to 17 times with one row. With scales for groups of 128 up to 64 rows for 4 bits, 256 for fewer. Against
  bfloat16 with AMX up to about 8 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Operator, declare
from .pack import pack, unpack

__all__ = ["LEVELS", "pack_weight", "packed_mm", "unpack_weight"]

LANES = 16
LONGEST = 1 << 20  # columns: 15 * 127 * 2^20 is the longest sum that int32 holds

LEVELS: dict[str, tuple[int, int, int]] = {
    "binary": (1, 2, 1),
    "ternary": (2, 1, 1),
    "int2": (2, 1, 2),
    "int4": (4, 1, 8),
}
"""Named levels: bits, and step and offset of level = step * code - offset. Code 3 of "ternary" would be 2."""


def _chunk(rows: int, columns: int, segments: int) -> int:
    """Rows that the definitions take at once, so that their sums stay below 64 MiB."""
    return max(1, (1 << 24) // max(1, columns * segments * LANES)) if rows else 1


def _lay_out(x: Tensor, bits: int, runs: int) -> Tensor:
    """(rows, runs, lanes, columns of a lane), filled up with zeros."""
    per_lane = 32 // bits
    return torch.nn.functional.pad(x, (0, runs * LANES * per_lane - x.shape[1])).view(-1, runs, LANES, per_lane)


def _weight_codes(weight: Tensor, bits: int, runs: int) -> Tensor:
    codes = unpack(weight, bits, weight.numel() * 8 // bits).view(weight.shape[0], -1)
    return _lay_out(codes, bits, runs)


def _segment(bits: int, group: int, runs: int) -> int:
    """Runs of a segment."""
    run = LANES * 32 // bits
    return max(1, runs) if group == 0 else group // run if group % run == 0 else 1


def _lane_scales(scale: Tensor, bits: int, group: int, segment: int, segments: int) -> Tensor:
    """(N, segments, lanes)."""
    first = torch.arange(segments, device=scale.device)[:, None] * segment * LANES
    first = (first + torch.arange(LANES, device=scale.device)) * (32 // bits)
    return scale[:, (first // group).clamp(max=scale.shape[1] - 1)]


def _across(lanes: Tensor) -> Tensor:
    while lanes.shape[-1] > 1:
        a, b = lanes.chunk(2, -1)
        lanes = a + b
    return lanes.squeeze(-1)


def _totals(sums: Tensor, scales: Tensor) -> Tensor:
    """Sums (m, N, segments, lanes) of segments, scaled and added up."""
    total = torch.zeros_like(sums[:, :, 0])
    for s in range(sums.shape[2]):
        total = total + scales[:, s] * sums[:, :, s]
    return _across(total)


def _definition(x: Tensor, weight: Tensor, scale: Tensor, levels: Tensor, group: int) -> Tensor:
    bits = _check_levels(levels)
    _check(x, weight, scale, bits, group)
    (rows, depth), columns = x.shape, weight.shape[0]
    if 0 in (rows, depth, columns):
        return x.new_zeros(rows, columns)
    runs = -(-weight.shape[1] // 64)
    segment = _segment(bits, group, runs)
    segments = -(-runs // segment)
    value = levels[_weight_codes(weight, bits, runs).int()]
    a = _lay_out(x, bits, runs)
    result = x.new_empty(rows, columns)
    for m in range(0, rows, step := _chunk(rows, columns, segments)):
        part = a[m : m + step]
        sums = x.new_zeros(len(part), columns, segments, LANES)
        for run in range(segment):  # of every segment at once; the last may be shorter
            count = len(range(run, runs, segment))
            v, p = value[:, run::segment], part[:, None, run::segment]
            for i in range(value.shape[-1]):
                sums[:, :, :count] += v[..., i] * p[..., i]
        if group:
            y = _totals(sums, _lane_scales(scale, bits, group, segment, segments))
        else:
            y = _across(sums[:, :, 0]) * scale.reshape(-1)
        result[m : m + step] = y
    return result.masked_fill(result.isnan(), torch.nan)  # NaNs have no payload


def _int8_definition(x: Tensor, weight: Tensor, scale: Tensor, bits: int, offset: int, group: int) -> Tensor:
    _check(x, weight, scale, bits, group)
    if not 0 <= offset < 1 << bits:
        raise ValueError(f"offset must be 0 to {(1 << bits) - 1}, got {offset}")
    (rows, depth), columns = x.shape, weight.shape[0]
    if 0 in (rows, depth, columns):
        return x.new_zeros(rows, columns)
    finite = x.isfinite().all(1, keepdim=True)
    scale_x = (x.abs().amax(1, keepdim=True) / 127).clamp(min=2.0**-126)
    codes = torch.where(finite, (x / scale_x).round(), 0.0)
    scale_x = scale_x.masked_fill(~finite, torch.nan)
    runs = -(-weight.shape[1] // 64)
    segment = _segment(bits, group, runs)
    segments = -(-runs // segment)
    # columns past the last one have activation 0
    value = _weight_codes(weight, bits, runs).to(torch.float64) * (2 if bits == 1 else 1) - offset
    a = _lay_out(codes.to(torch.float64), bits, runs)
    result = x.new_empty(rows, columns)
    for m in range(0, rows, step := _chunk(rows, columns, segments)):
        part = a[m : m + step]
        if group:
            by_run = torch.einsum("mrli,nrli->mnrl", part, value)  # whole numbers: exact in float64
            missing = segments * segment - runs
            by_run = torch.nn.functional.pad(by_run, (0, 0, 0, missing)).unflatten(2, (segments, segment))
            scales = _lane_scales(scale, bits, group, segment, segments)
            y = _totals(by_run.sum(3).to(torch.float32), scales)
        else:
            y = (part.flatten(1) @ value.flatten(1).t()).to(torch.float32) * scale.reshape(-1)
        result[m : m + step] = y
    result = result * scale_x
    return result.masked_fill(result.isnan(), torch.nan)


_op = Operator(
    "lowbit::packed_mm",
    _definition,
    "(Tensor x, Tensor weight, Tensor scale, Tensor levels, int group) -> Tensor",
)
_int8_op = Operator(
    "lowbit::packed_mm_int8",
    _int8_definition,
    "(Tensor x, Tensor weight, Tensor scale, int bits, int offset, int group) -> Tensor",
)


@_op.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, levels: Tensor, group: int) -> Tensor:
    _check(x, weight, scale, _check_levels(levels), group)
    return x.new_empty(x.shape[0], weight.shape[0])


@_int8_op.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bits: int, offset: int, group: int) -> Tensor:
    _check(x, weight, scale, bits, group)
    return x.new_empty(x.shape[0], weight.shape[0])


declare("lowbit::packed_mm", _definition, {"cpu": "C++"})
declare("lowbit::packed_mm_int8", _int8_definition, {"cpu": "C++"})


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """Codes (N, K) from 0 to 2**bits - 1 as the weight of `packed_mm`: uint8 (N, ceil(K / 32) * 4 * bits).

    Raises:
        TypeError: codes that are not integers.
        ValueError: codes that are not a matrix or don't fit, or bits other than 1, 2, 4.
    """
    _check_bits(bits)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(f"pack_weight needs integer codes; got {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"pack_weight needs codes (N, K); got shape {tuple(codes.shape)}")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits:
        raise ValueError(
            f"codes of {bits} bits are 0 to {(1 << bits) - 1}; got {int(codes.min())} to {int(codes.max())}"
        )
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % 32))
    return pack(padded, bits)[0].view(codes.shape[0], _row_bytes(codes.shape[1], bits))


def unpack_weight(weight: Tensor, bits: int, columns: int) -> Tensor:
    """The codes (N, columns), uint8, that `pack_weight` got."""
    _check_bits(bits)
    if weight.dim() != 2 or weight.shape[1] != _row_bytes(columns, bits):
        raise ValueError(
            f"a weight of {columns} columns of {bits} bits has {_row_bytes(columns, bits)} bytes in a row; "
            f"got shape {tuple(weight.shape)}"
        )
    padded = weight.shape[1] * 8 // bits
    return unpack(weight, bits, weight.shape[0] * padded).view(-1, padded)[:, :columns].contiguous()


def packed_mm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    levels: str | Tensor = "int4",
    group: int | None = None,
    activations: str = "float32",
) -> Tensor:
    """`x` (..., K) times packed weights (N, K), as `torch.nn.functional.linear` does. Not differentiable.

    Args:
        x: float32.
        weight: uint8, from `pack_weight`.
        scale: float32; (N,) or (N, 1) for one scale in a row, (N, ceil(K / group)) with `group`.
        levels: what the codes mean: "binary" (1 bit: -1, 1), "ternary" (2 bits: -1, 0, 1), "int2" (code - 2),
            "int4" (code - 8); or a float32 table of 2, 4 or 16 levels, for float activations.
        group: columns that share a scale, a multiple of 32; None for one scale in a row.
        activations: "float32", or "int8": x is rounded to 255 levels with one scale for each of its rows.

    Raises:
        TypeError: an operand of another dtype.
        ValueError: unknown levels or activations, a group that is no multiple of 32, shapes that don't match.
    """
    if activations not in ("float32", "int8"):
        raise ValueError(f"activations must be 'float32' or 'int8'; got {activations!r}")
    if isinstance(levels, str) and levels not in LEVELS:
        raise ValueError(f"levels must be a table or one of {', '.join(LEVELS)}; got {levels!r}")
    if group is not None and (group <= 0 or group % 32):
        raise ValueError(f"group must be a multiple of 32, or None for one scale in a row; got {group}")
    if x.dim() == 0:
        raise ValueError("packed_mm needs x (..., K); got a tensor without axes")
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    if activations == "int8":
        if not isinstance(levels, str):
            raise ValueError(f"int8 activations need levels by name ({', '.join(LEVELS)}); got a table")
        bits, _, offset = LEVELS[levels]
        _check(rows, weight, scale, bits, group or 0)
        y = torch.ops.lowbit.packed_mm_int8(rows, weight, scale, bits, offset, group or 0)
    else:
        if isinstance(levels, str):
            bits, step, offset = LEVELS[levels]
            levels = torch.arange(1 << bits, dtype=torch.float32, device=x.device) * step - offset
        _check(rows, weight, scale, _check_levels(levels), group or 0)
        y = torch.ops.lowbit.packed_mm(rows, weight, scale, levels, group or 0)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _row_bytes(depth: int, bits: int) -> int:
    return -(-depth // 32) * 4 * bits


def _check_bits(bits: int) -> None:
    if bits not in (1, 2, 4):
        raise ValueError(f"packed weights have 1, 2 or 4 bits, got {bits}")


def _check_levels(levels: Tensor) -> int:
    if levels.dtype != torch.float32:
        raise TypeError(f"packed_mm needs levels of float32, got {levels.dtype}")
    if levels.dim() != 1 or levels.shape[0] not in (2, 4, 16):
        raise ValueError(f"packed_mm needs 2, 4 or 16 levels, got shape {tuple(levels.shape)}")
    return 1 if levels.shape[0] == 2 else 2 if levels.shape[0] == 4 else 4


def _check(x: Tensor, weight: Tensor, scale: Tensor, bits: int, group: int) -> None:
    _check_bits(bits)
    for name, tensor, dtype in (
        ("x", x, torch.float32),
        ("weight", weight, torch.uint8),
        ("scale", scale, torch.float32),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"packed_mm needs {name} of {dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"packed_mm needs operands on one device, got {name} on {tensor.device}, x on {x.device}")
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"packed_mm needs matrices, got shapes {tuple(x.shape)} and {tuple(weight.shape)}")
    (_, depth), columns = x.shape, weight.shape[0]
    if depth > LONGEST:
        raise ValueError(f"packed_mm adds up to {LONGEST} products, got K = {depth}")
    if weight.shape[1] != _row_bytes(depth, bits):
        raise ValueError(
            f"{depth} codes of {bits} bits are {_row_bytes(depth, bits)} bytes in a row (see pack_weight), "
            f"got a weight of shape {tuple(weight.shape)}"
        )
    if group < 0 or group % 32:
        raise ValueError(f"group must be 0 or a multiple of 32, got {group}")
    allowed = [(columns, -(-depth // group))] if group else [(columns,), (columns, 1)]
    if tuple(scale.shape) not in allowed:
        raise ValueError(f"packed_mm needs a scale of shape {' or '.join(map(str, allowed))}, got {tuple(scale.shape)}")
