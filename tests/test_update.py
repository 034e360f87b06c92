"""`attach`: roles G and U around the optimizer's step, loss scaling, schedules, learned parameters."""

# mypy: disable-error-code="operator,union-attr,index,arg-type,call-arg,return-value,assignment,misc"
# (attributes of a torch.nn.Module have no precise type)

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import LossScale, Product, Products, QSpec, Recipe, Roles, Rule, Stage, Static, Update
from lowbit.blocks import PerRow
from lowbit.control import control_of
from lowbit.formats import FP16_169, TERNARY, Fixed, Int
from lowbit.rng import Stream
from lowbit.scales import AbsMax, Learned

GRID = QSpec(Fixed(4, 6))
COARSE = QSpec(Int(4, narrow=True), scale=AbsMax(7.0))
STOCHASTIC = QSpec(Fixed(4, 6), rounding="stochastic")

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def model_of(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def batch(i: int, features: int = 6) -> Tensor:
    return torch.randn(8, features, generator=torch.Generator().manual_seed(i))


def set_gradients(model: nn.Module, i: int) -> None:
    for n, p in enumerate(model.parameters()):
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + n)) * 0.3


def numbers(x: Tensor | None) -> np.ndarray:
    assert x is not None
    return x.detach().double().numpy()


def on_grid(x: Tensor, step: float = 2.0**-6) -> bool:
    return bool(np.array_equal(numbers(x) / step, np.rint(numbers(x) / step)))


# ---- G and U ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("biases", [False, True])
def test_a_step_is_the_optimizers_on_quantized_gradients_then_the_grid(name: str, biases: bool) -> None:
    model, plain = model_of(6, 5, 3), model_of(6, 5, 3)
    lowbit.apply(model, Recipe("t", Roles(G=COARSE, U=GRID), update=Update(biases=biases)))
    optimizer = lowbit.attach(model, OPTIMIZERS[name](model.parameters()))
    reference = OPTIMIZERS[name](plain.parameters())
    g, u = lowbit.Quantizer(COARSE), lowbit.Quantizer(GRID)
    for i in range(4):
        set_gradients(model, i)
        set_gradients(plain, i)
        own = [n for n, _ in plain.named_parameters() if biases or n.endswith("weight")]
        with torch.no_grad():
            for n, p in plain.named_parameters():
                if n in own:
                    p.grad.copy_(g(p.grad))
        optimizer.step()
        reference.step()
        with torch.no_grad():
            for n, p in plain.named_parameters():
                if n in own:
                    p.copy_(u(p))
        for (n, p), r in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, r), (i, n)
            assert on_grid(p) == (n in own)


def test_g_sees_the_present_learning_rate_and_the_accumulated_gradient() -> None:
    seen: list[tuple[float, Tensor]] = []

    class Spy(lowbit.Quantizer, kind="test_update_spy"):
        def gradient(self, grad: Tensor, lr: float, key: Tensor | None) -> Tensor:
            seen.append((lr, grad.clone()))
            return grad * 2

    model = nn.Linear(4, 3, bias=False)
    lowbit.apply(model, Recipe("t", Roles(G=QSpec(Int(8), kind="test_update_spy"))))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.5))
    before = model.weight.detach().clone()
    total = torch.zeros(3, 4)
    for i in range(3):  # three micro-batches, one step
        model(batch(i, 4)).sum().backward()
        total += batch(i, 4).sum(0)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert len(seen) == 1 and seen[0][0] == 0.25
    assert torch.allclose(seen[0][1], total, atol=1e-5)
    assert torch.allclose(model.weight, before - 0.25 * 2 * total, atol=1e-5)


