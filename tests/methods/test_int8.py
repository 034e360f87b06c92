from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowbit
from lowbit.control import layers_of

NEAREST = {"stochastic": False}


def codes(x: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales with one scale for each index that is not in `axes`, as float32 arithmetic gives them."""
    x = x.astype(np.float32)
    scale = np.abs(x).max(axes, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    return np.round(x / scale).astype(np.int64), scale


def run(layer: nn.Module, x: Tensor, e: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input gradient and weight gradient of a layer after `int8`."""
    layer = lowbit.apply(nn.Sequential(copy.deepcopy(layer)), lowbit.create("int8", **options))[0]
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(e)
    assert x.grad is not None
    return y.detach(), x.grad, layer.weight.grad


# ---- the three products ---------------------------------------------------------------------------------------------


def test_linear_products_are_exact_integer_sums_until_the_final_scaling() -> None:
    rng = np.random.default_rng(0)
    x, w, e = rng.normal(size=(3, 20, 70)), rng.normal(size=(50, 70)), rng.normal(size=(3, 20, 50))
    x *= np.logspace(-3, 3, 20)[None, :, None]  # scales on a wrong axis would show
    layer = nn.Linear(70, 50, bias=False)
    layer.weight.data = torch.tensor(w, dtype=torch.float32)
    got = run(layer, torch.tensor(x, dtype=torch.float32), torch.tensor(e, dtype=torch.float32), **NEAREST)
    flat = x.reshape(60, 70), e.reshape(60, 50)

    def product(left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        (a, s), (b, t) = left, right
        return (a @ b).astype(np.float32) * (s * t)

    (a_row, s_row), (w_row, t_row) = codes(flat[0], (1,)), codes(w, (1,))
    (e_row, u_row), (w_col, t_col) = codes(flat[1], (1,)), codes(w, (0,))
    (e_col, u_col), (a_col, s_col) = codes(flat[1], (0,)), codes(flat[0], (0,))
    np.testing.assert_array_equal(got[0].reshape(60, 50), product((a_row, s_row), (w_row.T, t_row.T)))
    np.testing.assert_array_equal(got[1].reshape(60, 70), product((e_row, u_row), (w_col, t_col)))
    np.testing.assert_array_equal(got[2], product((e_col.T, u_col.T), (a_col, s_col)))


CONVS = {
    "plain": (nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), 1, False),
    "grouped": (nn.Conv2d(6, 8, 3, padding=1, dilation=2, groups=2, bias=False), 2, False),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, bias=False), 6, False),
    "transposed": (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, bias=False), 1, True),
    "transposed, grouped": (nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2, bias=False), 2, True),
}


