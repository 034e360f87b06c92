from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.rounding import ROUNDINGS, round_between, round_to_int

NEAREST = ("half_even", "half_away", "half_up", "half_down")
TIES = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]
EXPECTED = {  # F.0: 2.5 -> 2, 3.5 -> 4, -2.5 -> -2; half_down 0.5 -> 0, -0.5 -> -1, 1.5 -> 1
    "half_even": [-2, -2, 0, 0, 2, 2],
    "half_away": [-3, -2, -1, 1, 2, 3],
    "half_up": [-2, -1, 0, 1, 2, 3],
    "half_down": [-3, -2, -1, 0, 1, 2],
    "floor": [-3, -2, -1, 0, 1, 2],
    "truncate": [-2, -1, 0, 0, 1, 2],
}


def test_the_modes_are_these():
    assert ROUNDINGS == (
        "half_even",
        "half_away",
        "half_up",
        "half_down",
        "floor",
        "truncate",
        "stochastic",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", EXPECTED)
def test_ties(mode, dtype):
    got = round_to_int(torch.tensor(TIES, dtype=dtype), mode)
    assert got.dtype == dtype
    assert got.tolist() == EXPECTED[mode]


@pytest.mark.parametrize("mode", NEAREST)
def test_just_beside_a_tie_is_no_tie(mode):
    below = np.nextafter(np.float32(0.5), np.float32(0))  # 0.49999997: |t| + 0.5 and t - floor(t) both round here
    above = np.nextafter(np.float32(0.5), np.float32(1))
    t = torch.tensor([below, -below, above, -above])
    assert round_to_int(t, mode).tolist() == [0, 0, 1, -1]


@settings(max_examples=200, deadline=None)
@given(st.floats(-(2.0**30), 2.0**30, width=32))
def test_deterministic_modes_equal_exact_arithmetic(x):
    whole, rest = math.floor(x), x - math.floor(x)  # exact in float64 where |x| > 2^-20
    exact = {
        "half_even": float(np.rint(x)),
        "floor": float(whole),
        "truncate": float(math.trunc(x)),
    }
    if abs(x) > 2.0**-20 or x == 0:
        exact["half_up"] = whole + float(rest >= 0.5)
        exact["half_down"] = whole + float(rest > 0.5)
        exact["half_away"] = math.copysign(math.floor(abs(x) + 0.5), x)
    for mode, value in exact.items():
        assert round_to_int(torch.tensor(x), mode).item() == value, mode


def test_stochastic_takes_the_upper_with_the_probability_of_the_fraction():
    u = torch.arange(64) / 64
    for t in (-2.75, -0.25, 0.0, 0.125, 1.0, 3.984375):
        q = round_to_int(torch.full_like(u, t), "stochastic", u)
        assert q.mean().item() == t  # exact: the fraction is a multiple of 1/64
        assert set(q.tolist()) <= {math.floor(t), math.ceil(t)}


def test_stochastic_never_moves_an_integer():
    u = torch.full((5,), 1 - 2.0**-24)
    t = torch.tensor([8388607.0, 1.0, 0.0, -3.0, -8388607.0])  # floor(t + u) would give 8388608
    assert torch.equal(round_to_int(t, "stochastic", u), t)
    assert torch.equal(round_to_int(t, "stochastic", torch.zeros(5)), t)


def test_stochastic_compares_exactly():
    # t - floor(t) of a small negative t has more bits than float32: 1 - 2^-25 and 1 - 3 * 2^-26 would be 1
    t = torch.tensor([-(2.0**-25), -3 * 2.0**-26, -(2.0**-24), -(2.0**-30), 2.0**-30, 127 + 2.0**-17, -127 - 2.0**-17])
    below = torch.tensor([-1.0, -1, -1, -1, 0, 127, -128])
    for u in (0.0, 2.0**-40, 2.0**-24, 2.0**-17, 1 - 2.0**-17, 1 - 2.0**-23, 1 - 2.0**-24):
        up = [Fraction(u) < Fraction(x) - int(b) for x, b in zip(t.tolist(), below.tolist(), strict=True)]
        assert torch.equal(round_to_int(t, "stochastic", torch.full_like(t, u)), below + torch.tensor(up)), u
    assert math.copysign(1.0, round_to_int(torch.tensor(-0.5), "stochastic", torch.tensor(0.25)).item()) == 1


def test_stochastic_sends_the_negative_up_where_u_is_below_the_value_fraction():
    t = torch.tensor([-1.25, -1.25])
    assert round_to_int(t, "stochastic", torch.tensor([0.7, 0.75])).tolist() == [-1, -2]


@pytest.mark.parametrize("mode", ROUNDINGS)
def test_nan_and_infinity_pass(mode):
    t = torch.tensor([math.nan, math.inf, -math.inf])
    got = round_to_int(t, mode, torch.zeros(3)).tolist()
    assert math.isnan(got[0]) and got[1:] == [math.inf, -math.inf]


@pytest.mark.parametrize("mode", ROUNDINGS)
def test_shapes(mode):
    for t in (torch.tensor(1.75), torch.empty(0, 3), torch.arange(6.0).reshape(2, 3).T):
        got = round_to_int(t, mode, torch.full_like(t, 0.5))
        assert got.shape == t.shape
    one = round_to_int(torch.tensor(1.75), mode, torch.tensor(0.5)).item()
    assert one == (1 if mode in ("floor", "truncate") else 2)
    assert torch.equal(round_to_int(t, mode, torch.full_like(t, 0.5)), t)


def test_errors_name_the_value_and_the_fix():
    t = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="half_evn.*did you mean 'half_even'.*allowed: floor"):
        round_to_int(t, "half_evn")
    with pytest.raises(ValueError, match=r"needs uniforms.*\(2, 3\).*u=None"):
        round_to_int(t, "stochastic")
    with pytest.raises(ValueError, match=r"\(2, 3\); got \(3,\)"):
        round_to_int(t, "stochastic", torch.zeros(3))
    with pytest.raises(TypeError, match="int64"):
        round_to_int(torch.arange(3), "floor")
    with pytest.raises(ValueError, match="did you mean"):
        round_between(t, t, t, "stochstic")


