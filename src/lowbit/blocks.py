"""Blocks: which elements of a tensor share a scale.

A block specification turns a tensor into a matrix `(blocks, n)`, one block a row, and back. Which axis is a *row* or a
*channel* of an operand is not a property of the block but of the product the operand enters; the layer says so with
a `Layout`. A scale may be pulled out of a product only if it is constant along the axis the product sums over:

| product  | sums over          | legal for the left operand | legal for the right operand |
|----------|--------------------|----------------------------|-----------------------------|
| `out`    | input features     | A per row                  | W per row (output channel)  |
| `grad_a` | output features    | E per row                  | W per channel (input)       |
| `grad_w` | samples and pixels | E per channel              | A per channel               |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.cast import block_absmax, block_minmax
from .ops.magnitudes import magnitudes
from .serial import spec

__all__ = [
    "Blocked",
    "Blocks",
    "Layout",
    "PerAxis",
    "PerChannel",
    "PerGroup",
    "PerRow",
    "PerSample",
    "PerTensor",
    "PerTile",
]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the rows and the channels of an operand are. `keep`: the axes named vary from block to block, all others
    lie inside a block; `reduce`: the axes named lie inside a block, all others vary."""

    row: tuple[Literal["keep", "reduce"], tuple[int, ...]] = ("keep", (0,))
    channel: tuple[Literal["keep", "reduce"], tuple[int, ...]] = ("keep", (1,))
    contract: int | tuple[Literal["keep", "reduce"], tuple[int, ...]] = -1
    """The axis the product sums over; groups of a `PerGroup` lie along it. A product that sums over several axes takes
    them as one, flattened: ("reduce", axes) names the others."""


LINEAR_INPUT = Layout(("reduce", (-1,)), ("keep", (-1,)), -1)  # (..., features): a row is one token
LINEAR_WEIGHT = Layout(("keep", (0,)), ("keep", (1,)), -1)  # (out, in)
LINEAR_WEIGHT_T = Layout(("keep", (1,)), ("keep", (0,)), 0)  # (in, out), as GPT-2 stores it
CONV_INPUT = Layout(("keep", (0,)), ("keep", (1,)), 1)  # (N, C, ...): a row is one sample
CONV_WEIGHT = Layout(("keep", (0,)), ("keep", (1,)), 1)  # (out, in / groups, ...)
CONV_TRANSPOSE_WEIGHT = Layout(("keep", (1,)), ("keep", (0,)), 0)  # (in, out / groups, ...)
SAMPLES: tuple[Literal["reduce"], tuple[int, ...]] = ("reduce", (-1,))  # linear: grad_w sums over all tokens
PIXELS: tuple[Literal["reduce"], tuple[int, ...]] = ("reduce", (1,))  # convolution: over samples and pixels
MATMUL_LEFT = Layout(("reduce", (-1,)), ("reduce", (-2,)), -1)  # (..., M, K)
MATMUL_RIGHT = Layout(("reduce", (-2,)), ("reduce", (-1,)), -2)  # (..., K, N)


def _kept(axes: tuple[str, tuple[int, ...]], ndim: int) -> list[int]:
    mode, named = axes
    for axis in named:
        if not -ndim <= axis < ndim:
            raise ValueError(f"block axis {axis} does not exist in a tensor of {ndim} dimensions")
    chosen = {axis % ndim for axis in named}
    return sorted(chosen if mode == "keep" else set(range(ndim)) - chosen)


def _view(x: Tensor, kept: list[int]) -> Tensor:
    order = kept + [d for d in range(x.ndim) if d not in kept]
    count = math.prod([x.shape[d] for d in kept])  # a list: torch.compile breaks its graph at a generator
    if order != list(range(x.ndim)):
        x = x.permute(order)
    return x.reshape(count, math.prod(x.shape[len(kept) :]))


