"""Layers that a method puts in place of others (`Recipe.swaps`): by name, so that a recipe stays plain data."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

__all__ = ["SWAPS"]

SWAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "Identity": lambda old: nn.Identity(),
    "ReLU": lambda old: nn.ReLU(),
    "Hardtanh": lambda old: nn.Hardtanh(),
    "BatchNorm1d": lambda old: nn.BatchNorm1d(old.num_features),  # type: ignore[arg-type]
    "BatchNorm2d": lambda old: nn.BatchNorm2d(old.num_features),  # type: ignore[arg-type]
    "GELU": lambda old: nn.GELU(),
    "SiLU": lambda old: nn.SiLU(),
    "Dropout": lambda old: nn.Dropout(getattr(old, "p", 0.5)),
}
"""What may stand in a swap: name to a function that makes the new layer from the old one."""
