from __future__ import annotations

import json
import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import formats
from lowbit.formats import (
    BF16,
    BINARY,
    E2M1,
    E2M3,
    E3M2,
    E3M4,
    E4M3,
    E4M3_IEEE,
    E4M3B11,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    E8M0,
    FP16,
    FP16_169,
    MXINT8,
    TERNARY,
    Codebook,
    Even,
    Fixed,
    Float,
    Int,
    Log,
    floor_log2,
    ldexp,
    mx_scale,
    pow2,
)
from lowbit.rounding import ROUNDINGS
from lowbit.serial import from_data, to_data

DETERMINISTIC = [r for r in ROUNDINGS if r != "stochastic"]
E3M0 = Float(3, 0, specials="none")
UE4M3 = Float(4, 3, specials="fn", signed=False)
FLUSHED = Float(4, 2, subnormals=False)
ROOT = math.sqrt(2)
RADIX4 = Log(4.0, -3, 3)

SMALL = [  # at most 2**10 values
    Int(8),
    Int(8, narrow=True),
    Int(4),
    Int(1),
    Int(1, signed=False),
    Int(8, signed=False),
    TERNARY,
    Int(10),
    BINARY,
    Even(2),
    Even(4),
    Fixed(4, 4),
    Fixed(-2, 8),
    Fixed(9, -3),
    MXINT8,
    E5M2,
    E4M3,
    E4M3_IEEE,
    E5M2FNUZ,
    E4M3FNUZ,
    E4M3B11,
    E3M4,
    E3M2,
    E2M3,
    E2M1,
    E3M0,
    E8M0,
    UE4M3,
    FLUSHED,
    Float(1, 2, specials="none"),
    Float(4, 0),
    Float(2, 1, specials="fn"),
    RADIX4,
    Log(4.0, -3, 3, offset=2.0),
    Log(2.0, -6, 0),
    Log(2.0, -3, 4, zero=False),
    Log(ROOT, -6, 1),
    Log(2.0, -6, 0, nearest="log"),
    Log(ROOT, -7, 0, zero=False, nearest="log"),
    Log(2.0, -7, 0, signed=False),
    Log(2.0, -3, 4, zero=False, signed=False),
    Log(3.0, -2, 2),
    Codebook((-1.0, -0.3, 0.0, 0.1, 0.7, 1.0)),
    Codebook((0.25, 0.5)),
    Codebook((-2.0, 3.0, 3.5)),
]
LARGE = [Int(16), Int(24), Int(32), Int(32, signed=False), Fixed(16, 16), FP16, BF16, FP16_169, Float(8, 23)]
EVERY = SMALL + LARGE
SYMMETRIC = [f for f in EVERY if f.signed and f.min == -f.max and not isinstance(f, Codebook)]
numbers = st.floats(width=32, allow_nan=False)
small = st.one_of(st.floats(-20, 20, width=32), numbers)


def name(f):
    known = {id(v): k for k, v in vars(formats).items() if isinstance(v, formats.Format)}
    return known.get(id(f), repr(f).replace(" ", ""))


every = pytest.mark.parametrize("f", EVERY, ids=name)
each_small = pytest.mark.parametrize("f", SMALL, ids=name)
unsaturated = pytest.mark.parametrize(  # a Log without zero saturates below its smallest level too
    "f", [f for f in SMALL if not (isinstance(f, Log) and not f.zero)], ids=name
)


# ------------------------------------------------------------------------------------------------
# Powers of two


def test_floor_log2_is_exact_at_the_edges():
    x = torch.tensor([1.0, 0.99999994, 7.9999995, 8.0, -3.0, 2.0**-126, 2.0**-149, 3 * 2.0**-149, 3.4028235e38])
    assert floor_log2(x).tolist() == [0, -1, 2, 3, 1, -126, -149, -148, 127]
    y = torch.tensor([1 - 2.0**-53, 5e-324, 2.0**-1022, 1.7e308], dtype=torch.float64)
    assert floor_log2(y).tolist() == [-1, -1074, -1022, 1023]
    assert floor_log2(torch.tensor([6e-8, 65504.0], dtype=torch.float16)).tolist() == [-24, 15]
    assert pow2(floor_log2(torch.tensor([0.0, math.inf, math.nan]))).tolist() == [0, math.inf, math.inf]
    assert floor_log2(torch.tensor(5.0)).shape == () and floor_log2(torch.empty(0, 2)).shape == (0, 2)


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False).filter(bool))
def test_floor_log2_equals_frexp(x):
    assert floor_log2(torch.tensor(x)).item() == math.frexp(x)[1] - 1


