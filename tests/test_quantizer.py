"""The quantizer itself: draws, copies, state, encoding, the identity, and the block-scaled presets."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lowbit import AbsMax, Average, Int, PerAxis, PerGroup, PerRow, PerTensor, QSpec, Static
from lowbit.blocks import LINEAR_INPUT, LINEAR_WEIGHT
from lowbit.formats import E2M1, E4M3
from lowbit.microscaling import mxfp4, mxfp6, mxfp8, mxint8, nvfp4
from lowbit.quantizer import IDENTITY, Quantizer
from lowbit.recipe import Recipe, Roles

SR = QSpec(Int(4, narrow=True), scale=AbsMax(7), rounding="stochastic")


def make(spec=SR, name="fc.W", **kwargs) -> Quantizer:
    return Quantizer.make(spec, LINEAR_WEIGHT, name, **kwargs)


def test_an_activation_is_drawn_at_every_use_and_not_in_evaluation():
    q, x = make(name="fc.A"), torch.randn(50, 50)
    assert not torch.equal(q(x), q(x))
    q.eval()
    state = q.stream.key.clone()
    assert torch.equal(q(x), q(x)) and torch.equal(q.stream.key, state)


def test_a_weight_is_drawn_when_it_changed():
    q, w = make(weight=True), nn.Parameter(torch.randn(20, 20))
    first = q(w)
    assert torch.equal(first, q(w))
    with torch.no_grad():
        w.add_(0)
    assert not torch.equal(first, q(w))
    second = q(w)
    q.redraw()
    assert not torch.equal(second, q(w))


def test_a_part_of_a_packed_weight_is_drawn_when_the_whole_changed():
    q, packed = make(weight=True), nn.Parameter(torch.randn(60, 20))
    first = q(packed.chunk(3)[1])
    assert torch.equal(first, q(packed.chunk(3)[1]))
    with torch.no_grad():
        packed.add_(0)
    assert not torch.equal(first, q(packed.chunk(3)[1]))


def test_a_computed_weight_is_drawn_at_every_use():
    q, w = make(weight=True), nn.Parameter(torch.randn(20, 20))
    assert not torch.equal(q(w * 1), q(w * 1))


@pytest.mark.parametrize("stepped", [False, True])
def test_a_copy_goes_on_with_the_same_draws(stepped):
    holder = nn.Module()
    holder.q, holder.w = make(weight=True), nn.Parameter(torch.randn(20, 20))
    with torch.no_grad():
        holder.w.add_(0).add_(0)
    first = holder.q(holder.w)
    if stepped:
        with torch.no_grad():
            holder.w.add_(0)
    twin = copy.deepcopy(holder)
    for m in (copy.deepcopy(twin), twin, holder):
        y = m.q(m.w)
        assert torch.equal(y, first) is not stepped
        with torch.no_grad():
            m.w.add_(0)
        m.later = m.q(m.w).detach()
    assert torch.equal(twin.later, holder.later)


def test_names_make_streams_and_seeds_make_runs():
    x = torch.randn(50, 50)
    a, b, c, d = (make(name=n, seed=s)(x) for n, s in (("a", 0), ("a", 0), ("b", 0), ("a", 1)))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, d)


def test_uniforms_decide_as_documented():
    q = make(QSpec(Int(4), scale=Static(1.0), rounding="stochastic"))
    x = torch.tensor([0.25, 0.25, -0.25, -0.25, 3.0, -3.0])
    u = torch.tensor([0.24, 0.25, 0.74, 0.75, 0.0, 0.0])
    assert q(x, u).tolist() == [1, 0, 0, -1, 3, -3]
    with pytest.raises(ValueError, match="shape of x"):
        q(x, u[:2])
    with pytest.raises(ValueError, match="leave u out"):
        make(QSpec(Int(4)))(x, u)
    with pytest.raises(TypeError, match="int64"):
        q(torch.arange(3))


@pytest.mark.parametrize("blocks", [PerTensor(), PerRow(), PerAxis(1), PerGroup(5)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8, 12])
def test_encode_holds_exactly_what_forward_gives(blocks, bits):
    q = Quantizer.make(QSpec(Int(bits), blocks, AbsMax(max(1, 2 ** (bits - 1) - 1))), LINEAR_INPUT)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(6, 9).to(dtype)
        code = q.encode(x)
        assert torch.equal(code.decode(), q(x)) and code.decode().dtype == dtype
        stored = next(b for b in (1, 2, 3, 4, 6, 8, 16, 32) if b >= bits)
        assert code.codes.numel() * code.codes.element_size() == -(-code.count * stored // 8)


def test_empty_and_scalar_tensors():
    for blocks in (PerTensor(), PerAxis(0)):
        q = Quantizer.make(QSpec(Int(4), blocks, AbsMax(7)))
        x = torch.empty(0, 3)
        assert q(x).shape == q.encode(x).decode().shape == (0, 3)
    assert float(Quantizer.make(QSpec(Int(4), scale=AbsMax(7)))(torch.tensor(-3.0))) == -3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_identity_changes_nothing(dtype):
    q = Quantizer.make(IDENTITY)
    x = (torch.randn(5, 7).to(dtype) / 3).requires_grad_()
    y = q(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(y, x) and torch.equal(x.grad, torch.ones_like(x))
    if dtype == torch.float64:
        with pytest.raises(ValueError, match="float64"):
            q.encode(x)
    else:
        assert torch.equal(q.encode(x).decode(), x)
    assert Recipe.from_json(Recipe("r", Roles(W=IDENTITY)).to_json()) == Recipe("r", Roles(W=IDENTITY))


def test_a_float_checkpoint_has_no_state_and_that_is_fine():
    q = make(QSpec(Int(4), scale=Average(AbsMax(7)), rounding="stochastic"))
    q.load_state_dict({}, strict=True)
    q(torch.randn(3, 3))
    twin = make(QSpec(Int(4), scale=Average(AbsMax(7)), rounding="stochastic"))
    twin.load_state_dict(q.state_dict(), strict=True)
    x = torch.randn(3, 3)
    assert torch.equal(q(x), twin(x))


def test_unknown_kinds_and_modes_are_named():
    with pytest.raises(ValueError, match="did you mean 'grid'"):
        Quantizer.make(QSpec(Int(4), kind="gird"))
    with pytest.raises(ValueError, match="did you mean 'half_even'"):
        QSpec(Int(4), rounding="half_evn")  # type: ignore[arg-type]


# ---- microscaling ----------------------------------------------------------------------------------------------------

MX = {
    "mxfp8 e4m3": (mxfp8(), 8, 448.0),
    "mxfp8 e5m2": (mxfp8("e5m2"), 15, 57344.0),
    "mxfp6 e3m2": (mxfp6(), 4, 28.0),
    "mxfp6 e2m3": (mxfp6("e2m3"), 2, 7.5),
    "mxfp4": (mxfp4(), 2, 6.0),
    "mxint8": (mxint8(), 0, 127 / 64),
}


@pytest.mark.parametrize("name", MX)
def test_mx_is_the_standard_s(name):
    spec, emax, top = MX[name]
    q = Quantizer.make(spec, LINEAR_INPUT)
    assert spec.format.max == top and spec.format.min == -top and 2**emax <= top < 2 ** (emax + 1)
    x = torch.randn(6, 70) * torch.logspace(-20, 20, 6).reshape(-1, 1)
    levels = spec.format.levels().double().numpy()
    y = q(x).double().numpy()
    for row, out in zip(x.double().numpy(), y, strict=True):
        for start in (0, 32, 64):
            block = row[start : start + 32]
            scale = 2.0 ** (np.floor(np.log2(np.abs(block).max())) - emax)
            t = np.clip(block / scale, -top, top)
            distance = np.abs(t[:, None] - levels).min(1)
            got = out[start : start + 32] / scale
            assert np.isin(got, levels).all()
            np.testing.assert_array_equal(np.abs(got - t), distance)  # the nearest element
    assert torch.equal(q.encode(x).decode(), q(x))


def test_mx_worked_numbers():
    def block(spec, *values):
        x = torch.zeros(1, 32)
        x[0, : len(values)] = torch.tensor(values)
        return Quantizer.make(spec, LINEAR_INPUT)(x)[0, : len(values)].tolist()

    assert block(mxfp4(), 5.0, 4.0, 2.5) == [4, 4, 2]  # OCP nearest: 5 is a tie, to even; so is 2.5
    assert block(mxfp4(), 7.9, 1.0) == [6, 1]  # (6, 8) saturates
    assert block(mxfp4(mode="ceil"), 7.9, 1.0) == [8, 1]
    assert block(mxfp4(mode="even"), 7.9, 6.9) == [8, 6]
    assert block(mxfp4(mode="even"), 6.9, 1.0) == [6, 1]
    assert block(mxfp8(), 500.0, 1.0) == [448, 1]
    assert block(mxint8(), 1.999, 1 / 128, 3 / 128) == [127 / 64, 0, 2 / 64]
    assert block(mxint8(), 0.0, 0.0) == [0, 0]
    tiny = 2.0**-149
    assert block(mxfp4(), tiny, 0.0) == [0, 0]  # the scale stops at 2^-127
    assert block(mxfp8("e5m2"), 2.0**-140, 0.0) == [2.0**-140, 0]
    y = block(mxint8(), float("inf"), 1.0)
    assert not np.isfinite(y).any()


@pytest.mark.parametrize("make_spec", [mxfp8, mxfp6, mxfp4, mxint8, nvfp4])
def test_presets_are_plain_data(make_spec):
    recipe = Recipe("r", Roles(W=make_spec(rounding="stochastic")))
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_unknown_elements_are_named():
    with pytest.raises(ValueError, match="did you mean 'e4m3'"):
        mxfp8("e4m4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allowed: e2m3, e3m2"):
        mxfp6("e4m3")  # type: ignore[arg-type]


def nvfp4_in_float64(x: np.ndarray) -> np.ndarray:
    """The recipe in float64, one row of blocks of 16; scales rounded by the library's E4M3."""
    amax = np.abs(x).max()
    s = 448 * 6 / amax
    out = np.empty_like(x)
    levels = E2M1.levels().numpy()
    for i in range(0, len(x), 16):
        b = x[i : i + 16]
        block = float(E4M3.snap(torch.tensor(np.abs(b).max() / 6 * s)))
        t = np.clip(b * s / block, -6, 6) if block else b * 0
        out[i : i + 16] = levels[np.abs(t[:, None] - levels).argmin(1)] * block / s
    return out


