"""Bytes that a forward pass keeps for the backward pass."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Saved", "saved_bytes"]


@dataclass
class Saved:
    """Bytes of memory by what they hold; every block of memory counts once, parameters and buffers don't."""

    layers: int = 0
    """What linear and convolution layers keep of their inputs."""
    others: int = 0
    """What is kept between them, and nowhere inside them."""
    weights: int = 0
    """Copies of weights: on their grid, or encoded."""

    @property
    def activations(self) -> int:
        return self.layers + self.others


@dataclass
class _Seen:
    own: set[int]
    shapes: set[torch.Size]
    depth: int = 0
    blocks: dict[int, tuple[int, str]] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, inside: bool) -> None:
        memory = x.untyped_storage()
        at = memory.data_ptr()
        if at in self.own or not memory.nbytes():
            return
        self.alive.append(x)  # so that the address stays its own
        kind = "weights" if x.shape in self.shapes else "layers" if inside else "others"
        if at not in self.blocks or kind == "layers":
            self.blocks[at] = memory.nbytes(), kind


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> Saved:
    """What `forward`, a call of `model` with gradients, leaves behind for its backward pass.

    Counted is what autograd saves, and every tensor that Python objects of the graph hold and that did not exist
    before. A tensor with the shape of a parameter (or its transpose) counts as a copy of a weight: choose a batch for
    which no activation has such a shape.
    """
    weights = [*model.parameters(), *model.buffers()]
    shapes = {s for p in model.parameters() for s in (p.shape, p.shape[::-1])}
    seen = _Seen({p.untyped_storage().data_ptr() for p in weights}, shapes)
    before = {id(t) for t in _tensors()}
    existing = list(_tensors())  # keeps the ids of `before` taken

    def enter(*_: Any) -> None:
        seen.depth += 1

    def leave(*_: Any) -> None:
        seen.depth -= 1

    def pack(x: Tensor) -> Tensor:
        seen.add(x, seen.depth > 0)
        return x

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = forward()
    finally:
        for handle in handles:
            handle.remove()
    seen.own |= {t.untyped_storage().data_ptr() for t in existing if t.layout == torch.strided} - set(seen.blocks)
    seen.own.add(y.untyped_storage().data_ptr())
    for t in _tensors():
        if id(t) not in before and t.layout == torch.strided and t.untyped_storage().data_ptr() not in seen.blocks:
            seen.add(t, inside=True)  # codes that a layer keeps beside what autograd saves
    found = Saved()
    for size, kind in seen.blocks.values():
        setattr(found, kind, getattr(found, kind) + size)
    return found


def _tensors() -> list[Tensor]:
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
