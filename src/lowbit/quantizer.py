"""Quantizers: one tensor to its grid and back.

`QSpec` says how (plain values, JSON both ways); `Quantizer` does it and holds what is learned or tracked; `QTensor` is
the stored result, codes packed below eight bits. A method with its own idea of where the grid lies subclasses
`Quantizer` with a `kind` and overrides `scaling`; then one fused pass casts the tensor. One whose codes need more than
"shift, divide by the scale and round" overrides `codes_and_scale` (and `prepare`, `restore` where the paper transforms
the tensor before, or after).

Randomness: a stochastic quantizer draws from its own counter-based stream, whose state is a buffer. A weight is
redrawn when the weight has changed, with the same bits on every rank; everything else at every call, with other bits
on every rank. In evaluation mode rounding is to nearest unless the specification says otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .backward import Backward, Coded, PassThrough
from .blocks import Blocked, Blocks, Layout, PerTensor
from .formats import Even, Fixed, Float, Format, Int
from .ops.cast import cast, cast_arguments
from .ops.fingerprint import fingerprint
from .packing import PACKABLE, pack, unpack
from .rng import Stream, recall, remember, stream_id
from .rounding import ROUNDINGS, Rounding
from .scales import AbsMax, Average, History, Learned, MinMax, PowerOfTwo, Scale, Static
from .serial import nearest, spec

__all__ = ["IDENTITY", "QSpec", "QTensor", "Quantizer", "Scaling", "apart", "by_shape", "pair_arguments", "rank"]

T = TypeVar("T")
CURRENT = -1
"""In place of a weight's version: the present draw belongs to the weight as it is."""


@spec
class QSpec:
    """How one tensor is treated."""

    format: Format
    """The grid."""
    blocks: Blocks = PerTensor()
    """Which elements share a scale."""
    scale: Scale = Static()
    """Where the scale comes from."""
    rounding: Rounding = "half_even"
    """How a value between two grid points is decided in training."""
    backward: Backward = PassThrough()
    """The gradient rule."""
    kind: str = "grid"
    """Which quantizer class; "grid" divides by the scale and rounds."""
    unsigned: Format | None = None
    """Grid for tensors without a negative element (after a ReLU), if it differs."""
    eval_rounding: Rounding = "half_even"
    """Rounding in evaluation mode, where `rounding` is stochastic."""
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Constants of the kind, by name (each kind documents its own)."""

    def __post_init__(self) -> None:
        for mode in (self.rounding, self.eval_rounding):
            if mode not in ROUNDINGS:
                raise ValueError(f"unknown rounding {mode!r}; {nearest(mode, ROUNDINGS)}")

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"


SIGNED, UNSIGNED = 1, 2
"""Values of `Quantizer.seen` once a learned scale has started: on `format` or on `unsigned`."""


def rank() -> int:
    """This process's rank, 0 outside distributed training."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def pair_arguments(
    x: Tensor, first: Quantizer, key1: Tensor | None, second: Quantizer, key2: Tensor | None
) -> tuple[Any, ...]:
    """Arguments of `cast_absmax_pair`, after x and the keys and before `sums`, that give the integers of both; empty
    where that operator does not have them. They depend on the shape and type of `x` and on which keys there are."""
    a, b = first._cast(x, key1), second._cast(x, key2)
    if not a or not b or a[3:5] != b[3:5] or not len(a[0]) == len(b[0]) == x.dim():
        return ()
    denominator, arguments = a[3:5]
    return a[1], a[2], b[1], b[2], denominator, *arguments, a[5], b[5]


