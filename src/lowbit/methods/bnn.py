"""Binarized neural networks (Courbariaux, Hubara, Soudry, El-Yaniv, Bengio, NIPS 2016, arXiv 1602.02830) and
quantized neural networks (the same authors, JMLR 2018, arXiv 1609.07061).

Weights and activations are -1 or +1, in every layer; sign(0) = +1:

    forward    wb = sign(w)                    ab = sign(a), a the output of batch norm
    backward   dL/dw = dL/dwb                  dL/da = dL/dab * 1[|a| <= 1]
    update     w <- clip(w + c * step, -1, 1)  c = 1 / sqrt(1.5 / (fan_in + fan_out)) for Adam, c^2 for SGD

The order in a block is convolution, max-pool, batch norm, hard tanh, sign. So every `nn.ReLU` becomes
`nn.Hardtanh` (behind a ReLU all activations would be +1), whose mask is strict, as in the release for Torch:
1[|a| < 1]. A ReLU that is called as a function is not seen. Zero padding gives a convolution a third value,
as it did in the paper.

Latent weights start spread over [-1, 1] as in the releases, which draw them there: `apply` divides each
layer's weights by their largest magnitude, which changes no sign. The network's input is 8-bit fixed point
(codes 0 to 255 between its smallest and largest value; pixels keep their codes). The loss is the squared
hinge on targets of +-1.

    stochastic=True     in training ab = +1 with probability clip((a + 1) / 2, 0, 1)
    activation_bits=k   QNN: 2^k equal levels from -1 to 1, same mask
    shift_norm=True     batch norm by shifts (`swaps.ShiftBatchNorm`), also that of the output layer if it has one

The authors' shift-based AdaMax is an optimizer of its own and QNN's 6-bit gradients have no published grid:
neither is here; Adam is what the first release used.
"""

from __future__ import annotations

from ..backward import InRange, PassThrough
from ..formats import BINARY, Even, Int
from ..quantizer import QSpec
from ..recipe import Recipe, Roles, Rule, Swap, Update
from ..scales import MinMax, Static
from ..steps import Spread
from . import Card, method

__all__ = ["bnn"]


@method(
    Card(
        name="bnn",
        title="Binarized Neural Networks",
        year=2016,
        arxiv="1602.02830",
        area="binary",
        headline=(
            "MNIST, perceptron: 0.96 % error; SVHN: 2.80 %; CIFAR-10, ConvNet: 11.40 %",
            "ImageNet, AlexNet: 41.8 / 67.1 % top-1 / top-5, 56.6 / 80.2 % float",
            "ImageNet, AlexNet with 2-bit activations: 51 % top-1",
        ),
        training={"optimizer": "adam", "lr": 1e-3},
    )
)
def bnn(activation_bits: int = 1, stochastic: bool = False, shift_norm: bool = False) -> Recipe:
    if not 1 <= activation_bits <= 8:
        raise ValueError(f"activation_bits must be 1 to 8; got {activation_bits!r}")
    levels = Even(activation_bits)
    weight = QSpec(BINARY, backward=PassThrough())
    activation = QSpec(
        levels,
        scale=Static(1 / levels.max),
        backward=InRange(-1.0, 1.0),
        rounding="stochastic" if stochastic else "half_even",
    )
    image = QSpec(Int(8, signed=False), scale=MinMax(255))
    norms = tuple(Swap(f"BatchNorm{d}d", "ShiftBatchNorm") for d in (1, 2)) if shift_norm else ()
    return Recipe(
        "bnn",
        Roles(W=weight, A=activation),
        rules=(Rule(where="first", roles=Roles(W=weight, A=image)),),
        swaps=(Swap("ReLU", "Hardtanh"), *norms),
        steps=(Spread(),),
        update=Update(clip=1.0, lr_scale="glorot"),
        criterion="squared_hinge",
    )
