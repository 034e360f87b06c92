"""Learned step size quantization (Esser, McKinstry, Bablani, Appuswamy, Modha, ICLR 2020, arXiv 1902.08153).

One step s for the weights and one for the input of each layer, with z = v / s:

    forward    code = round(clip(z, Qn, Qp))            vhat = code * s
    backward   dvhat/dv = 1 if Qn < z < Qp else 0
               dvhat/ds = round(z) - z if Qn < z < Qp;  Qn if z <= Qn;  Qp if z >= Qp
               dL/ds is multiplied by g = 1 / sqrt(N Qp)
    start      s = 2 mean|v| / sqrt(Qp)

Weights: Qn = -2^(b-1), Qp = 2^(b-1) - 1, N the weights of the layer. Activations: Qn = 0, Qp = 2^b - 1, N the
features of one sample. A layer whose first batch has negative values gets the signed grid for its input, for
good. Steps start from the first forward pass in training (or `calibrate`), so load the trained float weights
before: the paper starts from them and quantizes from step 0. First and last layer have 8 bits for both
tensors.

Steps are trained by the optimizer of the weights at the same learning rate; `attach` keeps them out of weight
decay (the paper does not say; this is common practice), and a step that an update makes negative counts as
the smallest positive number. The paper's weight decay falls with the bits: 1e-4 for 4 and 8, 0.5e-4 for 3,
0.25e-4 for 2 bits.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..backward import LearnedStep
from ..blocks import Blocked
from ..formats import Int
from ..quantizer import QSpec, Quantizer
from ..recipe import Recipe, Roles, Rule
from ..scales import Learned
from . import Card, method

__all__ = ["lsq"]


class Lsq(Quantizer, kind="lsq"):
    """A learned step whose gradient is scaled by g = 1 / sqrt(N Qp)."""

    def gain(self, x: Tensor) -> float:
        batch = 1 if self.weight or x.dim() < 2 else x.shape[0]
        return 1 / math.sqrt(x.numel() / batch * self.format_for(Blocked(x, self.spec.blocks, self.layout)).max)


def _roles(bits: int) -> Roles:
    signed = Int(bits)
    weight = QSpec(signed, scale=Learned(signed.max), kind="lsq", backward=LearnedStep())
    activation = QSpec(
        signed, scale=Learned(signed.max), kind="lsq", backward=LearnedStep(), unsigned=Int(bits, signed=False)
    )
    return Roles(W=weight, A=activation)


@method(
    Card(
        name="lsq",
        title="Learned Step Size Quantization",
        year=2020,
        arxiv="1902.08153",
        area="activations",
        headline=(
            "ImageNet, ResNet-18: 67.6 / 70.2 / 71.1 / 71.1 % with 2 / 3 / 4 / 8 bits, 70.5 % float",
            "ImageNet, ResNet-50: 73.7 / 75.8 / 76.7 / 76.8 % with 2 / 3 / 4 / 8 bits, 76.9 % float",
            "ImageNet, ResNet-18 with 2 bits: 67.6 % with the gradient scale, 64.2 % at best without",
        ),
        training={"optimizer": "sgd", "lr": 0.01, "momentum": 0.9},
    )
)
def lsq(bits: int = 4, ends: int | None = 8) -> Recipe:
    for name, given in (("bits", bits), ("ends", ends)):
        if given is not None and not 2 <= given <= 8:
            allowed = "2 to 8" if name == "bits" else "2 to 8, or None for the bits of all layers"
            raise ValueError(f"LSQ has {name}={allowed}; got {given!r}")
    eight = _roles(bits if ends is None else ends)
    return Recipe("lsq", _roles(bits), rules=(Rule(where="first", roles=eight), Rule(where="last", roles=eight)))
