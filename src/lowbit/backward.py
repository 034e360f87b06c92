"""Gradient rules of quantizers: what autograd does where rounding has no derivative.

The four families of the literature, each an explicit choice:

| rule                     | dq/dx                                                            | used by            |
|--------------------------|------------------------------------------------------------------|--------------------|
| `PassThrough()`          | 1                                                                | TWN, DoReFa, LUQ   |
| `InRange()`              | 1 where x lies inside the grid's range (clip, then round)        | SAWB, DoReFa, BNN  |
| `InRange(margin=0.5)`    | 1 where the *rounded* code does (round, then clip)               | `fake_quantize_*`  |
| `LearnedStep()`          | as `InRange(closed=False)`, and a gradient for the step          | LSQ                |
| `LearnedClip()`          | 1 on [0, clip), and a gradient for the clip                      | PACT               |

Each rule connects the blocks `x (blocks, n)` with their quantized values `q` in the graph; no rule ever
differentiates through the rounding or through a scale that comes from statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .formats import Format, Int
from .ops.rules import LARGEST, clip_backward, in_range_backward, step_backward
from .serial import spec

__all__ = ["Backward", "Coded", "InRange", "LearnedClip", "LearnedStep", "PassThrough", "in_range", "straight_through"]


@dataclasses.dataclass(frozen=True)
class Coded:
    """A tensor in blocks, on the grid: real = scale * (grid - zero)."""

    source: Tensor | Callable[[], Tensor]
    """Grid values `(blocks, n)`, floating point, or what makes them: a fused cast leaves real values only."""
    scale: Tensor
    """Step `(blocks, 1)`, or any shape that broadcasts against the grid."""
    format: Format
    zero: Tensor | None = None
    """Zero point like `scale`; None is 0."""
    extra: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """What else decoding needs, by name."""
    divisor: Tensor | None = None
    """What the tensor was divided by for good, where the method drops a scale: scale * grid is near x / divisor."""

    @property
    def grid(self) -> Tensor:
        """Grid values `(blocks, n)`, floating point."""
        return self.source() if callable(self.source) else self.source


def as_output(x: Tensor) -> Tensor:
    """An input of an autograd function as its output. torch.compile takes a view of an input for the input itself and
    forgets the function's gradient, so it gets a copy, which it fuses away."""
    return x.clone() if torch.compiler.is_compiling() else x.view_as(x)


