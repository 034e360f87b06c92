"""Every kernel against its definition on random cases: shapes with tails and zeros, strides, unaligned storage, special
values, one and two threads, every instruction set of this CPU.

A case is one set of random arguments. The definition answers once; the operator must give the same bits with every
instruction set (any two NaNs are the same). An operator with a kernel and no generator here fails, so a new one brings
its own:

    @generator("lowbit::name")
    def _(r: Draw) -> tuple: return the operator's arguments, from `r`

`--fuzz N` is the number of cases of all operators together. Case i of an operator is the same in every run.
"""

from __future__ import annotations

import ctypes
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit import formats
from lowbit.ops import backends
from lowbit.ops.cast import cast_arguments
from lowbit.ops.fingerprint import WEIGHTS
from lowbit.ops.int8_mm import SAFE
from lowbit.ops.pack import SUB_BYTE
from lowbit.rounding import ROUNDINGS

OPERATORS = sorted(
    {row.operator for row in backends.backends() if row.device == "cpu" and row.implementation != "PyTorch definition"}
)
GENERATORS: dict[str, Callable[[Draw], tuple[Any, ...]]] = {}
ISAS = backends.compiled_isas()
NEAREST = tuple(rounding for rounding in ROUNDINGS if rounding != "stochastic")
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
LARGEST = torch.finfo(torch.float32).max
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), LARGEST, -3.4e38, 1e-45, -1e-40, 1.1754944e-38)
MINIFLOATS = ((6, 9, 31), (4, 3, 7), (5, 2, 15), (5, 10, 15), (2, 1, 1), (2, 22, 127), (8, 7, 127), (8, 22, 127))


def generator(name: str) -> Callable[[Callable[[Draw], tuple[Any, ...]]], Callable[[Draw], tuple[Any, ...]]]:
    def register(function: Callable[[Draw], tuple[Any, ...]]) -> Callable[[Draw], tuple[Any, ...]]:
        GENERATORS[name] = function
        return function

    return register


class Draw(random.Random):
    """Random sizes, values and layouts."""

    def __init__(self, operator: str, case: int) -> None:
        super().__init__(zlib.crc32(operator.encode()) << 32 | case)
        self.torch = torch.Generator().manual_seed(self.getrandbits(62))

    def chance(self, p: float) -> bool:
        return self.random() < p

    def size(self, largest: int = 65, least: int = 0) -> int:
        """Mostly a size near a vector's length, otherwise any."""
        fitting = [n for n in SIZES if least <= n <= largest]
        return self.choice(fitting) if self.chance(0.7) else self.randint(least, largest)

    def key(self) -> Tensor:
        """(seed, stream, step), small or of 64 bits, sometimes with a stride."""
        words = [self.choice((self.randint(0, 9), self.randint(-(2**63), 2**63 - 1), -1)) for _ in range(3)]
        return self.laid_out(torch.tensor(words))

    def floats(self, *shape: int) -> Tensor:
        """float32 of one of several kinds: normal, of many magnitudes, ties, constant, special values in between."""
        kind = self.randrange(6)
        x = torch.randn(shape, generator=self.torch)
        if kind == 1:
            x = x * torch.exp(8 * torch.randn(shape, generator=self.torch))
        elif kind == 2:
            x = (8 * x).round() / 2
        elif kind == 3:
            x = torch.full(shape, self.choice((0.0, 1.0, -0.37, 1e-38, 3e38)))
        else:
            x = x * 10.0 ** self.uniform(-12, 12)
        if self.chance(0.25) and x.numel():
            flat = x.view(-1)
            for _ in range(self.randint(1, 4)):
                flat[self.randrange(len(flat))] = self.choice(SPECIAL)
        return self.laid_out(x)

    def codes(self, *shape: int, low: int = -128, high: int = 127, dtype: torch.dtype = torch.int8) -> Tensor:
        """Integers from `low` to `high`, sometimes only the two ends."""
        x = torch.randint(low, high + 1, shape, generator=self.torch, dtype=dtype)
        if self.chance(0.1):
            x = torch.where(x > (low + high) / 2, high, low).to(dtype)
        return self.laid_out(x)

    def laid_out(self, x: Tensor) -> Tensor:
        """The same values in a random place of memory: contiguous, at an odd offset, permuted, with gaps, expanded."""
        kind = self.randrange(8)
        if kind == 0 or kind == 1:
            offset = self.randint(1, 9)
            return torch.empty(offset + x.numel(), dtype=x.dtype)[offset:].view(x.shape).copy_(x)
        if kind == 2 and x.dim() > 1:
            order = self.sample(range(x.dim()), x.dim())
            back = [order.index(i) for i in range(x.dim())]
            return x.permute(order).contiguous().permute(back)
        if kind == 3 and x.dim() > 0:
            gaps = [self.randint(1, 3) for _ in x.shape]
            wide = torch.empty([n * g for n, g in zip(x.shape, gaps, strict=True)], dtype=x.dtype)
            return wide[tuple(slice(None, None, g) for g in gaps)].copy_(x)
        if kind == 4 and x.dim() > 0 and 0 not in x.shape and self.chance(0.5):
            d = self.randrange(x.dim())
            return x.narrow(d, 0, 1).expand(x.shape)
        return x


