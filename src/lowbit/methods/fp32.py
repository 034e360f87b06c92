"""Float32: the baseline, a recipe that quantizes nothing."""

from __future__ import annotations

from ..recipe import Recipe
from . import Card, method

__all__ = ["fp32"]


@method(Card(name="fp32", title="Single-precision baseline", year=1985, arxiv="IEEE 754", area="baseline"))
def fp32() -> Recipe:
    return Recipe("fp32")