def test_pow2_over_the_whole_range():
    e = torch.arange(-149, 128)
    assert pow2(e).tolist() == [2.0**k for k in range(-149, 128)]
    assert pow2(torch.tensor([-150, -1000, 128, 1000])).tolist() == [0, 0, math.inf, math.inf]
    e = torch.arange(-1074, 1024)
    assert pow2(e, torch.float64).tolist() == [2.0**k for k in range(-1074, 1024)]


def test_ldexp_does_not_overflow_on_the_way():
    x = torch.tensor([2.0**-149, 1.5 * 2.0**127, 0.75, 2.0**100])
    e = torch.tensor([200, -250, 0, -240])
    assert ldexp(x, e).tolist() == [2.0**51, 1.5 * 2.0**-123, 0.75, 2.0**-140]


def test_mx_scale_rules():
    amax = torch.tensor([0.0, 1.0, 6.9, 7.0, 7.9999995, 8.0, 4.5])
    assert mx_scale(amax, 2).tolist() == [1, 0.25, 1, 1, 1, 2, 1]
    assert mx_scale(amax, 2, "ceil").tolist() == [1, 0.25, 2, 2, 2, 2, 2]
    assert mx_scale(amax, 2, "even").tolist() == [
        1,
        0.25,
        1,
        2,
        2,
        2,
        1,
    ]  # E2M1: 7 is the tie between 6 and 8
    got = mx_scale(torch.tensor([495.0, 496.0]), 8, "even", mantissa=3).tolist()  # the tie of 480 and 512
    assert got == [1, 2]


def test_mx_scale_limits():
    x = torch.tensor([1e-44, 2.0**-126, 3e38, math.inf, math.nan])
    assert mx_scale(x, 8).tolist()[:4] == [2.0**-127, 2.0**-127, 2.0**119, 2.0**127]
    assert math.isnan(mx_scale(x, 8)[4].item())
    assert mx_scale(torch.tensor(3e38), -8).item() == 2.0**127
    assert mx_scale(torch.ones(2, dtype=torch.float64), 0).dtype == torch.float64
    with pytest.raises(ValueError, match="'flor'; did you mean 'floor'"):
        mx_scale(x, 8, "flor")


# ------------------------------------------------------------------------------------------------
# The tables of F.1 and F.2


@pytest.mark.parametrize(
    ("f", "bits", "count", "least", "most"),
    [
        (Int(8, narrow=True), 8, 255, -127, 127),
        (Int(4, narrow=True), 4, 15, -7, 7),
        (TERNARY, 2, 3, -1, 1),
        (BINARY, 1, 2, -1, 1),
        (Even(2), 2, 4, -3, 3),
        (Int(8), 8, 256, -128, 127),
        (Int(1), 1, 2, -1, 0),
        (Int(1, signed=False), 1, 2, 0, 1),
        (Int(8, signed=False), 8, 256, 0, 255),
        (Int(16), 16, 65536, -32768, 32767),
        (Fixed(8, 8), 16, 65536, -128, 128 - 2.0**-8),
        (Fixed(2, 14), 16, 65536, -2, 2 - 2.0**-14),
        (Fixed(-2, 10), 8, 256, -(2.0**-3), 2.0**-3 - 2.0**-10),
        (Fixed(10, -2), 8, 256, -512, 508),
        (MXINT8, 8, 255, -127 / 64, 127 / 64),
        (FP16, 16, 63487, -65504, 65504),
        (BF16, 16, 65279, -(2 - 2.0**-7) * 2.0**127, (2 - 2.0**-7) * 2.0**127),
        (FP16_169, 16, 64511, -4290772992, 4290772992),
        (E5M2, 8, 247, -57344, 57344),
        (E5M2FNUZ, 8, 255, -57344, 57344),
        (E4M3, 8, 253, -448, 448),
        (E4M3_IEEE, 8, 239, -240, 240),
        (E4M3FNUZ, 8, 255, -240, 240),
        (E4M3B11, 8, 255, -30, 30),
        (E3M4, 8, 223, -15.5, 15.5),
        (E3M2, 6, 63, -28, 28),
        (E2M3, 6, 63, -7.5, 7.5),
        (E2M1, 4, 15, -6, 6),
        (E8M0, 8, 255, 2.0**-127, 2.0**127),
        (UE4M3, 7, 127, 0, 448),
        (RADIX4, 4, 15, -64, 64),
        (Log(2.0, -6, 0), 4, 15, -1, 1),
        (Log(2.0, -7, 0, zero=False), 4, 16, -1, 1),
        (Log(ROOT, -15, 0, zero=False), 5, 32, -1, 1),
        (Codebook((-1.0, 0.0, 0.5, 1.0, 2.0)), 3, 5, -1, 2),
    ],
    ids=lambda v: name(v) if isinstance(v, formats.Format) else None,
)
def test_ranges(f, bits, count, least, most):
    assert (f.bits, f.min, f.max) == (bits, least, most)
    levels = f.levels()
    assert levels.dtype == torch.float64 and levels.shape == (count,)
    assert (levels[1:] > levels[:-1]).all()
    assert (levels[0].item(), levels[-1].item()) == (least, most)
    assert f.signed == (least < 0)


