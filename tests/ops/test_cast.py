"""lowbit::cast and its relatives: the definitions against Format.snap, the kernels against the definitions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lowbit import formats
from lowbit.formats import Codebook, Even, Fixed, Float, Format, Int, Log
from lowbit.ops import backends
from lowbit.ops.cast import block_absmax, block_minmax, cast, cast_absmax, cast_absmax_pair, cast_arguments
from lowbit.ops.uniform import uniform
from lowbit.rounding import ROUNDINGS
from lowbit.scales import AbsMax

ISAS = backends.compiled_isas()
CAST = backends.definition("lowbit::cast")
NAMED = {name: getattr(formats, name) for name in formats.__all__}
FORMATS: dict[str, Format] = {name: fmt for name, fmt in NAMED.items() if isinstance(fmt, Format)} | {
    "int8": Int(8),
    "int4 narrow": Int(4, narrow=True),
    "uint3": Int(3, signed=False),
    "int1": Int(1),
    "int26": Int(26),
    "int32": Int(32),
    "uint32": Int(32, signed=False),
    "fixed 4,12": Fixed(4, 12),
    "fixed -3,8": Fixed(-3, 8),
    "fixed 60,-52": Fixed(60, -52),
    "fixed -110,126": Fixed(-110, 126),
    "even2": Even(2),
    "even5": Even(5),
    "even16": Even(16),
    "float 6,3": Float(6, 3),
    "float 3,2 high": Float(3, 2, bias=-20, specials="none"),
    "float 2,22": Float(2, 22),
    "log2 17 values": Log(2.0, 0, 7),
    "log2 tiny": Log(2.0, -125, -120),
    "log2 wide": Log(2.0, -100, 100),
    "log2 no zero": Log(2.0, -3, 4, zero=False),
    "log2 by exponent": Log(2.0, -3, 3, nearest="log"),
    "log sqrt2 by exponent": Log(math.sqrt(2.0), -9, 6, zero=False, nearest="log"),
    "log unsigned": Log(2.0, -3, 3, signed=False),
    "log unsigned no zero": Log(3.0, -3, 3, signed=False, zero=False),
    "radix-4": Log(4.0, -3, 3),
    "radix-4 second phase": Log(4.0, -3, 3, offset=2.0),
    "codebook 2": Codebook((-0.3, 0.7)),
    "codebook 16": Codebook((-1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.08, 0.16, 0.25, 0.3, 0.4, 0.6, 0.7, 1.0)),
    "codebook 33": Codebook(tuple(i * abs(i) / 100 for i in range(-16, 17))),
    "codebook 256": Codebook(tuple(math.sinh(i / 30) for i in range(-128, 128))),
}
PAIRS = [(name, rounding) for name, fmt in FORMATS.items() for rounding in ROUNDINGS if cast_arguments(fmt, rounding)]
NUMBERS = [
    (1.0, None, None, None),
    (0.37, None, None, None),
    (2.0**-20, None, None, 0.5),
    (1.7, 0.3, -0.9, 2.1),
    (1.0, 2.0, None, None),
    (0.0, 1.0, None, 0.0),
    (0.2, None, 3.3, None),
    (1e-42, None, None, None),
    (math.inf, None, 0.0, None),
]
"""Scale, zero, offset and step of a block."""
SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, -1e-45, 1.1e-38, -1.2e-38, 2.0**-126]


def same_bits(x: Tensor, y: Tensor) -> bool:
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    integer = torch.int8 if x.dtype == torch.int8 else torch.int32
    return torch.equal(x.contiguous().view(integer), y.contiguous().view(integer))


def canonical(x: Tensor) -> Tensor:
    return x.masked_fill(x.isnan(), math.nan)


def inputs(fmt: Format, count: int, generator: torch.Generator) -> Tensor:
    """Values of all magnitudes, many near the grid, on it and halfway, and the special ones."""
    spread = torch.randn(count, generator=generator) * torch.exp(4 * torch.randn(count, generator=generator))
    spread *= fmt.max if fmt.max < 1e30 else 1.0
    near = (torch.rand(count, generator=generator) * 2 - 1) * fmt.max * 1.2
    parts = [spread, near, torch.tensor(SPECIAL)]
    if fmt.bits <= 16 and fmt.max < 1e30:
        levels = fmt.levels()
        levels = levels[torch.randperm(len(levels), generator=generator)[: count // 4]].sort().values
        ties = (levels[1:] + levels[:-1]) / 2
        halves = torch.cat([levels, ties]).to(torch.float32)
        parts += [halves, torch.nextafter(halves, halves + 1), torch.nextafter(halves, halves - 1)]
    else:
        parts += [torch.randint(-100, 100, (count // 2,), generator=generator) / 2]
    x = torch.cat(parts).to(torch.float32)
    return x[torch.randperm(len(x), generator=generator)]


def composition(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    fmt: Format,
    rounding: str,
    u: Tensor | None,
    offset: Tensor | None = None,
    step: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Grid and values as a quantizer composes them; the numbers of blocks broadcast."""
    t = (x if offset is None else x - offset) / scale
    if zero is not None:
        t = t + zero
    grid = fmt.snap(t, rounding, u)
    q = (grid if zero is None else grid - zero) * (scale if step is None else step)
    if offset is not None:
        q = q + offset
    return canonical(grid), canonical(q)


