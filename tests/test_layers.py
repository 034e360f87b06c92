"""Quantized layers as they are used: gradients, every kind of input, autocast, checkpointing, draws."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import (
    AbsMax,
    Average,
    Chunked,
    History,
    Int,
    Int32,
    Keep,
    PerChannel,
    PerRow,
    PerTensor,
    Product,
    Products,
    QSpec,
    Recipe,
    Roles,
    Static,
)
from lowbit.layers import LayerQuant, QMatmul
from lowbit.quantizer import IDENTITY

KINDS = ("linear", "conv", "embedding", "attention")
INT8 = QSpec(Int(8, narrow=True), scale=AbsMax(127))
SR4 = QSpec(Int(4, narrow=True), scale=AbsMax(7), rounding="stochastic")
FINE = QSpec(Int(24), scale=Static(2.0**-16))
NOTHING = Recipe("nothing", Roles(W=IDENTITY, A=IDENTITY, E=IDENTITY), layers=KINDS)
PLAIN = Recipe("plain", Roles(W=IDENTITY, A=IDENTITY), layers=KINDS)  # differentiable like the float layer
INTS = Recipe("ints", Roles(W=INT8, A=INT8, E=INT8), layers=KINDS)
NOISE = Recipe("noise", Roles(W=SR4, A=SR4, E=SR4), layers=KINDS)


def pair(layer: nn.Module, recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    return layer, lowbit.apply(copy.deepcopy(layer), recipe)


def results(layer: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Output and gradients of inputs and parameters for a fixed gradient of the output."""
    inputs = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs)
    y = layer(*inputs)
    y = y[0] if isinstance(y, tuple) else y
    g = torch.Generator().manual_seed(5)
    e = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    wanted = [t for t in (*inputs, *layer.parameters()) if t.requires_grad]
    grads = torch.autograd.grad(y, wanted, e, allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (2, 3, 5)),
    "linear of one vector": (lambda: nn.Linear(5, 4), (5,)),
    "linear with two batch axes": (lambda: nn.Linear(5, 4), (2, 2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 7, 8)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(1, 2)), (2, 2, 6, 7)),
    "conv2d same odd": (lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2), (2, 2, 6, 7)),
    "conv2d valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid", bias=False), (2, 2, 6, 7)),
    "conv2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (2, 2, 6, 7)),
    "conv2d reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", stride=2), (2, 2, 6, 7)),
    "conv2d replicate same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="replicate"), (2, 2, 6, 7)),
    "conv2d unbatched": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 6, 7)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2, padding=1), (1, 2, 4, 5, 3)),
    "conv3d unbatched": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 5, 3)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), (2, 4, 4, 3)),
    "conv_transpose2d dilated": (lambda: nn.ConvTranspose2d(4, 6, 3, 1, 0, 1, dilation=2), (2, 4, 4, 3)),
    "conv_transpose2d unbatched": (lambda: nn.ConvTranspose2d(4, 6, 2, bias=False), (4, 4, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("recipe", [NOTHING, PLAIN], ids=["W A E", "W A"])
def test_identity_quantizers_leave_the_layer_as_it_is(name, recipe):
    make, shape = LAYERS[name]
    plain, quantized = pair(make().double(), recipe)
    assert quantized.quant.roles == recipe.roles
    x = torch.randn(shape, dtype=torch.float64)
    for a, b in zip(results(plain, x), results(quantized, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name):
    make, shape = LAYERS[name]
    layer = lowbit.apply(make().double(), NOTHING)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    names, params = zip(*layer.named_parameters(), strict=True)

    def function(x, *params):
        return torch.func.functional_call(layer, dict(zip(names, params, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *params), fast_mode=True)


def test_gradcheck_of_products_without_roles():
    # overrides alone make a quantized layer
    layer = lowbit.apply(nn.Linear(4, 3).double(), Recipe("p", Roles(), Products(grad_a=Product(Keep(), Keep()))))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert type(layer).__name__ == "QLinear" and torch.autograd.gradcheck(layer, (x,))


def matmul(recipe: Recipe) -> QMatmul:
    from lowbit.layers import MATMUL

    roles = Roles(A=recipe.roles.A, E=recipe.roles.E)
    return QMatmul(LayerQuant("attention", "scores", roles, recipe.products, MATMUL))


def test_gradcheck_of_matmul_embedding_and_attention():
    a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 1, 3, 4), (2, 4, 2)))
    assert torch.autograd.gradcheck(matmul(NOTHING), (a, b))
    assert torch.equal(matmul(NOTHING)(a, b), a @ b)
    table = lowbit.apply(nn.Embedding(6, 3).double(), NOTHING)
    index = torch.tensor([[0, 1, 5], [2, 2, 0]])
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(table, {"weight": w}, (index,)), (table.weight,)
    )
    attention = lowbit.apply(nn.MultiheadAttention(4, 2, batch_first=True).double(), NOTHING)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention(x, x, x)[0], (x,), fast_mode=True)


