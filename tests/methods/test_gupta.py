"""Gupta et al. (2015): Convert against rational arithmetic, the lost update, stochastic against nearest rounding."""

# mypy: disable-error-code="operator,union-attr,index,arg-type,call-arg,return-value,assignment,misc"
# (attributes of a torch.nn.Module have no precise type)

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowbit
from lowbit.formats import Fixed
from lowbit.quantizer import Quantizer
from lowbit.rng import uniform


def quantizer(il: int, fl: int, rounding: str = "stochastic", role: str = "W") -> Quantizer:
    return lowbit.quantizer("gupta", role, il=il, fl=fl, rounding=rounding)


def convert(x: float, il: int, fl: int, u: float | None = None) -> float:
    """The paper's Convert in exact arithmetic; without u, nearest with ties down."""
    eps, low = Fraction(1, 2**fl), -(Fraction(2) ** (il - 1))
    high, value = -low - eps, Fraction(x)
    if value <= low:
        return float(low)
    if value >= high:
        return float(high)
    below = value // eps * eps
    rest = value - below
    up = rest > eps / 2 if u is None else Fraction(u) < rest / eps
    return float(below + eps if up else below)


# ---- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "q"),
    [
        (0.375, 0.25),
        (-0.375, -0.5),
        (0.376, 0.5),
        (9.0, 7.75),
        (-9.0, -8.0),
        (7.75, 7.75),
        (-8.0, -8.0),
        (7.8, 7.75),
        (0.0, 0.0),
    ],
)
def test_nearest_by_hand(x: float, q: float) -> None:
    assert quantizer(4, 2, "nearest")(torch.tensor([x])).item() == q


def test_stochastic_by_hand() -> None:
    q = quantizer(4, 2)  # 0.3 = 0.25 + 0.2 * 0.25
    x = torch.tensor([0.3, 0.3, 0.3, -0.3, -0.3, 7.9, -8.5])
    u = torch.tensor([0.0, 0.19, 0.21, 0.79, 0.81, 0.0, 0.999])
    assert q(x, u).tolist() == [0.5, 0.5, 0.25, -0.25, -0.5, 7.75, -8.0]


@pytest.mark.parametrize(("il", "fl"), [(4, 12), (2, 14), (4, 2), (8, 8), (6, 10)])
def test_convert_equals_exact_arithmetic(il: int, fl: int) -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(1)) * 2.0 ** (il - 2)
    u = uniform(x.shape, 1, 2, 3)
    nearest = [convert(v, il, fl) for v in x.tolist()]
    drawn = [convert(v, il, fl, w) for v, w in zip(x.tolist(), u.tolist(), strict=True)]
    assert quantizer(il, fl, "nearest")(x).tolist() == nearest
    assert quantizer(il, fl)(x, u).tolist() == drawn
    assert max(nearest) <= 2.0 ** (il - 1) - 2.0**-fl and len(set(nearest)) > 20


def test_ties_go_down() -> None:
    x = (torch.arange(-20, 20) + 0.5) * 2.0**-10
    assert torch.equal(quantizer(6, 10, "nearest")(x), torch.arange(-20, 20) * 2.0**-10)


def test_mean_and_variance() -> None:
    q, x = quantizer(4, 2), torch.full((200_000,), 0.3)
    y = q(x, uniform(x.shape, 5, 0, 0)).double()
    f = 0.2
    variance = 0.25**2 * f * (1 - f)
    assert variance == pytest.approx(0.01)
    assert abs(float(y.mean()) - 0.3) < 6 * math.sqrt(variance / len(x))
    assert abs(float(y.var()) - variance) < 0.02 * variance


def test_values_on_the_grid_never_move() -> None:
    x = Fixed(4, 4).levels().float()
    assert torch.equal(quantizer(4, 4)(x, torch.full_like(x, 0.0)), x)
    assert torch.equal(quantizer(4, 4)(x, torch.full_like(x, 1 - 2.0**-24)), x)


# ---- one layer -------------------------------------------------------------------------------------------------------


def on_grid(x: Tensor, fl: int, il: int = 4) -> bool:
    steps = x.detach().double() * 2.0**fl
    return bool((steps == steps.round()).all()) and float(x.detach().abs().max()) <= 2.0 ** (il - 1)


