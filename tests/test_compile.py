"""`torch.compile` changes neither outputs nor gradients: compiled and eager runs are equal to the bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import lowbit


def recipes() -> dict[str, lowbit.Recipe]:
    int8 = lowbit.create("int8")
    at_input = dataclasses.replace(int8.products, error_at="both")
    return {
        "learned step": lowbit.create("lsq"),
        "learned clip": lowbit.create("pact", bits=2, clip=0.2, ends=2),
        "stochastic activations": lowbit.create("bnn", stochastic=True),
        "error at the input": dataclasses.replace(int8, products=at_input, rules=()),
    }


SLOW = {"learned step"}  # traces four starts of steps, each on its own


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in recipes()])
def test_compiled_training_equals_eager(name: str) -> None:
    x, y = torch.rand(32, 16), torch.arange(32) % 4
    states = []
    for compiled in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        lowbit.apply(model, recipes()[name])
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(forward(x), y).backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
