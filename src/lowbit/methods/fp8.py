"""Training with 8-bit floating point numbers (Wang, Choi, Brand, Chen, Gopalakrishnan, 2018, arXiv 1812.08011).

    FP8  = 1-5-2, bias 15      operands of the three products, nearest, no scale factors
    FP16 = 1-6-9, bias 31      accumulators and stored weights

    C = sum_k Q8(a_k) Q8(b_k):    s <- R16(s + a_k b_k) inside a chunk of 64,    t <- R16(t + s) across chunks
    update, SR16 stochastic:      g <- SR16(g + decay w)      v <- SR16(momentum v + g)      w <- SR16(w - lr v)

A sum in 1-6-9 swallows terms below 2^-10 of its size; chunks keep both sums short, and the error grows as N / 64 + 64
in place of N. R16 rounds to nearest after every addition, in all three products. Stochastic rounding of
x = 2^e (1 + mu) takes a step of 2^(e - 9), so its error grows with |x|. Quantizers have the gradient of the identity.

The input of the first layer is in FP16 (the 256 intensities of an image don't fit two mantissa bits), and so are the
operands of all three products of the last layer; `ends=False` treats both as the rest. The loss is scaled by 1000, and
gradients are divided by it before anything of the update is rounded. Batch normalisation, activation functions and the
softmax stay in float32. Weights and biases have no float copy: `apply` puts them on the 1-6-9 grid.

With `torch.optim.SGD` the update is the three lines above; a line without its term (decay or momentum 0) rounds
nothing. Any other optimizer, Adam for example, takes its own step in float32; then the weights and the optimizer's
state are rounded stochastically to 1-6-9. Chosen here where the paper is silent: both formats are IEEE-like with
subnormals and saturate, and biases are stored and updated as weights are. `accumulate=False` sums in float32, which is
much faster and shows what the accumulator costs.
"""

from __future__ import annotations

import dataclasses

from ..formats import E5M2, FP16_169
from ..quantizer import QSpec
from ..recipe import Chunked, LossScale, Product, Products, Recipe, Roles, Rule, Update
from ..steps import StoreOnGrid
from . import Card, method

__all__ = ["fp8"]


@method(
    Card(
        name="fp8",
        title="Training Deep Neural Networks with 8-bit Floating Point Numbers",
        year=2018,
        arxiv="1812.08011",
        area="training",
        headline=("naive 1-6-9 accumulation is far off on long sums; chunks of 32 or more follow FP32",),
    )
)
def fp8(chunk: int = 64, accumulate: bool = True, loss_scale: float = 1000.0, ends: bool = True) -> Recipe:
    eight, sixteen = QSpec(E5M2), QSpec(FP16_169)
    stored = QSpec(FP16_169, rounding="stochastic")
    product = Product(accumulator=Chunked(chunk, FP16_169) if accumulate else None)
    inner = Roles(W=eight, A=eight, E=eight, U=stored)
    first = Rule(where="first", roles=dataclasses.replace(inner, A=sixteen))
    last = Rule(where="last", roles=Roles(W=sixteen, A=sixteen, E=sixteen, U=stored))
    return Recipe(
        "fp8",
        inner,
        Products(product, product, product),
        rules=(first, last) if ends else (),
        steps=(StoreOnGrid(),),
        update=Update(axpy=True, states=stored, biases=True),
        loss_scale=LossScale(loss_scale),
    )
