"""The three products of each kind of layer, and nothing else: no quantization in here.

Each class gives `out(a, w)`, `grad_a(e, w)` and `grad_w(e, a)` for one call of a layer. Without an accumulator they are
PyTorch's own operators in float. With one, the product is lowered to matrix products `mm(left (M, K), right (K, N))`
whose K axis is summed in the natural order, so that accumulators see what hardware would sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ConvProduct", "ConvTransposeProduct", "LinearProduct", "MatmulProduct", "ProductOps"]

MM = Callable[[Tensor, Tensor], Tensor]


class ProductOps(Protocol):
    """What a layer contributes: `a_shape` and `w_shape` are the shapes of the two forward operands."""

    @property
    def a_shape(self) -> torch.Size: ...
    @property
    def w_shape(self) -> torch.Size: ...
    def out(self, a: Tensor, w: Tensor, mm: MM | None = None) -> Tensor: ...

    def grad_a(self, e: Tensor, w: Tensor, mm: MM | None = None) -> Tensor: ...

    def grad_w(self, e: Tensor, a: Tensor, mm: MM | None = None) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class LinearProduct:
    """`a (..., in)`, `w (out, in)`, `e (..., out)`; with `transposed` the weight is `(in, out)` as in GPT-2."""

    a_shape: torch.Size
    w_shape: torch.Size
    transposed: bool = False

    def out(self, a: Tensor, w: Tensor, mm: MM | None = None) -> Tensor:
        w = w if self.transposed else w.t()
        if mm is None:
            return a @ w
        return mm(a.reshape(-1, a.shape[-1]), w).reshape(*a.shape[:-1], w.shape[1])

    def grad_a(self, e: Tensor, w: Tensor, mm: MM | None = None) -> Tensor:
        w = w.t() if self.transposed else w
        if mm is None:
            return e @ w
        return mm(e.reshape(-1, e.shape[-1]), w).reshape(self.a_shape)

    def grad_w(self, e: Tensor, a: Tensor, mm: MM | None = None) -> Tensor:
        left, right = e.reshape(-1, e.shape[-1]), a.reshape(-1, a.shape[-1])
        if self.transposed:
            left, right = right, left
        return left.t() @ right if mm is None else mm(left.t(), right)


@dataclasses.dataclass(frozen=True)
class MatmulProduct:
    """`a (..., M, K) @ w (..., K, N)`, batch axes broadcast; both operands are activations."""

    a_shape: torch.Size
    w_shape: torch.Size

    @staticmethod
    def _mm(a: Tensor, b: Tensor, mm: MM | None) -> Tensor:
        if mm is None:
            return a @ b
        if not a.numel() or not b.numel():
            return a @ b
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        flat_a = a.expand(*batch, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
        flat_b = b.expand(*batch, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
        parts = [mm(x, y) for x, y in zip(flat_a, flat_b, strict=True)]
        return torch.stack(parts).reshape(*batch, a.shape[-2], b.shape[-1])

    def out(self, a: Tensor, w: Tensor, mm: MM | None = None) -> Tensor:
        return self._mm(a, w, mm)

    def grad_a(self, e: Tensor, w: Tensor, mm: MM | None = None) -> Tensor:
        return self._mm(e, w.mT, mm).sum_to_size(self.a_shape)

    def grad_w(self, e: Tensor, a: Tensor, mm: MM | None = None) -> Tensor:
        return self._mm(a.mT, e, mm).sum_to_size(self.w_shape)


@dataclasses.dataclass(frozen=True)
class ConvProduct:
    """`a (N, C, ...)`, `w (out, C / groups, ...)`; zero padding, 1 to 3 spatial axes."""

    a_shape: torch.Size
    w_shape: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def out(self, a: Tensor, w: Tensor, mm: MM | None = None) -> Tensor:
        if mm is None:
            return torch.ops.aten.convolution(
                a, w, None, self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups
            )
        cols, spatial = self._columns(a)
        weights = w.reshape(self.groups, w.shape[0] // self.groups, -1)
        parts = [mm(c, g.t()) for c, g in zip(cols, weights, strict=True)]
        return _from_rows(torch.cat(parts, 1), a.shape[0], spatial)

    def grad_a(self, e: Tensor, w: Tensor, mm: MM | None = None) -> Tensor:
        if mm is None:
            return self._backward(e, e.new_empty(1).expand(self.a_shape), w, [True, False, False])[0]
        # a convolution of the spread-out error with the flipped kernel: K runs over (out channels, kernel)
        kernel = self.w_shape[2:]
        pads: list[int] = []
        for size, k, s, p, d, n in zip(
            self.a_shape[2:], kernel, self.stride, self.padding, self.dilation, e.shape[2:], strict=True
        ):
            left = d * (k - 1) - p
            pads = [left, size - ((n - 1) * s + 1) - left + d * (k - 1), *pads]
        spread = F.pad(_spread(e, self.stride), pads)
        flipped = w.flip(list(range(2, w.ndim)))
        out_g, in_g = w.shape[0] // self.groups, w.shape[1]
        flipped = flipped.reshape(self.groups, out_g, in_g, *kernel).transpose(1, 2)
        flipped = flipped.reshape(self.groups * in_g, out_g, *kernel)
        ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
        plain = ConvProduct(spread.shape, flipped.shape, ones, zeros, self.dilation, self.groups)
        return plain.out(spread, flipped, mm)

    def grad_w(self, e: Tensor, a: Tensor, mm: MM | None = None) -> Tensor:
        if mm is None:
            return self._backward(e, a, e.new_empty(1).expand(self.w_shape), [False, True, False])[1]
        cols, _ = self._columns(a)  # K runs over (sample, position)
        rows = e.transpose(0, 1).reshape(self.groups, e.shape[1] // self.groups, -1)
        return torch.cat([mm(r, c) for r, c in zip(rows, cols, strict=True)]).reshape(self.w_shape)

    def _backward(self, e: Tensor, a: Tensor, w: Tensor, wanted: list[bool]) -> Sequence[Tensor]:
        """PyTorch's backward; of an operand that is not multiplied only the shape counts."""
        geometry = (self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups)
        return torch.ops.aten.convolution_backward(e, a, w, None, *geometry, wanted)

    def _columns(self, a: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Patches `(groups, N * positions, C / groups * kernel)` and the output's spatial shape."""
        pads = [p for q in reversed(self.padding) for p in (q, q)]
        x = F.pad(a, pads)
        for axis, (k, s, d) in enumerate(zip(self.w_shape[2:], self.stride, self.dilation, strict=True)):
            x = x.unfold(axis + 2, (k - 1) * d + 1, s)[..., ::d]
        n, c, nd = a.shape[0], a.shape[1], len(self.stride)
        spatial = tuple(x.shape[2 : 2 + nd])
        x = x.reshape(n, self.groups, c // self.groups, *x.shape[2:])
        x = x.permute(1, 0, *range(3, 3 + nd), 2, *range(3 + nd, 3 + 2 * nd))
        return x.reshape(self.groups, n * _count(spatial), -1), spatial


@dataclasses.dataclass(frozen=True)
class ConvTransposeProduct:
    """`a (N, C, ...)`, `w (C, out / groups, ...)`. A transposed convolution is the `grad_a` of a convolution whose
    output is `a`, so its three products are those of that convolution with the operands exchanged."""

    a_shape: torch.Size
    w_shape: torch.Size
    out_shape: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def mirror(self) -> ConvProduct:
        return ConvProduct(self.out_shape, self.w_shape, self.stride, self.padding, self.dilation, self.groups)

    def out(self, a: Tensor, w: Tensor, mm: MM | None = None) -> Tensor:
        return self.mirror.grad_a(self.fit(a), w, mm)

    def grad_a(self, e: Tensor, w: Tensor, mm: MM | None = None) -> Tensor:
        inside = (slice(None), slice(None), *(slice(n) for n in self.a_shape[2:]))
        return self.mirror.out(e, w, mm)[inside]

    def grad_w(self, e: Tensor, a: Tensor, mm: MM | None = None) -> Tensor:
        return self.mirror.grad_w(self.fit(a), e, mm)

    def fit(self, a: Tensor) -> Tensor:
        """`a` padded with zeros to what the mirrored convolution gives, which an output padding as large as the stride
        makes longer."""
        more = [
            (o + 2 * p - d * (k - 1) - 1) // s + 1 - n
            for o, k, s, p, d, n in zip(
                self.out_shape[2:],
                self.w_shape[2:],
                self.stride,
                self.padding,
                self.dilation,
                self.a_shape[2:],
                strict=True,
            )
        ]
        return F.pad(a, [p for m in reversed(more) for p in (0, m)]) if any(more) else a


def _count(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _from_rows(rows: Tensor, n: int, spatial: tuple[int, ...]) -> Tensor:
    return rows.reshape(n, *spatial, rows.shape[-1]).movedim(-1, 1)


def _spread(e: Tensor, stride: tuple[int, ...]) -> Tensor:
    """`e` with `stride - 1` zeros between neighbours."""
    if all(s == 1 for s in stride):
        return e
    out = e.new_zeros(*e.shape[:2], *((n - 1) * s + 1 for n, s in zip(e.shape[2:], stride, strict=True)))
    every = (slice(None), slice(None), *(slice(None, None, s) for s in stride))
    out[every] = e
    return out
