"""Steps: what a method does to a model once, at the end of `apply` (`Recipe.steps`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .recipe import Step
from .serial import spec

__all__ = ["Spread"]


@spec
class Spread(Step):
    """Each layer's weights times a positive number that makes the largest magnitude `high`: a uniform start becomes
    U(-high, high), the start of BinaryConnect (Courbariaux et al. 2015, arXiv 1511.00363), and no sign changes."""

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
