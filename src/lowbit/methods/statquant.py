"""Statistical framework for low-bitwidth training: PTQ, PSQ and BHQ gradients (Chen et al., 2020, arXiv 2010.14298).

The quantized gradient is a random estimator of the gradient of quantization-aware training: unbiased with any unbiased
quantizer of E, and its variance grows with that quantizer's. `ptq_sgd`, `psq` and `bhq` differ in it alone. E is seen
as a matrix X (N, D), a row being a sample. B = 2^b - 1, SR is stochastic rounding to 0 ... B, and nothing is clipped:

    PTQ   one range: low = min(min X - eps, 0), high = max(max X + eps, 0), zero code z = floor(-low B / (high - low))
          step = -low / z, which widens the range                      Q(X) = step (SR(X / step + z) - z)
    PSQ   a range for each row: low_i = min X_i - eps, step_i = (max X_i + eps - low_i) / B
          Q(X)_i = step_i SR((X_i - low_i) / step_i) + low_i
    BHQ   Q(X) = S^-1 PSQ(S X), where S mixes rows of large range with rows of small range

BHQ sorts rows by range, r_i = max X_i - min X_i + eps, r_0 >= r_1 >= .... The G = N - Z largest lead a group each; Z is
the least count with Z r_(G-1) > r_0 + ... + r_(G-1). The Z others, in that order, go to the leaders in proportion to r:
group i takes those up to number round(Z (r_0 + ... + r_i) / (r_0 + ... + r_(G-1))), halves up. For a group of n rows,
the leader's range lambda_1 and the next largest lambda_2,

    S = H diag(s_1, s_2, ..., s_2)      H = 1 - 2 v v^T / |v|^2,   v = 1 / sqrt(n) - e_1,   h = max |H_ij|
    w_1 = lambda_1 / sqrt(n),   w_2 = lambda_2 h,   s_1 = w_1^(-1/3),   s_2 = (w_2 / (n - 1))^(-1/3)

and both times sqrt(s_1^-2 + s_2^-2). H spreads the leader over n rows whose roundings are independent. A group of one
is left as it is, and two rows are one group (the rule above needs three).

    A                       8 bits, per tensor, nearest
    W                       8 bits, per tensor, nearest, zero is a code
    E, for the input        b bits, as above
    E, for the weights      8 bits always: PTQ, or with PSQ and BHQ a range for each feature over the batch

The two uses of E are independent draws. Gradients pass the quantizers of W and A unchanged. First and last layer are
quantized too. The headline is BHQ with 5 bits, the default of `bhq` and, to compare, of `psq`; `ptq_sgd` has 8, the
INT8 training it is measured against.

Where no element is as low as one step below zero, the released PTQ divides by z = 0. Here z is then 1 if an element is
negative and 0 if none is, and step = high / (B - z). `epsilon` is absolute, as released: gradients not far above it
drown in its noise, so lower it or scale the loss where they are that small. The released code also rounds the biases of
linear layers to 16 bits; here biases stay float.

S is never formed: H reflects the rows of a group (`ops.reflect`), one pass over X for any N, where products with S and
S^-1 take N^2 D steps each. v, s and the group of each row are stored with the codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..backward import Coded
from ..blocks import Blocked, Blocks, Layout, PerSample, PerTensor
from ..formats import Int
from ..ops.affine import affine
from ..ops.cast import cast, cast_arguments
from ..ops.reflect import reflect, reflect_cast, reflect_minmax
from ..quantizer import QSpec, Quantizer, Scaling
from ..recipe import Product, Products, Recipe, Roles
from ..scales import MinMax
from ..serial import spec
from . import Card, method

__all__ = ["PerFeature", "bhq", "bhq_groups", "psq", "ptq_sgd"]

TITLE = "A Statistical Framework for Low-bitwidth Training of Deep Neural Networks"
HEADLINE = ("ImageNet, ResNet-50: BHQ gradients of 5 bits lose 0.5 % against 8-bit quantization-aware training",)


@spec
class PerFeature(Blocks):
    """One scale for each feature of a sample: each place in all axes but the first."""

    def kept(self, ndim: int, layout: Layout) -> list[int]:
        return list(range(1, ndim)) if ndim > 1 else [0]


class Ptq(Quantizer, kind="ptq"):
    """Affine, with a code for zero and a range that holds every element. `params["epsilon"]`: eps."""

    symmetric = False

    def scaling(self, x: Blocked) -> Scaling:
        eps, top = self.spec.params["epsilon"], self.spec.format.max
        least, most = x.minmax()
        low, high = (least - eps).clamp(max=0), (most + eps).clamp(min=0)
        zero = (-low * (top / (high - low))).floor()
        zero = torch.maximum(zero, x.negative().to(x.dtype))  # a negative element needs a code
        step = torch.maximum(-low / zero.clamp(min=1) * (zero > 0), high / (top - zero).clamp(min=1))
        return Scaling(step, self.spec.format, zero)


class Psq(Quantizer, kind="psq"):
    """Affine from each block's least to its largest element, without a code for zero. `params["epsilon"]`: eps."""

    symmetric = False

    def scaling(self, x: Blocked) -> Scaling:
        return self.between(*x.minmax())

    def between(self, least: Tensor, most: Tensor) -> Scaling:
        """From the least and the largest element of each block, `(blocks, 1)`."""
        eps, fmt = self.spec.params["epsilon"], self.spec.format
        low = least - eps
        step, _ = affine(low, most + eps, fmt.max, False)
        return Scaling(step, fmt, offset=low)


