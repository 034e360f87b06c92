"""Ternary weight networks (Li, Zhang, Liu, 2016, arXiv 1605.04711).

    delta = 0.7 * mean|w|              alpha = mean of |w| over |w| > delta
    forward   q = alpha * sign(w) where |w| > delta, else 0
    backward  dL/dw = dL/dq

The threshold is strict. One alpha and delta for each layer, as the original release; `blocks=PerAxis(0)`
gives one for each filter, as the later release does. First and last layer are ternary too. The latent weights
are not clipped.

`exact=True` solves the problem that 0.7 approximates: the k largest magnitudes are kept, with the k that
maximizes (their sum)^2 / k and so has the least squared error (sorting, O(n log n)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backward import Coded, PassThrough
from ..blocks import Blocks, PerTensor
from ..formats import TERNARY
from ..quantizer import QSpec, Quantizer
from ..recipe import Recipe, Roles
from . import Card, method

__all__ = ["twn"]


class Twn(Quantizer, kind="twn"):
    """`params["threshold"]`: delta as a multiple of mean|w|; None finds the best one."""

    def codes_and_scale(self, x: Tensor, u: Tensor | None) -> Coded:
        a, threshold = x.abs(), self.spec.params["threshold"]
        keep = a >= _smallest_kept(a) if threshold is None else a > threshold * a.mean(-1, keepdim=True)
        count = keep.sum(-1, keepdim=True)
        alpha = (a * keep).sum(-1, keepdim=True) / count.clamp_min(1)
        # an empty support is a block of zeros; NaN must not become a zero
        grid = torch.where(x.isnan(), x, x.sign() * keep)
        return Coded(grid, alpha.masked_fill(alpha == 0, 1), self.spec.format)


def _smallest_kept(a: Tensor) -> Tensor:
    """Of magnitudes `(blocks, n)`, the last of the k largest for the k with the largest (sum)^2 / k."""
    ordered = a.sort(-1, descending=True).values
    unit = ordered.double() / ordered[:, :1].double().clamp_min(1e-300)  # squares neither vanish nor overflow
    k = torch.arange(1, a.shape[-1] + 1, dtype=torch.float64, device=a.device)
    return ordered.gather(-1, (unit.cumsum(-1).square() / k).argmax(-1, keepdim=True))


@method(
    Card(
        name="twn",
        title="Ternary Weight Networks",
        year=2016,
        arxiv="1605.04711",
        area="weights",
        headline=(
            "CIFAR-10, VGG-7: 92.56 % ternary, 92.88 % float, 90.18 % binary",
            "ImageNet, ResNet-18: 61.8 % ternary, 65.4 % float, 57.5 % binary",
        ),
    )
)
def twn(threshold: float = 0.7, blocks: Blocks = PerTensor(), exact: bool = False) -> Recipe:  # noqa: B008
    if not threshold >= 0:
        raise ValueError(f"the threshold is a multiple of mean|w| and not negative; got {threshold}")
    params = {"threshold": None if exact else threshold}
    weight = QSpec(TERNARY, blocks, kind="twn", backward=PassThrough(), params=params)
    return Recipe("twn", Roles(W=weight))