def test_the_flow_of_a_linear_layer_by_hand():
    # out = qa qw^T + b; grad_a = qe qw; grad_w = qe^T qa; the bias sees the float gradient
    layer = lowbit.apply(nn.Linear(6, 5), INTS)
    x, e = torch.randn(3, 6, requires_grad=True), torch.randn(3, 5)

    def q(t):
        step = t.abs().max() / 127
        return (t / step).round() * step

    y = layer(x)
    y.backward(e)
    w = layer.weight.detach()
    torch.testing.assert_close(y, q(x) @ q(w).t() + layer.bias)
    torch.testing.assert_close(x.grad, q(e) @ q(w))
    torch.testing.assert_close(layer.weight.grad, q(e).t() @ q(x.detach()))
    torch.testing.assert_close(layer.bias.grad, e.sum(0))


def test_overrides_by_hand():
    coarse = QSpec(Int(2, narrow=True), scale=AbsMax(1))
    products = Products(Product(right=Keep()), Product(left=Keep(), right=coarse), Product(left=coarse))
    layer = lowbit.apply(nn.Linear(6, 5, bias=False), Recipe("o", Roles(W=INT8, A=INT8, E=INT8), products))
    x, e = torch.randn(3, 6, requires_grad=True), torch.randn(3, 5)

    def q(t, n=127):
        step = t.abs().max() / n
        return (t / step).round() * step

    y = layer(x)
    y.backward(e)
    w = layer.weight.detach()
    torch.testing.assert_close(y, q(x) @ w.t())
    torch.testing.assert_close(x.grad, e @ q(w, 1))
    torch.testing.assert_close(layer.weight.grad, q(e, 1).t() @ q(x.detach()))


@pytest.mark.parametrize("at", ["input", "output", "both"])
def test_where_the_error_is_quantized(at):
    layer = lowbit.apply(nn.Linear(6, 5, bias=False), Recipe("w", Roles(E=INT8), Products(error_at=at)))
    x, e = torch.randn(3, 6, requires_grad=True), torch.randn(3, 5)

    def q(t):
        step = t.abs().max() / 127
        return (t / step).round() * step

    layer(x).backward(e)
    inside = e if at == "input" else q(e)
    grad = inside @ layer.weight.detach()
    torch.testing.assert_close(x.grad, grad if at == "output" else q(grad))
    torch.testing.assert_close(layer.weight.grad, inside.t() @ x.detach())


def test_result_is_quantized_with_the_bias():
    layer = lowbit.apply(nn.Linear(6, 5), Recipe("r", Roles(), Products(result=QSpec(Int(8), scale=Static(0.25)))))
    y = layer(torch.randn(4, 6))
    assert torch.equal(y, (y * 4).round() / 4)


def test_samples_average_independent_draws():
    torch.manual_seed(0)
    x, e = torch.randn(8, 6), torch.randn(8, 5)
    spread = []
    for samples in (1, 16):
        recipe = Recipe("s", Roles(E=SR4), Products(grad_w=Product(samples=samples)))
        layer = lowbit.apply(nn.Linear(6, 5, bias=False), recipe)
        errors = []
        for _ in range(30):
            layer.weight.grad = None
            layer(x).backward(e)
            errors.append((layer.weight.grad - e.t() @ x).square().mean())
        spread.append(float(torch.stack(errors).mean()))
    assert spread[0] / spread[1] == pytest.approx(16, rel=0.25)


@pytest.mark.parametrize("error, same", [(SR4, True), (SR4, False), (None, True), (INT8, True)])
def test_an_override_may_take_the_draw_of_its_role(error, same):
    """The same quantizer twice: equal draws make equal operands. Without a draw of the role it has its own."""
    torch.manual_seed(0)
    one, e = torch.eye(6), torch.randn(6, 6)
    recipe = Recipe("s", Roles(E=error), Products(grad_w=Product(left=SR4, same_draw=same)))
    layer = lowbit.apply(nn.Linear(6, 6, bias=False), recipe)
    layer.weight.data.copy_(one)
    seen = []
    for _ in range(2):
        x, layer.weight.grad = one.clone().requires_grad_(), None
        layer(x).backward(e)
        seen.append(layer.weight.grad.t())
        assert torch.equal(x.grad, seen[-1]) == (error is SR4 and same)
    assert not torch.equal(*seen)


