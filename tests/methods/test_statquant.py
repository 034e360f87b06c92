"""PTQ, PSQ and BHQ gradients, re-derived in float64 with dense matrices."""

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
from lowbit.methods.statquant import PerFeature, bhq_groups
from lowbit.ops.reflect import reflect

NAMES = ("ptq_sgd", "psq", "bhq")
EPS = 1e-8


def heavy(rows: int = 16, cols: int = 24, large: int = 3, seed: int = 0) -> np.ndarray:
    """A matrix with a few rows far larger than the others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols)) * 0.02
    x[rng.permutation(rows)[:large]] *= 50
    return x


def error(name: str, bits: int = 4, **options: object) -> lowbit.Quantizer:
    return lowbit.quantizer(name, "E", bits=bits, **options)


# ---- the paper's quantizers, with loops and dense matrices ---------------------------------------


def stochastic(y: np.ndarray, u: np.ndarray) -> np.ndarray:
    return np.floor(y) + (u < y - np.floor(y))


def ptq(x: np.ndarray, u: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = min(x.min() - EPS, 0.0), max(x.max() + EPS, 0.0)
    zero = math.floor(-low * top / (high - low))
    s = top / ((zero - top) * low / zero - low)
    y = (x - low) * s
    frac = y - np.floor(y)
    return stochastic(y, u) / s + low, frac * (1 - frac) / s**2


def psq(x: np.ndarray, u: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = x.min(1, keepdims=True) - EPS, x.max(1, keepdims=True) + EPS
    s = top / (high - low)
    y = (x - low) * s
    frac = y - np.floor(y)
    return stochastic(y, u) / s + low, frac * (1 - frac) / s**2


def half_away(value: float) -> int:
    return int(math.floor(value + 0.5))


def householder(n: int) -> np.ndarray:
    if n == 1:
        return np.ones((1, 1))
    v = np.full(n, 1 / math.sqrt(n))
    v[0] -= 1
    return np.eye(n) - 2 * np.outer(v, v) / (v @ v)


def groups_of(ranges: np.ndarray) -> list[list[int]]:
    """Rows of each group, the leader first, by the released procedure."""
    order = sorted(range(len(ranges)), key=lambda i: -ranges[i])
    v = [float(ranges[i]) for i in order]
    n, z, total = len(v), 0, sum(v)
    while z < n - 1:
        z += 1
        total = sum(v[: n - z])
        if z * v[n - z - 1] / total > 1:
            break
    lead = n - z
    total, done, before, out = sum(v[:lead]), 0.0, 0, []
    for i in range(lead):
        done += z * v[i] / total
        count = half_away(done)
        out.append([order[i], *(order[lead + j] for j in range(before, count))])
        before = count
    return out


def transform(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """BHQ's dense S and its inverse."""
    ranges = x.max(1) - x.min(1) + EPS
    s, inverse = np.zeros((len(x), len(x))), np.zeros((len(x), len(x)))
    for rows in groups_of(ranges):
        n = len(rows)
        h = householder(n)
        scales = np.ones(1)
        if n > 1:
            w1, w2 = ranges[rows[0]] / math.sqrt(n), ranges[rows[1]] * np.abs(h).max()
            s1, s2 = w1 ** (-1 / 3), (w2 / (n - 1)) ** (-1 / 3)
            scales = np.array([s1] + [s2] * (n - 1)) * math.sqrt(1 / s1**2 + 1 / s2**2)
        s[np.ix_(rows, rows)] = h * scales
        inverse[np.ix_(rows, rows)] = h / scales[:, None]
    return s, inverse


