"""Speed of the int8 products against PyTorch's float32 and bfloat16 products of the same shape.

    python benchmarks/int8.py [--threads 2] [--isa avx512vnni] [--seconds 0.3] [--only conv] [--json]

Every row is timed in one process with its opponents in turn; medians, in milliseconds. float32 is the faster of the
two memory layouts for a convolution. ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment shows PyTorch without AMX,
`--isa avx512vnni` shows these kernels without it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable

import torch

from lowbit.ops import backends
from lowbit.ops.int8 import int8_conv, int8_conv_grad_a, int8_conv_grad_w, int8_matmul

MATRICES = [
    (512, 512, 512),
    (2048, 512, 2048),
    (4096, 512, 1536),
    (2048, 2048, 2048),
    (512, 4096, 512),
    (64, 768, 3072),
]
# batch, in, out, size, kernel, stride
CONVOLUTIONS = [
    (128, 16, 16, 32, 3, 1),
    (128, 32, 32, 16, 3, 1),
    (128, 64, 64, 8, 3, 1),
    (16, 64, 64, 56, 3, 1),
    (16, 128, 128, 28, 3, 1),
    (16, 256, 256, 14, 3, 1),
    (16, 512, 512, 7, 3, 1),
    (16, 64, 256, 56, 1, 1),
    (16, 256, 64, 56, 1, 1),
    (16, 1024, 256, 14, 1, 1),
    (128, 16, 32, 32, 3, 2),
    (16, 128, 128, 56, 3, 2),
]
Call = Callable[[], object]
Calls = dict[str, Call]


def medians(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def row(product: str, size: str, work: int, calls: dict[str, Call], seconds: float) -> dict[str, object]:
    t = medians(calls, seconds)
    float32 = min(t[name] for name in t if name.startswith("float32"))
    return {
        "product": product,
        "size": size,
        "float32_ms": float32,
        "bfloat16_ms": t["bfloat16"],
        "int8_ms": t["int8"],
        "int8_to_bfloat16_ms": t["int8 to bfloat16"],
        "int_mm_ms": t.get("_int_mm"),
        "float32_over_int8": float32 / t["int8"],
        "bfloat16_over_int8": t["bfloat16"] / t["int8"],
        "gops": 2 * work / t["int8"] / 1e6,
    }


def matrices(seconds: float) -> list[dict[str, object]]:
    table = []
    for m, k, n in MATRICES:
        a, w = codes(m, k), codes(n, k)  # as a linear layer has them
        x, y = a.float(), w.float()
        p, q = x.bfloat16(), y.bfloat16()
        rows, columns, b = torch.rand(m), torch.rand(n), w.t()
        calls: dict[str, Call] = {
            "float32 mm": lambda x=x, y=y: x @ y.t(),
            "bfloat16": lambda p=p, q=q: p @ q.t(),
            "_int_mm": lambda a=a, b=b: torch._int_mm(a, b),
            "int8": lambda a=a, b=b, r=rows, c=columns: int8_matmul(a, b, r, c),
            "int8 to bfloat16": lambda a=a, b=b, r=rows, c=columns: int8_matmul(a, b, r, c, None, torch.bfloat16),
        }
        table.append(row("matmul", f"{m}x{k}x{n}", m * k * n, calls, seconds))
    return table


def convolution(batch: int, c: int, o: int, hw: int, kernel: int, stride: int) -> tuple[str, int, dict[str, Calls]]:
    """Its size, its multiply-adds, and for each product the calls that compute it."""
    last, aten = torch.channels_last, torch.ops.aten
    padding, out = kernel // 2, (hw + 2 * (kernel // 2) - kernel) // stride + 1
    x, w = codes(batch, c, hw, hw).contiguous(memory_format=last), codes(o, c, kernel, kernel)
    e = codes(batch, o, out, out).contiguous(memory_format=last)
    geometry = ([stride, stride], [padding, padding], [1, 1])
    one, pads = torch.ones(1), [0, 0]
    products: dict[str, Calls] = {"out": {}, "grad_a": {}, "grad_w": {}}

    def add_float(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
        x_, w_, e_ = (v.to(dtype).contiguous(memory_format=layout) for v in (x, w, e))

        def backward(*mask: bool) -> object:
            return aten.convolution_backward(e_, x_, w_, None, *geometry, False, pads, 1, list(mask))

        products["out"][name] = lambda: aten.convolution(x_, w_, None, *geometry, False, pads, 1)
        products["grad_a"][name] = lambda: backward(True, False, False)
        products["grad_w"][name] = lambda: backward(False, True, False)

    def add_int8(name: str, dtype: torch.dtype) -> None:
        products["out"][name] = lambda: int8_conv(x, w, one, one, None, *geometry, 1, dtype)
        products["grad_a"][name] = lambda: int8_conv_grad_a(e, w, one, one, x.shape, *geometry, 1, dtype)
        products["grad_w"][name] = lambda: int8_conv_grad_w(e, x, one, one, w.shape, *geometry, 1, dtype)

    add_float("float32 channels-last", torch.float32, last)
    add_float("float32 contiguous", torch.float32, torch.contiguous_format)
    add_float("bfloat16", torch.bfloat16, last)
    add_int8("int8", torch.float32)
    add_int8("int8 to bfloat16", torch.bfloat16)
    return f"{batch}x{c}>{o} {hw}^2 {kernel}x{kernel}/{stride}", e.numel() * c * kernel * kernel, products


def convolutions(seconds: float) -> list[dict[str, object]]:
    table = []
    for shape in CONVOLUTIONS:
        size, work, products = convolution(*shape)
        table += [row(product, size, work, calls, seconds) for product, calls in products.items()]
    return table


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default="", help="the kernels' instruction set; the best if absent")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each row")
    parser.add_argument("--only", choices=["matmul", "conv"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = []
    with backends.using_isa(arguments.isa) if arguments.isa else contextlib.nullcontext():
        if arguments.only != "conv":
            table += matrices(arguments.seconds)
        if arguments.only != "matmul":
            table += convolutions(arguments.seconds)
    isa = arguments.isa or (backends.compiled_isas() or ("PyTorch definition",))[0]
    if arguments.json:
        print(json.dumps({"threads": arguments.threads, "isa": isa, "rows": table}, indent=2))
        return
    print(f"threads {arguments.threads}; int8 by {isa}; milliseconds")
    print(f"{'product':8} {'size':24} float32   bf16   int8 (to bf16)  _int_mm   f32/int8  bf16/int8    Gop/s")
    for r in table:
        plain = f"{r['int_mm_ms']:8.3f}" if r["int_mm_ms"] else " " * 8
        print(
            f"{r['product']:8} {r['size']:24} {r['float32_ms']:7.3f} {r['bfloat16_ms']:6.3f} {r['int8_ms']:6.3f} "
            f"({r['int8_to_bfloat16_ms']:7.3f}) {plain} {r['float32_over_int8']:10.2f} {r['bfloat16_over_int8']:10.2f} "
            f"{r['gops']:8.0f}"
        )


if __name__ == "__main__":
    main()