@settings(max_examples=200, deadline=None)
@given(st.floats(-1000, 1000, width=32), st.sampled_from(ROUNDINGS), st.floats(0, 1 - 2.0**-24, width=32))
def test_between_integers_is_the_same_choice(x, mode, u):
    t, noise = torch.tensor(x), torch.tensor(u)
    lo = t.floor()
    if mode == "stochastic" and -1 < t < 0:
        return  # between any neighbours t - lo itself is rounded
    got = round_between(t, lo, lo + 1, mode, noise, lo_even=lo % 2 == 0)
    assert got.item() == round_to_int(t, mode, noise).item()


def test_between_uneven_neighbours():
    lo, hi = torch.tensor(3.0), torch.tensor(8.0)

    def at(t, mode, u=0.0, even=True):
        return round_between(torch.tensor(t), lo, hi, mode, torch.tensor(u), even).item()

    assert at(5.4, "half_even") == 3 and at(5.6, "half_even") == 8
    assert at(5.5, "half_even") == 3 and at(5.5, "half_even", even=False) == 8
    assert at(5.5, "half_up") == 8 and at(5.5, "half_away") == 8 and at(5.5, "half_down") == 3
    assert at(7.9, "floor") == 3 and at(8.0, "floor") == 8 and at(7.9, "truncate") == 3
    assert at(4.0, "stochastic", 0.1999) == 8 and at(4.0, "stochastic", 0.2001) == 3
    assert at(3.0, "stochastic", 0.0) == 3 and at(8.0, "stochastic", 1 - 2.0**-24) == 8
    got = round_between(torch.tensor(-5.5), -hi, -lo, "half_away")
    assert got.item() == -8


def test_between_mean_is_the_value_exactly():
    u = torch.arange(320) / 320
    t = torch.full_like(u, 4.5)  # (4.5 - 3) / 5 = 96 / 320
    q = round_between(t, torch.tensor(3.0), torch.tensor(8.0), "stochastic", u)
    assert (q == 8).sum().item() == 96
    assert q.mean().item() == 4.5


def test_truncate_does_not_cross_zero():
    t = torch.tensor([0.3, -0.3, 0.0, 1.0, -1.0])
    q = round_between(t, torch.tensor(-1.0), torch.tensor(1.0), "truncate")
    assert q.tolist() == [1, -1, 1, 1, -1]


def test_between_own_switch_point():
    t = torch.tensor([1.9, 2.0, 2.1])
    mid = torch.tensor(2.0, dtype=torch.float64)
    q = round_between(t, torch.tensor(1.0), torch.tensor(4.0), "half_down", mid=mid)
    assert q.tolist() == [1, 1, 4]
    assert torch.isnan(round_between(torch.tensor(math.nan), torch.tensor(0.0), torch.tensor(1.0), "floor"))


def test_between_equal_neighbours():
    t = torch.tensor([2.0])
    for mode in ROUNDINGS:
        assert round_between(t, t, t, mode, torch.zeros(1)).item() == 2
