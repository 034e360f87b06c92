"""One battery over the whole registry: what every method promises, whatever its paper."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowbit
from lowbit.control import quantizers_of
from lowbit.methods import METHODS
from lowbit.quantizer import Quantizer
from lowbit.rng import uniform

NAMES = sorted(METHODS)
QUANTIZING = [n for n in NAMES if METHODS[n].card.roles]
SLOTS = [(n, r) for n in QUANTIZING for r in METHODS[n].function().roles.named()]
UNBIASED = {
    ("luq", "E"),
    ("gupta", "W"),
    ("gupta", "A"),
    ("gupta", "E"),
    ("gupta", "G"),
    ("gupta", "U"),
    ("fp8", "U"),
    ("dorefa", "E"),
    ("psq", "E"),
    ("bhq", "E"),
    ("ptq_sgd", "E"),
    ("int8", "E"),
}


def sample(role: str, shape: tuple[int, ...] = (8, 24)) -> Tensor:
    """Values a role could meet: activations are not negative, the rest is symmetric and below 1."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.25
    return x.abs() if role == "A" else x


def make(name: str, role: str, **kwargs: object) -> Quantizer:
    q = lowbit.quantizer(name, role, **kwargs)
    if hasattr(q, "learned"):
        q.calibrating = True
        q(sample(role))
        q.calibrating = False
    return q


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a, nan=123.0), torch.nan_to_num(b, nan=123.0))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    return x, torch.tensor(data.target)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 48),
        nn.BatchNorm1d(48),
        nn.ReLU(),
        nn.Linear(48, 48),
        nn.BatchNorm1d(48),
        nn.ReLU(),
        nn.Linear(48, 10),
        nn.BatchNorm1d(10),
    )


def settings(name: str) -> dict:
    return dict(METHODS[name].card.training)


def optimizer_for(name: str, model: nn.Module) -> torch.optim.Optimizer:
    given = settings(name)
    if given.get("optimizer", "sgd") in ("adam", "adamw"):
        return torch.optim.Adam(model.parameters(), lr=given.get("lr", 1e-3))
    return torch.optim.SGD(model.parameters(), lr=given.get("lr", 0.1), momentum=given.get("momentum", 0.9))


def criterion(recipe: lowbit.Recipe, logits: Tensor, target: Tensor) -> Tensor:
    hot = nn.functional.one_hot(target, 10).to(logits.dtype)
    if recipe.criterion == "sse":
        return (logits - hot).square().sum()
    if recipe.criterion == "squared_hinge":
        return (1 - (2 * hot - 1) * logits).clamp_min(0).square().mean()
    return nn.functional.cross_entropy(logits, target)


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, digits: tuple[Tensor, Tensor], first: int, last: int
) -> None:
    recipe = lowbit.model.control_of(model).recipe
    x, y = digits
    for i in range(first, last):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(i))[:64]
        optimizer.zero_grad()
        (criterion(recipe, model(x[order]), y[order]) + lowbit.penalty(model)).backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


# ---- recipes and cards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_json_both_ways(name: str) -> None:
    recipe = lowbit.create(name)
    assert lowbit.Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.name == name


@pytest.mark.parametrize("name", NAMES)
def test_card_is_complete(name: str) -> None:
    card = METHODS[name].card
    assert card.title and card.arxiv and 1980 < card.year < 2030 and card.summary
    assert len(METHODS[name].doc.splitlines()) > (0 if name == "fp32" else 5), "the docstring is the method's page"
    assert card in lowbit.list_methods(area=card.area)
    assert all("unconfirmed" not in line for line in card.headline)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_option_names_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match="layers"):
        lowbit.create(name, layer=("linear",))


# ---- one role on its own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "role"), SLOTS)
def test_encode_then_decode_equals_forward(name: str, role: str) -> None:
    q, x = make(name, role), sample(role)
    assert same(q.eval().encode(x).decode(), q(x))
    if q.spec.stochastic:
        u = uniform(x.shape, 1, 2, 3)
        assert same(q.encode(x, u).decode(), q(x, u))


@pytest.mark.parametrize(("name", "role"), SLOTS)
def test_values_lie_on_the_grid(name: str, role: str) -> None:
    q, x = make(name, role).eval(), sample(role)
    stored = q.encode(x)
    levels = stored.format.levels() if stored.format.bits <= 16 else None
    grid = stored.format.grid(stored.integers(), torch.float64)
    assert levels is None or bool(torch.isin(grid, levels).all())
    codes = stored.integers().to(torch.int64)
    assert int(codes.max()) - int(codes.min()) < 2**stored.format.bits


@pytest.mark.parametrize(("name", "role"), SLOTS)
def test_strange_inputs(name: str, role: str) -> None:
    q = make(name, role)
    assert q(torch.zeros(0, 5)).shape == (0, 5)
    assert q.encode(torch.zeros(0, 5)).decode().shape == (0, 5)
    q.eval()
    assert bool(torch.isfinite(q(torch.zeros(4, 6))).all()), "zeros give numbers"
    for value in (1e-42, 1e-30, 1e30):
        x = torch.full((3, 4), value)
        assert not bool(q(x).isnan().any()), value
    x = sample(role, (6, 10)).t()
    assert not x.is_contiguous() and q(x).shape == x.shape
    assert same(q(x), q(x.contiguous()))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert q(sample(role).to(dtype)).dtype == dtype
    with pytest.raises(TypeError, match="int64"):
        q(torch.arange(4))


