"""LUQ: its rounding, its scales and its claims, re-derived in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowbit
from lowbit.control import control_of, layers_of
from lowbit.formats import FP16
from lowbit.scales import Moments

EXAMPLE = [8.0, 3.0, 0.1, -0.01]  # alpha = 8 / 2^7 = 0.0625: the magnitudes are 128, 48, 1.6 and 0.16 alpha
MIDPOINTS = (np.arange(10_000) + 0.5) / 10_000


def error(**options: object) -> lowbit.Quantizer:
    return lowbit.quantizer("luq", "E", **options)


def paper(x: np.ndarray, u: np.ndarray, k: int = 7) -> np.ndarray:
    """LUQ by the paper's formulas; the upper neighbour of the signed value is taken when u < its probability."""
    alpha = np.abs(x).max() / 2**k
    m = np.abs(x) / alpha
    low = np.where(m < 1, 0.0, 2.0 ** np.floor(np.log2(np.maximum(m, 1))))
    high = np.where(m < 1, 1.0, np.minimum(2 * low, 2**k))
    away = np.where(high > low, (m - low) / np.where(high > low, high - low, 1), 0)  # probability of the larger one
    larger = np.where(x >= 0, u < away, u >= 1 - away)
    return np.sign(x) * alpha * np.where(larger, high, low)


def moments(x: list[float], **options: object) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of E's quantizer over 10,000 evenly spaced uniforms."""
    q = error(**options)
    t = torch.tensor(x, dtype=torch.float64)
    values = np.stack([q(t, torch.full_like(t, float(u))).numpy() for u in MIDPOINTS[::10]])
    return values.mean(0), values.var(0)


# ---- the gradient --------------------------------------------------------------------------------


def test_worked_example() -> None:
    q, x = error(), torch.tensor(EXAMPLE)

    def at(u: float) -> list[float]:
        return q(x, torch.full_like(x, u)).tolist()

    assert at(0.4) == [8.0, 4.0, 0.125, 0.0]
    assert at(0.59) == [8.0, 2.0, 0.125, 0.0]
    assert at(0.61) == [8.0, 2.0, 0.0625, 0.0]
    assert at(0.83) == [8.0, 2.0, 0.0625, 0.0]
    assert at(0.85) == [8.0, 2.0, 0.0625, -0.0625]


def test_mean_and_variance_of_the_example() -> None:
    mean, variance = moments(EXAMPLE)
    np.testing.assert_allclose(mean, EXAMPLE, rtol=0, atol=5e-5)
    np.testing.assert_allclose(variance, [0, 1.0, 0.0009375, 0.000525], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("levels", [7, "strict", 3])
def test_equals_the_formulas(levels: int | str) -> None:
    rng = np.random.default_rng(0)
    x, u = rng.standard_normal(4000) * np.exp(2 * rng.standard_normal(4000)), rng.random(4000)
    got = error(levels=levels)(torch.tensor(x), torch.tensor(u)).numpy()
    np.testing.assert_array_equal(got, paper(x, u, 6 if levels == "strict" else int(levels)))


def test_unbiased_with_six_sigma_and_variance_bounds() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal(64) * np.exp(1.5 * rng.standard_normal(64))
    q, t, draws = error(), torch.tensor(x), 4000
    values = torch.stack([q(t, torch.tensor(rng.random(64))) for _ in range(draws)]).numpy()
    alpha, a = np.abs(x).max() / 128, np.abs(x)
    low = alpha * 2.0 ** np.floor(np.log2(np.maximum(a / alpha, 1)))
    variance = np.where(a < alpha, a * (alpha - a), (a - low) * (2 * low - a))
    variance[a == a.max()] = 0
    assert (np.abs(values.mean(0) - x) <= 6 * np.sqrt(variance / draws) + 1e-12).all()
    np.testing.assert_allclose(values.var(0).sum(), variance.sum(), rtol=0.1)
    assert (variance[a >= alpha] <= x[a >= alpha] ** 2 / 8 + 1e-15).all()
    assert (variance[a < alpha] <= alpha**2 / 4).all()


def test_grid_and_fixed_points() -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 3
    u = torch.rand(2000, generator=torch.Generator().manual_seed(2))
    q = error()
    y, alpha = q(x, u), x.abs().max() / 128
    powers = (y / alpha)[y != 0].abs().log2()
    assert torch.equal(powers, powers.round()) and powers.min() == 0 and powers.max() == 7
    assert y.abs().max() == x.abs().max()
    assert ((y == 0) | (y.sign() == x.sign())).all()
    assert torch.equal(q(y, u), y), "powers of two times alpha don't move"
    assert q(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0])).tolist() == [0.0, 1.0]
    assert error().encode(x, u).format.levels().numel() == 17 and error().spec.format.bits == 5
    assert error(levels="strict").encode(x, u).format.levels().numel() == 15
    assert error(levels="strict").spec.format.bits == 4


