"""WAGE: training and inference with integers (Wu, Li, Chen, Shi, 2018, arXiv 1802.04680).

    sigma(k) = 2^(1-k)      Q(x, k) = clip(sigma rint(x / sigma), ±(1 - sigma))      Shift(x) = 2^rint(log2 x)

    W   Q(w, k_W) / alpha             alpha = max(Shift(L_min / L_0), 1), L_0 = sqrt(6 / fan_in), L_min = 1.5 sigma(k_W)
    A   Q(a, k_A)                      gradient: 1 where |a| <= 1 - sigma(k_A), else 0
    E   Q(e / Shift(max|e|), k_E)      where an error leaves a layer at its input; the output of the network too
    G   g_s = lr g / Shift(max|g|);    dw = sigma(k_G) sign(g_s) (floor|g_s| + 1 with probability frac|g_s|)
    U   w <- clip(w - dw, ±(1 - sigma(k_G)))

The scales of E and G are dropped, not put back: the learning rate is measured in steps of sigma(k_G). alpha is a
constant of the layer; W's gradient has neither mask nor alpha. All layers are treated alike. In the backward pass the
mask of A comes before E, as in the release.

Weights start as U(-L, L), L = max(L_0, L_min), rounded by Q(., k_W) without its clip. The release (`init="release"`)
has L_0 = sqrt(3 / fan_in), in alpha too; `init="keep"` keeps the model's own weights. Stored weights are multiples of
sigma(k_G). `clip="release"` clips them to ±(1 - sigma(k_W)): the release does so before each update, this library after
it, and the same values enter every product. The release first rounds g_s to 16 bits; not done here. An update of more
than 2^(k_G - 1) - 1 steps (8 bits: a learning rate above 89) saturates.

WAGE networks have ReLU and max pooling, no normalisation and no biases. `apply` puts the identity in place of batch
normalisation (`norm="keep"` leaves it in float; its parameters then need a far smaller learning rate) and sets biases
to zero and freezes them. Inputs lie in [-1, 1]. The loss is the sum of squared errors; the optimizer must be SGD
without momentum and decay, at learning rate 8, then 1 and 1/8 (epochs 200 and 250 of 300 in the release).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..backward import Coded, InRange
from ..blocks import Blocked
from ..formats import Int
from ..quantizer import QSpec, Quantizer, Scaling
from ..recipe import Products, Recipe, Roles, Rule, Step, Swap, Update
from ..scales import AbsMax, PowerOfTwo, Static
from ..serial import nearest, spec
from ..steps import StoreOnGrid
from . import Card, method

__all__ = ["wage"]

BETA = 1.5
"""L_min in steps of W (section 3.3.1 of the paper): no weight matrix starts with all its codes at zero."""
VARIANCE = {"paper": 6.0, "release": 3.0, "keep": 6.0}
"""L_0 = sqrt(this / fan_in): of the paper's equation, and of the released initializer."""
SHIFT = PowerOfTwo(AbsMax(1.0), "nearest")


def sigma(k: int) -> float:
    return 2.0 ** (1 - k)


