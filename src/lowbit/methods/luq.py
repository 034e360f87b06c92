"""LUQ: logarithmic unbiased quantization of the neural gradient (Chmiel et al., ICLR 2023, arXiv 2112.10769).

All three products of a layer have 4-bit operands.

    W, A   clip = c1 sqrt(mean x^2) - c2 mean|x|      (SAWB; max|x| where that is not positive)
           q = step * clip(rint(x / step)),  step = 2 clip / (levels - 1)
           15 levels, codes -7 ... 7; without a negative element, as after a ReLU, 16 levels, codes 0 ... 15
           backward  dL/dx = dL/dq, beyond the clip too
    E      alpha = max|E| / 2^K        levels 0, +-alpha 2^k for k = 0 ... K
           |x| <  alpha    sign(x) alpha with probability |x| / alpha, else 0                  stochastic underflow
           |x| >= alpha    with 2^n <= |x| / alpha < 2^(n+1): sign(x) alpha 2^(n+1) with
                           probability |x| / (alpha 2^n) - 1, else sign(x) alpha 2^n           logarithmic rounding

Both branches have mean x and the top level is max|E|, so nothing is clipped and E[q] = x. One draw enters both backward
products. W and A always round to nearest: noise in the forward pass only costs. Master weights, biases, normalization
and the weight gradient stay float; so do the first and the last layer unless `quantize_ends=True` (the released code
leaves that to the user). Clips are those of the tensor at hand, in evaluation too.

- `levels` is K: 7 as released. Zero and 8 magnitudes of either sign are 17 codes, one more than 4 bits hold;
  `levels="strict"` is K = 6, whose 15 codes fit.
- `samples=N` (SMP): the weight gradient is the mean of N products, each with its own draw of E, and its rounding
  variance falls by 1/N; the input gradient uses the first draw. The released code averages the draws themselves, which
  puts that operand off the 4-bit grid.
- `hindsight=True`: max|E| is replaced by m_t = (1 - eta) max|E_(t-1)| + eta m_(t-1), known before the tensor is; what
  lies above is clipped.
- `pow2_alpha=True`: alpha is rounded up to a power of two, so nothing is clipped.
- `rounding="nearest"` is RDNP, deterministic and biased: 2^floor(log2(4 |x| / 3)) from alpha on (the switch is at
  1.5 2^n, which goes up), 0 below. `rounding="prune_nearest"` has the stochastic underflow and RDNP above it.
- `fnt_steps=T` from step `fnt_start` on (FNT, high-precision fine-tuning): E is float and A is FP16 for T optimizer
  steps while the weights stay on their grid, and the learning rate climbs from `lr_final`, where the 4-bit run ended,
  to `lr_base` at the middle and back. After them, as for inference, A is INT4 again. The default `lr_base` is ours.
- `reference=True` takes W and A as released: c = (12.1, 12.2), W on 17 levels, codes -8 ... 8, and A with a negative
  element on 24 levels, codes -8 ... 15. Its alpha from max(E) instead of max|E| is an error and not repeated.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ..backward import Coded
from ..blocks import Blocked
from ..formats import FP16, Codebook, Format, Int, Log
from ..quantizer import QSpec, Quantizer, Scaling
from ..recipe import Product, Products, Recipe, Roles, Stage, float_ends
from ..scales import AbsMax, Average, Moments, PowerOfTwo, Scale, sawb
from ..serial import nearest
from . import Card, method

__all__ = ["luq"]


RELEASED = Moments(12.1, 12.2, 1.0)  # LUQ's released code


class Sawb4(Quantizer, kind="luq"):
    """A uniform grid whose `levels - 1` steps span [-clip, clip], or [0, 2 clip] where it is unsigned. The clip is that
    of the scale, a `Moments`."""

    def scaling(self, x: Blocked) -> Scaling:
        fmt = self.format_for(x)
        steps = (fmt.max - fmt.min) / 2
        scale, _ = dataclasses.replace(self.spec.scale, denominator=steps).compute(x)  # type: ignore[type-var]
        return Scaling(scale, fmt)


class Rdnp(Quantizer, kind="rdnp"):
    """Nearest power of two from the smallest level on; below it 0, or the smallest level with probability |x| / alpha
    where the specification's rounding is stochastic."""

    def codes_and_scale(self, x: Tensor, u: Tensor | None) -> Coded:
        scale, _ = self.scale_for(Blocked(x))
        t = x / scale
        below = torch.zeros_like(t) if u is None else self.spec.format.snap(t, "stochastic", u)
        t = torch.where(t.abs() < 1, below, t)
        return Coded(self.spec.format.snap(t, "half_away"), scale, self.spec.format)