def test_the_scale_is_of_magnitudes() -> None:
    assert error()(torch.tensor([-8.0, 1.0, 2.0]), torch.full((3,), 0.99)).tolist() == [-8.0, 1.0, 2.0]
    down = error()(torch.tensor([-8.0, -1.5]), torch.tensor([0.5, 0.6]))
    assert down.tolist() == [-8.0, -2.0]


def test_zeros_stay_zero() -> None:
    assert torch.equal(error()(torch.zeros(5), torch.zeros(5)), torch.zeros(5))


def test_nearest_power() -> None:
    q = error(rounding="nearest")
    x = torch.tensor([128, 1, 1.49, 1.5, 2.99, 3, 5.9, 6])
    assert q(x).tolist() == [128, 1, 1, 2, 2, 4, 4, 8]
    assert q(-x).tolist() == [-128, -1, -1, -2, -2, -4, -4, -8]
    formula = 2 ** torch.floor(torch.log2(4 * x / 3))
    assert q(x).tolist() == formula.tolist()
    assert q(torch.tensor([128, 0.999, -0.8, 0.5])).tolist() == [128, 0, 0, 0], "hard underflow"


def test_pruning_with_nearest_power() -> None:
    mean, variance = moments([128.0, 0.25, -0.6, 1.49, 1.5], rounding="prune_nearest")
    np.testing.assert_allclose(mean, [128, 0.25, -0.6, 1, 2], atol=1e-3)
    np.testing.assert_allclose(variance, [0, 0.25 * 0.75, 0.6 * 0.4, 0, 0], atol=1e-3)


def test_power_of_two_alpha_clips_nothing() -> None:
    mean, _ = moments([5.0, 0.3, -0.02], pow2_alpha=True)  # alpha = 2^ceil(log2(5 / 128)) = 1 / 16
    np.testing.assert_allclose(mean, [5, 0.3, -0.02], atol=2e-3)
    q = error(pow2_alpha=True)
    assert q.encode(torch.tensor([5.0]), torch.zeros(1)).scale.item() == 1 / 16
    assert q(torch.tensor([5.0]), torch.tensor([0.2])).item() == 8.0, "up with probability 1/4"


def test_hindsight_is_the_average_of_the_past() -> None:
    q, eta = error(hindsight=True, eta=0.25), 0.25
    peaks, m = [4.0, 16.0, 2.0, 1.0], 4.0
    expected = [4.0]
    for last in peaks[:-1]:
        m = (1 - eta) * last + eta * m
        expected.append(m)
    u = torch.full((2,), 0.5)
    got = [q.encode(torch.tensor([p, -0.01]), u).scale.item() * 128 for p in peaks]
    assert got == pytest.approx(expected)
    assert q(torch.tensor([1000.0, 0.0]), u)[0].item() == pytest.approx((1 - eta) * 1.0 + eta * m), "clipped"


def test_hindsight_counts_a_batch_once_whatever_the_samples() -> None:
    layer = nn.Sequential(nn.Linear(3, 2))
    lowbit.apply(layer, lowbit.create("luq", hindsight=True, samples=3, quantize_ends=True))
    quant = layers_of(layer)["0"].slots["E"]
    scales = []
    quant.watch = lambda q, x, y, coded: scales.append(coded.scale.item() * 128)
    for peak in (2.0, 6.0, 1.0):
        layer(torch.rand(1, 3)).backward(torch.tensor([[peak, 0.1]]))
    assert int(quant.seen) == 3
    assert scales == pytest.approx([2.0] * 3 + [2.0] * 3 + [0.9 * 6 + 0.1 * 2] * 3)


