"""`apply`: which layers get what, nothing silently skipped, nothing half-done, ties and names kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import lowbit
from lowbit import AbsMax, Int, Keep, PerAxis, Product, Products, QSpec, Recipe, Roles, Rule, Swap
from lowbit.control import control_of, find_control, layers_of
from lowbit.quantizer import IDENTITY, Quantizer
from lowbit.recipe import Step, float_ends
from lowbit.serial import spec

ALL = ("linear", "conv", "embedding", "attention")
INT8 = QSpec(Int(8, narrow=True), scale=AbsMax(127))
INT4 = QSpec(Int(4, narrow=True), scale=AbsMax(7))
SR = QSpec(Int(8, narrow=True), scale=AbsMax(127), rounding="stochastic")
INTS = Recipe("ints", Roles(W=INT8, A=INT8, E=INT8))
NOISE = Recipe("noise", Roles(W=SR, A=SR, E=SR, G=SR, U=SR))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3)
    )


X = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def bits(model: nn.Module, role: str = "W") -> dict[str, float]:
    return {r.layer: r.bits for r in lowbit.report(model).rows if r.role == role}


# ---- loading, tying, freezing, copying -------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [INTS, NOISE, lowbit.create("fp32"), lowbit.create("twn")])
def test_a_float_checkpoint_loads_before_and_after(recipe):
    torch.manual_seed(1)
    trained = cnn()
    before = lowbit.apply(copy.deepcopy(trained), recipe)
    after = lowbit.apply(cnn(), recipe)
    after.load_state_dict(trained.state_dict(), strict=True)
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(before.eval()(X), after.eval()(X))
    assert [n for n, _ in before.named_parameters()] == [n for n, _ in trained.named_parameters()]


def test_a_checkpoint_of_a_converted_model_is_strict_about_the_rest():
    model = lowbit.apply(cnn(), INTS)
    state = cnn().state_dict()
    del state["0.weight"]
    with pytest.raises(RuntimeError, match="0.weight"):
        model.load_state_dict(state, strict=True)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.table(i))))


def test_tied_weights_stay_tied():
    model = lowbit.apply(Tied(), Recipe("t", Roles(W=INT8, A=INT8, E=INT8), layers=ALL))
    assert model.head.weight is model.table.weight and len(list(model.parameters())) == 3
    model(torch.tensor([1, 2])).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model.head.weight is model.table.weight
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.table.weight is not model.table.weight
    assert {r.layer for r in lowbit.report(model).rows if r.role == "W"} == {"table", "body", "head"}


def test_frozen_parameters_stay_frozen():
    model = cnn()
    model[0].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    lowbit.apply(model, NOISE)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, False, True, True]
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    assert model[0].weight.grad is None and model[4].bias.grad is None
    for name, frozen in (
        ("0.weight", True),
        ("0.bias", True),
        ("4.bias", True),
        ("2.weight", False),
        ("5.weight", False),
    ):
        assert torch.equal(before[name], model.state_dict()[name]) is frozen, name


def train(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(X) - 1).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
    return losses


def test_a_deep_copy_trains_equally_and_apart():
    model = lowbit.apply(cnn(), NOISE)
    model(X).sum().backward()
    twin = copy.deepcopy(model)
    untouched = copy.deepcopy(model.state_dict())
    losses = train(twin)
    assert all(torch.equal(a, b) for a, b in zip(untouched.values(), model.state_dict().values(), strict=True))
    assert train(model) == losses and losses[-1] < losses[0]
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_copy_of_a_trained_model_goes_on_equally():
    model = lowbit.apply(cnn(), NOISE)
    train(model, 2)
    twin = copy.deepcopy(model)
    assert not control_of(twin).is_attached and control_of(model).is_attached
    fresh = lowbit.apply(cnn(), NOISE)
    fresh.load_state_dict(model.state_dict())
    assert train(twin) == train(fresh)


def test_clipping_sees_the_true_gradient():
    model, plain = lowbit.apply(cnn(), Recipe("i", Roles(W=IDENTITY, A=IDENTITY))), cnn()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    norms = []
    for m in (model, plain):
        (m(X) * 100).sum().backward()
        norms.append(float(nn.utils.clip_grad_norm_(m.parameters(), 1.0)))
        assert float(nn.utils.get_total_norm([p.grad for p in m.parameters()])) == pytest.approx(1, rel=1e-4)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_gradient_accumulation_adds_up():
    model = lowbit.apply(cnn(), Recipe("w", Roles(W=SR)))
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for part in X.split(2):
        for n, g in zip(total, torch.autograd.grad(model(part).sum(), model.parameters()), strict=True):
            total[n] += g
    for part in X.split(2):
        model(part).sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, total[n])  # the same W in every part


# ---- which layer gets what -------------------------------------------------------------------------------------------


def test_first_and_last():
    model = lowbit.apply(cnn(), Recipe("r", Roles(W=INT8), rules=float_ends()))
    assert bits(model) == {"2": 8, "4": 8} and type(model[0]) is nn.Conv2d and type(model[5]) is nn.Linear
    left = {left.name: left.reason for left in control_of(model).left}
    assert left == {"0": "a rule leaves it in float", "5": "a rule leaves it in float"}


def test_the_last_rule_that_matches_decides():
    rules = (
        Rule(roles=Roles(W=INT4)),
        Rule(type="conv", roles=Roles(W=INT8)),
        Rule(where="first", roles=Roles(W=SR)),
        Rule("4", products=Products(out=Product(left=Keep()))),
        Rule("[5]", roles=Roles()),
    )
    model = lowbit.apply(cnn(), Recipe("r", Roles(W=IDENTITY), rules=rules))
    specs = {n: q.roles.W for n, q in layers_of(model).items()}
    assert specs == {"0": SR, "2": INT8, "4": INT4}
    assert layers_of(model)["4"].products.out.left == Keep() and layers_of(model)["2"].products == Products()
    model = lowbit.apply(cnn(), Recipe("r", Roles(W=IDENTITY), rules=rules[::-1]))
    assert {n: q.roles.W for n, q in layers_of(model).items()} == dict.fromkeys("0245", INT4)


def test_names_of_rules_are_patterns():
    model = nn.ModuleDict(
        {"enc": nn.ModuleDict({"fc1": nn.Linear(3, 3), "fc2": nn.Linear(3, 3)}), "fc2": nn.Linear(3, 3)}
    )
    lowbit.apply(model, Recipe("r", Roles(W=INT8), rules=(Rule("*.fc2", roles=Roles(W=INT4)),)))
    assert bits(model) == {"enc.fc1": 8, "enc.fc2": 4, "fc2": 8}


def test_a_rule_for_a_layer_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="names 'conv1', which this model lacks; did you mean 'conv'"):
        lowbit.apply(nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)}), Recipe("r", Roles(W=INT8), rules=(Rule("conv1"),)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Rule(type="liner"), "did you mean 'linear'"),
        (lambda: Rule(where="frist"), "did you mean 'first'"),
        (lambda: Recipe("r", layers=("convs",)), "did you mean 'conv'"),
        (lambda: Products(error_at="in"), "'input'"),
        (lambda: lowbit.create("twm"), "did you mean 'twn'"),
        (lambda: lowbit.create("twn", treshold=1), "'threshold'"),
        (lambda: lowbit.create("twn", threshold=-1), "got -1"),
        (lambda: lowbit.quantizer("twn", "X"), "unknown role 'X'"),
        (lambda: lowbit.quantizer("twn", "E"), "leaves role E in float"),
    ],
)
def test_unknown_words_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- nothing is silently skipped -------------------------------------------------------------------------------------


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Same(nn.Linear):
    """A subclass that computes what its base does."""


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(3, 4))


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.own, self.same = nn.Linear(4, 4), Own(4, 4), Same(4, 4)
        self.lstm, self.cell, self.bilinear = nn.LSTM(4, 4), nn.GRUCell(4, 4), nn.Bilinear(4, 4, 4)
        self.conv = nn.ModuleList([nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1)])
        self.up = nn.ModuleList([nn.ConvTranspose1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1)])
        self.table, self.bag = nn.Embedding(4, 4), nn.EmbeddingBag(4, 4)
        self.attention, self.kv = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.zero, self.mine = nn.MultiheadAttention(4, 2, add_zero_attn=True), OwnAttention(4, 2)
        self.separate = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
        self.function, self.positions = Functional(), Table()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.pruned = nn.Linear(4, 4)
        prune.l1_unstructured(self.pruned, "weight", 0.5)
        self.param_lstm = nn.utils.parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
        self.norm, self.relu = nn.LayerNorm(4), nn.ReLU()


def weighted(model: nn.Module) -> set[str]:
    """Names of modules that hold a parameter of two or more dimensions themselves."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) or ".parametrizations" in name:
            continue
        if any(p.dim() >= 2 for p in module.parameters(recurse=False)) or name.endswith(("normed", "spectral")):
            names.add(name)
    return names