def _fine_tuning(start: int | None, steps: int, high: float, low: float | None) -> tuple[Stage, ...]:
    if steps < 0 or high <= 0:
        raise ValueError(f"fnt_steps is not negative and lr_base is positive; got {steps} and {high}")
    if steps == 0:
        if start is not None or low is not None:
            raise ValueError("fnt_start and lr_final belong to a fine-tuning stage; set fnt_steps to its length")
        return ()
    if start is None or low is None:
        raise ValueError(
            "fine-tuning needs fnt_start, the length of the 4-bit run in steps, and lr_final, its last "
            f"learning rate; got {start} and {low}"
        )
    return (Stage(start, start + steps, off=("E",), roles=Roles(A=QSpec(FP16)), lr=(low, high)),)


@method(
    Card(
        name="luq",
        title="Accurate Neural Training with 4-bit Matrix Multiplications at Standard Formats (LUQ)",
        year=2023,
        arxiv="2112.10769",
        area="training",
        headline=(
            "ImageNet, ResNet-50: 75.42 %, 75.63 % with two samples, 76.18 % after three epochs of fine-tuning; "
            "76.5 % float",
            "ImageNet, ResNet-18: 69.09 %, 69.24 % with two samples; 69.7 % float",
            "WMT En-De, Transformer-base: BLEU 27.17, 27.25 with two samples; 27.5 float",
        ),
    )
)
def luq(
    levels: int | Literal["strict"] = 7,
    samples: int = 1,
    rounding: Literal["stochastic", "nearest", "prune_nearest"] = "stochastic",
    hindsight: bool = False,
    eta: float = 0.1,
    pow2_alpha: bool = False,
    fnt_start: int | None = None,
    fnt_steps: int = 0,
    lr_base: float = 1e-3,
    lr_final: float | None = None,
    reference: bool = False,
    quantize_ends: bool = False,
) -> Recipe:
    top = 6 if levels == "strict" else levels
    if not isinstance(top, int) or isinstance(top, bool) or not 1 <= top <= 31:
        raise ValueError(f"levels is K, 1 to 31, or 'strict' for 6; got {levels!r}")
    words = ("stochastic", "nearest", "prune_nearest")
    if rounding not in words:
        raise ValueError(f"unknown rounding {rounding!r}; {nearest(rounding, words)}")
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples is an integer of at least 1; got {samples!r}")
    if samples > 1 and rounding == "nearest":
        raise ValueError(f"samples={samples} needs a random rounding; nearest gives the same draw each time")
    if not 0 <= eta < 1:
        raise ValueError(f"eta is the weight of the past maximum and lies in [0, 1); got {eta}")

    clip = RELEASED if reference else sawb(4, "zero")
    unsigned = Int(4, signed=False)
    weight_grid: Format = Codebook(tuple(map(float, range(-8, 9)))) if reference else Int(4, narrow=True)
    input_grid: Format = Codebook(tuple(map(float, range(-8, 16)))) if reference else Int(4, narrow=True)
    weight = QSpec(weight_grid, scale=clip, kind="luq")
    activation = QSpec(input_grid, scale=clip, kind="luq", unsigned=unsigned)

    alpha: Scale = AbsMax(2.0**top)
    if pow2_alpha:
        alpha = PowerOfTwo(alpha, "ceil")
    if hindsight:
        alpha = Average(alpha, momentum=eta, before=True)
    error = QSpec(
        Log(2.0, 0, top),
        scale=alpha,
        rounding="half_away" if rounding == "nearest" else "stochastic",
        kind="grid" if rounding == "stochastic" else "rdnp",
    )

    return Recipe(
        "luq",
        Roles(W=weight, A=activation, E=error),
        Products(grad_w=Product(samples=samples)),
        rules=() if quantize_ends else float_ends(),
        schedule=_fine_tuning(fnt_start, fnt_steps, lr_base, lr_final),
    )
