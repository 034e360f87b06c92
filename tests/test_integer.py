"""Integer execution: equal to the products of decoded values, what it keeps, when it is chosen."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import AbsMax, Float32, Int, Int32, MinMax, PerRow, Product, Products, QSpec, Recipe, Roles
from lowbit.integer import executions
from lowbit.layers import LayerQuant
from lowbit.model import layers_of

LAYERS = {
    "linear": (nn.Linear(40, 24), (6, 5, 40)),
    "linear without bias": (nn.Linear(7, 3, bias=False), (4, 7)),
    "conv": (nn.Conv2d(8, 16, 3, padding=1), (3, 8, 9, 9)),
    "conv strided": (nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), (2, 3, 11, 8)),
    "conv dilated in groups": (nn.Conv2d(8, 12, (3, 2), padding=(2, 0), dilation=(2, 1), groups=4), (2, 8, 7, 9)),
    "depthwise": (nn.Conv2d(16, 16, 3, padding=1, groups=16), (2, 16, 6, 6)),
    "pointwise": (nn.Conv2d(32, 8, 1), (2, 32, 5, 5)),
    "conv1d": (nn.Conv1d(6, 10, 5, stride=2, padding=2), (3, 6, 21)),
    "transposed": (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), (2, 6, 5, 4)),
}


def sides(layer: nn.Module, x: Tensor, decoded: bool) -> list[Tensor]:
    """Output and gradients; `decoded` forms real values first, as a layer that is being watched does."""
    model = nn.Sequential(copy.deepcopy(layer))
    lowbit.apply(model, lowbit.create("int8", accumulate="int32"))
    if decoded:
        for q in layers_of(model)["0"].slots.values():
            q.watch = lambda *_: None  # type: ignore[union-attr,assignment]
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize(
    "name, memory",
    [(n, m) for n in LAYERS for m in ("contiguous", "channels last") if m == "contiguous" or len(LAYERS[n][1]) == 4],
)
def test_products_of_codes_equal_those_of_decoded_values(name: str, memory: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    if memory == "channels last":
        x = x.to(memory_format=torch.channels_last)
    for integer, decoded in zip(sides(layer, x, False), sides(layer, x, True), strict=True):
        # the scales multiply in float32 on both sides; a gradient of a bias is a float sum
        torch.testing.assert_close(integer, decoded, rtol=1e-6, atol=1e-6 * float(decoded.abs().max()))


def products_of(recipe: Recipe, module: nn.Module) -> dict[str, str]:
    model = lowbit.apply(nn.Sequential(module), recipe)
    layer = layers_of(model)["0"]
    assert isinstance(layer, LayerQuant)
    return executions(layer, model[0].weight.dim())


PLAIN = Products()


def recipe(products: Products = PLAIN, **roles: Any) -> Recipe:
    return Recipe("r", Roles(**roles), products)


INT8 = QSpec(Int(8, narrow=True), scale=AbsMax(127))
SUMS = Products(Product(accumulator=Int32()), Product(accumulator=Int32()), Product(accumulator=Int32()))


@pytest.mark.parametrize(
    "given, reasons",
    [
        (recipe(SUMS, W=INT8, A=INT8, E=INT8), ("", "", "")),
        (recipe(SUMS, W=INT8, A=INT8), ("", "E is float", "E is float")),
        (
            recipe(SUMS, W=INT8, A=QSpec(Int(8, signed=False), scale=AbsMax(255)), E=INT8),
            ("A: codes of Int with 8 bits are not int8", "", "A: codes of Int"),
        ),
        (
            recipe(SUMS, W=INT8, A=QSpec(Int(8), PerRow(), AbsMax(127)), E=INT8),
            ("", "", "A: the scales of PerRow() are not constant along the summed axis"),
        ),
        (
            recipe(Products(out=Product(accumulator=Float32())), W=INT8, A=INT8, E=INT8),
            ("the recipe asks for float32 sums", None, None),
        ),
        (recipe(SUMS, W=INT8, A=QSpec(Int(8), scale=MinMax(255)), E=INT8), ("A: there is a zero point", "", None)),
        (lowbit.create("psq"), ("A: codes of Int with 8 bits are not int8", "E: kind 'psq' is no plain", None)),
        (lowbit.create("bhq"), (None, "E: kind 'bhq' is no plain symmetric grid", None)),
        (lowbit.create("fp8"), ("chunked accumulator",) * 3),
    ],
)
def test_a_product_that_does_not_run_on_codes_says_why(given: Recipe, reasons: tuple[str | None, ...]) -> None:
    found = products_of(given, nn.Linear(8, 4))
    for reason, actual in zip(reasons, found.values(), strict=True):
        assert reason is None or actual.startswith(reason) and (actual == "") == (reason == ""), found


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes of activations that autograd keeps, parameters and their copies not counted."""
    weights = {p.data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in weights:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(storages.values())


def test_autograd_keeps_a_quarter_of_the_activation() -> None:
    layer, x = nn.Linear(512, 512), torch.randn(256, 512, requires_grad=True)
    model = lowbit.apply(nn.Sequential(copy.deepcopy(layer)), lowbit.create("int8", accumulate="int32"))
    assert kept(layer, x) == 4 * x.numel()
    assert kept(model, x) <= 0.27 * 4 * x.numel()


def test_evaluation_runs_on_codes_where_training_does_not() -> None:
    """luq has 4-bit W and A but a logarithmic E: training needs real values for its backward products."""
    model = lowbit.apply(nn.Sequential(nn.Linear(16, 8)), lowbit.create("luq", quantize_ends=True))
    x = torch.randn(5, 16)
    trained = model(x)
    assert type(trained.grad_fn).__name__ != "IntegerProductBackward"
    model.eval()
    y = model(x)
    if lowbit.integer.fast_products():
        assert type(y.grad_fn).__name__ == "IntegerProductBackward"
    y.square().sum().backward()  # its backward products quantize anew
    with torch.no_grad():
        torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)