def optional(*values: float | None) -> list[Tensor | None]:
    return [None if value is None else torch.tensor([value]) for value in values]


@pytest.mark.parametrize("name, rounding", PAIRS)
def test_definition_is_snap(name: str, rounding: str) -> None:
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(3)
    x = inputs(fmt, 300, generator)
    key = torch.tensor([4, 5, 6]) if rounding == "stochastic" else None
    u = None if key is None else uniform(key, x.shape)
    arguments = cast_arguments(fmt, rounding)
    assert arguments is not None
    for scale, *others in NUMBERS:
        s = torch.tensor([scale])
        z, offset, step = optional(*others)
        grid, q = composition(x, s, z, fmt, rounding, u, offset, step)
        for drawn in [(key, None), (None, u)] if key is not None else [(None, None)]:
            assert same_bits(CAST(x, s, z, *drawn, [0], *arguments, rounding, "grid", offset, step), grid)
            assert same_bits(CAST(x, s, z, *drawn, [0], *arguments, rounding, "values", offset, step), q)


def test_which_formats_have_kernels() -> None:
    without = {name for name, fmt in FORMATS.items() if cast_arguments(fmt, "half_even") is None}
    assert without == {"BF16", "E8M0", "log2 wide"}
    assert cast_arguments(formats.E4M3, "floor") is None
    assert cast_arguments(Float(5, 2, overflow="native"), "half_even") is None
    assert cast_arguments(Codebook(tuple(range(257))), "half_even") is None
    assert cast_arguments(Int(8), "stochastic") == ("int", [-128.0, 127.0, 0.0], None)
    kind, numbers, table = cast_arguments(Log(2.0, 0, 1, zero=False), "half_up") or ("", [], None)
    assert (kind, numbers) == ("table", [1.0])
    assert table is not None and table.tolist() == [[-2, -1, 1, 2], [0, 1, 1, 0], [-1.5, 0, 1.5, 0]]


# ---- kernels against definitions -------------------------------------------------------------------------------------


def compare(operator: str, isa: str, *args: object) -> Tensor:
    """Runs a kernel, compares it with the definition (bits, strides), and returns its (first) result."""
    expected = backends.definition(f"lowbit::{operator}")(*args)
    with backends.using_isa(isa):
        got = getattr(torch.ops.lowbit, operator)(*args)
    first = got if isinstance(got, Tensor) else got[0]
    for a, b in [(got, expected)] if isinstance(got, Tensor) else list(zip(got, expected, strict=True)):
        assert a.stride() == b.stride()
        assert same_bits(a, b), difference(a, b, args)
    return first