@pytest.mark.parametrize("layers", [ALL, ("linear", "conv"), ("attention",)])
def test_every_layer_with_a_weight_is_quantized_or_explained(layers):
    torch.manual_seed(0)
    names = weighted(Zoo())
    assert len(names) >= 23
    model = lowbit.apply(Zoo(), Recipe("z", Roles(W=INT8, A=INT8, E=INT8), layers=layers))
    rows = lowbit.report(model).rows
    quantized = {r.layer for r in rows if r.kind != "other"}
    reasons = {r.layer: r.note for r in rows if r.kind == "other"}
    assert all(reasons.values()) and not quantized & set(reasons)
    for name in names:
        parts = [
            n for n in (*quantized, *reasons) if n == name or n.startswith(name + ".") or n == name.rsplit(".", 1)[0]
        ]
        assert parts, f"{name} is silently skipped"
    if layers == ALL:
        assert {
            "linear",
            "same",
            "conv.0",
            "conv.1",
            "conv.2",
            "up.1",
            "table",
            "normed",
            "spectral",
            "pruned",
            "attention.q_proj",
            "attention.k_proj",
            "attention.v_proj",
            "attention.out_proj",
            "attention.scores",
            "attention.context",
            "separate.k_proj",
            "separate.scores",
        } <= quantized
        assert set(reasons) == {
            "own",
            "lstm",
            "cell",
            "bilinear",
            "up.0",
            "up.2",
            "bag",
            "kv",
            "zero",
            "mine",
            "function",
            "positions",
            "param_lstm",
        }
        assert "overrides the forward" in reasons["own"] and "overrides the forward" in reasons["mine"]
        assert "add_bias_kv" in reasons["kv"] and "no quantized version" in reasons["lstm"]
    for name in ("own", "kv", "mine"):
        assert type(getattr(model, name)).__module__ != "lowbit.layers"


