"""Codes of 1, 2, 3, 4 or 6 bits as one stream of bits: what `lowbit.packing` is made of.

Least significant bit first: code i occupies the bits i*bits ... (i+1)*bits - 1 of the stream, bit j of the stream is
bit j % 8 of byte j // 8, and the last byte is filled up with zeros. Eight codes fill `bits` whole bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends import Operator, declare

__all__ = ["SUB_BYTE", "pack", "unpack"]

SUB_BYTE: tuple[int, ...] = (1, 2, 3, 4, 6)
"""Code widths that these operators know."""


def _pack_definition(codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    _check_pack(codes, bits)
    misfit = (codes >> bits != 0).any()
    word = math.lcm(bits, 8)  # bits of a group that ends on a byte: 8 or 24
    group = word // bits  # codes in it
    low = codes.reshape(-1).to(torch.int32) & ((1 << bits) - 1)
    words = torch.nn.functional.pad(low, (0, -codes.numel() % group)).reshape(-1, group)
    shifts = torch.arange(0, word, bits, dtype=torch.int32, device=codes.device)
    words = (words << shifts).sum(-1, keepdim=True, dtype=torch.int32)
    shifts = torch.arange(0, word, 8, dtype=torch.int32, device=codes.device)
    packed = ((words >> shifts) & 255).to(torch.uint8).reshape(-1)
    return packed[: -(-codes.numel() * bits // 8)].clone(), misfit


def _unpack_definition(packed: Tensor, bits: int, count: int) -> Tensor:
    _check_unpack(packed, bits, count)
    flat = packed.reshape(-1)[: -(-count * bits // 8)]
    word = math.lcm(bits, 8)
    flat = torch.nn.functional.pad(flat.to(torch.int32), (0, -flat.numel() % (word // 8))).reshape(-1, word // 8)
    shifts = torch.arange(0, word, 8, dtype=torch.int32, device=packed.device)
    words = (flat << shifts).sum(-1, keepdim=True, dtype=torch.int32)
    shifts = torch.arange(0, word, bits, dtype=torch.int32, device=packed.device)
    return ((words >> shifts) & ((1 << bits) - 1)).reshape(-1)[:count].to(torch.uint8)


_pack = Operator("lowbit::pack", _pack_definition, "(Tensor codes, int bits) -> (Tensor, Tensor)")
_unpack = Operator("lowbit::unpack", _unpack_definition, "(Tensor packed, int bits, SymInt count) -> Tensor")


@_pack.register_fake
def _(codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    _check_pack(codes, bits)
    return codes.new_empty(-(-codes.numel() * bits // 8)), codes.new_empty((), dtype=torch.bool)


@_unpack.register_fake
def _(packed: Tensor, bits: int, count: int) -> Tensor:
    _check_unpack(packed, bits, count)
    return packed.new_empty(count)


declare("lowbit::pack", _pack_definition, {"cpu": "C++"})
declare("lowbit::unpack", _unpack_definition, {"cpu": "C++"})


def pack(codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """uint8 codes of any shape as a stream of bytes, and whether a code did not fit (a bool tensor without dimensions).

    Of a code that does not fit, the low `bits` bits are packed.
    """
    _check_pack(codes, bits)
    return torch.ops.lowbit.pack(codes, bits)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of a stream, uint8."""
    _check_unpack(packed, bits, count)
    return torch.ops.lowbit.unpack(packed, bits, count)


def _check_pack(codes: Tensor, bits: int) -> None:
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"pack needs uint8 codes; got {codes.dtype}")


def _check_unpack(packed: Tensor, bits: int, count: int) -> None:
    _check_bits(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed codes are uint8; got {packed.dtype}")
    if count < 0:
        raise ValueError(f"count must not be negative; got {count}")
    if packed.numel() < -(-count * bits // 8):
        raise ValueError(f"{count} codes of {bits} bits need {-(-count * bits // 8)} bytes; got {packed.numel()}")


def _check_bits(bits: int) -> None:
    if bits not in SUB_BYTE:
        raise ValueError(f"codes of {bits!r} bits can't be packed; allowed: {', '.join(map(str, SUB_BYTE))}")
