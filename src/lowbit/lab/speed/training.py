"""Rows of the speed table that run layers and models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.lab import models
from lowbit.lab.bench import random_images, times_in_turn
from lowbit.lab.compare import stepper
from lowbit.lab.loop import Config, resolve
from lowbit.lab.models.blocks import Block, causal_mask
from lowbit.lab.saved import saved_bytes
from lowbit.lab.speed.table import TARGETS, Calls, Case, Settings, row
from lowbit.methods import METHODS

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


# ---- training steps --------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Transformer blocks under a causal mask; x: (batch, tokens, dim)."""

    mask: Tensor

    def __init__(self, dim: int, heads: int, depth: int, tokens: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, nn.GELU()) for _ in range(depth))
        self.register_buffer("mask", causal_mask(tokens), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask=self.mask)
        return x


def gpt_step(kind: str, dim: int, tokens: int, batch: int, depth: int) -> Callable[[], None]:
    """A training step with AdamW: "int8", "float32", "bfloat16" (autocast), or "int8, bfloat16 between" (int8 layers
    under autocast: what lies between them is bfloat16)."""
    torch.manual_seed(0)
    model = Stack(dim, max(1, dim // 64), depth, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if kind.startswith("int8"):
        lowbit.attach(lowbit.apply(model, lowbit.create("int8")), optimizer)
    x, target = torch.randn(batch, tokens, dim, requires_grad=True), torch.randn(batch, tokens, dim)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in kind):
            y = model(x)
        F.mse_loss(y.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step


def gpt_shape(s: Settings) -> tuple[int, int, int, int]:
    """dim, tokens, batch, blocks."""
    return (64, 16, 2, 1) if s.quick else (512, 256, 8, 4)


@row("gpt", "Training step of a GPT block stack (forward, backward, AdamW)")
def gpt(s: Settings) -> list[Case]:
    dim, tokens, batch, depth = gpt_shape(s)
    what = f"{depth} blocks, d={dim}, T={tokens}, batch {batch}"
    kinds = ("int8", "int8, bfloat16 between", "float32", "bfloat16")
    calls: Calls = {(kind, ""): gpt_step(kind, dim, tokens, batch, depth) for kind in kinds}
    return s.run(what, calls, TARGETS["gpt"], budget=20.0)


def image_step(method: str, s: Settings, layout: str, amp: str = "no") -> Callable[[], None]:
    """A training step of ResNet-20 on random 32x32 images, with the method's own optimizer."""
    batch = 8 if s.quick else 128
    data = random_images(batch)
    config = Config(method=method, model="resnet20", batch_size=batch, data="images", amp=amp, device="cpu")
    steps = stepper(resolve(config, data), data, layout == "channels-last")
    return lambda: next(steps)


@row("resnet20", "Training step of ResNet-20, 32x32 images, batch 128 (forward, backward, SGD)")
def resnet20(s: Settings) -> list[Case]:
    kinds = {
        "int8": ("int8", "no"),
        "int8, bfloat16 between": ("int8", "bf16"),
        "float32": ("fp32", "no"),
        "bfloat16": ("fp32", "bf16"),
    }
    calls: Calls = {
        (kind, layout): image_step(method, s, layout, amp)
        for kind, (method, amp) in kinds.items()
        for layout in LAYOUTS
    }
    return s.run("resnet20", calls, TARGETS["resnet20"], budget=20.0)


@row("simulated", "Training step of ResNet-20, batch 128, with every method, against float32")
def simulated(s: Settings) -> list[Case]:
    calls: Calls = {}
    for method in ["fp32", *sorted(set(METHODS) - {"fp32"})]:
        s.tell(f"{method}: which layout is faster")
        both: Calls = {(method, layout): image_step(method, s, layout) for layout in LAYOUTS}
        trial = times_in_turn(both, 3, 0.0)
        at = min(both, key=lambda key: min(trial[key]))
        calls[method, at[1]] = both[at]
    target = TARGETS["simulated"][""]
    return s.run("resnet20", calls, {m: target for m, _ in calls if m != "fp32"}, budget=30.0)


# ---- layers ----------------------------------------------------------------------------------------------------------


def layer_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward, with the gradients of input and weight."""
    x = x.detach().requires_grad_()
    error = torch.randn_like(layer(x))
    leaves = [x, *layer.parameters()]

    def step() -> None:
        for leaf in leaves:  # as an optimizer clears gradients, without a walk through the modules
            leaf.grad = None
        layer(x).backward(error)

    return step


class PointwiseLinear(nn.Conv2d):
    """A linear layer as 1x1 convolution, which PyTorch gives to oneDNN: on some processors faster than its `mm`."""

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = input.shape
        y = super().forward(input.view(1, 1, rows, columns).permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1).reshape(rows, -1)


BETWEEN = "int8, bfloat16 between"
"""An int8 layer in a bfloat16 model: what enters and what leaves it is bfloat16; its weight is float32, as under
autocast."""
KINDS = ("int8", "float32", "bfloat16")
GROUPS = {KINDS: "", (BETWEEN, "bfloat16"): ", bfloat16 between"}
"""What is compared: layers between float32 tensors (bfloat16 has its own), and both between bfloat16 tensors."""


def of_kind(kind: str, layer: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """A layer and its input as "int8", `BETWEEN`, "float32" or "bfloat16"."""
    if kind.startswith("int8"):
        layer = lowbit.apply(layer, lowbit.create("int8"))
    elif kind == "bfloat16":
        layer = layer.bfloat16()
    return layer, x.bfloat16() if "bfloat16" in kind else x


def linear_calls(tokens: int, inputs: int, outputs: int, kinds: Sequence[str] = KINDS) -> Calls:
    x = torch.randn(tokens, inputs)
    calls: Calls = {(kind, ""): layer_step(*of_kind(kind, nn.Linear(inputs, outputs), x)) for kind in kinds}
    if "float32" in kinds:
        calls["float32 by oneDNN's 1x1 convolution", ""] = layer_step(PointwiseLinear(inputs, outputs, 1), x)
    return calls


LINEAR = ((384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768))
"""Inputs and outputs in the blocks of ViT-S and BERT-base."""


@row("linear", "Linear layers, 2048 tokens (forward and backward)")
def linear(s: Settings) -> list[Case]:
    cases = []
    for inputs, outputs in ((32, 64),) if s.quick else LINEAR:
        for kinds, what in GROUPS.items():
            calls = linear_calls(64 if s.quick else 2048, inputs, outputs, kinds)
            cases += s.run(f"{inputs} to {outputs}{what}", calls, TARGETS["linear"])
    return cases


def conv_calls(batch: int, inputs: int, outputs: int, size: int, kernel: int, kinds: Sequence[str] = KINDS) -> Calls:
    calls: Calls = {}
    for kind in kinds:
        for layout, order in LAYOUTS.items():
            conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
            layer, x = of_kind(kind, conv, torch.randn(batch, inputs, size, size))
            layer.to(memory_format=order)  # type: ignore[call-overload]
            calls[kind, layout] = layer_step(layer, x.to(memory_format=order))
    return calls


def moving_bytes(inputs: int, outputs: int) -> Callable[[], None]:
    """The reads and writes that an int8 layer from so many numbers to so many can't do without, forward and backward,
    and nothing else, by PyTorch's own `sum` and `fill_`: input and error are read twice, for their scales and for their
    codes, both codes of each are written and read, and the result and the gradient of the input are written."""
    a, gradient, result, error = (torch.randn(n) for n in (inputs, inputs, outputs, outputs))
    # codes, a quarter of the bytes
    forward_a, backward_a, forward_e, backward_e = (torch.zeros(n // 4) for n in (inputs, inputs, outputs, outputs))

    def encode(x: Tensor, one: Tensor, other: Tensor) -> None:
        x.sum(), x.sum()
        one.fill_(0.0), other.fill_(0.0)

    def step() -> None:
        encode(a, forward_a, backward_a)
        forward_a.sum(), result.fill_(0.0)
        encode(error, forward_e, backward_e)
        forward_e.sum(), gradient.fill_(0.0)
        backward_e.sum(), backward_a.sum()

    return step


CONV = (
    (64, 64, 56, 3),
    (128, 128, 28, 3),
    (256, 256, 14, 3),
    (512, 512, 7, 3),
    (64, 256, 56, 1),
    (256, 64, 56, 1),
    (512, 128, 28, 1),
)
"""Inputs, outputs, pixels and kernel in the blocks of ResNet-50."""


@row("conv", "Convolutions of ResNet-50, batch 16 (forward and backward)")
def conv(s: Settings) -> list[Case]:
    cases = []
    for inputs, outputs, size, kernel in ((8, 8, 8, 3),) if s.quick else CONV:
        batch = 2 if s.quick else 16
        pixels = batch * size**2
        for kinds, what in GROUPS.items():
            calls = conv_calls(batch, inputs, outputs, size, kernel, kinds)
            if "float32" in kinds:
                calls["the bytes that int8 moves, alone", ""] = moving_bytes(pixels * inputs, pixels * outputs)
            cases += s.run(f"{kernel}x{kernel}, {inputs} to {outputs}, {size}x{size}{what}", calls, TARGETS["conv"])
    return cases


@row("saved", "Bytes of activations kept for the backward pass, against float32")
def saved(s: Settings) -> list[Case]:
    dim, tokens, batch, depth = gpt_shape(s)
    batch -= 1  # so that no activation has the shape of a weight
    images, rows = (1, 64) if s.quick else (16, 2048)
    small = 8 if s.quick else 128
    built: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        f"linear layer 768 to 3072, {rows} tokens": (lambda: nn.Linear(768, 3072), (rows, 768)),
        f"convolution 3x3, 64 to 64, 56x56, batch {images}": (
            lambda: nn.Conv2d(64, 64, 3, padding=1),
            (images, 64, 56, 56),
        ),
        f"{depth} GPT blocks, d={dim}, T={tokens}, batch {batch}": (
            lambda: Stack(dim, max(1, dim // 64), depth, tokens),
            (batch, tokens, dim),
        ),
        f"resnet20, batch {small}": (
            lambda: models.build("resnet20", (3, 32, 32), 10),
            (small, 3, 32, 32),
        ),
    }
    cases = []
    for what, (build, shape) in built.items():
        s.tell(what)
        found = {}
        for kind in ("float32", "int8"):
            model = build()
            if kind.startswith("int8"):
                model = lowbit.apply(model, lowbit.create("int8"))
            x = torch.randn(shape, requires_grad=True)
            found[kind] = saved_bytes(model, lambda: model(x))  # noqa: B023
        for part in ("activations", "layers"):
            first = getattr(found["float32"], part)
            if part == "layers" and "resnet" not in what:  # one layer is all; attention has products that no layer has
                continue
            where = what if part == "activations" else f"{what}: inputs of its linear and convolution layers"
            for kind, one in found.items():
                case = {"what": where, "case": kind, "bytes": getattr(one, part), "copies_of_weights": one.weights}
                case |= {"ratio": case["bytes"] / first, "target": TARGETS["saved"].get(kind)}
                cases.append(case)
    return cases
