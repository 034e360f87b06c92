"""WAGE (2018): worked numbers of each of the five quantizers, the order of the backward pass, start and training."""

# mypy: disable-error-code="operator,union-attr,index,arg-type,call-arg,return-value,assignment,misc"
# (attributes of a torch.nn.Module have no precise type)

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowbit
from lowbit.methods.wage import WageG, alpha
from lowbit.rng import uniform

VGG = (27, 1152, 1152, 2304, 2304, 4608, 8192, 1024)
"""Fan-in of the layers of the paper's CIFAR-10 network."""


def shift(x: float) -> float:
    return 1.0 if x == 0 else 2.0 ** round(math.log2(x))


def q(x: np.ndarray, k: int) -> np.ndarray:
    s = 2.0 ** (1 - k)
    return np.clip(np.rint(np.asarray(x, dtype=np.float64) / s) * s, -1 + s, 1 - s)


def numbers(x: Tensor | None) -> np.ndarray:
    assert x is not None
    return x.detach().double().numpy()


# ---- W ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("w", "code"), [(0.25, 0.0), (0.26, 0.5), (0.75, 0.5), (-0.25, 0.0), (-0.251, -0.5), (-2.0, -0.5)]
)
def test_weights_by_hand(w: float, code: float) -> None:
    x = torch.full((4, 1152), w)
    assert lowbit.quantizer("wage", "W")(x).unique().tolist() == [code / 8], "fan-in 1152: alpha is 8"
    assert lowbit.quantizer("wage", "W", init="release")(x).unique().tolist() == [code / 16]


def test_alpha_of_the_paper_and_of_the_release() -> None:
    assert [alpha(n, 2, 6.0) for n in VGG] == [2, 8, 8, 16, 16, 16, 32, 8]
    assert [alpha(n, 2, 3.0) for n in VGG] == [2, 16, 16, 16, 16, 32, 32, 16], "as the released log prints them"
    for n in range(1, 5000, 7):
        for k in (2, 3, 8):
            ratio = 1.5 * 2.0 ** (1 - k) / math.sqrt(6 / n)
            assert alpha(n, k, 6.0) == max(shift(ratio), 1)


def test_fan_in_of_every_kind_of_layer() -> None:
    layers = [
        (nn.Linear(1152, 4), 1152),
        (nn.Conv2d(128, 4, 3), 1152),
        (nn.Conv2d(256, 4, 3, groups=2), 1152),
        (nn.Conv1d(384, 2, 3), 1152),
    ]
    for layer, fan_in in layers:
        lowbit.apply(layer, lowbit.create("wage"))
        assert float(layer.quant.role("W")(layer.weight.detach()).abs().max()) == 0.5 / alpha(fan_in, 2, 6.0), layer


def test_weight_gradient_has_no_mask_and_no_alpha() -> None:
    w = torch.linspace(-3, 3, 1152).reshape(1, -1).requires_grad_()
    lowbit.quantizer("wage", "W")(w).backward(torch.full((1, 1152), 7.0))
    assert torch.equal(w.grad, torch.full((1, 1152), 7.0))


# ---- A ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "code"), [(0.1, 13), (1.2, 127), (1 / 256, 0), (3 / 256, 2), (-1.2, -127), (5 / 256, 2)])
def test_activations_by_hand(a: float, code: int) -> None:
    assert lowbit.quantizer("wage", "A")(torch.tensor([a])).item() == code / 128


def test_activation_mask_is_inclusive() -> None:
    edge = 127 / 128
    a = torch.tensor([edge, edge + 2.0**-20, -edge, -edge - 2.0**-20, 0.99, 1.0], requires_grad=True)
    lowbit.quantizer("wage", "A")(a).sum().backward()
    assert a.grad is not None and a.grad.tolist() == [1, 0, 1, 0, 1, 0]


# ---- E ---------------------------------------------------------------------------------------------------------------


