"""DoReFa-Net (Zhou et al., 2016, arXiv 1606.06160): any bit widths of weights, activations and gradients, W-A-G.

    quantize_k(r) = rint(n r) / n for r in [0, 1], n = 2^k - 1, with gradient 1

    W, k = 1   q = mean|w| sign(w), sign(0) = 1                                         dL/dw = dL/dq
    W, k > 1   q = 2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1                   through tanh and the maximum too
    A          q = quantize_k(clip(x, 0, 1))                                            1 on 0 <= x <= 1, else 0
    E          q = 2 m (quantize_k(clip(e / (2 m) + 1/2 + sigma / n, 0, 1)) - 1/2)      m = max|e| of the sample
               sigma uniform in [-1/2, 1/2]

The levels of W (k > 1) and E are odd multiples of 1 / n and of m / n: an even number of them, symmetric, none zero. In
units of m / n, adding sigma and rounding is rounding to the upper of two neighbours with probability (t - lower) / 2,
which is how it is written here: e / (2 m) + 1/2 never leaves [0, 1], so it has mean e, and variance
f (1 - f) (2 m / n)^2 with f the fraction of (n / 2) (e / m + 1). A gradient of 0 becomes +-m / n, either with
probability 1/2. Where the formulas divide zero by zero, a sample's gradient that is 0 throughout stays 0, and weights
that are get quantize_k(1/2): 1 / n each, or 0 with k = 1, whose scale vanishes.

One scale for a weight tensor. E is the gradient of a convolution's own output, as it leaves the batch normalization
behind it on the way back; one draw of it enters both backward products. Clipping to
[0, 1] takes the place of the ReLU; one in the model changes nothing. The first layer stays float, its input and E
included; the last keeps float W and E, and its input is clipped to [0, 1] but not rounded, as in the released nets:
`quantize_ends=True` treats both as all others. 32 bits are float; with `a_bits=32` nothing is clipped and the model's
ReLU stays. The default is the paper's 1-2-6.
"""

from __future__ import annotations

from torch import Tensor

from ..backward import InRange
from ..blocks import PerSample
from ..formats import Even, Float, Int
from ..quantizer import QSpec, Quantizer
from ..recipe import Products, Recipe, Roles, Rule, float_ends
from ..scales import AbsMax, Moments, Static
from . import Card, method

__all__ = ["dorefa"]

SINGLE = Float(8, 23)  # float32 itself


class UnitClip(Quantizer, kind="dorefa_clip"):
    """clip(x, 0, 1); its grid decides whether it is rounded."""

    def prepare(self, x: Tensor) -> Tensor:
        return x.clamp(0, 1)


@method(
    Card(
        name="dorefa",
        year=2016,
        arxiv="1606.06160",
        area="training",
        title="DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients",
        headline=(
            "ImageNet, AlexNet, 1-2-6: 46.1 % top-1",
            "ImageNet, AlexNet, released code, top-1 error: 46.8 % with 1-2-6, 54.0 % with 1-2-4, 40.3 % float",
            "SVHN error: 3.1 to 3.2 % with 1-1-4, 2.3 % float",
        ),
    )
)
def dorefa(w_bits: int = 1, a_bits: int = 2, e_bits: int = 6, quantize_ends: bool = False) -> Recipe:
    for name, bits in (("w_bits", w_bits), ("a_bits", a_bits), ("e_bits", e_bits)):
        if not isinstance(bits, int) or bits not in (*range(1, 9), 32):
            raise ValueError(f"{name} is 1 to 8, or 32 for float; got {bits!r}")

    weight = activation = error = None
    if w_bits == 1:
        weight = QSpec(Even(1), scale=Moments(0.0, -1.0, 1.0))  # mean|w|
    elif w_bits < 32:
        weight = QSpec(Even(w_bits), kind="tanh_max")
    if a_bits < 32:
        grid = Int(a_bits, signed=False)
        activation = QSpec(grid, scale=Static(1 / grid.max), backward=InRange(0.0, 1.0))
    if e_bits < 32:
        error = QSpec(Even(e_bits), PerSample(), AbsMax(2**e_bits - 1), rounding="stochastic")

    rules: tuple[Rule, ...] = ()
    if not quantize_ends:
        clipped = Roles(A=None if a_bits == 32 else QSpec(SINGLE, kind="dorefa_clip"))
        rules = (Rule(where="last", roles=clipped, products=Products()), *float_ends(last=False))
    return Recipe("dorefa", Roles(W=weight, A=activation, E=error), rules=rules)
