"""Speed of the products with packed operands, of packing and of the Hadamard transform, against PyTorch's own.

    python benchmarks/inference.py [--threads 2] [--seconds 1.0] [--only packed_mm] [--cpu] [--json]

Set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment to see a processor with AMX as one without. Within a block
all rows run in turn, and a time is the median of its runs. "ratio" is the time of the block's first row over the row's
own: above 1 the row is the faster one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import linear

from lowbit.ops import backends
from lowbit.ops.binary_mm import binary_mm, pack_signs
from lowbit.ops.hadamard import hadamard
from lowbit.ops.pack import SUB_BYTE, pack, unpack
from lowbit.ops.packed_mm import LEVELS, pack_weight, packed_mm

Block = tuple[str, dict[str, Callable[[], object]]]

FEATURES = 4096  # inputs and outputs of the layer for packed_mm
ROWS = [1, 2, 4, 8, 16, 32, 64, 256]  # of activations
GROUP = 128


def packing() -> Iterator[Block]:
    count = 1 << 22
    for bits in SUB_BYTE:
        codes = torch.randint(0, 1 << bits, (count,), dtype=torch.uint8)
        packed, _ = pack(codes, bits)
        calls: dict[str, Callable[[], object]] = {
            "clone of the codes": codes.clone,
            "pack": lambda codes=codes, bits=bits: pack(codes, bits),
            "unpack": lambda packed=packed, bits=bits: unpack(packed, bits, count),
        }
        for name in ("pack", "unpack"):
            definition = backends.definition(f"lowbit::{name}")
            args = (codes, bits) if name == "pack" else (packed, bits, count)
            calls[f"{name}, definition"] = lambda definition=definition, args=args: definition(*args)
        yield f"packing, 4 million codes of {bits} bits", calls


def transform() -> Iterator[Block]:
    x = torch.randn(512, FEATURES)
    signs = torch.randint(0, 2, (FEATURES,)).float() * 2 - 1
    for size in (16, 32, 128, 1024):
        matrix = hadamard(torch.eye(size), size)
        yield (
            f"hadamard, {x.shape[0]} x {FEATURES}, blocks of {size}",
            {
                "clone": x.clone,
                "product with the matrix": lambda size=size, matrix=matrix: x.view(-1, size) @ matrix,
                "hadamard": lambda size=size: hadamard(x, size),
                "hadamard with signs": lambda size=size: hadamard(x, size, signs),
            },
        )


def binary() -> Iterator[Block]:
    for m, n, k in ((1024, 1024, 4096), (64, 4096, 4096), (1, 4096, 4096)):
        a, b = torch.randn(m, k), torch.randn(n, k)
        columns, words, weight = b.t().contiguous(), pack_signs(a), pack_signs(b)
        half_a, half_b = a.bfloat16(), b.bfloat16()
        yield (
            f"binary_mm, {m} x {n} x {k}",
            {
                "float32 mm": lambda a=a, columns=columns: a @ columns,
                "float32 linear": lambda a=a, b=b: linear(a, b),
                "bfloat16 linear": lambda a=half_a, b=half_b: linear(a, b),
                "both packed before": lambda words=words, weight=weight, k=k: binary_mm(words, weight, k),
                "activations packed inside": lambda a=a, weight=weight, k=k: binary_mm(pack_signs(a), weight, k),
            },
        )


def packed() -> Iterator[Block]:
    w = torch.randn(FEATURES, FEATURES)
    half = w.bfloat16()
    rows_scale, groups_scale = torch.rand(FEATURES), torch.rand(FEATURES, FEATURES // GROUP)
    weights = {
        name: pack_weight(torch.randint(0, 3 if name == "ternary" else 1 << bits, w.shape, dtype=torch.uint8), bits)
        for name, (bits, _, _) in LEVELS.items()
        if name != "int2"  # the same work as ternary
    }
    for m in ROWS:
        x = torch.randn(m, FEATURES)
        half_x = x.bfloat16()
        calls: dict[str, Callable[[], object]] = {
            "float32 linear": lambda x=x: linear(x, w),
            "bfloat16 linear": lambda x=half_x: linear(x, half),
        }
        for name, weight in weights.items():
            for group, scale in ((None, rows_scale), (GROUP, groups_scale)):
                for activations in ("float32", "int8"):
                    label = f"{name}, {activations} activations" + (f", groups of {group}" if group else "")
                    args = (x, weight, scale, name, group, activations)
                    calls[label] = lambda args=args: packed_mm(*args)
        yield f"packed_mm, {m} x {FEATURES} x {FEATURES}", calls


BLOCKS = {"packing": packing, "hadamard": transform, "binary_mm": binary, "packed_mm": packed}


def medians(calls: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds * len(calls) / 4
    while len(next(iter(times.values()))) < 5 or time.perf_counter() < end:
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: statistics.median(runs) for name, runs in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="for four rows of a block")
    parser.add_argument("--only", choices=BLOCKS, help="one kind of block")
    parser.add_argument("--cpu", action="store_true", help="one thread and its processor time: for a busy machine")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.cpu:
        arguments.threads = 1
    clock = time.thread_time if arguments.cpu else time.perf_counter
    torch.set_num_threads(arguments.threads)
    isa = (backends.compiled_isas() or ("PyTorch definitions",))[0]
    table = []
    if not arguments.json:
        print(f"threads {arguments.threads}; {isa}")
    for kind, blocks in BLOCKS.items():
        if arguments.only not in (None, kind):
            continue
        for title, calls in blocks():
            found = medians(calls, arguments.seconds, clock)
            first = next(iter(found.values()))
            table += [{"block": title, "row": name, "ms": t * 1e3, "ratio": first / t} for name, t in found.items()]
            if arguments.json:
                continue
            print(f"\n{title:50} {'ms':>9} {'ratio':>7}")
            for name, t in found.items():
                print(f"  {name:48} {t * 1e3:9.3f} {first / t:7.2f}")
    if arguments.json:
        print(json.dumps({"threads": arguments.threads, "isa": isa, "rows": table}, indent=2))


if __name__ == "__main__":
    main()