def test_errors_by_hand() -> None:
    e = lowbit.quantizer("wage", "E")
    assert (e(torch.tensor([3e-4, -1e-4, 2e-5])) * 128).tolist() == [127, -52, 10], "Shift is 2^-12; it is dropped"
    assert e(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("peak", "power"), [(0.7, 0.5), (0.7072, 1.0), (1.4, 1.0), (1.415, 2.0), (2.9, 4.0), (3e-4, 2.0**-12)]
)
def test_shift_is_nearest_in_the_exponent(peak: float, power: float) -> None:
    small = peak * 0.25
    assert lowbit.quantizer("wage", "E")(torch.tensor([peak, small]))[1].item() == q(np.array(small / power), 8)


def test_shift_switches_at_the_square_root_of_two() -> None:
    e = lowbit.quantizer("wage", "E")
    root = np.float32(math.sqrt(2))  # the last float32 below the true root
    for exponent in (-126, -60, -1, 0, 1, 5, 100):
        below, above = (float(np.ldexp(v, exponent)) for v in (root, np.nextafter(root, np.float32(2))))
        low, high = (e(torch.tensor([v, 0.5 * 2.0**exponent])) for v in (below, above))
        assert (low[1] * 128).item() == 64 and (high[1] * 128).item() == 32, exponent


def test_errors_ignore_powers_of_two() -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    e = lowbit.quantizer("wage", "E")
    assert all(torch.equal(e(x * 2.0**j), e(x)) for j in (-30, -3, 4, 40))
    wanted = q(numbers(x) / shift(float(x.abs().max())), 8)
    assert np.array_equal(numbers(e(x)), wanted)


# ---- G and U ---------------------------------------------------------------------------------------------------------


def gradients(x: Tensor, lr: float, draws: int) -> np.ndarray:
    g = lowbit.quantizer("wage", "G")
    return np.stack([numbers(g.gradient(x, lr, g.key(x))) * lr * 128 for _ in range(draws)])


def test_update_by_hand() -> None:
    drawn = gradients(torch.tensor([3e-4, -1e-4, 2e-5] * 500), 8.0, 40).reshape(-1, 3)  # g_s 9.8304, -3.2768, 0.65536
    assert [sorted(set(c)) for c in drawn.T] == [[9, 10], [-4, -3], [0, 1]]
    for column, mean in zip(drawn.T, (9.8304, -3.2768, 0.65536), strict=True):
        f = mean - math.floor(mean)
        assert abs(column.mean() - mean) < 6 * math.sqrt(f * (1 - f) / len(column))
        assert column.var() == pytest.approx(f * (1 - f), rel=0.05)


def test_magnitude_form_of_the_draw() -> None:
    g = lowbit.quantizer("wage", "G")
    x = torch.tensor([1.0, -0.3, 0.3, 0.6])
    g.rate = 8.0  # g_s = 8, -2.4, 2.4, 4.8
    u = torch.tensor([0.0, 0.39, 0.41, 0.79])
    assert (g(x, u) * 128).tolist() == [8, -3, 2, 5]


def test_update_needs_no_logarithm_of_zero_and_no_rate() -> None:
    g = lowbit.quantizer("wage", "G")
    assert g.gradient(torch.zeros(3), 8.0, g.key(torch.zeros(3))).tolist() == [0, 0, 0]
    assert g.gradient(torch.ones(3), 0.0, g.key(torch.ones(3))).tolist() == [0, 0, 0]
    assert isinstance(g, WageG) and g.rate == 1.0


@pytest.mark.parametrize("lr", [8.0, 1.0, 0.125, 0.1, 3.7])
def test_one_step_is_exactly_the_update(lr: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    lowbit.apply(model, lowbit.create("wage"))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=lr))
    before, grad = numbers(model.weight), torch.randn(30, 40) * 1e-3
    model.weight.grad = grad.clone()
    key = model.quant.role("G").stream.key.clone()
    optimizer.step()
    u = uniform((30, 40), int(key[0]), int(key[1]), int(key[2])).double().numpy()
    scaled = (grad / shift(float(grad.abs().max())) * lr).double().numpy()
    dw = np.sign(scaled) * (np.floor(np.abs(scaled)) + (u < np.abs(scaled) - np.floor(np.abs(scaled)))) / 128
    assert np.array_equal(numbers(model.weight), np.clip(before - dw, -127 / 128, 127 / 128))
    assert np.abs(dw).max() <= math.ceil(math.sqrt(2) * lr) / 128 and np.abs(dw).max() > 0


