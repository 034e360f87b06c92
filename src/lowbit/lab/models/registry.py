"""The registry of plain models: `@model` adds one, `build` makes one by name."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from lowbit.serial import nearest

__all__ = ["MODELS", "build", "image_shape", "model"]

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

MODELS: dict[str, Callable[..., nn.Module]] = {}
"""Every model by name: a function or class `(input_shape, classes, **options) -> nn.Module`."""


def model(name: str) -> Callable[[Builder], Builder]:
    """Register a builder `(input_shape, classes, **options)` under `name`."""

    def add(builder: Builder) -> Builder:
        if name in MODELS:
            raise ValueError(f"two models are named {name!r}; rename one")
        MODELS[name] = builder
        return builder

    return add


def build(
    name: str, input_shape: tuple[int, ...], classes: int, *, seed: int | None = None, **options: Any
) -> nn.Module:
    """A freshly initialised float32 model on the CPU, in training mode.

    Args:
        name: one of `MODELS`.
        input_shape: shape of one example, as in `Data.input_shape`: (C, H, W) for images, (block,) for a
            character model, (2, length) for a translation model.
        classes: number of outputs: classes of images, or size of the vocabulary.
        seed: seed of the weights. Torch's global generator is used, and left as it was, when a seed is given;
            None draws from the global generator as it stands.
        options: hyper-parameters of the model, such as `width`.

    Raises:
        ValueError: unknown name or option, or a shape or size that the model can't take.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; {nearest(name, MODELS)}")
    builder = MODELS[name]
    allowed = [p for p in inspect.signature(builder).parameters if p not in ("input_shape", "classes")]
    for option in options:
        if option not in allowed:
            raise ValueError(f"{name} has no option {option!r}; {nearest(option, allowed)}")
    shape = tuple(int(n) for n in input_shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"{name} needs an input shape of positive numbers; got {shape}")
    if classes < 2:
        raise ValueError(f"{name} needs at least 2 classes; got {classes}")
    with torch.random.fork_rng(devices=[]) if seed is not None else contextlib.nullcontext():
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        return builder(shape, int(classes), **options)


def image_shape(name: str, shape: tuple[int, ...], least: int = 8) -> tuple[int, int, int]:
    """(channels, height, width), checked.

    Raises:
        ValueError: not three numbers, or an image smaller than `least` pixels on a side.
    """
    if len(shape) != 3:
        raise ValueError(
            f"{name} takes images of shape (channels, height, width); got {shape}: "
            "use a digits, idx or images source, or a model for sequences (gpt_tiny, seq2seq)"
        )
    if min(shape[1:]) < least:
        raise ValueError(
            f"{name} needs images of at least {least}x{least} pixels; got {shape}: resize them, or use mlp"
        )
    return shape[0], shape[1], shape[2]