@generator("lowbit::uniform")
def _(r: Draw) -> tuple[Any, ...]:
    if r.chance(0.01):
        return r.key(), [r.randint(30_000, 70_000)]  # more than one thread's share
    return r.key(), [r.size(33) for _ in range(r.randint(0, 3))]


@generator("lowbit::chunked_mm")
def _(r: Draw) -> tuple[Any, ...]:
    m, k, n = r.size(33), r.size(24), r.size(33)
    if r.chance(0.01):
        m, k, n = r.randint(60, 130), r.randint(10, 30), r.randint(60, 130)
    chunk = r.choice((1, 2, 3, 7, 8, 64, 1000))
    return r.floats(m, k), r.floats(k, n), chunk, *r.choice(MINIFLOATS)


def rule(r: Draw) -> tuple[Tensor, Tensor, int]:
    """Gradient and input (blocks, n) of a gradient rule, and the number of blocks."""
    blocks, n = r.size(5), r.size(3000 if r.chance(0.05) else 70)
    return r.floats(blocks, n).contiguous(), r.floats(blocks, n).contiguous(), blocks


@generator("lowbit::in_range_backward")
def _(r: Draw) -> tuple[Any, ...]:
    grad, x, blocks = rule(r)
    return grad, x, -r.floats(blocks).abs().contiguous(), r.floats(blocks).abs().contiguous(), r.chance(0.5)


@generator("lowbit::step_backward")
def _(r: Draw) -> tuple[Any, ...]:
    grad, x, blocks = rule(r)
    step = torch.rand(blocks, generator=r.torch) + 2.0**-10
    low, high = r.choice([(-8.0, 7.0), (0.0, 15.0), (-127.0, 127.0)])
    return grad, x, (x / step[:, None]).clamp(low, high).round() * step[:, None], step, low, high


@generator("lowbit::clip_backward")
def _(r: Draw) -> tuple[Any, ...]:
    grad, x, blocks = rule(r)
    return grad, x, r.floats(blocks).abs().contiguous()


@generator("lowbit::magnitudes")
def _(r: Draw) -> tuple[Any, ...]:
    n = r.randint(1000, 5000) if r.chance(0.05) else r.size(65, least=1)
    return (r.floats(r.size(9), n).contiguous(),)


@generator("lowbit::reflect")
def _(r: Draw) -> tuple[Any, ...]:
    shape = [r.size(40), *(r.size(20) for _ in range(r.randint(0, 3)))]
    if r.chance(0.01):
        shape = [r.randint(2, 300), r.randint(200, 600)]
    rows = shape[0]
    group = torch.randint(0, r.randint(1, max(1, rows)), (rows,), generator=r.torch)
    v, before, after = (torch.randn(rows, generator=r.torch) for _ in range(3))
    v[: r.randint(0, rows)] *= r.choice((0.0, 1.0, 1e-9))
    return r.floats(*shape), group, v, r.choice((None, before.exp())), r.choice((None, after))


@generator("lowbit::reflect_minmax")
def _(r: Draw) -> tuple[Any, ...]:
    x, group, v, before, _ = GENERATORS["lowbit::reflect"](r)
    return x, group, v, torch.ones_like(v) if before is None else before


@generator("lowbit::reflect_cast")
def _(r: Draw) -> tuple[Any, ...]:
    x, group, v, factor = GENERATORS["lowbit::reflect_minmax"](r)
    scale, offset = (torch.randn(len(x), generator=r.torch) for _ in range(2))
    rounding = r.choice(("stochastic", "stochastic", "half_even"))
    fmt = r.choice((formats.Int(5, signed=False), formats.Int(8), formats.Float(4, 3)))
    how = cast_arguments(fmt, rounding)
    return x, group, v, factor, scale.exp(), offset, r.key() if rounding == "stochastic" else None, *how, rounding