@pytest.mark.parametrize(("clip", "bound"), [("paper", 127 / 128), ("release", 0.5)])
def test_stored_weights_stay_on_their_grid_and_in_range(clip: str, bound: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    lowbit.apply(model, lowbit.create("wage", clip=clip))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=8.0))
    for i in range(30):
        model.weight.grad = torch.randn(20, 30, generator=torch.Generator().manual_seed(i)) + 0.5
        optimizer.step()
        assert np.array_equal(numbers(model.weight) * 128, np.rint(numbers(model.weight) * 128))
    assert float(model.weight.detach().min()) == -bound


# ---- one network -----------------------------------------------------------------------------------------------------


def test_backward_pass_in_float64() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))
    lowbit.apply(model, lowbit.create("wage"))
    x = torch.rand(6, 12) * 3 - 1.5
    target = nn.functional.one_hot(torch.arange(6) % 4, 4).float()
    out = model(x)
    (out - target).square().sum().backward()

    weights = [q(numbers(m.weight), 2) / alpha(m.in_features, 2, 6.0) for m in model if isinstance(m, nn.Linear)]
    a, kept, relu = [q(numbers(x), 8)], [], []
    z = a[0] @ weights[0].T
    for w in weights[1:]:
        relu.append(z > 0)
        kept.append(np.maximum(z, 0) <= 127 / 128)
        a.append(q(np.maximum(z, 0), 8))
        z = a[-1] @ w.T
    assert np.array_equal(numbers(out), z)

    def node(e: np.ndarray) -> np.ndarray:
        return q(e / shift(np.abs(e).max()), 8)

    e = node(2 * (z - numbers(target)))  # the node on the network's output
    for i in (2, 1, 0):
        assert np.array_equal(numbers(model[2 * i].weight.grad), e.T @ a[i]), i
        if i:
            e = node((e @ weights[i]) * kept[i - 1]) * relu[i - 1]
    assert not all(k.all() for k in kept), "some activations saturate, so the mask shows"
    assert all(m.bias.grad is None for m in model if isinstance(m, nn.Linear))


def test_convolution_with_pooling_sees_only_integers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()
    )
    lowbit.apply(model, lowbit.create("wage"))
    seen: list[Tensor] = []
    model[3].register_full_backward_hook(lambda m, given, got: seen.append(got[0]))
    y = model(torch.rand(5, 3, 10, 10) * 2 - 1)
    y.square().sum().backward()
    assert type(model[1]) is nn.Identity
    steps = numbers(y) * 128 * 2 * alpha(72, 2, 6.0)
    assert np.array_equal(steps, np.rint(steps)), "sums of products of codes"
    codes = numbers(seen[0]) * 128
    assert np.array_equal(codes, np.rint(codes)) and 91 <= np.abs(codes).max() <= 127, "errors between layers"


def test_loss_scale_and_mean_do_not_matter() -> None:
    def step(factor: float) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
        lowbit.apply(model, lowbit.create("wage"))
        optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=8.0))
        (model(torch.randn(16, 10)).square().sum() * factor).backward()
        optimizer.step()
        return model[0].weight.detach()

    assert torch.equal(step(1.0), step(2.0**-9)) and torch.equal(step(1.0), step(2.0**12))


# ---- start -----------------------------------------------------------------------------------------------------------


