"""Scales from statistics: how large one step of the grid is.

Each specification maps blocks (a `Blocked` tensor, or a matrix `x (blocks, n)`) to a scale `(blocks, 1)`, and to a zero
point where the grid is affine, with *real = scale * (grid - zero)*. The denominator is always written out:
`AbsMax(127)` puts the largest magnitude on code 127, `AbsMax(127.5)` and `AbsMax(128)` are other conventions. A block
of zeros, and one so small that the scale would underflow, gets scale 1: its elements round to zero and nothing divides
by zero. NaN and infinity in a block give a NaN or infinite scale, so the damage shows in the result instead of being
hidden.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .blocks import Blocked, blocked
from .formats import floor_log2, mx_scale, pow2
from .ops.affine import affine
from .serial import nearest, spec

__all__ = [
    "AbsMax",
    "Average",
    "History",
    "Learned",
    "Microscale",
    "MinMSE",
    "MinMax",
    "Moments",
    "Percentile",
    "PowerOfTwo",
    "Scale",
    "Static",
    "sawb",
]


def _safe(scale: Tensor) -> Tensor:
    """Scale 1 where the statistic vanished."""
    return scale.masked_fill(scale == 0, 1)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive; got {value}")


class Scale:
    """Base of the scale specifications."""

    def compute(self, x: Tensor | Blocked) -> tuple[Tensor, Tensor | None]:
        """Scale `(blocks, 1)` and zero point (None: 0) of the blocks of `x`, in its dtype."""
        raise TypeError(f"{type(self).__name__} has no scale without its quantizer's state")


@spec
class Static(Scale):
    """A fixed scale: fixed point, plain minifloat casts."""

    scale: float = 1.0
    zero: float = 0.0

    def __post_init__(self) -> None:
        _positive("a Static scale", self.scale)

    def compute(self, x: Tensor | Blocked) -> tuple[Tensor, Tensor | None]:
        x = blocked(x)
        scale = torch.full((x.count, 1), self.scale, dtype=x.dtype, device=x.x.device)
        return scale, torch.full_like(scale, self.zero) if self.zero else None


@spec
class AbsMax(Scale):
    """`max|x| / denominator`."""

    denominator: float

    def __post_init__(self) -> None:
        _positive("the denominator of AbsMax", self.denominator)

    def compute(self, x: Tensor | Blocked) -> tuple[Tensor, Tensor | None]:
        return _safe(blocked(x).absmax() / self.denominator), None


@spec
class MinMax(Scale):
    """`(max - min) / denominator`, affine. `zero="code"`: the range is first extended to hold 0 and the zero point is
    an integer code, so 0 is exact; `zero="real"`: the minimum is code 0 exactly and the zero point is real."""

    denominator: float
    zero: Literal["code", "real"] = "code"

    def __post_init__(self) -> None:
        _positive("the denominator of MinMax", self.denominator)
        if self.zero not in ("code", "real"):
            raise ValueError(f"unknown zero point {self.zero!r}; {nearest(self.zero, ('code', 'real'))}")

    def compute(self, x: Tensor | Blocked) -> tuple[Tensor, Tensor | None]:
        # a constant block has no range: there its own magnitude is the step, and it stays exact
        return affine(*blocked(x).minmax(), self.denominator, self.zero == "code")


@spec
class Percentile(Scale):
    """The `percent`-th percentile of |x| (linear interpolation) over the denominator; what lies beyond saturates."""

    denominator: float
    percent: float = 99.9

    def __post_init__(self) -> None:
        _positive("the denominator of Percentile", self.denominator)
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent must lie in (0, 100]; got {self.percent}")

    def compute(self, x: Tensor | Blocked) -> tuple[Tensor, Tensor | None]:
        x = blocked(x).matrix
        ordered = x.abs().sort(-1).values  # torch.quantile refuses more than 2^24 elements
        place = self.percent / 100 * (x.shape[-1] - 1)
        low = int(place)
        high = min(low + 1, x.shape[-1] - 1)
        value = torch.lerp(ordered[:, low : low + 1], ordered[:, high : high + 1], place - low)
        return _safe(value / self.denominator), None


@spec
class MinMSE(Scale):
    """The clip among `steps` equal fractions of max|x| with the least squared error of round-to-nearest on the
    symmetric integer grid ±denominator."""

    denominator: float
    steps: int = 100

    def __post_init__(self) -> None:
        _positive("the denominator of MinMSE", self.denominator)
        _positive("the number of steps of MinMSE", self.steps)

    def compute(self, x: Tensor | Blocked) -> tuple[Tensor, Tensor | None]:
        x = blocked(x).matrix
        top = _safe(x.abs().amax(-1, keepdim=True) / self.denominator)
        best, least = top, torch.full_like(top, float("inf"))
        for k in range(1, self.steps + 1):
            scale = _safe(top * (k / self.steps))
            codes = (x / scale).round().clamp(-self.denominator, self.denominator)
            error = (codes * scale - x).square().sum(-1, keepdim=True)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best, None


@spec
class Moments(Scale):
    """Statistics-aware weight binning: clip `c1 * sqrt(mean x^2) - c2 * mean|x|`, or max|x| where that is not
    positive; the step is clip / denominator (Choi et al. 2019, arXiv 1807.06964)."""

    c1: float
    c2: float
    denominator: float

    def __post_init__(self) -> None:
        _positive("the denominator of Moments", self.denominator)

    def clip(self, x: Tensor | Blocked) -> Tensor:
        """The clip value `(blocks, 1)`."""
        ratio, peak = self._ratio(blocked(x))
        return ratio * peak

    def _ratio(self, x: Blocked) -> tuple[Tensor, Tensor]:
        # of x / max|x|: squares of tiny or huge values neither vanish nor overflow
        if x.dtype == torch.float32:
            peak, size, square = x.magnitudes().split(1, -1)
            size, root = size / _safe(peak), square.sqrt() / _safe(peak)
        else:
            magnitude = x.matrix.abs()
            peak = magnitude.amax(-1, keepdim=True)
            unit = magnitude / _safe(peak)
            size, root = unit.mean(-1, keepdim=True), unit.square().mean(-1, keepdim=True).sqrt()
        clip = (self.c1 * root - self.c2 * size).to(x.dtype)
        return clip.masked_fill(clip <= 0, 1), peak.to(x.dtype)

    def compute(self, x: Tensor | Blocked) -> tuple[Tensor, Tensor | None]:
        ratio, peak = self._ratio(blocked(x))
        return _safe(ratio / self.denominator * peak), None


SAWB: dict[tuple[str, int], tuple[float, float]] = {
    ("even", 2): (3.12, 2.064),
    ("even", 3): (7.509, 6.892),
    ("even", 4): (12.68, 12.80),
    ("even", 5): (17.74, 18.64),
    ("zero", 2): (2.6, 1.71),
    ("zero", 4): (12.035, 12.03),
    ("zero", 7): (28.24, 30.81),
    ("zero", 8): (31.76, 35.04),
}
"""c1, c2 of `Moments` by level set and bits: the authors' fits of the MSE-optimal clip of six densities (released code;
the paper gives 3.2, 2.1 for two bits). `even`: 2^b levels without zero; `zero`: 2^b - 1 levels with it."""


def sawb(bits: int, levels: Literal["even", "zero"] = "even") -> Moments:
    """The scale of statistics-aware weight binning for `Even(bits)`, or for `Int(bits, narrow=True)` with "zero".

    Raises:
        ValueError: no coefficients were published for these bits and levels.
    """
    if (levels, bits) not in SAWB:
        raise ValueError(
            f"SAWB has no coefficients for {bits!r} bits with {levels!r} levels; there are "
            f"{', '.join(f'{b} bits {s}' for s, b in SAWB)}"
        )
    return Moments(*SAWB[levels, bits], denominator=2**bits - 1 if levels == "even" else 2 ** (bits - 1) - 1)


@spec
class PowerOfTwo(Scale):
    """The scale of `inner` rounded to a power of two; `nearest` is nearest in the exponent."""

    inner: Scale
    mode: Literal["floor", "ceil", "nearest"] = "ceil"

    def __post_init__(self) -> None:
        if self.mode not in ("floor", "ceil", "nearest"):
            raise ValueError(f"unknown mode {self.mode!r}; {nearest(self.mode, ('floor', 'ceil', 'nearest'))}")

    def compute(self, x: Tensor | Blocked) -> tuple[Tensor, Tensor | None]:
        scale, zero = self.inner.compute(x)
        if zero is not None:
            raise ValueError("PowerOfTwo needs a symmetric inner scale; MinMax has a zero point")
        low = pow2(floor_log2(scale)).to(scale.dtype)
        ratio = scale / low  # in [1, 2), exact
        up = {"floor": ratio < 0, "ceil": ratio > 1, "nearest": ratio.square() >= 2}[self.mode]
        out = torch.where(up, 2 * low, low)
        return torch.where(torch.isfinite(scale), out, scale), None


@spec
class Microscale(Scale):
    """Power-of-two scale of the microscaling formats; `emax` is the exponent of the element's largest value, `mode`
    and `mantissa` as in `formats.mx_scale`."""

    emax: int
    mode: Literal["floor", "ceil", "even"] = "floor"
    mantissa: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("floor", "ceil", "even"):
            raise ValueError(f"unknown mode {self.mode!r}; {nearest(self.mode, ('floor', 'ceil', 'even'))}")

    def compute(self, x: Tensor | Blocked) -> tuple[Tensor, Tensor | None]:
        amax = blocked(x).absmax()
        # E8M0 has no infinity: such a block is NaN
        return mx_scale(amax.masked_fill(amax.isinf(), torch.nan), self.emax, self.mode, self.mantissa), None


@spec
class Average(Scale):
    """Exponential moving average of the scale of `inner`: `s = momentum * s + (1 - momentum) * new` after each training
    batch, starting from the first batch. With `before=True` the average of *earlier* batches is used for this one
    (hindsight), so no pass over the tensor has to finish before quantization starts."""

    inner: Scale
    momentum: float = 0.9
    before: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1); got {self.momentum}")


@spec
class History(Scale):
    """The largest scale of `inner` over the last `length` training batches, times `headroom`; the current batch counts
    unless `before=True` (predictive, as delayed scaling does)."""

    inner: Scale
    length: int = 16
    headroom: float = 1.0
    before: bool = True

    def __post_init__(self) -> None:
        _positive("the length of a History", self.length)
        _positive("the headroom of a History", self.headroom)


@spec
class Learned(Scale):
    """A positive parameter trained with the network, one a block: the step itself (`what="step"`) or the clip
    `step * denominator` (`what="clip"`). It starts from the first tensor the quantizer sees in training or calibration:
    `init="lsq"` is a step of 2 mean|x| / sqrt(denominator) (Esser et al. 2020); `init="value"` starts the parameter at
    `value`."""

    denominator: float
    what: Literal["step", "clip"] = "step"
    init: Literal["lsq", "value"] = "lsq"
    value: float = 1.0

    def __post_init__(self) -> None:
        _positive("the denominator of Learned", self.denominator)
        _positive("the start value of Learned", self.value)
        for given, allowed in ((self.what, ("step", "clip")), (self.init, ("lsq", "value"))):
            if given not in allowed:
                raise ValueError(f"unknown word {given!r}; {nearest(given, allowed)}")

    def start(self, x: Tensor | Blocked) -> Tensor:
        """Start value of the parameter `(blocks, 1)` from the blocks of `x`."""
        x = blocked(x).matrix
        if self.init == "value":
            return torch.full((x.shape[0], 1), self.value, dtype=x.dtype, device=x.device)
        step = _safe(2 * x.abs().mean(-1, keepdim=True) / self.denominator**0.5)
        return step if self.what == "step" else step * self.denominator

    def step(self, parameter: Tensor) -> Tensor:
        """The scale that belongs to a value of the parameter; never below the smallest normal number."""
        scale = parameter if self.what == "step" else parameter / self.denominator
        return scale.clamp_min(torch.finfo(scale.dtype).tiny)