class Bhq(Psq, kind="bhq"):
    """As `Psq`, of S x instead of x. `params["epsilon"]`: eps."""

    def codes_and_scale(self, x: Tensor, u: Tensor | None) -> Coded:
        mix = self._mix(Blocked(x))
        coded = super().codes_and_scale(_mixed(x, mix), u)
        return dataclasses.replace(coded, extra={**coded.extra, **mix})

    @staticmethod
    def restore(coded: Coded) -> Tensor:
        return _unmixed(Quantizer.restore(coded), coded.extra)

    def _fused(self, x: Tensor, key: Tensor | None, u: Tensor | None) -> tuple[Coded, Tensor] | None:
        mode = self.mode(key is not None)
        arguments = cast_arguments(self.spec.format, mode)
        rows = x.dim() > 1 and x.dtype == torch.float32 and self.spec.blocks == PerSample()
        if u is not None or arguments is None or not rows:
            return None
        mix = self._mix(Blocked(x, self.spec.blocks))
        mirror = _mirror(mix)
        s = self.between(*(end[:, None] for end in reflect_minmax(x, *mirror)))
        assert s.offset is not None
        scale, offset = s.scale.flatten(), s.offset.flatten()

        def grid() -> Tensor:
            strides = [1] + [0] * (x.dim() - 1)
            return cast(_mixed(x, mix), scale, None, key, None, strides, *arguments, mode, "grid", offset).flatten(1)

        q = reflect_cast(x, *mirror, scale, offset, key, *arguments, mode)
        return Coded(grid, s.scale, s.format, extra={"offset": s.offset, **mix}), q

    def _mix(self, x: Blocked) -> dict[str, Tensor]:
        least, most = x.minmax()
        group, v, s = bhq_groups((most - least + self.spec.params["epsilon"]).flatten())
        return {"group": group[:, None], "v": v[:, None].to(x.dtype), "s": s[:, None].to(x.dtype)}