def test_subclasses_and_parametrizations_compute_quantized():
    torch.manual_seed(0)
    zoo = Zoo()
    torch.manual_seed(0)
    model = lowbit.apply(Zoo(), Recipe("z", Roles(W=QSpec(Int(2, narrow=True), scale=AbsMax(1)))))
    x = torch.randn(3, 4)
    for name in ("same", "normed", "pruned"):
        layer, plain = getattr(model, name), getattr(zoo, name)
        w = plain.weight.detach()
        q = (w / w.abs().max()).round() * w.abs().max()
        torch.testing.assert_close(layer(x), x @ q.t() + plain.bias)
        layer(x).sum().backward()
        assert isinstance(layer, Same if name == "same" else nn.Linear) and all(
            p.grad is not None for p in layer.parameters()
        )


def test_an_attention_module_needs_a_or_e_to_be_quantized():
    model = nn.TransformerEncoderLayer(4, 2, 8)
    lowbit.apply(model, Recipe("w", Roles(W=INT8), layers=ALL))
    reasons = {r.layer: r.note for r in lowbit.report(model).rows if r.kind == "other"}
    assert set(reasons) == {"self_attn.scores", "self_attn.context"} and "no role" in reasons["self_attn.scores"]


def test_lazy_layers_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="run one batch"):
        lowbit.apply(nn.Sequential(nn.LazyLinear(3)), INTS)


