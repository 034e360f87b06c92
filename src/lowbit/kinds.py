"""Kinds of quantizer that more than one method uses. A kind of a single paper stands in its method's file."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Blocked
from .formats import Even
from .quantizer import Quantizer

__all__ = ["Pact", "TanhMax"]


class TanhMax(Quantizer, kind="tanh_max"):
    """DoReFa-Net's weights (Zhou et al. 2016, arXiv 1606.06160, eq. 9), for `Even(k)`, k >= 2, n = 2^k - 1:

        w -> tanh(w) / max|tanh(w)|  in [-1, 1],  then the nearest of the odd multiples of 1/n

    which is 2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1. The gradient passes through tanh and through
    the maximum: the weight that holds it gets a term from all others. The scale is 1/n; `QSpec.scale` is not
    used.
    """

    def prepare(self, x: Tensor) -> Tensor:
        blocks = self.spec.blocks
        t = blocks.view(x.tanh(), self.layout)
        peak = t.abs().amax(-1, keepdim=True)
        # only a block of zeros has no maximum; it stays as it is
        return blocks.unview(t / peak.masked_fill(peak == 0, 1), x.shape, self.layout)

    def scale_for(self, x: Blocked) -> tuple[Tensor, Tensor | None]:
        fmt = self.spec.format
        if not isinstance(fmt, Even) or fmt.bits < 2:
            raise ValueError(f"{self.name or self.spec.kind}: tanh_max needs Even(2) or more bits; got {fmt}")
        return torch.full((x.count, 1), 1 / fmt.max, dtype=x.dtype, device=x.x.device), None


class Pact(Quantizer, kind="pact"):
    """PACT's activations (Choi et al. 2018, arXiv 1805.06085): a `Learned` clip with the `LearnedClip` gradient,
    whose penalty is decay / 2 * clip^2. `params["decay"]`: lambda of the paper's section 3."""

    def penalty(self) -> Tensor | None:
        # before the first batch there is no clip yet
        return self.spec.params["decay"] / 2 * self.learned.square().sum() if bool(self.seen) else None