def by_shape(known: dict[Any, T], how: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What `make` gives, kept in `known` under a shape and what else it depends on."""
    if torch.compiler.is_compiling():
        return make()
    if how not in known:
        if len(known) > 64:  # lengths vary from batch to batch
            known.clear()
        known[how] = make()
    return known[how]


def apart(x: Tensor) -> Tensor:
    """`x` without a gradient; where none is recorded that is itself, and a call less."""
    return x.detach() if torch.is_grad_enabled() else x


def _cast_absmax(x: Tensor, key: Tensor | None, found: tuple[Any, ...], result: str) -> tuple[Tensor, Tensor]:
    """Codes or values in the shape of `x` and the scales `(blocks,)` in one call; `found` comes from
    `Quantizer._cast`."""
    view, strides, count, denominator, arguments, mode = found
    flat = len(view) == x.dim()
    shaped = x if flat else x.reshape(view)
    codes, scale = torch.ops.lowbit.cast_absmax(shaped, key, strides, count, denominator, *arguments, mode, result)
    return codes if flat else codes.reshape(x.shape), scale


def _coded(s: Scaling, grid: Tensor | Callable[[], Tensor]) -> Coded:
    extra = {} if s.offset is None else {"offset": s.offset}
    return Coded(grid, s.scale if s.step is None else s.step, s.format, s.zero, extra, s.divisor)


def storage_bits(fmt: Format) -> int:
    """Bits one code takes in storage: 1, 2, 3, 4, 6 packed; 8, 16 and 32 as integers."""
    return next(b for b in (*PACKABLE, 32) if b >= fmt.bits)


def _offset(fmt: Format) -> int:
    """What makes the codes of a packed tensor non-negative."""
    return 2 ** (storage_bits(fmt) - 1) if isinstance(fmt, (Int, Fixed)) and fmt.signed else 0


@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized tensor as it is stored; `decode` gives the real values, equal to the quantizer's output."""

    codes: Tensor
    """uint8, packed below 8 bits (see `lowbit.packing`), otherwise the integer codes."""
    scale: Tensor
    zero: Tensor | None
    extra: Mapping[str, Tensor]
    spec: QSpec
    format: Format
    layout: Layout
    shape: torch.Size
    """Shape of the real tensor."""
    count: int
    """Stored codes, padding of the last block included."""
    dtype: torch.dtype
    """Type of the real tensor."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points together."""
        tensors = [self.codes, self.scale, *self.extra.values()] + ([] if self.zero is None else [self.zero])
        return sum(t.numel() * t.element_size() for t in tensors)

    def integers(self) -> Tensor:
        """The codes `(blocks, n)`, unpacked."""
        codes, bits = self.codes, storage_bits(self.format)
        if bits < 8:
            codes = unpack(codes, bits, self.count)
            if offset := _offset(self.format):
                codes = codes.to(torch.int8) - offset
        return codes.reshape(-1, self.count // max(1, self.scale.shape[0])) if self.count else codes

    def coded(self) -> Coded:
        """The blocks on their grid."""
        grid = self.format.grid(self.integers(), self.scale.dtype)
        return Coded(grid, self.scale, self.format, self.zero, self.extra)

    def decode(self) -> Tensor:
        """Real values, shape and dtype of the tensor that was encoded."""
        if self.shape.numel() == 0:
            return torch.empty(self.shape, dtype=self.dtype, device=self.codes.device)
        real = Quantizer.kinds[self.spec.kind].restore(self.coded())
        return self.spec.blocks.unview(real, self.shape, self.layout).to(self.dtype)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Where the blocks of one tensor lie on a grid; every tensor is `(blocks, 1)`:

    grid = round((x - offset) / scale + zero)          real = (grid - zero) * step + offset
    """

    scale: Tensor
    format: Format
    zero: Tensor | None = None
    offset: Tensor | None = None
    step: Tensor | None = None
    """Scale of the result, where the method drops a part of it; None is `scale`."""
    divisor: Tensor | None = None
    """The part that was dropped."""


class Quantizer(nn.Module):
    """One tensor to its grid.

    Args:
        spec: how.
        layout: where the rows and channels of the operand are.
        name: name of the slot, for example `features.0.A`; the random stream is derived from it.
        weight: True for a tensor that changes only when the optimizer steps.
        seed: seed of the random stream.
        like: a tensor of the shape to come; needed where a learned scale has one value a block.
    """

    kinds: ClassVar[dict[str, type[Quantizer]]] = {}
    symmetric: ClassVar[bool] = True
    """Whether `scaling` gives neither a zero point of its own nor an offset."""
    plain_sgd: ClassVar[bool] = False
    """Whether `gradient` returns an update, which only SGD without momentum and decay carries out as it is."""
    spec: QSpec
    seen: Tensor
    tracked: Tensor
    stream: Stream

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            if kind in Quantizer.kinds and Quantizer.kinds[kind].__qualname__ != cls.__qualname__:
                raise ValueError(f"two quantizers are of kind {kind!r}; rename one")
            Quantizer.kinds[kind] = cls

    @staticmethod
    def make(spec: QSpec, *args: Any, **kwargs: Any) -> Quantizer:
        """The quantizer of the kind that `spec` names; arguments as for the class.

        Raises:
            ValueError: unknown kind.
        """
        if spec.kind not in Quantizer.kinds:
            raise ValueError(f"unknown kind of quantizer {spec.kind!r}; {nearest(spec.kind, Quantizer.kinds)}")
        return Quantizer.kinds[spec.kind](spec, *args, **kwargs)

    def __init__(
        self,
        spec: QSpec,
        layout: Layout | None = None,
        name: str = "",
        *,
        weight: bool = False,
        seed: int = 0,
        like: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.layout, self.name, self.weight = spec, layout or Layout(), name, weight
        self.watch: Callable[[Quantizer, Tensor, Tensor, Coded], None] | None = None
        self.calibrating = False
        self._casts: dict[Any, tuple[Any, ...]] = {}  # what `_cast` gives, by shape, type and rounding
        self._made: dict[str, tuple[Any, Any]] = {}  # what was made of a weight, and of which bits
        self._versions: dict[str, tuple[int, int]] = {}  # of the weight and `_steps`, at the last use
        self._repeated: Tensor | None = None  # tracked scale that further draws of the same tensor share
        self._drawn: int | None = None  # version of the weight that the current draw belongs to
        self._source: weakref.ref[Tensor] | None = None  # that weight
        self._calls: OrderedDict[int, Tensor] = OrderedDict()  # scales that an activation checkpoint may need again
        if spec.stochastic:
            self.stream = Stream(seed, stream_id(name))
        if isinstance(spec.scale, Learned):
            if not spec.backward.learns:
                raise ValueError(
                    f"{name or spec.kind}: a Learned scale needs LearnedStep or LearnedClip, not "
                    f"{type(spec.backward).__name__}"
                )
            if like is None and not isinstance(spec.blocks, PerTensor):
                raise ValueError(f"{name or spec.kind}: an activation's Learned scale is per tensor; got {spec.blocks}")
            count = 1 if like is None else spec.blocks.view(like, self.layout).shape[0]
            like = torch.empty(0) if like is None else like
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            self.learned = nn.Parameter(torch.ones(count, 1, dtype=dtype, device=like.device))
        elif spec.backward.learns:
            raise ValueError(f"{name or spec.kind}: {type(spec.backward).__name__} needs a Learned scale")
        if isinstance(spec.scale, (Learned, Average, History)):
            # batches the state has taken in; of a learned scale 0, or the grid it started on
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        if isinstance(spec.scale, (Average, History)):
            self.register_buffer("tracked", torch.empty(0, 1))

    # ---- what a kind of quantizer overrides -------------------------------------------------------------------------

    def prepare(self, x: Tensor) -> Tensor:
        """A differentiable map applied before quantization; same shape."""
        return x

    def scaling(self, x: Blocked) -> Scaling:
        """Where the grid lies for a tensor in blocks; no gradient. Uses `x`'s statistics, or its `matrix`."""
        scale, zero = self.scale_for(x)
        fmt = self.format_for(x)
        if isinstance(fmt, Even) and not isinstance(self.spec.scale, (Static, Learned, Average, History)):
            # no level is zero: a block that vanished stays zero by its scale
            gone = x.absmax() < torch.finfo(x.dtype).tiny
            return Scaling(scale, fmt, zero, step=torch.where(gone, torch.zeros_like(scale), scale))
        return Scaling(scale, fmt, zero)

    def codes_and_scale(self, x: Tensor, u: Tensor | None) -> Coded:
        """Blocks `x (blocks, n)` on the grid, no gradient: the definition of what the fused cast gives. `u`: uniforms
        like `x` for stochastic rounding, or None for the deterministic one."""
        s = self.scaling(Blocked(x))
        t = (x if s.offset is None else x - s.offset) / s.scale
        if s.zero is not None:
            t = t + s.zero
        return _coded(s, s.format.snap(t, self.mode(u is not None), u))

    @staticmethod
    def restore(coded: Coded) -> Tensor:
        """Real values `(blocks, n)` of codes."""
        grid = coded.grid if coded.zero is None else coded.grid - coded.zero
        real = grid * coded.scale
        return real + coded.extra["offset"] if "offset" in coded.extra else real

    def why_no_codes(self) -> str:
        """Why a product can't run on int8 codes of this quantizer; empty if it can: real = scale * code, and nothing is
        done to the tensor but dividing and rounding it."""
        kind = type(self)
        names = ("codes_and_scale", "restore", "prepare")
        if not self.symmetric or any(getattr(kind, n) is not getattr(Quantizer, n) for n in names):
            return f"kind {self.spec.kind!r} is no plain symmetric grid"
        for fmt in (self.spec.format, self.spec.unsigned):
            if fmt is not None and not (isinstance(fmt, Int) and fmt.min >= -128 and fmt.max <= 127):
                return f"codes of {type(fmt).__name__} with {fmt.bits} bits are not int8"
        how: Scale = self.spec.scale
        while isinstance(how, (PowerOfTwo, Average, History)):
            how = how.inner
        return "there is a zero point" if isinstance(how, MinMax) or (isinstance(how, Static) and how.zero) else ""

    def integers(self, x: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """int8 codes in the shape of `x`, without a gradient, and the scales `(blocks,)`; `why_no_codes` is empty and
        `x` is not."""
        x = apart(x)
        if found := self._cast(x, key):
            return _cast_absmax(x, key, found, "codes")
        b, mode = Blocked(self._enter(x, None), self.spec.blocks, self.layout), self.mode(key is not None)
        if b.strides is not None and b.dtype == torch.float32:
            s = self.scaling(b)
            arguments = cast_arguments(s.format, mode)
            assert arguments is not None  # every Int has them
            codes = cast(b.view, s.scale.flatten(), None, key, None, b.strides, *arguments, mode, "codes")
            return codes.reshape(x.shape), (s.scale if s.step is None else s.step).flatten()
        coded, _ = self._run(b.x, key, None)
        return self.spec.blocks.unview(coded.grid.to(torch.int8), x.shape, self.layout), coded.scale.flatten()

    def weight_integers(self, w: Tensor, key: Tensor | None, seen: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """`integers` of a weight, kept until it changes. Calls that share the list `seen` mean the weight as it was at
        the first of them, and may save a look at its bits."""
        return self._kept("integers", w, w, key, lambda: self.integers(w, key), seen)

    def _kept(
        self,
        what: str,
        w: Tensor,
        owner: Tensor,
        key: Tensor | None,
        make: Callable[[], T],
        seen: list[int] | None = None,
    ) -> T:
        """What `make` gives for a weight with these bits and this draw; `owner` is the parameter it comes from.

        A weight does not change between the micro-batches of a step, nor in evaluation. The second use of the same
        version is kept, together with a fingerprint of the bits, because a version counter does not see what is written
        through `.data`; the first use costs nothing more, so a step of a single batch pays nothing.
        """
        if not self.weight or torch.compiler.is_compiling():
            return make()
        version = owner._version, _steps
        if self._versions.get(what) != version:
            self._versions[what] = version
            self._made.pop(what, None)
            return make()
        if w.dtype != torch.float32 or not w.is_cpu:
            return make()
        how = w.shape, w.stride(), self.training, None if key is None else key.tolist()
        mark, made = self._made.get(what, (None, None))
        if seen and mark == (seen[0], *how):
            return made  # type: ignore[no-any-return]
        flat = w.permute(0, 2, 3, 1) if w.dim() == 4 and not w.is_contiguous() else w
        steady = not isinstance(self.spec.scale, (Learned, Average, History)) and self.watch is None
        if not (steady and flat.is_contiguous()):
            return make()
        bits = fingerprint(apart(flat))
        if seen == []:
            seen.append(bits)
        if mark != (bits, *how):
            made = make()
            self._made[what] = (bits, *how), made
        return made  # type: ignore[no-any-return]

    def _cast(self, x: Tensor, key: Tensor | None) -> tuple[Any, ...]:
        """What one fused cast of `x` with the scale of the moment needs: shape of the view, block strides, number of
        blocks, denominator, the format's arguments and the rounding. Empty where there is none."""
        how = self.spec.scale
        if not isinstance(how, AbsMax) or type(self) is not Quantizer or self.spec.unsigned is not None:
            return ()
        mode, denominator = self.mode(key is not None), how.denominator

        def find() -> tuple[Any, ...]:
            b = Blocked(x, self.spec.blocks, self.layout)
            arguments = cast_arguments(self.spec.format, mode)
            if b.strides is None or arguments is None or x.dtype not in (torch.float32, torch.bfloat16):
                return ()
            return b.view.shape, b.strides, b.count, denominator, arguments, mode

        return by_shape(self._casts, (x.shape, x.dtype, mode), find)

    def gain(self, x: Tensor) -> float:
        """Factor on the gradient of the learned parameter; `x` is the tensor as it entered."""
        return 1.0

    def gradient(self, grad: Tensor, lr: float, key: Tensor | None) -> Tensor:
        """Role G: the weight gradient as the optimizer shall see it; `lr` is the present learning rate."""
        return self.quantize(grad, key)

    def penalty(self) -> Tensor | None:
        """This quantizer's term of the loss, if it has one."""
        return None

    # ---- parts a kind may use ---------------------------------------------------------------------------------------

    def mode(self, drawn: bool) -> Rounding:
        """The rounding mode of one use; `drawn` says whether it has random numbers."""
        if not self.spec.stochastic:
            return self.spec.rounding
        return "stochastic" if drawn else self.spec.eval_rounding

    def format_for(self, x: Blocked) -> Format:
        """The grid for this tensor: `unsigned` where given and no element is negative. A learned scale belongs to one
        grid, so there the tensor it started from decides."""
        if self.spec.unsigned is None:
            return self.spec.format
        if isinstance(self.spec.scale, Learned) and bool(self.seen):
            return self.spec.unsigned if int(self.seen) == UNSIGNED else self.spec.format
        return self.spec.format if bool(x.negative().any()) else self.spec.unsigned

    def scale_for(self, x: Blocked) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of the blocks of `x`, tracked or learned ones included; updates what is tracked."""
        how = self.spec.scale
        if isinstance(how, Learned):
            first = (self.training or self.calibrating) and not bool(self.seen)
            if first:
                negative = self.spec.unsigned is None or _on_any_rank(x.negative().any())
                self.seen.fill_(SIGNED if negative else UNSIGNED)
            if (fmt := self.format_for(x)) is not self.spec.format:
                how = dataclasses.replace(how, denominator=fmt.max)
            if first:
                with torch.no_grad():
                    self.learned.copy_(_mean_over_ranks(how.start(x)))
            return how.step(self.learned.detach() if bool(self.seen) else how.start(x)).to(x.dtype), None
        if isinstance(how, (Average, History)):
            return self._track(how, x), None
        return how.compute(x)

    def _track(self, how: Average | History, x: Blocked) -> Tensor:
        if self._repeated is not None:
            return self._repeated.to(x.dtype)
        count = int(self.seen)
        old = self.tracked
        if count and old.shape[-1 if isinstance(how, History) else 0] and old.shape[0] != x.count:
            raise ValueError(
                f"{self.name}: {type(how).__name__} has tracked {old.shape[0]} blocks and now sees "
                f"{x.count}; use blocks whose number does not depend on the batch"
            )
        if not (self.training or self.calibrating) and count:
            return self._summary(how, old).to(x.dtype)
        if torch._C._current_graph_task_id() != -1 and (known := recall(self._calls)) is not None:
            return known  # the second run of an activation checkpoint
        now, zero = how.inner.compute(x)
        if zero is not None:
            raise ValueError(f"{type(how).__name__} needs a symmetric inner scale")
        if not (self.training or self.calibrating):
            return now
        if isinstance(how, Average):
            new = now if not count else how.momentum * old.to(now.dtype) + (1 - how.momentum) * now
        else:
            new = now if not count else torch.cat([old.to(now.dtype), now], -1)[:, -how.length :]
        use = old if how.before and count else new
        if bool(torch.isfinite(now).all()):
            self.tracked = new.detach()
            self.seen += 1
        elif not how.before:
            use = now  # shows in this result, but does not spoil those to come
        scale = self._summary(how, use).to(x.dtype)
        remember(self._calls, scale)
        return scale

    @staticmethod
    def _summary(how: Average | History, tracked: Tensor) -> Tensor:
        return tracked if isinstance(how, Average) else tracked.amax(-1, keepdim=True) * how.headroom

    # ---- use ---------------------------------------------------------------------------------------------------------

    def key(self, x: Tensor) -> Tensor | None:
        """The random key for one use on `x`, or None where rounding is deterministic now. A weight comes as the
        parameter itself, or a view of it, so that its changes show; a weight that is computed is drawn at every use.
        """
        if not (self.spec.stochastic and self.training):
            return None
        if not self.weight:
            return self.stream.next(rank())
        stored = x if x._base is None else x._base
        if not isinstance(stored, nn.Parameter):  # computed for this use, by a parametrization for example
            return self.stream.next(0)
        if self._drawn == CURRENT:
            self._drawn = stored._version
        if self._drawn != stored._version:
            self.stream.move()  # the second run of an activation checkpoint finds the version it needs here
            self._drawn = stored._version
        self._source = weakref.ref(stored)
        return self.stream.key.clone()

    def update_key(self) -> Tensor | None:
        """The random key for one use in an optimizer's update (roles G and U, the optimizer's state): the same on every
        rank, since all must make the same update, and not remembered, since no checkpoint repeats an update."""
        return self.stream.move() if self.spec.stochastic else None

    def redraw(self) -> None:
        """Draw anew at the next use, for a weight that was changed behind autograd's back (by a fused optimizer)."""
        self._drawn = None

    def __getstate__(self) -> dict[str, Any]:
        # the weight of a copy counts its changes from 0: what carries over is whether the present draw still holds
        source = None if self._source is None else self._source()
        holds = self._drawn == CURRENT or (source is not None and source._version == self._drawn)
        return self.__dict__ | {
            "_drawn": CURRENT if holds else None,
            "_source": None,
            "_calls": OrderedDict(),
            "_made": {},
            "_versions": {},
        }

    def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """Real values on the grid, differentiable by the gradient rule; shape and dtype of `x`.

        Args:
            x: floating point, any shape; half precision is computed in float32. NaN and infinity pass through and
                spread over the block whose scale they enter.
            u: uniforms in [0, 1) of the shape of `x`; None draws from the quantizer's stream in training and rounds to
                nearest in evaluation.

        Raises:
            TypeError: `x` is not floating point.
            ValueError: `u` for a deterministic quantizer, or of another shape than `x`.
        """
        return self.coded(x, u)[0]

    def coded(self, x: Tensor, u: Tensor | None = None, owner: Tensor | None = None) -> tuple[Tensor, Coded | None]:
        """As `forward`, with the blocks and scales beside it (None for an empty tensor). A layer gives the `owner`, the
        parameter that `x` was cast from, whose changes say when a weight is drawn anew; it leaves the result as it is,
        for it may be kept (`_kept`)."""
        y = self._enter(x, u)
        if x.numel() == 0:
            return x, None
        key = self.key(x if owner is None else owner) if u is None else None
        y = self.prepare(y)
        blocks, layout, rule = self.spec.blocks, self.layout, self.spec.backward
        with torch.no_grad():
            if owner is None:  # the caller may write into the result, which then can't be kept
                coded, q = self._run(y.detach(), key, u)
            else:
                coded, q = self._kept("values", y, owner, key, lambda: self._run(y.detach(), key, None))
        learned = self.learned if isinstance(self.spec.scale, Learned) else None
        if not rule.by_block:
            q = rule.connect(y, q, coded, learned, self.gain(x))
        elif coded.scale.numel() == 1:  # one block: its numbers meet the tensor in any shape

            def grid() -> Tensor:
                return blocks.unview(coded.grid, y.shape, layout)

            flat = dataclasses.replace(
                coded,
                source=grid,
                scale=coded.scale.reshape(()),
                zero=None if coded.zero is None else coded.zero.reshape(()),
            )
            q = rule.connect(y, q, flat, learned, self.gain(x))
        else:
            q = rule.connect(blocks.view(y, layout), blocks.view(q, layout), coded, learned, self.gain(x))
            q = blocks.unview(q, y.shape, layout)
        return q.to(x.dtype), coded

    def quantize(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        """Values on the grid without a gradient; `key` comes from `key(x)` (None: deterministic)."""
        return self.quantize_coded(x, key)[0]

    @torch.no_grad()
    def quantize_coded(self, x: Tensor, key: Tensor | None = None) -> tuple[Tensor, Coded | None]:
        """As `quantize`, with the blocks and scales beside it."""
        y = self._enter(x, None)
        if x.numel() == 0:
            return x, None
        coded, q = self._run(self.prepare(y), key, None)
        return q.to(x.dtype), coded

    @torch.no_grad()
    def encode(self, x: Tensor, u: Tensor | None = None) -> QTensor:
        """The tensor as codes; `.decode()` equals `self(x, u)` exactly.

        Raises:
            ValueError: NaN in `x` where the grid has none; no result is defined for it.
        """
        y = self._enter(x, u)
        if x.numel() == 0:
            empty = torch.empty(0, dtype=torch.uint8, device=x.device)
            scale = torch.empty(0, 1, device=x.device)
            return QTensor(empty, scale, None, {}, self.spec, self.spec.format, self.layout, x.shape, 0, x.dtype)
        key = self.key(x) if u is None else None
        coded, _ = self._run(self.prepare(y), key, u)
        codes, fmt = coded.format.codes(coded.grid).flatten(), coded.format
        bits = storage_bits(fmt)
        if bits < 8:
            codes = pack((codes.to(torch.int16) + _offset(fmt)).to(torch.uint8), bits)
        return QTensor(
            codes,
            coded.scale,
            coded.zero,
            coded.extra,
            self.spec,
            fmt,
            self.layout,
            x.shape,
            coded.grid.numel(),
            x.dtype,
        )

    @contextlib.contextmanager
    def repeating(self, scale: Tensor | None) -> Iterator[None]:
        """Within the context a tracked scale is `scale` and takes in nothing: for further draws of the tensor that was
        quantized with it. None changes nothing."""
        self._repeated = scale if isinstance(self.spec.scale, (Average, History)) else None
        try:
            yield
        finally:
            self._repeated = None

    def uniforms(self, x: Tensor, key: Tensor | None) -> Tensor | None:
        """Uniforms in [0, 1) of the shape and dtype of `x` for `key`; None for None."""
        return None if key is None else torch.ops.lowbit.uniform(key, list(x.shape)).to(x.device, x.dtype)

    def _enter(self, x: Tensor, u: Tensor | None) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"a quantizer takes floating point tensors; got {x.dtype}: convert with x.float()")
        if u is not None:
            if not self.spec.stochastic:
                raise ValueError(f"u was given, but this quantizer rounds {self.spec.rounding!r}; leave u out")
            if u.shape != x.shape:
                raise ValueError(f"u must have the shape of x, {tuple(x.shape)}; got {tuple(u.shape)}")
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    def _run(self, x: Tensor, key: Tensor | None, u: Tensor | None) -> tuple[Coded, Tensor]:
        """Codes of the prepared tensor, and its values on the grid in its own shape."""
        blocks, layout = self.spec.blocks, self.layout
        done = self._fused(x, key, u)
        if done is None:
            if u is None:
                u = self.uniforms(x, key)
            coded = self.codes_and_scale(
                blocks.view(x, layout), None if u is None else blocks.view(u.to(x.dtype), layout)
            )
            done = coded, blocks.unview(self.restore(coded), x.shape, layout)
        coded, q = done
        if self.watch is not None:
            self.watch(self, blocks.view(x, layout), blocks.view(q, layout), coded)
        return coded, q

    def _fused(self, x: Tensor, key: Tensor | None, u: Tensor | None) -> tuple[Coded, Tensor] | None:
        """`_run` without a copy of the tensor in blocks; None where this kind, grid or type has no use of it."""
        kind = type(self)
        own = kind.codes_and_scale is not Quantizer.codes_and_scale or kind.restore is not Quantizer.restore
        return None if own else self._by_scaling(x, key, u)

    def _by_scaling(self, x: Tensor, key: Tensor | None, u: Tensor | None) -> tuple[Coded, Tensor] | None:
        """Codes, and values in the shape of `x`, by `scaling` and the operator that casts in one pass. None where it
        lacks this grid, type or partition into blocks."""
        if x.dtype != torch.float32:
            return None
        if u is None and (found := self._cast(x, key)):
            return self._at_once(x, key, found)
        b = Blocked(x, self.spec.blocks, self.layout)
        if (strides := b.strides) is None:
            return None
        mode, s = self.mode(key is not None or u is not None), self.scaling(b)
        if (how := cast_arguments(s.format, mode)) is None:
            return None
        zero = None if s.zero is None else s.zero.flatten()
        offset, step = (None if t is None else t.flatten() for t in (s.offset, s.step))
        uniforms = None if u is None else u.to(x.dtype).reshape(b.view.shape)

        def run(result: str) -> Tensor:
            return cast(b.view, s.scale.flatten(), zero, key, uniforms, strides, *how, mode, result, offset, step)

        coded = _coded(s, lambda: self.spec.blocks.view(run("grid").reshape(x.shape), self.layout))
        return coded, run("values").reshape(x.shape)

    def _at_once(self, x: Tensor, key: Tensor | None, found: tuple[Any, ...]) -> tuple[Coded, Tensor]:
        """`_by_scaling` where one call makes the scale and casts; `found` comes from `_cast`."""
        q, scale = _cast_absmax(x, key, found, "values")
        view, strides, _, _, arguments, mode = found
        how: tuple[str, list[float], Tensor | None] = arguments

        def grid() -> Tensor:
            codes = cast(x.detach().reshape(view), scale, None, key, None, strides, *how, mode, "grid")
            return self.spec.blocks.view(codes.reshape(x.shape), self.layout)

        return Coded(grid, scale[:, None], self.spec.format), q

    def extra_repr(self) -> str:
        fmt = self.spec.format
        return f"{self.spec.kind}, {fmt}, {self.spec.blocks}, {self.spec.rounding}"

    def _load_from_state_dict(self, state_dict, prefix, *args):  # type: ignore[no-untyped-def]
        # A float checkpoint has none of this state: that is no error. The tracked scales take the size they were
        # saved with.
        if isinstance(self.spec.scale, (Average, History)) and f"{prefix}tracked" in state_dict:
            self.tracked = torch.empty_like(state_dict[f"{prefix}tracked"], device=self.tracked.device)
        own = [n for n in ("learned", "seen", "tracked") if hasattr(self, n)]
        missing = args[2]
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing[:] = [k for k in missing if k not in {prefix + n for n in own}]


Quantizer.kinds["grid"] = Quantizer


class Identity(Quantizer, kind="identity"):
    """Every value stays as it is: for tests of products, and to measure a tensor without changing it. Codes are the
    bits of float32, so float64 tensors that it doesn't hold can't be encoded."""

    def codes_and_scale(self, x: Tensor, u: Tensor | None) -> Coded:
        return Coded(x, torch.ones_like(x[:, :1]), self.spec.format)

    def encode(self, x: Tensor, u: Tensor | None = None) -> QTensor:
        if x.dtype == torch.float64 and not torch.equal(x.float().double(), x):
            raise ValueError("the identity's codes are float32 and don't hold this float64 tensor; use x.float()")
        return super().encode(x, u)


IDENTITY = QSpec(Float(8, 23), kind="identity")
"""Quantizes nothing."""


_steps = 0
"""Steps that optimizers of this process have made: a fused one changes weights without raising their versions."""


def _count_step(*_: Any) -> None:
    global _steps
    if not torch.compiler.is_compiling():  # a compiled step would be compiled anew for every count
        _steps += 1


register_optimizer_step_post_hook(_count_step)


def _on_any_rank(flag: Tensor) -> bool:
    # ranks see different batches and must settle on one grid
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        flag = flag.to(torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _mean_over_ranks(value: Tensor) -> Tensor:
    # every rank sees another first batch; the parameter must start equal
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


@contextlib.contextmanager
def watching(quantizers: list[Quantizer], watch: Callable[[Quantizer, Tensor, Tensor, Coded], None]) -> Iterator[None]:
    """Within the context, `watch(quantizer, x, q, coded)` sees every tensor in blocks as it is quantized."""
    before = [q.watch for q in quantizers]
    for q in quantizers:
        q.watch = watch
    try:
        yield
    finally:
        for q, old in zip(quantizers, before, strict=True):
            q.watch = old
