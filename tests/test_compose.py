"""Two papers in one recipe: the roles of a method are plain data, so another method's role stands in by `replace`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowbit
from lowbit.control import layers_of
from lowbit.quantizer import watching


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))


def with_error(forward: lowbit.Recipe, other: lowbit.Recipe) -> lowbit.Recipe:
    """`forward` with the treatment of E of `other`: the role, and what its products do with the left operand."""

    def put(roles: lowbit.Roles | None) -> lowbit.Roles | None:
        return None if roles is None else dataclasses.replace(roles, E=other.roles.E)

    products = dataclasses.replace(
        forward.products,
        grad_a=dataclasses.replace(forward.products.grad_a, left=other.products.grad_a.left),
        grad_w=dataclasses.replace(
            forward.products.grad_w,
            **{k: getattr(other.products.grad_w, k) for k in ("left", "samples", "same_draw")},
        ),
    )
    roles = put(forward.roles)
    assert roles is not None
    rules = tuple(dataclasses.replace(r, roles=put(r.roles)) for r in forward.rules)
    name = f"{forward.name}+{other.name}"
    return dataclasses.replace(forward, name=name, roles=roles, products=products, rules=rules)


def train(recipe: lowbit.Recipe, steps: int = 150) -> tuple[nn.Module, float]:
    x, y = digits()
    model = lowbit.apply(network(), recipe)
    optimizer = lowbit.attach(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    for i in range(steps):
        batch = torch.randperm(len(x), generator=torch.Generator().manual_seed(i))[:64]
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x[batch]), y[batch]) + lowbit.penalty(model)).backward()
        optimizer.step()
    with torch.no_grad():
        return model, (model.eval()(x).argmax(-1) == y).float().mean().item()


@pytest.mark.parametrize("forward", ["lsq", "pact", "sawb"])
@pytest.mark.parametrize("backward, options", [("luq", {}), ("luq", {"samples": 2}), ("int8", {})])
def test_one_papers_forward_trains_with_anothers_error(forward: str, backward: str, options: dict) -> None:
    base = lowbit.create(forward, bits=4, **({} if forward == "lsq" else {"clip": 4.0}))
    recipe = with_error(base, lowbit.create(backward, **options))
    assert lowbit.Recipe.from_json(recipe.to_json()) == recipe
    model, accuracy = train(recipe)
    assert accuracy > 0.9, accuracy

    quant = layers_of(model)["2"]
    assert quant.roles.W == base.roles.W and quant.roles.E == lowbit.create(backward).roles.E
    rows = {r.role: r for r in lowbit.report(model, digits()[0][:64]).rows if r.layer == "2"}
    assert rows["W"].sqnr > 8 and rows["E"].sqnr > 5, (rows["W"].sqnr, rows["E"].sqnr)


def test_each_paper_acts_in_its_own_pass_only() -> None:
    x, y = digits()
    lsq = lowbit.create("lsq", bits=4)
    luq = lowbit.create("luq")
    outputs, gradients, seen = {}, {}, {}
    for recipe in (lsq, with_error(lsq, luq)):
        model = lowbit.apply(network(), recipe)
        layer = layers_of(model)["2"]
        values: list[Tensor] = []
        seen[recipe.name] = values
        slots = [layer.slots["E"]] if "E" in layer.slots else []
        with watching(slots, lambda quant, before, after, coded, values=values: values.append(after)):  # type: ignore
            out = model(x[:64])
            nn.functional.cross_entropy(out, y[:64]).backward()
        outputs[recipe.name], gradients[recipe.name] = out.detach(), model[0].weight.grad
    assert torch.equal(outputs["lsq"], outputs["lsq+luq"])  # the forward pass is LSQ's to the bit
    assert not torch.equal(gradients["lsq"], gradients["lsq+luq"])
    assert not seen["lsq"] and len(seen["lsq+luq"]) == 1
    magnitudes = seen["lsq+luq"][0].abs()
    exponents = (magnitudes[magnitudes > 0] / magnitudes.max()).log2()
    assert (exponents - exponents.round()).abs().max() < 1e-5  # and its error lies on LUQ's powers of two
    assert len(exponents.round().unique()) <= 8