@pytest.mark.parametrize(
    ("f", "normal", "tiny"),
    [
        (BF16, -126, -133),
        (FP16, -14, -24),
        (FP16_169, -30, -39),
        (E5M2, -14, -16),
        (E5M2FNUZ, -15, -17),
        (E4M3, -6, -9),
        (E4M3FNUZ, -7, -10),
        (E4M3B11, -10, -13),
        (E3M4, -2, -6),
        (E3M2, -2, -4),
        (E2M3, 0, -3),
        (E2M1, 0, -1),
        (E8M0, -127, -127),
        (FLUSHED, -6, -6),
    ],
    ids=lambda v: name(v) if isinstance(v, formats.Format) else None,
)
def test_smallest_numbers(f, normal, tiny):
    assert f.tiny == 2.0**tiny
    levels = f.levels()
    assert levels[levels > 0][0].item() == 2.0**tiny
    steps = levels[levels >= 2.0**normal].diff()
    assert steps[0].item() == 2.0 ** (normal - f.mantissa)


def test_e2m1_values_and_decision_points():
    assert E2M1.levels().tolist()[7:] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    x = [
        0.25,
        0.2500001,
        0.7499999,
        0.75,
        1.25,
        1.2500001,
        1.7499999,
        1.75,
        2.5,
        2.5000002,
        3.4999998,
        3.5,
        5,
        5.0000005,
    ]
    expected = [0, 0.5, 0.5, 1, 1, 1.5, 1.5, 2, 2, 3, 3, 4, 4, 6]
    assert E2M1.snap(torch.tensor(x)).tolist() == expected
    assert E2M1.snap(-torch.tensor(x)).tolist() == [-v for v in expected]


def test_radix4_levels_and_phases():
    assert RADIX4.levels().tolist()[7:] == [0.0] + [4.0**k for k in range(-3, 4)]
    assert RADIX4.snap(torch.tensor([2.4, 2.6, -9.9, -10.1, 1000.0])).tolist() == [1, 4, -4, -16, 64]
    odd = Log(4.0, -3, 3, offset=2.0)
    assert odd.snap(torch.tensor([4.9, 5.1])).tolist() == [2, 8]
    x = torch.tensor([0.011, 0.3, 2.2, 17.0])  # nearest in value: 4^floor(log4(1.6 x)), 2 * 4^floor(log4(0.8 x))
    assert RADIX4.snap(x).tolist() == [4.0 ** math.floor(math.log(1.6 * v, 4)) for v in x.tolist()]


def test_worked_casts():
    def cast(f, *x):
        return f.snap(torch.tensor(x)).tolist()

    assert cast(E5M2, 1.125, 1.375, 1e-5, 61439.0) == [1.0, 1.5, 2.0**-16, 57344]
    assert cast(E4M3B11, 0.3, -0.07, 1.0625, 31.0, 6e-5, 6.2e-5) == [0.3125, -0.0703125, 1.0, 30, 0, 2.0**-13]
    got = cast(FP16_169, 1 + 2.0**-10, 1 + 3 * 2.0**-10, 0.1, 2049.0)
    assert got == [1, 1.00390625, 0.0999755859375, 2048]
    assert cast(E4M3, 464.0, 465.0, 448.0, -1e30) == [448, 448, 448, -448]
    assert cast(FP16, 65519.0, 65520.0) == [65504, 65504]


def test_native_overflow():
    def cast(f, *x, rounding="half_even"):
        return replace(f, overflow="native").snap(torch.tensor(x), rounding).tolist()

    inf = math.inf
    assert cast(E5M2, 61439.0, 61440.0, -1e9, inf) == [57344, inf, -inf, inf]
    assert cast(E4M3, 464.0, -464.0) == [448, -448]  # the tie goes to the even mantissa 110
    assert all(map(math.isnan, cast(E4M3, 464.0001, -500.0, inf)))
    assert cast(E4M3B11, 30.9) == [30] and math.isnan(cast(E4M3B11, 31.0)[0])
    assert cast(FP16, 65519.0, 65520.0) == [65504, inf]
    assert cast(E2M1, 100.0, -inf) == [6, -6]  # no special code to go to
    assert cast(E5M2, 1e9, -1e9, inf, rounding="truncate") == [57344, -57344, inf]
    assert cast(E5M2, 1e9, -1e9, inf, rounding="floor") == [57344, -inf, inf]


def test_products_of_e5m2_are_exact_in_1_6_9():
    levels = E5M2.levels()
    products = (levels[:, None] * levels).to(torch.float32)
    assert torch.equal(FP16_169.snap(products), products)


