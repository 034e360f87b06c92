"""Product of matrices of signs, 64 of them in a word: exclusive or and count of bits.

    bit = 1 where x >= 0, else 0 (so -0 is +1 and NaN is -1)        sign = 2 * bit - 1
    sum_k sign_a[k] * sign_b[k] = K - 2 * popcount(a xor b)

Bit k of a row is bit k % 64 of word k // 64; the last word is filled up with zeros in both operands, which counts
nothing. On a little-endian machine a row is the stream of bytes that `lowbit.packing` makes of 1-bit codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Operator, declare

__all__ = ["binary_mm", "pack_signs"]


def _pack_signs_definition(x: Tensor) -> Tensor:
    _check_signs(x)
    words = -(-x.shape[-1] // 64)
    bits = torch.nn.functional.pad((x >= 0).to(torch.int64), (0, words * 64 - x.shape[-1]))
    return (bits.unflatten(-1, (words, 64)) << torch.arange(64, device=x.device)).sum(-1)  # bit 63 is the sign


def _definition(a: Tensor, b: Tensor, depth: int) -> Tensor:
    _check(a, b, depth)
    equal_minus_unequal = _signs(a) @ _signs(b).t()  # exact in float64
    return (equal_minus_unequal + (depth - 64 * a.shape[1])).to(torch.int32)


def _signs(words: Tensor) -> Tensor:
    bits = (words.unsqueeze(-1) >> torch.arange(64, device=words.device)) & 1
    return (2 * bits - 1).flatten(1).to(torch.float64)


_pack_signs = Operator("lowbit::pack_signs", _pack_signs_definition, "(Tensor x) -> Tensor")
_op = Operator("lowbit::binary_mm", _definition, "(Tensor a, Tensor b, SymInt depth) -> Tensor")


@_pack_signs.register_fake
def _(x: Tensor) -> Tensor:
    _check_signs(x)
    return x.new_empty((*x.shape[:-1], -(-x.shape[-1] // 64)), dtype=torch.int64)


@_op.register_fake
def _(a: Tensor, b: Tensor, depth: int) -> Tensor:
    _check(a, b, depth)
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.int32)


declare("lowbit::pack_signs", _pack_signs_definition, {"cpu": "C++"})
declare("lowbit::binary_mm", _definition, {"cpu": "C++"})


def pack_signs(x: Tensor) -> Tensor:
    """The signs of float32 `x` (..., K) as int64 words (..., ceil(K / 64)). Not differentiable."""
    _check_signs(x)
    return torch.ops.lowbit.pack_signs(x)


def binary_mm(a: Tensor, b: Tensor, depth: int) -> Tensor:
    """Product of signs: a (M, words) and b (N, words) from `pack_signs`, as int32 (M, N). Not differentiable.

    Exact. The operands' rows are what is reduced, so this is `torch.nn.functional.linear` of the signs, not `mm`.
    Faster than the float32 and bfloat16 products at every size of benchmarks/inference.py, from one row on.

    Args:
        a, b: int64, ceil(depth / 64) words in a row, bits past `depth` the same (zero) in both.
        depth: K, the number of signs in a row.

    Raises:
        TypeError: an operand that is not int64.
        ValueError: shapes that don't match each other or the depth.
    """
    _check(a, b, depth)
    return torch.ops.lowbit.binary_mm(a, b, depth)


def _check_signs(x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"pack_signs needs float32; got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("pack_signs needs at least one axis; got a tensor without")


def _check(a: Tensor, b: Tensor, depth: int) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.dtype != torch.int64:
            raise TypeError(f"binary_mm needs int64 words from pack_signs, got {name} of {x.dtype}")
        if x.dim() != 2:
            raise ValueError(f"binary_mm needs matrices, got {name} of shape {tuple(x.shape)}")
        if x.shape[1] != -(-depth // 64):
            raise ValueError(f"a row of {depth} signs is {-(-depth // 64)} words, got {name} of shape {tuple(x.shape)}")
    if not 0 <= depth < 1 << 31:
        raise ValueError(f"depth must be 0 to 2^31 - 1, got {depth}")
    if a.device != b.device:
        raise ValueError(f"binary_mm needs operands on one device, got {a.device} and {b.device}")