# ---- weights and activations ---------------------------------------------------------------------


def sawb(x: np.ndarray, c1: float, c2: float) -> float:
    clip = c1 * math.sqrt((x**2).mean()) - c2 * np.abs(x).mean()
    return clip if clip > 0 else np.abs(x).max()


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("role", ["W", "A"])
def test_forward_grid(role: str, reference: bool) -> None:
    x = np.random.default_rng(2).standard_normal(3000)
    low, high = {(False, "W"): (-7, 7), (False, "A"): (-7, 7), (True, "W"): (-8, 8), (True, "A"): (-8, 15)}[
        reference, role
    ]
    clip = sawb(x, 12.1, 12.2) if reference else sawb(x, 12.035, 12.03)
    step = 2 * clip / (high - low)
    expected = step * np.clip(np.rint(x / step), low, high)
    got = lowbit.quantizer("luq", role, reference=reference)(torch.tensor(x)).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert len(np.unique(got.round(9))) == high - low + 1


def test_activations_without_a_negative_element_take_sixteen_levels() -> None:
    x = np.abs(np.random.default_rng(3).standard_normal(3000))
    step = 2 * sawb(x, 12.035, 12.03) / 15
    q = lowbit.quantizer("luq", "A").encode(torch.tensor(x))
    assert q.scale.item() == pytest.approx(step, rel=1e-12)
    codes = q.integers().numpy().ravel()
    np.testing.assert_array_equal(codes, np.clip(np.rint(x / step), 0, 15))
    assert codes.min() == 0 and 10 <= codes.max() <= 15


def test_clip_on_a_gaussian() -> None:
    # E|x| = sqrt(2 / pi): clip / sigma = c1 - c2 sqrt(2 / pi)
    for c1, c2, expected in ((12.035, 12.03, 2.4364), (12.1, 12.2, 2.3658)):
        assert c1 - c2 * math.sqrt(2 / math.pi) == pytest.approx(expected, abs=1e-4)
        x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert Moments(c1, c2, 1.0).clip(x[None]).item() == pytest.approx(expected, abs=0.03)


def test_clip_falls_back_to_the_maximum() -> None:
    spikes = torch.tensor([1.0, -1.0] * 9, dtype=torch.float64)  # rms and mean magnitude are 1
    assert Moments(12.1, 12.2, 1.0).clip(spikes[None]).item() == 1.0, "12.1 - 12.2 is negative"
    assert torch.equal(lowbit.quantizer("luq", "W", reference=True)(spikes), spikes)
    clip = lowbit.quantizer("luq", "W").encode(spikes).scale.item() * 7
    assert clip == pytest.approx(12.035 - 12.03), "positive, if only just: no fallback"


def test_ties_go_to_the_even_code() -> None:
    q = lowbit.quantizer("luq", "W")
    w = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    step = q.encode(w).scale
    coded = lowbit.formats.Int(4, narrow=True)
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 6.5], dtype=torch.float64)
    assert coded.snap(halves, q.spec.rounding).tolist() == [0, 2, 2, 0, -2, 6]
    assert (q(w) / step).abs().max().item() == 7.0


@pytest.mark.parametrize("role", ["W", "A"])
def test_gradient_passes_beyond_the_clip(role: str) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(5)).mul(2).requires_grad_()
    q = lowbit.quantizer("luq", role)
    up = torch.randn(50, generator=torch.Generator().manual_seed(6))
    assert bool((x.abs() > 7 * q.encode(x.detach()).scale).any())
    q(x).backward(up)
    assert torch.equal(x.grad, up)


def test_forward_never_rounds_at_random() -> None:
    roles = lowbit.create("luq").roles
    assert (roles.W.rounding, roles.A.rounding, roles.E.rounding) == ("half_even", "half_even", "stochastic")


# ---- samples and unbiasedness in a network -------------------------------------------------------


