"""Limited numerical precision: training in 16-bit fixed point (Gupta, Agrawal, Gopalakrishnan, Narayanan, 2015,
arXiv 1502.02551).

    <IL, FL>     multiples of eps = 2^-FL in [-2^(IL-1), 2^(IL-1) - eps];  WL = IL + FL bits, the sign among them
    Convert(x)   the end of the range where x reaches it, else x rounded:
    nearest      floor(x) where x - floor(x) <= eps / 2, else floor(x) + eps        (floor to multiples of eps)
    stochastic   floor(x) + eps with probability (x - floor(x)) / eps, else floor(x)

    y = Convert(sum w a + b)      dL/da = Convert(sum w e)      dL/dw = Convert(sum e a)      w <- Convert(w - lr dL/dw)

Weights, biases, errors and weight gradients lie on one grid, <4, 12> by default; layer outputs (and the input of the
network) on another, `activations`, <8, 8> by default: on MNIST and CIFAR-10 their sums pass 8 and would saturate. Every
layer is treated alike, first and last too; softmax and loss stay in float. A sum of products is kept wide and converted
once, as the paper's 48-bit accumulators do: here the wide sum is float32. Gradients pass every conversion unchanged,
saturated elements too. Stochastic rounding draws anew for each tensor and step; in evaluation rounding is to nearest.

There is no float copy of the weights: `apply` puts them on the grid and each update leaves them there, so an update
below eps is lost with nearest rounding and kept in the mean with stochastic rounding. That is the paper's point.

Errors of a loss that is a mean over a large batch may lie below eps, where the grid keeps little but their noise. The
paper does not say whether its loss is a sum; `loss_scale=N`, the size of the batch, makes it one in the backward pass.
G is then converted before that factor is divided out, outside the words.

`raise_at` is the mixed schedule: from that optimizer step on, words have `raise_to` bits, the new ones behind the
point. Left open by the paper and chosen here: the optimizer's momentum, if it has one, stays in float; the gradient of
the last bias sums the errors as the loss gives them, and is converted once.
"""

from __future__ import annotations

from typing import Literal

from ..formats import Fixed
from ..quantizer import QSpec
from ..recipe import LossScale, Products, Recipe, Roles, Stage, Update
from ..rounding import Rounding
from ..scales import Static
from ..serial import nearest
from ..steps import StoreOnGrid
from . import Card, method

__all__ = ["gupta"]

ROUNDING: dict[str, Rounding] = {"stochastic": "stochastic", "nearest": "half_down"}
"""The paper's two modes; its nearest sends ties down."""


def _lengths(il: int | None, fl: int | None, wl: int | None) -> tuple[int, int]:
    if fl is None:
        fl = 12 if il is None and wl is None else (16 if wl is None else wl) - (4 if il is None else il)
    if il is None:
        il = (16 if wl is None else wl) - fl
    if wl is not None and il + fl != wl:
        raise ValueError(f"il + fl is the word length: {il} + {fl} is not wl={wl}; give two of the three")
    return il, fl


@method(
    Card(
        name="gupta",
        title="Deep Learning with Limited Numerical Precision",
        year=2015,
        arxiv="1502.02551",
        area="training",
        headline=("16-bit fixed point with stochastic rounding trains with little or no loss against float",),
    )
)
def gupta(
    il: int | None = None,
    fl: int | None = None,
    wl: int | None = None,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    activations: tuple[int, int] | None = None,
    raise_at: int | None = None,
    raise_to: int = 20,
    loss_scale: float = 1.0,
) -> Recipe:
    # words are <4, 12> and layer outputs <8, 8>, whose sums pass 8 easily; with one or two of the lengths given the
    # word has 16 bits, or il is 4, and layer outputs share it
    if rounding not in ROUNDING:
        raise ValueError(f"unknown rounding {rounding!r}; {nearest(rounding, ROUNDING)}")
    if not loss_scale > 0:
        raise ValueError(f"loss_scale is positive, 1 for none; got {loss_scale}")
    if activations is not None and len(activations) != 2:
        raise ValueError(f"activations is the pair (il, fl) of the layer outputs; got {activations!r}")
    lengths = _lengths(il, fl, wl)
    outputs = activations or ((8, 8) if (il, fl, wl) == (None, None, None) else lengths)

    def grid(il: int, fl: int, scale: float = 1.0) -> QSpec:
        return QSpec(Fixed(il, fl), scale=Static(scale), rounding=ROUNDING[rounding], eval_rounding="half_down")

    def roles(more: int) -> tuple[Roles, QSpec]:
        word, output = (grid(i, f + more) for i, f in (lengths, outputs))
        gradient = grid(lengths[0], lengths[1] + more, 1 / loss_scale)
        return Roles(W=word, A=output, E=word, G=gradient, U=word), output

    usual, output = roles(0)
    schedule: tuple[Stage, ...] = ()
    if raise_at is not None:
        more = raise_to - sum(lengths)
        if more <= 0:
            raise ValueError(f"raise_to must exceed the word length {sum(lengths)}; got {raise_to}")
        late, late_output = roles(more)
        schedule = (Stage(start=raise_at, roles=late, result=late_output),)
    return Recipe(
        "gupta",
        usual,
        Products(result=output, error_at="both"),
        steps=(StoreOnGrid(),),
        update=Update(biases=True),
        schedule=schedule,
        loss_scale=None if loss_scale == 1 else LossScale(loss_scale),
    )
