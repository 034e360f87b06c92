from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowbit
from lowbit.formats import ap2
from lowbit.swaps import HardTanh, ShiftBatchNorm


def network(hidden: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
        nn.BatchNorm1d(10),
    )


# ---- quantizers -----------------------------------------------------------------------------------------------------


def test_weights_are_signs_with_the_identity_as_gradient() -> None:
    q = lowbit.quantizer("bnn", "W")
    w = torch.tensor([-1, -0.2, -0.0, 0.0, 0.2, 1, 1.5], requires_grad=True)
    y = q(w)
    assert y.tolist() == [-1, -1, 1, 1, 1, 1, 1]
    y.backward(torch.arange(7.0))
    assert w.grad is not None and w.grad.tolist() == list(range(7))


def test_activations_are_signs_with_the_inclusive_mask() -> None:
    q = lowbit.quantizer("bnn", "A")
    beyond = math.nextafter(1, 2)
    a = torch.tensor([-2, -1, -0.3, 0, 0.5, 1, beyond, 2], dtype=torch.float64, requires_grad=True)
    y = q(a)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    y.sum().backward()
    assert a.grad is not None and a.grad.tolist() == [0, 1, 1, 1, 1, 1, 0, 0]


def test_two_bit_activations_have_four_equal_levels() -> None:
    q = lowbit.quantizer("bnn", "A", activation_bits=2)
    a = torch.linspace(-1.5, 1.5, 3001, dtype=torch.float64, requires_grad=True)
    y = q(a)
    np.testing.assert_allclose(np.unique(y.detach().numpy().round(9)), [-1, -1 / 3, 1 / 3, 1], atol=1e-9)
    inside = a.abs() <= 1
    assert ((y - a).abs()[inside] <= 1 / 3 + 1e-12).all()
    y.sum().backward()
    assert torch.equal(a.grad, inside.double())


def test_stochastic_activation_is_plus_one_with_the_hard_sigmoid() -> None:
    q = lowbit.quantizer("bnn", "A", stochastic=True)
    draws = 20_000
    for a in (-1.4, -1.0, -0.5, 0.0, 0.3, 1.0, 2.0):
        p = min(max((a + 1) / 2, 0), 1)
        y = q(torch.full((draws,), a))
        assert abs((y == 1).double().mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / draws) + 1e-12
    u = torch.tensor([0.64, 0.65, 0.66])
    assert q(torch.full((3,), 0.3), u).tolist() == [1, -1, -1]  # +1 where u < 0.65
    assert q.eval()(torch.tensor([-0.1, 0.1])).tolist() == [-1, 1]


def test_first_layer_reads_eight_bit_pixels_exactly_by_bit_planes() -> None:
    rng = np.random.default_rng(0)
    pixels, wb = rng.integers(0, 256, (8, 30)), np.sign(rng.normal(size=(5, 30)))
    pixels[0, :2] = 0, 255
    model = lowbit.apply(nn.Sequential(nn.Linear(30, 5, bias=False), nn.Linear(5, 2)), lowbit.create("bnn"))
    model[0].weight.data = torch.tensor(wb, dtype=torch.float32)
    planes = sum(2**n * (((pixels >> n) & 1) @ wb.T) for n in range(8))
    np.testing.assert_array_equal(planes, pixels @ wb.T)
    y = model[0](torch.tensor(pixels / 255, dtype=torch.float32))
    np.testing.assert_allclose(y.detach() * 255, planes, atol=2e-3)


@pytest.mark.parametrize("depth", [1, 63, 64, 65, 1000])
def test_product_is_xnor_and_popcount(depth: int) -> None:
    model = lowbit.apply(nn.Sequential(nn.Linear(3, depth), nn.Linear(depth, 7, bias=False)), lowbit.create("bnn"))
    a = torch.randn(5, depth)
    y = model[1](a)
    bits_a, bits_w = (a >= 0).numpy(), (model[1].weight >= 0).numpy()
    pops = (bits_a[:, None] ^ bits_w[None]).sum(-1)
    np.testing.assert_array_equal(y.detach().numpy(), depth - 2 * pops)