def gradients(samples: int, runs: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Weight and input gradients of one layer over many backward passes, and E."""
    g = torch.Generator().manual_seed(7)
    layer = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    with torch.no_grad():
        layer[0].weight.copy_(torch.randn(3, 4, generator=g, dtype=torch.float64))
    lowbit.apply(layer, lowbit.create("luq", samples=samples, quantize_ends=True))
    x = torch.randn(8, 4, generator=g, dtype=torch.float64).requires_grad_()
    e = torch.randn(8, 3, generator=g, dtype=torch.float64)
    at_w, at_x = [], []
    for _ in range(runs):
        layer.zero_grad()
        x.grad = None
        layer(x).backward(e)
        at_w.append(layer[0].weight.grad.clone())
        at_x.append(x.grad.clone())
    return torch.stack(at_w).numpy(), torch.stack(at_x).numpy(), e


def test_samples_divide_the_variance_of_the_weight_gradient_only() -> None:
    runs = 600
    one_w, one_x, e = gradients(1, runs)
    four_w, four_x, _ = gradients(4, runs)
    assert four_w.var(0).sum() / one_w.var(0).sum() == pytest.approx(1 / 4, rel=0.15)
    assert four_x.var(0).sum() / one_x.var(0).sum() == pytest.approx(1, rel=0.15)
    noise = np.sqrt(one_w.var(0) / runs + four_w.var(0) / runs)
    assert (np.abs(one_w.mean(0) - four_w.mean(0)) <= 6 * noise).all()
    # and its size is that of the element variances: sum over rows of Var(e) a^2
    q = lowbit.quantizer("luq", "A")
    g = torch.Generator().manual_seed(7)
    torch.randn(3, 4, generator=g, dtype=torch.float64)
    a = q(torch.randn(8, 4, generator=g, dtype=torch.float64)).numpy()
    x = e.numpy()
    alpha, m = np.abs(x).max() / 128, np.abs(x)
    low = alpha * 2.0 ** np.floor(np.log2(np.maximum(m / alpha, 1)))
    var = np.where(m < alpha, m * (alpha - m), (m - low) * (2 * low - m)) * (m < m.max())
    assert one_w.var(0).sum() == pytest.approx((var.T @ a**2).sum(), rel=0.15)


def test_mean_gradient_is_that_of_quantization_aware_training() -> None:
    g = torch.Generator().manual_seed(8)
    x = torch.randn(6, 4, generator=g, dtype=torch.float64)
    target = torch.randn(6, 3, generator=g, dtype=torch.float64)

    def grads(model: nn.Module) -> Tensor:
        model.zero_grad()
        (model(x) - target).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def build(recipe: lowbit.Recipe) -> nn.Module:
        torch.manual_seed(0)
        return lowbit.apply(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double(), recipe)

    full = lowbit.create("luq", quantize_ends=True)
    exact = grads(build(lowbit.Recipe("qat", lowbit.Roles(W=full.roles.W, A=full.roles.A))))
    model, runs = build(full), 800
    draws = torch.stack([grads(model) for _ in range(runs)])
    noise = draws.std(0) / math.sqrt(runs)
    assert bool(((draws.mean(0) - exact).abs() <= 6 * noise + 1e-9).all())
    biased = grads(build(lowbit.create("luq", quantize_ends=True, rounding="nearest")))
    assert float((biased - exact).norm()) > 10 * float(noise.norm()), "RDNP is biased by far more than that"


# ---- the claims ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("spread", "least", "most"), [(0.5, 1.2, 2.5), (1.0, 5, 30), (2.0, 5, 60)])
def test_variance_is_below_that_of_uniform_int4(spread: float, least: float, most: float) -> None:
    rng = np.random.default_rng(9)
    x = np.exp(spread * rng.standard_normal(20_000))
    q, t = error(), torch.tensor(x)
    log = np.stack([q(t, torch.tensor(rng.random(len(x)))).numpy() for _ in range(30)]).var(0).sum()
    y = x * 7 / x.max()
    uniform = ((y - np.floor(y)) * (1 - y + np.floor(y))).sum() * (x.max() / 7) ** 2
    assert least < uniform / log < most


def test_deterministic_underflow_loses_part_of_the_sum() -> None:
    rng = np.random.default_rng(10)
    x = np.exp(1.5 * rng.standard_normal(2000))
    t = torch.tensor(x)
    nearest = error(rounding="nearest")(t).numpy().sum() / x.sum() - 1
    draws = [error()(t, torch.tensor(rng.random(len(x)))).numpy().sum() / x.sum() - 1 for _ in range(200)]
    assert nearest < -0.05
    assert abs(np.mean(draws)) < 6 * np.std(draws) / math.sqrt(200) < 0.1 * abs(nearest)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def trained(digits: tuple[Tensor, Tensor], steps: int = 200, **options: object) -> float:
    """Accuracy on the last 397 digits after a short run, all layers quantized."""
    x, y = digits
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    lowbit.apply(model, lowbit.create("luq", quantize_ends=True, **options))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        i = torch.randint(0, 1400, (64,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((model(x[1400:]).argmax(-1) == y[1400:]).float().mean())


def test_trains_with_four_bits(digits: tuple[Tensor, Tensor]) -> None:
    assert trained(digits) > 0.83


def test_unbiased_beats_nearest_when_most_gradients_underflow(digits: tuple[Tensor, Tensor]) -> None:
    unbiased, biased = trained(digits, levels=2), trained(digits, levels=2, rounding="nearest")
    assert unbiased > biased + 0.3 and unbiased > 0.65


# ---- fine-tuning, ends, options ------------------------------------------------------------------


def test_fine_tuning_stage() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    recipe = lowbit.create("luq", quantize_ends=True, fnt_start=2, fnt_steps=4, lr_base=0.5, lr_final=0.1)
    lowbit.apply(model, recipe)
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.3))
    quant = layers_of(model)["0"]
    rates, seen = [], []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(round(o.param_groups[0]["lr"], 6)))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(8):
        y = model(x)
        seen.append((quant.role("E") is None, str(quant.role("A").spec.format), quant.role("W").spec.format.bits))
        optimizer.zero_grad()
        y.square().sum().backward()
        optimizer.step()
    four, half = (False, "Int(bits=4, signed=True, narrow=True)", 4), (True, str(FP16), 4)
    assert seen == [four] * 2 + [half] * 4 + [four] * 2
    assert rates == [0.3, 0.3, 0.1, 0.3, 0.5, 0.3, 0.3, 0.3], "up from lr_final to lr_base and down again"
    assert int(control_of(model).step) == 8


def test_inputs_are_half_precision_while_fine_tuning() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    lowbit.apply(model, lowbit.create("luq", quantize_ends=True, fnt_start=0, fnt_steps=2, lr_final=0.1))
    lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    w = lowbit.quantizer("luq", "W")(model[0].weight)
    assert torch.equal(model(x), x.half().float() @ w.t())
    model(x).backward(e := torch.randn(5, 4, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(model[0].weight.grad, e.t() @ x.half().float())


def test_first_and_last_layer_are_float() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 3))

    model = lowbit.apply(network(), lowbit.create("luq"))
    assert list(layers_of(model)) == ["2"]
    assert list(layers_of(lowbit.apply(network(), lowbit.create("luq", quantize_ends=True)))) == ["0", "2", "4"]
    layer = layers_of(model)["2"]
    assert {k: v.spec.format.bits for k, v in layer.slots.items()} == {"W": 4, "A": 4, "E": 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 0}, "levels is K"),
        ({"levels": "loose"}, "'strict'"),
        ({"levels": 2.5}, "levels is K"),
        ({"rounding": "nearst"}, "did you mean 'nearest'"),
        ({"samples": 0}, "at least 1"),
        ({"samples": 1.5}, "integer"),
        ({"samples": 2, "rounding": "nearest"}, "random"),
        ({"eta": 1.0}, "eta"),
        ({"fnt_steps": 3}, "fnt_start"),
        ({"fnt_start": 3}, "fnt_steps"),
        ({"fnt_steps": -1}, "fnt_steps"),
        ({"fnt_start": 0, "fnt_steps": 3, "lr_final": 0.1, "lr_base": 0.0}, "lr_base"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.create("luq", **options)