def test_two_parameter_groups_keep_their_rates() -> None:
    model = model_of(6, 5, 3)
    lowbit.apply(model, Recipe("t", Roles(U=GRID)))
    groups = [{"params": [model[0].weight], "lr": 1.0}, {"params": [model[2].weight], "lr": 0.25, "weight_decay": 0.5}]
    optimizer = lowbit.attach(model, torch.optim.SGD(groups, lr=0.1))
    set_gradients(model, 0)
    expected = [
        GRID_SNAP(model[0].weight - model[0].weight.grad),
        GRID_SNAP(model[2].weight - 0.25 * (model[2].weight.grad + 0.5 * model[2].weight)),
    ]
    untouched = model[0].bias.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, expected[0]) and torch.equal(model[2].weight, expected[1])
    assert torch.equal(model[0].bias, untouched), "not in the optimizer"


def GRID_SNAP(x: Tensor) -> Tensor:
    return GRID.format.snap(x)


def test_weights_of_another_optimizer_are_left_alone() -> None:
    model = model_of(6, 5, 3)
    lowbit.apply(model, Recipe("t", Roles(G=COARSE, U=GRID)))
    optimizer = lowbit.attach(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
    set_gradients(model, 0)
    before = model[2].weight.detach().clone(), model[2].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[2].weight, before[0]) and torch.equal(model[2].weight.grad, before[1])
    assert on_grid(model[0].weight)


def test_tied_weight_is_stepped_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    torch.manual_seed(0)
    model = Tied()

    # each application of this G would halve the gradient
    class Half(lowbit.Quantizer, kind="test_update_half"):
        def gradient(self, grad: Tensor, lr: float, key: Tensor | None) -> Tensor:
            return grad / 2

    lowbit.apply(model, Recipe("t", Roles(G=QSpec(Int(8), kind="test_update_half"))))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    before = model.a.weight.detach().clone()
    set_gradients(model, 0)
    grad = model.a.weight.grad.clone()
    optimizer.step()
    assert torch.equal(model.a.weight, before - grad / 2) and model.b.weight is model.a.weight


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("axpy", [True, False])
def test_projections_of_attention_have_their_own_blocks(packed: bool, axpy: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=None if packed else 4, vdim=None if packed else 4)
    scaled = QSpec(Int(4, narrow=True), scale=AbsMax(7.0))
    rule = Rule(name="*k_proj", roles=Roles())
    model = nn.ModuleDict({"attn": attention})
    lowbit.apply(model, Recipe("t", Roles(U=scaled), rules=(rule,), update=Update(axpy=axpy)))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    names = ("q_proj", "k_proj", "v_proj", "out_proj")

    def weights() -> dict[str, Tensor]:
        return {n: w.detach().clone() for n, (w, _) in attention.parts().items()}

    for p in attention.parameters():
        p.grad = torch.ones_like(p)
    if packed:
        attention.in_proj_weight.grad[16:] = 5.0
    before, grads = weights(), attention.in_proj_weight.grad.chunk(3) if packed else None
    optimizer.step()
    after = weights()
    for i, name in enumerate(names):
        step = 0.1 * (grads[i] if grads is not None and i < 3 else 1.0)
        moved = before[name] - step
        if name == "k_proj":
            assert torch.allclose(after[name], moved, atol=1e-6) and len(after[name].unique()) > 16, "float, stepped"
        else:
            assert torch.equal(after[name], lowbit.Quantizer(scaled)(moved)), name


def test_stochastic_draws_differ_between_tensors_and_steps_and_repeat_with_the_seed() -> None:
    def run(seed: int) -> list[Tensor]:
        model = model_of(6, 6, 6)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(2.0**-7)  # half a step
        lowbit.apply(model, Recipe("t", Roles(U=STOCHASTIC), update=Update(biases=True), seed=seed))
        optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.0))
        results = []
        for _ in range(2):
            for p in model.parameters():
                p.data.fill_(2.0**-7)
                p.grad = torch.zeros_like(p)
            optimizer.step()
            results += [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
        return results

    a, b = run(0), run(1)
    assert all(0.2 < float((x > 0).float().mean()) < 0.8 for x in a)
    assert all(not torch.equal(a[i], a[j]) for i in range(4) for j in range(i))
    assert all(torch.equal(x, y) for x, y in zip(a, run(0), strict=True)) and not torch.equal(a[0], b[0])


def test_an_update_remembers_no_draw_and_leaves_torch_s_generator_alone() -> None:
    roles, update = Roles(G=STOCHASTIC, U=STOCHASTIC), Update(states=STOCHASTIC)
    model = lowbit.apply(model_of(6, 6, 6), Recipe("t", roles, update=update))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    model(torch.randn(3, 6)).sum().backward()
    before = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)
    streams = [m for m in model.modules() if isinstance(m, Stream)]
    assert streams and not any(stream._calls for stream in streams)