def test_batch_norm_and_sign_fold_into_one_threshold_for_each_channel() -> None:
    torch.manual_seed(1)
    k, channels = 200, 32
    s = 2 * torch.randint(0, k + 1, (500, channels)).double() - k  # integers of the parity of K
    norm = nn.BatchNorm1d(channels).double().eval()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_(0, 10)
    norm.running_var.uniform_(50, 300)
    sign = lowbit.quantizer("bnn", "A")
    gamma, sigma = norm.weight.detach(), (norm.running_var + norm.eps).sqrt()
    threshold = norm.running_mean - norm.bias.detach() * sigma / gamma
    folded = torch.where(gamma > 0, s >= threshold, s <= threshold)
    assert torch.equal(sign(norm(s)) == 1, folded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hard_tanh_is_that_of_pytorch_with_a_gradient_that_lies_as_x(dtype: torch.dtype) -> None:
    x = torch.randn(2, 6, 5, 4, dtype=dtype).to(memory_format=torch.channels_last)
    x[0, 0, 0, :3] = torch.tensor([1.0, -1.0, 0.0])  # the bounds have no gradient
    grad = torch.randn(2, 6, 5, 4, dtype=dtype)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = HardTanh()(mine), nn.Hardtanh()(theirs)
    (own,), (reference,) = (torch.autograd.grad(*pair, grad) for pair in ((y, mine), (expected, theirs)))
    assert torch.equal(y, expected) and torch.equal(own, reference)
    assert own[0, 0, 0, :2].tolist() == [0, 0]
    assert own.is_contiguous(memory_format=torch.channels_last)
    assert HardTanh()(x[:0]).shape == (0, 6, 5, 4)


# ---- the recipe -----------------------------------------------------------------------------------------------------


def test_apply_spreads_the_weights_and_puts_hard_tanh_for_relu() -> None:
    model = network()
    before = [p.clone() for n, p in model.named_parameters() if n in ("0.weight", "3.weight", "6.weight")]
    lowbit.apply(model, lowbit.create("bnn"))
    for old, i in zip(before, (0, 3, 6), strict=True):
        new = model[i].weight
        assert new.abs().max() == 1 and torch.equal(new.sign(), old.sign())
        assert abs(new.square().mean().item() - 1 / 3) < 0.02  # that of U(-1, 1)
    assert type(model[2]) is HardTanh and type(model[1]) is nn.BatchNorm1d
    kept = lowbit.apply(network(), lowbit.create("bnn", shift_norm=True))
    assert all(type(kept[i]) is ShiftBatchNorm for i in (1, 4, 7))
    assert lowbit.create("bnn").criterion == "squared_hinge"


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_update_is_scaled_by_the_glorot_coefficient_and_clipped(optimizer: str) -> None:
    model = nn.Sequential(nn.Linear(20, 12, bias=False))  # fan_in + fan_out = 32
    lowbit.apply(model, lowbit.create("bnn"))
    weight = model[0].weight
    c = 1 / math.sqrt(1.5 / 32)
    assert abs(c - 4.6188) < 1e-4
    weight.data.fill_(0.5)
    weight.data[0, 0] = 0.98
    if optimizer == "adam":
        opt = lowbit.attach(model, torch.optim.Adam([weight], lr=0.01))
    else:
        opt = lowbit.attach(model, torch.optim.SGD([weight], lr=0.01 / c))
    weight.grad = torch.full_like(weight, -1.0)
    opt.step()
    assert weight[0, 0] == 1  # 0.98 + 0.046188, clipped
    assert abs(weight[1, 1].item() - 0.546188) < 1e-5
    weight.grad = torch.randn_like(weight) * 100
    for _ in range(5):
        opt.step()
    assert weight.abs().max() <= 1


@pytest.mark.parametrize("bad", [0, 9])
def test_refusal_names_the_value(bad: int) -> None:
    with pytest.raises(ValueError, match=str(bad)):
        lowbit.create("bnn", activation_bits=bad)


# ---- AP2 and shift-based batch norm ---------------------------------------------------------------------------------


def test_ap2_hand_made() -> None:
    pairs = {1: 1, 1.4: 1, 1.42: 2, 1.5: 2, 2.8: 2, 3: 4, 0.7: 0.5, 0.71: 1, -0.3: -0.25, -5.7: -8, 0: 0}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert ap2(torch.tensor([1.0, 1.5, -5.75, 0.0], dtype=dtype)).tolist() == [1, 2, -8, 0]
    assert ap2(torch.tensor(list(pairs), dtype=torch.float64)).tolist() == list(pairs.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ap2_switches_exactly_at_the_geometric_midpoint(dtype: torch.dtype) -> None:
    for k in (-1000, -120, -1, 0, 1, 100):
        if dtype == torch.float32 and k < -140:
            continue
        root = torch.tensor(math.sqrt(2), dtype=dtype)
        for step in (-2, -1, 0, 1, 2):
            t = root
            for _ in range(abs(step)):
                t = torch.nextafter(t, torch.tensor(math.copysign(9, step), dtype=dtype))
            upper = Fraction(t.item()) ** 2 > 2
            x = t * torch.tensor(2.0**k, dtype=dtype)
            assert ap2(x).item() == 2.0 ** (k + upper), (k, step)
            assert ap2(-x).item() == -(2.0 ** (k + upper))
    tiny = torch.tensor([torch.finfo(dtype).smallest_normal], dtype=dtype) * 2.0**-20
    assert torch.equal(ap2(tiny * 1.25), tiny)
    odd = ap2(torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=dtype))
    assert odd.isnan()[0] and odd[1:].tolist() == [math.inf, -math.inf, 0]
    x = torch.randn(5000, dtype=dtype).exp()
    assert ((ap2(x) / x).log2().abs() <= 0.5 + 1e-6).all()


def shift(x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(x == 0, 0, np.sign(x) * 2.0 ** np.round(np.log2(np.abs(x))))


@pytest.mark.parametrize("shape", [(40, 3), (6, 3, 5, 4)])
def test_shift_norm_forward_backward_and_running_values_equal_the_formulas(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, g = rng.normal(1, 3, shape), rng.normal(size=shape)
    gamma, beta = rng.normal(size=3), rng.normal(size=3)
    norm = ShiftBatchNorm(3).double()
    norm.weight.data, norm.bias.data = torch.tensor(gamma), torch.tensor(beta)
    t = torch.tensor(x, requires_grad=True)
    y = norm(t)
    y.backward(torch.tensor(g))

    axes = (0, *range(2, len(shape)))
    wide = (1, 3, *[1] * (len(shape) - 2))
    c = x - x.mean(axes, keepdims=True)
    istd = 1 / np.sqrt((c * shift(c)).mean(axes) + 1e-5)
    inv, slope = shift(istd).reshape(wide), shift(gamma).reshape(wide)
    np.testing.assert_allclose(y.detach(), slope * c * inv + beta.reshape(wide), atol=1e-12)
    cq = shift(c)
    mean = lambda v: v.mean(axes, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(t.grad, inv * slope * (g - mean(g) - cq * inv**2 * mean(cq * g)), atol=1e-12)
    np.testing.assert_allclose(norm.weight.grad, (shift(c * inv) * g).sum(axes), atol=1e-10)
    np.testing.assert_allclose(norm.bias.grad, g.sum(axes), atol=1e-10)
    np.testing.assert_allclose(norm.running_mean, 0.125 * x.mean(axes), atol=1e-12)
    np.testing.assert_allclose(norm.running_istd, 0.875 + 0.125 * istd, atol=1e-12)

    norm.eval()
    t.grad = None
    y = norm(t)
    y.backward(torch.tensor(g))
    fixed = shift(norm.running_istd.numpy()).reshape(wide)
    expected = slope * (x - norm.running_mean.numpy().reshape(wide)) * fixed + beta.reshape(wide)
    np.testing.assert_allclose(y.detach(), expected, atol=1e-12)
    np.testing.assert_allclose(t.grad, slope * fixed * g, atol=1e-12)


def test_shift_norm_stays_within_the_proved_factor_of_batch_norm() -> None:
    torch.manual_seed(0)
    for scale in (1e-2, 0.7, 1.0, 1.41, 30.0):
        x = torch.randn(256, 64) * scale * torch.rand(64).add(0.5)
        a, b = ShiftBatchNorm(64, eps=1e-12), nn.BatchNorm1d(64, eps=1e-12)
        a.weight.data = b.weight.data = torch.rand(64) + 0.3
        ratio = (a(x) / b(x)).abs()
        assert 1 / 2.3785 < ratio.min() and ratio.max() < 2.3785
        assert ratio.max() / ratio.min() > 1.5  # powers of two: it does differ


def test_shift_norm_takes_over_a_checkpoint_and_refuses_one_value() -> None:
    old = nn.BatchNorm2d(4)
    old.running_mean.normal_()
    old.running_var.uniform_(0.5, 4)
    for new in (ShiftBatchNorm.replacing(old), ShiftBatchNorm(4)):
        state = old.state_dict()
        new.load_state_dict(state)  # strict
        assert torch.equal(new.running_mean, old.running_mean) and "running_var" in state
        assert torch.allclose(new.running_istd, (old.running_var + 1e-5).rsqrt())
    with pytest.raises(ValueError, match=r"more than one value.*\(1, 4\)"):
        new(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="4, ..."):
        new(torch.zeros(2, 5))
    assert torch.isfinite(new(torch.zeros(8, 4))).all()
    assert new(torch.randn(8, 4).bfloat16()).dtype == torch.bfloat16


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, least",
    [({}, 0.9), ({"stochastic": True}, 0.85), ({"activation_bits": 2}, 0.9), ({"shift_norm": True}, 0.85)],
)
def test_learns_digits(options: dict, least: float) -> None:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    targets = 2 * nn.functional.one_hot(y, 10).float() - 1
    torch.manual_seed(0)
    model = lowbit.apply(network(), lowbit.create("bnn", **options))
    optimizer = lowbit.attach(model, torch.optim.Adam(model.parameters(), lr=3e-3))

    def accuracy() -> float:
        with torch.no_grad():
            return (model.eval()(x).argmax(-1) == y).float().mean().item()

    before = accuracy()
    for i in range(200):
        batch: Tensor = torch.randperm(len(x), generator=torch.Generator().manual_seed(i))[:64]
        optimizer.zero_grad()
        (1 - targets[batch] * model.train()(x[batch])).clamp_min(0).square().mean().backward()
        optimizer.step()
    assert before < 0.3 and accuracy() > least, accuracy()
    assert all(model[i].weight.abs().max() <= 1 for i in (0, 3, 6))