def test_a_sum_is_converted_once() -> None:
    # 16 products of 2^-6: each alone is half a step of <4, 5> and would be lost, ties down; their sum is 8 steps
    layer = nn.Linear(16, 1)
    lowbit.apply(layer, lowbit.create("gupta", il=4, fl=5, rounding="nearest"))
    with torch.no_grad():
        layer.weight.fill_(2.0**-1)
        layer.bias.zero_()
    assert layer(torch.full((1, 16), 2.0**-5)).item() == 0.25


def test_converting_each_product_costs_d_times_the_variance() -> None:
    d, n, q = 64, 4000, quantizer(8, 4)
    x = torch.rand(n, d, generator=torch.Generator().manual_seed(0)) * 0.3
    once = q(x.sum(-1), uniform((n,), 1, 0, 0)) - x.sum(-1)
    each = q(x, uniform((n, d), 2, 0, 0)).sum(-1) - x.sum(-1)
    assert 0.8 * d < float(each.var() / once.var()) < 1.2 * d


def test_three_products_and_their_conversions() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    lowbit.apply(model, lowbit.create("gupta", il=4, fl=6, rounding="nearest"))
    w = [p.detach().double().numpy() for p in model.parameters()]
    x = torch.randn(7, 5, requires_grad=True)
    e = torch.randn(7, 3) * 0.2
    y = model(x)
    y.backward(e)

    def r(v: np.ndarray) -> np.ndarray:
        t = np.clip(v, -8, 8 - 2.0**-6) * 64
        return (np.floor(t) + (t - np.floor(t) > 0.5)) / 64

    a0 = r(x.detach().double().numpy())
    z = r(a0 @ w[0].T + w[1])
    h = np.maximum(z, 0)
    out = r(h @ w[2].T + w[3])
    e2 = r(e.double().numpy())
    e1 = r(e2 @ w[2]) * (z > 0)
    assert np.array_equal(y.detach().double().numpy(), out)
    grads = [p.grad.double().numpy() for p in model.parameters()]
    assert np.allclose(grads[0], e1.T @ a0, rtol=0, atol=1e-6), "float32 sums of grid values"
    assert np.array_equal(grads[1], e1.sum(0)) and np.allclose(grads[2], e2.T @ h, rtol=0, atol=1e-6)
    assert np.allclose(grads[3], e.double().numpy().sum(0), rtol=0, atol=1e-6), "last bias: errors as the loss gives"
    assert np.array_equal(x.grad.double().numpy(), r(e1 @ w[0])), "no mask, and converted as it leaves"


def test_saturated_elements_keep_their_gradient() -> None:
    x = torch.tensor([100.0, -100.0, 0.3], requires_grad=True)
    q = quantizer(4, 12)
    q(x).backward(torch.tensor([1.0, 2.0, 3.0]))
    assert x.grad is not None and x.grad.tolist() == [1.0, 2.0, 3.0]


def test_weights_are_stored_on_the_grid() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    start = [p.detach().clone() for p in model.parameters()]
    lowbit.apply(model, lowbit.create("gupta", fl=8))
    for p, s in zip(model.parameters(), start, strict=True):
        assert on_grid(p, 8) and float((p.detach() - s).abs().max()) <= 2.0**-9, "nearest at the start"
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for i in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(i))).square().mean().backward()
        optimizer.step()
        assert all(on_grid(p, 8) for p in model.parameters()), "weights and biases, after every update"
    assert all(not torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_lost_update(rounding: str) -> None:
    model = nn.Linear(2000, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    recipe = lowbit.create("gupta", il=6, fl=10, rounding=rounding)
    lowbit.apply(model, lowbit.Recipe("update", lowbit.Roles(U=recipe.roles.U)))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for _ in range(40):
        model.weight.grad = torch.full_like(model.weight, -(2.0**-12))
        optimizer.step()
    moved = float(model.weight.detach().double().mean()) - 0.5
    if rounding == "nearest":
        assert moved == 0, "a quarter of a step is lost for ever"
    else:  # 40 draws of 2^-10 with probability 1/4, mean 2^-12 each
        sigma = math.sqrt(40 * 2000 * 0.25 * 0.75) / 2000 * 2.0**-10
        assert abs(moved - 40 * 2.0**-12) < 6 * sigma


# ---- training --------------------------------------------------------------------------------------------------------


def train(recipe: lowbit.Recipe | None, steps: int = 250) -> float:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if recipe is not None:
        lowbit.attach(lowbit.apply(model, recipe), optimizer)
    for i in range(steps):
        pick = torch.randperm(1500, generator=torch.Generator().manual_seed(i))[:100]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[pick]), y[pick]).backward()
        optimizer.step()
    model.eval()
    return float((model(x[1500:]).argmax(-1) == y[1500:]).float().mean())


