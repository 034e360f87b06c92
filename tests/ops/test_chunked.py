"""lowbit::chunked_mm: the definition against rational arithmetic, the kernels against the definition."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lowbit.ops import backends
from lowbit.ops.chunked import chunked_mm, round_minifloat

DEFINITION = backends.definition("lowbit::chunked_mm")
ISAS = backends.compiled_isas()
FP16_1_6_9 = (6, 9, 31)
FORMATS = [
    FP16_1_6_9,
    (4, 3, 7),
    (5, 2, 15),
    (5, 10, 15),
    (2, 1, 1),
    (2, 22, 127),
    (8, 7, 127),  # bfloat16: M would not be finite, the other rounding runs
    (8, 1, 127),
    (8, 22, 127),
    (5, 22, 15),
    (7, 20, 63),
]


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x.contiguous().view(torch.int32), y.contiguous().view(torch.int32))


def exact_round(x: float, exponent: int, mantissa: int, bias: int) -> float:
    """Nearest even in rational arithmetic."""
    if math.isnan(x):
        return x
    e_min, e_max = 1 - bias, 2**exponent - 2 - bias
    largest = (2 - Fraction(1, 2**mantissa)) * Fraction(2) ** e_max
    if math.isinf(x):
        return math.copysign(float(largest), x)
    e = max(math.frexp(x)[1] - 1, e_min) if x else e_min
    step = Fraction(2) ** (e - mantissa)
    rounded = round(Fraction(x) / step) * step  # round of a Fraction is half to even
    return math.copysign(float(min(abs(rounded), largest)), x) + 0.0  # a zero is +0


def sequential(a: Tensor, b: Tensor, chunk: int, fmt: tuple[int, int, int]) -> list[list[float]]:
    """The formula of the paper, one scalar after another."""
    f32 = torch.float32
    out = []
    for i in range(a.shape[0]):
        out.append([])
        for j in range(b.shape[1]):
            t = 0.0
            for begin in range(0, a.shape[1], chunk):
                s = 0.0
                for k in range(begin, min(begin + chunk, a.shape[1])):
                    p = (a[i, k] * b[k, j]).item()
                    s = exact_round((torch.tensor(s, dtype=f32) + torch.tensor(p, dtype=f32)).item(), *fmt)
                t = exact_round((torch.tensor(t, dtype=f32) + torch.tensor(s, dtype=f32)).item(), *fmt)
            out[-1].append(t)
    return out


@pytest.mark.parametrize("fmt", FORMATS)
def test_round_minifloat_is_exact(fmt: tuple[int, int, int]) -> None:
    exponent, mantissa, bias = fmt
    generator = random.Random(1)
    e_min, e_max = 1 - bias, 2**exponent - 2 - bias
    values = [0.0, -0.0, math.inf, -math.inf, 3.4028234663852886e38, 1e-45, -1e-45]
    for _ in range(1500):
        e = generator.randint(max(-149, e_min - mantissa - 2), min(127, e_max + 1))
        step = 2.0 ** (max(e, e_min) - mantissa)
        values.append(generator.choice([-1, 1]) * generator.uniform(1, 2) * 2.0**e)
        values.append((generator.randint(0, 2 ** (mantissa + 1)) + 0.5) * step)  # a tie
    x = torch.tensor(values, dtype=torch.float64).clamp(-3.4e38, 3.4e38).to(torch.float32)
    x[2], x[3] = math.inf, -math.inf
    expected = torch.tensor([exact_round(v, *fmt) for v in x.tolist()], dtype=torch.float64).to(torch.float32)
    assert same_bits(round_minifloat(x, *fmt), expected)
    assert round_minifloat(torch.tensor([math.nan]), *fmt).isnan().all()


def test_round_minifloat_equals_pytorch_casts() -> None:
    x = torch.randn(20000) * torch.exp(torch.randn(20000) * 4)
    inside = x[x.abs() < 50000]
    assert same_bits(round_minifloat(inside, 5, 10, 15), inside.half().float() + 0.0)  # -0 + 0 = 0
    assert same_bits(round_minifloat(inside, 5, 2, 15), inside.to(torch.float8_e5m2).float() + 0.0)
    assert same_bits(round_minifloat(x, 8, 7, 127), x.bfloat16().float() + 0.0)


@pytest.mark.parametrize("fmt", [FP16_1_6_9, (4, 3, 7), (8, 7, 127)])
@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_definition_equals_the_formula(fmt: tuple[int, int, int], chunk: int) -> None:
    a, b = torch.randn(3, 17), torch.randn(17, 4)
    assert same_bits(DEFINITION(a, b, chunk, *fmt), torch.tensor(sequential(a, b, chunk, fmt)))


@pytest.mark.parametrize("chunk, total", [(1, 1024), (8, 4096), (64, 4096), (512, 4096), (2048, 2048), (4096, 1024)])
def test_paper_adding_one_4096_times(chunk: int, total: float) -> None:
    ones = torch.ones(1, 4096)
    for multiply in (chunked_mm, DEFINITION):
        assert multiply(ones, ones.t(), chunk, *FP16_1_6_9).item() == total


def test_paper_chunks_follow_float32_where_plain_accumulation_does_not() -> None:
    a = 1 + (torch.rand(64, 4096) - 0.5) * math.sqrt(12)  # uniform, mean 1, standard deviation 1
    a = a.to(torch.float8_e5m2).float()
    ones, exact = torch.ones(4096, 1), a.double().sum(1, keepdim=True)
    plain = (chunked_mm(a, ones, 4096, *FP16_1_6_9) / exact - 1).mean().item()
    chunked = (chunked_mm(a, ones, 64, *FP16_1_6_9) / exact - 1).mean().item()
    assert -0.16 < plain < -0.11  # the paper's "about 13 %"
    assert abs(chunked) < 0.001


def test_chunk_of_one_and_of_everything_are_plain_accumulation() -> None:
    a, b = (torch.randn(*shape).to(torch.float8_e5m2).float() for shape in ((5, 200), (200, 6)))
    plain = torch.tensor(sequential(a, b, 200, FP16_1_6_9))
    assert same_bits(chunked_mm(a, b, 1), plain)
    assert same_bits(chunked_mm(a, b, 200), plain)


def cases(number: int) -> list[tuple[Tensor, Tensor, int, tuple[int, int, int]]]:
    generator = random.Random(2)
    made = []
    for _ in range(number):
        m, k, n = (generator.choice([1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 70]) for _ in range(3))
        a, b = torch.randn(m, k) * 10 ** generator.uniform(-6, 6), torch.randn(k, n)
        if generator.random() < 0.3:
            a, b = a.to(torch.float8_e5m2).float(), b.to(torch.float8_e5m2).float()
        if generator.random() < 0.2:
            a = torch.randn(k, m).t()
        if generator.random() < 0.2:
            b = torch.randn(2 * n, 3 * k)[::2, ::3].t()
        if generator.random() < 0.1:
            b = torch.randn(1, n).expand(k, n)
        if generator.random() < 0.2:
            a = a.clone()
            a[0, -1] = generator.choice([math.nan, math.inf, -math.inf, 3e38, 1e-45])
        made.append((a, b, generator.choice([1, 2, 3, 7, 8, 64, 1000]), generator.choice(FORMATS)))
    return made


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_equal_the_definition(isa: str) -> None:
    compared = 0
    for a, b, chunk, fmt in cases(120):
        with backends.using_isa(isa):
            result = torch.ops.lowbit.chunked_mm(a, b, chunk, *fmt)
        assert same_bits(result, DEFINITION(a, b, chunk, *fmt)), (a.shape, b.shape, chunk, fmt)
        compared += result.numel()
    assert compared > 10000


@pytest.mark.parametrize("shape", [(130, 70, 97), (500, 300, 3), (3, 300, 500), (1, 2000, 600)])
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b = torch.randn(m, k), torch.randn(k, n)
    expected = DEFINITION(a, b, 16, *FP16_1_6_9)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert same_bits(chunked_mm(a, b, 16), expected)
    finally:
        torch.set_num_threads(before)


def test_zero_sizes() -> None:
    for multiply in (chunked_mm, DEFINITION):
        assert same_bits(multiply(torch.ones(2, 0), torch.ones(0, 3), 64, *FP16_1_6_9), torch.zeros(2, 3))
        assert multiply(torch.ones(0, 4), torch.ones(4, 3), 64, *FP16_1_6_9).shape == (0, 3)
        assert multiply(torch.ones(2, 4), torch.ones(4, 0), 64, *FP16_1_6_9).shape == (2, 0)


def test_nan_propagates_and_huge_values_saturate() -> None:
    largest = (2 - 2.0**-9) * 2.0**31
    a = torch.tensor([[1.0, 2.0], [math.nan, 1.0], [3e38, 1.0], [-math.inf, 1.0]])
    for multiply in (chunked_mm, DEFINITION):
        result = multiply(a, torch.ones(2, 1), 64, *FP16_1_6_9).flatten()
        assert result[0] == 3 and result[1].isnan() and result[2] == largest and result[3] == -largest
        assert result[1].view(torch.int32) == 0x7FC00000


def test_many_rows_are_split() -> None:
    a, b = torch.randn(300, 96), torch.randn(96, 700)  # more accumulators than the definition holds at once
    assert same_bits(DEFINITION(a, b, 2, *FP16_1_6_9)[-1:], DEFINITION(a[-1:], b, 2, *FP16_1_6_9))


@pytest.mark.parametrize("multiply", [chunked_mm, DEFINITION], ids=["operator", "definition"])
def test_errors_name_the_value(multiply) -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    with pytest.raises(TypeError, match="float64"):
        multiply(a.double(), b, 64, *FP16_1_6_9)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4, 3\)"):
        multiply(a, b.t(), 64, *FP16_1_6_9)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        multiply(a, torch.ones(3), 64, *FP16_1_6_9)
    with pytest.raises(ValueError, match="got 0"):
        multiply(a, b, 0, *FP16_1_6_9)
    with pytest.raises(ValueError, match="exponent.*got 9"):
        multiply(a, b, 64, 9, 9, 31)
    with pytest.raises(ValueError, match="mantissa.*got 23"):
        multiply(a, b, 64, 6, 23, 31)
    with pytest.raises(ValueError, match="bias.*got 128"):
        multiply(a, b, 64, 6, 9, 128)


@pytest.mark.skipif(not ISAS, reason="the C++ kernels are not built")
def test_the_kernel_checks_what_it_is_given() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    operator = torch.ops.lowbit.chunked_mm
    for args in [
        (a.double(), b, 64, 6, 9, 31),
        (a, b.t(), 64, 6, 9, 31),
        (a, b, 0, 6, 9, 31),
        (a, b, 64, 6, 9, 200),
    ]:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            operator(*args)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    a, b = torch.randn(5, 9, requires_grad=requires_grad), torch.randn(9, 4)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not requires_grad:  # the last one would run a backward, which this operator refuses
        checks.append("test_aot_dispatch_dynamic")
    operator = torch.ops.lowbit.chunked_mm.default
    results = torch.library.opcheck(operator, (a, b, 4, *FP16_1_6_9), test_utils=checks)
    assert results == dict.fromkeys(checks, "SUCCESS")


def test_it_is_not_differentiable() -> None:
    a = torch.randn(2, 3, requires_grad=True)
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        chunked_mm(a, torch.randn(3, 2)).sum().backward()
    assert a.grad is None


def test_compile() -> None:
    a, b = torch.randn(5, 9), torch.randn(9, 4)
    compiled = torch.compile(lambda a, b: chunked_mm(a, b) + 1, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(a, b), chunked_mm(a, b) + 1)


# -- the other compiled kernel: lowbit::uniform ---------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("key", [(0, 0, 0), (2**63 - 1, 5, 7), (-1, -1, -1), (123456789012345, 2**33 + 1, 2**32 + 9)])
def test_uniform_kernels_equal_the_definition(isa: str, key: tuple[int, int, int]) -> None:
    words = torch.tensor(key)
    for shape in [(), (0,), (1,), (7,), (31,), (32,), (1000, 3), (100003,)]:
        expected = backends.definition("lowbit::uniform")(words, shape)
        with backends.using_isa(isa):
            assert same_bits(torch.ops.lowbit.uniform(words, shape), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_uniform_known_answer(isa: str) -> None:
    # Random123's kat_vectors: philox4x32, 10 rounds, counter and key 0
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    with backends.using_isa(isa):
        result = torch.ops.lowbit.uniform(torch.tensor([0, 0, 0]), [4])
    assert result.tolist() == [(word >> 8) * 2.0**-24 for word in words]


@pytest.mark.parametrize("threads", [1, 2])
def test_uniform_any_number_of_threads(threads: int) -> None:
    key = torch.tensor([7, 8, 9])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        result = torch.ops.lowbit.uniform(key, [300001])
    finally:
        torch.set_num_threads(before)
    assert same_bits(result, backends.definition("lowbit::uniform")(key, [300001]))


@pytest.mark.skipif(not ISAS, reason="the C++ kernels are not built")
def test_uniform_strided_key_and_errors() -> None:
    key = torch.tensor([[1, 0], [2, 0], [3, 0]])[:, 0]
    assert same_bits(torch.ops.lowbit.uniform(key, [50]), torch.ops.lowbit.uniform(key.clone(), [50]))
    with pytest.raises(RuntimeError, match="key"):
        torch.ops.lowbit.uniform(torch.tensor([1, 2]), [3])


def eight_bits(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(torch.float8_e5m2).float()


@pytest.mark.parametrize("isa", backends.compiled_isas())
@pytest.mark.parametrize("scale", [1.0, 2.0**-14, 3e4])
def test_few_bits_and_long_sums(isa, scale):
    # operands of few bits leave out the saturation where it can't happen; depths beyond 4096 go in slabs
    for rows, depth, columns in ((9, 100, 17), (3, 9001, 33), (40, 5000, 5)):
        a, b = eight_bits((rows, depth), 1, scale), eight_bits((depth, columns), 2, scale)
        expected = backends.definition("lowbit::chunked_mm")(a, b, 64, 6, 9, 31)
        with backends.using_isa(isa):
            assert same_bits(chunked_mm(a, b), expected), (rows, depth, columns)
            a[1, 7] = math.nan
            assert chunked_mm(a, b)[1].isnan().all()


@pytest.mark.parametrize("isa", backends.compiled_isas())
def test_operands_of_several_axes(isa):
    x, w = eight_bits((2, 3, 9, 8), 3), eight_bits((5, 3, 3, 3), 4)
    patches = x.unfold(2, 3, 2).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5)  # overlapping
    left, right = patches.reshape(-1, 27), w.reshape(5, 27).t()
    error = eight_bits((left.shape[0], 5), 5)
    spread = error.view(*patches.shape[:3], 5).permute(3, 0, 1, 2)
    define = backends.definition("lowbit::chunked_mm")
    with backends.using_isa(isa):
        out = chunked_mm(patches, w.permute(1, 2, 3, 0), 8, row_axes=3, depth_axes=3)
        assert same_bits(out, define(left, right, 8, 6, 9, 31))
        grad = chunked_mm(spread, patches, 8, depth_axes=3)
        assert same_bits(grad, define(error.t(), left, 8, 6, 9, 31))
    torch.library.opcheck(
        torch.ops.lowbit.chunked_mm.default, (patches, w.permute(1, 2, 3, 0).contiguous(), 8, 6, 9, 31, 3, 3)
    )
    with pytest.raises(ValueError, match="chunked_mm needs matrices, got a of shape .* with 6 leading axes"):
        chunked_mm(patches, w, row_axes=6)
