"""Quantized layers: PyTorch's own layers with three quantized products.

    a -> Q_A -> qa \\                       e -> Q_E -> qe
                    product(qa, qw) -> y   grad_a = qe . qw  -> Q_A's gradient rule -> a
    w -> Q_W -> qw /                       grad_w = qe . qa  -> Q_W's gradient rule -> w

A layer contributes its products (`products.py`) and knows nothing of quantization; `LayerQuant` holds the quantizers of
one layer and runs the flow above. Layers are converted in place by changing their class, so parameter names, shapes,
hooks and ties stay.

Products and their quantizers compute in float32 (float64 for float64 inputs) whatever `torch.autocast` says: a grid
value times its scale has no exact bfloat16 image. Under autocast a layer returns the autocast type, as PyTorch's own
would; otherwise it returns the type of its input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import blocks as B
from .accumulate import Operand, multiply
from .backward import Coded, as_output
from .integer import OPERANDS, Codes, IntegerProduct, Plan, outside_autocast, plan
from .products import ConvProduct, ConvTransposeProduct, LinearProduct, MatmulProduct, ProductOps
from .quantizer import QSpec, QTensor, Quantizer, apart, by_shape, pair_arguments
from .recipe import Int32, Keep, Products, Roles, Stage
from .scales import AbsMax

__all__ = ["LayerQuant", "QConv1d", "QConv2d", "QConv3d", "QConvTranspose2d", "QEmbedding", "QLinear", "QMatmul"]

Keys = dict[Any, Tensor | None]
"""Random keys of one call, by what draws."""
Contract = int | tuple[Literal["keep", "reduce"], tuple[int, ...]]
PRODUCTS = tuple(OPERANDS)
INTEGER_DTYPES = {torch.float32, torch.bfloat16}
"""What enters and leaves an integer execution."""


@dataclasses.dataclass(frozen=True)
class Layouts:
    """Where rows and channels of a layer's operands are."""

    A: B.Layout
    W: B.Layout
    E: B.Layout
    outputs: Contract
    """What `grad_a` sums over, in W."""
    samples: Contract
    """What `grad_w` sums over, in E and A."""

    def of(self, role: str, which: str = "out") -> B.Layout:
        """The layout of a role's tensor as an operand of product `which`."""
        layout = {"A": self.A, "W": self.W, "E": self.E, "result": self.E, "G": self.W, "U": self.W}[role]
        if which == "grad_w":
            return dataclasses.replace(layout, contract=self.samples)
        if which == "grad_a" and role == "W":
            return dataclasses.replace(layout, contract=self.outputs)
        return layout


LINEAR = Layouts(B.LINEAR_INPUT, B.LINEAR_WEIGHT, B.LINEAR_INPUT, 0, B.SAMPLES)
CONV1D = Layouts(B.LINEAR_INPUT, B.LINEAR_WEIGHT_T, B.LINEAR_INPUT, 1, B.SAMPLES)
CONV = Layouts(B.CONV_INPUT, B.CONV_WEIGHT, B.CONV_INPUT, 0, B.PIXELS)
CONV_TRANSPOSE = Layouts(B.CONV_INPUT, B.CONV_TRANSPOSE_WEIGHT, B.CONV_INPUT, 1, B.PIXELS)
MATMUL = Layouts(B.MATMUL_LEFT, B.MATMUL_RIGHT, B.MATMUL_LEFT, -1, -2)


