"""Wang et al. (2018): formats of every operand, chunked sums in all three products, the three rounded updates."""

# mypy: disable-error-code="operator,union-attr,index,arg-type,call-arg,return-value,assignment,misc,attr-defined"
# (attributes of a torch.nn.Module have no precise type)

from __future__ import annotations

import copy
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowbit
from lowbit.formats import E5M2, FP16_169
from lowbit.rng import uniform


def q8(x: np.ndarray) -> np.ndarray:
    """1-5-2, nearest even, saturating: an independent table."""
    clipped = np.clip(np.asarray(x, dtype=np.float32), -57344, 57344)
    return clipped.astype(ml_dtypes.float8_e5m2).astype(np.float64)


def q16(x: np.ndarray) -> np.ndarray:
    """1-6-9, nearest even, saturating, in float64."""
    x = np.asarray(x, dtype=np.float64)
    e = np.maximum(np.frexp(np.where(x == 0, 1.0, x))[1] - 1, -30)
    step = 2.0 ** (e - 9)
    return np.clip(np.rint(x / step) * step, -4290772992.0, 4290772992.0)


def gemm(a: np.ndarray, b: np.ndarray, chunk: int = 64) -> np.ndarray:
    """The paper's loop: every addition rounded, in order, inside chunks and across them."""
    total = np.zeros((a.shape[0], b.shape[1]))
    for start in range(0, a.shape[1], chunk):
        part = np.zeros_like(total)
        for k in range(start, min(start + chunk, a.shape[1])):
            part = q16(part + np.outer(a[:, k], b[k]))
        total = q16(total + part)
    return total


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


# ---- operands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "q"),
    [
        (1.125, 1.0),
        (1.375, 1.5),
        (1e-5, 2.0**-16),
        (61439.0, 57344.0),
        (1e9, 57344.0),
        (-1e9, -57344.0),
        (2.0**-18, 0.0),
    ],
)
@pytest.mark.parametrize("role", ["W", "A", "E"])
def test_eight_bits_by_hand(role: str, x: float, q: float) -> None:
    assert lowbit.quantizer("fp8", role)(torch.tensor([x])).item() == q


@pytest.mark.parametrize(
    ("x", "q"),
    [
        (1 + 2.0**-10, 1.0),
        (1 + 3 * 2.0**-10, 1.00390625),
        (0.1, 0.0999755859375),
        (2049.0, 2048.0),
        (1e30, 4290772992.0),
    ],
)
def test_sixteen_bits_by_hand(x: float, q: float) -> None:
    assert lowbit.quantizer("fp8", "U").eval()(torch.tensor([x])).item() == q
    assert q16(np.array(x)) == q


def test_references_agree_with_the_formats() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-14, 6, 5000)
    assert np.array_equal(numbers(lowbit.quantizer("fp8", "A")(x)), q8(x.numpy()))
    assert np.array_equal(numbers(lowbit.quantizer("fp8", "U").eval()(x)), q16(x.double().numpy()))


def test_floating_stochastic_rounding() -> None:
    eight = lowbit.Quantizer(lowbit.QSpec(E5M2, rounding="stochastic"))
    x = torch.full((200_000,), 1.1)
    y = eight(x, uniform(x.shape, 3, 0, 0)).double()
    assert set(y.unique().tolist()) == {1.0, 1.25}
    assert abs(float((y == 1.25).double().mean()) - 0.4) < 6 * math.sqrt(0.24 / len(x))
    assert float(y.var()) == pytest.approx(0.015, rel=0.02)
    # the step follows the exponent, unlike fixed point: 16 times larger numbers, 16 times larger errors
    assert set(eight(16 * x, uniform(x.shape, 3, 0, 0)).unique().tolist()) == {16.0, 20.0}


def test_products_of_operands_are_exact_in_the_accumulator() -> None:
    values = E5M2.levels()
    values = values[(values.abs() >= 2.0**-14) & (values.abs() <= 2.0**15)]
    exact = (values[:, None] * values[None]).flatten()
    assert torch.equal(FP16_169.snap(exact), exact)