# ---- three updates ---------------------------------------------------------------------------------------------------


def r16(x: np.ndarray, u: np.ndarray | None = None) -> np.ndarray:
    """1-6-9 in float64, nearest even, or stochastic."""
    e = np.maximum(np.frexp(np.where(x == 0, 1.0, x))[1] - 1, -30)
    t = x / 2.0 ** (e - 9)
    return (np.rint(t) if u is None else np.floor(t) + (u < t - np.floor(t))) * 2.0 ** (e - 9)


@pytest.mark.parametrize("states", [None, "coarse"])
def test_axpy_order_in_float64(states: str | None) -> None:
    state = QSpec(Fixed(4, 5)) if states else None  # visibly coarser than the weights

    def rs(x: np.ndarray) -> np.ndarray:
        return np.rint(x * 32) / 32 if states else r16(x)

    torch.manual_seed(0)
    model = nn.Linear(7, 5, bias=False)
    lowbit.apply(model, Recipe("t", Roles(U=QSpec(FP16_169)), update=Update(axpy=True, states=state)))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.02))
    w, v = numbers(model.weight), np.zeros((5, 7))
    for i in range(5):
        set_gradients(model, i)
        g = numbers(model.weight.grad)
        kept = model.weight.grad.clone()
        g = rs(np.float32(g + 0.02 * w))
        v = rs(np.float32(0.9 * v + g))
        w = r16(np.float32(w - 0.05 * v))
        optimizer.step()
        memory = optimizer.state[model.weight]["momentum_buffer"]
        same = np.isclose(numbers(memory), v, rtol=0, atol=1e-9).mean(), (numbers(model.weight) == w).mean()
        assert min(same) > 0.97, "equal but for float32 roundings that cross a tie"
        assert np.abs(numbers(model.weight) - w).max() < 2.0**-9
        assert torch.equal(model.weight.grad, kept), "the gradient is as the loop left it"
        w, v = numbers(model.weight), numbers(memory)


def test_axpy_rounds_only_the_lines_that_have_a_term() -> None:
    torch.manual_seed(0)
    model = nn.Linear(7, 5, bias=False)
    coarse = QSpec(Fixed(4, 2))
    lowbit.apply(model, Recipe("t", Roles(U=QSpec(FP16_169)), update=Update(axpy=True, states=coarse)))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.5))
    set_gradients(model, 0)
    wanted = FP16_169.snap(model.weight - 0.5 * model.weight.grad)
    optimizer.step()
    assert torch.equal(model.weight, wanted)
    assert "momentum_buffer" not in optimizer.state.get(model.weight, {})


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop"])
def test_axpy_with_another_optimizer_rounds_its_states_and_weights(name: str) -> None:
    model, plain = model_of(6, 5), model_of(6, 5)
    grid = QSpec(FP16_169)
    lowbit.apply(model, Recipe("t", Roles(U=grid), update=Update(axpy=True, states=grid)))
    optimizer = lowbit.attach(model, OPTIMIZERS[name](model.parameters()))
    reference = OPTIMIZERS[name](plain.parameters())
    for i in range(3):
        set_gradients(model, i)
        set_gradients(plain, i)
        optimizer.step()
        reference.step()
        with torch.no_grad():
            w = plain[0].weight
            w.copy_(FP16_169.snap(w))
            for value in reference.state[w].values():
                if value.shape == w.shape:
                    value.copy_(FP16_169.snap(value))
        assert torch.equal(model[0].weight, plain[0].weight)
        states = optimizer.state[model[0].weight].values(), reference.state[plain[0].weight].values()
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


# ---- clip, Glorot ----------------------------------------------------------------------------------------------------