def bhq(x: np.ndarray, u: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    s, inverse = transform(x)
    y, variance = psq(s @ x, u, top)
    return inverse @ y, inverse**2 @ variance


PAPER = {"ptq_sgd": ptq, "psq": psq, "bhq": bhq}


# ---- one matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 61])
def test_equals_the_formulas(name: str, rows: int, bits: int) -> None:
    x, u = heavy(rows, 24, min(3, rows)), np.random.default_rng(1).random((rows, 24))
    expected, _ = PAPER[name](x, u, 2**bits - 1)
    got = error(name, bits)(torch.tensor(x), torch.tensor(u)).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_unbiased_and_variance(name: str) -> None:
    x, rng, q, draws = heavy(), np.random.default_rng(2), error(name), 2000
    t = torch.tensor(x)
    values = np.stack([q(t, torch.tensor(rng.random(x.shape))).numpy() for _ in range(draws)])
    _, variance = PAPER[name](x, np.zeros_like(x), 15)
    # an element that moves in a fraction p of the draws: the spread of the mean, and of a rare move
    assert (np.abs(values.mean(0) - x) <= 6 * np.sqrt(variance / draws) + 20 * np.sqrt(variance.max()) / draws).all()
    np.testing.assert_allclose(values.var(0).sum(), variance.sum(), rtol=0.05)
    np.testing.assert_allclose(values.var(0).sum(1), variance.sum(1), rtol=0.3)


def total_variance(name: str, x: np.ndarray, bits: int) -> float:
    return float(PAPER[name](x, np.zeros_like(x), 2**bits - 1)[1].sum())


def test_variance_is_ordered_and_within_the_bounds() -> None:
    for seed in range(5):
        x = heavy(seed=seed)
        n, d = x.shape
        found = {name: total_variance(name, x, 4) for name in NAMES}
        assert 3 * found["bhq"] < found["psq"] and 2 * found["psq"] < found["ptq_sgd"]
        scale = error("ptq_sgd").encode(torch.tensor(x), torch.zeros(x.shape)).scale.item()
        assert found["ptq_sgd"] <= n * d * scale**2 / 4
        ranges = x.max(1) - x.min(1) + 2 * EPS
        assert found["psq"] <= d / (4 * 15**2) * (ranges**2).sum()


def test_one_large_row_costs_an_nth() -> None:
    n, d = 64, 400
    x = np.zeros((n, d))
    x[5] = np.random.default_rng(3).uniform(-1, 1, d)
    bound = d * 2.0**2 / (4 * 15**2)  # PSQ's for a row of range 2
    assert total_variance("psq", x, 4) < bound
    assert total_variance("bhq", x, 4) < 1.1 * bound / n


@pytest.mark.parametrize("name", NAMES)
def test_equivariant_under_scaling_and_permutation(name: str) -> None:
    rng = np.random.default_rng(4)
    x, u = heavy(), rng.random((16, 24))
    q = error(name, epsilon=1e-30)
    base = q(torch.tensor(x), torch.tensor(u)).numpy()
    np.testing.assert_allclose(q(torch.tensor(x * 1e-6), torch.tensor(u)).numpy(), base * 1e-6, rtol=1e-9, atol=1e-18)
    p = rng.permutation(16)
    np.testing.assert_allclose(q(torch.tensor(x[p]), torch.tensor(u[p])).numpy(), base[p], atol=1e-12)


def test_zero_is_exact_in_ptq_only() -> None:
    x = torch.tensor([[0.0, -0.3, 0.7], [0.0, 0.2, 0.0]], dtype=torch.float64)
    for value in (0.0, 0.5, 0.999):
        u = torch.full_like(x, value)
        assert (error("ptq_sgd")(x, u)[x == 0] == 0).all()
    code = error("ptq_sgd").encode(x, torch.zeros_like(x))
    assert code.zero.item() == math.floor(0.3 * 15) and code.scale.item() == pytest.approx(0.3 / 4, rel=1e-6)
    assert (error("psq")(x, torch.zeros_like(x))[0, 0] != 0).item(), "0 lies between two codes of its row"


@pytest.mark.parametrize("low", [0.0, -0.004, -1.0])
@pytest.mark.parametrize("high", [0.0, 1.0])
def test_ptq_never_clips(low: float, high: float) -> None:
    x = torch.tensor([[low, high, high / 3, low / 2]], dtype=torch.float64)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    mean = torch.stack([error("ptq_sgd")(x, torch.full_like(x, float(v))) for v in u]).mean(0)
    assert (mean - x).abs().max().item() < 1e-4, "a small negative element gets a code of its own"
    zero = error("ptq_sgd").encode(x, torch.zeros_like(x)).zero.item()
    assert zero == {0.0: 0.0 if high else 7.0, -0.004: 1.0 if high else 14.0, -1.0: 7.0 if high else 14.0}[low]


# ---- groups and the reflection -------------------------------------------------------------------


def dense(ranges: list[float]) -> tuple[Tensor, Tensor]:
    group, v, s = bhq_groups(torch.tensor(ranges, dtype=torch.float64))
    eye = torch.eye(len(ranges), dtype=torch.float64)
    return reflect(eye, group, v, before=s), reflect(eye, group, v, after=1 / s)


def test_worked_group_of_four() -> None:
    group, v, s = bhq_groups(torch.tensor([10.0, 1.0, 1.0, 1.0]))
    assert group.tolist() == [0, 0, 0, 0]
    assert v.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert s.tolist() == pytest.approx([1.050512, 3.264184, 3.264184, 3.264184], rel=1e-6)
    matrix, inverse = dense([10.0, 1.0, 1.0, 1.0])
    signs = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]).double()
    columns = torch.tensor([0.525256, 1.632092, 1.632092, 1.632092]).double()
    torch.testing.assert_close(matrix, signs * columns, rtol=1e-5, atol=0)
    torch.testing.assert_close(matrix @ inverse, torch.eye(4).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("ranges", "groups"),
    [
        ([4, 4, 1, 1, 1, 1, 1, 1], [[0, 2, 3, 4], [1, 5, 6, 7]]),
        ([1, 1, 1, 1], [[0, 1, 2, 3]]),
        ([1, 10, 1, 1], [[0, 1, 2, 3]]),
        ([3, 2], [[0, 1]]),
        ([5], [[0]]),
    ],
)
def test_worked_groups(ranges: list[float], groups: list[list[int]]) -> None:
    group = bhq_groups(torch.tensor(ranges, dtype=torch.float64))[0].tolist()
    assert [[i for i, g in enumerate(group) if g == k] for k in range(max(group) + 1)] == groups


