"""Rows of the speed table that run operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lowbit import formats as f
from lowbit.blocks import PerRow, PerTensor
from lowbit.lab.speed.table import TARGETS, Calls, Case, Settings, row
from lowbit.quantizer import QSpec, Quantizer
from lowbit.scales import AbsMax

FORMATS: dict[str, f.Format] = {
    "Int(8)": f.Int(8, narrow=True),
    "Int(4)": f.Int(4, narrow=True),
    "Even(2)": f.Even(2),
    "Fixed(4, 12)": f.Fixed(4, 12),
    "E4M3": f.E4M3,
    "E5M2": f.E5M2,
    "E2M1": f.E2M1,
    "FP16 1-6-9": f.FP16_169,
    "Log(2, 0, 6)": f.Log(2.0, 0, 6),
    "Log(4, -3, 3)": f.Log(4.0, -3, 3),
    "Codebook of 16": f.Codebook(tuple((i - 7.5) * abs(i - 7.5) for i in range(16))),
}
"""One of each family, and the formats of more than one published method."""


@row("cast", "Stochastic casts of 2 million floats, against `clone`")
def cast(s: Settings) -> list[Case]:
    from lowbit.ops.cast import cast as given_scale
    from lowbit.ops.cast import cast_absmax, cast_arguments

    rows, columns = (64, 64) if s.quick else (2048, 1024)
    x, key = torch.randn(rows, columns), torch.tensor([1, 2, 3])
    scale = torch.full((1,), 0.03)
    cases = []
    for name, fmt in FORMATS.items():
        arguments = cast_arguments(fmt, "stochastic")
        calls: dict[str, Callable[[], Any]] = {"clone": x.clone}
        if arguments is not None:  # otherwise only the quantizer has it
            way = (*arguments, "stochastic")
            calls["scale given"] = partial(given_scale, x, scale, None, key, None, (0, 0), *way)
            per_row = partial(cast_absmax, x, key, (1, 0), rows, fmt.max, *way)
            calls["scale of max|x|, per row"] = partial(per_row, "values")
            if name == "Int(8)":
                calls["int8 codes, scale of max|x|, per row"] = partial(per_row, "codes")
        # quantizers apart: their temporaries would leave `clone` and the operators with pages to fault in, now and then
        whole: dict[str, Callable[[], Any]] = {"clone": x.clone}
        for where, blocks in (("per tensor", PerTensor()), ("per row", PerRow())):
            quantizer = Quantizer.make(QSpec(fmt, blocks, AbsMax(fmt.max), rounding="stochastic"))
            whole[f"the whole quantizer, {where}"] = partial(quantizer.quantize, x, key)
        for what, group in ((name, calls), (f"{name}, quantizer", whole)):
            target = TARGETS["cast"][""]
            made = s.run(what, {(k, ""): v for k, v in group.items()}, {}, budget=1.0)
            cases += [c | {"target": target if c["case"] != "clone" else None} for c in made]
    return cases


@row("binary", "1-bit matrix product, against float32")
def binary(s: Settings) -> list[Case]:
    from lowbit.ops.binary_mm import binary_mm, pack_signs

    cases = []
    for m, n, k in ((8, 8, 64),) if s.quick else ((1024, 1024, 4096),):
        a, b = torch.randn(m, k), torch.randn(n, k)
        packed_a, packed_b, right = pack_signs(a), pack_signs(b), b.t().contiguous()
        calls: Calls = {
            ("both operands packed", ""): lambda: binary_mm(packed_a, packed_b, k),  # noqa: B023
            ("one operand packed on the way", ""): lambda: binary_mm(pack_signs(a), packed_b, k),  # noqa: B023
            ("float32", ""): lambda: a @ right,  # noqa: B023
        }
        cases += s.run(f"{m}x{n}x{k}", calls, TARGETS["binary"])
    return cases


@row("packed", "Products with packed weights, one row, against float32")
def packed(s: Settings) -> list[Case]:
    from lowbit.ops.packed_mm import pack_weight, packed_mm

    n = 64 if s.quick else 4096
    x, weight = torch.randn(1, n), torch.randn(n, n)
    half = x.bfloat16(), weight.bfloat16()
    cases = []
    for levels, bits, count in (("int4", 4, 16), ("int2", 2, 4), ("ternary", 2, 3), ("binary", 1, 2)):
        codes, scale = pack_weight(torch.randint(count, (n, n), dtype=torch.uint8), bits), torch.rand(n)
        grouped = torch.rand(n, n // 32)
        use = partial(packed_mm, x, codes, levels=levels)
        calls: Calls = {
            ("int8 activations", ""): partial(use, scale=scale, activations="int8"),
            ("float activations", ""): partial(use, scale=scale),
            ("float activations, groups of 32", ""): partial(use, scale=grouped, group=32),
            ("float32", ""): partial(torch.nn.functional.linear, x, weight),
            ("bfloat16", ""): partial(torch.nn.functional.linear, *half),
        }
        cases += s.run(f"{levels} weights, {n}x{n}", calls, TARGETS["packed"], budget=3.0)
    return cases