def test_clip() -> None:
    model = nn.Linear(4, 3)
    lowbit.apply(model, Recipe("t", Roles(W=QSpec(TERNARY)), update=Update(clip=0.25)))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    model.weight.grad, model.bias.grad = torch.full((3, 4), 5.0), torch.full((3,), 5.0)
    optimizer.step()
    assert model.weight.tolist() == [[-0.25] * 4] * 3
    assert float(model.bias.detach().max()) < -4, "biases are not clipped"


@pytest.mark.parametrize(("name", "power"), [("sgd", 2), ("adam", 1)])
def test_glorot_step(name: str, power: int) -> None:
    torch.manual_seed(0)
    model, plain = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)
    plain.load_state_dict(model.state_dict())
    lowbit.apply(model, Recipe("t", Roles(W=QSpec(TERNARY)), update=Update(lr_scale="glorot")))
    optimizer = lowbit.attach(model, OPTIMIZERS[name](model.parameters()))
    reference = OPTIMIZERS[name](plain.parameters())
    before = plain.weight.detach().clone()
    set_gradients(model, 0)
    set_gradients(plain, 0)
    optimizer.step()
    reference.step()
    factor = math.sqrt((2 * 9 + 3 * 9) / 1.5) ** power
    assert torch.allclose(model.weight - before, (plain.weight - before) * factor, atol=1e-5)
    assert torch.equal(model.bias, plain.bias)


# ---- loss scale ------------------------------------------------------------------------------------------------------

SCALED = Recipe("t", Roles(E=QSpec(FP16_169)), loss_scale=LossScale(1024.0))


def test_loss_scale_is_seen_by_errors_and_by_nobody_else() -> None:
    errors: list[float] = []

    class Spy(lowbit.Quantizer, kind="test_update_error"):
        def quantize_coded(self, x: Tensor, key: Tensor | None = None) -> Any:
            errors.append(float(x.abs().max()))
            return x, None

    roles = Roles(E=QSpec(FP16_169, kind="test_update_error"))
    model, plain = model_of(6, 5, 3), model_of(6, 5, 3)
    lowbit.apply(model, Recipe("t", roles, loss_scale=LossScale(1024.0)))
    lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, again = batch(0).requires_grad_(), batch(0).requires_grad_()
    for _ in range(2):  # accumulated
        model(x).sum().backward()
        plain(again).sum().backward()
    assert errors[0] == 1024.0
    for p, r in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, r.grad, rtol=1e-6), "a power of two: only sums differ"
    assert torch.allclose(x.grad, again.grad, rtol=1e-6), "what comes before the model sees no scale either"
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert float(norm) == pytest.approx(float(nn.utils.clip_grad_norm_(plain.parameters(), 1.0)), rel=1e-5)


