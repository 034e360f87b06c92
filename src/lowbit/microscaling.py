"""Block-scaled formats: the microscaling (MX) formats of the Open Compute Project and NVFP4.

| preset       | block | element                | scale                             | bits an element |
|--------------|-------|------------------------|-----------------------------------|-----------------|
| `mxfp8()`    | 32    | E4M3, or E5M2          | 2^e (E8M0)                        | 8.25            |
| `mxfp6()`    | 32    | E3M2, or E2M3          | 2^e                               | 6.25            |
| `mxfp4()`    | 32    | E2M1                   | 2^e                               | 4.25            |
| `mxint8()`   | 32    | int8 in steps of 1/64  | 2^e                               | 8.25            |
| `nvfp4()`    | 16    | E2M1                   | E4M3 a block times FP32 a tensor  | 4.5             |

MX (OCP Microscaling Formats 1.0, section 6.3), for a block with largest magnitude amax and an element format whose
largest value has the exponent emax:

    X = 2^(floor(log2 amax) - emax)       exponent clamped at -127
    q = X * cast(x / X)                   to nearest even, saturating

The floor rule lets x / X reach up to 2^(emax+1), beyond the largest element: E2M1 sends (6, 8) to 6. `mode="ceil"` and
`mode="even"` are rules under which less, or nothing, saturates (see `formats.mx_scale`).

NVFP4 (NVIDIA, 2025, arXiv 2509.25149), with amax over the tensor and amax_b over the block:

    s = 448 * 6 / amax                    S = E4M3(s * amax_b / 6), saturating
    q = S / s * E2M1(clip(x * s / S, ±6))

A tensor of zeros, and one that holds an infinity, take s = 1 (the infinite block is infinite or NaN); a block whose S
is 0 is zero. A block whose S was rounded down clips its maximum: 3.0 in a tensor with amax = 10 becomes 2.857. Scales
are applied, and stored, as one float32 number S / s.

Groups lie along the axis that the product sums over; `nvfp4(square=True)` is the 16 x 16 block of weights, whose
quantization commutes with transposition.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .backward import Coded
from .blocks import Blocks, PerGroup, PerTile
from .formats import E2M1, E2M3, E3M2, E4M3, E5M2, MXINT8, Float, Format
from .quantizer import QSpec, Quantizer
from .rounding import Rounding
from .scales import Microscale
from .serial import nearest

__all__ = ["mxfp4", "mxfp6", "mxfp8", "mxint8", "nvfp4"]

Mode = Literal["floor", "ceil", "even"]
BLOCK = 32
GROUP = PerGroup(BLOCK)
"""Elements of an MX block."""


def _mx(fmt: Format, emax: int, mantissa: int, rounding: Rounding, mode: Mode, blocks: Blocks) -> QSpec:
    return QSpec(fmt, blocks, Microscale(emax, mode, mantissa), rounding)


def _element(name: str, elements: dict[str, tuple[Float, int]]) -> tuple[Float, int]:
    if name not in elements:
        raise ValueError(f"unknown element {name!r}; {nearest(name, elements)}")
    return elements[name]


def mxfp8(
    element: Literal["e4m3", "e5m2"] = "e4m3",
    rounding: Rounding = "half_even",
    mode: Mode = "floor",
    blocks: Blocks = GROUP,
) -> QSpec:
    """MXFP8. With `e5m2` finite values saturate at 57344."""
    fmt, emax = _element(element, {"e4m3": (E4M3, 8), "e5m2": (E5M2, 15)})
    return _mx(fmt, emax, fmt.mantissa, rounding, mode, blocks)


def mxfp6(
    element: Literal["e3m2", "e2m3"] = "e3m2",
    rounding: Rounding = "half_even",
    mode: Mode = "floor",
    blocks: Blocks = GROUP,
) -> QSpec:
    """MXFP6."""
    fmt, emax = _element(element, {"e3m2": (E3M2, 4), "e2m3": (E2M3, 2)})
    return _mx(fmt, emax, fmt.mantissa, rounding, mode, blocks)


def mxfp4(rounding: Rounding = "half_even", mode: Mode = "floor", blocks: Blocks = GROUP) -> QSpec:
    """MXFP4."""
    return _mx(E2M1, 2, E2M1.mantissa, rounding, mode, blocks)


def mxint8(rounding: Rounding = "half_even", mode: Mode = "floor", blocks: Blocks = GROUP) -> QSpec:
    """MXINT8: ±127 steps of 1/64, so the code of -2 is never written."""
    return _mx(MXINT8, 0, 6, rounding, mode, blocks)


class Nvfp4(Quantizer, kind="nvfp4"):
    """E2M1 with an E4M3 scale a block and an FP32 scale a tensor."""

    def codes_and_scale(self, x: Tensor, u: Tensor | None) -> Coded:
        largest = torch.finfo(x.dtype).max
        amax = x.abs().amax(-1, keepdim=True)
        encode = (E4M3.max * E2M1.max / amax.amax()).clamp(max=largest)
        encode = torch.where((amax.amax() == 0) | (encode == 0), torch.ones_like(encode), encode)
        block = E4M3.snap(amax * (encode / E2M1.max))
        scale = torch.where(amax.isinf(), amax, block * (1 / encode))
        multiplier = (1 / scale).clamp(max=largest)
        # a block whose scale rounded to zero is zero, and the largest multiplier must not turn its 0 * inf to NaN
        t = torch.where(scale == 0, x * 0, x * multiplier)
        grid = E2M1.snap(t, self.mode(u is not None), u)
        return Coded(grid, scale, self.spec.format)


def nvfp4(rounding: Rounding = "half_even", square: bool = False) -> QSpec:
    """NVFP4; `square` shares a scale among 16 x 16 elements instead of 16 consecutive ones."""
    return QSpec(E2M1, PerTile(16, 16) if square else PerGroup(16), rounding=rounding, kind="nvfp4")