class _StraightThrough(torch.autograd.Function):
    """Forward `q`, backward the gradient to `x` as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor) -> Tensor:
        return as_output(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _InRange(torch.autograd.Function):
    """Forward `q`, backward `grad` where x lies within bounds, numbers or tensors that broadcast against x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, low: Tensor | float, high: Tensor | float, closed: bool) -> Tensor:
        ctx.save_for_backward(x, *(bound for bound in (low, high) if isinstance(bound, Tensor)))
        ctx.bounds = low if isinstance(low, float) else None, high if isinstance(high, float) else None
        ctx.closed = closed
        return as_output(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, *tensors = ctx.saved_tensors
        (grad,) = grads
        low, high = (tensors.pop(0) if bound is None else bound for bound in ctx.bounds)
        if _fused(grad, x):
            low, high = (b if isinstance(b, Tensor) else torch.tensor(b, device=x.device) for b in (low, high))
            (g, m), back = _matrices(max(low.numel(), high.numel()), grad, x)
            low, high = (b.to(x.dtype).reshape(-1).expand(len(m)).contiguous() for b in (low, high))
            grad_x = back(in_range_backward(g, m, low, high, ctx.closed))
        else:
            grad_x = ((x >= low) & (x <= high) if ctx.closed else (x > low) & (x < high)) * grad
        return grad_x, None, None, None, None


class _Step(torch.autograd.Function):
    """LSQ: `q = step * round(clip(x / step))`, with the step's gradient of the paper times `gain`. `grid` is None where
    the integers can be had from `q`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        q: Tensor,
        grid: Tensor | None,
        step: Tensor,
        learned: Tensor,
        low: float,
        high: float,
        gain: float,
    ) -> Tensor:
        ctx.save_for_backward(x, q if grid is None else grid, step)
        ctx.bounds = low, high, gain
        ctx.integers = grid is None
        ctx.shape = learned.shape
        return as_output(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, grid, step = ctx.saved_tensors
        low, high, gain = ctx.bounds
        (grad,) = grads
        if ctx.integers and _fused(grad, x):
            (g, m, q), back = _matrices(step.numel(), grad, x, grid)
            grad_x, grad_step = step_backward(g, m, q, step.reshape(-1).contiguous(), low, high)
            grad_x, grad_step = back(grad_x), grad_step.reshape(ctx.shape)
        else:
            z = x / step
            if ctx.integers:
                grid = (grid / step).clamp(low, high).round()
            inside = (z > low) & (z < high)
            # section 2 of the paper: round(z) - z inside, the bound itself outside; outside, `grid` is the bound
            grad_x = grad * inside
            grad_step = _by_block(grad * torch.where(inside, grid - z, grid), ctx.shape)
        return grad_x, None, None, None, grad_step * gain, None, None, None


class _Clip(torch.autograd.Function):
    """PACT: 1 on [0, clip) for x, 1 from the clip on for the clip."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, clip: Tensor) -> Tensor:
        ctx.save_for_backward(x, clip.reshape(()) if clip.numel() == 1 else clip)
        ctx.shape = clip.shape
        return as_output(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, clip = ctx.saved_tensors
        (grad,) = grads
        if _fused(grad, x) and clip.dtype == torch.float32:
            (g, m), back = _matrices(clip.numel(), grad, x)
            grad_x, grad_clip = clip_backward(g, m, clip.reshape(-1).contiguous())
            return back(grad_x), None, grad_clip.reshape(ctx.shape)
        above = x >= clip
        return grad * ((x >= 0) & ~above), None, _by_block(grad * above, ctx.shape)


def _fused(grad: Tensor, x: Tensor) -> bool:
    """Whether a backward pass goes to the operators of `ops/rules.py`: not where it is differentiated again, nor where
    the compiler fuses it by itself."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.numel():
        return False
    return grad.dtype == x.dtype == torch.float32


def _matrices(blocks: int, *tensors: Tensor) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """Tensors of one shape as contiguous matrices `(blocks, n)`, in the order of the last one's memory if there is one
    block, and the way back."""
    shape, order = tensors[-1].shape, list(range(tensors[-1].dim()))
    if blocks == 1:
        order.sort(key=tensors[-1].stride, reverse=True)
    moved = [t.permute(order) for t in tensors]
    inverse = [order.index(d) for d in range(len(shape))]
    rows = [m.contiguous().view(blocks, -1) for m in moved]
    return rows, lambda m: m.view(moved[0].shape).permute(inverse)


def _by_block(x: Tensor, shape: torch.Size) -> Tensor:
    """Sums over the blocks `(blocks, n)`, or over all of a tensor of any shape that is one block."""
    return x.sum().reshape(shape) if shape.numel() == 1 else x.sum(-1, keepdim=True)


def straight_through(x: Tensor, q: Tensor) -> Tensor:
    """`q`, differentiated as if it were `x`. Same shape and dtype."""
    return _StraightThrough.apply(x, q)


def in_range(x: Tensor, q: Tensor, low: Tensor | float, high: Tensor | float, closed: bool = True) -> Tensor:
    """`q`, differentiated as if it were `x` where x lies in [low, high], or ]low, high[, and as a constant elsewhere.
    Shape and dtype of both; the gradient's strides are those of x where x is dense."""
    return _InRange.apply(x, q, low, high, closed)


class Backward:
    """Base of the gradient rules."""

    learns = False
    """Whether the rule has a gradient for a `Learned` scale."""
    by_block = True
    """Whether the rule looks at scales or bounds; then it sees blocks `(blocks, n)`, or any shape if there is one block
    and its scale and zero point are scalars. Otherwise it sees the tensor in its own shape."""

    def connect(self, x: Tensor, q: Tensor, coded: Coded, learned: Tensor | None, gain: float) -> Tensor:
        """`q`, like `x`, with its place in the graph; `learned (blocks, 1)` is the trained parameter of a `Learned`
        scale, `gain` multiplies its gradient."""
        raise TypeError(f"{type(self).__name__} has no connection")


@spec
class PassThrough(Backward):
    """The identity everywhere, for clipped elements too."""

    by_block = False

    def connect(self, x: Tensor, q: Tensor, coded: Coded, learned: Tensor | None, gain: float) -> Tensor:
        return straight_through(x, q)


@spec
class InRange(Backward):
    """1 inside [low, high], 0 outside. Bounds are real values; None takes the grid's end times the scale, moved outward
    by `margin` steps. `closed=False` excludes the bounds themselves."""

    low: float | None = None
    high: float | None = None
    margin: float = 0.0
    closed: bool = True

    def connect(self, x: Tensor, q: Tensor, coded: Coded, learned: Tensor | None, gain: float) -> Tensor:
        fmt, shift = coded.format, 0 if coded.zero is None else coded.zero
        low = (fmt.min - self.margin - shift) * coded.scale if self.low is None else float(self.low)
        high = (fmt.max + self.margin - shift) * coded.scale if self.high is None else float(self.high)
        return in_range(x, q, low, high, self.closed)


@spec
class LearnedStep(Backward):
    """Learned step size (Esser et al. 2020, section 2): dq/dx is 1 strictly inside the range; dq/dstep is
    round(z) - z inside and the bound outside, z = x / step."""

    learns = True

    def connect(self, x: Tensor, q: Tensor, coded: Coded, learned: Tensor | None, gain: float) -> Tensor:
        fmt = coded.format
        low, high = float(fmt.min), float(fmt.max)
        plain = isinstance(fmt, Int) and coded.zero is None and -LARGEST <= low and high <= LARGEST
        return _Step.apply(x, q, None if plain else coded.grid, coded.scale, learned, low, high, gain)


@spec
class LearnedClip(Backward):
    """Learned clip (Choi et al. 2018, eq. 3): dq/dx is 1 on [0, clip), dq/dclip is 1 from the clip on and has no term
    from inside the range."""

    learns = True

    def connect(self, x: Tensor, q: Tensor, coded: Coded, learned: Tensor | None, gain: float) -> Tensor:
        return _Clip.apply(x, q, learned)