def test_shapes_of_the_model_stay():
    model = cnn()
    lowbit.apply(model, INTS)
    assert len(model) == 6 and [n for n, _ in model.named_children()] == list("012345")
    assert len(list(iter(model))) == 6 and model[:2](X).shape == (5, 4, 4, 4)
    single = lowbit.apply(nn.Linear(3, 2), INTS)
    assert bits(single) == {"": 8} and single(torch.randn(1, 3)).shape == (1, 2)


def test_a_shared_module_is_converted_once():
    shared = nn.Linear(3, 3)
    model = lowbit.apply(nn.Sequential(shared, nn.ReLU(), shared), NOISE)
    assert model[0] is model[2] and list(layers_of(model)) == ["0"]
    x = torch.randn(3, 3)
    a, b = model[0](x), model[2](x)
    assert not torch.equal(a, b)  # A is drawn at every use


# ---- failing and repeating -------------------------------------------------------------------------------------------


@spec
class ChangesThenFails(Step):
    """Changes a weight, then fails."""

    def run(self, model, layers):
        with torch.no_grad():
            model[0].weight.mul_(2)
        model[4].weight = nn.Parameter(torch.zeros(3, 3))
        model[4].register_buffer("extra", torch.zeros(1))
        raise KeyError("broken on purpose")


@pytest.mark.parametrize(
    "bad, error",
    [
        (Recipe("r", Roles(W=QSpec(Int(4), PerAxis(3), lowbit.Learned(7), backward=lowbit.LearnedStep()))), ValueError),
        (Recipe("r", Roles(W=QSpec(Int(4), kind="nothing"))), ValueError),
        (Recipe("r", Roles(W=INT8), swaps=(Swap("ReLU", "Nothing"),)), ValueError),
        (Recipe("r", Roles(W=INT8, A=INT8), swaps=(Swap("ReLU", "GELU"),), steps=(ChangesThenFails(),)), KeyError),
        (Recipe("r", Roles(W=INT8), layers=("embedding",)), ValueError),
        (Recipe("r", Roles(W=INT8), rules=(Rule(roles=Roles()),)), ValueError),
        ("twn", TypeError),
    ],
)
def test_a_failed_apply_changes_nothing(bad, error):
    model = cnn()
    classes = [type(m) for m in model.modules()]
    state, output = copy.deepcopy(model.state_dict()), model(X)
    params, fields = list(model.parameters()), [set(m.__dict__) for m in model.modules()]
    with pytest.raises(error):
        lowbit.apply(model, bad)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == list(state) and torch.equal(model(X), output)
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    assert [set(m.__dict__) for m in model.modules()] == fields and find_control(model) is None
    lowbit.apply(model, INTS)  # and it can be converted afterwards


def test_a_failed_apply_gives_attention_back():
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    x = torch.randn(2, 3, 4)
    output = model.eval()(x)

    with pytest.raises(
        AttributeError
    ):  # nn.TransformerEncoderLayer has no weight: the step breaks after the conversion
        lowbit.apply(model, Recipe("r", Roles(W=INT8, A=INT8), layers=ALL, steps=(ChangesThenFails(),)))
    assert type(model[0].self_attn) is nn.MultiheadAttention and model[0].activation_relu_or_gelu == 1
    assert torch.equal(model(x), output)


