from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowbit
from lowbit.control import quantizers_of


def activation(alpha: float, bits: int = 2) -> lowbit.Quantizer:
    return lowbit.quantizer("pact", "A", bits=bits, clip=alpha)


def weight(bits: int) -> lowbit.Quantizer:
    return lowbit.quantizer("pact", "W", bits=bits)


def test_worked_example_with_its_ties_and_both_masks() -> None:
    q = activation(1.5)
    x = torch.tensor([-1, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 3], requires_grad=True)
    y = q(x)
    assert y.tolist() == [0, 0, 0, 0.5, 1, 1, 1, 1.5, 1.5]
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert q.learned.grad.item() == 2
    for i, expected in enumerate([0, 0, 0, 0, 0, 0, 0, 1, 1]):
        q.learned.grad = None
        q(x.detach())[i].backward()
        assert q.learned.grad.item() == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_forward_and_gradients_equal_the_formulas_in_float64(bits: int) -> None:
    rng = np.random.default_rng(bits)
    x, upstream, alpha, n = rng.normal(0, 2, 9000), rng.normal(size=9000), 1.7, 2**bits - 1
    q = activation(alpha, bits).double()
    t = torch.tensor(x, requires_grad=True)
    y = q(t)
    y.backward(torch.tensor(upstream))
    clipped = 0.5 * (np.abs(x) - np.abs(x - alpha) + alpha)
    np.testing.assert_allclose(y.detach().numpy(), np.round(clipped * n / alpha) * alpha / n, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(t.grad.numpy(), upstream * ((x >= 0) & (x < alpha)))
    np.testing.assert_allclose(q.learned.grad.item(), upstream[x >= alpha].sum(), rtol=1e-12)

    assert np.abs(y.detach().numpy() - clipped).max() <= alpha / (2 * n) * (1 + 1e-12)
    levels = np.unique(y.detach().numpy())
    assert len(levels) == 2**bits and levels[0] == 0 and np.isclose(levels[-1], alpha)

    # the gradient is that of the clip before quantization, and not that of the quantized values
    def loss(a: float, quantized: bool) -> float:
        c = 0.5 * (np.abs(x) - np.abs(x - a) + a)
        return float((upstream * (np.round(c * n / a) * a / n if quantized else c)).sum())

    plain, stepped = ((loss(alpha + 1e-6, s) - loss(alpha - 1e-6, s)) / 2e-6 for s in (False, True))
    assert abs(plain - q.learned.grad.item()) < 1e-4 < abs(stepped - q.learned.grad.item())


def test_a_clip_far_above_the_data_is_far_worse_than_one_that_fits() -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)).abs()
    error = {a: (activation(a)(x) - x).square().mean().item() for a in (0.3, 1.0, 2.0, 5.0, 10.0)}
    assert error[2.0] < error[1.0] < error[0.3] and error[2.0] < error[5.0] < error[10.0]
    assert error[10.0] > 8 * error[2.0]


def test_penalty_is_the_only_force_below_the_clip_and_decay_does_not_count_twice() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    lowbit.apply(model, lowbit.create("pact", decay=0.01))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1))
    assert lowbit.penalty(model) == 0  # no clip before the first batch
    for step in range(3):
        (model(torch.rand(8, 4)).sum() * 0 + lowbit.penalty(model)).backward()
        (clip,) = [q.learned for q in quantizers_of(model) if hasattr(q, "learned")]
        assert torch.isclose(clip.grad, 0.01 * clip.detach()).all()
        optimizer.step()
        optimizer.zero_grad()
        assert abs(clip.item() - 10 * (1 - 0.5 * 0.01) ** (step + 1)) < 1e-5
    assert abs(lowbit.penalty(model).item() - 0.005 * clip.item() ** 2) < 1e-6


def test_weights_hand_made() -> None:
    w = torch.tensor([0.5, -1, 0.1])
    assert torch.allclose(weight(2)(w), torch.tensor([1 / 3, -1, 1 / 3]), atol=1e-7)
    for bits in range(2, 9):
        q = weight(bits)(torch.randn(2000, generator=torch.Generator().manual_seed(bits)))
        odd = q.double() * (2**bits - 1)
        assert q.abs().max() == 1 and (odd.round() % 2 == 1).all() and (odd - odd.round()).abs().max() < 1e-4
    assert torch.equal(weight(2)(torch.zeros(3)), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("bits", [2, 4])
def test_weight_gradient_passes_tanh_and_the_maximum(bits: int) -> None:
    rng = np.random.default_rng(5)
    w, d = rng.normal(0, 0.7, 60), rng.normal(size=60)
    x = torch.tensor(w, requires_grad=True)
    q = weight(bits)
    y = q(x)
    y.backward(torch.tensor(d))
    t, n = np.tanh(w), 2**bits - 1
    peak, star = np.abs(t).max(), np.abs(t).argmax()
    np.testing.assert_allclose(y.detach(), 2 * np.round(n * (t / (2 * peak) + 0.5)) / n - 1, atol=1e-12)
    dt = d / peak
    dt[star] -= np.sign(t[star]) * (d * t).sum() / peak**2
    np.testing.assert_allclose(x.grad, dt * (1 - t**2), rtol=1e-12)


def test_weight_calibration_factor() -> None:
    # (1 - tanh^2 w) / max|tanh w| of w = [.5, -1]; only the largest weight has a term beyond it
    x = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    weight(2)(x)[0].backward()
    assert x.grad is not None and abs(x.grad[0].item() - 1.03264) < 1e-5
    assert abs(x.grad[1].item() - 0.55144 * 0.46212 / 0.76159) < 1e-5  # -sign(t*) t / M^2 (1 - t*^2)


def test_ends() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))

    model = lowbit.apply(network(), lowbit.create("pact", bits=2))
    assert {r.layer for r in lowbit.report(model).rows if r.role == "-"} == {"0", "4"}
    model = lowbit.apply(network(), lowbit.create("pact", bits=2, ends=8))
    rows = {(r.layer, r.role): r for r in lowbit.report(model, torch.randn(16, 4)).rows}
    assert [rows[name, "W"].bits for name in "024"] == [8, 2, 8]
    assert [rows[name, "A"].format for name in "024"] == [
        "Int(bits=8, signed=True, narrow=True)",
        "Int(bits=2, signed=False, narrow=False)",
        "Int(bits=8, signed=False, narrow=False)",
    ]
    assert rows["0", "A"].sqnr > 30, "a negative input of the network is not cut off"


@pytest.mark.parametrize(
    "options", [{"bits": 1}, {"bits": 9}, {"ends": 1}, {"clip": 0.0}, {"clip": float("nan")}, {"decay": -1e-4}]
)
def test_refusals_name_the_value(options: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        lowbit.create("pact", **options)


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def test_a_clip_that_starts_too_small_grows_and_the_network_learns() -> None:
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    lowbit.apply(model, lowbit.create("pact", bits=2, clip=0.02))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    for i in range(200):
        batch = torch.randperm(len(x), generator=torch.Generator().manual_seed(i))[:64]
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x[batch]), y[batch]) + lowbit.penalty(model)).backward()
        optimizer.step()
    (clip,) = [q.learned.item() for q in quantizers_of(model) if hasattr(q, "learned")]
    assert clip > 0.3, clip
    accuracy = (model.eval()(x).argmax(-1) == y).float().mean().item()
    assert accuracy > 0.9, accuracy