def test_roles_of_first_inner_and_last_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(8, 8), nn.Linear(8, 8))
    lowbit.apply(model, lowbit.create("fp8"))
    formats = [{r: q.spec.format.bits for r, q in m.quant.slots.items()} for m in model]
    assert formats[0] == {"W": 8, "A": 16, "E": 8, "U": 16, "states": 16}
    assert formats[1] == {"W": 8, "A": 8, "E": 8, "U": 16, "states": 16}
    assert formats[2] == {"W": 16, "A": 16, "E": 16, "U": 16, "states": 16}
    plain = lowbit.apply(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), lowbit.create("fp8", ends=False))
    assert all(m.quant.slots[r].spec.format == E5M2 for m in plain for r in "WAE")


# ---- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk", "total"), [(1, 1024), (8, 4096), (64, 4096), (512, 4096), (2048, 2048), (4096, 1024)]
)
def test_adding_one_4096_times(chunk: int, total: int) -> None:
    layer = nn.Linear(4096, 1, bias=False)
    nn.init.ones_(layer.weight)
    lowbit.apply(layer, lowbit.create("fp8", chunk=chunk))
    assert layer(torch.ones(1, 4096)).item() == total


def test_swamping_and_chunks_on_a_random_sum() -> None:
    x = 1 + torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))

    def loss(**options: object) -> float:
        layer = nn.Linear(4096, 1, bias=False)
        nn.init.ones_(layer.weight)
        lowbit.apply(layer, lowbit.create("fp8", **options))
        true = q16(numbers(x)).sum(-1)  # the only layer is the last: operands in 1-6-9
        return float(np.abs(numbers(layer(x))[:, 0] / true - 1).mean())

    plain, chunked, exact = loss(chunk=4096), loss(chunk=64), loss(accumulate=False)
    assert plain > 0.05 and chunked < 0.003 and exact < 1e-6, (plain, chunked, exact)
    assert loss(chunk=32) < 0.005 and loss(chunk=1) > 0.05


def test_three_products_of_an_inner_layer() -> None:
    torch.manual_seed(2)
    layer = nn.Linear(150, 70)
    lowbit.apply(layer, lowbit.create("fp8", ends=False))
    x = torch.randn(90, 150, requires_grad=True)
    e = torch.randn(90, 70) * 0.01
    y = layer(x)
    y.backward(e)
    a, w, err = q8(x.detach().numpy()), q8(layer.weight.detach().numpy()), q8(e.numpy())
    assert np.array_equal(numbers(y), numbers(torch.tensor(gemm(a, w.T), dtype=torch.float32) + layer.bias))
    assert np.array_equal(numbers(x.grad), gemm(err, w))
    assert np.array_equal(numbers(layer.weight.grad), gemm(err.T, a))
    assert np.abs(numbers(layer.weight.grad) - err.T @ a).max() > 0, "and that is not the exact product"


def test_convolution_sums_in_order() -> None:
    torch.manual_seed(3)
    conv = nn.Conv2d(8, 3, 3, bias=False)
    lowbit.apply(conv, lowbit.create("fp8", ends=False, chunk=16))
    x = torch.randn(2, 8, 5, 5)
    columns = nn.functional.unfold(x, 3).transpose(1, 2).reshape(-1, 72)
    wanted = gemm(q8(columns.numpy()), q8(conv.weight.detach().reshape(3, -1).numpy()).T, 16)
    assert np.array_equal(numbers(conv(x)).transpose(0, 2, 3, 1).reshape(-1, 3), wanted)


# ---- update ----------------------------------------------------------------------------------------------------------


