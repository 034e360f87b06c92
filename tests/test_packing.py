from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.packing import PACKABLE, pack, packed_bytes, unpack


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 1, 1], [0b10001101, 0b1]),
        (2, [3, 0, 1, 2, 1], [0b10010011, 0b01]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11010001, 0b01011000, 0b00011111]),
        (3, [7, 5, 1], [0b01101111, 0]),
        (4, [10, 3, 15], [0x3A, 0x0F]),
        (6, [63, 0, 33, 1], [0b00111111, 0b00010000, 0b00000110]),
        (8, [0, 255, 7], [0, 255, 7]),
        (16, [0x1234, 0xFFFE], [0x34, 0x12, 0xFE, 0xFF]),
    ],
)
def test_layout(bits, codes, expected):
    packed = pack(torch.tensor(codes), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected
    assert unpack(packed, bits, len(codes)).tolist() == codes


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(PACKABLE))
def test_round_trip(data, bits):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = pack(torch.tensor(codes, dtype=torch.int32), bits)
    assert packed.shape == (-(-len(codes) * bits // 8),)
    assert packed.numel() == packed_bytes(len(codes), bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes
    stream = sum(c << i * bits for i, c in enumerate(codes))  # the layout, in one line of Python
    assert bytes(packed.tolist()) == stream.to_bytes(packed.numel(), "little")


@pytest.mark.parametrize("bits", PACKABLE)
def test_dtypes_and_shapes(bits):
    top = 2**bits - 1
    codes = torch.full((3, 5), top, dtype=torch.int64 if bits == 16 else torch.uint8).T  # not contiguous
    packed = pack(codes, bits)
    back = unpack(packed, bits, 15)
    assert back.dtype == (torch.int32 if bits == 16 else torch.uint8)
    assert back.tolist() == [top] * 15
    assert pack(torch.empty(0, 4, dtype=torch.uint8), bits).shape == (0,)
    assert unpack(torch.empty(0, dtype=torch.uint8), bits, 0).shape == (0,)
    assert unpack(pack(torch.tensor(top), bits), bits, 1).tolist() == [top]
    assert unpack(torch.cat([packed, packed]), bits, 15).tolist() == [top] * 15  # further bytes are ignored


def test_row_major_order():
    codes = torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8)
    assert unpack(pack(codes.T, 2), 2, 4).tolist() == [0, 2, 1, 3]


def test_packing_copies():
    codes = torch.tensor([1, 2], dtype=torch.uint8)
    packed = pack(codes, 8)
    back = unpack(packed, 8, 2)
    codes[0] = 9
    packed[1] = 9
    assert packed.tolist() == [1, 9] and back.tolist() == [1, 2]


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="5 bits can't be packed; allowed: 1, 2, 3, 4, 6, 8, 16"):
        pack(torch.zeros(2, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="0 bits"):
        unpack(torch.zeros(2, dtype=torch.uint8), 0, 1)
    with pytest.raises(ValueError, match="code 16 does not fit 4 unsigned bits; allowed: 0 to 15"):
        pack(torch.tensor([3, 16]), 4)
    with pytest.raises(ValueError, match="code -1 does not fit 8"):
        pack(torch.tensor([3, -1], dtype=torch.int8), 8)
    with pytest.raises(ValueError, match="9 codes of 3 bits need 4 bytes; got 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 9)
    with pytest.raises(ValueError, match="negative; got -1"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, -1)
    with pytest.raises(TypeError, match="float32"):
        pack(torch.zeros(3), 4)
    with pytest.raises(TypeError, match="int32"):
        unpack(torch.zeros(3, dtype=torch.int32), 4, 2)