def _mirror(mix: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Group, v and s of each row for `ops.reflect`."""
    return mix["group"].flatten(), mix["v"].flatten(), mix["s"].flatten()


def _mixed(x: Tensor, mix: Mapping[str, Tensor]) -> Tensor:
    """S x."""
    group, v, s = _mirror(mix)
    return reflect(x, group, v, before=s)


def _unmixed(x: Tensor, mix: Mapping[str, Tensor]) -> Tensor:
    """S^-1 x."""
    group, v, s = _mirror(mix)
    return reflect(x, group, v, after=1 / s)


def bhq_groups(ranges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """BHQ's groups of rows. Some fifty steps on few numbers: NumPy takes a fraction of PyTorch's time for them, and on
    every device they come out alike.

    Args:
        ranges: range of each row, positive, shape (N,).

    Returns:
        Of each row: its group (int64; group i is led by the i-th largest row), its element of v, and its s (float64).
    """
    given = ranges.detach().double().cpu().numpy()
    with np.errstate(all="ignore"):  # what is not finite shows in the result
        group, v, s = (torch.from_numpy(t).to(ranges.device) for t in _bhq_groups(given))
    return group, v, s


def _bhq_groups(given: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    order = np.argsort(np.where(np.isnan(given), -np.inf, -given), kind="stable")
    r, place, count = given[order], np.arange(len(given)), len(given)
    total = r.cumsum()
    lead = max(1, int(np.count_nonzero((count - 1 - place) * r > total)))  # the left side falls, the right one grows
    others, leader = count - lead, place < lead
    ends = np.floor(others * total[:lead] / total[lead - 1] + 0.5).astype(np.int64)  # of each group, among the others
    group = np.minimum(np.searchsorted(ends, place - lead, side="right"), lead - 1)
    group[:lead] = place[:lead]

    n = np.bincount(group, minlength=lead).astype(np.float64)
    root = np.sqrt(n)
    begins = np.zeros_like(ends)
    begins[1:] = ends[:-1]
    second = r[np.clip(begins + lead, 0, count - 1)]  # a group's largest row after its leader
    off = 1 / (n - root)  # beside first row and column, H is 1 - off on the diagonal and -off elsewhere
    h = np.maximum(np.maximum(1 / root, np.abs(1 - off)), np.where(n > 2, off, 0))
    s1, s2 = 1 / np.cbrt(r[:lead] / root), 1 / np.cbrt(second * h / (n - 1))
    both = np.sqrt(s1**-2 + s2**-2)

    alone = (n == 1)[group]
    v = np.where(alone, 0, (1 / root)[group] - leader)
    s = np.where(alone, 1, np.where(leader, (s1 * both)[group], (s2 * both)[group]))
    found = np.empty_like(group), np.empty_like(v), np.empty_like(s)
    for into, values in zip(found, (group, v, s), strict=True):
        into[order] = values
    return found


def _recipe(name: str, bits: int, epsilon: float, blocks: Blocks, kind: str, wgrad: Blocks, wgrad_kind: str) -> Recipe:
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits of the gradient are 2 to 8; got {bits!r}")
    if not epsilon > 0:
        raise ValueError(f"epsilon keeps ranges positive and must be so too; got {epsilon}")

    def error(width: int, blocks: Blocks, kind: str) -> QSpec:
        grid = Int(width, signed=False)
        return QSpec(grid, blocks, rounding="stochastic", kind=kind, params={"epsilon": epsilon})

    byte = Int(8, signed=False)
    roles = Roles(
        W=QSpec(byte, scale=MinMax(byte.max, "code")),
        A=QSpec(byte, scale=MinMax(byte.max, "real")),
        E=error(bits, blocks, kind),
    )
    return Recipe(name, roles, Products(grad_w=Product(left=error(8, wgrad, wgrad_kind))))


@method(Card("ptq_sgd", f"{TITLE} (PTQ)", 2020, "2010.14298", "training"))
def ptq_sgd(bits: int = 8, epsilon: float = 1e-8) -> Recipe:
    return _recipe("ptq_sgd", bits, epsilon, PerTensor(), "ptq", PerTensor(), "ptq")


@method(Card("psq", f"{TITLE} (PSQ)", 2020, "2010.14298", "training"))
def psq(bits: int = 5, epsilon: float = 1e-8) -> Recipe:
    return _recipe("psq", bits, epsilon, PerSample(), "psq", PerFeature(), "psq")


@method(Card("bhq", f"{TITLE} (BHQ)", 2020, "2010.14298", "training", HEADLINE))
def bhq(bits: int = 5, epsilon: float = 1e-8) -> Recipe:
    return _recipe("bhq", bits, epsilon, PerSample(), "bhq", PerFeature(), "psq")
