"""PACT-SAWB: accurate and efficient 2-bit networks (Choi, Venkataramani, Srinivasan, Gopalakrishnan, Wang,
Chuang, SysML 2019; arXiv 1807.06964).

Weights by statistics-aware weight binning, for each layer, from the latent weights at every forward pass:

    m1 = mean|w|      m2 = sqrt(mean w^2)      alpha = c1 m2 - c2 m1     (max|w| where that is not positive)
    u = clip(w / alpha, -1, 1) / 2 + 1/2           wq = alpha (2 round(n u) / n - 1)
    dwq/dw = 1 on [-alpha, alpha], else 0; alpha is a constant

c1 and c2 come from a straight line alpha / m1 = c1 m2 / m1 - c2 through the MSE-optimal clips of six
densities, fitted once for each number of bits (`scales.SAWB`). `levels="even"`: 2^b levels without zero, n =
2^b - 1; `levels="zero"`: 2^b - 1 levels with zero, n = 2^b - 2. `mask=False` passes the gradient everywhere
(SAWB+ of the authors' release). Published coefficients: 2, 3, 4, 5 bits even; 2, 4, 7, 8 bits with zero. A
weight exactly between two levels of the set with zero goes to the even multiple of the step.

Activations by PACT, with its penalty (`lowbit.penalty`), see `pact`. First and last layer are float. `fpsc`:
the shortcuts are in full precision. Identity shortcuts always are here; the convolutions on shortcuts are
found by their names, `shortcuts`, as torchvision, timm and this library's models call them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from ..backward import InRange, PassThrough
from ..formats import Even, Int
from ..quantizer import QSpec
from ..recipe import FLOAT, Products, Recipe, Rule
from ..scales import sawb as sawb_scale
from . import Card, method
from .pact import pact

__all__ = ["sawb"]

SHORTCUTS = ("*downsample*", "*shortcut*")

# The clip max|w| of the fallback is stored as n steps, and n * (max|w| / n) may fall short of it by a rounding:
# the mask reaches a ten-thousandth of a step further, so that the largest weight counts as inside.
ROUNDING = 1e-4


@method(
    Card(
        name="sawb",
        title="Accurate and Efficient 2-bit Quantized Neural Networks",
        year=2019,
        arxiv="1807.06964",
        area="activations",
        headline=(
            "2-bit networks come close to full precision, at 2.7 to 3.1 times the speed of wide "
            "low-precision networks of the same accuracy",
        ),
    )
)
def sawb(
    bits: int = 2,
    levels: Literal["even", "zero"] = "even",
    mask: bool = True,
    activation_bits: int | None = None,
    clip: float = 10.0,
    decay: float = 2e-4,
    fpsc: bool = True,
    shortcuts: Sequence[str] = SHORTCUTS,
) -> Recipe:
    scale = sawb_scale(bits, levels)
    weight = QSpec(
        Even(bits) if levels == "even" else Int(bits, narrow=True),
        scale=scale,
        backward=InRange(margin=ROUNDING) if mask else PassThrough(),
    )
    base = pact(bits if activation_bits is None else activation_bits, clip, decay)
    names = shortcuts if fpsc else ()
    rules = tuple(Rule(name, type="conv", roles=FLOAT, products=Products()) for name in names)
    return dataclasses.replace(
        base, name="sawb", roles=dataclasses.replace(base.roles, W=weight), rules=rules + base.rules
    )
