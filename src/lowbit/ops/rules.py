"""Backward passes of gradient rules, each in one pass over a matrix `(blocks, n)`.

    in_range_backward    grad [low <= x <= high], or both strict
    step_backward        grad [low < z < high]              sum grad (r - z where low < z < high, else r)
    clip_backward        grad [0 <= x < clip]               sum grad [x >= clip]

with z = x / step and r = clamp(round(q / step), low, high), the integer that became q. The mask is a factor 0 or 1, so
NaN and infinity in `grad` show. The terms of a sum are float32 and their sum over each block is float64: chunks of 1024
elements, the last one filled up with zeros, are added by halves (the first 512 terms to the others, and so on), then
the totals of the chunks likewise. That order does not depend on threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import Operator, declare

__all__ = ["LARGEST", "clip_backward", "in_range_backward", "step_backward"]

CHUNK = 1024
LARGEST = 2.0**21
"""Of the bounds of `step_backward`: up to there q / step rounds to the integer that q came from."""


def _block_sums(terms: Tensor) -> Tensor:
    t = F.pad(terms.double(), (0, -terms.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))
    half = CHUNK // 2
    while half:
        t, half = t[..., :half] + t[..., half:], half // 2
    t = t.squeeze(-1)
    while t.shape[1] > 1:
        half = (t.shape[1] + 1) // 2
        t = t[:, :half] + F.pad(t[:, half:], (0, 2 * half - t.shape[1]))
    return t.sum(1).to(terms.dtype)


def _in_range(grad: Tensor, x: Tensor, low: Tensor, high: Tensor, closed: bool) -> Tensor:
    _check(grad, {"x": x}, {"low": low, "high": high})
    low, high = low[:, None], high[:, None]
    return grad * ((x >= low) & (x <= high) if closed else (x > low) & (x < high))


def _step(grad: Tensor, x: Tensor, q: Tensor, step: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    _check(grad, {"x": x, "q": q}, {"step": step})
    _check_bounds(low, high)
    z, grid = x / step[:, None], (q / step[:, None]).clamp(low, high).round()
    inside = (z > low) & (z < high)
    return grad * inside, _block_sums(grad * torch.where(inside, grid - z, grid))


def _clip(grad: Tensor, x: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    _check(grad, {"x": x}, {"clip": clip})
    above = x >= clip[:, None]
    return grad * ((x >= 0) & ~above), _block_sums(grad * above)


_in_range_op = Operator(
    "lowbit::in_range_backward",
    _in_range,
    "(Tensor grad, Tensor x, Tensor low, Tensor high, bool closed) -> Tensor",
)
_step_op = Operator(
    "lowbit::step_backward",
    _step,
    "(Tensor grad, Tensor x, Tensor q, Tensor step, float low, float high) -> (Tensor, Tensor)",
)
_clip_op = Operator(
    "lowbit::clip_backward",
    _clip,
    "(Tensor grad, Tensor x, Tensor clip) -> (Tensor, Tensor)",
)


@_in_range_op.register_fake
def _(grad: Tensor, x: Tensor, low: Tensor, high: Tensor, closed: bool) -> Tensor:
    _check(grad, {"x": x}, {"low": low, "high": high})
    return torch.empty_like(grad)


@_step_op.register_fake
def _(grad: Tensor, x: Tensor, q: Tensor, step: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    _check(grad, {"x": x, "q": q}, {"step": step})
    return torch.empty_like(grad), torch.empty_like(step)


@_clip_op.register_fake
def _(grad: Tensor, x: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    _check(grad, {"x": x}, {"clip": clip})
    return torch.empty_like(grad), torch.empty_like(clip)


declare("lowbit::in_range_backward", _in_range, {"cpu": "C++"})
declare("lowbit::step_backward", _step, {"cpu": "C++"})
declare("lowbit::clip_backward", _clip, {"cpu": "C++"})


def in_range_backward(grad: Tensor, x: Tensor, low: Tensor, high: Tensor, closed: bool = True) -> Tensor:
    """Gradient of the identity inside [low, high], or ]low, high[.

    Args:
        grad, x: contiguous float32 (blocks, n).
        low, high: contiguous float32 (blocks,).
        closed: whether the bounds are inside.
    """
    _check(grad, {"x": x}, {"low": low, "high": high})
    return torch.ops.lowbit.in_range_backward(grad, x, low, high, closed)


def step_backward(grad: Tensor, x: Tensor, q: Tensor, step: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Gradients of q = step * clamp(round(x / step), low, high) for x and step (Esser et al. 2020).

    Args:
        grad, x, q: contiguous float32 (blocks, n).
        step: contiguous float32 (blocks,).
        low, high: integers, at most 2^21 in magnitude.
    """
    _check(grad, {"x": x, "q": q}, {"step": step})
    _check_bounds(low, high)
    return torch.ops.lowbit.step_backward(grad, x, q, step, low, high)


def clip_backward(grad: Tensor, x: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of clamp(x, 0, clip) for x and clip (Choi et al. 2018).

    Args:
        grad, x: contiguous float32 (blocks, n).
        clip: contiguous float32 (blocks,).
    """
    _check(grad, {"x": x}, {"clip": clip})
    return torch.ops.lowbit.clip_backward(grad, x, clip)


def _check(grad: Tensor, matrices: dict[str, Tensor], blocks: dict[str, Tensor]) -> None:
    for name, t in {"grad": grad, **matrices, **blocks}.items():
        if t.dtype != torch.float32:
            raise TypeError(f"{name} must be float32; got {t.dtype}")
    if grad.dim() != 2:
        raise ValueError(f"grad must be a matrix (blocks, n); got shape {tuple(grad.shape)}")
    for name, t in matrices.items():
        if t.shape != grad.shape:
            raise ValueError(f"{name} must have the shape of grad, {tuple(grad.shape)}; got {tuple(t.shape)}")
    for name, t in blocks.items():
        if t.shape != grad.shape[:1]:
            raise ValueError(f"{name} must have one value a block, shape ({grad.shape[0]},); got {tuple(t.shape)}")


def _check_bounds(low: float, high: float) -> None:
    if not -LARGEST <= low <= high <= LARGEST:
        raise ValueError(f"bounds must lie in order within 2^21; got {low} and {high}")