def test_start_of_the_paper_and_of_the_release() -> None:
    for init, variance in (("paper", 6.0), ("release", 3.0)):
        torch.manual_seed(0)
        wide, narrow = nn.Linear(1152, 50), nn.Linear(2, 3000)
        lowbit.apply(nn.Sequential(wide, narrow), lowbit.create("wage", init=init))
        values, counts = wide.weight.unique(return_counts=True)
        assert values.tolist() == [-0.5, 0.0, 0.5], "U(-0.75, 0.75) rounded to multiples of 0.5: thirds"
        assert (counts / wide.weight.numel()).tolist() == pytest.approx([1 / 3] * 3, abs=0.01)
        limit = math.sqrt(variance / 2)  # 1.73 and 1.22, above L_min
        peak = min(math.floor(limit / 0.5 + 0.5) * 0.5, 127 / 128)
        assert float(narrow.weight.detach().max()) == pytest.approx(peak)
        assert float((narrow.weight == 0).float().mean()) == pytest.approx(0.25 / limit, abs=0.02)
        assert not wide.bias.any() and not wide.bias.requires_grad


def test_keep_only_moves_weights_to_their_grid() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(30, 20)
    before = numbers(layer.weight)
    lowbit.apply(layer, lowbit.create("wage", init="keep"))
    assert np.array_equal(numbers(layer.weight), np.rint(before * 128) / 128)


def test_norm_can_stay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3))
    lowbit.apply(model, lowbit.create("wage", norm="keep"))
    assert type(model[1]) is nn.BatchNorm2d and model[1].weight.requires_grad


# ---- training --------------------------------------------------------------------------------------------------------


def train(**options: object) -> float:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    lowbit.apply(model, lowbit.create("wage", **options))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=8.0))
    for i in range(220):
        optimizer.param_groups[0]["lr"] = 8.0 if i < 150 else 1.0
        pick = torch.randperm(1500, generator=torch.Generator().manual_seed(i))[:64]
        optimizer.zero_grad()
        (model(x[pick]) - nn.functional.one_hot(y[pick], 10)).square().sum().backward()
        optimizer.step()
    model.eval()
    return float((model(x[1500:]).argmax(-1) == y[1500:]).float().mean())


def test_ternary_weights_and_integers_learn_digits() -> None:
    assert train() > 0.85
    assert train(init="release", clip="release") > 0.85


def test_small_rates_move_weights_in_the_mean() -> None:
    g, x = lowbit.quantizer("wage", "G"), torch.linspace(-1, 1, 1001)
    moved = gradients(x, 0.125, 400).mean(0)  # |g_s| is at most 1/8: nearest rounding would never move anything
    assert g.eval().gradient(x, 0.125, None).abs().max() == 0
    assert np.abs(moved - numbers(x) / 8).max() < 6 * math.sqrt(0.125 / 400)


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": 1}, "w_bits is 2 to 16; got 1"),
        ({"e_bits": 17}, "e_bits is 2 to 16; got 17"),
        ({"w_bits": 8, "g_bits": 4}, "at least w_bits"),
        ({"init": "relase"}, "did you mean 'release'"),
        ({"clip": "none"}, "allowed: paper, release"),
        ({"norm": "drop"}, "allowed: keep, remove"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.create("wage", **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p),
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=1.0, weight_decay=1e-4),
    ],
)
def test_another_optimizer_is_refused(make) -> None:
    model = lowbit.apply(nn.Linear(4, 4), lowbit.create("wage"))
    with pytest.raises(ValueError, match="torch.optim.SGD|no momentum|no weight_decay"):
        lowbit.attach(model, make(model.parameters()))


def test_report_compares_with_what_was_divided_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 30), nn.ReLU(), nn.Linear(30, 10))
    lowbit.apply(model, lowbit.create("wage", w_bits=8))
    rows = {(r.layer, r.role): r for r in lowbit.report(model, torch.rand(32, 600) * 2 - 1).rows}
    assert math.isinf(rows["0", "W"].sqnr), "the start lies on the grid, alpha or not"
    assert rows["2", "A"].clipped > 0.05 and rows["2", "A"].sqnr > 5, "activations beyond 1 saturate"
    assert rows["2", "E"].sqnr > 25
    assert -10 < rows["0", "G"].sqnr < 10 and rows["0", "G"].bits == 8, "most of an update at rate 1 is below one step"