@pytest.mark.parametrize("name", sorted(CONVS))
def test_convolutions_sum_integers_exactly_and_agree_with_float64(name: str) -> None:
    layer, groups, transposed = CONVS[name]
    torch.manual_seed(1)
    x = torch.randn(4, 6, 9, 8) * torch.logspace(-2, 2, 4).reshape(4, 1, 1, 1)
    x *= torch.logspace(-1, 1, 6).reshape(6, 1, 1)
    e = torch.randn_like(layer(x)) * torch.logspace(-1, 1, layer.out_channels).reshape(-1, 1, 1)
    nn.init.normal_(layer.weight)
    got = run(layer, x, e, accumulate="int32", **NEAREST)

    def grid(t: Tensor, axes: tuple[int, ...]) -> Tensor:
        c, s = codes(t.detach().numpy(), axes)
        return torch.tensor(c * s.astype(np.float64))

    out_axis = 1 if transposed else 0
    not_out, not_in = (tuple(d for d in range(4) if d != a) for a in (out_axis, 1 - out_axis))

    def products(a: Tensor, w: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        twin = copy.deepcopy(layer).double()
        twin.weight.data = w
        a = a.clone().requires_grad_()
        y = twin(a)
        y.backward(e)
        return y.detach(), a.grad, twin.weight.grad  # type: ignore[return-value]

    w = layer.weight
    sample, channel = (1, 2, 3), (0, 2, 3)
    y, _, _ = products(grid(x, sample), grid(w, not_out), e.double())
    _, grad_a, _ = products(x.double(), grid(w, not_in), grid(e, sample))
    _, _, grad_w = products(grid(x, channel), w.double(), grid(e, channel))
    for value, exact in zip(got, (y, grad_a, grad_w), strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=3e-7, atol=1e-12)  # two roundings of float32


def test_attention_products_sum_integers_and_agree_with_float() -> None:
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(3, 7, 16)
    results = []
    for accumulate in ("int32", "float32"):
        model = nn.ModuleList([copy.deepcopy(layer)])
        options = {"accumulate": accumulate, "layers": ("linear", "attention")}
        lowbit.apply(model, lowbit.create("int8", **options, **NEAREST))
        t = x.clone().requires_grad_()
        y, _ = model[0](t, t, t)
        y.square().sum().backward()
        results.append((y.detach(), t.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.equal(results[0][0], layer(x, x, x)[0])


def test_relative_error_of_each_product_is_about_one_percent() -> None:
    torch.manual_seed(0)
    layer, x, e = nn.Linear(512, 256, bias=False), torch.randn(256, 512), torch.randn(256, 256)
    nn.init.normal_(layer.weight)
    exact = (x @ layer.weight.t()).detach(), (e @ layer.weight).detach(), e.t() @ x
    for value, true in zip(run(layer, x, e, **NEAREST), exact, strict=True):
        assert 0.007 < float((value - true).norm() / true.norm()) < 0.012


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("products", [("out",), ("out", "grad_a"), ("grad_w",), ("grad_a", "grad_w")])
@pytest.mark.parametrize("layer", [nn.Linear(12, 7), nn.Conv2d(12, 7, 3)])
def test_products_that_are_not_named_are_float_to_the_bit(products: tuple[str, ...], layer: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 12, 6, 6) if isinstance(layer, nn.Conv2d) else torch.randn(9, 12)
    e = torch.randn_like(layer(x))
    plain = copy.deepcopy(layer)
    t = x.clone().requires_grad_()
    y = plain(t)
    y.backward(e)
    got = run(layer, x, e, products=products)
    floats = (y.detach(), t.grad, plain.weight.grad)
    for name, value, exact in zip(("out", "grad_a", "grad_w"), got, floats, strict=True):
        if name in products:
            distance = float((value - exact).norm() / exact.norm())
            assert 1e-3 < distance < 0.03, (name, distance)
        else:
            torch.testing.assert_close(value, exact, rtol=1e-6, atol=1e-6)


def test_float32_sums_differ_by_their_rounding_only() -> None:
    torch.manual_seed(0)
    layer, x, e = nn.Linear(300, 40), torch.randn(50, 300), torch.randn(50, 40)
    for integer, real in zip(run(layer, x, e, accumulate="int32"), run(layer, x, e, accumulate="float32"), strict=True):
        torch.testing.assert_close(integer, real, rtol=1e-4, atol=1e-4)
        assert not torch.equal(integer, real)


def test_accumulate_says_how_sums_run_and_ends_can_stay_float() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2))

    for accumulate, expected in (("auto", None), ("int32", lowbit.Int32()), ("float32", lowbit.Float32())):
        found = layers_of(lowbit.apply(network(), lowbit.create("int8", accumulate=accumulate)))
        for q in found.values():
            assert [getattr(q.products, which).accumulator for which in ("out", "grad_a", "grad_w")] == [expected] * 3
    assert set(layers_of(lowbit.apply(network(), lowbit.create("int8", first=False, last=False)))) == {"1", "3"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"products": ("grad_b",)}, "grad_b.*did you mean 'grad_"),
        ({"products": ()}, "at least one of out"),
        ({"accumulate": "int16"}, "int16.*did you mean 'int32'"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.create("int8", **options)


# ---- stochastic rounding and edges ----------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", ["int32", "float32"])
def test_both_encodings_of_the_error_round_by_the_same_uniforms(accumulate: str) -> None:
    """With 1 as the maximum of every row and column both have the same scales, so they must have the same codes."""
    torch.manual_seed(0)
    layer, one = nn.Linear(8, 8, bias=False), torch.eye(8)
    layer.weight.data = one.clone()
    e = torch.rand(8, 8) * 1.8 - 0.9
    e.diagonal().fill_(1.0)
    model = lowbit.apply(nn.Sequential(layer), lowbit.create("int8", accumulate=accumulate))
    seen = []
    for _ in range(2):
        x, layer.weight.grad = one.clone().requires_grad_(), None
        model(x).backward(e)
        assert x.grad is not None and layer.weight.grad is not None
        assert torch.equal(x.grad, layer.weight.grad.t())
        seen.append(x.grad)
    assert not torch.equal(*seen)


def test_gradients_are_unbiased() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 6, bias=False)
    x, e = torch.randn(8, 4), torch.randn(8, 6) * torch.tensor([1, 0.01] * 3)
    nn.init.normal_(layer.weight)
    model = lowbit.apply(nn.Sequential(layer), lowbit.create("int8", products=("grad_a", "grad_w")))
    t = x.clone().requires_grad_()
    draws: list[list[Tensor]] = [[], []]
    for _ in range(1500):
        t.grad = layer.weight.grad = None
        model(t).backward(e)
        draws[0].append(t.grad)  # type: ignore[arg-type]
        draws[1].append(layer.weight.grad)  # type: ignore[arg-type]
    columns = codes(layer.weight.detach().numpy(), (0,)), codes(x.numpy(), (0,))
    w_grid, a_grid = (torch.tensor(c * s) for c, s in columns)
    for samples, exact in zip(draws, (e @ w_grid.float(), e.t() @ a_grid.float()), strict=True):
        stacked = torch.stack(samples).double()
        error = stacked.std(0) / len(samples) ** 0.5
        assert (error > 0).any() and ((stacked.mean(0) - exact).abs() <= 6 * error + 1e-6).all()