@pytest.mark.parametrize(
    ("f", "mse"),
    [(E5M2, 0.00279), (E4M3, 0.000704), (E2M3, 0.00148), (E3M2, 0.00285), (E2M1, 0.0232)],
    ids=name,
)
def test_error_on_normal_numbers(f, mse):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert (f.snap(x) - x).double().square().mean().item() == pytest.approx(mse, rel=0.02)


@pytest.mark.parametrize(("f", "error"), [(E5M2, 0.002818), (E4M3, 0.000704)], ids=name)
def test_relative_error_on_log_uniform_numbers(f, error):
    x = torch.exp2(torch.linspace(-4, 4, 200_001, dtype=torch.float64)[:-1])
    relative = (f.snap(x) - x) / x
    assert relative.square().mean().item() == pytest.approx(error, rel=0.015)  # the formula is of leading order


def test_fixed_point_of_gupta():
    f = Fixed(4, 2)
    x = torch.tensor([0.125, -0.125, 0.375, 1.3, 7.9, 100.0, -9.0])
    assert f.snap(x, "half_down").tolist() == [0, -0.25, 0.25, 1.25, 7.75, 7.75, -8]
    assert f.codes(f.snap(x, "half_down")).tolist() == [0, -1, 1, 5, 31, 31, -32]
    assert f.snap(torch.tensor([0.1, 0.1]), "stochastic", torch.tensor([0.39, 0.41])).tolist() == [0.25, 0]


def test_binary_and_even():
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 5.0, -0.3])
    for rounding in ("half_even", "half_up", "half_down", "half_away"):
        assert BINARY.snap(x, rounding).tolist() == [1, 1, 1, -1, 1, -1]
    assert BINARY.codes(BINARY.snap(x)).tolist() == [1, 1, 1, 0, 1, 0]
    x = torch.tensor([-2.0, 2.0, 1.9, 0.99999994, 3.5])  # codes of -3, -1, 1, 3 are 0 to 3
    assert Even(2).snap(x).tolist() == [-3, 1, 1, 1, 3]
    assert Even(2).snap(x, "half_up").tolist() == [-1, 3, 1, 1, 3]
    assert Even(2).snap(x, "floor").tolist() == [-3, 1, 1, -1, 3]


def test_power_of_two_thresholds():
    value, log = Log(2.0, -3, 3), Log(2.0, -3, 3, nearest="log")
    x = torch.tensor([1.41, 1.42, 1.49, 1.51])
    assert value.snap(x).tolist() == [1, 1, 1, 2]
    assert log.snap(x).tolist() == [1, 2, 2, 2]
    edge = 2.0**-3
    below = torch.tensor([0.49, 0.51, 0.70, 0.71]) * edge
    assert value.snap(below).tolist() == [0, edge, edge, edge]
    assert log.snap(-below).tolist() == [0, 0, 0, -edge]
    assert Log(4.0, -1, 1, nearest="log").snap(torch.tensor([1.99, 2.0, 2.01])).tolist() == [1, 1, 4]


def test_log_without_zero_saturates_below():
    f = Log(2.0, -3, 3, zero=False)
    u = torch.full((4,), 0.99)
    x = torch.tensor([0.0, -0.0, -1e-9, 0.1])
    for rounding in ROUNDINGS:
        assert f.snap(x, rounding, u).tolist() == [0.125, 0.125, -0.125, 0.125]


def test_luq_underflow_and_rounding_are_unbiased():
    f = Log(2.0, -6, 0)
    u = torch.arange(64) / 64
    tiny = f.snap(torch.full((64,), 2.0**-6 / 4), "stochastic", u)
    assert sorted(set(tiny.tolist())) == [0, 2.0**-6] and (tiny > 0).sum().item() == 16
    up = f.snap(torch.full((64,), -0.25 - 0.25 * 3 / 8), "stochastic", u)
    assert (up == -0.5).sum().item() == 24 and (up == -0.25).sum().item() == 40


def test_log_codes():
    assert RADIX4.codes(torch.tensor([0.0, 4.0**-3, 64.0, -(4.0**-3), -64.0])).tolist() == [0, 1, 7, 9, 15]
    f = Log(2.0, -1, 1, zero=False)  # 0.5, 1, 2: two bits and the sign
    assert f.codes(torch.tensor([0.5, 2.0, -0.5, -2.0])).tolist() == [0, 2, 4, 6]


def test_powers_of_root_two_are_exact_where_integers():
    levels = Log(ROOT, -8, 8, zero=False, signed=False).levels().tolist()
    assert levels[::2] == [2.0**k for k in range(-4, 5)]


