"""Codes of less than a byte, stored in the bits they need.

Layout: one stream of bits, least significant first. Code i occupies the bits i*bits ... (i+1)*bits - 1 of the
stream, and bit j of the stream is bit j % 8 of byte j // 8. The last byte is filled up with zeros. So two
4-bit codes a, b become the byte a + 16*b, and eight 3-bit or four 6-bit codes become three bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import pack as ops

__all__ = ["PACKABLE", "pack", "packed_bytes", "unpack"]

PACKABLE: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 16)
"""Code widths that can be packed."""


def _check_bits(bits: int) -> None:
    if bits not in PACKABLE:
        raise ValueError(f"codes of {bits!r} bits can't be packed; allowed: {', '.join(map(str, PACKABLE))}")


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` packed codes take: ceil(count * bits / 8).

    Raises:
        ValueError: a width that is not in `PACKABLE`, or a negative count.
    """
    _check_bits(bits)
    if count < 0:
        raise ValueError(f"count must not be negative; got {count}")
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes into bytes.

    Args:
        codes: integers in [0, 2**bits), any integer dtype and shape, read in row-major order. Add the offset
            of signed codes first (for b-bit integers 2**(b-1)).
        bits: one of `PACKABLE`. 8 is the identity, 16 is little-endian.

    Returns:
        uint8 of shape (ceil(codes.numel() * bits / 8),); see the module's text for the layout.

    Raises:
        TypeError: codes are not integers.
        ValueError: a width that is not in `PACKABLE`, or a code outside the range.
    """
    _check_bits(bits)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(f"packing needs integer codes; got {codes.dtype}")
    # the operator tells whether a byte fits; other integers are looked at before they become bytes
    narrow = codes.element_size() == 1 and bits < 8
    if not narrow and codes.numel():
        _check_range(codes, bits)
    if bits < 8:
        packed, misfit = ops.pack(codes.view(torch.uint8) if narrow else codes.to(torch.uint8), bits)
        if narrow and misfit:
            _check_range(codes, bits)
        return packed
    if bits == 8:
        return codes.reshape(-1).to(torch.uint8, copy=True)
    flat = codes.reshape(-1).to(torch.int32)
    return torch.stack([flat & 255, flat >> 8], -1).to(torch.uint8).reshape(-1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes that `pack` wrote.

    Args:
        packed: uint8, any shape, at least ceil(count * bits / 8) bytes; further bytes are ignored.
        bits: one of `PACKABLE`.
        count: number of codes.

    Returns:
        Codes of shape (count,): uint8 up to 8 bits, int32 for 16.

    Raises:
        TypeError: `packed` is not uint8.
        ValueError: a width that is not in `PACKABLE`, a negative count, or too few bytes.
    """
    need = packed_bytes(count, bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed codes are uint8; got {packed.dtype}")
    if packed.numel() < need:
        raise ValueError(f"{count} codes of {bits} bits need {need} bytes; got {packed.numel()}")
    flat = packed.reshape(-1)[:need]
    if bits < 8:
        return ops.unpack(flat, bits, count)
    if bits == 8:
        return flat.clone()
    low, high = flat.to(torch.int32).reshape(-1, 2).unbind(-1)
    return low + (high << 8)


def _check_range(codes: Tensor, bits: int) -> None:
    least, most = (int(v) for v in torch.aminmax(codes))
    if least < 0 or most >= 1 << bits:
        bad = least if least < 0 else most
        raise ValueError(f"code {bad} does not fit {bits} unsigned bits; allowed: 0 to {(1 << bits) - 1}")