def difference(a: Tensor, b: Tensor, args: Sequence[object]) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {a.shape} != {b.dtype} {b.shape}"
    x = args[0]
    assert isinstance(x, Tensor)
    if a.shape != x.shape:
        return f"{a} != {b}"
    wrong = ~((a == b) & (torch.signbit(a) == torch.signbit(b)) | (a != a) & (b != b))
    places = wrong.nonzero()
    at = tuple(places[0].tolist()) if len(places) else ()
    return f"{len(places)} of {wrong.numel()} differ, first at {at}: x {x[at]}, {a[at]} != {b[at]}; {args[5:]}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_kernels_equal_the_definition(name: str, isa: str) -> None:
    fmt, compared = FORMATS[name], 0
    generator = torch.Generator().manual_seed(5)
    key = torch.tensor([7, 8, 9])
    for rounding in ROUNDINGS:
        arguments = cast_arguments(fmt, rounding)
        if arguments is None:
            continue
        x = inputs(fmt, 400, generator)
        stochastic = rounding == "stochastic"
        u = torch.rand(x.shape, generator=generator)
        u[:20] = 0.0
        for scale, *others in NUMBERS:
            s = torch.tensor([scale])
            z, offset, step = optional(*others)
            for drawn in [(key, None), (None, u)] if stochastic else [(None, None)]:
                rest = [0], *arguments, rounding
                for result in ("values", "grid"):
                    compared += compare("cast", isa, x, s, z, *drawn, *rest, result, offset, step).numel()
                if arguments[0] == "int" and fmt.bits <= 8 and arguments[1][2] == 0 and fmt.max <= 127:
                    codes = compare("cast", isa, x, s, z, *drawn, *rest, "codes", offset, step)
                    assert codes.dtype == torch.int8
    assert compared > 5000 or name in ("BF16", "E8M0")


@pytest.mark.parametrize("isa", ISAS)
def test_stochastic_next_to_the_fraction(isa: str) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(4000, generator=generator) * 2.0 ** -torch.randint(-6, 30, (4000,), generator=generator)
    fraction = x.double() - x.double().floor()
    for steps in (-1, 0, 1, 2):
        u = ((fraction * 2**24).floor() + steps).clamp(0, 2**24 - 1).float() / 2**24
        for name in ("int8", "E4M3"):
            arguments = cast_arguments(FORMATS[name], "stochastic")
            assert arguments is not None
            for result in ("values", "codes") if name == "int8" else ("values",):
                compare("cast", isa, x, torch.ones(1), None, None, u, [0], *arguments, "stochastic", result)


Case = tuple[Tensor, list[int], int]


def dense_strides(shape: Sequence[int], kept: Sequence[int]) -> tuple[list[int], int]:
    """Block strides where the axes `kept` vary from block to block."""
    strides, blocks = [0] * len(shape), 1
    for axis in reversed(kept):
        strides[axis], blocks = blocks, blocks * shape[axis]
    return strides, blocks


def layouts(number: int, seed: int) -> list[Case]:
    """Tensors of all kinds of strides, cut into blocks in all kinds of ways."""
    generator = random.Random(seed)
    made: list[Case] = []
    for _ in range(number):
        dim = generator.choice([0, 1, 1, 2, 2, 3, 4, 4, 5])
        shape = [generator.choice([1, 2, 3, 4, 7, 8, 16, 17, 33, 40, 100][: 11 - 2 * dim + 2]) for _ in range(dim)]
        if generator.random() < 0.3 and dim:
            shape[generator.randrange(dim)] *= generator.choice([3, 16, 50])
        x = torch.randn(shape)
        how = generator.choice(["plain", "plain", "last", "permuted", "slice", "strided", "expanded"])
        if how == "last" and dim in (4, 5):
            x = x.to(memory_format=torch.channels_last if dim == 4 else torch.channels_last_3d)
        if how == "permuted" and dim:
            order = generator.sample(range(dim), dim)
            x = torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(dim)])
        if how == "slice" and dim:
            x = torch.randn([n + 3 for n in shape])[tuple(slice(1, n + 1) for n in shape)]
        if how == "strided" and dim:
            x = torch.randn([2 * n for n in shape])[tuple(slice(0, None, 2) for _ in shape)]
        if how == "expanded" and dim:
            axis = generator.randrange(dim)
            x = x.narrow(axis, 0, 1).expand(shape)
        kept = sorted(generator.sample(range(dim), generator.randint(0, dim))) if generator.random() < 0.8 else []
        strides, blocks = dense_strides(x.shape, kept)
        if generator.random() < 0.1 and kept and x.shape[kept[0]] > 1:  # overlapping blocks
            strides[kept[0]] = 1
            blocks = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
            touched = torch.arange(blocks).as_strided(tuple(x.shape), strides).unique()
            if len(touched) != blocks:
                strides, blocks = dense_strides(x.shape, kept)
        made.append((x, strides, blocks))
    return made