def test_stochastic_trains_where_nearest_stalls() -> None:
    plain = train(None)
    stochastic, nearest = (train(lowbit.create("gupta", wl=16, fl=8, rounding=r)) for r in ("stochastic", "nearest"))
    assert plain > 0.85
    assert stochastic > plain - 0.05, (plain, stochastic, nearest)
    assert nearest < stochastic - 0.2, (plain, stochastic, nearest)


def test_sixteen_bits_default_equals_float_within_a_point() -> None:
    assert abs(train(lowbit.create("gupta")) - train(None)) < 0.03


def test_mixed_schedule_raises_the_word() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    lowbit.apply(model, lowbit.create("gupta", il=4, fl=4, raise_at=2, raise_to=14))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(32, 6)
    for i in range(4):
        optimizer.zero_grad()
        y = model(x)
        assert on_grid(y, 4) == (i < 2) and on_grid(y, 10)
        y.square().mean().backward()
        optimizer.step()
        assert on_grid(model[0].weight, 4) == (i < 2), i
        assert on_grid(model[0].weight, 10)


# ---- options ---------------------------------------------------------------------------------------------------------


def test_formats() -> None:
    def grids(**options: object) -> tuple[object, object]:
        recipe = lowbit.create("gupta", **options)
        assert recipe.roles.A is not None and recipe.roles.W is not None and recipe.products.result is not None
        assert recipe.products.result == recipe.roles.A
        assert recipe.roles.W == recipe.roles.E == recipe.roles.G == recipe.roles.U
        return recipe.roles.W.format, recipe.roles.A.format

    assert grids() == (Fixed(4, 12), Fixed(8, 8))
    assert grids(fl=14) == (Fixed(2, 14), Fixed(2, 14))
    assert grids(wl=20, fl=14) == (Fixed(6, 14), Fixed(6, 14))
    assert grids(il=3, fl=4) == (Fixed(3, 4), Fixed(3, 4))
    assert grids(wl=12, il=4) == (Fixed(4, 8), Fixed(4, 8))
    assert grids(activations=(6, 10)) == (Fixed(4, 12), Fixed(6, 10))
    scaled = lowbit.create("gupta", loss_scale=64.0)
    assert scaled.loss_scale == lowbit.LossScale(64.0) and lowbit.create("gupta").loss_scale is None
    # G is converted while the factor is in it: the grid of the scaled gradient, divided
    g = lowbit.Quantizer.make(scaled.roles.G).eval()
    assert g(torch.tensor([2.0**-18])).tolist() == [2.0**-18] and g(torch.tensor([1.0])).tolist() == [(8 - 2**-12) / 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"il": 4, "fl": 12, "wl": 20}, "is not wl=20"),
        ({"rounding": "stochastc"}, "did you mean 'stochastic'"),
        ({"wl": 40, "fl": 10}, "1 to 32 bits"),
        ({"activations": (4,)}, "pair"),
        ({"raise_at": 10, "raise_to": 16}, "exceed the word length 16"),
        ({"raise_at": -1}, ">= 0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.create("gupta", **options)


def test_narrow_words_are_packed(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(24, 8)
    lowbit.apply(model, lowbit.create("gupta", il=2, fl=2))
    coded = model.quant.role("W").eval().encode(model.weight.detach())
    assert coded.codes.numel() == 24 * 8 // 2 and torch.equal(coded.decode(), model.weight.detach())
    lowbit.save(model, tmp_path / "m")
    x = torch.randn(5, 24)
    assert torch.equal(lowbit.load(tmp_path / "m", nn.Linear(24, 8))(x), model.eval()(x))