class LayerQuant(nn.Module):
    """The quantizers of one layer and the flow of its three products.

    Args:
        kind: linear, conv, embedding or attention.
        name: the layer's name in the model; random streams are derived from it.
        roles, products: what the recipe and its rules give this layer.
        layouts: where rows and channels are.
        weight: the layer's weight, None where both operands are activations.
        stages: the recipe's schedule, with roles that replace others during a stage.
        seed: the recipe's seed.
        states: grid of the optimizer's state (`Update.states`).
    """

    def __init__(
        self,
        kind: str,
        name: str,
        roles: Roles,
        products: Products,
        layouts: Layouts,
        weight: Tensor | None = None,
        stages: tuple[Stage, ...] = (),
        seed: int = 0,
        states: QSpec | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.name, self.roles, self.products, self.layouts = kind, name, roles, products, layouts
        self.stage: int | None = None
        self.off: tuple[str, ...] = ()
        self.stored: QTensor | None = None
        """Codes that the weight was loaded from; they count until the layer is trained (`lowbit.load`)."""
        self._flows: dict[tuple[Any, ...], Flow] = {}
        self.unpacked: tuple[QTensor, Codes] | None = None
        """Those codes, and as int8."""
        self.slots = nn.ModuleDict()

        def add(slot: str, role: str, spec: QSpec, which: str = "out") -> None:
            own = weight if role in ("W", "G", "U") else None
            self.slots[slot] = Quantizer.make(
                spec,
                layouts.of(role, which),
                f"{name}.{slot}",
                weight=own is not None and role == "W",
                seed=seed,
                like=own,
            )

        named = roles.named()
        if weight is None:  # both operands of an attention product are activations
            named = {k: v for k, v in named.items() if k in ("A", "E")}
            if "A" in named:
                named["W"] = named["A"]
        for role, spec in named.items():
            add(role, role, spec)
        for i, stage in enumerate(stages):
            for role, spec in (Roles() if stage.roles is None else stage.roles).named().items():
                add(f"stage{i}_{role}", role, spec)
            if stage.result is not None:
                add(f"stage{i}_result", "result", stage.result)
        for which, sides in OPERANDS.items():
            p = getattr(products, which)
            for side, role in zip(("left", "right"), sides, strict=True):
                override = getattr(p, side)
                if isinstance(override, QSpec):
                    add(f"{which}_{side}", role, override, which)
        if products.result is not None:
            add("result", "result", products.result)
        if states is not None and weight is not None and (roles.G or roles.U):
            add("states", "U", states)

    def role(self, name: str) -> Quantizer | None:
        """The quantizer of a role at the present stage of the schedule; None is float."""
        return None if name == "W" and self.frozen else self._role(name)

    def coding(self, name: str) -> Quantizer | None:
        """As `role`, but for a weight loaded from codes the quantizer that made them."""
        return self._role(name)

    @property
    def frozen(self) -> bool:
        """Whether the weight was loaded from codes and is on its grid: it is not quantized again."""
        return self.stored is not None and not self.training

    def train(self, mode: bool = True) -> LayerQuant:
        if mode:
            self.stored = self.unpacked = None
        return super().train(mode)

    def _role(self, name: str) -> Quantizer | None:
        if name in self.off:
            return None
        slots = self.slots
        staged = f"stage{self.stage}_{name}"
        if self.stage is not None and staged in slots:
            return slots[staged]  # type: ignore[return-value]
        return slots[name] if name in slots else None  # type: ignore[return-value]

    def override(self, which: str, side: str) -> Quantizer | Keep | None:
        """The override of one operand of one product."""
        role = OPERANDS[which][side == "right"]
        if role in self.off or (role == "W" and self.frozen):
            return None
        slot = f"{which}_{side}"
        if slot in self.slots:
            return self.slots[slot]  # type: ignore[return-value]
        return Keep() if isinstance(getattr(getattr(self.products, which), side), Keep) else None

    def flow(self) -> Flow:
        """What calls share at the present state."""
        if torch.compiler.is_compiling():
            return Flow(self)
        state = self.stage, self.off, self.frozen
        if state not in self._flows:
            self._flows[state] = Flow(self)
        return self._flows[state]

    def forward(
        self,
        ops: ProductOps,
        a: Tensor,
        w: Tensor,
        bias: Tensor | None = None,
        memo: dict[str, Any] | None = None,
    ) -> Tensor:
        """The layer's output; `bias` must broadcast against it. Layers that are called one after the other with the
        same `a` may share a dictionary: it is then encoded once."""
        device, dtype = a.device.type, a.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(device)
        return outside_autocast(device, self._call, ops, a, w, bias, memo, dtype)

    def _call(
        self,
        ops: ProductOps,
        a: Tensor,
        w: Tensor,
        bias: Tensor | None,
        memo: dict[str, Any] | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """`forward` outside of autocast; `dtype` is that of the result."""
        flow = self.flow()
        y = self._integer(flow, ops, a, w, bias, dtype if flow.result is None else a.dtype, memo)
        if y is None:
            stored = w  # its changes show whether a stochastic W is drawn anew; a cast of it has none
            double = torch.float64 in (a.dtype, w.dtype)
            a, w = (t.to(torch.float64 if double else torch.float32) for t in (a, w))
            if (late := flow.error_at_input) is not None:
                a = _QuantizeGrad.apply(a, late, late.key(a))
            y = self._product(flow, ops, a, w, stored)
            if bias is not None:
                y = y + bias.to(y.dtype)
        if flow.result is not None:
            y = flow.result(y)
        return y if y.dtype == dtype else y.to(dtype)

    def _integer(
        self,
        flow: Flow,
        ops: ProductOps,
        a: Tensor,
        w: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        memo: dict[str, Any] | None,
    ) -> Tensor | None:
        """The layer's output by integer products; None where it needs real values on a grid."""
        if self.kind == "attention" or not a.numel() or not w.numel() or not {a.dtype, dtype} <= INTEGER_DTYPES:
            return None
        recording, device = torch.is_grad_enabled(), a.device.type
        # in training the same in both runs of an activation checkpoint, of which one has no gradients
        wanted = PRODUCTS if self.training else ("out",)
        if recording and not self.training:
            wanted += tuple(which for which, t in (("grad_a", a), ("grad_w", w)) if t.requires_grad)
        state = self.training, w.dim(), device, wanted
        if state not in flow.plans:
            flow.plans[state] = plan(self, w.dim(), wanted, device)
        products = flow.plans[state]
        if products is None or any([q.watch is not None for q in flow.quantizers]):
            return None
        run = Run(flow, ops, flow.coding, {})
        run.codes_w = self._stored_codes(w.shape) if self.frozen else None
        run.plan, run.dtype, run.memo, run.recording = products, dtype, memo, recording
        run.role_keys = {r: q.key(w if r == "W" else a) for r, q in flow.forward_draws}
        keys = run.keys(w, a)
        bias = bias if bias is None or bias.dtype == torch.float32 else bias.float()
        return IntegerProduct.apply(a, w if w.dtype == torch.float32 else w.float(), bias, run, *keys)

    def _stored_codes(self, shape: torch.Size) -> Codes:
        """int8 codes of a weight that was loaded from codes."""
        q = self.stored
        assert q is not None
        if self.unpacked is None or self.unpacked[0] is not q:
            codes = q.spec.blocks.unview(q.integers().to(torch.int8), shape, q.layout)
            self.unpacked = q, (codes, q.scale.flatten().float())
        return self.unpacked[1]

    def _product(self, flow: Flow, ops: ProductOps, a: Tensor, w: Tensor, stored: Tensor) -> Tensor:
        quant_a, quant_w = flow.roles["A"], flow.roles["W"]
        qa, coded_a = quant_a.coded(a) if quant_a is not None else (a, None)
        qw, coded_w = w, None
        if quant_w is not None:
            qw, coded_w = quant_w.coded(w, owner=stored)
        elif self.frozen and isinstance(self.products.out.accumulator, Int32):
            assert self.stored is not None
            quant_w, coded_w = flow.coding["W"], self.stored.coded()
        run = Run(flow, ops, flow.roles | {"W": quant_w}, {"A": coded_a, "W": coded_w})
        return _Product.apply(qa, qw, a.detach(), w.detach(), run, *run.keys(stored, a))


class Flow:
    """What all calls of a layer share while its stage, its roles and the kind of its weight stay."""

    def __init__(self, layer: LayerQuant) -> None:
        products = layer.products
        error, at = layer.role("E"), products.error_at
        self.name, self.result = layer.name, layer.role("result")
        self.error = None if at == "input" else error
        """What quantizes E as it enters."""
        self.error_at_input = None if at == "output" else error
        self.roles = {"A": layer.role("A"), "W": layer.role("W"), "E": self.error}
        self.coding = self.roles | {"W": layer.coding("W")}
        """As `roles`, but for a weight loaded from codes the quantizer that made them."""
        self.overrides = {
            (which, side): layer.override(which, side) for which in OPERANDS for side in ("left", "right")
        }
        self.accumulators = {which: getattr(products, which).accumulator for which in OPERANDS}
        self.samples = products.grad_w.samples
        self.plain = self.error is None and not any(self.overrides.values())
        """Whether the backward pass is a function that autograd may differentiate again."""
        self.forward_draws = [
            (r, q) for r, q in self.coding.items() if r != "E" and q is not None and q.spec.stochastic
        ]
        """The roles of an integer execution's operands that may draw in the forward pass."""
        self.quantizers: list[Quantizer] = list(layer.slots.values())  # type: ignore[arg-type]
        self.plans: dict[tuple[Any, ...], Plan | None] = {}
        self.pairs: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        # one key for E, one for each override, one more for each further sample of grad_w
        left = self.overrides["grad_w", "left"]
        again = left if left is not None else self.error
        drawing: dict[Any, Quantizer | Keep | None] = {"E": self.error, **self.overrides}
        drawing |= {("sample", i): again for i in range(1, self.samples)}
        self.draws = {k: q for k, q in drawing.items() if isinstance(q, Quantizer) and q.spec.stochastic}
        one_draw = products.grad_w.same_draw and "E" in self.draws
        if one_draw:
            self.draws.pop(("grad_w", "left"), None)
        self.coders: dict[tuple[str, str], tuple[Quantizer | None, Any]] = {}
        """What encodes the operand of an integer product, its override or its role's quantizer; the name of its key, if
        it draws."""
        for operand, override in self.overrides.items():
            role = OPERANDS[operand[0]][operand[1] == "right"]
            if isinstance(override, Quantizer):
                self.coders[operand] = override, "E" if one_draw and operand == ("grad_w", "left") else operand
            else:
                self.coders[operand] = self.coding[role], role

    def pair(
        self, one: tuple[str, str], x: Tensor, q1: Quantizer, key1: Tensor | None, q2: Quantizer, key2: Tensor | None
    ) -> tuple[Any, ...]:
        """`pair_arguments`, kept; `one` is the operand that q1 encodes."""
        how = one, x.shape, x.dtype, key1 is None, key2 is None
        return by_shape(self.pairs, how, lambda: pair_arguments(x, q1, key1, q2, key2))

    def check_derivative(self) -> None:
        """Raises RuntimeError in a backward pass that autograd shall differentiate again and can't."""
        if torch.is_grad_enabled() and not self.plain:
            raise RuntimeError(
                f"{self.name}: the backward pass of a layer with a quantized gradient can't be "
                "differentiated again; leave create_graph out"
            )


class Run:
    """One call of a layer: its products, its quantizers and which random keys the backward pass will use."""

    def __init__(
        self, flow: Flow, ops: ProductOps, roles: dict[str, Quantizer | None], coded: dict[str, Coded | None]
    ) -> None:
        self.flow, self.ops, self.roles, self.coded = flow, ops, roles, coded
        self.seen: list[int] = []
        """The fingerprint of the weight in the forward pass, if one was taken."""

        self.role_keys: dict[Any, Tensor | None] = {}
        """Random keys of the roles A and W in an integer execution, where they draw."""

    plan: Plan
    """In an integer execution: how each product runs."""
    dtype: torch.dtype
    """Type of its result."""
    codes_w: Codes | None
    """The weight's codes, where it was loaded from codes."""
    recording: bool
    """Whether autograd records the call."""
    memo: dict[str, Any] | None
    """What layers that are called with the same activation share."""

    def keys(self, stored: Tensor, a: Tensor) -> list[Tensor | None]:
        """One key for each draw."""
        return [q.key(stored if q.weight else a) for q in self.flow.draws.values()]

    def by_slot(self, keys: Sequence[Tensor | None]) -> Keys:
        """Those that `keys` gave, and those of the roles, by the names in `Flow.coders`."""
        return self.role_keys | dict(zip(self.flow.draws, keys, strict=True))

    def coder(self, which: str, side: str, keys: Keys) -> tuple[Quantizer, Tensor | None]:
        """What encodes one operand of an integer product, and its random key."""
        q, name = self.flow.coders[which, side]
        assert q is not None
        return q, keys.get(name)

    def codes(self, which: str, side: str, x: Tensor, keys: Keys) -> Codes:
        """int8 codes of one operand."""
        q, key = self.coder(which, side, keys)
        return q.integers(x, key)

    def both_codes(
        self, one: tuple[str, str], other: tuple[str, str], x: Tensor, keys: Keys, sums: bool = False
    ) -> tuple[Codes, Codes, Tensor | None]:
        """int8 codes of a tensor that enters two products, with fewer passes over it than two; then, with `sums`, its
        sums over all axes but the last, where they come for less than a pass of their own."""
        (q1, key1), (q2, key2) = self.coder(*one, keys), self.coder(*other, keys)
        if q1 is q2:
            codes = q1.integers(x, key1)
            return codes, codes, None
        how = self.flow.pair(one, x, q1, key1, q2, key2)
        if not how:
            return q1.integers(x, key1), q2.integers(x, key2), None
        codes1, scale1, codes2, scale2, total = torch.ops.lowbit.cast_absmax_pair(apart(x), key1, key2, *how, sums)
        return (codes1, scale1), (codes2, scale2), total if sums else None

    def activation(self, a: Tensor, keys: Keys) -> tuple[Codes, Codes | None]:
        """The codes of `a` for `out`, and those for `grad_w`, which are made now so that `a` itself is not kept."""
        left, right = ("out", "left"), ("grad_w", "right")
        later = self.recording and self.plan.get("grad_w") == "codes"

        def make() -> tuple[Codes, Codes | None]:
            return self.both_codes(left, right, a, keys)[:2] if later else (self.codes(*left, a, keys), None)

        if self.memo is None:
            return make()
        sides = (left, right) if later else (left,)
        used = [self.coder(*side, keys) for side in sides]
        if any(key is not None or not isinstance(q.spec.scale, AbsMax) for q, key in used):
            return make()
        known = a, [(q.spec, q.layout) for q, _ in used]
        if "codes" not in self.memo or self.memo["known"][1] != known[1] or self.memo["known"][0] is not a:
            self.memo["known"] = known
            self.memo["codes"] = make()
        found: tuple[Codes, Codes | None] = self.memo["codes"]
        return found

    def real(self, which: str, side: str, x: Tensor, keys: Keys) -> Tensor:
        """Real values of one operand, on the grid of its override or its role, or as they are."""
        stored = self.codes_w is not None and OPERANDS[which][side == "right"] == "W"
        if isinstance(self.flow.overrides[which, side], Keep) or stored or self.flow.coders[which, side][0] is None:
            return x
        q, key = self.coder(which, side, keys)
        return q.quantize(x, key)

    def weight_codes(self, which: str, w: Tensor, keys: Keys) -> Codes:
        """int8 codes of the weight as the right operand of a product."""
        if self.codes_w is not None:
            return self.codes_w
        q, key = self.coder(which, "right", keys)
        return q.weight_integers(w, key, self.seen)

    def raw_needed(self, which: str, side: str) -> bool:
        return self.flow.overrides[which, side] is not None

    def operand(self, which: str, side: str, q: Tensor, raw: Tensor, coded: Coded | None, keys: Keys) -> Operand:
        """One operand: the values of its role reused, quantized anew, or kept in float."""
        override = self.flow.overrides[which, side]
        if override is None:
            return Operand(q, coded, self.roles[OPERANDS[which][side == "right"]])
        if isinstance(override, Keep):
            return Operand(raw)
        values, again = override.quantize_coded(raw, keys.get(self.flow.coders[which, side][1]))
        return Operand(values, again, override)

    def multiply(self, which: str, left: Operand, right: Operand) -> Tensor:
        return multiply(self.ops, which, self.flow.accumulators[which], left, right, self.flow.name)


class _Product(torch.autograd.Function):
    """`out` forward, `grad_a` and `grad_w` backward, each with its own operands and accumulator."""

    @staticmethod
    def forward(ctx: Any, qa: Tensor, qw: Tensor, a: Tensor, w: Tensor, run: Run, *keys: Tensor | None) -> Tensor:
        by_slot = run.by_slot(keys)
        left = run.operand("out", "left", qa, a, run.coded["A"], by_slot)
        right = run.operand("out", "right", qw, w, run.coded["W"], by_slot)
        y = run.multiply("out", left, right)
        for role, which in (("A", "grad_w"), ("W", "grad_a")):  # codes are kept only for products that run on them
            if not isinstance(run.flow.accumulators[which], Int32):
                run.coded[role] = None
        keep_w = w if run.raw_needed("grad_a", "right") else qw
        keep_a = a if run.raw_needed("grad_w", "right") else qa
        ctx.run, ctx.count = run, len(keys)
        ctx.save_for_backward(keep_a, keep_w, *keys)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.run.flow.check_derivative()
        return outside_autocast(grads[0].device.type, _Product.products, ctx, grads[0])

    @staticmethod
    def products(ctx: Any, e: Tensor) -> Any:
        """`grad_a` and `grad_w`, where asked for."""
        run: Run = ctx.run
        a, w, *keys = ctx.saved_tensors
        by_slot = run.by_slot(keys)
        overrides = [run.flow.overrides["grad_a", "left"], run.flow.overrides["grad_w", "left"]]
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
        qe: Tensor = e
        coded_e: Coded | None = None
        if run.flow.error is not None and any(o is None and n for o, n in zip(overrides, needed, strict=True)):
            qe, coded_e = run.flow.error.quantize_coded(e, by_slot.get("E"))
        grad_a = grad_w = None
        if needed[0]:
            left = run.operand("grad_a", "left", qe, e, coded_e, by_slot)
            right = run.operand("grad_a", "right", w, w, run.coded["W"], by_slot)
            grad_a = run.multiply("grad_a", left, right)
        if needed[1]:
            left = run.operand("grad_w", "left", qe, e, coded_e, by_slot)
            right = run.operand("grad_w", "right", a, a, run.coded["A"], by_slot)
            grad_w = run.multiply("grad_w", left, right)
            again = overrides[1] if overrides[1] is not None else run.flow.error
            for i in range(1, run.flow.samples if isinstance(again, Quantizer) else 1):
                assert isinstance(again, Quantizer)
                with again.repeating(None if left.coded is None else left.coded.scale):
                    values, codes = again.quantize_coded(e, by_slot.get(("sample", i)))
                grad_w = grad_w + run.multiply("grad_w", Operand(values, codes, again), right)
            if run.flow.samples > 1 and isinstance(again, Quantizer):
                grad_w = grad_w / run.flow.samples
        return grad_a, grad_w, None, None, None, *(None,) * ctx.count


class _QuantizeGrad(torch.autograd.Function):
    """The identity whose gradient is quantized on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer, key: Tensor | None) -> Tensor:
        ctx.quantizer = quantizer
        ctx.save_for_backward(key)
        return as_output(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (key,) = ctx.saved_tensors
        return ctx.quantizer.quantize(grads[0], key), None, None


# ---- layers ----------------------------------------------------------------------------------------------------------


class Quantized:
    """Mixin of every converted layer; `quant` holds its quantizers."""

    quant: LayerQuant


class QLinear(Quantized, nn.Linear):
    """`nn.Linear` with quantized products; input `(..., in_features)`."""

    def forward(self, input: Tensor) -> Tensor:
        return self.quant(LinearProduct(input.shape, self.weight.shape), input, self.weight, self.bias)


class _QConv(Quantized):
    def forward(self: Any, input: Tensor) -> Tensor:
        batched = input.dim() == self.weight.dim()
        x = input if batched else input.unsqueeze(0)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.stride)
        elif isinstance(padding, str):
            x, padding = self._string_padding(x)
        w = self.weight
        last = w.dim() == 4 and not w.is_contiguous() and w.is_contiguous(memory_format=torch.channels_last)
        ops = ConvProduct(x.shape, w.shape, self.stride, padding, self.dilation, self.groups, last)
        bias = None if self.bias is None else self.bias.reshape(1, -1, *[1] * len(self.stride))
        y = self.quant(ops, x, self.weight, bias)
        return y if batched else y.squeeze(0)

    def _string_padding(self: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        none = (0,) * len(self.stride)
        if self.padding == "valid":
            return x, none
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if all(t % 2 == 0 for t in total):
            return x, tuple(t // 2 for t in total)
        return F.pad(x, [p for t in reversed(total) for p in (t // 2, t - t // 2)]), none


class QConv1d(_QConv, nn.Conv1d):
    """`nn.Conv1d` with quantized products."""


class QConv2d(_QConv, nn.Conv2d):
    """`nn.Conv2d` with quantized products."""


class QConv3d(_QConv, nn.Conv3d):
    """`nn.Conv3d` with quantized products."""


class QConvTranspose2d(Quantized, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with quantized products."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        batched = input.dim() == 4
        x = input if batched else input.unsqueeze(0)
        geometry: Any = (self.stride, self.padding, self.kernel_size, self.dilation)
        stride, padding, kernel, dilation = (list(v) for v in geometry)
        extra = self._output_padding(x, output_size, stride, padding, kernel, 2, dilation)
        size = [
            (n - 1) * s - 2 * p + d * (k - 1) + o + 1
            for n, s, p, d, k, o in zip(x.shape[2:], stride, padding, dilation, kernel, extra, strict=True)
        ]
        out_shape = torch.Size([x.shape[0], self.out_channels, *size])
        ops = ConvTransposeProduct(
            x.shape, self.weight.shape, out_shape, tuple(stride), tuple(padding), tuple(dilation), self.groups
        )
        bias = None if self.bias is None else self.bias.reshape(1, -1, 1, 1)
        y = self.quant(ops, x, self.weight, bias)
        return y if batched else y.squeeze(0)


class QEmbedding(Quantized, nn.Embedding):
    """`nn.Embedding` whose table is quantized (role W only: a lookup has no product)."""

    def forward(self, input: Tensor) -> Tensor:
        quant = self.quant.role("W")
        if quant is None:
            return super().forward(input)
        if self.max_norm is not None:  # changes the table in place: before it is quantized
            with torch.no_grad():
                torch.embedding_renorm_(self.weight, input.contiguous(), self.max_norm, self.norm_type)
        table, _ = quant.coded(self.weight, owner=self.weight)
        return F.embedding(input, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class QMatmul(Quantized, nn.Module):
    """`a (..., M, K) @ b (..., K, N)` with quantized products; both operands are activations."""

    def __init__(self, quant: LayerQuant) -> None:
        super().__init__()
        self.quant = quant

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.quant(MatmulProduct(a.shape, b.shape), a, b)


def transposed_linear(cls: type) -> type:
    """The quantized version of a linear layer that stores its weight as (in, out), as Hugging Face's `Conv1D`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.quant(LinearProduct(x.shape, self.weight.shape, transposed=True), x, self.weight, self.bias)

    return type(f"Q{cls.__name__}", (Quantized, cls), {"forward": forward, "__doc__": cls.__doc__})