def test_loss_scale_waits_for_attach_and_skips_evaluation() -> None:
    model = lowbit.apply(model_of(6, 5, 3), SCALED)
    model(batch(0)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        assert not model(batch(0)).requires_grad
    model(batch(0)).sum().backward()
    assert all(torch.allclose(p.grad, g, rtol=1e-2) for p, g in zip(model.parameters(), before, strict=True))


def test_loss_scale_around_a_part_of_a_larger_model() -> None:
    torch.manual_seed(0)
    body, head, stem = model_of(6, 5), nn.Linear(5, 2), nn.Linear(6, 6)
    plain = copy.deepcopy(nn.Sequential(stem, body, head))
    lowbit.apply(body, SCALED)
    model = nn.Sequential(stem, body, head)
    lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model(batch(0)).sum().backward()
    plain(batch(0)).sum().backward()
    for p, r in zip(model.parameters(), plain.parameters(), strict=True):
        assert float((p.grad - r.grad).norm() / r.grad.norm()) < 0.01, "1-6-9 errors, no factor of 1024 anywhere"


def test_a_parameter_unfrozen_later_is_unscaled_too() -> None:
    model = model_of(6, 5, 3)
    model[0].weight.requires_grad_(False)
    lowbit.apply(model, SCALED)
    lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model(batch(0)).sum().backward()
    model[0].weight.requires_grad_(True)
    plain = model_of(6, 5, 3)
    model(batch(0)).sum().backward()
    plain(batch(0)).sum().backward()
    assert torch.allclose(model[0].weight.grad, plain[0].weight.grad, rtol=0.01, atol=1e-5)


def test_copies_carry_no_scale_until_they_are_attached_and_then_one() -> None:
    model = lowbit.apply(model_of(6, 5, 3), SCALED)
    lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    wanted = torch.autograd.grad(model(batch(0)).sum(), model[0].weight)[0]
    twin = copy.deepcopy(model)
    assert torch.allclose(torch.autograd.grad(twin(batch(0)).sum(), twin[0].weight)[0], wanted, rtol=0.01)
    lowbit.attach(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    assert torch.equal(torch.autograd.grad(twin(batch(0)).sum(), twin[0].weight)[0], wanted)
    assert torch.equal(torch.autograd.grad(model(batch(0)).sum(), model[0].weight)[0], wanted)


def test_outputs_of_any_structure_are_scaled_once() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x: Tensor, *, shift: float = 0.0) -> dict[str, Any]:
            y = self.inner(x) + shift
            return {"loss": y.square().mean(), "parts": (y, 7), "count": torch.tensor(3)}

    torch.manual_seed(0)
    model = Pair()
    plain = copy.deepcopy(model)
    lowbit.attach(lowbit.apply(model, SCALED), torch.optim.SGD(model.parameters(), lr=0.1))
    out, ref = model(batch(0), shift=1.0), plain(batch(0), shift=1.0)
    assert out["parts"][1] == 7 and int(out["count"]) == 3 and torch.equal(out["loss"], ref["loss"])
    (out["loss"] + out["parts"][0].sum()).backward()
    (ref["loss"] + ref["parts"][0].sum()).backward()
    assert torch.allclose(model.inner.weight.grad, plain.inner.weight.grad, rtol=0.01, atol=1e-5)


def test_penalty_is_scaled_like_the_loss() -> None:
    class Decay(lowbit.Quantizer, kind="test_update_decay"):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.__dict__["target"] = kwargs["like"]

        def penalty(self) -> Tensor:
            return self.target.square().sum()

    model = model_of(6, 3)
    lowbit.apply(model, Recipe("t", Roles(W=QSpec(TERNARY, kind="test_update_decay")), loss_scale=LossScale(1024.0)))
    lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    lowbit.penalty(model).backward()
    assert torch.allclose(model[0].weight.grad, 2 * model[0].weight)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_dynamic_scale_skips_and_grows(name: str) -> None:
    model = model_of(6, 5, 3)
    lowbit.apply(model, Recipe("t", Roles(U=GRID), loss_scale=LossScale(1024.0, growth_interval=2)))
    optimizer = lowbit.attach(model, OPTIMIZERS[name](model.parameters()))
    control = control_of(model)
    scales = []
    for i, bad in enumerate([False, False, True, False, False, True, True, False]):
        set_gradients(model, i)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        if bad:
            model[2].weight.grad[1, 1] = float("inf")
        grads = [p.grad for p in model.parameters()]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True)), "gradients stay where they are"
        moved = not all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "weight" in k)
        assert moved != bad and int(control.step) == int(before["0.quant.control.step"]) + (not bad)
        scales.append(float(control.loss_scale))
    assert scales == [1024, 2048, 1024, 1024, 2048, 1024, 512, 512]
    if name == "adam":
        assert int(optimizer.state[model[0].weight]["step"]) == 5, "a skipped step is none for the optimizer"


# ---- schedule --------------------------------------------------------------------------------------------------------


def test_learning_rate_triangle() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    schedule = (Stage(start=2, stop=10, lr=(0.1, 0.5)),)
    lowbit.apply(model, Recipe("t", Roles(W=QSpec(Fixed(8, 8))), schedule=schedule))
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    rates = []
    for _ in range(12):
        before = float(model.weight.detach())
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        rates.append(before - float(model.weight.detach()))
        assert optimizer.param_groups[0]["lr"] == 1.0, "the loop's rate comes back after the step"
    climb = [0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.3, 0.2]
    assert rates == pytest.approx([1, 1, *climb, 1, 1], abs=1e-5)