def test_nvfp4_equals_its_recipe():
    x = torch.randn(160) * torch.logspace(-2, 0, 160)
    y = Quantizer.make(nvfp4())(x.reshape(1, -1))[0].double().numpy()
    np.testing.assert_allclose(y, nvfp4_in_float64(x.double().numpy()), rtol=3e-7)


def test_nvfp4_worked_example():
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16], x[0, 17] = 10.0, 3.0, 1.0
    q = Quantizer.make(nvfp4())
    y = q(x)[0]
    assert float(y[0]) == pytest.approx(10.0, rel=1e-6)
    assert float(y[16]) == pytest.approx(6 * 128 / 268.8, rel=1e-6) == pytest.approx(2.857, abs=1e-3)
    assert float(y[17]) == pytest.approx(2 * 128 / 268.8, rel=1e-6) == pytest.approx(0.95238, abs=1e-5)
    code = q.encode(x)
    assert code.scale.flatten().tolist() == pytest.approx([448 / 268.8, 0.476190], rel=1e-6)
    assert torch.equal(code.decode()[0], y)


def test_nvfp4_small_blocks_vanish_and_bad_numbers_show():
    x = torch.zeros(1, 48)
    x[0, 0], x[0, 16], x[0, 32] = 1.0, 2.1e-6, 2.5e-6
    y = Quantizer.make(nvfp4())(x)[0]
    assert float(y[16]) == 0 and float(y[32]) > 0  # below 2.2e-6 of the tensor's maximum S rounds to 0
    assert torch.equal(Quantizer.make(nvfp4())(torch.zeros(2, 16)), torch.zeros(2, 16))
    for huge in (3e38, 1e-45, 1e-38):
        assert Quantizer.make(nvfp4())(torch.full((1, 16), huge)).isfinite().all()
    x[0, 17] = torch.inf
    y = Quantizer.make(nvfp4())(x)[0]
    assert not y[17].isfinite() and y[:16].isfinite().all()
    x[0, 17] = torch.nan
    assert Quantizer.make(nvfp4())(x)[0, 17].isnan()