def _strides(shape: Sequence[int], kept: Sequence[int]) -> list[int]:
    """What one step along each axis adds to the number of the block; blocks are numbered row by row."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(kept):
        strides[axis] = step
        step *= shape[axis]
    return strides


def _unview(b: Tensor, shape: torch.Size, kept: list[int]) -> Tensor:
    order = kept + [d for d in range(len(shape)) if d not in kept]
    if order == list(range(len(shape))):
        return b.reshape(shape)
    inverse = [order.index(d) for d in range(len(shape))]
    return b.reshape([shape[d] for d in order]).permute(inverse)


class Blocks:
    """Base of the block specifications. `view(x, layout)` is `(blocks, n)`; `unview(b, shape, layout)` goes back."""

    def kept(self, ndim: int, layout: Layout) -> list[int]:
        """Axes that vary from block to block."""
        raise TypeError(f"{type(self).__name__} does not split along whole axes")

    def view(self, x: Tensor, layout: Layout) -> Tensor:
        return _view(x, self.kept(x.ndim, layout))

    def unview(self, b: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
        return _unview(b, shape, self.kept(len(shape), layout))

    def strides(self, x: Tensor, layout: Layout) -> tuple[Tensor, list[int]] | None:
        """A view of `x`, elements in the same order, and one number an axis of it: the block of element (i, j, ...) is
        the sum of i, j, ... times these. None where padding is needed."""
        return x, _strides(x.shape, self.kept(x.ndim, layout))


@spec
class PerTensor(Blocks):
    """One scale for the whole tensor."""

    def kept(self, ndim: int, layout: Layout) -> list[int]:
        return []


@spec
class PerAxis(Blocks):
    """One scale for each index of `axis`, whatever the product."""

    axis: int = 0

    def kept(self, ndim: int, layout: Layout) -> list[int]:
        return _kept(("keep", (self.axis,)), ndim)


@spec
class PerSample(Blocks):
    """One scale for each index of the first axis, whatever the product; a vector is one sample."""

    def kept(self, ndim: int, layout: Layout) -> list[int]:
        return [0] if ndim > 1 else []


@spec
class PerRow(Blocks):
    """One scale a row of the product: a token (linear), a sample (convolution), an output channel (weights)."""

    def kept(self, ndim: int, layout: Layout) -> list[int]:
        return _kept(layout.row, ndim)


@spec
class PerChannel(Blocks):
    """One scale a feature or channel: an input channel of W and A, an output channel of E."""

    def kept(self, ndim: int, layout: Layout) -> list[int]:
        return _kept(layout.channel, ndim)


@spec
class PerGroup(Blocks):
    """One scale for every `size` consecutive elements along `axis` (None: what the product sums over). A last group
    that is not full is padded with zeros inside `view`; the padding never leaves."""

    size: int = 32
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"PerGroup needs a size of at least 1; got {self.size}")

    def _order(self, ndim: int, layout: Layout) -> tuple[list[int], int]:
        """All axes, those that groups lie along last, and how many come before them."""
        axis = layout.contract if self.axis is None else self.axis
        along = _kept(("keep", (axis,)) if isinstance(axis, int) else axis, ndim)
        rest = [d for d in range(ndim) if d not in along]
        return rest + along, len(rest)

    def view(self, x: Tensor, layout: Layout) -> Tensor:
        order, rest = self._order(x.ndim, layout)
        x = x.permute(order)
        x = x.reshape(*x.shape[:rest], math.prod(x.shape[rest:]))
        return F.pad(x, (0, -x.shape[-1] % self.size)).reshape(-1, self.size)

    def unview(self, b: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
        order, rest = self._order(len(shape), layout)
        moved = [shape[d] for d in order]
        n = math.prod(moved[rest:])
        b = b.reshape(*moved[:rest], n + -n % self.size)[..., :n].reshape(moved)
        return b.permute([order.index(d) for d in range(len(shape))])

    def strides(self, x: Tensor, layout: Layout) -> tuple[Tensor, list[int]] | None:
        order, rest = self._order(x.ndim, layout)
        last = order[-1]
        if not x.ndim or x.shape[last] % self.size:
            return None
        counts = [n // self.size if d == last else n for d, n in enumerate(x.shape)]
        inside: list[int] = _strides([counts[d] for d in order], range(len(order)))
        strides = [inside[order.index(d)] for d in range(x.ndim)]
        return x.unflatten(last, (-1, self.size)), [*strides[: last + 1], 0, *strides[last + 1 :]]


@spec
class PerTile(Blocks):
    """One scale for every tile of `rows` by `cols` elements of the tensor seen as a matrix (first axis by the rest).
    Tiles at the edge are padded with zeros inside `view`."""

    rows: int = 16
    cols: int = 16

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"PerTile needs at least 1 row and 1 column; got {self.rows} x {self.cols}")

    def _sizes(self, shape: torch.Size) -> tuple[int, int, int, int]:
        m = shape[0] if shape else 1
        n = math.prod(shape[1:])
        return m, n, m + -m % self.rows, n + -n % self.cols

    def view(self, x: Tensor, layout: Layout) -> Tensor:
        m, n, pm, pn = self._sizes(x.shape)
        x = F.pad(x.reshape(m, n), (0, pn - n, 0, pm - m))
        x = x.reshape(pm // self.rows, self.rows, pn // self.cols, self.cols).transpose(1, 2)
        return x.reshape(-1, self.rows * self.cols)

    def unview(self, b: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
        m, n, pm, pn = self._sizes(shape)
        b = b.reshape(pm // self.rows, pn // self.cols, self.rows, self.cols).transpose(1, 2)
        return b.reshape(pm, pn)[:m, :n].reshape(shape)

    def strides(self, x: Tensor, layout: Layout) -> tuple[Tensor, list[int]] | None:
        if x.ndim != 2 or x.shape[0] % self.rows or x.shape[1] % self.cols:
            return None
        tiles = x.shape[1] // self.cols
        return x.unflatten(1, (-1, self.cols)).unflatten(0, (-1, self.rows)), [tiles, 0, 1, 0]


def _flat(x: Tensor) -> Tensor:
    """The elements in the order of memory, without a copy where they are dense."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).reshape(-1)