@pytest.mark.parametrize("isa", ISAS)
def test_any_strides_and_blocks(isa: str) -> None:
    torch.manual_seed(1)
    generator, compared = random.Random(6), 0
    choices = ["int8", "int4 narrow", "E4M3", "even2", "log2 17 values", "codebook 16"]
    for x, strides, blocks in layouts(250, 7):
        fmt = FORMATS[generator.choice(choices)]
        rounding = generator.choice(["half_even", "stochastic", "stochastic"])
        arguments = cast_arguments(fmt, rounding)
        assert arguments is not None
        scale = torch.rand(blocks) + 0.1
        zero, offset, step = (torch.rand(blocks) if generator.random() < 0.3 else None for _ in range(3))
        key = u = None
        if rounding == "stochastic":
            if generator.random() < 0.7:
                key = torch.tensor([1, 2, 3])
            else:
                u = torch.rand(x.shape[::-1]).permute(list(range(x.dim() - 1, -1, -1)))
        result = generator.choice(["values", "grid", "codes"] if arguments[0] == "int" else ["values", "grid"])
        rest = strides, *arguments, rounding, result, offset, step
        compared += compare("cast", isa, x, scale, zero, key, u, *rest).numel()
        compare("block_absmax", isa, x, strides, blocks)
        compare("block_minmax", isa, x, strides, blocks)
        if u is None:
            compare("cast_absmax", isa, x, key, strides, blocks, 127.0, *arguments, rounding, result)
    assert compared > 50000


