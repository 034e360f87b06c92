from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowbit
from lowbit.scales import SAWB, sawb

EVEN, ZERO = ("even", 2), ("zero", 2)


def weight(bits: int = 2, levels: str = "even", **options: object) -> lowbit.Quantizer:
    return lowbit.quantizer("sawb", "W", bits=bits, levels=levels, **options)


def clip(w: Tensor, bits: int, levels: str) -> float:
    return sawb(bits, levels).clip(w.reshape(1, -1)).item()  # type: ignore[arg-type]


def reference(w: np.ndarray, alpha: float, bits: int, levels: str) -> np.ndarray:
    n = 2**bits - 1 if levels == "even" else 2**bits - 2
    return alpha * (2 * np.round(n * (np.clip(w / alpha, -1, 1) / 2 + 0.5)) / n - 1)


@pytest.mark.parametrize(
    "levels, alpha, expected",
    [
        ("even", 0.4194, [0.4194, -0.1398, 0.1398, -0.1398]),
        ("zero", 0.351625, [0.351625, -0.351625, 0, 0]),
    ],
)
def test_worked_example(levels: str, alpha: float, expected: list[float]) -> None:
    w = torch.tensor([0.5, -0.2, 0.1, -0.05], dtype=torch.float64)
    assert abs(clip(w, 2, levels) - alpha) < 1e-9
    np.testing.assert_allclose(weight(2, levels)(w), expected, atol=1e-9)


