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

__all__ = ["ConvProduct", "ConvTransposeProduct", "LinearProduct", "MatmulProduct", "ProductOps", "Views"]

MM = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Views:
    """An `mm` that takes its operands as views: `function(a, b, row_axes, depth_axes)`, where M is the first `row_axes`
    axes of a, taken as one, and K the first `depth_axes` of b. Patches of a convolution need no copy then."""

    function: Callable[[Tensor, Tensor, int, int], Tensor]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b, 1, 1)


def _mm(mm: MM, a: Tensor, row_axes: int, b: Tensor, depth_axes: int) -> Tensor:
    """`mm` of operands with several axes."""
    if isinstance(mm, Views):
        return mm.function(a, b, row_axes, depth_axes)
    left = a.reshape(_count(a.shape[:row_axes]), _count(a.shape[row_axes:]))
    return mm(left, b.reshape(_count(b.shape[:depth_axes]), _count(b.shape[depth_axes:])))


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
    channels_last: bool = False
    """Whether the weight lies so: autograd copies a gradient of its own that does not lie as the weight does."""

    def out(self, a: Tensor, w: Tensor, mm: MM | None = None) -> Tensor:
        if mm is None:
            return torch.ops.aten.convolution(
                a, w, None, self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups
            )
        nd = len(self.stride)
        patches = self._patches(a)
        weights = w.unflatten(0, (self.groups, -1)).movedim(1, -1)  # (groups, C / groups, kernel, out / groups)
        parts = [_mm(mm, p, 1 + nd, g, 1 + nd) for p, g in zip(patches, weights, strict=True)]
        rows = parts[0] if self.groups == 1 else torch.cat(parts, 1)
        return rows.reshape(*patches.shape[1 : 2 + nd], -1).movedim(-1, 1)

    def grad_a(self, e: Tensor, w: Tensor, mm: MM | None = None) -> Tensor:
        if mm is None:
            return self._backward(e, _like_memory(e, self.a_shape), w, [True, False, False])[0]
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
            return self._backward(e, a, _like_memory(a, self.w_shape), [False, True, False])[1]
        depth = 1 + len(self.stride)  # K runs over (sample, position)
        errors = e.transpose(0, 1).unflatten(0, (self.groups, -1))
        parts = [_mm(mm, r, 1, p, depth) for r, p in zip(errors, self._patches(a), strict=True)]
        return torch.cat(parts).reshape(self.w_shape)

    def _backward(self, e: Tensor, a: Tensor, w: Tensor, wanted: list[bool]) -> Sequence[Tensor]:
        """PyTorch's backward; of an operand that is not multiplied only the shape counts."""
        geometry = (self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups)
        return torch.ops.aten.convolution_backward(e, a, w, None, *geometry, wanted)

    def _patches(self, a: Tensor) -> Tensor:
        """Patches `(groups, N, positions, C / groups, kernel)`, a view of the padded operand."""
        x = F.pad(a, [p for q in reversed(self.padding) for p in (q, q)]) if any(self.padding) else a
        for axis, (k, s, d) in enumerate(zip(self.w_shape[2:], self.stride, self.dilation, strict=True)):
            x = x.unfold(axis + 2, (k - 1) * d + 1, s)[..., ::d]
        nd = len(self.stride)
        x = x.unflatten(1, (self.groups, -1))  # (N, groups, C / groups, positions, kernel)
        return x.permute(1, 0, *range(3, 3 + nd), 2, *range(3 + nd, 3 + 2 * nd))


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


def _like_memory(x: Tensor, shape: torch.Size) -> Tensor:
    """Memory of this shape in the format of `x`, not written to: a stand-in for an operand that is not multiplied.
    PyTorch would copy one of another format."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    plain = x.is_contiguous() or not x.is_contiguous(memory_format=last)
    layout = torch.contiguous_format if plain else last
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _count(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _spread(e: Tensor, stride: tuple[int, ...]) -> Tensor:
    """`e` with `stride - 1` zeros between neighbours."""
    if all(s == 1 for s in stride):
        return e
    out = e.new_zeros(*e.shape[:2], *((n - 1) * s + 1 for n, s in zip(e.shape[2:], stride, strict=True)))
    every = (slice(None), slice(None), *(slice(None, None, s) for s in stride))
    out[every] = e
    return out