def test_codebook():
    f = Codebook((-1.0, 0.0, 0.5, 2.0))
    assert f.snap(torch.tensor([-0.5, 0.25, 1.25, 1.2501, 9.0, -9.0])).tolist() == [-1, 0.5, 0.5, 2, 2, -1]
    assert f.snap(torch.tensor([-0.5, 0.25, 1.25]), "half_up").tolist() == [0, 0.5, 2]
    assert f.snap(torch.tensor([-0.5, 0.25, 1.25]), "half_down").tolist() == [-1, 0, 0.5]
    assert f.snap(torch.tensor([-0.5, 0.25, 1.25]), "half_away").tolist() == [-1, 0.5, 2]
    u = torch.arange(6) / 6
    assert (f.snap(torch.full((6,), 1.0), "stochastic", u) == 2).sum().item() == 2
    assert f.codes(torch.tensor([-1.0, 0.5])).tolist() == [0, 2]


def test_no_mantissa():
    x = torch.tensor([1.49, 1.5, 3.0, 0.12, 0.125, 0.13, 100.0])  # smallest level 0.25
    assert E3M0.levels().tolist()[7:] == [0.0] + [2.0**k for k in range(-2, 5)]
    assert E3M0.snap(x).tolist() == [1, 2, 4, 0, 0, 0.25, 16]
    assert E8M0.snap(torch.tensor([0.0, -5.0, 1.5, 0.7, 2.0**-149])).tolist() == [
        2.0**-127,
        2.0**-127,
        2,
        0.5,
        2.0**-127,
    ]


def test_flushed_subnormals():
    least = FLUSHED.tiny
    x = torch.tensor([0.49, 0.5, 0.51, -0.9]) * least
    assert FLUSHED.snap(x).tolist() == [0, 0, least, -least]
    u = torch.arange(8) / 8
    assert (FLUSHED.snap(torch.full((8,), least * 3 / 8), "stochastic", u) > 0).sum().item() == 3
    assert FLUSHED.grid(torch.tensor([1, 2, 3, 4])).tolist() == [0, 0, 0, least]


# ------------------------------------------------------------------------------------------------
# Bit equality with ml_dtypes and PyTorch

REFERENCE = [
    (E5M2, ml_dtypes.float8_e5m2),
    (E4M3, ml_dtypes.float8_e4m3fn),
    (E4M3_IEEE, ml_dtypes.float8_e4m3),
    (E5M2FNUZ, ml_dtypes.float8_e5m2fnuz),
    (E4M3FNUZ, ml_dtypes.float8_e4m3fnuz),
    (E4M3B11, ml_dtypes.float8_e4m3b11fnuz),
    (E3M4, ml_dtypes.float8_e3m4),
    (E3M2, ml_dtypes.float6_e3m2fn),
    (E2M3, ml_dtypes.float6_e2m3fn),
    (E2M1, ml_dtypes.float4_e2m1fn),
    (E8M0, ml_dtypes.float8_e8m0fnu),
]
reference = pytest.mark.parametrize(("f", "dtype"), REFERENCE, ids=name)


@reference
def test_every_code_equals_ml_dtypes(f, dtype):
    codes = np.arange(2**f.bits, dtype=np.uint8)
    values = codes.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(f.grid(torch.from_numpy(codes)).numpy(), values)
    signs = np.signbit(f.grid(torch.from_numpy(codes)).numpy())
    np.testing.assert_array_equal(signs[values == 0], np.signbit(values[values == 0]))
    back = f.codes(torch.from_numpy(values))
    assert back.dtype == torch.uint8
    np.testing.assert_array_equal(back.numpy(), values.astype(dtype).view(np.uint8))


def random_floats(f, n=50_000):
    """Numbers of every size, and the ties between the levels of `f` with their neighbours."""
    rng = np.random.default_rng(0)
    low, high = math.log2(f.tiny) - 3, min(math.log2(f.max) + 3, 127.9)
    x = np.exp2(rng.uniform(max(low, -126), high, n))
    levels = f.levels().numpy()
    ties = (levels[1:] + levels[:-1]) / 2
    ties = ties[np.abs(ties) >= 2.0**-126].astype(np.float32)
    edge = [f.max, np.float32(f.max) * np.float32(1.0625)] + [f.tiny * v for v in (0.5, 0.75)] * (f is not E8M0)
    x = np.concatenate([x, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e30)), edge])
    x = x.astype(np.float32)
    return np.concatenate([x, -x]) if f.signed else x[x > 0]


@reference
def test_casts_equal_ml_dtypes(f, dtype):
    x = random_floats(f)
    with np.errstate(over="ignore"):
        expected = x.astype(dtype)
    got = replace(f, overflow="native").snap(torch.from_numpy(x))
    np.testing.assert_array_equal(got.numpy(), expected.astype(np.float32))
    np.testing.assert_array_equal(f.codes(got).numpy(), expected.view(np.uint8))
    clipped = np.clip(x, np.float32(f.min), np.float32(f.max))
    expected = clipped.astype(dtype)
    got = f.snap(torch.from_numpy(x))
    np.testing.assert_array_equal(got.numpy(), expected.astype(np.float32))
    np.testing.assert_array_equal(f.codes(got).numpy(), expected.view(np.uint8))


