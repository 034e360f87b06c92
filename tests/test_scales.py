"""Each scale against its definition in float64 numpy, and blocks of zeros, tiny, huge and broken numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import (
    AbsMax,
    Average,
    Even,
    History,
    Int,
    Learned,
    LearnedStep,
    Microscale,
    MinMax,
    MinMSE,
    Moments,
    Percentile,
    PowerOfTwo,
    QSpec,
    Static,
)
from lowbit.blocks import Blocked
from lowbit.formats import MXINT8
from lowbit.quantizer import Quantizer

RNG = np.random.default_rng(0)


def blocks(n: int = 101, count: int = 6) -> torch.Tensor:
    return torch.from_numpy(
        RNG.standard_t(3, (count, n)).astype(np.float32) * np.logspace(-4, 4, count)[:, None]
    ).float()


def scale_of(how, x: torch.Tensor) -> np.ndarray:
    return how.compute(x)[0].double().numpy()[:, 0]


def test_abs_max():
    x = blocks()
    for d in (127, 127.5, 128):
        np.testing.assert_allclose(scale_of(AbsMax(d), x), np.abs(x.double().numpy()).max(1) / d, rtol=1e-7)


def test_min_max_with_an_integer_zero():
    x = blocks() + 0.5
    v = x.double().numpy()
    low, high = np.minimum(v.min(1), 0), np.maximum(v.max(1), 0)
    scale, zero = MinMax(255).compute(x)
    np.testing.assert_allclose(scale[:, 0].double(), (high - low) / 255, rtol=1e-6)
    np.testing.assert_array_equal(zero[:, 0].numpy(), np.round(-low / ((high - low) / 255)))
    q = Quantizer.make(QSpec(Int(8, signed=False), scale=MinMax(255)))
    assert float(q(torch.tensor([-1.0, 0.0, 2.3]))[1]) == 0  # 0 is exact


def test_min_max_with_a_real_zero():
    x = blocks() + 7
    v = x.double().numpy()
    scale, zero = MinMax(15, "real").compute(x)
    np.testing.assert_allclose(scale[:, 0].double(), (v.max(1) - v.min(1)) / 15, rtol=1e-6)
    np.testing.assert_allclose(zero[:, 0].double(), -v.min(1) / ((v.max(1) - v.min(1)) / 15), rtol=1e-5)
    q = Quantizer.make(QSpec(Int(4, signed=False), scale=MinMax(15, "real")))
    y = q(torch.tensor([3.0, 3.4, 5.0]))
    assert y[0] == pytest.approx(3.0, rel=1e-6) and y[2] == pytest.approx(5.0, rel=1e-6)


def test_min_max_of_a_constant_block_is_exact():
    for value in (0.0, 3.0, -3.0):
        for zero in ("code", "real"):
            q = Quantizer.make(QSpec(Int(8, signed=False), scale=MinMax(255, zero)))
            torch.testing.assert_close(q(torch.full((5,), value)), torch.full((5,), value), rtol=1e-6, atol=0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.floats(0.1, 100))
def test_percentile_is_numpy_s(n, percent):
    x = torch.from_numpy(np.random.default_rng(n).normal(size=(2, n)).astype(np.float32))
    expected = np.percentile(np.abs(x.double().numpy()), percent, axis=1) / 7
    np.testing.assert_allclose(scale_of(Percentile(7, percent), x), expected, rtol=1e-5)


def test_min_mse_is_the_best_of_its_candidates():
    x = blocks(40)
    for d, steps in ((7, 100), (1, 37)):
        v = x.double().numpy()
        best = []
        for row in v:
            candidates = np.abs(row).max() / d * np.arange(1, steps + 1) / steps
            errors = [((np.clip(np.round(row / s), -d, d) * s - row) ** 2).sum() for s in candidates]
            best.append((candidates[int(np.argmin(errors))], min(errors)))
        mine = scale_of(MinMSE(d, steps), x)
        errors = [((np.clip(np.round(r / s), -d, d) * s - r) ** 2).sum() for r, s in zip(v, mine, strict=True)]
        np.testing.assert_allclose(errors, [e for _, e in best], rtol=1e-5)
        np.testing.assert_allclose(mine, [s for s, _ in best], rtol=1e-6)


def test_min_mse_clips_gaussians_and_keeps_uniform_numbers():
    gauss, flat = torch.randn(1, 20000), torch.rand(1, 20000) * 2 - 1
    assert float(MinMSE(7).compute(gauss)[0] / AbsMax(7).compute(gauss)[0]) < 0.8
    # uniform numbers: 15 cells of equal width fill the range, so the last level lies half a cell inside: 14/15
    assert float(MinMSE(7).compute(flat)[0] / AbsMax(7).compute(flat)[0]) == pytest.approx(14 / 15, abs=0.011)


W = torch.tensor([[0.5, -0.2, 0.1, -0.05]])


def test_moments_worked_example():
    # SAWB: m1 = .2125, m2 = .275; two bits, coefficients of the released code
    even = Moments(3.12, 2.064, 3)
    assert (
        float(even.clip(W)) == pytest.approx(3.12 * 0.275 - 2.064 * 0.2125, rel=1e-5) == pytest.approx(0.4194, abs=1e-4)
    )
    q = Quantizer.make(QSpec(Even(2), scale=even))
    assert q(W).tolist()[0] == pytest.approx([0.4194, -0.1398, 0.1398, -0.1398], abs=1e-4)
    zero = Quantizer.make(QSpec(Int(2, narrow=True), scale=Moments(2.6, 1.71, 1)))
    assert zero(W).tolist()[0] == pytest.approx([0.351625, -0.351625, 0, 0], abs=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.floats(1e-30, 1e30), st.integers(0, 99))
def test_moments_follow_the_scale_of_the_weights(c, seed):
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 64)).astype(np.float32))
    how = Moments(3.12, 2.064, 3)
    assert float(how.clip(x * c)) == pytest.approx(c * float(how.clip(x)), rel=1e-4)
    assert float(how.clip(-x.flip(1))) == pytest.approx(float(how.clip(x)), rel=1e-5)


def test_moments_fall_back_to_the_maximum():
    spikes = torch.tensor([[1.0, -1.0, 1.005, -0.995] * 16])
    assert 12.68 * 1 - 12.80 * 1 < 0
    assert float(Moments(12.68, 12.80, 15).clip(spikes)) == pytest.approx(1.005)


@pytest.mark.parametrize("mode", ["floor", "ceil", "nearest"])
def test_power_of_two(mode):
    values = [2.0**k for k in (-140, -126, -20, -1, 0, 1, 10, 126)]
    values += [np.nextafter(np.float32(v), np.float32(0)) for v in (0.25, 1, 8)]
    values += [np.nextafter(np.float32(v), np.float32(99)) for v in (0.25, 1, 8)] + [1.4142, 1.4143, 3e38, 5.6]
    x = torch.tensor(values, dtype=torch.float32).reshape(-1, 1)
    e = np.log2(x.double().numpy()[:, 0])
    power = {"floor": np.floor, "ceil": np.ceil, "nearest": np.round}[mode](e)
    mine = scale_of(PowerOfTwo(AbsMax(1.0), mode), x)
    np.testing.assert_array_equal(mine[power < 128], 2.0 ** power[power < 128])


def test_power_of_two_refuses_a_zero_point():
    with pytest.raises(ValueError, match="zero point"):
        PowerOfTwo(MinMax(15)).compute(torch.randn(1, 4))


@pytest.mark.parametrize(
    "how",
    [
        AbsMax(127),
        MinMax(255),
        MinMax(255, "real"),
        Percentile(127),
        MinMSE(127, 10),
        Moments(12.68, 12.8, 15),
        PowerOfTwo(AbsMax(127)),
        Microscale(0),
    ],
)
def test_extreme_blocks(how):
    x = torch.stack(
        [
            torch.zeros(4),
            torch.full((4,), 1e-45),
            torch.tensor([1e-40, -1e-41, 0, 0]),
            torch.tensor([3e38, -3e38, 1e38, 0]),
            torch.tensor([1.0, -2.0, 0.5, 0.0]),
        ]
    )
    scale, zero = how.compute(x)
    assert scale.shape == (5, 1) and scale.dtype == x.dtype
    assert scale.isfinite().all() and (scale > 0).all()
    fmt = Int(8, signed=False) if zero is not None else Int(8, narrow=True)
    fmt = MXINT8 if isinstance(how, Microscale) else fmt
    y = Quantizer.make(QSpec(fmt, blocks=_rows(), scale=how))(x)
    assert y.isfinite().all() and torch.equal(y[0], torch.zeros(4))
    assert float((y[4] - x[4]).abs().max()) <= 2.0
    broken = torch.tensor([[1.0, torch.nan, 2, 3], [1.0, 2, 3, 4]])
    y = Quantizer.make(QSpec(fmt, blocks=_rows(), scale=how))(broken)
    assert y[0, 1].isnan() and y[1].isfinite().all()
    broken[0, 1] = torch.inf
    y = Quantizer.make(QSpec(fmt, blocks=_rows(), scale=how))(broken)
    assert not y[0, 1].isfinite() and y[1].isfinite().all()


def _rows():
    from lowbit import PerAxis

    return PerAxis(0)


def tracked(how) -> Quantizer:
    return Quantizer.make(QSpec(Int(8, narrow=True), scale=how), name="layer.A")


def used(q: Quantizer, peak: float) -> float:
    return float(q.scale_for(Blocked(torch.tensor([[peak, -peak / 2]])))[0]) * 127


def test_average():
    q = tracked(Average(AbsMax(127), 0.9))
    assert used(q, 1.0) == pytest.approx(1.0)
    assert used(q, 2.0) == pytest.approx(0.9 * 1 + 0.1 * 2, rel=1e-6)
    assert used(q, 3.0) == pytest.approx(0.9 * 1.1 + 0.1 * 3, rel=1e-6)
    q.eval()
    assert used(q, 100.0) == pytest.approx(1.29, rel=1e-6) and int(q.seen) == 3


def test_average_of_earlier_batches():
    q = tracked(Average(AbsMax(127), 0.5, before=True))
    assert used(q, 4.0) == pytest.approx(4.0)  # nothing earlier
    assert used(q, 8.0) == pytest.approx(4.0)
    assert used(q, 1.0) == pytest.approx(6.0)
    assert used(q, 1.0) == pytest.approx(3.5)


@pytest.mark.parametrize("before", [True, False])
def test_history(before):
    q = tracked(History(AbsMax(127), length=3, headroom=1.5, before=before))
    peaks = [4.0, 1.0, 8.0, 2.0, 1.0, 1.0, 1.0]
    for i, peak in enumerate(peaks):
        window = peaks[max(0, i - 3) : i] if before and i else peaks[max(0, i - 2) : i + 1]
        assert used(q, peak) == pytest.approx(1.5 * max(window), rel=1e-6)
    q.eval()
    assert used(q, 50.0) == pytest.approx(1.5 * 1.0, rel=1e-6) and q.tracked.shape == (1, 3)


@pytest.mark.parametrize("how", [Average(AbsMax(127)), History(AbsMax(127), 4), History(AbsMax(127), 4, before=False)])
def test_tracked_scales_are_saved_and_restored(how):
    q, twin = tracked(how), tracked(how)
    for peak in (1.0, 3.0, 2.0):
        used(q, peak)
    twin.load_state_dict(q.state_dict())
    assert used(q, 5.0) == used(twin, 5.0) and used(q, 1.0) == used(twin, 1.0)
    assert torch.equal(q.tracked, twin.tracked) and int(q.seen) == int(twin.seen) == 5
    fresh = tracked(how)
    fresh.load_state_dict({})  # a float checkpoint
    assert int(fresh.seen) == 0


def test_evaluation_before_any_batch_uses_the_tensor_and_keeps_nothing():
    q = tracked(Average(AbsMax(127))).eval()
    assert used(q, 3.0) == pytest.approx(3.0) and int(q.seen) == 0


@pytest.mark.parametrize(
    "how", [Average(AbsMax(127), 0.5), History(AbsMax(127), 4, before=False), Average(AbsMax(127), 0.5, before=True)]
)
def test_a_batch_that_overflowed_leaves_no_trace(how):
    q = tracked(how)
    used(q, 1.0)
    before = q.tracked.clone()
    x = torch.tensor([[math.inf, 1.0]])
    scale = q.scale_for(Blocked(x))[0]
    assert how.before or not scale.isfinite().all()
    assert torch.equal(q.tracked, before) and int(q.seen) == 1
    assert math.isfinite(used(q, 1.0))


def test_a_number_of_blocks_that_changes_is_refused():
    q = tracked(Average(AbsMax(127)))
    q.scale_for(Blocked(torch.randn(3, 4)))
    with pytest.raises(ValueError, match="layer.A: Average has tracked 3 blocks and now sees 2"):
        q.scale_for(Blocked(torch.randn(2, 4)))


def test_learned_starts_as_lsq_does():
    x = torch.randn(1, 500)
    q = Quantizer.make(QSpec(Int(4), scale=Learned(7), backward=LearnedStep()))
    q(x)
    assert float(q.learned.detach()) == pytest.approx(2 * x.double().abs().mean().item() / 7**0.5, rel=1e-6)
    assert int(q.seen) > 0
    first = float(q.learned.detach())
    q(x * 100)
    assert float(q.learned.detach()) == first


def test_learned_never_turns_negative():
    how = Learned(7)
    assert float(how.step(torch.tensor([[-3.0]]))) == torch.finfo(torch.float32).tiny
    clip = Learned(7, "clip", "value", 6.0)
    assert float(clip.step(clip.start(torch.randn(1, 3)))) == pytest.approx(6 / 7)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AbsMax(0), "must be positive; got 0"),
        (lambda: MinMax(-1), "got -1"),
        (lambda: MinMax(3, "cod"), "'code'"),
        (lambda: Percentile(3, 0), "got 0"),
        (lambda: MinMSE(3, 0), "got 0"),
        (lambda: PowerOfTwo(AbsMax(1), "up"), "'up'"),
        (lambda: Average(AbsMax(1), 1.0), "got 1.0"),
        (lambda: History(AbsMax(1), 0), "got 0"),
        (lambda: Static(0), "got 0"),
        (lambda: Learned(7, "stepp"), "did you mean 'step'"),
        (lambda: Microscale(2, "flor"), "did you mean 'floor'"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
