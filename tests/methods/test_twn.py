from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowbit

EXAMPLE = [0.9, -0.1, 0.3, -0.7, 0.05, 0.4]


def make(**options: object) -> lowbit.Quantizer:
    return lowbit.quantizer("twn", "W", **options)


def error(q: lowbit.Quantizer, w: Tensor) -> float:
    return float((q(w) - w).square().sum())


def test_worked_example() -> None:
    w = torch.tensor(EXAMPLE, dtype=torch.float64)
    np.testing.assert_allclose(make()(w), [0.575, 0, 0.575, -0.575, 0, 0.575], atol=1e-12)
    assert abs(error(make(), w) - (1.5625 - 4 * 0.575**2)) < 1e-12 and abs(error(make(), w) - 0.24) < 1e-4
    best = make(exact=True)
    np.testing.assert_allclose(best(w), [2 / 3, 0, 0, -2 / 3, 0, 2 / 3], atol=1e-12)
    assert abs(error(best, w) - 0.229167) < 1e-6


def test_threshold_is_strict() -> None:
    # mean|w| = 1: a weight of exactly 0.7 mean|w| is zero, one above is kept
    w = torch.tensor([0.75, 1.25, 0.75, 1.25])
    assert make(threshold=0.75)(w).tolist() == [0, 1.25, 0, 1.25]
    assert make(threshold=0.7499999)(w).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("threshold", [0.7, 0.75])
def test_values_and_gradient_equal_the_formulas_in_float64(threshold: float) -> None:
    rng = np.random.default_rng(0)
    w, upstream = rng.normal(0.1, 1, (6, 5, 3, 3)), rng.normal(size=(6, 5, 3, 3))
    x = torch.tensor(w, requires_grad=True)
    for blocks, axes in ((lowbit.PerTensor(), (0, 1, 2, 3)), (lowbit.PerAxis(0), (1, 2, 3))):
        q = make(threshold=threshold, blocks=blocks)(x)
        keep = np.abs(w) > threshold * np.abs(w).mean(axes, keepdims=True)
        alpha = (np.abs(w) * keep).sum(axes, keepdims=True) / keep.sum(axes, keepdims=True)
        np.testing.assert_allclose(q.detach(), alpha * np.sign(w) * keep, atol=1e-12)
        (x.grad,) = torch.autograd.grad(q, x, torch.tensor(upstream))
        np.testing.assert_array_equal(x.grad, upstream)  # identity, no alpha, no clipping


@pytest.mark.parametrize("blocks", [lowbit.PerTensor(), lowbit.PerAxis(0)])
def test_exact_solution_is_the_best_of_all_supports(blocks: lowbit.PerTensor | lowbit.PerAxis) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        w = rng.laplace(size=(2, 9))
        q = make(exact=True, blocks=blocks)(torch.tensor(w)).numpy()
        groups = w if isinstance(blocks, lowbit.PerAxis) else w.reshape(1, -1)
        total = 0.0
        for row in groups:
            top = np.sort(np.abs(row))[::-1]
            gains = [top[:k].sum() ** 2 / k for k in range(1, len(top) + 1)]  # error = sum w^2 - gain
            total += (row**2).sum() - max(gains)
        assert abs(((q - w) ** 2).sum() - total) < 1e-10
        for rule in (make(blocks=blocks), make(threshold=0.0, blocks=blocks)):  # 0.7, and binary with zeros left out
            assert total <= float((rule(torch.tensor(w)) - torch.tensor(w)).square().sum()) + 1e-10


def test_exact_keeps_tied_weights_together_and_survives_strange_blocks() -> None:
    q = make(exact=True)
    assert q(torch.tensor([1.0, -1.0, 1.0, 0.1])).tolist() == [1, -1, 1, 0]
    assert q(torch.zeros(5)).tolist() == [0] * 5
    assert q(torch.tensor([2.0])).tolist() == [2.0]
    for factor in (1e-38, 1e37):
        w = torch.tensor(EXAMPLE) * factor
        np.testing.assert_allclose(q(w) / factor, q(torch.tensor(EXAMPLE)), rtol=1e-6)
    x = torch.tensor([1.0, torch.nan, 2.0])
    assert q(x).isnan().tolist()[1]


def quantiles(density: str, n: int = 200_000) -> Tensor:
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    v = 2 * u - 1
    if density == "normal":
        return torch.erfinv(v) * math.sqrt(2)
    return v if density == "uniform" else -v.sign() * torch.log1p(-v.abs())


RELATIVE = {"normal": (0.19162, 0.19017), "uniform": (0.11153, 1 / 9), "laplace": (0.28243, 1 - 2 / math.e)}


@pytest.mark.parametrize("density", sorted(RELATIVE))
def test_error_on_known_densities(density: str) -> None:
    w = quantiles(density)
    rule, best = RELATIVE[density]
    power = float(w.square().sum())
    assert abs(error(make(), w) / power - rule) < 2e-4
    assert abs(error(make(exact=True), w) / power - best) < 2e-4


def test_figures_of_the_normal_density() -> None:
    w = quantiles("normal")
    q = make()(w)
    assert abs(float(q.max()) - 1.18416) < 1e-4 and abs(float((q == 0).double().mean()) - 0.4235) < 1e-4
    kept = float(w.abs()[q != 0].min())
    assert abs(kept - 0.55852) < 1e-4
    assert abs(error(make(threshold=0.75), w) / float(w.square().sum()) - 0.19027) < 1e-4
    best = make(exact=True)(w)
    assert abs(float(best.max()) - 1.224006) < 1e-4 and abs(float((best == 0).double().mean()) - 0.4595) < 3e-4
    laplace = quantiles("laplace")
    assert abs(float((make(exact=True)(laplace) == 0).double().mean()) - 0.632) < 2e-3


@pytest.mark.parametrize("exact", [False, True])
def test_equivariance(exact: bool) -> None:
    q, w = make(exact=exact), torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(q(3.7 * w), 3.7 * q(w), atol=1e-12)
    assert torch.equal(q(-w), -q(w))


def test_two_bits_are_stored_and_an_empty_support_is_zero() -> None:
    w = torch.randn(1000)
    stored = make().encode(w)
    assert stored.codes.numel() == 250 and torch.equal(stored.decode(), make()(w))
    per_filter = make(blocks=lowbit.PerAxis(0))(torch.stack([torch.zeros(4), torch.ones(4)]))
    assert per_filter.tolist() == [[0] * 4, [1] * 4]


@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_refusal_names_the_value(bad: float) -> None:
    with pytest.raises(ValueError, match=str(bad)):
        lowbit.create("twn", threshold=bad)


@pytest.mark.parametrize("exact", [False, True])
def test_learns_digits(exact: bool) -> None:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    lowbit.apply(model, lowbit.create("twn", exact=exact))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))

    def accuracy() -> float:
        return (model(x).argmax(-1) == y).float().mean().item()

    before = accuracy()
    for i in range(150):
        batch = torch.randperm(len(x), generator=torch.Generator().manual_seed(i))[:64]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    assert before < 0.3 and accuracy() > 0.93, accuracy()