@pytest.mark.parametrize(("f", "dtype"), [(FP16, torch.float16), (BF16, torch.bfloat16)], ids=name)
def test_16_bits_equal_pytorch(f, dtype):
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    x = torch.from_numpy(bits.view(np.float32))
    x = torch.cat([x[~x.isnan()], torch.tensor([1e-45, -1e-40, 65504.0, 65519.99, 65520.0, 3.4e38, math.inf])])
    got = replace(f, overflow="native").snap(x)
    assert torch.equal(got, x.to(dtype).to(torch.float32))
    raw = x.to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF
    assert torch.equal(f.codes(got), raw) and f.codes(got).dtype == torch.int32
    assert torch.equal(f.grid(raw), got)


def test_fp32_is_the_identity():
    f = Float(8, 23)
    x = torch.tensor([1e-45, -1e-40, 1.1, 3.4028235e38, 0.0])
    assert torch.equal(f.snap(x), x)
    assert torch.equal(f.codes(x), x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF)
    assert torch.equal(f.grid(f.codes(x)), x)


# ------------------------------------------------------------------------------------------------
# What holds for every format


@each_small
def test_levels_are_fixed_points_under_every_rounding(f):
    for dtype in (torch.float32, torch.float64):
        levels = f.levels().to(dtype)
        for rounding in ROUNDINGS:
            for u in (0.0, 1 - 2.0**-24):
                got = f.snap(levels, rounding, torch.full_like(levels, u))
                assert got.dtype == dtype and torch.equal(got, levels), rounding


@each_small
def test_codes_and_grid_are_inverse(f):
    levels = f.levels()
    for dtype in (torch.float32, torch.float64):
        codes = f.codes(levels.to(dtype))
        assert torch.equal(f.grid(codes, dtype), levels.to(dtype))
        assert len(codes.unique()) == len(levels)
    info = torch.iinfo(codes.dtype)
    signed_integers = isinstance(f, (Int, Fixed)) and f.signed
    if f.bits <= 8:
        assert codes.dtype == (torch.int8 if signed_integers else torch.uint8)
    low, high = (-(2 ** (f.bits - 1)), 2 ** (f.bits - 1) - 1) if signed_integers else (0, 2**f.bits - 1)
    assert info.min <= low <= codes.min() and codes.max() <= high <= info.max


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LARGE), st.lists(small, min_size=1, max_size=20))
def test_large_formats_round_trip(f, x):
    grid = f.snap(torch.tensor(x, dtype=torch.float32))
    assert torch.equal(f.grid(f.codes(grid)), grid)
    assert torch.equal(f.snap(grid), grid)


@pytest.mark.parametrize("f", [f for f in SMALL if getattr(f, "nearest", "value") == "value"], ids=name)
def test_nearest_means_nearest(f):
    levels = f.levels().numpy()
    rng = np.random.default_rng(0)
    i = rng.integers(0, len(levels) - 1, 500)
    w = rng.uniform(0.01, 0.99, 500)
    w = np.where(np.abs(w - 0.5) < 0.005, 0.4, w)  # ties have tests of their own
    x = levels[i] * (1 - w) + levels[i + 1] * w
    if isinstance(f, Log) and not f.zero:
        x = x[np.abs(x) > np.abs(levels).min()]
    expected = levels[np.abs(x[:, None] - levels).argmin(1)]
    for rounding in ("half_even", "half_away", "half_up", "half_down"):
        np.testing.assert_array_equal(f.snap(torch.from_numpy(x), rounding).numpy(), expected)


@unsaturated
def test_directed_roundings_bracket(f):
    levels = f.levels()
    x = levels[:-1] * 0.375 + levels[1:] * 0.625
    assert torch.equal(f.snap(x, "floor"), levels[:-1])
    crossing = (levels[:-1] < 0) & (levels[1:] > 0)
    toward = torch.where(x >= 0, levels[:-1], levels[1:])
    toward = torch.where(crossing, torch.where(x >= 0, levels[1:], levels[:-1]), toward)
    assert torch.equal(f.snap(x, "truncate"), toward)


