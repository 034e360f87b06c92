"""Integer accumulation equals the float64 product of grid values; what can't be exact is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import (
    AbsMax,
    Int,
    Int32,
    PerAxis,
    PerChannel,
    PerGroup,
    PerRow,
    PerTensor,
    PerTile,
    Product,
    Products,
    QSpec,
    Recipe,
    Roles,
)
from lowbit.accumulate import Operand, multiply
from lowbit.layers import CONV, LINEAR
from lowbit.products import ConvProduct, LinearProduct
from lowbit.quantizer import Quantizer
from lowbit.scales import Static

INT8 = Int(8, narrow=True)


def spec(blocks=PerTensor(), fmt=INT8, scale=AbsMax(127)) -> QSpec:  # noqa: B008
    return QSpec(fmt, blocks, scale)


def operand(x: Tensor, blocks, layout) -> Operand:
    q = Quantizer.make(spec(blocks), layout)
    values, coded = q.quantize_coded(x)
    return Operand(values, coded, q)


def real(operand: Operand) -> Tensor:
    """Codes times scales without the rounding of float32."""
    coded, q = operand.coded, operand.quantizer
    assert coded is not None and q is not None
    values = coded.grid.double() * coded.scale.double()
    return q.spec.blocks.unview(values, operand.values.shape, q.layout)


LINEAR_SHAPES = {
    "out": ((2, 5, 6), (4, 6), "A", "W"),
    "grad_a": ((2, 5, 4), (4, 6), "E", "W"),
    "grad_w": ((2, 5, 4), (2, 5, 6), "E", "A"),
}
CONV_SHAPES = {
    "out": ((2, 3, 7, 6), (4, 3, 3, 3), "A", "W"),
    "grad_a": ((2, 4, 5, 4), (4, 3, 3, 3), "E", "W"),
    "grad_w": ((2, 4, 5, 4), (2, 3, 7, 6), "E", "A"),
}
FINE = {"out": PerRow(), "grad_w": PerChannel()}


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("which", ["out", "grad_a", "grad_w"])
@pytest.mark.parametrize("left_fine", [False, True])
@pytest.mark.parametrize("right_fine", [False, True])
def test_every_product_is_exact_before_the_scales(kind, which, left_fine, right_fine):
    shapes, layouts = (LINEAR_SHAPES, LINEAR) if kind == "linear" else (CONV_SHAPES, CONV)
    left_shape, right_shape, left_role, right_role = shapes[which]
    if kind == "linear":
        ops = LinearProduct(torch.Size((2, 5, 6)), torch.Size((4, 6)))
    else:
        ops = ConvProduct(torch.Size((2, 3, 7, 6)), torch.Size((4, 3, 3, 3)), (1, 1), (0, 0), (1, 1))
    legal_left = PerChannel() if which == "grad_w" else PerRow()
    legal_right = PerRow() if which == "out" else PerChannel()
    # scales far apart, so that a scale on the wrong axis shows
    x = torch.randn(left_shape) * torch.logspace(-2, 2, left_shape[-1])
    y = torch.randn(right_shape).mul(torch.logspace(-2, 2, right_shape[0]).reshape(-1, *[1] * (len(right_shape) - 1)))
    left = operand(x, legal_left if left_fine else PerTensor(), layouts.of(left_role))
    right = operand(y, legal_right if right_fine else PerTensor(), layouts.of(right_role))
    result = multiply(ops, which, Int32(), left, right, "layer")
    exact = getattr(ops, which)(real(left), real(right))
    torch.testing.assert_close(result.double(), exact, rtol=3e-7, atol=0)
    assert result.dtype == torch.float32


def test_power_of_two_scales_make_it_exact_to_the_bit():
    s = QSpec(INT8, scale=Static(2.0**-6))
    x, w = (torch.randn(n, 300).clamp(-1.9, 1.9) for n in (5, 7))
    q = Quantizer.make(s, LINEAR.A)
    left, right = (Operand(*q.quantize_coded(t), q) for t in (x, w))
    exact = left.values.double() @ right.values.double().t()
    result = multiply(LinearProduct(x.shape, w.shape), "out", Int32(), left, right, "layer")
    assert torch.equal(result.double(), exact)  # sums below 2^24


@pytest.mark.parametrize("split", [1, 100, 131_071])
def test_a_sum_longer_than_the_guard(split):
    k = 133_200 if split == 131_071 else 1000  # all codes 127: 133,145 of them overflow int32
    x, w = torch.full((1, k), 127.0), torch.full((1, k), 127.0)
    q = Quantizer.make(QSpec(INT8, scale=Static(1.0)), LINEAR.A)
    left, right = (Operand(*q.quantize_coded(t), q) for t in (x, w))
    y = multiply(LinearProduct(x.shape, w.shape), "out", Int32(split), left, right, "layer")
    assert float(y) == float(torch.tensor(127.0**2 * k))
    assert split != 131_071 or float(y) > 2**31


def test_a_split_that_could_overflow_is_refused():
    for bad in (0, 131_072):
        with pytest.raises(ValueError, match="131071"):
            Int32(bad)


ILLEGAL = [
    ("out", "left", PerChannel()),
    ("out", "right", PerChannel()),
    ("out", "left", PerGroup(2)),
    ("out", "right", PerTile(2, 2)),
    ("grad_a", "left", PerChannel()),
    ("grad_a", "right", PerRow()),
    ("grad_w", "left", PerRow()),
    ("grad_w", "right", PerRow()),
    ("grad_w", "right", PerGroup(2)),
]


@pytest.mark.parametrize("which, side, blocks", ILLEGAL)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_scales_that_vary_along_the_sum_are_refused(kind, which, side, blocks):
    shapes, layouts = (LINEAR_SHAPES, LINEAR) if kind == "linear" else (CONV_SHAPES, CONV)
    left_shape, right_shape, left_role, right_role = shapes[which]
    ops = LinearProduct(torch.Size((2, 5, 6)), torch.Size((4, 6)))
    if kind == "conv":
        ops = ConvProduct(torch.Size((2, 3, 7, 6)), torch.Size((4, 3, 3, 3)), (1, 1), (0, 0), (1, 1))
    left = operand(torch.randn(left_shape), blocks if side == "left" else PerTensor(), layouts.of(left_role, which))
    right = operand(torch.randn(right_shape), blocks if side == "right" else PerTensor(), layouts.of(right_role, which))
    with pytest.raises(ValueError, match=f"layer.{which}: the {side} operand's scale must be constant"):
        multiply(ops, which, Int32(), left, right, "layer")


def test_a_block_is_judged_by_its_axes_not_its_name():
    w = operand(torch.randn(4, 6), PerAxis(0), LINEAR.W)  # an output channel, as PerRow
    a = operand(torch.randn(5, 6), PerTensor(), LINEAR.A)
    y = multiply(LinearProduct(a.values.shape, w.values.shape), "out", Int32(), a, w, "layer")
    torch.testing.assert_close(y.double(), real(a) @ real(w).t(), rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    "bad, message",
    [(None, "set both roles"), (spec(fmt=Int(9)), "at most 8 bits"), (spec(fmt=Int(8, signed=False)), "signed grid")],
)
def test_operands_without_int8_codes_are_refused(bad, message):
    good = operand(torch.randn(3, 4), PerTensor(), LINEAR.A)
    x = torch.rand(3, 4)
    if bad is None:
        other = Operand(x)
    else:
        q = Quantizer.make(bad, LINEAR.W)
        other = Operand(*q.quantize_coded(x), q)
    with pytest.raises(ValueError, match=message):
        multiply(LinearProduct(x.shape, x.shape), "out", Int32(), good, other, "fc")


def int32_recipe(**kwargs) -> Recipe:
    row = spec(PerRow())
    col = QSpec(INT8, PerChannel(), AbsMax(127))
    acc = Int32(**kwargs)
    products = Products(
        Product(accumulator=acc), Product(right=col, accumulator=acc), Product(left=col, right=col, accumulator=acc)
    )
    return Recipe("int", Roles(W=row, A=row, E=row), products)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(6, 5),
        lambda: nn.Conv2d(4, 6, 3, 2, 1),
        lambda: nn.Conv1d(4, 6, 3, padding="same"),
        lambda: nn.Conv3d(4, 2, 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_on_integers_equals_the_same_layer_on_grid_values(make, dtype):
    layer = make()
    shape = {"Linear": (3, 6), "Conv2d": (2, 4, 7, 6), "Conv1d": (2, 4, 9), "Conv3d": (2, 4, 4, 3, 3)}
    x0 = torch.randn(shape[type(layer).__name__], dtype=dtype)
    results = []
    for accumulator in (True, False):
        torch.manual_seed(0)
        model = make().to(dtype)
        recipe = int32_recipe()
        if not accumulator:
            p = recipe.products
            plain = Products(Product(), Product(right=p.grad_a.right), Product(p.grad_w.left, p.grad_w.right))
            recipe = Recipe("float", recipe.roles, plain)
        lowbit.apply(model, recipe)
        x = x0.clone().requires_grad_()
        y = model(x)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape, dtype=dtype))
        results.append((y.detach(), x.grad, model.weight.grad))
    tight = 1e-5 if dtype == torch.float32 else 1e-12
    for integer, simulated in zip(*results, strict=True):
        torch.testing.assert_close(integer, simulated, rtol=tight, atol=tight)


def test_nan_reaches_the_result():
    model = nn.Linear(4, 3)
    lowbit.apply(model, int32_recipe())
    x = torch.randn(2, 4)
    x[0, 1] = torch.nan
    y = model(x)
    assert y[0].isnan().all() and y[1].isfinite().all()