@pytest.mark.parametrize("levels, bits", sorted(SAWB))
def test_values_clip_and_mask_equal_the_formulas_in_float64(levels: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    w, upstream = rng.laplace(0.02, 0.3, 3000), rng.normal(size=3000)
    c1, c2 = SAWB[levels, bits]
    alpha = c1 * math.sqrt((w**2).mean()) - c2 * np.abs(w).mean()  # about zero, not about the mean
    x = torch.tensor(w, requires_grad=True)
    q = weight(bits, levels)(x)
    q.backward(torch.tensor(upstream))
    np.testing.assert_allclose(q.detach(), reference(w, alpha, bits, levels), atol=1e-13)
    np.testing.assert_array_equal(x.grad, upstream * (np.abs(w) <= alpha))  # no term through m1 and m2
    if bits <= 4:
        assert len(np.unique(q.detach().numpy().round(12))) == (2**bits if levels == "even" else 2**bits - 1)

    x.grad = None
    weight(bits, levels, mask=False)(x).backward(torch.tensor(upstream))
    np.testing.assert_array_equal(x.grad, upstream)


def test_ties_of_the_set_with_zero_go_to_the_even_multiple() -> None:
    q = weight(4, "zero")
    w = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = clip(w, 4, "zero") / 7
    fmt = q.spec.format
    assert fmt.snap(torch.tensor([0.5, 1.5, -2.5, 6.5], dtype=torch.float64)).tolist() == [0, 2, -2, 6]
    assert torch.equal(q(w), fmt.snap(w / step) * step)


def test_equivariance_and_invariance() -> None:
    w = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for levels, bits in SAWB:
        alpha = clip(w, bits, levels)
        assert abs(clip(-3.5 * w, bits, levels) - 3.5 * alpha) < 1e-12
        assert abs(clip(w.flip(0), bits, levels) - alpha) < 1e-12
        assert abs(clip(w * (torch.arange(400) % 2 * 2 - 1), bits, levels) - alpha) < 1e-12
        tiny = clip(w.float() * 1e-37, bits, levels)
        assert abs(tiny / 1e-37 / alpha - 1) < 1e-5, "squares of tiny weights do not vanish"


def quantiles(density: str, n: int = 40_000) -> np.ndarray:
    """Equally probable values of a density, symmetric about 0."""
    u = (np.arange(n) + 0.5) / n
    v = np.abs(2 * u - 1)  # |x| has this as its distribution function
    if density == "gaussian":
        x = torch.erfinv(torch.tensor(v)).numpy() * math.sqrt(2)
    elif density == "uniform":
        x = v
    elif density == "laplace":
        x = -np.log1p(-v)
    elif density == "logistic":
        x = np.log((1 + v) / (1 - v))
    else:
        x = 1 - np.sqrt(1 - v)
    return np.sign(2 * u - 1) * x


OPTIMAL = {  # m2 / m1, then the MSE-optimal clip / m1 for 3, 4, 8, 16 levels
    "gaussian": (1.2533, 1.5341, 1.8719, 2.5706, 3.1508),
    "uniform": (1.1547, 1.3333, 1.5000, 1.7500, 1.8750),
    "laplace": (1.4142, 2.0000, 2.3067, 3.6179, 4.8895),
    "logistic": (1.3084, 1.6512, 2.0638, 3.0356, 3.9594),
    "triangle": (1.2247, 1.5000, 1.7525, 2.2256, 2.5179),
}
WORST = {("even", 2): 1.006, ("even", 3): 1.012, ("even", 4): 1.016, ("zero", 2): 1.006, ("zero", 4): 1.009}
TRIANGLE = {("even", 4): 1.089, ("zero", 4): 1.088}


@pytest.mark.parametrize("density", sorted(OPTIMAL))
def test_clip_is_close_to_the_best_one(density: str) -> None:
    x = quantiles(density)
    m1, m2 = np.abs(x).mean(), math.sqrt((x**2).mean())
    ratio, _, *rest = OPTIMAL[density]
    assert abs(m2 / m1 - ratio) < 2e-3
    for bits, optimal, within in zip((2, 3, 4), rest, (0.026, 0.036, 0.085), strict=True):
        assert abs(clip(torch.tensor(x), bits, "even") / m1 / optimal - 1) < within + 0.002
    w = torch.tensor(x)
    for (levels, bits), bound in WORST.items():
        alpha = clip(w, bits, levels)

        def mse(a: float, bits: int = bits, levels: str = levels) -> float:
            return float(((reference(x, a, bits, levels) - x) ** 2).mean())

        best = min(mse(a) for a in alpha * np.linspace(0.85, 1.15, 61))
        ours = float((weight(bits, levels)(w) - w).square().mean())
        assert abs(ours / mse(alpha) - 1) < 1e-9
        bound = TRIANGLE.get((levels, bits), bound) if density == "triangle" else bound
        assert ours / best <= bound + 0.001, (levels, bits, ours / best)


def test_clipping_at_the_maximum_is_several_times_worse() -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    for bits, factor in ((2, 8.9), (3, 4.4), (4, 3.1)):
        step = x.abs().max() / (2**bits - 1)
        naive = (lowbit.Even(bits).snap(x / step) * step - x).square().mean()
        ours = (weight(bits)(x) - x).square().mean()
        assert 0.85 < naive / ours / factor < 1.15


def test_two_spikes_fall_back_to_the_largest_weight_and_it_keeps_its_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    c1, c2 = SAWB["even", 4]
    for i in range(100):
        w = (1 + 0.01 * torch.rand(64, generator=generator)) * (0.1 + i) * (torch.arange(64) % 2 * 2 - 1)
        assert c1 * w.square().mean().sqrt() - c2 * w.abs().mean() < 0
        assert abs(clip(w, 4, "even") / w.abs().max().item() - 1) < 1e-6
        w.requires_grad_()
        weight(4)(w).sum().backward()
        assert w.grad is not None and (w.grad == 1).all()


def test_recipe_leaves_ends_and_shortcuts_in_float() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
            self.downsample = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
            self.fc = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.fc((self.conv(x) + self.downsample(x)).relu().mean((2, 3)))

    left = {r.layer for r in lowbit.report(lowbit.apply(Block(), lowbit.create("sawb"))).rows if r.role == "-"}
    assert left == {"stem", "fc", "downsample.0"}
    model = lowbit.apply(Block(), lowbit.create("sawb", fpsc=False, activation_bits=4))
    rows = {(r.layer, r.role): r.bits for r in lowbit.report(model, torch.randn(2, 3, 6, 6)).rows}
    assert rows["downsample.0", "W"] == 2 and rows["conv", "A"] == 4
    assert lowbit.penalty(model) == 0
    model(torch.randn(2, 3, 6, 6))
    assert abs(lowbit.penalty(model).item() - 2 * 1e-4 * 100) < 1e-6  # two clips of 10


@pytest.mark.parametrize("options", [{"bits": 6}, {"bits": 8}, {"levels": "odd"}, {"bits": 3, "levels": "zero"}])
def test_bits_without_published_coefficients_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="no coefficients.*2 bits even"):
        lowbit.create("sawb", **options)


@pytest.mark.parametrize("levels", ["even", "zero"])
def test_learns_digits_with_two_bits(levels: str) -> None:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    lowbit.apply(model, lowbit.create("sawb", levels=levels, clip=3.0))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    for i in range(200):
        batch = torch.randperm(len(x), generator=torch.Generator().manual_seed(i))[:64]
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x[batch]), y[batch]) + lowbit.penalty(model)).backward()
        optimizer.step()
    accuracy = (model.eval()(x).argmax(-1) == y).float().mean().item()
    assert accuracy > 0.9, accuracy
