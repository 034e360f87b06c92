"""Two processes: weights are drawn alike on both, everything else apart, and parameters never drift."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

SCRIPT = r"""
import copy
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import lowbit
from lowbit import (AbsMax, Average, Int, Learned, LearnedStep, LossScale, QSpec, Recipe, Roles, Update)

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
SR = QSpec(Int(6, narrow=True), scale=AbsMax(31), rounding="stochastic")
EMA = QSpec(Int(6, narrow=True), scale=Average(AbsMax(31)), rounding="stochastic")
LSQ = QSpec(Int(6, narrow=True), scale=Learned(31), backward=LearnedStep())
result = {}


def both(t):
    parts = [torch.empty_like(t) for _ in range(2)]
    dist.all_gather(parts, t.detach().contiguous())
    return parts


def make(roles, **more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 2))
    return lowbit.apply(model, Recipe("r", roles, **more))


def equal(model):
    return all(torch.equal(*both(p)) for p in model.parameters())


def steps(ddp, optimizer, n, first=0):
    for step in range(first, first + n):
        g = torch.Generator().manual_seed(100 * step + rank)
        x = torch.randn(6, 1, 6, 6, generator=g)
        optimizer.zero_grad()
        (ddp(x) - 1).square().mean().backward()
        optimizer.step()


# draws, seen through identical data on both ranks
model = make(Roles(W=SR, A=SR, E=SR))
seen = {}
for slot in "WAE":
    model[3].quant.slots[slot].watch = lambda q, x, y, coded, slot=slot: seen.update({slot: (x.clone(), y.clone())})
DDP(model)(torch.ones(4, 1, 6, 6) * torch.linspace(0.1, 1, 4).reshape(4, 1, 1, 1)).square().sum().backward()
result["W"] = torch.equal(*both(seen["W"][1]))
result["A"] = torch.equal(*both(seen["A"][1]))
result["E"] = torch.equal(*both(seen["E"][1]))

# training with every role stochastic
for name, roles, more in (("all", Roles(W=SR, A=EMA, E=SR, G=SR, U=SR), {}),
                          ("scaled", Roles(W=SR, A=SR, E=SR, G=SR, U=SR),
                           dict(loss_scale=LossScale(64.0, 2), update=Update(clip=0.9)))):
    model = make(roles, **more)
    ddp = DDP(model)
    optimizer = lowbit.attach(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9))
    before = [p.detach().clone() for p in model.parameters()]
    same = []
    for step in range(5):
        steps(ddp, optimizer, 1, step)
        same.append(equal(model))
    result[name] = all(same) and not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))

# a resumed run repeats the original
model = make(Roles(W=SR, A=EMA, E=SR, G=SR, U=SR))
ddp = DDP(model)
optimizer = lowbit.attach(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9))
steps(ddp, optimizer, 2)
saved = {k: v.clone() for k, v in model.state_dict().items()}
saved_optimizer = copy.deepcopy(optimizer.state_dict())
steps(ddp, optimizer, 2, 2)
again = make(Roles(W=SR, A=EMA, E=SR, G=SR, U=SR))
again.load_state_dict(saved)
ddp2 = DDP(again)
optimizer = lowbit.attach(ddp2, torch.optim.SGD(ddp2.parameters(), lr=0.1, momentum=0.9))
optimizer.load_state_dict(saved_optimizer)
steps(ddp2, optimizer, 2, 2)
result["resume"] = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))

# learned steps start equal although each rank saw another batch
model = make(Roles(W=LSQ, A=LSQ))
ddp = DDP(model)
optimizer = lowbit.attach(ddp, torch.optim.SGD(ddp.parameters(), lr=0.01))
ddp(torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(rank)) * (1 + 5 * rank))
start = model[0].quant.slots["A"].learned.detach().clone()
result["start"] = equal(model)
g = [torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(r)) * (1 + 5 * r) for r in range(2)]
mean = sum(2 * x.abs().mean() / 31 ** 0.5 for x in g) / 2
result["mean"] = abs(float(start) / float(mean) - 1) < 1e-5
steps(ddp, optimizer, 2)
result["learned"] = equal(model) and not torch.equal(start, model[0].quant.slots["A"].learned)
if rank == 0:
    torch.save(result, f"{folder}/result")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    folder = tmp_path_factory.mktemp("ddp")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    source = str(pathlib.Path(__file__).resolve().parent.parent / "src")
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(r)],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for r in range(2)
    ]
    try:
        texts = [p.communicate(timeout=120)[0] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert [p.returncode for p in ranks] == [0, 0], "\n".join(texts)
    return torch.load(folder / "result", weights_only=True)


@pytest.mark.parametrize("what, expected", [("W", True), ("A", False), ("E", False)])
def test_draws(result, what, expected):
    assert result[what] is expected


@pytest.mark.parametrize("what", ["all", "scaled"])
def test_parameters_stay_equal_to_the_bit(result, what):
    assert result[what]


def test_a_resumed_run_repeats_the_original(result):
    assert result["resume"]


def test_learned_scales_start_at_the_mean_over_ranks_and_stay_equal(result):
    assert result["start"] and result["mean"] and result["learned"]