def test_cumulative_counts_round_halves_up() -> None:
    # ranges 3, 1, 1, ..: leaders 3 and 3 share 5 rows as 2.5, 5 -> 3 and 2
    group = bhq_groups(torch.tensor([3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]))[0].tolist()
    assert group == [0, 1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("seed", range(6))
def test_groups_equal_the_released_procedure(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranges = np.exp(rng.standard_normal(int(rng.integers(3, 300))) * rng.uniform(0.1, 3))
    group = bhq_groups(torch.tensor(ranges))[0].tolist()
    for number, rows in enumerate(groups_of(ranges)):
        assert {group[i] for i in rows} == {number}
    matrix, inverse = dense(ranges.tolist())
    one = torch.eye(len(ranges)).double()
    torch.testing.assert_close(matrix @ inverse, one, rtol=0, atol=1e-9)


def test_reflection_is_the_householder_block() -> None:
    n = 7
    v = torch.full((n,), 1 / math.sqrt(n), dtype=torch.float64)
    v[0] -= 1
    h = reflect(torch.eye(n, dtype=torch.float64), torch.zeros(n, dtype=torch.int64), v)
    torch.testing.assert_close(h, torch.tensor(householder(n)), rtol=0, atol=1e-14)
    torch.testing.assert_close(h @ h, torch.eye(n).double(), rtol=0, atol=1e-14)
    assert h[0].tolist() == pytest.approx([1 / math.sqrt(n)] * n)
    assert h[1, 1].item() == pytest.approx(1 - 1 / (n - math.sqrt(n)))
    assert h[1, 2].item() == pytest.approx(-1 / (n - math.sqrt(n)))


def test_many_rows_stay_exact_in_float32() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 8, generator=g) * torch.randn(1024, 1, generator=g).mul(2).exp()
    q = error("bhq", 8)
    u = torch.rand(1024, 8, generator=g)
    assert torch.equal(q.encode(x, u).decode(), q(x, u))
    expected, _ = bhq(x.double().numpy(), u.double().numpy(), 255)
    moved = np.abs(q(x, u).numpy() - expected) > 1e-4 * np.abs(x.numpy()).max()
    assert moved.mean() < 1e-3, "float32 changes a draw in few places"


@pytest.mark.parametrize("name", NAMES)
def test_strange_matrices(name: str) -> None:
    q = error(name)
    assert torch.equal(q(torch.zeros(4, 3), torch.zeros(4, 3)).abs() < 2e-8, torch.ones(4, 3, dtype=torch.bool))
    same = q(torch.full((4, 3), 5e6), torch.full((4, 3), 0.5))
    torch.testing.assert_close(same, torch.full((4, 3), 5e6), rtol=0.07 if name == "ptq_sgd" else 1e-6, atol=0)
    vector = torch.tensor([1.0, -2.0, 0.5])
    u = torch.tensor([0.3, 0.4, 0.6])
    assert torch.equal(q(vector, u), q(vector[None], u[None])[0]), "a vector is one sample"


# ---- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recipe(name: str) -> None:
    recipe = lowbit.create(name, bits=4)
    roles, again = recipe.roles, recipe.products.grad_w.left
    assert (roles.E.format.bits, again.format.bits, roles.W.format.bits, roles.A.format.bits) == (4, 8, 8, 8)
    assert type(again.blocks).__name__ == ("PerTensor" if name == "ptq_sgd" else "PerFeature")
    assert (roles.W.scale.zero, roles.A.scale.zero) == ("code", "real")
    assert recipe.rules == (), "first and last layer too"
    defaults = {"ptq_sgd": 8, "psq": 5, "bhq": 5}
    assert lowbit.create(name).roles.E.format.bits == defaults[name]


def test_weight_gradient_has_a_range_for_each_feature() -> None:
    x = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spec = lowbit.create("psq").products.grad_w.left
    assert spec.blocks == PerFeature()
    q = lowbit.Quantizer.make(spec, lowbit.layers.CONV.E)
    u = torch.rand(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    columns = x.reshape(5, -1).numpy().T
    expected, _ = psq(columns, u.reshape(5, -1).numpy().T, 255)
    np.testing.assert_allclose(q(x, u).reshape(5, -1).numpy().T, expected, atol=1e-12)
    assert torch.equal(q.encode(x, u).decode(), q(x, u))


def test_conv_errors_are_matrices_of_samples() -> None:
    x = torch.tensor(heavy(6, 24)).reshape(6, 2, 3, 4)
    u = torch.rand(6, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for name in ("psq", "bhq"):
        expected, _ = PAPER[name](x.reshape(6, 24).numpy(), u.numpy(), 15)
        got = error(name)(x, u.reshape(x.shape)).reshape(6, 24).numpy()
        np.testing.assert_allclose(got, expected, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_two_products_see_independent_draws(name: str) -> None:
    torch.manual_seed(0)
    model = lowbit.apply(nn.Sequential(nn.Linear(6, 6, bias=False)).double(), lowbit.create(name, bits=8))
    quant = layers_of(model)["0"]
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(q: lowbit.Quantizer, x: Tensor, y: Tensor, coded: object) -> None:
        seen[q.name] = tuple(q.spec.blocks.unview(t, torch.Size((200, 6)), q.layout) for t in (x, y))  # type: ignore

    for slot in ("E", "grad_w_left"):
        quant.slots[slot].watch = watch  # type: ignore[assignment]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(200, 6, generator=g, dtype=torch.float64).requires_grad_()
    e = torch.randn(200, 6, generator=g, dtype=torch.float64)
    model(x).backward(e)
    (raw, for_input), (again, for_weight) = seen["0.E"], seen["0.grad_w_left"]
    assert torch.equal(raw, e) and torch.equal(again, e)
    w, a = quant.slots["W"](model[0].weight), quant.slots["A"](x.detach())
    torch.testing.assert_close(x.grad, for_input @ w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].weight.grad, for_weight.t() @ a, rtol=1e-12, atol=1e-12)
    noise = torch.stack([(for_input - e).flatten(), (for_weight - e).flatten()])
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 6 / math.sqrt(1200)


@pytest.mark.parametrize("name", NAMES)
def test_mean_gradient_is_that_of_quantization_aware_training(name: str) -> None:
    g = torch.Generator().manual_seed(8)
    x = torch.randn(6, 4, generator=g, dtype=torch.float64) * torch.tensor([5.0, 1, 1, 0.1, 0.1, 0.1])[:, None]
    target = torch.randn(6, 3, generator=g, dtype=torch.float64)

    def grads(model: nn.Module) -> Tensor:
        model.zero_grad()
        (model(x) - target).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def build(recipe: lowbit.Recipe) -> nn.Module:
        torch.manual_seed(0)
        return lowbit.apply(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double(), recipe)

    full = lowbit.create(name, bits=2)
    exact = grads(build(lowbit.Recipe("qat", lowbit.Roles(W=full.roles.W, A=full.roles.A))))
    model, runs = build(full), 500
    draws = torch.stack([grads(model) for _ in range(runs)])
    noise = draws.std(0) / math.sqrt(runs)
    assert bool(((draws.mean(0) - exact).abs() <= 6 * noise + 1e-6).all())
    first = slice(0, 20)  # the first layer's weights see the 2-bit error of the second
    assert 0 < float(noise[first].norm()) < 0.1 * float(exact[first].norm())


# ---- a real gradient, a real run -----------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(model: nn.Module, digits: tuple[Tensor, Tensor], steps: int) -> None:
    x, y = digits
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        i = torch.randint(0, 1400, (64,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()


def test_variance_is_ordered_on_a_real_gradient(digits: tuple[Tensor, Tensor]) -> None:
    model = mlp()
    train(model, digits, 150)  # by now few samples still have a large gradient
    x, y = digits
    hidden = model[:3](x[:128])
    hidden.retain_grad()
    F.cross_entropy(model[3:](hidden), y[:128], reduction="sum").backward()
    e = hidden.grad.double().numpy()
    found = {name: total_variance(name, e, 4) for name in NAMES}
    assert 2 * found["bhq"] < found["psq"] and 2 * found["psq"] < found["ptq_sgd"], found


@pytest.mark.parametrize("name", NAMES)
def test_trains_with_four_bit_gradients(name: str, digits: tuple[Tensor, Tensor]) -> None:
    model = lowbit.apply(mlp(), lowbit.create(name, bits=4))
    train(model, digits, 150)
    model.eval()
    with torch.no_grad():
        accuracy = float((model(digits[0][1400:]).argmax(-1) == digits[1][1400:]).float().mean())
    assert accuracy > 0.84


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "2 to 8"),
        ({"bits": 1}, "2 to 8"),
        ({"bits": 4.5}, "2 to 8"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"bit": 4}, "did you mean 'bits'"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.create(name, **options)
