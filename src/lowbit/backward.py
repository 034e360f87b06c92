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

from .formats import Format
from .serial import spec

__all__ = ["Backward", "Coded", "InRange", "LearnedClip", "LearnedStep", "PassThrough", "straight_through"]


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


class _Masked(torch.autograd.Function):
    """Forward `q`, backward `grad * mask` to `x` (mask None: 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        return as_output(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        (grad,) = grads
        return (grad if mask is None else grad * mask), None, None


class _Step(torch.autograd.Function):
    """LSQ: `q = step * round(clip(x / step))`, with the step's gradient of the paper times `gain`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        q: Tensor,
        grid: Tensor,
        step: Tensor,
        learned: Tensor,
        low: float,
        high: float,
        gain: float,
    ) -> Tensor:
        ctx.save_for_backward(x, grid, step)
        ctx.bounds = low, high, gain
        ctx.shape = learned.shape
        return as_output(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, grid, step = ctx.saved_tensors
        low, high, gain = ctx.bounds
        (grad,) = grads
        z = x / step
        inside = (z > low) & (z < high)
        # section 2 of the paper: round(z) - z inside, the bound itself outside; outside, `grid` is the bound
        slope = torch.where(inside, grid - z, grid)
        return grad * inside, None, None, None, _by_block(grad * slope, ctx.shape) * gain, None, None, None


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
        above = x >= clip
        return grad * ((x >= 0) & ~above), None, _by_block(grad * above, ctx.shape)


def _by_block(x: Tensor, shape: torch.Size) -> Tensor:
    """Sums over the blocks `(blocks, n)`, or over all of a tensor of any shape that is one block."""
    return x.sum().reshape(shape) if shape.numel() == 1 else x.sum(-1, keepdim=True)


def straight_through(x: Tensor, q: Tensor, mask: Tensor | None = None) -> Tensor:
    """`q`, differentiated as if it were `x` where `mask` holds (everywhere if None). Same shape and dtype."""
    return _Masked.apply(x, q, mask)


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
        low = (fmt.min - self.margin - shift) * coded.scale if self.low is None else self.low
        high = (fmt.max + self.margin - shift) * coded.scale if self.high is None else self.high
        mask = (x >= low) & (x <= high) if self.closed else (x > low) & (x < high)
        return straight_through(x, q, mask)


@spec
class LearnedStep(Backward):
    """Learned step size (Esser et al. 2020, section 2): dq/dx is 1 strictly inside the range; dq/dstep is
    round(z) - z inside and the bound outside, z = x / step."""

    learns = True

    def connect(self, x: Tensor, q: Tensor, coded: Coded, learned: Tensor | None, gain: float) -> Tensor:
        return _Step.apply(x, q, coded.grid, coded.scale, learned, coded.format.min, coded.format.max, gain)


@spec
class LearnedClip(Backward):
    """Learned clip (Choi et al. 2018, eq. 3): dq/dx is 1 on [0, clip), dq/dclip is 1 from the clip on and has no term
    from inside the range."""

    learns = True

    def connect(self, x: Tensor, q: Tensor, coded: Coded, learned: Tensor | None, gain: float) -> Tensor:
        return _Clip.apply(x, q, learned)