def test_operands_of_one_product_need_no_role() -> None:
    """Overrides of `out` alone: it runs on codes, the backward products on the float tensors."""
    int8 = QSpec(Int(8, narrow=True), PerRow(), AbsMax(127))
    torch.manual_seed(0)
    plain, x, results = nn.Linear(24, 10), torch.randn(6, 24), []
    for sums in (Int32(), Float32()):
        recipe = Recipe("r", Roles(), Products(out=Product(int8, int8, sums)))
        layer = lowbit.apply(nn.Sequential(copy.deepcopy(plain)), recipe)[0]
        t = x.clone().requires_grad_()
        y = layer(t)
        assert (type(y.grad_fn).__name__ == "IntegerProductBackward") == isinstance(sums, Int32)
        y.sum().backward()
        results.append((y.detach(), t.grad, layer.weight.grad))
    for integer, real in zip(*results, strict=True):
        torch.testing.assert_close(integer, real, rtol=1e-5, atol=1e-5)
    assert not torch.equal(results[0][0], plain(x).detach())


def test_bfloat16_results_are_the_float32_ones_rounded() -> None:
    model = lowbit.apply(nn.Sequential(nn.Linear(64, 32)), lowbit.create("int8", accumulate="int32")).eval()
    x = torch.randn(9, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    with torch.no_grad():
        assert half.dtype == torch.bfloat16 and torch.equal(half, model(x).bfloat16())


@pytest.mark.parametrize("name", ["int8", "twn"])
def test_a_weight_is_quantized_once_until_it_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lowbit.apply(nn.Sequential(nn.Linear(16, 8)), lowbit.create(name))
    quant, made = layers_of(model)["0"].slots["W"], []
    for method in ("integers", "_run"):
        original = getattr(quant, method)
        monkeypatch.setattr(quant, method, lambda *a, o=original, **k: made.append(1) or o(*a, **k))
    x = torch.randn(4, 16)
    for _ in range(5):  # gradients accumulate
        model(x).sum().backward()
    assert len(made) == 2  # the first use of a version is not kept
    first = model(x)
    model[0].weight.data[0, 0] += 1  # a version counter does not see this
    assert not torch.equal(model(x), first) and len(made) == 3
    with torch.no_grad():
        model[0].weight.mul_(2)
    model(x)
    assert len(made) == 4
    model.eval()
    outputs = [model(x) for _ in range(5)]
    assert len(made) == 5 and torch.equal(outputs[0], outputs[4])
    assert not layers_of(copy.deepcopy(model))["0"].slots["W"]._made


def test_fused_optimizers_change_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # they don't raise versions: without a count of steps every use would look for the codes of the step before
    model = lowbit.apply(nn.Sequential(nn.Linear(16, 8)), lowbit.create("int8", accumulate="int32"))
    optimizer, looked = torch.optim.AdamW(model.parameters(), fused=True), []
    monkeypatch.setattr(sys.modules["lowbit.quantizer"], "fingerprint", lambda w: looked.append(1) or 0)
    x, outputs = torch.randn(4, 16), []
    for _ in range(3):
        outputs.append(model(x))
        outputs[-1].sum().backward()
        optimizer.step()
    assert not looked and not torch.equal(outputs[0], outputs[1])
    assert torch.equal(model(x), model(x)) and looked


def test_one_look_at_a_weight_serves_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lowbit.apply(nn.Sequential(nn.Linear(16, 8)), lowbit.create("int8", accumulate="int32"))
    looked, quantizers = [], sys.modules["lowbit.quantizer"]
    original = quantizers.fingerprint
    monkeypatch.setattr(quantizers, "fingerprint", lambda w: looked.append(1) or original(w))
    x = torch.randn(4, 16, requires_grad=True)
    for _ in range(6):
        model(x).sum().backward()
    assert len(looked) == 6  # none at the first use, one for each encoding at the second, then one for both
    x.grad = None
    y = model(x).sum()
    model[0].weight.data.zero_()  # the backward pass is that of the weight as it was
    y.backward()
    assert x.grad is not None and x.grad.any()
    x.grad = None
    model(x).sum().backward()
    assert not x.grad.any()


def test_gradients_of_kernels_lie_as_their_weights_do() -> None:
    for order in (torch.contiguous_format, torch.channels_last):
        conv = nn.Conv2d(32, 16, 3, padding=1).to(memory_format=order)
        layer = lowbit.apply(nn.Sequential(conv), lowbit.create("int8", accumulate="int32"))[0]
        given: list[Tensor] = []
        layer.weight.register_hook(given.append)  # what autograd gets, before it would lay it out anew
        layer(torch.randn(2, 32, 8, 8).to(memory_format=order)).sum().backward()
        assert given[0].stride() == layer.weight.stride()


def test_a_result_that_the_caller_changes_is_not_kept() -> None:
    q, w = lowbit.quantizer("twn", "W"), nn.Parameter(torch.randn(6, 5))
    with torch.no_grad():
        first = q(w).clone()
        for _ in range(4):
            assert torch.equal(q(w), first)
            q(w).add_(1)


def test_other_devices_take_codes_only_when_asked() -> None:
    for recipe_, reason in (("auto", "no int8 kernel for cuda"), ("int32", "")):
        layer = layers_of(lowbit.apply(nn.Sequential(nn.Linear(8, 4)), lowbit.create("int8", accumulate=recipe_)))["0"]
        assert set(executions(layer, 2, "cuda").values()) == {reason}


def test_codes_of_any_symmetric_grid_are_those_that_values_come_from() -> None:
    for name, role in (("int8", "A"), ("luq", "A"), ("luq", "W"), ("wage", "E")):
        q, x = lowbit.quantizer(name, role).eval(), torch.randn(6, 40)
        codes, scale = q.integers(x)
        assert torch.equal(q.spec.blocks.view(codes, q.layout) * scale[:, None], q.spec.blocks.view(q(x), q.layout))
