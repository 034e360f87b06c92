"""INT8 training: the three products of every layer on int8 codes, with scales of the moment.

This is what practitioners use: `int8_mixed_precision` of torchao (2024), which follows AQT (arXiv 2105.03536)
and SwitchBack (arXiv 2304.13013). Weights, optimizer and all that lies between the layers stay in float.

    scale = max|x| / 127 of a row or channel      code = round(x / scale), -127 to 127      gradient: identity

| product  | left operand                               | right operand                         |
|----------|--------------------------------------------|---------------------------------------|
| `out`    | A per row                                  | W per output channel                  |
| `grad_a` | E per row, stochastic rounding             | W per input channel, encoded anew     |
| `grad_w` | E per output channel, stochastic           | A per input channel, encoded anew     |

A row is a token (linear) or a sample (convolution). A scale leaves a sum only if it is constant along it,
hence the second encoding: codes with row scales can't be transposed. Both encodings of E round by the same
uniforms, since drawing costs as much as casting; either product stays unbiased. Nothing is tracked and nothing
is learned; evaluation scales by the batch at hand as well. With `layers=("linear", "conv", "attention")`
attention products are taken too.

- `stochastic=False` rounds E to nearest, as torchao does, which found noise unnecessary. The default keeps
  gradients unbiased.
- `products` names those in int8; the others see the float tensors. If convergence suffers, leave out
  `grad_w`, then `grad_a`. ("out",) is quantization-aware training for dynamic W8A8; ("out", "grad_a") is
  close to SwitchBack, which has one scale for all of W.
- `first=False`, `last=False` leave the first or the last layer in float (language models: the head).
- `accumulate="int32"` multiplies codes and sums them exactly, then scales; `"float32"` multiplies and sums
  the real values. They differ by the rounding of float sums only. `"auto"` takes int32 where that is faster (see
  the page on speed), and then keeps codes for the backward pass, a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..blocks import Blocks, PerChannel, PerRow
from ..formats import Int
from ..quantizer import QSpec
from ..recipe import Float32, Int32, Keep, Product, Products, Recipe, Roles, float_ends
from ..scales import AbsMax
from ..serial import nearest
from . import Card, method

__all__ = ["int8"]

PRODUCTS = ("out", "grad_a", "grad_w")
ACCUMULATORS: dict[str, Int32 | Float32 | None] = {"auto": None, "int32": Int32(), "float32": Float32()}
FLOAT = Product(left=Keep(), right=Keep())


def _int8(blocks: Blocks, stochastic: bool = False) -> QSpec:
    rounding: Literal["stochastic", "half_even"] = "stochastic" if stochastic else "half_even"
    return QSpec(Int(8, narrow=True), blocks, AbsMax(127), rounding=rounding)


@method(
    Card(
        name="int8",
        title="INT8 mixed-precision training",
        year=2024,
        arxiv="github.com/pytorch/ao",
        area="training",
        headline=(
            "Llama2-1B on C4, 20k steps: validation loss 2.90 in INT8, 2.97 in BF16",
            "Llama2-1B on one RTX 4090: 29k tokens a second in INT8, 17k in BF16",
        ),
    )
)
def int8(
    products: Sequence[str] = PRODUCTS,
    stochastic: bool = True,
    first: bool = True,
    last: bool = True,
    accumulate: Literal["auto", "int32", "float32"] = "auto",
) -> Recipe:
    names = (products,) if isinstance(products, str) else tuple(products)
    for name in names:
        if name not in PRODUCTS:
            raise ValueError(f"unknown product {name!r}; {nearest(name, PRODUCTS)}")
    if not names:
        raise ValueError(f"products is empty: name at least one of {', '.join(PRODUCTS)}")
    if accumulate not in ACCUMULATORS:
        raise ValueError(f"unknown accumulator {accumulate!r}; {nearest(accumulate, ACCUMULATORS)}")
    out, grad_a, grad_w = (name in names for name in PRODUCTS)
    row, channel = _int8(PerRow()), _int8(PerChannel())

    sums = ACCUMULATORS[accumulate]
    return Recipe(
        "int8",
        Roles(W=row if out else None, A=row if out else None, E=_int8(PerRow(), stochastic) if grad_a else None),
        Products(
            out=Product(accumulator=sums) if out else FLOAT,
            grad_a=Product(right=channel, accumulator=sums) if grad_a else FLOAT,
            grad_w=Product(_int8(PerChannel(), stochastic), channel, sums, same_draw=stochastic and grad_a)
            if grad_w
            else FLOAT,
        ),
        rules=float_ends(not first, not last),
    )