def alpha(fan_in: int, k: int, variance: float) -> float:
    """max(Shift(L_min / L_0), 1); Shift from the bits of the square: no logarithm is rounded."""
    square = (BETA * sigma(k)) ** 2 * fan_in / variance
    return 2.0 ** max(math.frexp(square)[1] // 2, 0)


def fan_in(weight: Tensor, quantizer: Quantizer) -> int:
    """Inputs of one output of a layer."""
    return weight.numel() // math.prod(weight.shape[a] for a in quantizer.layout.row[1])  # a weight's rows: its outputs


class WageW(Quantizer, kind="wage_w"):
    """Codes Q(w) on the step sigma / alpha. `params["variance"]`: of L_0."""

    def prepare(self, x: Tensor) -> Tensor:
        self.alpha = alpha(fan_in(x, self), self.spec.format.bits, self.spec.params["variance"])
        return x

    def scaling(self, x: Blocked) -> Scaling:
        step = torch.full((x.count, 1), sigma(self.spec.format.bits), dtype=x.dtype, device=x.x.device)
        divisor = torch.full_like(step, self.alpha)
        return Scaling(step, self.spec.format, step=step / divisor, divisor=divisor)


class WageE(Quantizer, kind="wage_e"):
    """`QSpec.scale` gives the power of two that is divided out and dropped."""

    def scaling(self, x: Blocked) -> Scaling:
        shift, _ = self.scale_for(x)
        step = torch.full_like(shift, sigma(self.spec.format.bits))
        return Scaling(shift * step, self.spec.format, step=step, divisor=shift)  # powers of two: exact


class WageG(Quantizer, kind="wage_g"):
    """The update dw of a weight gradient, at learning rate `rate`."""

    plain_sgd = True
    rate = 1.0

    def codes_and_scale(self, x: Tensor, u: Tensor | None) -> Coded:
        shift, _ = self.scale_for(Blocked(x))
        fmt, step = self.spec.format, sigma(self.spec.format.bits)
        t = x / shift * self.rate
        grid = fmt.snap(t.abs(), self.mode(u is not None), u) * t.sign() + 0.0
        return Coded(grid, torch.full_like(shift, step), fmt, divisor=shift / (self.rate * step))

    def gradient(self, grad: Tensor, lr: float, key: Tensor | None) -> Tensor:
        if lr == 0:
            return torch.zeros_like(grad)
        self.rate = lr
        try:
            return self.quantize(grad, key) / lr  # SGD multiplies by lr again, U removes what that rounds
        finally:
            self.rate = 1.0


@spec
class WageStart(Step):
    """Start values of the weights; biases are set to zero and frozen."""

    init: Literal["paper", "release", "keep"] = "paper"

    @torch.no_grad()
    def run(self, model: Any, layers: Mapping[str, Any]) -> None:
        for item in layers.values():
            quant, weight = item.quant.role("W"), item.weight
            if isinstance(quant, WageW) and self.init != "keep":
                step = sigma(quant.spec.format.bits)
                limit = max(math.sqrt(VARIANCE[self.init] / fan_in(weight, quant)), BETA * step)
                start = torch.empty_like(weight).uniform_(-limit, limit)
                weight.detach().copy_((start / step).round() * step)
            for name, bias in item.module.named_parameters():
                if name.endswith("bias"):
                    bias.zero_()
                    bias.requires_grad_(False)


@method(
    Card(
        name="wage",
        title="Training and Inference with Integers in Deep Neural Networks",
        year=2018,
        arxiv="1802.04680",
        area="training",
        headline=("CIFAR-10, VGG-like, released log: 7.17 % test error over the last ten epochs, 6.89 % at best",),
        training={"optimizer": "sgd", "lr": 8.0, "momentum": 0.0, "weight_decay": 0.0},
    )
)
def wage(
    w_bits: int = 2,
    a_bits: int = 8,
    g_bits: int = 8,
    e_bits: int = 8,
    init: Literal["paper", "release", "keep"] = "paper",
    clip: Literal["paper", "release"] = "paper",
    norm: Literal["remove", "keep"] = "remove",
) -> Recipe:
    for name, bits in (("w_bits", w_bits), ("a_bits", a_bits), ("g_bits", g_bits), ("e_bits", e_bits)):
        if not 2 <= bits <= 16:
            raise ValueError(f"{name} is 2 to 16; got {bits}")
    if g_bits < w_bits:
        raise ValueError(f"weights are stored in g_bits, at least w_bits; got w_bits={w_bits} and g_bits={g_bits}")
    for given, words in ((init, VARIANCE), (clip, ("paper", "release")), (norm, ("remove", "keep"))):
        if given not in words:
            raise ValueError(f"unknown word {given!r}; {nearest(given, words)}")

    w, a, g, e = (Int(k, narrow=True) for k in (w_bits, a_bits, g_bits, e_bits))
    weight = QSpec(w, kind="wage_w", params={"variance": VARIANCE[init]})
    activation = QSpec(a, scale=Static(sigma(a_bits)), backward=InRange())
    error = QSpec(e, scale=SHIFT, kind="wage_e")
    gradient = QSpec(g, scale=SHIFT, rounding="stochastic", kind="wage_g")
    stored = QSpec(g, scale=Static(sigma(g_bits)))
    return Recipe(
        "wage",
        Roles(W=weight, A=activation, E=error, G=gradient, U=stored),
        Products(error_at="input"),
        rules=(Rule(where="last", products=Products(error_at="both")),),
        swaps=() if norm == "keep" else tuple(Swap(f"BatchNorm{d}d", "Identity") for d in (1, 2)),
        steps=(WageStart(init), StoreOnGrid()),
        update=Update(clip=1 - sigma(w_bits) if clip == "release" else None),
        criterion="sse",
    )