# ---- kinds of input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("recipe", [INTS, NOISE], ids=["ints", "noise"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(name, recipe, dtype):
    make, shape = LAYERS[name]
    layer = lowbit.apply(make().to(dtype), recipe)
    got = results(layer, torch.randn(shape, dtype=dtype))
    assert all(t.dtype == dtype and t.isfinite().all() for t in got)
    assert len(got) == 2 + len(list(layer.parameters()))
    layer = lowbit.apply(make(), recipe).to(dtype)  # converted after
    assert all(t.dtype == dtype for t in results(layer, torch.randn(shape, dtype=dtype)))


def test_half_precision_is_computed_in_float32():
    layer = lowbit.apply(nn.Linear(64, 8), INTS)
    x = torch.randn(16, 64)
    half = copy.deepcopy(layer).bfloat16()
    wide = copy.deepcopy(half).float()
    assert torch.equal(half(x.bfloat16()), wide(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("name", [n for n in LAYERS if "unbatched" not in n and "vector" not in n])
@pytest.mark.parametrize("recipe", [INTS, NOISE], ids=["ints", "noise"])
def test_empty_batches(name, recipe):
    make, shape = LAYERS[name]
    plain, layer = pair(make(), recipe)
    for a, b in zip(
        results(plain, torch.randn(0, *shape[1:])), results(layer, torch.randn(0, *shape[1:])), strict=True
    ):
        assert a.shape == b.shape and torch.equal(a, b)  # gradients of parameters are zeros


@pytest.mark.parametrize("accumulator", [Chunked(4), Int32()])
def test_empty_batches_with_an_accumulator(accumulator):
    p = Product(accumulator=accumulator)
    for layer, shape in ((nn.Linear(4, 3), (0, 4)), (nn.Conv2d(2, 3, 3), (0, 2, 5, 5))):
        plain, quantized = pair(layer, Recipe("c", Roles(W=INT8, A=INT8, E=INT8), Products(p, p, p)))
        for a, b in zip(results(plain, torch.randn(shape)), results(quantized, torch.randn(shape)), strict=True):
            assert a.shape == b.shape and torch.equal(a, b)


def test_memory_formats():
    layer = lowbit.apply(nn.Conv2d(4, 6, 3), INTS)
    x = torch.randn(2, 4, 8, 7)
    for a, b in zip(results(layer, x), results(layer, x.to(memory_format=torch.channels_last)), strict=True):
        torch.testing.assert_close(a, b)
    turned = lowbit.apply(copy.deepcopy(nn.Conv2d(4, 6, 3)), INTS).to(memory_format=torch.channels_last)
    assert turned(x).shape == (2, 6, 6, 5)
    layer = lowbit.apply(nn.Linear(6, 5), INTS)
    x = torch.randn(6, 3, 2).permute(2, 1, 0)
    for a, b in zip(results(layer, x), results(layer, x.contiguous()), strict=True):
        assert torch.equal(a, b)


def test_output_size_of_a_transposed_convolution():
    plain, layer = pair(nn.ConvTranspose2d(2, 3, 3, stride=2), NOTHING)
    x = torch.randn(1, 2, 4, 4)
    for size in ([9, 9], [10, 9], [1, 3, 10, 10][2:]):
        torch.testing.assert_close(plain(x, output_size=size), layer(x, output_size=size))
    with pytest.raises(ValueError, match="output size"):
        layer(x, output_size=[20, 20])


def test_embedding_options():
    index = torch.tensor([[0, 1, 5], [2, 2, 0]])
    for options in (
        {"padding_idx": 2},
        {"scale_grad_by_freq": True},
        {"max_norm": 1.0},
        {"max_norm": 1.0, "norm_type": 1.0},
    ):
        plain, layer = pair(nn.Embedding(6, 3, **options), NOTHING)
        for a, b in zip(results(plain, index), results(layer, index), strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(plain.weight, layer.weight)  # max_norm changes the table itself


def test_inputs_that_need_no_gradient():
    layer = lowbit.apply(nn.Linear(4, 3), NOISE)
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.weight.grad is not None
    for p in layer.parameters():
        p.requires_grad_(False)
        p.grad = None
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        layer(torch.randn(2, 4))
        layer.eval()(torch.randn(2, 4))


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast_changes_the_type_of_the_output_and_nothing_else(inside):
    for layer, shape in ((nn.Linear(33, 8), (16, 33)), (nn.Conv2d(3, 4, 3), (2, 3, 8, 8))):
        a = lowbit.apply(copy.deepcopy(layer), INTS)
        b = copy.deepcopy(a)
        x, y = (torch.manual_seed(0) and torch.randn(shape).requires_grad_() for _ in range(2))
        e = torch.randn_like(a(x)).bfloat16()
        out = a(x)
        out.backward(e.float())
        with torch.autocast("cpu", torch.bfloat16):
            under = b(y)
            assert under.dtype == torch.bfloat16
            if inside:
                under.backward(e)
        if not inside:
            under.backward(e)
        assert torch.equal(under, out.bfloat16())
        assert torch.equal(x.grad, y.grad) and torch.equal(a.weight.grad, b.weight.grad)
        assert b.weight.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    layer = lowbit.apply(nn.Linear(4, 3).double(), INTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4).double()).dtype == torch.float64


# ---- draws and checkpoints -------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer used twice, one used once and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own, self.conv = nn.Linear(6, 6), nn.Linear(6, 6), nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.shared(x))
        x = torch.tanh(self.own(self.shared(x)))
        return self.conv(x.unsqueeze(1)).squeeze(1)


class Twice(nn.Module):
    """Two blocks, each repeated by a checkpoint of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, how: str | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x) if how is None else checkpoint(block, x, use_reentrant=how == "reentrant")
        return x


TRACKED = QSpec(Int(4, narrow=True), scale=Average(AbsMax(7), 0.5, before=True), rounding="stochastic")
PAST = QSpec(Int(4, narrow=True), scale=History(AbsMax(7), 3), rounding="stochastic")
OVERRIDES = Products(Product(), Product(right=SR4), Product(left=SR4, right=SR4, samples=2))


@pytest.mark.parametrize("how", ["reentrant", "saved"])
@pytest.mark.parametrize(
    "recipe",
    [
        NOISE,
        Recipe("t", Roles(W=SR4, A=TRACKED, E=SR4)),
        Recipe("h", Roles(A=PAST, W=SR4)),
        Recipe("o", Roles(W=SR4, A=SR4, E=SR4), OVERRIDES),
    ],
    ids=["noise", "average", "history", "overrides"],
)
def test_activation_checkpointing_changes_no_bit(how, recipe):
    plain = lowbit.apply(Twice(), recipe)
    saved = copy.deepcopy(plain)
    for _ in range(3):
        grads = []
        x0 = torch.randn(5, 6)
        for model, mode in ((plain, None), (saved, how)):
            x = x0.clone().requires_grad_()
            model.zero_grad()
            y = model(x, mode)
            y.square().sum().backward()
            grads.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.01 * p.grad
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)
    for (name, a), b in zip(plain.state_dict().items(), saved.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_checkpointing_with_a_computed_weight():
    torch.manual_seed(3)
    grads = []
    for how in (None, "reentrant", "saved"):
        torch.manual_seed(3)
        model = Twice()
        nn.utils.parametrizations.weight_norm(model.blocks[0].own)
        lowbit.apply(model, NOISE)
        x = torch.ones(2, 6).requires_grad_()
        model(x, how).sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    for a, b, c in zip(*grads, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_micro_batches_share_w_and_differ_in_e_and_a():
    layer = lowbit.apply(nn.Linear(6, 5), NOISE)
    weights, acts, errors = [], [], []
    seen = {"W": weights, "A": acts, "E": errors}
    for slot, store in seen.items():
        layer.quant.slots[slot].watch = lambda q, x, y, coded, store=store: store.append(y.clone())
    x, e = torch.randn(4, 6), torch.randn(4, 5)
    for _ in range(2):
        layer(x).backward(e)
    with torch.no_grad():
        layer.weight.add_(0)
    layer(x).backward(e)
    for store, equal in ((weights, True), (acts, False), (errors, False)):
        assert torch.equal(store[0], store[1]) is equal
        assert not torch.equal(store[0], store[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_draws_new_weights_also_where_they_are_converted(dtype):
    layer = lowbit.apply(nn.Linear(20, 20, bias=False), Recipe("w", Roles(W=SR4))).to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    outputs = []
    for _ in range(2):
        for _ in range(2):
            outputs.append(layer(torch.eye(20, dtype=dtype)))
        outputs[-1].sum().backward()
        optimizer.step()
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[0], outputs[2])


def test_a_fused_optimizer_draws_new_weights_once_attached():
    layer = lowbit.apply(nn.Linear(20, 20, bias=False), Recipe("w", Roles(W=SR4)))
    optimizer = lowbit.attach(layer, torch.optim.AdamW(layer.parameters(), lr=0.0, weight_decay=0.0, fused=True))
    first = layer(torch.eye(20))
    first.sum().backward()
    optimizer.step()
    assert not torch.equal(first, layer(torch.eye(20)))


def test_evaluation_is_deterministic_and_changes_nothing():
    model = lowbit.apply(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3)), Recipe("e", Roles(W=SR4, A=TRACKED, E=SR4))
    )
    x = torch.randn(4, 1, 6, 6)
    model(x).sum().backward()
    model.eval()
    state = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    assert torch.equal(model(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert torch.equal(rng, torch.get_rng_state())


def test_training_leaves_torch_s_generator_alone():
    layer = lowbit.apply(nn.Linear(4, 3), NOISE)
    rng = torch.get_rng_state()
    layer(torch.randn(2, 4, generator=torch.Generator())).sum().backward()
    assert torch.equal(rng, torch.get_rng_state())


def test_second_derivatives_are_right_or_refused():
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    layer = lowbit.apply(nn.Linear(4, 3).double(), PLAIN)
    assert torch.autograd.gradgradcheck(lambda x: torch.tanh(layer(x)), (x,))
    layer = lowbit.apply(nn.Linear(4, 3).double(), NOISE)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_autograd_keeps_codes_instead_of_activations():
    layer = lowbit.apply(nn.Linear(64, 48), INTS)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(32, 64, requires_grad=True))
    found = [t for t in kept if t.data_ptr() != layer.weight.data_ptr() and t.numel() > 64]
    assert [(t.dtype, tuple(t.shape)) for t in found] == [(torch.int8, (32, 64))]


def test_broken_numbers_show():
    layer = lowbit.apply(nn.Linear(4, 3), Recipe("r", Roles(W=INT8, A=QSpec(Int(8), PerRow(), AbsMax(127)), E=INT8)))
    x = torch.randn(3, 4)
    x[1, 2] = torch.nan
    y = layer(x)
    assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()
    e = torch.randn(3, 3)
    e[0, 0] = torch.inf
    x = torch.randn(3, 4, requires_grad=True)
    layer(x).backward(e)
    assert not x.grad.isfinite().all() and not layer.weight.grad.isfinite().all()


def test_chunked_accumulation_of_every_product_is_that_of_the_operator():
    from lowbit.ops.chunked import chunked_mm

    p = Product(accumulator=Chunked(8))
    layer = lowbit.apply(nn.Linear(50, 5, bias=False), Recipe("c", Roles(), Products(p, p, p)))
    x, e = torch.randn(30, 50, requires_grad=True), torch.randn(30, 5)
    y = layer(x)
    y.backward(e)
    w, a = layer.weight.detach(), x.detach()
    assert torch.equal(y, chunked_mm(a, w.t(), 8))
    assert torch.equal(x.grad, chunked_mm(e, w, 8)) and torch.equal(layer.weight.grad, chunked_mm(e.t(), a, 8))
    assert not torch.allclose(y, a @ w.t(), rtol=1e-5)


def test_scales_of_rows_and_channels_in_a_convolution():
    roles = Roles(
        W=QSpec(Int(4, narrow=True), PerRow(), AbsMax(7)), A=QSpec(Int(4, narrow=True), PerChannel(), AbsMax(7))
    )
    layer = lowbit.apply(nn.Conv2d(3, 4, 3, bias=False), Recipe("c", roles))
    x = torch.randn(2, 3, 6, 6) * torch.tensor([1.0, 10, 100]).reshape(1, 3, 1, 1)

    def q(t, axes):
        step = t.abs().amax(axes, keepdim=True) / 7
        return (t / step).round() * step

    expected = F.conv2d(q(x, (0, 2, 3)), q(layer.weight.detach(), (1, 2, 3)))
    torch.testing.assert_close(layer(x), expected)


def test_roles_per_tensor_of_blocks_default():
    assert QSpec(Int(8)).blocks == PerTensor() and FINE.scale == Static(2.0**-16)
