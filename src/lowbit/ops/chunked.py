"""Matrix product with a low-precision chunked accumulator (WangFP8: Wang et al., 2018, arXiv 1812.08011).

    inside a chunk     s <- R(s + a_k * b_k)    for its k in order, from s = 0
    across chunks      t <- R(t + s)            for the chunks in order, from t = 0

R rounds to nearest even into the minifloat (exponent, mantissa, bias): IEEE-like with gradual underflow,
saturating at its largest finite value; the paper's accumulator is 1-6-9, that is (6, 9, 31), with chunks of
64.

The product a_k * b_k is computed in float32 (exact for FP8 operands) and so is the sum that R rounds: two
roundings, never a fused multiply-add. The order of additions is fixed, so the result does not depend on
threads or tiles. NaN propagates; an infinite partial sum saturates like any other too large value. With
chunks of 1, R also rounds each product: that is plain accumulation where products lie on the grid, as those
of FP8 operands do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends import Operator, declare

__all__ = ["chunked_mm", "round_minifloat"]

_STATE_ELEMENTS = 1 << 21  # of the definition's partial sums, 8 MiB: M is split so that there are no more


def round_minifloat(x: Tensor, exponent: int, mantissa: int, bias: int) -> Tensor:
    """Nearest-even value of the saturating minifloat, exactly, for float32 `x`. A zero comes out as +0.

    With 2^e the power of two at or below |x|, at least the smallest normal one, the grid's step is 2^(e -
    mantissa). Adding and subtracting M = 1.5 * 2^(e - mantissa + bits of the carrier) makes the processor's
    rounding fall on it.
    """
    _check_format(exponent, mantissa, bias)
    e_min, e_max = 1 - bias, (1 << exponent) - 2 - bias
    largest = (2.0 - 2.0**-mantissa) * 2.0**e_max
    # M must be finite in the carrier and x + M must stay in M's binade: float32 if that holds, else float64
    if mantissa <= 21 and e_max - mantissa + 23 <= 127:
        real, integer, bits, offset, exponent_field = torch.float32, torch.int32, 23, 127, 0xFF << 23
    else:
        real, integer, bits, offset, exponent_field = torch.float64, torch.int64, 52, 1023, 0x7FF << 52
    x = x.to(real).clamp(-largest, largest)
    power = x.view(integer).bitwise_and(exponent_field).clamp_min_((e_min + offset) << bits)
    m = power.add_(((bits - mantissa) << bits) + (1 << (bits - 1))).view(real)
    return ((x + m) - m).to(torch.float32)


def _definition(
    a: Tensor, b: Tensor, chunk: int, exponent: int, mantissa: int, bias: int, row_axes: int = 1, depth_axes: int = 1
) -> Tensor:
    _check(a, b, chunk, exponent, mantissa, bias, row_axes, depth_axes)
    a = a.reshape(math.prod(a.shape[:row_axes]), math.prod(a.shape[row_axes:]))
    b = b.reshape(math.prod(b.shape[:depth_axes]), math.prod(b.shape[depth_axes:]))
    (rows, depth), columns = a.shape, b.shape[1]
    if 0 in (rows, depth, columns):
        return a.new_zeros(rows, columns)
    # zeros at the end of the last chunk change no sum, so all chunks can take their k-th step together
    chunk = min(chunk, depth)
    chunks = -(-depth // chunk)
    padding = chunks * chunk - depth
    a = torch.nn.functional.pad(a, (0, padding)).view(rows, chunks, chunk)
    b = torch.nn.functional.pad(b, (0, 0, 0, padding)).view(chunks, chunk, columns)
    result = a.new_empty(rows, columns)
    step = max(1, _STATE_ELEMENTS // (chunks * columns))
    for first in range(0, rows, step):
        part = a[first : first + step]  # (m, chunks, chunk)
        s = part.new_zeros(len(part), chunks, columns)
        for k in range(chunk):
            s = round_minifloat(s + part[:, :, k, None] * b[:, k], exponent, mantissa, bias)
        t = part.new_zeros(len(part), columns)
        for c in range(chunks):
            t = round_minifloat(t + s[:, c], exponent, mantissa, bias)
        result[first : first + step] = t.masked_fill(t.isnan(), torch.nan)  # NaNs have no payload
    return result


_op = Operator(
    "lowbit::chunked_mm",
    _definition,
    "(Tensor a, Tensor b, int chunk, int exponent, int mantissa, int bias, int row_axes=1, int depth_axes=1) -> Tensor",
)


@_op.register_fake
def _(
    a: Tensor, b: Tensor, chunk: int, exponent: int, mantissa: int, bias: int, row_axes: int = 1, depth_axes: int = 1
) -> Tensor:
    _check(a, b, chunk, exponent, mantissa, bias, row_axes, depth_axes)
    return a.new_empty(math.prod(a.shape[:row_axes]), math.prod(b.shape[depth_axes:]))


declare("lowbit::chunked_mm", _definition, {"cpu": "C++"})


def chunked_mm(
    a: Tensor,
    b: Tensor,
    chunk: int = 64,
    exponent: int = 6,
    mantissa: int = 9,
    bias: int = 31,
    row_axes: int = 1,
    depth_axes: int = 1,
) -> Tensor:
    """a (M, K) times b (K, N), float32, accumulated in chunks in a minifloat; the defaults are the paper's.

    M is the first `row_axes` axes of a, taken as one, and K the first `depth_axes` of b: the patches of a convolution,
    a view of its input, need no copy.

    Not differentiable: a layer states its three products itself. Slower than `torch.mm` at every size,
    because it rounds after each addition: it is there to study accumulators, not for speed. With AVX-512 and operands
    of few bits, such as FP8, 16 sums take five vector instructions (product and sum, two to find the power of two, two
    to round) where a float product takes one: at two a clock at most 6.4 sums a clock and core against 32. A core of
    a Sapphire Rapids reached 13 G sums/s on a (16384, 144) by (144, 16) product.
    """
    _check(a, b, chunk, exponent, mantissa, bias, row_axes, depth_axes)
    return torch.ops.lowbit.chunked_mm(a, b, chunk, exponent, mantissa, bias, row_axes, depth_axes)


def _check_format(exponent: int, mantissa: int, bias: int) -> None:
    if not 2 <= exponent <= 8:
        raise ValueError(f"exponent must have 2 to 8 bits, got {exponent}")
    if not 1 <= mantissa <= 22:
        raise ValueError(f"mantissa must have 1 to 22 bits, got {mantissa}")
    lowest, highest = max(0, (1 << exponent) - 2 - 127), 127  # all values are float32 numbers
    if not lowest <= bias <= highest:
        raise ValueError(f"bias must be {lowest} to {highest} with {exponent} exponent bits, got {bias}")


def _check(
    a: Tensor, b: Tensor, chunk: int, exponent: int, mantissa: int, bias: int, row_axes: int, depth_axes: int
) -> None:
    for name, x, axes in (("a", a, row_axes), ("b", b, depth_axes)):
        if x.dtype != torch.float32:
            raise TypeError(f"chunked_mm needs float32 operands, got {name} of {x.dtype}")
        if not 1 <= axes < x.dim() or (row_axes == depth_axes == 1 and x.dim() != 2):
            more = "" if axes == 1 else f" with {axes} leading axes"
            raise ValueError(f"chunked_mm needs matrices, got {name} of shape {tuple(x.shape)}{more}")
    if a.shape[row_axes:] != b.shape[:depth_axes]:
        raise ValueError(f"chunked_mm needs a (M, K) and b (K, N), got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"chunked_mm needs operands on one device, got {a.device} and {b.device}")
    if chunk <= 0:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    _check_format(exponent, mantissa, bias)