@generator("lowbit::affine")
def _(r: Draw) -> tuple[Any, ...]:
    shape = [r.size(300), *(r.size(3) for _ in range(r.randint(0, 1)))]
    low, high = r.floats(*shape), r.floats(*shape)
    return torch.minimum(low, high), torch.maximum(low, high), r.choice((1.0, 3.0, 15.0, 255.0, 7.5)), r.chance(0.5)


@generator("lowbit::int8_mm")
def _(r: Draw) -> tuple[Any, ...]:
    m, k, n = r.size(), r.size(), r.size()
    if r.chance(0.01):
        m, k, n = (r.randint(100, 200) for _ in range(3))
    return r.codes(m, k), r.codes(k, n), r.choice((SAFE, SAFE, 1, 3, 16, 64))


@generator("lowbit::pack")
def _(r: Draw) -> tuple[Any, ...]:
    bits = r.choice(SUB_BYTE)
    shape = [r.randint(20_000, 50_000)] if r.chance(0.01) else [r.size(40) for _ in range(r.randint(0, 3))]
    return r.codes(*shape, low=0, high=255 if r.chance(0.2) else (1 << bits) - 1, dtype=torch.uint8), bits


@generator("lowbit::unpack")
def _(r: Draw) -> tuple[Any, ...]:
    bits = r.choice(SUB_BYTE)
    count = r.randint(20_000, 50_000) if r.chance(0.01) else r.randint(0, 700)
    spare = r.choice((0, 0, 1, 20))
    return r.codes(-(-count * bits // 8) + spare, low=0, high=255, dtype=torch.uint8), bits, count


@generator("lowbit::hadamard")
def _(r: Draw) -> tuple[Any, ...]:
    size = 1 << r.randint(0, 7 if r.chance(0.95) else 12)
    blocks = r.randint(0, 4)
    rows = r.randint(100, 300) if size <= 64 and r.chance(0.02) else r.size(17 if size < 256 else 2)
    x = r.floats(rows, blocks * size) if r.chance(0.9) else r.floats(blocks * size)
    signs = None
    if r.chance(0.6):
        signs = r.codes(r.choice((size, blocks * size)) if blocks else size, low=0, high=1).float() * 2 - 1
    return x, size, None if signs is None else r.laid_out(signs), r.chance(0.5)


@generator("lowbit::pack_signs")
def _(r: Draw) -> tuple[Any, ...]:
    return (r.floats(*[r.size(20) for _ in range(r.randint(0, 2))], r.randint(0, 300)),)


@generator("lowbit::binary_mm")
def _(r: Draw) -> tuple[Any, ...]:
    m, n, depth = r.size(33), r.size(33), r.randint(0, 700)
    if r.chance(0.02):
        m, n, depth = r.randint(60, 130), r.randint(60, 130), r.randint(500, 1500)
    words = [torch.ops.lowbit.pack_signs(torch.randn(rows, depth, generator=r.torch)) for rows in (m, n)]
    return r.laid_out(words[0]), r.laid_out(words[1]), depth


def scales(r: Draw, n: int) -> Tensor:
    """(n,) or (1,): ordinary, of many magnitudes, or with special values."""
    n = 1 if r.chance(0.2) else n
    x = torch.rand(n, generator=r.torch) + 0.1
    if r.chance(0.3):
        x = x * 10.0 ** r.uniform(-40, 38)
    if r.chance(0.1) and n:
        x[r.randrange(n)] = r.choice(SPECIAL)
    return x


def output(r: Draw) -> torch.dtype:
    return r.choice((torch.float32, torch.float32, torch.bfloat16))


@generator("lowbit::int8_matmul")
def _(r: Draw) -> tuple[Any, ...]:
    m, k, n = r.size(), r.size(200 if r.chance(0.2) else 65), r.size()
    if r.chance(0.01):
        m, k, n = (r.randint(100, 300) for _ in range(3))
    bias = torch.randn(n, generator=r.torch) if r.chance(0.4) else None
    return r.codes(m, k), r.codes(k, n), scales(r, m), scales(r, n), bias, output(r)


class Convolution:
    """Shapes of a random convolution, with at least one output pixel."""

    def __init__(self, r: Draw) -> None:
        self.stride, self.dilation = ([r.choice((1, 1, 2, 3)) for _ in range(2)] for _ in range(2))
        self.padding = [r.choice((0, 1, 1, 2, 4)) for _ in range(2)]
        self.groups = r.choice((1, 1, 1, 2, 3, 8))
        kernel = [r.choice((1, 2, 3, 3, 5)) for _ in range(2)]
        inputs, outputs = (1, 1) if self.groups == 8 else (r.choice((1, 2, 3, 4, 16, 17)), r.choice((1, 3, 8, 17)))
        batch = r.choice((0, 1, 1, 2, 3)) if r.chance(0.3) else 1
        least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(self.dilation, kernel, self.padding, strict=True)]
        larger = 30 if r.chance(0.02) else 6
        pixels = [n + r.randint(0, larger) for n in least]
        self.x = [batch, inputs * self.groups, *pixels]
        self.w = [outputs * self.groups, inputs, *kernel]
        out = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(pixels, self.padding, self.dilation, kernel, self.stride, strict=True)
        ]
        self.y = [batch, self.w[0], *out]

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


