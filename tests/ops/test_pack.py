"""lowbit::pack and lowbit::unpack: the kernels against the definitions, the definitions against Python's integers."""

from __future__ import annotations

import random

import pytest
import torch

from lowbit import packing
from lowbit.ops import backends
from lowbit.ops.pack import SUB_BYTE, pack, unpack

PACK = backends.definition("lowbit::pack")
UNPACK = backends.definition("lowbit::unpack")
ISAS = backends.compiled_isas()


@pytest.mark.parametrize("bits", SUB_BYTE)
def test_definition_is_a_stream_of_bits(bits: int) -> None:
    for count in (0, 1, 7, 8, 9, 64, 101):
        codes = torch.randint(0, 1 << bits, (count,), dtype=torch.uint8)
        packed, misfit = PACK(codes, bits)
        stream = sum(c << i * bits for i, c in enumerate(codes.tolist()))
        assert bytes(packed.tolist()) == stream.to_bytes(-(-count * bits // 8), "little") and not misfit
        assert torch.equal(UNPACK(packed, bits, count), codes)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", SUB_BYTE)
def test_kernels_equal_the_definitions(isa: str, bits: int) -> None:
    generator = random.Random(bits)
    with backends.using_isa(isa):
        for count in [*range(140), 1000, 12345]:
            offset = generator.randrange(9)  # unaligned
            codes = torch.randint(0, 1 << bits, (count + offset,), dtype=torch.uint8)[offset:]
            packed, misfit = torch.ops.lowbit.pack(codes, bits)
            expected, _ = PACK(codes, bits)
            assert torch.equal(packed, expected) and not misfit and misfit.shape == ()
            longer = torch.cat([torch.zeros(offset, dtype=torch.uint8), packed])[offset:]
            assert torch.equal(torch.ops.lowbit.unpack(longer, bits, count), codes)
            if count:
                codes = codes.clone()
                codes[generator.randrange(count)] += 1 << bits
                packed, misfit = torch.ops.lowbit.pack(codes, bits)
                assert torch.equal(packed, expected) and misfit  # higher bits are dropped, and told


@pytest.mark.parametrize("isa", ISAS)
def test_strided_codes(isa: str) -> None:
    codes = torch.randint(0, 4, (70, 60), dtype=torch.uint8)
    with backends.using_isa(isa):
        for view in (codes.t(), codes[::2, 1::3], codes[:, :1].expand(70, 9)):
            assert torch.equal(torch.ops.lowbit.pack(view, 2)[0], PACK(view, 2)[0])
        packed = torch.ops.lowbit.pack(codes, 2)[0].view(2, -1).repeat_interleave(2, 1)[:, ::2]
        assert torch.equal(torch.ops.lowbit.unpack(packed, 2, 4200).view(70, 60), codes)


@pytest.mark.parametrize("bits", SUB_BYTE)
def test_any_number_of_threads_gives_the_same_bits(bits: int) -> None:
    count = 1_000_003  # several tasks
    codes = torch.randint(0, 1 << bits, (count,), dtype=torch.uint8)
    expected = PACK(codes, bits)[0]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(pack(codes, bits)[0], expected)
            assert torch.equal(unpack(expected, bits, count), codes)
            codes[-1] |= 128
            assert pack(codes, bits)[1]
            codes[-1] &= (1 << bits) - 1
    finally:
        torch.set_num_threads(before)


def test_public_functions_take_every_integer_type() -> None:
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        codes = torch.randint(0, 8, (5, 7)).to(dtype).t()
        for bits in (3, 4, 6, 8, 16):
            packed = packing.pack(codes, bits)
            assert packing.unpack(packed, bits, 35).tolist() == codes.flatten().tolist()
        codes[2, 3] = 120
        with pytest.raises(ValueError, match="code 120 does not fit 4 unsigned bits; allowed: 0 to 15"):
            packing.pack(codes, 4)
        if dtype != torch.uint8:
            codes[1, 1] = -7
            with pytest.raises(ValueError, match="code -7 does not fit 4 unsigned bits"):
                packing.pack(codes, 4)


@pytest.mark.parametrize("operators", ["operators", "definitions"])
def test_errors_name_the_value(operators: str) -> None:
    pack_, unpack_ = (pack, unpack) if operators == "operators" else (PACK, UNPACK)
    byte = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="5 bits can't be packed; allowed: 1, 2, 3, 4, 6"):
        pack_(byte, 5)
    with pytest.raises(TypeError, match="int64"):
        pack_(byte.long(), 4)
    with pytest.raises(TypeError, match="float32"):
        unpack_(byte.float(), 4, 2)
    with pytest.raises(ValueError, match="7 codes of 4 bits need 4 bytes; got 3"):
        unpack_(byte, 4, 7)
    with pytest.raises(ValueError, match="got -1"):
        unpack_(byte, 4, -1)


@pytest.mark.skipif(not ISAS, reason="the C++ kernels are not built")
def test_the_kernels_check_what_they_are_given() -> None:
    byte = torch.zeros(3, dtype=torch.uint8)
    for operator, args in [
        (torch.ops.lowbit.pack, (byte, 5)),
        (torch.ops.lowbit.pack, (byte.int(), 4)),
        (torch.ops.lowbit.unpack, (byte, 4, 7)),
        (torch.ops.lowbit.unpack, (byte, 4, -1)),
        (torch.ops.lowbit.unpack, (byte, 6, 2**62)),
        (torch.ops.lowbit.unpack, (byte, 4, 2**63 - 1)),
    ]:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            operator(*args)


def test_opcheck() -> None:
    codes = torch.randint(0, 8, (5, 9), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.lowbit.pack.default, (codes, 3))
    torch.library.opcheck(torch.ops.lowbit.unpack.default, (PACK(codes, 3)[0], 3, 45))
