"""What the papers claim of each other's place, on real data: slow, `make slow DATA=...`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.blocks import CONV_INPUT
from lowbit.lab.data import load
from lowbit.lab.models import build
from lowbit.layers import Quantized
from lowbit.ops.chunked import chunked_mm
from lowbit.quantizer import Quantizer

pytestmark = pytest.mark.slow


def batches(data, count: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    for i, batch in enumerate(data.batches("train", size, seed=0, epoch=0)):
        if i == count:
            return
        yield batch


def train(model: nn.Module, data, count: int, lr: float = 0.05, momentum: float = 0.9) -> float:
    """Mean loss of the last tenth of `count` steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    if any(isinstance(m, Quantized) for m in model.modules()):
        lowbit.attach(model, optimizer)
    losses = []
    model.train()
    for x, y in batches(data, count):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-count // 10 :]) / (count // 10)


@torch.no_grad()
def accuracy(model: nn.Module, data, limit: int = 2000) -> float:
    model.eval()
    right = total = 0
    for x, y in data.batches("test", 250, seed=0, epoch=0, limit=limit):
        right += int((model(x).argmax(-1) == y).sum())
        total += len(y)
    return right / total


@pytest.fixture(scope="module")
def mnist(request: pytest.FixtureRequest, data_root: Path):
    return load(f"mnist:{data_root / 'mnist'}")


@pytest.fixture(scope="module")
def errors(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Gradients of the outputs of every fourth convolution in a ResNet-20 on CIFAR-10 images, after 60 steps."""
    data = load(f"cifar10:{data_root / 'cifar10-jpeg'}", cache=tmp_path_factory.mktemp("cache"))
    model = build("resnet20", data.input_shape, data.classes, seed=0)
    train(model, data, 60)
    found: dict[str, Tensor] = {}
    for name, module in [m for m in model.named_modules() if isinstance(m[1], nn.Conv2d)][::4]:
        module.register_full_backward_hook(lambda m, gi, go, name=name: found.update({name: go[0].clone()}))
    x, y = next(batches(data, 1, 32))
    nn.functional.cross_entropy(model.train()(x), y).backward()
    return found


def variance(name: str, e: Tensor, draws: int = 8, **options: object) -> float:
    """Summed variance of the quantizer of E, in units of the gradient's squared norm."""
    spec = lowbit.create(name, **options).roles.E
    assert spec is not None
    q = Quantizer.make(spec, CONV_INPUT, name)
    values = torch.stack([q(e).double() for _ in range(draws)])
    return float(values.var(0).sum() / e.double().square().sum())


def test_statquant_variances_are_ordered_in_every_layer(errors: dict[str, Tensor]) -> None:
    rows = {name: [variance(m, e, bits=4) for m in ("bhq", "psq", "ptq_sgd")] for name, e in errors.items()}
    for name, (bhq, psq, ptq) in rows.items():
        assert bhq <= 1.02 * psq and psq <= 1.02 * ptq, (name, bhq, psq, ptq)
    bhq, psq, ptq = (sum(row[i] for row in rows.values()) for i in range(3))
    assert bhq < psq < ptq, (bhq, psq, ptq)


def test_luq_is_unbiased_where_deterministic_powers_are_not(errors: dict[str, Tensor]) -> None:
    for name, e in errors.items():
        bias = {}
        for rounding in ("stochastic", "nearest"):
            spec = lowbit.create("luq", rounding=rounding).roles.E
            assert spec is not None
            q = Quantizer.make(spec, CONV_INPUT, name)
            mean = torch.stack([q(e).double() for _ in range(32)]).mean(0)
            # the part along the gradient: what training loses in the mean
            bias[rounding] = abs(float(((mean - e) * e).sum() / e.double().square().sum()))
        assert bias["stochastic"] < 0.01 < bias["nearest"], (name, bias)


def test_two_samples_halve_the_rounding_variance(errors: dict[str, Tensor]) -> None:
    e = errors["conv1"] if "conv1" in errors else next(iter(errors.values()))
    spec = lowbit.create("luq").roles.E
    assert spec is not None
    q = Quantizer.make(spec, CONV_INPUT, "E")
    one = torch.stack([q(e).double() for _ in range(16)]).var(0).sum()
    two = torch.stack([(q(e).double() + q(e).double()) / 2 for _ in range(16)]).var(0).sum()
    assert 0.4 < float(two / one) < 0.6


def test_unbiased_luq_trains_better_than_biased(mnist) -> None:
    """With three magnitudes, where most gradients underflow; with the default eight both train alike on MNIST."""
    losses = {}
    for rounding in ("stochastic", "nearest"):
        model = build("lenet5", mnist.input_shape, mnist.classes, seed=0)
        lowbit.apply(model, lowbit.create("luq", levels=2, rounding=rounding, quantize_ends=True))
        losses[rounding] = train(model, mnist, 200, lr=0.02)
    assert losses["stochastic"] < 0.5 * losses["nearest"], losses


def test_stochastic_rounding_trains_where_nearest_stalls(mnist) -> None:
    """Gupta's setting: 16-bit words, few of the bits behind the point."""
    reached = {}
    for rounding in ("stochastic", "nearest"):
        model = build("mlp", mnist.input_shape, mnist.classes, seed=0)
        lowbit.apply(model, lowbit.create("gupta", il=8, fl=8, rounding=rounding))
        train(model, mnist, 400, lr=0.1, momentum=0.0)
        reached[rounding] = accuracy(model, mnist)
    model = build("mlp", mnist.input_shape, mnist.classes, seed=0)
    train(model, mnist, 400, lr=0.1, momentum=0.0)
    reached["float"] = accuracy(model, mnist)
    assert reached["stochastic"] > reached["nearest"] + 0.05, reached
    assert reached["stochastic"] > reached["float"] - 0.03, reached


def test_fp8_sums_need_chunks(errors: dict[str, Tensor]) -> None:
    """Weight gradients sum over samples and pixels; sums of one sign show what a plain 1-6-9 accumulator swallows."""
    # terms of mean 1 and standard deviation 1; 64 is the square root of their number, the best chunk
    terms = lowbit.formats.E5M2.snap(1 + torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)))
    exact = float(terms.double().sum())
    plain, chunked = (abs(float(chunked_mm(terms, torch.ones(4096, 1), c)) - exact) / exact for c in (4096, 64))
    assert plain > 0.05 and chunked < 0.005, (plain, chunked)

    e = next(iter(errors.values())).transpose(0, 1).flatten(1)  # (channels, samples and pixels)
    a = torch.randn(e.shape[1], 8, generator=torch.Generator().manual_seed(1)).abs()
    e8, a8 = (lowbit.formats.E5M2.snap(t) for t in (e * 1000, a))
    truth = e8.double() @ a8.double()
    plain, chunked = (float((chunked_mm(e8, a8, c).double() - truth).norm() / truth.norm()) for c in (e.shape[1], 64))
    assert chunked < plain, (plain, chunked)