def test_roles_and_results_of_a_stage() -> None:
    model = nn.Linear(4, 3, bias=False)
    stages = (
        Stage(start=1, stop=3, roles=Roles(U=QSpec(Fixed(4, 2))), result=QSpec(Fixed(4, 3))),
        Stage(start=3, off=("U", "result")),
    )
    recipe = Recipe("t", Roles(U=QSpec(Fixed(4, 8))), Products(result=QSpec(Fixed(4, 7))), schedule=stages)
    lowbit.apply(model, recipe)
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for i, (weights, outputs) in enumerate([(8, 7), (2, 3), (2, 3), (None, None)]):
        y = model(batch(i, 4))
        assert outputs is None and not on_grid(y, 2.0**-7) or outputs is not None and on_grid(y, 2.0**-outputs)
        set_gradients(model, i)
        optimizer.step()
        assert (
            weights is None
            and not on_grid(model.weight, 2.0**-8)
            or weights is not None
            and on_grid(model.weight, 2.0**-weights)
        ), i


# ---- learned parameters ----------------------------------------------------------------------------------------------

LSQ = Roles(W=QSpec(Int(4, narrow=True), blocks=PerRow(), scale=Learned(7.0), backward=lowbit.LearnedStep()))


@pytest.mark.parametrize("given", ["all", "weights only", "groups"])
def test_learned_parameters_are_stepped_and_never_decay(given: str) -> None:
    model = lowbit.apply(model_of(6, 5, 3), Recipe("t", LSQ))
    learned = [p for n, p in model.named_parameters() if n.endswith("learned")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("learned")]
    groups = [{"params": rest, "lr": 0.5}, {"params": learned, "lr": 0.25, "weight_decay": 0.3}]
    params: Any = {"all": [*rest, *learned], "weights only": rest, "groups": groups}[given]
    optimizer = lowbit.attach(model, torch.optim.SGD(params, lr=0.5, weight_decay=0.1, momentum=0.9))
    assert sorted(id(p) for g in optimizer.param_groups for p in g["params"]) == sorted(map(id, [*rest, *learned]))
    model(batch(0))  # steps start from data
    start = [p.detach().clone() for p in learned]
    weights = [p.detach().clone() for p in rest]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, s) for p, s in zip(learned, start, strict=True)), "no decay"
    assert all(torch.allclose(p, 0.95 * s) for p, s in zip(rest, weights, strict=True)), "weights decay by lr * 0.1"
    for p in learned:
        p.grad = torch.full_like(p, 0.01)
    optimizer.step()
    rate = 0.25 if given == "groups" else 0.5
    assert all(torch.allclose(p, s - rate * 0.01) for p, s in zip(learned, start, strict=True))