@pytest.mark.parametrize(("name", "role"), SLOTS)
def test_nan_is_not_hidden(name: str, role: str) -> None:
    q, x = make(name, role).eval(), sample(role)
    x[2, 3] = float("nan")
    assert bool(q(x)[2, 3].isnan()), "a NaN stays visible"


@pytest.mark.parametrize(("name", "role"), sorted(UNBIASED & set(SLOTS)))
def test_stochastic_rounding_is_unbiased(name: str, role: str) -> None:
    q, x = make(name, role), sample(role, (4, 12)) * 0.9
    draws = 4096
    total, square = torch.zeros(4, 12, dtype=torch.float64), torch.zeros(4, 12, dtype=torch.float64)
    for i in range(draws):
        value = q(x, uniform(x.shape, 7, i, 0)).double()
        total, square = total + value, square + value.square()
    mean = total / draws
    error = ((square / draws - mean.square()).clamp_min(0) / draws).sqrt()
    # what is drawn once in a few hundred times may not be seen: less than ten such events of one step each
    rare = (
        10
        / draws
        * torch.maximum(2 * q.encode(x, uniform(x.shape, 7, 0, 0)).scale.double().abs().amax(), x.abs().amax())
    )
    assert bool(((mean - x.double()).abs() <= 6 * error + rare).all())


# ---- a model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_learns_digits(name: str, digits: tuple[Tensor, Tensor]) -> None:
    model = network()
    lowbit.apply(model, lowbit.create(name))
    optimizer = lowbit.attach(model, optimizer_for(name, model))
    x, y = digits
    accuracy = 0.0
    for start in range(0, 600, 150):  # a few seconds at most; most methods need a quarter of it
        steps(model.train(), optimizer, digits, start, start + 150)
        accuracy = float((model.eval()(x).argmax(-1) == y).float().mean())
        if accuracy > 0.85:
            break
    assert accuracy > 0.85, accuracy


@pytest.mark.parametrize("name", NAMES)
def test_resume_repeats_every_bit(name: str, digits: tuple[Tensor, Tensor]) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network()
        lowbit.apply(model, lowbit.create(name))
        return model, lowbit.attach(model, optimizer_for(name, model))

    model, optimizer = fresh()
    steps(model, optimizer, digits, 0, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps(model, optimizer, digits, 3, 6)

    again, other = fresh()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    steps(again, other, digits, 3, 6)
    for key, value in state(model).items():
        assert torch.equal(value, state(again)[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits_whatever_the_threads(name: str, digits: tuple[Tensor, Tensor]) -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = network()
            lowbit.apply(model, lowbit.create(name))
            results.append(
                [
                    q.quantize(sample("A", (32, 64)), q.key(torch.zeros(1)))
                    for q in quantizers_of(model)
                    if q.layout is not None and not q.weight
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_deterministic_and_changes_nothing(name: str, digits: tuple[Tensor, Tensor]) -> None:
    model = network()
    lowbit.apply(model, lowbit.create(name))
    optimizer = lowbit.attach(model, optimizer_for(name, model))
    steps(model, optimizer, digits, 0, 2)
    model.eval()
    before = state(model)
    x = digits[0][:32]
    assert torch.equal(model(x), model(x))
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_is_independent(name: str, digits: tuple[Tensor, Tensor]) -> None:
    model = network()
    lowbit.apply(model, lowbit.create(name))
    steps(model, lowbit.attach(model, optimizer_for(name, model)), digits, 0, 1)
    twin = copy.deepcopy(model)
    before = state(model)
    steps(twin, lowbit.attach(twin, optimizer_for(name, twin)), digits, 1, 3)
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())
    assert any(not torch.equal(v, before[k]) for k, v in state(twin).items())


@pytest.mark.parametrize("name", NAMES)
def test_parameters_keep_their_names_and_float_checkpoints_load(name: str) -> None:
    float_state = network().state_dict()
    model = network()
    names = [n for n, _ in model.named_parameters()]
    lowbit.apply(model, lowbit.create(name))
    kept = [n for n, _ in model.named_parameters() if not n.endswith(".learned")]
    swapped = {s.old for s in lowbit.create(name).swaps}
    if not any(s.startswith("BatchNorm") for s in swapped):
        assert kept == names
        model.load_state_dict(float_state)  # strict


@pytest.mark.parametrize("name", NAMES)
def test_saved_model_computes_the_same(name: str, digits: tuple[Tensor, Tensor], tmp_path) -> None:
    model = network()
    lowbit.apply(model, lowbit.create(name))
    steps(model, lowbit.attach(model, optimizer_for(name, model)), digits, 0, 3)
    lowbit.save(model, tmp_path / "model")
    other = lowbit.load(tmp_path / "model", network())
    x = digits[0][:64]
    assert torch.equal(model.eval()(x), other(x))


@pytest.mark.parametrize("name", NAMES)
def test_report_names_every_layer(name: str, digits: tuple[Tensor, Tensor]) -> None:
    model = network()
    lowbit.apply(model, lowbit.create(name))
    rows = lowbit.report(model, digits[0][:32], lambda y: y.square().sum()).rows
    assert {"0", "3", "6"} <= {r.layer for r in rows}
    for row in rows:
        assert row.role != "-" or row.note, "a layer left in float says why"
    # nothing flows back into the first layer's input, so an E that is quantized for it has no figure there
    measured = [r for r in rows if r.role in ("W", "A", "E") and (r.role, r.layer) != ("E", "0")]
    assert all(r.sqnr > -3 for r in measured), [(r.layer, r.role, r.sqnr) for r in measured]