@generator("lowbit::int8_conv")
def _(r: Draw) -> tuple[Any, ...]:
    c = Convolution(r)
    bias = torch.randn(c.w[0], generator=r.torch) if r.chance(0.4) else None
    scale_x, scale_w = scales(r, c.x[0]), scales(r, c.w[0])
    return r.codes(*c.x), r.codes(*c.w), scale_x, scale_w, bias, *c.geometry, output(r)


@generator("lowbit::int8_conv_grad_a")
def _(r: Draw) -> tuple[Any, ...]:
    c = Convolution(r)
    scale_e, scale_w = scales(r, c.y[0]), scales(r, c.w[1])
    return r.codes(*c.y), r.codes(*c.w), scale_e, scale_w, c.x, *c.geometry, output(r)


@generator("lowbit::int8_conv_grad_w")
def _(r: Draw) -> tuple[Any, ...]:
    c = Convolution(r)
    scale_e, scale_x = scales(r, c.y[1]), scales(r, c.x[1])
    return r.codes(*c.y), r.codes(*c.x), scale_e, scale_x, c.w, *c.geometry, output(r), r.chance(0.5)


def blocks(r: Draw, shape: list[int]) -> tuple[list[int], int]:
    """Strides of blocks over `shape`, one for each index of some axes in any order, and how many blocks there are."""
    strides, count = [0] * len(shape), 1
    for d in r.sample(range(len(shape)), len(shape)):
        if r.chance(0.4):
            strides[d], count = count, count * shape[d]
    return strides, count


def shape_of(r: Draw) -> list[int]:
    if r.chance(0.01):
        return [r.randint(20, 60), r.randint(300, 900)]
    return [r.size(40 if i == 0 else 17) for i in range(r.randint(0, 4))][::-1]


def with_blocks(r: Draw) -> tuple[Tensor, list[int], int]:
    shape = shape_of(r)
    strides, count = blocks(r, shape)
    return r.floats(*shape), strides, count


def grid(r: Draw) -> tuple[Any, ...]:
    """Kind, numbers, table and rounding of a random format."""
    while True:
        kmin = r.randint(-12, 4)
        values = sorted({round(r.uniform(-20, 20), r.randint(0, 6)) for _ in range(r.randint(2, 40))} | {-21.0, 21.5})
        fmt = r.choice(
            (
                formats.Int(r.randint(2, 9), narrow=r.chance(0.5)),
                formats.Int(r.randint(1, 32), signed=r.chance(0.5)),
                formats.Fixed(r.randint(1, 8), r.randint(0, 12)),
                formats.Even(r.randint(1, 8)),
                formats.Float(r.randint(2, 6), r.randint(1, 10)),
                r.choice((formats.E4M3, formats.E5M2, formats.E2M1, formats.FP16_169, formats.E4M3FNUZ)),
                formats.Log(2.0, kmin, kmin + r.randint(1, 14), zero=r.chance(0.7), signed=r.chance(0.8)),
                formats.Log(
                    r.choice((2.0, 4.0, 2**0.5)), kmin, kmin + r.randint(1, 9), r.choice((1.0, 2.0)), r.chance(0.7)
                ),
                formats.Codebook(tuple(values)),
            )
        )
        rounding = "stochastic" if r.chance(0.6) else r.choice(ROUNDINGS)
        arguments = cast_arguments(fmt, rounding)
        if arguments is not None:
            return *arguments, rounding