def test_learned_parameters_of_an_optimizer_with_names() -> None:
    model = lowbit.apply(model_of(6, 5, 3), Recipe("t", LSQ))
    named = [(n, p) for n, p in model.named_parameters()]
    optimizer = lowbit.attach(model, torch.optim.AdamW(named, lr=0.1, weight_decay=0.1))
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 2]
    assert [len(g["param_names"]) for g in optimizer.param_groups] == [4, 2]
    assert optimizer.param_groups[1]["weight_decay"] == 0 and optimizer.param_groups[0]["weight_decay"] == 0.1
    rest = [(n, p) for n, p in model.named_parameters() if not n.endswith("learned")]
    model = lowbit.apply(model_of(6, 5, 3), Recipe("t", LSQ))
    rest = [(n, p) for n, p in model.named_parameters() if not n.endswith("learned")]
    optimizer = lowbit.attach(model, torch.optim.AdamW(rest, lr=0.1, weight_decay=0.1))
    assert optimizer.param_groups[1]["param_names"] == ["0.quant.slots.W.learned", "2.quant.slots.W.learned"]


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gupta", "fp8", "wage"])
@pytest.mark.parametrize("load_first", [False, True])
def test_resume_repeats_every_bit(method: str, load_first: bool) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
        lowbit.apply(model, lowbit.create(method))
        wage = method == "wage"
        return model, torch.optim.SGD(model.parameters(), lr=4.0 if wage else 0.1, momentum=0.0 if wage else 0.9)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for i in range(first, last):
            optimizer.zero_grad()
            for half in range(2):  # two micro-batches
                x = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(2 * i + half))
                (model(x) - 1).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    model, optimizer = fresh()
    lowbit.attach(model, optimizer)
    run(model, optimizer, 0, 3)
    twin = copy.deepcopy(model)
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, 3, 6)

    def continued(again: nn.Module, other: torch.optim.Optimizer) -> None:
        run(again, other, 3, 6)
        for key, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key

    again, other = fresh()
    if load_first:  # as a trainer that makes its optimizer after it has loaded the model
        again.load_state_dict(saved[0])
    lowbit.attach(again, other)
    if not load_first:
        again.load_state_dict(saved[0])
    other.load_state_dict(copy.deepcopy(saved[1]))  # an optimizer keeps the tensors it is given
    continued(again, other)
    third = lowbit.attach(twin, torch.optim.SGD(twin.parameters(), **fresh()[1].defaults))
    third.load_state_dict(copy.deepcopy(saved[1]))
    continued(twin, third)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_attach_refuses() -> None:
    model = model_of(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="lowbit.apply"):
        lowbit.attach(model, optimizer)
    lowbit.apply(model, Recipe("t", Roles(U=GRID), update=Update(axpy=True)))
    with pytest.raises(TypeError, match="needs a torch.optim.Optimizer, got list"):
        lowbit.attach(model, [optimizer])
    for bad in ({"nesterov": True}, {"dampening": 0.5}):
        with pytest.raises(ValueError, match=f"no {next(iter(bad))}"):
            lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **bad))
    with pytest.raises(ValueError, match="no maximize"):
        lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))
    lowbit.attach(model, optimizer)
    with pytest.raises(ValueError, match="attached to this model already"):
        lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="no closure"):
        optimizer.step(lambda: torch.tensor(0.0))


def test_values_a_specification_refuses() -> None:
    refused = [
        (lambda: LossScale(0.0), "positive; got 0.0"),
        (lambda: Stage(3, 2), "got 3 to 2"),
        (lambda: Stage(0, lr=(0.1, 1.0)), "needs a stop"),
        (lambda: Product(samples=0), "least 1"),
        (lambda: Product(same_draw=True), "same_draw needs a left operand"),
        (lambda: Product(left=QSpec(Int(8)), same_draw=True), "same_draw needs a left operand"),
        (lambda: Products(grad_a=Product(left=STOCHASTIC, same_draw=True)), "only grad_w takes the draw"),
    ]
    for make, message in refused:
        with pytest.raises(ValueError, match=message):
            make()


def test_failed_step_of_a_recipe_leaves_the_model_as_it_was() -> None:
    from lowbit.recipe import Step
    from lowbit.serial import spec

    @spec
    class Breaks(Step):
        def run(self, model: Any, layers: Any) -> None:
            with torch.no_grad():
                model[0].weight.zero_()
            raise RuntimeError("half way")

    model = model_of(4, 3)
    before = copy.deepcopy(model.state_dict())
    recipe = Recipe("t", Roles(U=QSpec(Fixed(4, 2), scale=Static())), steps=(Breaks(),), loss_scale=LossScale())
    with pytest.raises(RuntimeError, match="half way"):
        lowbit.apply(model, recipe)
    assert type(model[0]) is nn.Linear and list(model.state_dict()) == list(before)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_half_precision_parameters_that_cannot_hold_the_grid_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
    lowbit.apply(model, lowbit.create("gupta"))
    with pytest.raises(ValueError, match=r"0: torch.bfloat16 can't hold stored weights of 16 bits"):
        lowbit.attach(model, torch.optim.SGD(model.parameters(), 0.1))