@unsaturated
def test_stochastic_is_unbiased_exactly(f):
    levels = f.levels()
    u = (torch.arange(16, dtype=torch.float64) / 16).expand(len(levels) - 1, 16)
    for part in (1, 5, 8, 15):
        x = levels[:-1] + (levels[1:] - levels[:-1]) * (part / 16)
        q = f.snap(x[:, None].expand(-1, 16), "stochastic", u + 1 / 32)  # u away from the fraction
        up = (q == levels[1:, None]).sum(1)
        assert (up == part).all() and ((q == levels[:-1, None]).sum(1) == 16 - part).all()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SYMMETRIC), small, st.sampled_from(["half_even", "half_away", "truncate"]))
def test_symmetric_formats_commute_with_negation(f, x, rounding):
    t = torch.tensor(x)
    if x == 0 or (isinstance(f, Even) and rounding == "half_even"):
        return  # Even: a tie goes to the even code, and the codes of v and -v differ in parity
    assert f.snap(-t, rounding).item() == -f.snap(t, rounding).item()


@pytest.mark.parametrize("f", [f for f in SYMMETRIC if f.bits <= 16], ids=name)
def test_symmetric_formats_are_closed_under_negation(f):
    levels = f.levels()
    assert torch.equal(levels, -levels.flip(0))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(EVERY),
    st.lists(small, min_size=2, max_size=12),
    st.sampled_from(ROUNDINGS),
    st.floats(0, 1 - 2.0**-24, width=32),
)
def test_monotone_bounded_and_idempotent(f, x, rounding, u):
    t = torch.tensor(sorted(x), dtype=torch.float32)
    noise = torch.full_like(t, u)
    q = f.snap(t, rounding, noise)
    assert (q[1:] >= q[:-1]).all()
    assert (q >= f.min).all() and (q <= f.max).all()
    assert torch.equal(f.snap(q, rounding, noise), q)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(EVERY), st.lists(small, min_size=1, max_size=12), st.sampled_from(ROUNDINGS))
def test_clipping_before_or_after_agrees(f, x, rounding):
    t = torch.tensor(x, dtype=torch.float64)
    u = torch.full_like(t, 0.3)
    assert torch.equal(f.snap(t, rounding, u), f.snap(t.clamp(f.min, f.max), rounding, u))


@every
def test_special_inputs(f):
    x = torch.tensor([math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, -1e-45, 0.0])
    for rounding in ROUNDINGS:
        q = f.snap(x, rounding, torch.full_like(x, 0.5))
        assert q[0].isnan()
        assert q[1:].isfinite().all()
        if f.bits <= 24:
            ends = torch.tensor([f.max, f.min])
            assert torch.equal(q[1:3], ends) and (torch.equal(q[3:5], ends) or f == BF16)
        codes = f.codes(q[1:])
        assert torch.equal(f.grid(codes), q[1:])


@every
def test_nan_codes(f):
    nan = torch.tensor([1.0, math.nan])
    has_nan = isinstance(f, Float) and f.specials != "none" and not (f.specials == "ieee" and f.mantissa == 0)
    if has_nan:
        assert f.grid(f.codes(nan)).isnan().tolist() == [False, True]
    else:
        with pytest.raises(ValueError, match="has no code for NaN"):
            f.codes(nan)


def test_infinity_codes():
    inf = torch.tensor([math.inf, -math.inf])
    assert E5M2.codes(inf).tolist() == [0x7C, 0xFC]
    assert torch.equal(E5M2.grid(E5M2.codes(inf)), inf)
    with pytest.raises(ValueError, match="has no code for infinity"):
        E4M3.codes(inf)


@every
def test_shapes_dtypes_and_strides(f):
    base = torch.linspace(-3, 3, 24).reshape(4, 6)
    flat = f.snap(base.reshape(-1))
    assert torch.equal(f.snap(base.T).T.reshape(-1), flat)
    assert torch.equal(f.snap(base[:, ::2]), flat.reshape(4, 6)[:, ::2])
    assert f.snap(base[0, 0]).shape == () and f.snap(base[0, 0]).item() == flat[0].item()
    for empty in (torch.empty(0), torch.empty(2, 0, 3)):
        assert f.snap(empty).shape == empty.shape
        assert f.codes(empty).shape == empty.shape
        assert f.grid(f.codes(empty)).shape == empty.shape
    for dtype in (torch.float16, torch.bfloat16):
        half = base.to(dtype)
        assert f.snap(half).dtype == torch.float32
        assert torch.equal(f.snap(half), f.snap(half.to(torch.float32)))
    assert f.snap(base.double()).dtype == torch.float64
    assert f.grid(f.codes(flat), torch.bfloat16).dtype == torch.bfloat16
    assert not f.snap(base.clone().requires_grad_()).requires_grad
    kept = base.clone()
    f.snap(base)
    assert torch.equal(base, kept)


@every
def test_json_round_trip(f):
    back = from_data(json.loads(json.dumps(to_data(f))))
    assert back == f and type(back) is type(f) and hash(back) == hash(f)


