"""Steps: what a method does to a model once, at the end of `apply` (`Recipe.steps`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .control import control_of
from .recipe import Step
from .serial import spec
from .update import stored

__all__ = ["Spread", "StoreOnGrid"]


@spec
class Spread(Step):
    """Each layer's weights times a positive number that makes the largest magnitude `high`: a uniform start
    becomes U(-high, high), the start of BinaryConnect (Courbariaux et al. 2015, arXiv 1511.00363), and no sign
    changes."""

    high: float = 1.0

    @torch.no_grad()
    def run(self, model: Any, layers: Mapping[str, Any]) -> None:
        done: set[int] = set()
        for item in layers.values():
            weight = item.weight
            if weight is None or weight.data_ptr() in done or not weight.numel():
                continue
            done.add(weight.data_ptr())  # a tied weight is spread once
            peak = weight.abs().amax()
            if bool(peak > 0):
                weight.div_(peak).mul_(self.high)  # in this order the largest is `high` exactly


@spec
class StoreOnGrid(Step):
    """Trained weights, and biases with `Update.biases`, go to the nearest value of the grid of role U, where every
    update leaves them: for methods without a float master copy."""

    @torch.no_grad()
    def run(self, model: Any, layers: Mapping[str, Any]) -> None:
        for entry in stored(model, control_of(model)):
            grid = entry.slot("U")
            if grid is not None:
                part = entry.param[entry.part]
                part.copy_(grid.quantize(part))