BIG: dict[str, tuple[Tensor, list[int], int]] = {
    "tensor": (torch.randn(300, 701), [0, 0], 1),
    "rows": (torch.randn(301, 700), [1, 0], 301),
    "rows of 10": (torch.randn(20001, 10), [1, 0], 20001),
    "one long row": (torch.randn(2, 100_003), [1, 0], 2),
    "columns": (torch.randn(301, 700), [0, 1], 700),
    "columns of a transposed matrix": (torch.randn(301, 700).t(), [0, 1], 301),
    "rows of a transposed matrix": (torch.randn(301, 700).t(), [1, 0], 700),
    "channels": (torch.randn(8, 24, 31, 33), [0, 1, 0, 0], 24),
    "features": (torch.randn(50, 6, 31, 33), [0, 1023, 33, 1], 6138),
    "features, channels last": (
        torch.randn(50, 6, 31, 33).to(memory_format=torch.channels_last),
        [0, 1023, 33, 1],
        6138,
    ),
    "channels last": (torch.randn(8, 24, 31, 33).to(memory_format=torch.channels_last), [0, 1, 0, 0], 24),
    "channels last, aligned": (torch.randn(8, 40, 32, 16).to(memory_format=torch.channels_last), [0, 1, 0, 0], 40),
    "samples, channels last": (torch.randn(8, 24, 31, 33).to(memory_format=torch.channels_last), [1, 0, 0, 0], 8),
    "groups of 32": (torch.randn(200, 30, 32), [30, 1, 0], 6000),
    "tiles": (torch.randn(20, 16, 30, 16), [30, 0, 1, 0], 600),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", BIG)
def test_large_tensors_on_threads(layout: str, isa: str) -> None:
    x, strides, blocks = BIG[layout]
    key = torch.tensor([2**40 + 1, 2, 3])
    arguments = cast_arguments(Int(8, narrow=True), "stochastic")
    assert arguments is not None
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            scale = compare("block_absmax", isa, x, strides, blocks) / 127
            low, _ = backends.definition("lowbit::block_minmax")(x, strides, blocks)
            compare("block_minmax", isa, x, strides, blocks)
            rest = strides, *arguments, "stochastic", "values"
            compare("cast", isa, x, scale, None, key, None, *rest)
            compare("cast", isa, x, scale, scale.ceil(), key, None, *rest, low, 2 * scale)
            compare("cast_absmax", isa, x, key, strides, blocks, 127.0, *arguments, "stochastic", "codes")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_special_values_in_blocks(isa: str) -> None:
    arguments = cast_arguments(Int(8, narrow=True), "half_even")
    assert arguments is not None
    for special in SPECIAL:
        for columns in (1, 5, 16, 37, 3000):
            x = torch.randn(4, columns)
            x[1] = 0.0
            x[2, columns // 2] = special
            x[3] = special
            for strides, blocks in (([1, 0], 4), ([0, 1], columns), ([0, 0], 1)):
                compare("block_absmax", isa, x, strides, blocks)
                compare("block_minmax", isa, x, strides, blocks)
                for result in ("values", "codes"):
                    args = (None, strides, blocks, 127.0, *arguments, "half_even", result)
                    compare("cast_absmax", isa, x, *args)


Arguments = tuple[str, list[float], Tensor | None]


def compare_pair(isa: str, x: Tensor, partitions: Sequence[tuple[list[int], int]], *args: object) -> None:
    """`args`: the rest of two calls of cast_absmax, to which the pair must be equal."""
    key1, key2, denominator, kind, numbers, table, rounding1, rounding2 = args
    (strides1, blocks1), (strides2, blocks2) = partitions
    rest = denominator, kind, numbers, table
    blocks = strides1, blocks1, strides2, blocks2
    for sums in (False, True)[: 1 + (x.dim() > 0)]:
        compare("cast_absmax_pair", isa, x, key1, key2, *blocks, *rest, rounding1, rounding2, sums)


@pytest.mark.parametrize("isa", ISAS)
# largest values on the grid, and between two of its points
@pytest.mark.parametrize(("emin", "high"), [(-6, 448.0), (-6, 450.0), (-6, 500.0), (0, 1.875), (0, 1.9), (9, 512.0)])
def test_floats_end_at_their_largest_value(isa: str, emin: int, high: float) -> None:
    x = torch.cat([torch.linspace(-1.1 * high, 1.1 * high, 3001), torch.tensor([1e-40, float("inf"), float("nan")])])
    scale, key = torch.ones(1), torch.tensor([1, 2, 3])
    for rounding in ("half_even", "stochastic"):
        draw = key if rounding == "stochastic" else None
        grid = ("float", [float(emin), 3.0, high, 1.0], None, rounding, "values", None, None)
        got = compare("cast", isa, x, scale, None, draw, None, [0], *grid)
        if draw is not None:  # to nearest, formats end on their grid
            assert got[:-1].abs().max() == torch.tensor(high)


ROUNDINGS_OF_PAIRS = [
    ("half_even", "half_even"),
    ("stochastic", "stochastic"),
    ("half_even", "stochastic"),
    ("stochastic", "half_even"),
    ("half_up", "stochastic"),
]


def pairs(generator: random.Random) -> tuple[Tensor | None, Tensor | None, float, Arguments, str, str]:
    """Keys, denominator, format and roundings of a pair."""
    fmt = Int(generator.choice([2, 4, 8]), narrow=generator.random() < 0.5)
    rounding1, rounding2 = generator.choice(ROUNDINGS_OF_PAIRS)
    arguments = cast_arguments(fmt, rounding1)
    assert arguments is not None
    one_draw = generator.random() < 0.5
    keys = [
        torch.tensor([2**40 + 1, 0 if one_draw else i, 3]) if r == "stochastic" else None
        for i, r in enumerate((rounding1, rounding2))
    ]
    return keys[0], keys[1], generator.choice([fmt.max, 127.0, 0.3, 2.0**21]), arguments, rounding1, rounding2


def with_special(x: Tensor, generator: random.Random) -> Tensor:
    """`x`, perhaps of another magnitude, perhaps with a special value and a row of zeros."""
    x = x * generator.choice([1.0, 1.0, 300.0, 1e-6, 1e-20, 1e-38, 1e19, 1e30])
    for _ in range(generator.choice([0, 0, 1, 2]) if x.numel() else 0):
        x.view(-1)[generator.randrange(x.numel())] = generator.choice(SPECIAL)
    if generator.random() < 0.2 and x.dim():
        x[0] = 0.0
    return x


@pytest.mark.parametrize("isa", ISAS)
def test_pair_of_any_partitions(isa: str) -> None:
    torch.manual_seed(2)
    generator = random.Random(8)
    for x, strides, blocks in layouts(200, 9):
        other = sorted(generator.sample(range(x.dim()), generator.randint(0, x.dim())))
        key1, key2, denominator, arguments, *roundings = pairs(generator)
        if generator.random() < 0.3:
            x = x.to(torch.bfloat16)
        partitions = [(strides, blocks), dense_strides(x.shape, other)]
        compare_pair(isa, x, partitions, key1, key2, denominator, *arguments, *roundings)
        if x.dtype == torch.bfloat16:
            compare("cast_absmax", isa, x, key1, strides, blocks, denominator, *arguments, roundings[0], "codes")


@pytest.mark.parametrize("isa", ISAS)
def test_pair_of_rows_and_columns(isa: str) -> None:
    """The layouts with a fast path, at sizes with tails, on several threads."""
    torch.manual_seed(3)
    generator = random.Random(10)
    before = torch.get_num_threads()
    shapes = [
        (200, 33),
        (300, 16),
        (70, 2100),
        (90, 800),
        (64, 48, 5, 3),
        (40, 16, 12, 12),
        (33, 70, 8, 8),
        (9, 3, 60, 40),
    ]
    try:
        for shape in shapes:
            for layout in (torch.contiguous_format, torch.channels_last) if len(shape) == 4 else (None,):
                for trial in range(5):
                    x = with_special(torch.randn(shape), generator)
                    x = x if layout is None else x.contiguous(memory_format=layout)
                    x = x.to(torch.bfloat16) if trial % 2 else x
                    partitions = [dense_strides(shape, [0]), dense_strides(shape, [1])]
                    if generator.random() < 0.3:
                        partitions.reverse()
                    key1, key2, denominator, arguments, *roundings = pairs(generator)
                    torch.set_num_threads(1 + 2 * (trial % 2))
                    compare_pair(isa, x, partitions, key1, key2, denominator, *arguments, *roundings)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_codes_of_all_magnitudes(isa: str) -> None:
    """Quotients without a division: ties and their neighbours, tiny numbers, scales at the ends of their range."""
    generator = torch.Generator().manual_seed(11)
    ties = torch.arange(-127.5, 128.0, 0.5)
    near = [ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)]
    whole = torch.cat([*near, 1e-30 * torch.randn(50, generator=generator), torch.tensor([1e-45, -1e-45, 0.0, 127.5])])
    for scale in (1.0, 0.7, 1.0 - 2.0**-24, 1.0 + 2.0**-23, 2.0**-60, 2.0**-61, 3e-20, 2.0**60, 1e20, 1e-30):
        x = torch.stack([whole, whole * torch.rand(whole.shape, generator=generator)]) * scale
        x[:, -1] = 127.5 * scale
        for rounding in ("half_even", "stochastic"):
            key = torch.tensor([1, 2, 3]) if rounding == "stochastic" else None
            arguments = cast_arguments(Int(8), rounding)
            assert arguments is not None
            for strides, blocks in ([1, 0], 2), ([0, 1], len(whole)), ([0, 0], 1):
                compare("cast_absmax", isa, x, key, strides, blocks, 127.0, *arguments, rounding, "codes")
                compare("cast_absmax", isa, x, key, strides, blocks, 127.5, *arguments, rounding, "codes")


def test_pair_checks_its_arguments() -> None:
    rest = 127.0, "int", [-127.0, 127.0, 0.0], None, "half_even", "half_even"
    partitions = [1, 0], 2, [0, 1], 3
    for call in (cast_absmax_pair, backends.definition("lowbit::cast_absmax_pair"), torch.ops.lowbit.cast_absmax_pair):
        with pytest.raises((RuntimeError, TypeError), match="needs float32, or bfloat16 for codes"):
            call(torch.zeros(2, 3, dtype=torch.float64), None, None, *partitions, *rest, False)
        with pytest.raises((RuntimeError, ValueError), match="3 blocks"):
            call(torch.zeros(2, 4), None, None, *partitions, *rest, False)
        with pytest.raises((RuntimeError, ValueError), match="exactly one"):
            call(torch.zeros(2, 3), None, torch.tensor([1, 2, 3]), *partitions, *rest, False)
        ones = torch.ones(2, 3, dtype=torch.bfloat16)
        codes1, scale1, codes2, scale2, sums = call(ones, None, None, *partitions, *rest, True)
        assert codes1.eq(127).all() and codes2.eq(127).all()
        assert scale1.shape == (2,) and scale2.shape == (3,) and sums.tolist() == [2, 2, 2]
        with pytest.raises((RuntimeError, ValueError), match="all axes but the last"):
            call(torch.ones(()), None, None, [], 1, [], 1, *rest, True)
    for call in (cast_absmax, torch.ops.lowbit.cast_absmax):
        with pytest.raises((RuntimeError, TypeError), match="float32"):
            call(torch.zeros(2, dtype=torch.bfloat16), None, [0], 1, *rest[:-1], "values")


@pytest.mark.parametrize("isa", ISAS)
def test_sums_of_a_pair_are_made_in_one_order(isa: str) -> None:
    arguments = cast_arguments(Int(8, narrow=True), "half_even")
    assert arguments is not None
    before = torch.get_num_threads()
    try:
        for shape in ((1, 7), (31, 40), (33, 16), (100, 130), (1000, 33), (4, 70, 257), (700, 3000), (2048, 64)):
            x = torch.randn(shape) * torch.randn(shape).exp()
            rows, columns = x[..., 0].numel(), shape[-1]
            each = -(-rows // 32)
            want = torch.zeros(columns)
            for run in x.reshape(rows, columns).split(each):
                part = torch.zeros(columns)
                for row in run:
                    part += row
                want += part
            *outer, last = range(len(shape))
            by_rows, by_columns = dense_strides(shape, outer), dense_strides(shape, [last])
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                with backends.using_isa(isa):
                    *_, sums = cast_absmax_pair(
                        x, None, None, *by_rows, *by_columns, 127.0, *arguments, "half_even", "half_even", True
                    )
                assert torch.equal(sums, want), (shape, threads)
            assert torch.allclose(want.double(), x.double().reshape(rows, -1).sum(0), atol=1e-3, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_absmax_scale_is_that_of_the_library() -> None:
    x = torch.randn(6, 50)
    x[2] = 0.0
    x[3, 7] = math.nan
    x[4] = 1e-45
    arguments = cast_arguments(Int(8, narrow=True), "half_even")
    assert arguments is not None
    codes, scale = cast_absmax(x, None, [1, 0], 6, 127.0, *arguments, "half_even")
    expected, _ = AbsMax(127.0).compute(x)
    assert torch.equal(scale.view(torch.int32), expected[:, 0].contiguous().view(torch.int32))
    assert codes.dtype == torch.int8 and codes[2].eq(0).all() and codes[3].eq(0).all()
    assert codes[0].abs().max() == 127
    low, high = block_minmax(x, [1, 0], 6)
    assert torch.equal(block_absmax(x, [1, 0], 6)[:3], torch.maximum(-low, high)[:3])


def test_memory_formats_give_the_same_numbers() -> None:
    x = torch.randn(3, 20, 7, 5)
    arguments = cast_arguments(formats.E2M1, "stochastic")
    assert arguments is not None
    key, scale = torch.tensor([1, 2, 3]), torch.rand(20)
    rest = (None, key, None, [0, 1, 0, 0], *arguments, "stochastic")
    plain = cast(x, scale, *rest)
    last = cast(x.to(memory_format=torch.channels_last), scale, *rest)
    assert torch.equal(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_stochastic_is_unbiased() -> None:
    x = torch.full((100_000,), 0.3)
    arguments = cast_arguments(Int(8), "stochastic")
    assert arguments is not None
    q = cast(x, torch.tensor([1.0]), None, torch.tensor([0, 1, 2]), None, [0], *arguments, "stochastic")
    assert abs(q.mean().item() - 0.3) < 6 * math.sqrt(0.21 / len(x))


def test_empty() -> None:
    arguments = cast_arguments(Int(8), "half_even")
    assert arguments is not None
    for shape, strides, blocks in [((0,), [0], 1), ((0, 3), [1, 0], 0), ((3, 0), [0, 1], 0)]:
        x = torch.empty(shape)
        assert cast(x, torch.ones(blocks), None, None, None, strides, *arguments, "half_even").shape == shape
        codes, scale = cast_absmax(x, None, strides, blocks, 127.0, *arguments, "half_even")
        assert codes.shape == shape and scale.shape == (blocks,) and codes.dtype == torch.int8


# ---- errors, registration --------------------------------------------------------------------------------------------


def bad_calls() -> list[tuple[str, dict[str, object]]]:
    table = torch.zeros(3, 4, dtype=torch.float64)
    return [
        ("float64", {"x": torch.zeros(2, 3, dtype=torch.float64)}),
        ("9", {"x": torch.zeros([1] * 9), "block_strides": [0] * 9}),
        ("block stride for each of 2", {"block_strides": [0]}),
        ("-1", {"block_strides": [0, -1]}),
        ("block 4", {"block_strides": [2, 1]}),
        ("scale.*float64", {"scale": torch.ones(2, dtype=torch.float64)}),
        ("zero.*(3,)", {"zero": torch.ones(3)}),
        ("offset.*(1,)", {"offset": torch.ones(1)}),
        ("step.*float64", {"step": torch.ones(2, dtype=torch.float64)}),
        ("exactly one", {"key": torch.tensor([1, 2, 3])}),
        ("exactly one", {"rounding": "stochastic"}),
        ("key is int64", {"rounding": "stochastic", "key": torch.tensor([1, 2])}),
        ("u must be", {"rounding": "stochastic", "u": torch.zeros(3, 2)}),
        ("half_evn", {"rounding": "half_evn"}),
        ("itn", {"kind": "itn"}),
        ("3 numbers", {"numbers": [1.0]}),
        ("needs a table", {"table": table}),
        ("needs a table", {"kind": "table", "numbers": [0.0]}),
        ("float64", {"kind": "table", "numbers": [0.0], "table": table.float()}),
        ("floor", {"kind": "float", "numbers": [-6.0, 3.0, 448.0, 1.0], "rounding": "floor"}),
        ("half_even", {"kind": "log2", "numbers": [0.0, 3.0]}),
        ("no format", {"numbers": [1.0, -1.0, 0.0]}),
        ("no format", {"kind": "even", "numbers": [17.0]}),
        ("no format", {"kind": "float", "numbers": [-140.0, 3.0, 448.0, 1.0]}),
        ("vales", {"result": "vales"}),
        ("int8", {"numbers": [-128.0, 128.0, 0.0], "result": "codes"}),
    ]


@pytest.mark.parametrize("message, change", bad_calls())
def test_errors_name_the_value(message: str, change: dict[str, object]) -> None:
    good: dict[str, object] = {
        "x": torch.zeros(2, 3),
        "scale": torch.ones(2),
        "zero": None,
        "key": None,
        "u": None,
        "block_strides": [1, 0],
        "kind": "int",
        "numbers": [-128.0, 127.0, 0.0],
        "table": None,
        "rounding": "half_even",
        "result": "values",
        "offset": None,
        "step": None,
    }
    for call in (cast, CAST):
        with pytest.raises((TypeError, ValueError), match=message.replace("(", r"\(").replace(")", r"\)")):
            call(**good | change)
    if ISAS:
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            torch.ops.lowbit.cast(*(good | change).values())


def test_denominator_is_checked() -> None:
    for call in (cast_absmax, backends.definition("lowbit::cast_absmax"), torch.ops.lowbit.cast_absmax):
        with pytest.raises((RuntimeError, ValueError), match="denominator"):
            call(torch.zeros(2), None, [0], 1, 0.0, "int", [-1.0, 1.0, 0.0], None, "half_even", "values")


CHECKS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5, 4)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    strides, key = [0, 1] + [0] * (len(shape) - 2), torch.tensor([1, 2, 3])
    blocks = shape[1]
    rows, roundings = [1] + [0] * (len(shape) - 1), ("stochastic", "half_even")
    scale = torch.ones(blocks)
    expected = dict.fromkeys(CHECKS, "SUCCESS")
    ops = torch.ops.lowbit
    arguments = cast_arguments(Int(8), "stochastic")
    table = cast_arguments(Log(4.0, -3, 3), "half_up")
    assert arguments is not None and table is not None
    for op, args in [
        (ops.block_absmax, (x, strides, blocks)),
        (ops.block_minmax, (x, strides, blocks)),
        (ops.cast, (x, scale, scale, key, None, strides, *arguments, "stochastic", "codes")),
        (ops.cast, (x, scale, None, None, None, strides, *table, "half_up", "values")),
        (ops.cast, (x, scale, None, key, None, strides, *arguments, "stochastic", "values", scale, scale)),
        (ops.cast_absmax, (x, key, strides, blocks, 127.0, *arguments, "stochastic", "codes")),
        (ops.cast_absmax, (x.to(torch.bfloat16), key, strides, blocks, 127.0, *arguments, "stochastic", "codes")),
        (ops.cast_absmax_pair, (x, key, None, rows, len(x), strides, blocks, 127.0, *arguments, *roundings, False)),
        (
            ops.cast_absmax_pair,
            (x.to(torch.bfloat16), key, None, rows, len(x), strides, blocks, 127.0, *arguments, *roundings, True),
        ),
    ]:
        assert torch.library.opcheck(op.default, args, test_utils=CHECKS) == expected