@every
def test_refusals(f):
    with pytest.raises(TypeError, match="int64"):
        f.snap(torch.arange(3))
    with pytest.raises(ValueError, match="did you mean 'half_even'"):
        f.snap(torch.zeros(3), "half_evn")
    with pytest.raises(ValueError, match="u=None"):
        f.snap(torch.zeros(3), "stochastic")
    with pytest.raises(ValueError, match=r"\(3,\); got \(2,\)"):
        f.snap(torch.zeros(3), "stochastic", torch.zeros(2))
    if f.bits > 16:
        with pytest.raises(ValueError, match=r"more than 2\*\*16 values"):
            f.levels()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Int(0), "1 to 32 bits; got bits=0"),
        (lambda: Int(33), "bits=33"),
        (lambda: Int(1, narrow=True), "narrow needs a signed Int of 2 bits"),
        (lambda: Int(4, signed=False, narrow=True), "narrow needs"),
        (lambda: Even(17), "bits=17"),
        (lambda: Fixed(-4, 4), "il=-4, fl=4"),
        (lambda: Fixed(-120, 127), "fl must be in -96 to 126"),
        (lambda: Fixed(1, 0, narrow=True), "narrow needs"),
        (lambda: Float(9, 2), "got 9 and 2"),
        (lambda: Float(4, 3, specials="ocp"), "unknown specials 'ocp'"),
        (lambda: Float(4, 3, overflow="saturat"), "did you mean 'saturate'"),
        (lambda: Float(4, 3, specials="fnuz", signed=False), "specials='fn'"),
        (lambda: Float(1, 3), "no normal number"),
        (lambda: Float(8, 7, bias=140), "bias 140"),
        (lambda: Log(1.0, 0, 3), "base > 1"),
        (lambda: Log(2.0, 3, 0), "kmin <= kmax"),
        (lambda: Log(2.0, 0, 3, nearest="geometric"), "'geometric'; allowed: log, value"),
        (lambda: Log(2.0, 0, 200), "normal range of float32"),
        (lambda: Log(2.0, 0, 0, zero=False, signed=False), "2 to 2"),
        (lambda: Codebook((1.0,)), "2 to 2\\*\\*16 values; got 1"),
        (lambda: Codebook((1.0, 1.0)), "1.0 comes before 1.0"),
        (lambda: Codebook((0.0, math.inf)), "finite"),
        (lambda: Codebook((1.0, 1.0 + 1e-12)), "distinct in float32"),
    ],
)
def test_bad_fields(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_zero_has_one_sign_in_integers_and_two_in_floats():
    x = torch.tensor([-0.3, -0.0])
    assert torch.signbit(Int(4).snap(x)).tolist() == [False, False]
    assert torch.signbit(E4M3.snap(x * 1e-9)).tolist() == [True, True]
    assert torch.signbit(E4M3FNUZ.snap(x * 1e-9)).tolist() == [False, False]


def test_compiles_without_graph_breaks():
    f = Float(4, 3, specials="fn")
    table = Log(2.0, -6, 0)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x):
        return f.codes(f.snap(x)), f.grid(f.codes(f.snap(x))), table.snap(x), Int(8).codes(Int(8).snap(x))

    x = torch.linspace(-3, 3, 24)
    codes, grid, levels, integers = run(x)
    assert torch.equal(codes, f.codes(f.snap(x))) and torch.equal(grid, f.snap(x))
    assert torch.equal(levels, table.snap(x))
    assert torch.equal(integers, Int(8).codes(Int(8).snap(x)))


# ---- the short ways of snap are the definition, bit for bit ----------------------------------------------------------


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    number = ~a.isnan()
    return (
        bool((a.isnan() == b.isnan()).all())
        and torch.equal(a[number], b[number])
        and torch.equal(torch.signbit(a[number]), torch.signbit(b[number]))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "fmt",
    [
        formats.FP16,
        formats.FP16_169,
        formats.E5M2,
        formats.E4M3,
        formats.E4M3B11,
        formats.E3M2,
        formats.E2M1,
        formats.Log(2.0, -7, 0),
        formats.Log(2.0, -3, 3),
    ],
)
def test_short_way_equals_the_definition(fmt: formats.Float | formats.Log, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(-(2**31), 2**31, (20_000,), generator=generator).to(torch.int32)
    near = torch.randn(20_000, generator=generator) * torch.exp2(
        torch.randint(-12, 12, (20_000,), generator=generator).float()
    )
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3e38, -3e38])
    for x in (words.view(torch.float32).to(dtype), near.to(dtype), special.to(dtype)):
        u = torch.rand(x.shape, generator=generator)
        assert _equal_bits(fmt.snap(x, "stochastic", u), fmt._snap(x, "stochastic", u))
        assert _equal_bits(fmt.snap(x), fmt._snap(x, "half_even", None))