def test_nvfp4_of_square_blocks_commutes_with_transposition():
    w = torch.randn(48, 32)
    square, row = (Quantizer.make(nvfp4(square=s), LINEAR_WEIGHT) for s in (True, False))
    assert torch.equal(square(w).t(), square(w.t().contiguous()))
    assert not torch.equal(row(w).t(), row(w.t().contiguous()))


def test_errors_on_gaussian_numbers():
    x = torch.randn(4000, 64)
    mse = {}
    for name, spec in {
        "nvfp4": nvfp4(),
        "mxfp4": mxfp4(),
        "int4": QSpec(Int(4, narrow=True), PerGroup(32), AbsMax(7)),
    }.items():
        mse[name] = float((Quantizer.make(spec, LINEAR_INPUT)(x) - x).square().mean())
    assert mse["nvfp4"] == pytest.approx(0.0091, abs=2e-4)
    assert mse["int4"] == pytest.approx(0.0095, abs=3e-4)
    assert mse["mxfp4"] == pytest.approx(0.0133, abs=3e-4)


def test_nvfp4_stochastic_rounding_is_unbiased_where_nothing_clips():
    x = torch.full((1, 16), 1.3)
    x[0, 0] = 6.0  # S * s = 1 up to rounding: nothing is clipped
    q = Quantizer.make(nvfp4(rounding="stochastic"))
    n = 4000
    mean = torch.stack([q(x)[0, 1:] for _ in range(n // 15)]).double().mean()
    step = 0.5
    sigma = step * (0.6 * 0.4) ** 0.5 / n**0.5
    assert abs(float(mean) - 1.3) < 6 * sigma
