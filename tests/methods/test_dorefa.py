"""DoReFa-Net, re-derived in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowbit
from lowbit.control import layers_of


def make(role: str, bits: int) -> lowbit.Quantizer:
    return lowbit.quantizer("dorefa", role, **{f"{role.lower()}_bits": bits})


def quantize_k(r: np.ndarray, k: int) -> np.ndarray:
    n = 2**k - 1
    return np.rint(r * n) / n


# ---- weights -------------------------------------------------------------------------------------


def test_worked_weights() -> None:
    w = torch.tensor([0.5, -1.0, 0.1], dtype=torch.float64)
    assert make("W", 2)(w).tolist() == pytest.approx([1 / 3, -1, 1 / 3])
    assert make("W", 1)(w).tolist() == pytest.approx([1.6 / 3, -1.6 / 3, 1.6 / 3])


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_weights_equal_the_formula(k: int) -> None:
    w = np.random.default_rng(k).standard_normal((20, 7)) * 1.5
    t = np.tanh(w)
    expected = 2 * quantize_k(t / (2 * np.abs(t).max()) + 0.5, k) - 1
    q = make("W", k)
    got = q(torch.tensor(w)).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-12)
    n = 2**k - 1
    odd = got * n
    np.testing.assert_allclose(np.abs(np.mod(np.rint(odd), 2)), 1)
    assert np.abs(got).max() == 1, "the largest weight maps to 1"
    assert torch.equal(q.encode(torch.tensor(w)).decode(), q(torch.tensor(w)))


def test_binary_weights() -> None:
    w = torch.tensor([[0.5, -0.25], [0.0, -0.0]], dtype=torch.float64)
    assert make("W", 1)(w).tolist() == [[0.1875, -0.1875], [0.1875, 0.1875]], "sign(0) = +1"
    assert make("W", 1)(torch.zeros(4)).tolist() == [0.0] * 4
    assert make("W", 3)(torch.zeros(4)).tolist() == pytest.approx([1 / 7] * 4)
    w.requires_grad_()
    up = torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=torch.float64)
    make("W", 1)(w).backward(up)
    assert torch.equal(w.grad, up), "mean|w| counts as a constant"


def test_weight_ties_go_to_the_even_code() -> None:
    # 2 bits: r = t / 2M + 1/2 = 5/6 lies between codes 2 and 3 of 3; r = 1/6 between 0 and 1
    q = make("W", 2)
    grid = q.spec.format.snap(torch.tensor([2.0, -2.0, 0.0], dtype=torch.float64), q.spec.rounding)
    assert (grid / 3).tolist() == pytest.approx([1 / 3, -1, 1 / 3])
    assert (2 * quantize_k(np.array([5 / 6, 1 / 6, 0.5]), 2) - 1).tolist() == pytest.approx([1 / 3, -1, 1 / 3])


def test_gradient_flows_through_tanh_and_the_maximum() -> None:
    rng = np.random.default_rng(1)
    w, up = rng.standard_normal(12), rng.standard_normal(12)
    x = torch.tensor(w, requires_grad=True)
    make("W", 2)(x).backward(torch.tensor(up))
    t = np.tanh(w)
    star, top = np.abs(t).argmax(), np.abs(t).max()
    dt = up / top
    dt[star] -= np.sign(t[star]) * (up * t).sum() / top**2
    np.testing.assert_allclose(x.grad.numpy(), dt * (1 - t**2), rtol=1e-10)
    assert abs(x.grad[star].item() - up[star] / top * (1 - t[star] ** 2)) > 0.1, "a detached maximum differs here"


# ---- activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_activations(k: int) -> None:
    x = np.random.default_rng(k).uniform(-0.5, 1.5, 500)
    t = torch.tensor(x, requires_grad=True)
    y = make("A", k)(t)
    np.testing.assert_allclose(y.detach().numpy(), quantize_k(np.clip(x, 0, 1), k), atol=1e-12)
    y.backward(torch.full((500,), 2.0, dtype=torch.float64))
    np.testing.assert_array_equal(t.grad.numpy(), 2.0 * ((x >= 0) & (x <= 1)))


def test_activation_bounds_and_ties() -> None:
    x = torch.tensor([0.0, 1.0, 0.5, -0.1, 1.1, 1.5], requires_grad=True)
    y = make("A", 1)(x)
    assert y.tolist() == [0, 1, 0, 0, 1, 1], "0.5 goes to the even code"
    y.sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 0, 0, 0]
    ties = torch.tensor([1.5 / 15, 2.5 / 15], dtype=torch.float64)
    assert make("A", 4)(ties).tolist() == pytest.approx([2 / 15, 2 / 15])


# ---- gradients -----------------------------------------------------------------------------------


def paper_error(e: np.ndarray, sigma: np.ndarray, k: int) -> np.ndarray:
    """The released order of operations; e is (N, D) and sigma uniform in [-1/2, 1/2]."""
    n = 2**k - 1
    m = np.abs(e).max(1, keepdims=True)
    r = np.clip(e / (2 * m) + 0.5 + sigma / n, 0, 1)
    return 2 * m * (quantize_k(r, k) - 0.5)


@pytest.mark.parametrize("k", [1, 2, 4, 6, 8])
def test_errors_equal_the_formula(k: int) -> None:
    rng = np.random.default_rng(k)
    e, u = rng.standard_normal((9, 40)), rng.random((9, 40))
    got = make("E", k)(torch.tensor(e), torch.tensor(u)).numpy()
    # rint(y + sigma) is up where frac(y) + sigma > 1/2: u = 1/2 - sigma
    np.testing.assert_allclose(got, paper_error(e, 0.5 - u, k), atol=1e-12)


def test_worked_error() -> None:
    q, e = make("E", 2), torch.tensor([[2.0, 0.5]], dtype=torch.float64)  # t = 0.75 lies 7/8 of the way from -1 to 1
    assert q(e, torch.full((1, 2), 0.874, dtype=torch.float64)).tolist() == [pytest.approx([2, 2 / 3])]
    assert q(e, torch.full((1, 2), 0.876, dtype=torch.float64)).tolist() == [pytest.approx([2, -2 / 3])]
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    values = q(e.expand(2000, 2).contiguous(), torch.stack([u, u], 1))
    assert values.mean(0).tolist() == pytest.approx([2.0, 0.5], abs=1e-9)
    assert (values[:, 1] > 0).double().mean().item() == 0.875


def test_error_is_unbiased_with_the_paper_variance() -> None:
    rng, k = np.random.default_rng(3), 3
    n, draws = 2**k - 1, 4000
    e = rng.standard_normal((4, 10))
    q, t = make("E", k), torch.tensor(e)
    values = np.stack([q(t, torch.tensor(rng.random(e.shape))).numpy() for _ in range(draws)])
    m = np.abs(e).max(1, keepdims=True)
    y = (e / (2 * m) + 0.5) * n
    f = y - np.floor(y)
    variance = f * (1 - f) * (2 * m / n) ** 2
    assert (np.abs(values.mean(0) - e) <= 6 * np.sqrt(variance / draws) + 20 * (2 * m / n) / draws).all()
    np.testing.assert_allclose(values.var(0).sum(1), variance.sum(1), rtol=0.1)
    np.testing.assert_allclose(values[:, np.abs(e) == m], np.broadcast_to(e[np.abs(e) == m], (draws, 4)), rtol=1e-15)


def test_zero_gradient_is_a_coin_toss() -> None:
    e = torch.zeros(1, 10_001, dtype=torch.float64)
    e[0, 0] = 3.0
    values = make("E", 4)(e, torch.rand(1, 10_001, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    rest = values[0, 1:]
    assert torch.equal(rest.abs(), torch.full_like(rest, 3 / 15))
    assert abs((rest > 0).double().mean().item() - 0.5) < 6 * 0.5 / 100
    assert rest.square().mean().item() == pytest.approx((3 / 15) ** 2)


def test_each_sample_has_its_own_scale() -> None:
    g = torch.Generator().manual_seed(5)
    e, u = torch.randn(4, 2, 3, 3, generator=g), torch.rand(4, 2, 3, 3, generator=g)
    q = make("E", 6)
    before = q(e, u)
    e[2] *= 8
    after = q(e, u)
    assert torch.equal(after[2], 8 * before[2])
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    assert torch.equal(before.abs().amax((1, 2, 3)) * torch.tensor([1, 1, 8, 1]), e.abs().amax((1, 2, 3)))


def test_sample_without_gradient_stays_zero() -> None:
    e = torch.zeros(2, 5)
    e[0, 1] = 1.0
    q, u = make("E", 6), torch.tensor([0.1, 0.9, 0.4, 0.6, 0.0]).expand(2, 5)
    y = q(e, u)
    assert torch.equal(y[1], torch.zeros(5)) and bool((y[0] != 0).all())
    assert torch.equal(q.encode(e, u).decode(), y)


# ---- layers --------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(64, 3))


def test_first_and_last_layer() -> None:
    model = lowbit.apply(network(), lowbit.create("dorefa"))
    found = {k: {r: q.spec.format.bits for r, q in v.slots.items()} for k, v in layers_of(model).items()}
    assert found == {"2": {"W": 1, "A": 2, "E": 6}, "5": {"A": 32}}
    every = layers_of(lowbit.apply(network(), lowbit.create("dorefa", quantize_ends=True)))
    assert list(every) == ["0", "2", "5"] and all(set(v.slots) == {"W", "A", "E"} for v in every.values())


def test_last_layer_clips_its_input_only() -> None:
    model = lowbit.apply(network(), lowbit.create("dorefa"))
    last = model[5]
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(5, 64, generator=g) * 2).requires_grad_()
    e = torch.randn(5, 3, generator=g)
    y = last(x)
    clipped = x.detach().clamp(0, 1)
    torch.testing.assert_close(y, F.linear(clipped, last.weight, last.bias), rtol=0, atol=0)
    y.backward(e)
    inside = (x.detach() >= 0) & (x.detach() <= 1)
    torch.testing.assert_close(x.grad, e @ last.weight.detach() * inside, rtol=0, atol=0)
    torch.testing.assert_close(last.weight.grad, e.t() @ clipped, rtol=1e-6, atol=1e-6)
    q = last.quant.slots["A"]
    assert torch.equal(q.encode(x.detach()).decode(), clipped)


def test_error_is_quantized_before_the_products_of_a_layer() -> None:
    model = lowbit.apply(nn.Sequential(nn.Linear(4, 3, bias=False)), lowbit.create("dorefa", quantize_ends=True))
    quant = layers_of(model)["0"]
    seen: list[Tensor] = []
    quant.slots["E"].watch = lambda q, x, y, coded: seen.append(y)  # type: ignore[assignment]
    g = torch.Generator().manual_seed(2)
    x = torch.rand(6, 4, generator=g).requires_grad_()
    model(x).backward(torch.randn(6, 3, generator=g))
    (qe,) = seen
    w, a = quant.slots["W"](model[0].weight).detach(), quant.slots["A"](x.detach())
    torch.testing.assert_close(x.grad, qe @ w, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model[0].weight.grad, qe.t() @ a, rtol=1e-6, atol=1e-6)


def test_32_bits_are_float() -> None:
    recipe = lowbit.create("dorefa", w_bits=32, a_bits=32, e_bits=32)
    assert recipe.roles == lowbit.Roles()
    assert all(r.roles == lowbit.Roles() for r in recipe.rules), "nothing is clipped with the ReLU in the model"
    roles = lowbit.create("dorefa", w_bits=1, a_bits=4, e_bits=32).roles
    assert set(roles.named()) == {"W", "A"}


def test_mean_gradient_is_that_of_quantization_aware_training() -> None:
    g = torch.Generator().manual_seed(8)
    x = torch.rand(6, 4, generator=g, dtype=torch.float64)
    target = torch.randn(6, 3, generator=g, dtype=torch.float64)

    def grads(model: nn.Module) -> Tensor:
        model.zero_grad()
        (model(x) - target).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def build(recipe: lowbit.Recipe) -> nn.Module:
        torch.manual_seed(0)
        return lowbit.apply(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double(), recipe)

    full = lowbit.create("dorefa", w_bits=2, e_bits=3, quantize_ends=True)
    exact = grads(build(lowbit.Recipe("qat", lowbit.Roles(W=full.roles.W, A=full.roles.A))))
    model, runs = build(full), 800
    draws = torch.stack([grads(model) for _ in range(runs)])
    noise = draws.std(0) / math.sqrt(runs)
    assert bool(((draws.mean(0) - exact).abs() <= 6 * noise + 1e-9).all())
    assert 0 < float(noise.norm()) < 0.1 * float(exact.norm())


# ---- a real run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def trained(digits: tuple[Tensor, Tensor], **options: int) -> float:
    x, y = digits
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 10)
    )
    lowbit.apply(model, lowbit.create("dorefa", **options))
    optimizer = lowbit.attach(model, torch.optim.Adam(model.parameters(), 3e-3))
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        i = torch.randint(0, 1400, (64,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((model(x[1400:]).argmax(-1) == y[1400:]).float().mean())


@pytest.mark.parametrize("bits", [(1, 2, 6), (1, 1, 4), (4, 4, 4)])
def test_trains(digits: tuple[Tensor, Tensor], bits: tuple[int, int, int]) -> None:
    w, a, e = bits
    assert trained(digits, w_bits=w, a_bits=a, e_bits=e) > 0.84


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": 0}, "w_bits is 1 to 8"),
        ({"a_bits": 16}, "a_bits"),
        ({"e_bits": 9}, "e_bits"),
        ({"w_bits": 2.0}, "w_bits"),
        ({"g_bits": 4}, "e_bits"),
    ],
)
def test_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.create("dorefa", **options)