def test_row_quantizer_averages_to_its_input() -> None:
    q = lowbit.quantizer("int8", "E")
    x = torch.randn(20)
    total = sum(q(x.expand(10_000, 20)).double().mean(0) for _ in range(10)) / 10
    assert ((total - x).abs() <= 1e-4).all()  # 100,000 draws; step about 0.017, so 3e-5 is one sigma


def test_zero_rows_and_tokens_of_very_different_size() -> None:
    layer = nn.Linear(5, 3, bias=False)
    x = torch.randn(4, 5) * torch.tensor([[0.0], [1e-20], [1.0], [1e20]])
    y, grad_a, grad_w = run(layer, x, torch.zeros(4, 3))
    assert y[0].tolist() == [0, 0, 0] and grad_a.abs().max() == 0 and grad_w.abs().max() == 0
    exact = (x @ layer.weight.t()).detach()
    assert ((y - exact).abs().amax(-1)[1:] <= 0.03 * x.abs().amax(-1)[1:]).all()
    stored = lowbit.quantizer("int8", "A").encode(x)
    assert stored.codes.dtype == torch.int8 and stored.integers().abs().amax(-1).tolist() == [0, 127, 127, 127]


# ---- training and torch.compile -------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def train(model: nn.Module, forward: object, steps: int) -> list[float]:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for i in range(steps):
        batch = torch.randperm(len(x), generator=torch.Generator().manual_seed(i))[:64]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(forward(x[batch]), y[batch])  # type: ignore[operator]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append((model.eval()(x).argmax(-1) == y).float().mean().item())
    return losses


def test_training_follows_float() -> None:
    float_model, model = network(), lowbit.apply(network(), lowbit.create("int8", accumulate="int32"))
    *floats, best = train(float_model, float_model, 120)
    *ours, accuracy = train(model, model, 120)
    assert best > 0.95 and accuracy > best - 0.015, (best, accuracy)
    assert abs(np.mean(ours[-20:]) - np.mean(floats[-20:])) < 0.03
    assert abs(ours[0] - floats[0]) < 0.02 and ours[0] != floats[0]


def test_a_compiled_model_trains_as_the_eager_one() -> None:
    losses = []
    for compiled in (False, True):
        model = lowbit.apply(network(), lowbit.create("int8"))
        torch._dynamo.reset()
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        losses.append(train(model, forward, 3))
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_inductor_draws_the_same_random_numbers_as_eager() -> None:
    x, y = torch.rand(64, 64), torch.arange(64) % 10
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        lowbit.apply(model, lowbit.create("int8"))
        torch._dynamo.reset()
        forward = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(forward(x), y).backward()
            optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    # another order of a float sum may move a value across a rounding boundary, other random numbers move half of them
    for a, b in zip(*weights, strict=True):
        assert float((a - b).abs().max() / a.abs().max()) < 1e-4