def test_apply_twice_raises():
    model = lowbit.apply(cnn(), INTS)
    state = list(model.state_dict())
    with pytest.raises(ValueError, match="'ints' was applied before"):
        lowbit.apply(model, INTS)
    assert list(model.state_dict()) == state
    empty = lowbit.apply(cnn(), lowbit.create("fp32"))
    with pytest.raises(ValueError, match="applied before"):
        lowbit.apply(empty, INTS)


def test_the_other_verbs_need_a_recipe():
    for verb in (
        lowbit.report,
        lambda m: lowbit.calibrate(m, [X]),
        lambda m: lowbit.save(m, "nowhere"),
        lambda m: lowbit.attach(m, torch.optim.SGD(m.parameters(), 0.1)),
    ):
        with pytest.raises(ValueError, match="call lowbit.apply"):
            verb(cnn())


# ---- report ----------------------------------------------------------------------------------------------------------


def test_report_measures_each_tensor():
    model = lowbit.apply(cnn(), Recipe("r", Roles(W=INT4, A=INT8, E=INT8, G=INT4)))
    state = copy.deepcopy(model.state_dict())
    rows = {(r.layer, r.role): r for r in lowbit.report(model, X).rows}
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert set(rows) == {(n, r) for n in "0245" for r in (*"WAEG", "out", "grad_a", "grad_w")}
    w = model[4].weight.detach().double()
    step = w.abs().max() / 7
    noise = (w - (w / step).round() * step).square().sum()
    assert rows["4", "W"].sqnr == pytest.approx(float(10 * torch.log10(w.square().sum() / noise)), abs=1e-3)
    assert rows["4", "W"].scale == pytest.approx(float(step), rel=1e-6) and rows["4", "W"].clipped == 0
    assert 20 < rows["4", "A"].sqnr < 60 and rows["4", "G"].sqnr == rows["4", "G"].sqnr
    text = str(lowbit.report(model))
    assert text.startswith("recipe r") and len(text.splitlines()) == 2 + 28


def test_report_of_attention_has_its_projections_and_products():
    model = lowbit.apply(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        Recipe("r", Roles(W=INT4, A=INT8, E=INT8, G=INT4), layers=ALL),
    )
    for batch in (None, torch.randn(2, 3, 8)):
        rows = {(r.layer, r.role): r for r in lowbit.report(model, batch).rows}
        w = model.self_attn.in_proj_weight.detach()[8:16].double()
        step = w.abs().max() / 7
        noise = (w - (w / step).round() * step).square().sum()
        assert rows["self_attn.k_proj", "W"].sqnr == pytest.approx(
            float(10 * torch.log10(w.square().sum() / noise)), abs=1e-3
        )
    assert all(rows["self_attn." + n, r].sqnr > 20 for n in ("scores", "context") for r in "AWE")
    assert rows["self_attn.out_proj", "G"].sqnr > 5


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_transformer_encoder_in_evaluation_runs_its_quantized_layers(nested):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True) if nested else layer
    lowbit.apply(model, Recipe("r", Roles(W=QSpec(Int(2, narrow=True), scale=AbsMax(1)))))
    x = torch.randn(3, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5]) if nested else None
    with torch.no_grad():
        slow = model.train()(x, src_key_padding_mask=padding)
        fast = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(slow, fast)
    seen = []
    for quant in layers_of(model).values():
        quant.slots["W"].watch = lambda *a: seen.append(1)
    with torch.no_grad():
        model(x, src_key_padding_mask=padding)
    assert len(seen) == len(layers_of(model)) == (12 if nested else 6)


def test_swaps():
    model = lowbit.apply(cnn(), Recipe("s", Roles(W=INT8), swaps=(Swap("ReLU", "GELU"),)))
    assert type(model[1]) is nn.GELU


def test_quantizer_of_a_method_alone():
    q = lowbit.quantizer("twn", "W")
    assert q(torch.tensor([1.0, -3.0, 0.1])).tolist() == [2, -2, 0]  # delta = 0.7 * 4.1 / 3 = 0.957