def result_of(r: Draw, kind: str, numbers: list[float]) -> str:
    codes = kind == "int" and numbers[2] == 0 and -128 <= numbers[0] and numbers[1] <= 127
    return r.choice(("values", "grid", "codes")) if codes else r.choice(("values", "grid"))


@generator("lowbit::block_absmax")
def _(r: Draw) -> tuple[Any, ...]:
    return with_blocks(r)


@generator("lowbit::block_minmax")
def _(r: Draw) -> tuple[Any, ...]:
    return with_blocks(r)


@generator("lowbit::cast")
def _(r: Draw) -> tuple[Any, ...]:
    x, strides, count = with_blocks(r)
    kind, numbers, table, rounding = grid(r)
    scale = torch.rand(count, generator=r.torch) * 10.0 ** r.choice((0, 0, -2, 2, -39, 37)) + 1e-40
    if r.chance(0.05) and count:
        scale[r.randrange(count)] = r.choice(SPECIAL)
    zero = torch.randint(-9, 10, (count,), generator=r.torch).float() if r.chance(0.2) else None
    key = u = None
    if rounding == "stochastic":
        if r.chance(0.7):
            key = r.key()
        else:
            u = r.laid_out(torch.rand(x.shape, generator=r.torch))
    offset, step = (r.floats(count).contiguous() if r.chance(0.2) else None for _ in range(2))
    result = result_of(r, kind, numbers)
    return x, scale, zero, key, u, strides, kind, numbers, table, rounding, result, offset, step


@generator("lowbit::cast_absmax")
def _(r: Draw) -> tuple[Any, ...]:
    x, strides, count = with_blocks(r)
    kind, numbers, table, rounding = grid(r)
    key = r.key() if rounding == "stochastic" else None
    denominator = r.choice((127.0, 7.0, 448.0, 1.0, 0.3))
    return x, key, strides, count, denominator, kind, numbers, table, rounding, result_of(r, kind, numbers)


@generator("lowbit::cast_absmax_pair")
def _(r: Draw) -> tuple[Any, ...]:
    shape = shape_of(r)
    first, second = blocks(r, shape), blocks(r, shape)
    if r.chance(0.6) and len(shape) > 1:  # rows and columns, samples and channels
        first, second = (([int(d == axis) for d in range(len(shape))], shape[axis]) for axis in (0, 1))
    x = r.floats(*shape)
    if r.chance(0.3) and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    x = x.to(torch.bfloat16) if r.chance(0.3) else x
    fmt = formats.Int(r.randint(2, 8), narrow=r.chance(0.5))
    roundings = ["stochastic" if r.chance(0.5) else r.choice(NEAREST) for _ in range(2)]
    keys = [r.key() if rounding == "stochastic" else None for rounding in roundings]
    if r.chance(0.5) and None not in keys:
        keys[1] = keys[0]  # one draw
    arguments = cast_arguments(fmt, "half_even")
    assert arguments is not None
    denominator = r.choice((fmt.max, 127.0, 1.0, 0.3))
    return x, *keys, *first, *second, denominator, *arguments, *roundings, x.dim() > 0 and r.chance(0.5)


