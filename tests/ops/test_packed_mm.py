"""lowbit::packed_mm and packed_mm_int8: the definitions against float64, the kernels against the definitions."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from lowbit import packing
from lowbit.ops import backends
from lowbit.ops.packed_mm import LEVELS, pack_weight, packed_mm, unpack_weight

DEFINITION = backends.definition("lowbit::packed_mm")
INT8_DEFINITION = backends.definition("lowbit::packed_mm_int8")
ISAS = backends.compiled_isas()
NAMES = {1: "binary", 2: "ternary", 4: "int4"}


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x.contiguous().view(torch.int32), y.contiguous().view(torch.int32))


def table(name: str) -> Tensor:
    bits, step, offset = LEVELS[name]
    return torch.arange(1 << bits).float() * step - offset


def operands(m: int, n: int, depth: int, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes = torch.randint(0, 1 << bits, (n, depth), dtype=torch.uint8)
    scale = torch.rand(n, -(-depth // group)) if group else torch.rand(n)
    return torch.randn(m, depth), codes, pack_weight(codes, bits), scale


def real_weight(codes: Tensor, levels: Tensor, scale: Tensor, group: int) -> Tensor:
    w = levels[codes.int()].double()
    return w * (scale.double().repeat_interleave(group, 1)[:, : w.shape[1]] if group else scale.double().view(-1, 1))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("columns", [1, 31, 32, 200])
def test_a_weight_is_rows_of_packed_codes(bits: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, columns))
    weight = pack_weight(codes, bits)
    assert weight.shape == (3, -(-columns // 32) * 4 * bits)
    assert torch.equal(unpack_weight(weight, bits, columns), codes.to(torch.uint8))
    if columns % 32 == 0:
        assert torch.equal(weight.flatten(), packing.pack(codes, bits))


@pytest.mark.parametrize("name", list(LEVELS))
@pytest.mark.parametrize("group", [0, 32, 96, 512])
def test_definitions_are_the_product(name: str, group: int) -> None:
    bits, _, offset = LEVELS[name]
    x, codes, weight, scale = operands(5, 7, 1234, bits, group)
    w = real_weight(codes, table(name), scale, group)
    y = DEFINITION(x, weight, scale, table(name), group)
    exact, size = x.double() @ w.t(), x.double().abs() @ w.abs().t()
    assert ((y - exact).abs() <= 200 * 2.0**-24 * size).all()
    # on whole numbers with scales of powers of two nothing is rounded
    x = torch.randint(-127, 128, (5, 1234)).float()
    x[:, 3] = 127  # the activation's scale is 1
    scale = 2.0 ** torch.randint(-3, 3, scale.shape)
    exact = x.double() @ real_weight(codes, table(name), scale, group).t()
    assert torch.equal(DEFINITION(x, weight, scale, table(name), group).double(), exact)
    assert torch.equal(INT8_DEFINITION(x, weight, scale, bits, offset, group).double(), exact)


def test_int8_activations_are_rounded_to_nearest_even() -> None:
    codes = torch.full((1, 32), 9, dtype=torch.uint8)  # level 1
    x = torch.zeros(4, 32)
    x[0, :3] = torch.tensor([254.0, 1.0, 5.0])  # scale 2: codes 127, 0 (0.5 to even), 2 (2.5 to even)
    x[1, :2] = torch.tensor([1e-44, 1e-45])  # below the smallest scale: codes 0
    x[2, :2] = torch.tensor([math.inf, 1.0])
    expected = torch.tensor([258.0, 0.0, math.nan, 0.0])
    for isa in (*ISAS, None):
        if isa is None:
            y = INT8_DEFINITION(x, pack_weight(codes, 4), torch.ones(1), 4, 8, 0)
        else:
            with backends.using_isa(isa):
                y = packed_mm(x, pack_weight(codes, 4), torch.ones(1), activations="int8")
        assert same_bits(y.flatten(), expected)


def cases(number: int) -> list[tuple[Tensor, Tensor, Tensor, int, int]]:
    generator = random.Random(5)
    made = []
    for _ in range(number):
        bits = generator.choice([1, 2, 4])
        group = generator.choice([0, 0, 32, 64, 96, 128, 160, 256, 512, 1024])
        m, n = generator.choice([1, 2, 3, 4, 5, 7, 8, 9]), generator.choice([1, 2, 3, 5, 16, 17, 33])
        depth = generator.choice([generator.randint(1, 1400), 32 * generator.randint(1, 40), 512, 1024])
        x, _, weight, scale = operands(m, n, depth, bits, group)
        x *= 10.0 ** generator.uniform(-44, 36)
        if generator.random() < 0.3:
            x[generator.randrange(m), generator.randrange(depth)] = generator.choice(
                [math.nan, -math.inf, math.inf, 3e38, 1e-45, 0.0]
            )
        if generator.random() < 0.1:
            x[0] = 0
        if generator.random() < 0.2:
            x = x.t().contiguous().t()
        if generator.random() < 0.2:
            weight = torch.cat([torch.zeros(1, dtype=torch.uint8), weight.flatten()])[1:].view(weight.shape)
        if generator.random() < 0.2:
            weight, scale = weight.repeat_interleave(2, 0)[::2], scale.repeat_interleave(2, 0)[::2]
        made.append((x, weight, scale, bits, group))
    return made


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_equal_the_definitions(isa: str) -> None:
    for x, weight, scale, bits, group in cases(120):
        levels = torch.randn(1 << bits)
        offset = LEVELS[NAMES[bits]][2]
        with backends.using_isa(isa):
            y = torch.ops.lowbit.packed_mm(x, weight, scale, levels, group)
            z = torch.ops.lowbit.packed_mm_int8(x, weight, scale, bits, offset, group)
        assert same_bits(y, DEFINITION(x, weight, scale, levels, group)), (x.shape, weight.shape, bits, group)
        expected = INT8_DEFINITION(x, weight, scale, bits, offset, group)
        assert same_bits(z, expected), (x.shape, weight.shape, bits, group)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("isa", ISAS)
def test_longest_sums(isa: str, bits: int) -> None:
    depth = 1 << 20
    codes = torch.full((1, depth), (1 << bits) - 1, dtype=torch.uint8)
    x, name = torch.full((1, depth), -3.0), NAMES[bits]
    for offset in (0, LEVELS[name][2]):
        level = ((1 << bits) - 1) * (2 if bits == 1 else 1) - offset
        with backends.using_isa(isa):
            y = torch.ops.lowbit.packed_mm_int8(x, pack_weight(codes, bits), torch.ones(1), bits, offset, 0)
        scale = torch.tensor(3.0) / 127
        assert y.item() == (torch.tensor(float(-127 * level * depth)) * scale).item()


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("group", [None, 64])
def test_any_number_of_threads_gives_the_same_bits(activations: str, group: int | None) -> None:
    x, _, weight, scale = operands(40, 300, 640, 4, group or 0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(packed_mm(x, weight, scale, "int4", group, activations))
            one = packed_mm(x[7], weight, scale, "int4", group, activations)
            assert same_bits(one, results[-1][7])  # nor does it depend on the other rows
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(y, results[0]) for y in results)
    if activations == "float32":
        assert same_bits(results[0], DEFINITION(x, weight, scale, table("int4"), group or 0))
    else:
        assert same_bits(results[0], INT8_DEFINITION(x, weight, scale, 4, 8, group or 0))


def test_shapes_and_tables() -> None:
    x, codes, weight, scale = operands(6, 5, 100, 2, 0)
    y = packed_mm(x, weight, scale, "int2")
    assert same_bits(packed_mm(x.view(2, 3, 100), weight, scale[:, None], "int2"), y.view(2, 3, 5))
    assert same_bits(packed_mm(x, weight, scale, table("int2")), y)
    assert packed_mm(x[:0], weight, scale, "int2").shape == (0, 5)
    for activations in ("float32", "int8"):
        nothing = packed_mm(torch.ones(2, 0), pack_weight(codes[:, :0], 2), scale, "int2", activations=activations)
        assert same_bits(nothing, torch.zeros(2, 5))
    for definition, levels in ((DEFINITION, (table("int2"),)), (INT8_DEFINITION, (2, 2))):
        assert same_bits(definition(torch.ones(2, 0), weight[:, :0], scale, *levels, 0), torch.zeros(2, 5))


def test_errors_name_the_value() -> None:
    x, codes, weight, scale = operands(2, 3, 64, 4, 0)
    with pytest.raises(ValueError, match="binary, ternary, int2, int4; got 'int3'"):
        packed_mm(x, weight, scale, "int3")
    with pytest.raises(ValueError, match="'bf16'"):
        packed_mm(x, weight, scale, activations="bf16")
    with pytest.raises(ValueError, match="multiple of 32.*got 48"):
        packed_mm(x, weight, scale, group=48)
    with pytest.raises(ValueError, match=r"shape \(3, 2\), got \(3,\)"):
        packed_mm(x, weight, scale, group=32)
    with pytest.raises(ValueError, match=r"\(3,\) or \(3, 1\), got \(2,\)"):
        packed_mm(x, weight, scale[:2])
    with pytest.raises(ValueError, match=r"16 bytes in a row .*\(3, 32\)"):
        packed_mm(x, weight, scale, "ternary")
    with pytest.raises(TypeError, match="x of torch.float32, got torch.float64"):
        packed_mm(x.double(), weight, scale)
    with pytest.raises(ValueError, match="table"):
        packed_mm(x, weight, scale, table("int4"), activations="int8")
    with pytest.raises(ValueError, match=r"2, 4 or 16 levels, got shape \(3,\)"):
        packed_mm(x, weight, scale, torch.ones(3))
    with pytest.raises(ValueError, match="0 to 3; got 0 to 9"):
        pack_weight(torch.tensor([[0, 9]]), 2)
    with pytest.raises(ValueError, match="got 3"):
        pack_weight(codes, 3)
    with pytest.raises(TypeError, match="float32"):
        pack_weight(codes.float(), 4)
    with pytest.raises(ValueError, match=r"\(64,\)"):
        pack_weight(codes[0], 4)
    with pytest.raises(ValueError, match="100 columns of 4 bits has 64 bytes"):
        unpack_weight(weight, 4, 100)


@pytest.mark.skipif(not ISAS, reason="the C++ kernels are not built")
def test_the_kernels_check_what_they_are_given() -> None:
    x, _, weight, scale = operands(2, 3, 64, 4, 0)
    levels = table("int4")
    for args in [
        (x.double(), weight, scale, levels, 0),
        (x, weight.int(), scale, levels, 0),
        (x, weight[:, :31], scale, levels, 0),
        (x, weight, scale[:2], levels, 0),
        (x, weight, scale, levels[:8], 0),
        (x, weight, scale, levels, 16),
        (x, weight, scale, levels, -32),
        (x[0], weight, scale, levels, 0),
    ]:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            torch.ops.lowbit.packed_mm(*args)
    for bits, offset, group in [(3, 8, 0), (2, 1, 0), (4, 16, 0), (4, -1, 0), (4, 8, 32)]:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            torch.ops.lowbit.packed_mm_int8(x, weight, scale, bits, offset, group)


def test_opcheck() -> None:
    x, _, weight, scale = operands(2, 3, 100, 4, 32)
    torch.library.opcheck(torch.ops.lowbit.packed_mm.default, (x, weight, scale, table("int4"), 32))
    torch.library.opcheck(torch.ops.lowbit.packed_mm_int8.default, (x, weight, scale, 4, 8, 32))


def test_compile() -> None:
    x, _, weight, scale = operands(2, 3, 100, 4, 32)
    for activations in ("float32", "int8"):
        compiled = torch.compile(
            lambda x: packed_mm(x, weight, scale, "int4", 32, activations) + 1,  # noqa: B023
            backend="aot_eager",
            fullgraph=True,
        )
        assert same_bits(compiled(x), packed_mm(x, weight, scale, "int4", 32, activations) + 1)
