"""Attention against PyTorch's own, for every combination of arguments, and with its two products quantized."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit import AbsMax, Int, Int32, PerRow, Product, Products, QSpec, Recipe, Roles, Rule
from lowbit.attention import QMultiheadAttention, scaled_dot_product_attention
from lowbit.quantizer import IDENTITY

INT8 = QSpec(Int(8, narrow=True), scale=AbsMax(127))
ALL = ("linear", "conv", "embedding", "attention")
# quantizes nothing, but converts every part
NOTHING = Recipe("nothing", Roles(W=IDENTITY, A=IDENTITY, E=IDENTITY), layers=ALL)


# ---- the function ----------------------------------------------------------------------------------------------------

MASKS = {
    "none": None,
    "bool": torch.tensor([[True, False, True, True, False], [True] * 5, [False, True, True, False, True]]),
    "float": torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "per batch": torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(0)) > 0.3,
    "a row that sees nothing": torch.tensor([[False] * 5, [True] * 5, [True, False, False, False, False]]),
    "float with -inf": torch.zeros(3, 5, dtype=torch.float64).index_fill(1, torch.tensor([1, 4]), -math.inf),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_function_equals_pytorch(mask, scale):
    q, k, v = (torch.randn(2, 4, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((3, 6), (5, 6), (5, 7)))
    mine = scaled_dot_product_attention(q, k, v, MASKS[mask], scale=scale)
    theirs = F.scaled_dot_product_attention(q, k, v, MASKS[mask], scale=scale)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    e = torch.randn_like(mine)
    for a, b in zip(torch.autograd.grad(mine, (q, k, v), e), torch.autograd.grad(theirs, (q, k, v), e), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length, keys", [(4, 4), (3, 5), (5, 3), (1, 4)])
def test_causal(length, keys):
    q, k, v = (torch.randn(2, 4, n, 6, dtype=torch.float64) for n in (length, keys, keys))
    mine = scaled_dot_product_attention(q, k, v, is_causal=True)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="not both"):
        scaled_dot_product_attention(q, k, v, torch.ones(length, keys, dtype=torch.bool), is_causal=True)


@pytest.mark.parametrize("shared", [1, 2, 6])
def test_shared_heads(shared):
    q = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    k, v = (torch.randn(2, shared, 5, 4, dtype=torch.float64) for _ in range(2))
    mine = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    theirs = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="6 query heads can't share 4"):
        scaled_dot_product_attention(q, torch.randn(2, 4, 5, 4), torch.randn(2, 4, 5, 4), enable_gqa=True)


def test_a_row_that_sees_nothing_is_zero():
    q, k, v = (torch.randn(1, 1, 3, 4) for _ in range(3))
    mask = torch.tensor([[True] * 3, [False] * 3, [True] * 3])
    assert torch.equal(scaled_dot_product_attention(q, k, v, mask)[0, 0, 1], torch.zeros(4))


def test_types_and_dropout():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        q = torch.randn(2, 2, 3, 4).to(dtype)
        y = scaled_dot_product_attention(q, q, q)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), F.scaled_dot_product_attention(*[q.float()] * 3), rtol=0.02, atol=0.02)
    q, v = torch.randn(4, 64, 8), torch.ones(4, 64, 1)
    y = scaled_dot_product_attention(q, q, v, dropout_p=0.25)
    assert float(y.mean()) == pytest.approx(1.0, abs=0.1) and not torch.allclose(y, v)


# ---- the module ------------------------------------------------------------------------------------------------------


def modules(**options) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, **options).double()
    if plain.in_proj_bias is not None:
        nn.init.normal_(plain.in_proj_bias)
        nn.init.normal_(plain.out_proj.bias)
    return plain, lowbit.apply(copy.deepcopy(plain), NOTHING)


def padding(kind: str | None, batched: bool) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.tensor([[False] * 5, [False, False, True, False, True], [True, False, False, False, True]])
    mask = mask if batched else mask[1]
    return mask if kind == "bool" else torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -math.inf)


def mask_of(kind: str | None, batched: bool) -> Tensor | None:
    if kind is None:
        return None
    g = torch.Generator().manual_seed(4)
    heads = 6 if batched else 2
    shape = (4, 5) if kind.startswith("2") else (heads, 4, 5)
    allowed = torch.rand(shape, generator=g) > 0.7
    allowed[..., 1] = False  # each query sees a key that no padding hides
    allowed[..., 3] = False
    return allowed if kind.endswith("bool") else torch.randn(shape, generator=g, dtype=torch.float64)


CASES = list(
    itertools.product(
        [None, "bool", "float"],
        [None, "2 bool", "2 float", "3 bool", "3 float"],
        [False, True],
        ["batch first", "length first", "unbatched"],
    )
)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("pad, mask, average, form", CASES)
def test_module_equals_pytorch(pad, mask, average, form):
    batched = form != "unbatched"
    plain, mine = modules(batch_first=form == "batch first")
    q, k = torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(3, 5, 8, dtype=torch.float64)
    if form == "length first":
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    elif form == "unbatched":
        q, k = q[0], k[0]
    for need in (True, False):
        options = dict(
            key_padding_mask=padding(pad, batched),
            attn_mask=mask_of(mask, batched),
            need_weights=need,
            average_attn_weights=average,
        )
        (y, w), (y2, w2) = (m(q, k, k, **options) for m in (plain, mine))
        torch.testing.assert_close(y, y2, rtol=1e-10, atol=1e-11)
        assert (w is None) == (w2 is None)
        if w is not None:
            torch.testing.assert_close(w, w2, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"kdim": 3, "vdim": 5}, {"kdim": 3, "vdim": 5, "bias": False}, {"batch_first": True}],
)
def test_module_options_and_gradients(options):
    plain, mine = modules(**options)
    assert type(mine) is QMultiheadAttention
    x = [torch.randn(4, 3, d, dtype=torch.float64) for d in (8, options.get("kdim", 8), options.get("vdim", 8))]
    grads = []
    for m in (plain, mine):
        inputs = [t.clone().requires_grad_() for t in x]
        y, w = m(*inputs)
        (y.square().sum() + w.square().sum()).backward()
        grads.append([t.grad for t in (*inputs, *m.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in mine.named_parameters()]


def test_causal_hint():
    plain, mine = modules()
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    for need in (True, False):
        torch.testing.assert_close(
            plain(x, x, x, attn_mask=mask, is_causal=True, need_weights=need)[0],
            mine(x, x, x, attn_mask=mask, is_causal=True, need_weights=need)[0],
        )
    with pytest.raises(ValueError, match="needs attn_mask"):
        mine(x, x, x, is_causal=True)


def test_dropout_draws_from_torch_s_generator():
    plain, mine = modules(dropout=0.4)
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    outputs = []
    for m in (plain, mine, mine):
        torch.manual_seed(7)
        outputs.append(m(x, x, x))
    for y, w in outputs[1:]:
        torch.testing.assert_close(y, outputs[0][0], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(w, outputs[0][1], rtol=1e-10, atol=1e-11)  # the weights that were used
    assert not torch.equal(mine(x, x, x)[0], mine(x, x, x)[0])
    mine.eval()
    assert torch.equal(mine(x, x, x)[0], mine(x, x, x)[0])


def test_empty_batch():
    _, mine = modules(batch_first=True)
    y, w = mine(*[torch.randn(0, 4, 8, dtype=torch.float64)] * 3)
    assert y.shape == (0, 4, 8) and w.shape == (0, 4, 4)


def test_fully_masked_rows_are_zero_instead_of_nan():
    _, mine = modules(batch_first=True)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    pad = torch.tensor([[True] * 4, [False] * 4])
    y, w = mine(x, x, x, key_padding_mask=pad)
    torch.testing.assert_close(y[0], mine.out_proj.bias.expand(4, 8))
    assert torch.equal(w[0], torch.zeros(4, 4, dtype=torch.float64))


# ---- quantized -------------------------------------------------------------------------------------------------------


def q8(t: Tensor) -> Tensor:
    step = t.abs().max() / 127
    return (t / step).round() * step


def test_both_products_are_quantized():
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    recipe = Recipe("a", Roles(W=INT8, A=INT8), layers=("attention",))
    mine = lowbit.apply(copy.deepcopy(plain), recipe)
    x = torch.randn(3, 4, 8)
    q, k, v = (
        t.reshape(3, 4, 2, 4).transpose(1, 2)
        for t in F.linear(x, plain.in_proj_weight, plain.in_proj_bias).chunk(3, -1)
    )
    w = ((q8(q) @ q8(k).mT) / 2).softmax(-1)
    y = (q8(w) @ q8(v)).transpose(1, 2).reshape(3, 4, 8)
    torch.testing.assert_close(mine(x, x, x)[0], plain.out_proj(y), rtol=1e-4, atol=1e-5)
    rows = {(r.layer, r.role): r for r in lowbit.report(mine, (x, x, x)).rows}
    assert {(n, r) for n in ("scores", "context") for r in "AW"} <= set(rows)
    assert rows["scores", "A"].sqnr > 30 and "layers" in rows["q_proj", "-"].note


def test_gradients_of_quantized_products():
    recipe = Recipe("a", Roles(A=INT8, E=INT8), layers=("attention",))
    mine = lowbit.apply(nn.MultiheadAttention(4, 1, batch_first=True), recipe)
    a, b, e = (
        torch.randn(1, 1, 3, 4, requires_grad=True),
        torch.randn(1, 1, 4, 3, requires_grad=True),
        torch.randn(1, 1, 3, 3),
    )
    mine.products["scores"](a, b).backward(e)
    torch.testing.assert_close(a.grad, q8(e) @ q8(b.detach()).mT)
    torch.testing.assert_close(b.grad, q8(a.detach()).mT @ q8(e))


def test_attention_in_integers_is_attention_on_grid_values():
    row = QSpec(Int(8, narrow=True), PerRow(), AbsMax(127))
    x = torch.randn(2, 5, 8)
    y = []
    for accumulator in (None, Int32()):
        torch.manual_seed(0)
        recipe = Recipe(
            "i", Roles(W=row, A=row), Products(Product(accumulator=accumulator)), layers=("linear", "attention")
        )
        y.append(lowbit.apply(nn.MultiheadAttention(8, 2, batch_first=True), recipe)(x, x, x)[0])
    torch.testing.assert_close(y[0], y[1], rtol=1e-4, atol=1e-5)


def test_rules_reach_single_products_and_projections():
    rules = (Rule("*.scores", roles=Roles()), Rule("*.v_proj", roles=Roles()))
    model = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    lowbit.apply(model, Recipe("r", Roles(W=INT8, A=INT8), rules=rules, layers=("linear", "attention")))
    assert set(model.self_attn.projections) == {"q_proj", "k_proj", "out_proj"}
    assert set(model.self_attn.products) == {"context"}
    model(torch.randn(2, 3, 8)).sum().backward()
    assert model.self_attn.in_proj_weight.grad.abs().min(1).values.max() > 0


def test_training_a_transformer_with_attention_in_eight_bits_learns():
    torch.manual_seed(0)
    spec = QSpec(Int(8, narrow=True), scale=AbsMax(127), rounding="stochastic")
    model = nn.Sequential(
        nn.Embedding(10, 16), nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), nn.Linear(16, 10)
    )
    lowbit.apply(model, Recipe("t", Roles(W=INT8, A=INT8, E=spec), layers=ALL))
    optimizer = lowbit.attach(model, torch.optim.Adam(model.parameters(), 0.01))
    for _ in range(60):
        x = torch.randint(0, 10, (32, 6))
        loss = F.cross_entropy(
            model(x).flatten(0, 1), x.flip(1).flatten()
        )  # without positions: the bag must be learned
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 2.0  # log 10 = 2.30 without attention; a bag of 6 letters gives about 1.6