def packed(r: Draw, bits: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """x, weight, scale and group."""
    rows, columns, depth = r.choice((0, 1, 1, 2, 3, 5)), r.size(20), r.randint(0, 300)
    if r.chance(0.02):
        rows, columns, depth = r.randint(1, 9), r.randint(60, 200), r.randint(500, 1500)
    group = r.choice((0, 0, 32, 64, 96, 128, 256, 512))
    x = r.floats(rows, depth)
    weight = r.codes(columns, -(-depth // 32) * 4 * bits, low=0, high=255, dtype=torch.uint8)
    scale = torch.rand(columns, -(-depth // group), generator=r.torch) if group else scales(r, columns)
    if not group and len(scale) != columns:
        scale = scale.expand(columns)
    return x, weight, r.laid_out(scale), group


@generator("lowbit::packed_mm")
def _(r: Draw) -> tuple[Any, ...]:
    bits = r.choice((1, 2, 4))
    x, weight, scale, group = packed(r, bits)
    return x, weight, scale, r.floats(1 << bits), group


@generator("lowbit::packed_mm_int8")
def _(r: Draw) -> tuple[Any, ...]:
    bits = r.choice((1, 2, 4))
    x, weight, scale, group = packed(r, bits)
    return x, weight, scale, bits, r.randrange(1 << bits), group


@generator("lowbit::fingerprint")
def _(r: Draw) -> tuple[Any, ...]:
    word = {"low": -(2**31), "high": 2**31 - 1, "dtype": torch.int32}
    shape = [r.size(40) for _ in range(r.randint(1, 3))]
    if r.chance(0.01):
        shape = [r.randint(60_000, 200_000)]  # more than one thread's share
    x = r.floats(*shape) if r.chance(0.5) else r.codes(*shape, **word).contiguous().view(torch.float32)
    return x.contiguous(), WEIGHTS if r.chance(0.5) else r.codes(2, 16, **word).contiguous()


def tensors(value: Any) -> Iterator[Tensor]:
    for x in value if isinstance(value, Sequence) else [value]:
        assert isinstance(x, Tensor)
        yield x


def same(result: Any, expected: Any) -> bool:
    """Equal type, shape and bits, but for the bits of NaNs; or equal integers."""
    if isinstance(expected, int):
        return isinstance(result, int) and result == expected
    pairs = list(zip(tensors(result), tensors(expected), strict=True))
    return all(x.dtype == y.dtype and x.shape == y.shape and _same_bits(x, y) for x, y in pairs)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    if not x.is_floating_point():
        return torch.equal(x, y)
    as_integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.contiguous().view(as_integer), y.contiguous().view(as_integer)
    return torch.equal(*bits) or bool(((bits[0] == bits[1]) | (x.isnan() & y.isnan())).all())


def shown(arguments: tuple[Any, ...]) -> str:
    """Arguments for a message: shapes and strides of tensors."""
    parts = []
    for a in arguments:
        if isinstance(a, Tensor):
            parts.append(f"{a.dtype}{list(a.shape)} strides {list(a.stride())} offset {a.storage_offset()}")
        else:
            parts.append(repr(a))
    return ", ".join(parts)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.skipif(not ISAS, reason="the C++ kernels are not built")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_equal_their_definition(
    operator: str, threads: None, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert operator in GENERATORS, f"{operator} has a kernel and no generator of random cases in {__file__}"
    active = [row.implementation for row in backends.backends() if row.operator == operator and row.active]
    assert "PyTorch definition" not in active, (
        f"the kernel of {operator} is not in the compiled library: build it again"
    )
    count = -(-int(request.config.getoption("--fuzz")) // len(OPERATORS))
    definition = backends.definition(operator)
    kernel = getattr(torch.ops.lowbit, operator.partition("::")[2])
    elements = 0
    for case in range(count):
        if case % 500 == 0:
            torch.set_num_threads(1 + case // 500 % 2)
        arguments = GENERATORS[operator](Draw(operator, case))
        expected = definition(*arguments)
        for isa in ISAS:
            with backends.using_isa(isa):
                result = kernel(*arguments)
            where = f"case {case} of {operator}, {isa}, {torch.get_num_threads()} threads"
            assert same(result, expected), f"{where}: {shown(arguments)}\n{result}\n{expected}"
        # a result that is one integer counts for the elements it was made of
        elements += sum(x.numel() for x in tensors(arguments[0] if isinstance(expected, int) else expected))
    with capsys.disabled():
        print(f"\n{operator}: {count} cases, {elements} results, each with {', '.join(ISAS)}")
    assert elements >= 10 * count  # most cases are not empty


class Allocated(ctypes.Structure):
    """What glibc's mallinfo2 gives."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


@pytest.mark.skipif(not ISAS, reason="the C++ kernels are not built")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="of glibc 2.33 and later")
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_free_what_they_take(operator: str, threads: None) -> None:
    """A few bytes that stay at every call are no matter in themselves, but pin what lies around them: a training step
    then finds no room between them, and the process grows by many times what it uses."""
    allocated = ctypes.CDLL(None).mallinfo2
    allocated.restype = Allocated
    torch.set_num_threads(1)
    kernel, calls = getattr(torch.ops.lowbit, operator.partition("::")[2]), 200
    for case in range(3):
        arguments = GENERATORS[operator](Draw(operator, case))
        kept = []
        for _ in range(4):
            before = allocated().uordblks
            for _ in range(calls):
                kernel(*arguments)
            kept.append((allocated().uordblks - before) / calls)
        assert min(kept) < 8, f"{operator} keeps {min(kept):.0f} bytes a call: {shown(arguments)}"


def test_every_generator_has_an_operator() -> None:
    assert set(GENERATORS) == set(OPERATORS)
