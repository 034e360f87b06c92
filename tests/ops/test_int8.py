"""int8 products: the definitions against integer arithmetic, the kernels against the definitions."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowbit.ops import backends
from lowbit.ops.int8 import int8_conv, int8_conv_grad_a, int8_conv_grad_w, int8_matmul
from lowbit.products import ConvProduct

MATMUL = backends.definition("lowbit::int8_matmul")
CONV = backends.definition("lowbit::int8_conv")
GRAD_A = backends.definition("lowbit::int8_conv_grad_a")
GRAD_W = backends.definition("lowbit::int8_conv_grad_w")
ISAS = backends.compiled_isas()
compiled = pytest.mark.skipif(not ISAS, reason="the C++ kernels are not built")


@pytest.fixture(params=ISAS or ["definition"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "definition":
        yield request.param
        return
    with backends.using_isa(request.param):
        yield request.param


def codes(*shape: int, extreme: bool = False) -> Tensor:
    x = torch.randint(-128, 128, shape, dtype=torch.int8)
    return torch.where(x < 0, -128, 127).to(torch.int8) if extreme else x


def scales(n: int) -> Tensor:
    return torch.rand(n) + 0.5


def same(x: Tensor, y: Tensor) -> bool:
    """Equal bits; a NaN has no payload."""
    if x.shape != y.shape or x.dtype != y.dtype or not torch.equal(x.isnan(), y.isnan()):
        return False
    bits = torch.int32 if x.dtype == torch.float32 else torch.int16
    clean = [v.masked_fill(v.isnan(), 0.0).contiguous().view(bits) for v in (x, y)]
    return torch.equal(*clean)


def strided(x: Tensor, rng: random.Random) -> Tensor:
    """The same values in another memory layout."""
    way = rng.randrange(4)
    if way == 0:
        return x
    if way == 1:  # another order of the axes
        order = list(range(x.dim()))
        rng.shuffle(order)
        inverse = [order.index(i) for i in range(x.dim())]
        return x.permute(order).contiguous().permute(inverse)
    if way == 2 and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)  # every second element, unaligned
    wide[..., 1::2] = x
    return wide[..., 1::2]


class Geometry:
    """A random convolution with its operands."""

    def __init__(self, rng: random.Random, groups: int | None = None, **fixed: int) -> None:
        self.stride = [rng.choice([1, 1, 2, 3]) for _ in range(2)]
        self.dilation = [rng.choice([1, 1, 2, 3]) for _ in range(2)]
        self.kernel = [rng.choice([1, 2, 3, 3, 5]) for _ in range(2)]
        self.padding = [rng.choice([0, 1, 1, 2, 4]) for _ in range(2)]
        self.groups = groups or rng.choice([1, 1, 1, 2, 3])
        self.n = rng.choice([1, 2, 3])
        in_group = rng.choice([1, 2, 3, 4, 16, 17, 35])
        out_group = rng.choice([1, 3, 8, 16, 17, 33])
        if groups and groups > 3:
            in_group, out_group = 1, rng.choice([1, 1, 2])
        self.c, self.o = self.groups * in_group, self.groups * out_group
        least = [
            max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(self.dilation, self.kernel, self.padding, strict=True)
        ]
        self.size = [low + rng.choice([0, 1, 2, 3, 6, 11, 17]) for low in least]
        for name, value in fixed.items():
            setattr(self, name, value)
        self.a_shape = torch.Size([self.n, self.c, *self.size])
        self.w_shape = torch.Size([self.o, self.c // self.groups, *self.kernel])
        self.out = [
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, p, d, k, t in zip(self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        ]
        self.e_shape = torch.Size([self.n, self.o, *self.out])
        self.arguments = (self.stride, self.padding, self.dilation, self.groups)


def test_definitions_by_hand() -> None:
    a, b = torch.tensor([[1, -2], [127, -128]], dtype=torch.int8), torch.tensor([[3, 0], [4, -128]], dtype=torch.int8)
    out = MATMUL(a, b, torch.tensor([0.5, 2.0]), torch.tensor([3.0, 1.0]), torch.tensor([10.0, 20.0]), torch.float32)
    assert out.tolist() == [[-5 * 0.5 * 3 + 10, 256 * 0.5 + 20], [(381 - 512) * 2 * 3 + 10.0, 16384 * 2 + 20]]
    x = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.int8)
    w = torch.tensor([[[[1, 10], [100, -1]]]], dtype=torch.int8)
    one = torch.ones(1)
    assert CONV(x, w, one, one, None, [1, 1], [0, 0], [1, 1], 1, torch.float32).item() == 1 + 20 + 300 - 4
    e = torch.tensor([[[[2]]]], dtype=torch.int8)
    grad_a = GRAD_A(e, w, one, one, [1, 1, 2, 2], [1, 1], [0, 0], [1, 1], 1, torch.float32)
    assert grad_a.flatten().tolist() == [2, 20, 200, -2]
    grad_w = GRAD_W(e, x, one, one, [1, 1, 2, 2], [1, 1], [0, 0], [1, 1], 1, torch.float32, False)
    assert grad_w.flatten().tolist() == [2, 4, 6, 8]


def test_definitions_equal_the_products_of_a_layer() -> None:
    """In float64 on real values, with the scales put where the operators take them."""
    rng = random.Random(1)
    for _ in range(20):
        g = Geometry(rng)
        x, w, e = codes(*g.a_shape), codes(*g.w_shape), codes(*g.e_shape)
        ops = ConvProduct(g.a_shape, g.w_shape, tuple(g.stride), tuple(g.padding), tuple(g.dilation), g.groups)
        n, o, c, i = scales(g.n), scales(g.o), scales(g.c), scales(g.w_shape[1])
        sample, out_channel = n.double().reshape(-1, 1, 1, 1), o.double().reshape(-1, 1, 1, 1)
        real = ops.out(x * sample, w * out_channel)
        assert torch.allclose(CONV(x, w, n, o, None, *g.arguments, torch.float32).double(), real, rtol=1e-6)
        real = ops.grad_a(e * sample, w * i.double().reshape(1, -1, 1, 1))
        assert torch.allclose(GRAD_A(e, w, n, i, g.a_shape, *g.arguments, torch.float32).double(), real, rtol=1e-6)
        real = ops.grad_w(e * o.double().reshape(1, -1, 1, 1), x * c.double().reshape(1, -1, 1, 1))
        grad_w = GRAD_W(e, x, o, c, g.w_shape, *g.arguments, torch.float32, False)
        assert torch.allclose(grad_w.double(), real, rtol=1e-6)


MATMUL_SIZES = [1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 130]


@compiled
def test_matmul_equals_the_definition(isa: str) -> None:
    rng = random.Random(2)
    for trial in range(100):
        m, k, n = (rng.choice(MATMUL_SIZES) for _ in range(3))
        a, b = strided(codes(m, k, extreme=trial % 5 == 0), rng), strided(codes(k, n, extreme=trial % 5 == 0), rng)
        a_scale, b_scale = scales(rng.choice([1, m])), scales(rng.choice([1, n]))
        bias = rng.choice([None, torch.randn(n)])
        dtype = rng.choice([torch.float32, torch.bfloat16])
        out = int8_matmul(a, b, a_scale, b_scale, bias, dtype)
        assert same(out, MATMUL(a, b, a_scale, b_scale, bias, dtype)), (m, k, n, a.stride(), b.stride())


# with many rows also: steps in pieces, tiles in chunks; rows copied, and taken as they lie (1088 is 17 * 64)
SPLIT = [(37, 6000, 33), (3, 131_071, 17), (2, 300_000, 40), (300, 70, 300), (530, 1100, 40), (1200, 1088, 70)]


@compiled
@pytest.mark.parametrize("shape", SPLIT)
def test_matmul_equals_the_definition_where_it_is_split(isa: str, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b = codes(m, k), codes(k, n)
    a[0], b[:, 0], b[:, 1] = -128, -128, 127  # the largest sums of either sign
    for bias, dtype in ((None, torch.float32), (torch.randn(n), torch.bfloat16)):
        out = int8_matmul(a, b, scales(m) * 0 + 1, torch.ones(1), bias, dtype)
        assert same(out, MATMUL(a, b, torch.ones(1), torch.ones(1), bias, dtype))


@compiled
def test_conv_equals_the_definition(isa: str) -> None:
    rng = random.Random(3)
    for trial in range(60):
        g = Geometry(rng, groups=rng.choice([5, 37]) if trial % 6 == 0 else None)
        x, w = strided(codes(*g.a_shape, extreme=trial % 5 == 0), rng), strided(codes(*g.w_shape), rng)
        x_scale, w_scale = scales(rng.choice([1, g.n])), scales(rng.choice([1, g.o]))
        bias, dtype = rng.choice([None, torch.randn(g.o)]), rng.choice([torch.float32, torch.bfloat16])
        out = int8_conv(x, w, x_scale, w_scale, bias, *g.arguments, dtype)
        assert same(out, CONV(x, w, x_scale, w_scale, bias, *g.arguments, dtype)), vars(g)
        assert out.is_contiguous(memory_format=torch.channels_last)


@compiled
def test_conv_grad_a_equals_the_definition(isa: str) -> None:
    rng = random.Random(4)
    for trial in range(60):
        g = Geometry(rng, groups=rng.choice([5, 37]) if trial % 6 == 0 else None)
        e, w = strided(codes(*g.e_shape, extreme=trial % 5 == 0), rng), strided(codes(*g.w_shape), rng)
        e_scale, w_scale = scales(rng.choice([1, g.n])), scales(rng.choice([1, g.w_shape[1]]))
        dtype = rng.choice([torch.float32, torch.bfloat16])
        out = int8_conv_grad_a(e, w, e_scale, w_scale, g.a_shape, *g.arguments, dtype)
        assert same(out, GRAD_A(e, w, e_scale, w_scale, g.a_shape, *g.arguments, dtype)), vars(g)
        assert out.is_contiguous(memory_format=torch.channels_last)


@compiled
def test_conv_grad_w_equals_the_definition(isa: str) -> None:
    rng = random.Random(5)
    for trial in range(60):
        g = Geometry(rng, groups=rng.choice([5, 37]) if trial % 6 == 0 else None)
        e, x = strided(codes(*g.e_shape, extreme=trial % 5 == 0), rng), strided(codes(*g.a_shape), rng)
        e_scale, x_scale = scales(rng.choice([1, g.o])), scales(rng.choice([1, g.c]))
        dtype = rng.choice([torch.float32, torch.bfloat16])
        last = rng.random() < 0.5
        out = int8_conv_grad_w(e, x, e_scale, x_scale, g.w_shape, *g.arguments, dtype, last)
        assert same(out, GRAD_W(e, x, e_scale, x_scale, g.w_shape, *g.arguments, dtype, last)), vars(g)
        assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


# n, in, out, size, kernel, stride, padding, groups: sizes at which blocks, pieces of sums and several panels appear
LARGE = [
    (128, 16, 16, 32, 3, 1, 1, 1),
    (4, 3, 64, 112, 7, 2, 3, 1),
    (2, 512, 96, 7, 3, 1, 1, 1),
    (6, 128, 40, 20, 3, 1, 1, 1),
    (16, 160, 144, 14, 1, 1, 0, 1),
    (9, 64, 64, 28, 3, 2, 1, 4),
    (5, 130, 130, 12, 3, 1, 1, 130),
    # images that can be taken as they lie: whole, every other pixel, and with a larger kernel
    (3, 64, 48, 20, 1, 1, 0, 1),
    (3, 64, 128, 21, 1, 2, 0, 1),
    (2, 64, 32, 15, 3, 1, 0, 1),
    (2, 64, 64, 9, 1, 2, 4, 1),  # as many pixels as before, but others
    # rows whose margins are those of their neighbours, too: 11 + 2 and 14 + 4 are shortest without one
    (40, 32, 24, 11, 3, 1, 1, 1),
    (3, 17, 20, 14, 5, 1, 2, 1),
    (2, 16, 33, 7, 3, 1, 3, 1),
    (5, 96, 64, 70, 1, 1, 0, 1),  # grad_w of more pixels than a product of matrices takes
]


@compiled
@pytest.mark.parametrize("size", LARGE)
def test_large_convolutions_equal_the_definition(isa: str, size: tuple[int, ...]) -> None:
    n, c, o, hw, k, s, p, groups = size
    g = Geometry(
        random.Random(6), groups, n=n, c=c, o=o, size=[hw, hw], kernel=[k, k], stride=[s, s], padding=[p, p],
        dilation=[1, 1],
    )  # fmt: skip
    x, w, e = codes(*g.a_shape), codes(*g.w_shape), codes(*g.e_shape)
    x[:, 0], e[:, 0] = -128, -128  # the largest sum
    one, f32 = torch.ones(1), torch.float32
    x, e = (v.contiguous(memory_format=torch.channels_last) for v in (x, e))
    assert same(int8_conv(x, w, one, one, None, *g.arguments), CONV(x, w, one, one, None, *g.arguments, f32))
    out = int8_conv_grad_a(e, w, one, one, g.a_shape, *g.arguments)
    assert same(out, GRAD_A(e, w, one, one, g.a_shape, *g.arguments, f32))
    for last in (False, True):
        out = int8_conv_grad_w(e, x, one, one, g.w_shape, *g.arguments, f32, last)
        assert same(out, GRAD_W(e, x, one, one, g.w_shape, *g.arguments, f32, last))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# whole lines, rows that begin within one, and lines of float32 that are halves in bfloat16
@pytest.mark.parametrize("shape", [(1050, 70, 512), (1040, 64, 524), (1010, 64, 528)])
def test_large_matrices_equal_the_definition(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    assert 2 * m * n >= 1 << 20  # written past the caches
    a, b, scale, other, bias = codes(m, k), codes(n, k).t(), scales(m), scales(n), torch.randn(n)
    a[3], scale[3] = 1, 1e-42  # tiny results; then infinite ones and NaN
    b[:, 2], other[2] = 0, float("inf")
    b[:, 3], other[3] = 1, float("inf")
    bias[:6] = 0.0
    expected = MATMUL(a, b, scale, other, bias, dtype)
    assert expected.isnan().any() and expected.isinf().any()
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert same(int8_matmul(a, b, scale, other, bias, dtype), expected)
    finally:
        torch.set_num_threads(threads)


@compiled
@pytest.mark.parametrize(
    ("groups", "filters", "dtype"),
    [
        (1, 16, torch.float32),
        (2, 48, torch.float32),  # 24 channels of each of two groups
        (16, 16, torch.float32),  # a depthwise layer
        (1, 32, torch.bfloat16),
    ],
)
def test_large_images_equal_the_definition(isa: str, groups: int, filters: int, dtype: torch.dtype) -> None:
    x, w = codes(4, 16, 262, 257), codes(filters, 16 // groups, 1, 1)
    x_scale, w_scale = scales(4), scales(filters)
    y = int8_conv(x, w, x_scale, w_scale, groups=groups, dtype=dtype)
    assert y.element_size() * y.numel() >= 1 << 24  # written past the caches
    assert same(y, CONV(x, w, x_scale, w_scale, None, [1, 1], [0, 0], [1, 1], groups, dtype))


@compiled
def test_special_scales(isa: str) -> None:
    special = torch.tensor([0.0, -0.0, -1.5, float("nan"), float("inf"), 1e-45, 3e38, 1e-30])
    bias = torch.tensor([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3.3e38])
    a, b = codes(8, 5), codes(5, 8)
    a[2], b[:, 7] = 0, 0
    for dtype in (torch.float32, torch.bfloat16):
        for add in (None, bias):
            out = int8_matmul(a, b, special, special, add, dtype)
            assert same(out, MATMUL(a, b, special, special, add, dtype))


def test_empty_operands(isa: str) -> None:
    one, f32 = torch.ones(1), torch.float32
    for m, k, n in ((0, 3, 2), (3, 0, 2), (3, 2, 0)):
        out = int8_matmul(codes(m, k), codes(k, n), one, one, torch.ones(n))
        assert same(out, MATMUL(codes(m, k), codes(k, n), one, one, torch.ones(n), f32))
    x, w, e = codes(0, 4, 5, 5), codes(6, 4, 3, 3), codes(0, 6, 3, 3)
    assert int8_conv(x, w, one, one).shape == e.shape
    assert int8_conv_grad_a(e, w, one, one, x.shape).shape == x.shape
    assert not int8_conv_grad_w(e, x, one, one, w.shape).any()
    assert not int8_conv_grad_w(codes(0, 6, 7, 7), codes(0, 4, 7, 7), one, one, w.shape, padding=(1, 1)).any()


@compiled
def test_threads_do_not_change_a_bit() -> None:
    threads = torch.get_num_threads()
    rng = random.Random(7)
    a, b, row, column = codes(150, 90), codes(90, 130), scales(150), scales(130)
    g = Geometry(rng, 1, n=5, c=24, o=40, size=[14, 13], kernel=[3, 3], stride=[2, 1], padding=[1, 1], dilation=[1, 1])
    x, w, e, one = codes(*g.a_shape), codes(*g.w_shape), codes(*g.e_shape), torch.ones(1)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                (
                    int8_matmul(a, b, row, column),
                    int8_conv(x, w, one, one, None, *g.arguments),
                    int8_conv_grad_a(e, w, one, one, g.a_shape, *g.arguments),
                    int8_conv_grad_w(e, x, one, one, g.w_shape, *g.arguments),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(same(u, v) for u, v in zip(results[0], other, strict=True))


def test_opcheck() -> None:
    one, ops, f32 = torch.ones(1), torch.ops.lowbit, torch.float32
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    geometry = ([2, 1], [1, 1], [1, 1], 2)
    x, w, e = codes(2, 4, 6, 5), codes(6, 2, 3, 3), codes(2, 6, 3, 5)
    calls = [
        (ops.int8_matmul.default, (codes(3, 4), codes(4, 5), one, scales(5), torch.randn(5), f32)),
        (ops.int8_matmul.default, (codes(4, 3).t(), codes(4, 5), one, scales(5), None, torch.bfloat16)),
        (ops.int8_conv.default, (x, w, one, scales(6), torch.randn(6), *geometry, torch.bfloat16)),
        (ops.int8_conv_grad_a.default, (e, w, scales(2), scales(2), x.shape, *geometry, f32)),
        (ops.int8_conv_grad_w.default, (e, x, scales(6), scales(4), w.shape, *geometry, f32, True)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=tests)


def test_errors_name_the_fix() -> None:
    a, b, one = codes(3, 4), codes(4, 5), torch.ones(1)
    for error, message, call in [
        (TypeError, "int8 codes, got a", lambda: int8_matmul(a.float(), b, one, one)),
        (TypeError, "float32 or bfloat16", lambda: int8_matmul(a, b, one, one, None, torch.float16)),
        (TypeError, "b_scale in float32", lambda: int8_matmul(a, b, one, one.double())),
        (ValueError, "a \\(M, K\\) and b", lambda: int8_matmul(a, a, one, one)),
        (ValueError, "a_scale of shape \\(3,\\)", lambda: int8_matmul(a, b, torch.ones(2), one)),
        (ValueError, "contiguous", lambda: int8_matmul(a, b, torch.ones(6)[::2], one)),
        (ValueError, "bias of shape \\(5,\\)", lambda: int8_matmul(a, b, one, one, one)),
        (ValueError, "groups must divide", lambda: int8_conv(codes(1, 4, 5, 5), codes(3, 2, 3, 3), one, one, groups=2)),
        (ValueError, "takes 2 channels", lambda: int8_conv(codes(1, 4, 5, 5), codes(3, 2, 3, 3), one, one)),
        (ValueError, "larger than", lambda: int8_conv(codes(1, 2, 2, 2), codes(3, 2, 3, 3), one, one)),
        (ValueError, "stride", lambda: int8_conv(codes(1, 2, 5, 5), codes(3, 2, 3, 3), one, one, stride=[0, 1])),
        (
            ValueError,
            "but e has",
            lambda: int8_conv_grad_a(codes(1, 3, 2, 2), codes(3, 2, 3, 3), one, one, [1, 2, 5, 5]),
        ),
        (
            ValueError,
            "but e has",
            lambda: int8_conv_grad_w(codes(1, 3, 2, 2), codes(1, 2, 5, 5), one, one, [3, 2, 3, 3]),
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