def test_weights_start_and_stay_on_the_grid() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    lowbit.apply(model, lowbit.create("fp8", accumulate=False))
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
        lambda p: torch.optim.Adam(p, lr=0.01),
    ):
        twin = copy.deepcopy(model)
        optimizer = lowbit.attach(twin, make(twin.parameters()))
        for _ in range(3):
            optimizer.zero_grad()
            twin(torch.randn(8, 20)).square().mean().backward()
            optimizer.step()
            for p in twin.parameters():
                assert np.array_equal(numbers(p), q16(numbers(p))), "weights and biases"
                for value in optimizer.state[p].values():
                    if value.shape == p.shape:
                        assert np.array_equal(numbers(value), q16(numbers(value))), "momentum, both Adam moments"
        assert all(not torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))


def test_small_updates_survive_in_the_mean() -> None:
    model = nn.Linear(4000, 1, bias=False)
    nn.init.constant_(model.weight, 1.5)  # step 2^-9 there
    lowbit.apply(model, lowbit.create("fp8"))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for _ in range(20):
        model.weight.grad = torch.full_like(model.weight, 2.0**-12)
        optimizer.step()
    moved = 1.5 - numbers(model.weight)
    sigma = math.sqrt(20 * (1 / 8) * (7 / 8) / 4000) * 2.0**-9
    assert abs(moved.mean() - 20 * 2.0**-12) < 6 * sigma and (moved == 0).mean() < 0.2
    assert q16(np.array(1.5 - 2.0**-12)) == 1.5, "nearest would lose each of them"


def test_gradients_are_unscaled_before_anything_is_rounded() -> None:
    # 2^-16 is the smallest error of 1-5-2: without the scale of 1000 these errors round to zero
    def gradient(loss_scale: float) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
        recipe = lowbit.create("fp8", loss_scale=loss_scale)
        lowbit.attach(lowbit.apply(model, recipe), torch.optim.SGD(model.parameters(), lr=1.0))
        (model(torch.ones(4, 6)).sum() * 1e-6).backward()
        return model[0].weight.grad

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    (model(torch.ones(4, 6)).sum() * 1e-6).backward()
    true = model[0].weight.grad
    assert float(gradient(1.0).abs().max()) == 0
    assert float((gradient(1000.0) - true).norm() / true.norm()) < 0.2


# ---- training --------------------------------------------------------------------------------------------------------


def train(recipe: lowbit.Recipe | None, adam: bool = False, steps: int = 120) -> float:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    if adam:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    if recipe is not None:
        lowbit.attach(lowbit.apply(model, recipe), optimizer)
    for i in range(steps):
        pick = torch.randperm(1500, generator=torch.Generator().manual_seed(i))[:64]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[pick]), y[pick]).backward()
        optimizer.step()
    model.eval()
    return float((model(x[1500:]).argmax(-1) == y[1500:]).float().mean())


@pytest.mark.parametrize("adam", [False, True])
def test_trains_like_float(adam: bool) -> None:
    plain = train(None, adam)
    assert plain > 0.85
    assert train(lowbit.create("fp8", accumulate=False), adam) > plain - 0.04


def test_trains_with_the_accumulator() -> None:
    assert train(lowbit.create("fp8"), steps=80) > 0.8


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "at least 1; got 0"),
        ({"loss_scale": 0.0}, "positive; got 0.0"),
        ({"chunks": 64}, "did you mean 'chunk'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.create("fp8", **options)


def test_report_states_formats_and_accumulators() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    lowbit.apply(model, lowbit.create("fp8"))
    x = torch.randn(16, 8)
    report = lowbit.report(model, x, loss=lambda y: y.sum() * 1e-5)
    rows = {(r.layer, r.role): r for r in report.rows}
    assert rows["2", "W"].bits == 8 and rows["4", "W"].bits == 16 and rows["2", "grad_w"].bits == 16
    assert 20 < rows["2", "W"].sqnr < 40, "two mantissa bits: 25.5 dB for uniform mantissas"
    assert rows["2", "E"].sqnr > 20, "errors are measured with the loss scale; without it they vanish"
    assert rows["4", "A"].sqnr > rows["2", "A"].sqnr + 30, "seven more mantissa bits are 42 dB"