class Blocked:
    """A tensor in blocks: `matrix` is `(blocks, n)`, one block a row; the statistics that scales are made of come
    without a copy, whatever the order of the elements in memory. `x` is detached."""

    def __init__(self, x: Tensor, blocks: Blocks | None = None, layout: Layout | None = None) -> None:
        """A plain matrix, or any tensor with `blocks` and `layout`; not empty."""
        self.x, self.blocks, self.layout = x.detach(), blocks, layout or Layout()
        self._matrix: Tensor | None = None
        self._ends: tuple[Tensor, Tensor] | None = None
        self._absmax: Tensor | None = None
        found = (self.x, [1, 0]) if blocks is None else blocks.strides(self.x, self.layout)
        self.strides: list[int] | None = None if found is None else found[1]
        """See `Blocks.strides`; they belong to `view`."""
        self.view = self.x if found is None else found[0]

    @property
    def matrix(self) -> Tensor:
        if self._matrix is None:
            self._matrix = self.x if self.blocks is None else self.blocks.view(self.x, self.layout)
        return self._matrix

    @property
    def count(self) -> int:
        """How many blocks."""
        if self.strides is None:
            return self.matrix.shape[0]
        return 1 + sum((n - 1) * s for n, s in zip(self.view.shape, self.strides, strict=True))

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def absmax(self) -> Tensor:
        """max|x| of each block, `(blocks, 1)`; NaN where the block holds one."""
        if self._absmax is None:
            if self.strides is None or self.x.dtype != torch.float32:
                self._absmax = self.matrix.abs().amax(-1, keepdim=True)
            else:
                self._absmax = block_absmax(self.view, self.strides, self.count).unsqueeze(1)
        return self._absmax

    def magnitudes(self) -> Tensor:
        """max|x|, mean |x| and mean x^2 of each block, float64 `(blocks, 3)`. Of float32 only."""
        x = self.matrix if self.count != 1 else _flat(self.x)[None]
        return magnitudes(x.contiguous()) / x.new_tensor([1, x.shape[1], x.shape[1]], dtype=torch.float64)

    def minmax(self) -> tuple[Tensor, Tensor]:
        """Least and largest element of each block, `(blocks, 1)`; NaN where the block holds one."""
        if self._ends is None:
            if self.strides is None or self.x.dtype != torch.float32:
                self._ends = self.matrix.amin(-1, keepdim=True), self.matrix.amax(-1, keepdim=True)
            else:
                low, high = block_minmax(self.view, self.strides, self.count)
                self._ends = low.unsqueeze(1), high.unsqueeze(1)
        return self._ends

    def negative(self) -> Tensor:
        """Whether a block has a negative element, bool `(blocks, 1)`."""
        low, _ = self.minmax()
        if torch.compiler.is_compiling() or bool(low.isnan().any()):  # NaN hides what else is there
            return (self.matrix < 0).any(-1, keepdim=True)
        return low < 0


def blocked(x: Tensor | Blocked) -> Blocked:
    """`x` itself, or the blocks that are a matrix's rows."""
    return x if isinstance(x, Blocked) else Blocked(x)
