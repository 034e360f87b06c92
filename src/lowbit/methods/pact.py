"""PACT, parameterized clipping activation (Choi, Wang, Venkataramani, Chuang, Srinivasan, Gopalakrishnan,
2018, arXiv 1805.06085).

Activations, with a clip alpha learned for each layer and n = 2^k - 1:

    forward    y = 0.5 (|x| - |x - alpha| + alpha) = clip(x, 0, alpha)     yq = round(y n / alpha) alpha / n
    backward   dyq/dx = 1 on [0, alpha), else 0          dyq/dalpha = 1 where x >= alpha, else 0
    loss       + lambda / 2 * alpha^2 for each clip: add `lowbit.penalty(model)` to the loss

The gradient of alpha is the plain sum, and has no term from inside the range although alpha scales the grid
there (that term makes PACT+). Alpha starts at 10, above what activations reach, and the penalty shrinks it.
`attach` keeps alpha out of weight decay, so the penalty is counted once; the paper sets lambda to the weight
decay, 2e-4 on CIFAR-10.

Weights are DoReFa-Net's, k bits for each layer; first and last layer stay in float:

    wq = 2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1

`ends=8` gives the first and last layer 8 bits (table 2). The input of the network is no output of a ReLU and
may be negative: there it is rounded to signed 8 bits with step max|x| / 127.

Differences from the paper: the quantizer stands at the input of each layer, after the ReLU it replaces (which
changes nothing: min(ReLU(x), alpha) = PACT(x)), so two layers that read one activation have a clip each, and
an identity shortcut carries the values in float. Inputs that are negative for another reason (after GELU or
SiLU, or of a linear bottleneck) are cut off at 0; the paper has no such layers.
"""

from __future__ import annotations

from ..backward import LearnedClip
from ..formats import Even, Int
from ..quantizer import QSpec
from ..recipe import Recipe, Roles, Rule, float_ends
from ..scales import AbsMax, Learned
from . import Card, method

__all__ = ["pact"]


def _weight(bits: int) -> QSpec:
    return QSpec(Even(bits), kind="tanh_max")


def _activation(bits: int, clip: float, decay: float) -> QSpec:
    fmt = Int(bits, signed=False)
    scale = Learned(fmt.max, what="clip", init="value", value=clip)
    return QSpec(fmt, scale=scale, kind="pact", backward=LearnedClip(), params={"decay": decay})


@method(
    Card(
        name="pact",
        title="PACT: Parameterized Clipping Activation for Quantized Neural Networks",
        year=2018,
        arxiv="1805.06085",
        area="activations",
        headline=(
            "CIFAR-10, ResNet-20: 89.7 / 91.1 / 91.3 / 91.7 % with 2 / 3 / 4 / 5 bits, 91.6 % float",
            "ImageNet, ResNet-18: 64.4 / 68.1 / 69.2 / 69.8 % with 2 / 3 / 4 / 5 bits, 70.2 % float",
            "ImageNet, ResNet-50: 72.2 / 75.3 / 76.5 / 76.7 % with 2 / 3 / 4 / 5 bits, 76.9 % float",
        ),
    )
)
def pact(bits: int = 4, clip: float = 10.0, decay: float = 2e-4, ends: int | None = None) -> Recipe:
    for name, given in (("bits", bits), ("ends", ends)):
        if given is not None and not 2 <= given <= 8:
            allowed = "2 to 8" if name == "bits" else "2 to 8, or None for float"
            raise ValueError(f"PACT has {name}={allowed}; got {given!r}")
    if not clip > 0:
        raise ValueError(f"a clip starts above 0, where activations end; got {clip!r}")
    if not decay >= 0:
        raise ValueError(f"decay is the coefficient of a penalty and not negative; got {decay!r}")
    roles = Roles(W=_weight(bits), A=_activation(bits, clip, decay))
    if ends is None:
        return Recipe("pact", roles, rules=float_ends())
    image = QSpec(Int(ends, narrow=True), scale=AbsMax(Int(ends).max))
    rules = (
        Rule(where="last", roles=Roles(W=_weight(ends), A=_activation(ends, clip, decay))),
        Rule(where="first", roles=Roles(W=_weight(ends), A=image)),
    )
    return Recipe("pact", roles, rules=rules)
