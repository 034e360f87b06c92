"""Speed of lowbit::chunked_mm and lowbit::uniform against their PyTorch definitions, torch.mm and torch.rand.

    python benchmarks/chunked.py [--threads 2] [--json]

Times are the best of several runs. "ns" is nanoseconds per multiply-add (chunked_mm) or per number (uniform).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from lowbit.ops import backends

SHAPES = [(256, 1024, 256), (512, 2048, 512), (4096, 512, 10), (1, 4096, 1024)]  # M, K, N
COUNTS = [10_000, 1_000_000, 16_000_000]
PAPER = (64, 6, 9, 31)  # chunk, exponent, mantissa, bias
SECONDS = 1.0  # spent on each timing


def best(call: Callable[[], object]) -> float:
    call()
    end, times = time.perf_counter() + SECONDS, []
    while not times or (time.perf_counter() < end and len(times) < 50):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure() -> list[dict[str, object]]:
    table: list[dict[str, object]] = []
    mm, mm_definition = torch.ops.lowbit.chunked_mm, backends.definition("lowbit::chunked_mm")
    for m, k, n in SHAPES:
        a, b = torch.randn(m, k), torch.randn(k, n)
        kernel = best(lambda: mm(a, b, *PAPER))  # noqa: B023
        plain = best(lambda: mm_definition(a, b, *PAPER))  # noqa: B023
        other = best(lambda: torch.mm(a, b))  # noqa: B023
        table.append(row("chunked_mm", f"{m}x{k}x{n}", m * k * n, kernel, plain, "torch.mm", other))
    uniform, uniform_definition = torch.ops.lowbit.uniform, backends.definition("lowbit::uniform")
    key = torch.tensor([1, 2, 3])
    for count in COUNTS:
        kernel = best(lambda: uniform(key, [count]))  # noqa: B023
        plain = best(lambda: uniform_definition(key, [count]))  # noqa: B023
        other = best(lambda: torch.rand(count))  # noqa: B023
        table.append(row("uniform", f"{count}", count, kernel, plain, "torch.rand", other))
    return table


def row(
    operator: str, size: str, work: int, kernel: float, plain: float, other_name: str, other: float
) -> dict[str, object]:
    return {
        "operator": operator,
        "size": size,
        "ns": kernel / work * 1e9,
        "definition_ns": plain / work * 1e9,
        "definition_over_kernel": plain / kernel,
        "compared_with": other_name,
        "kernel_over_compared": kernel / other,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = measure()
    if arguments.json:
        result = {"threads": arguments.threads, "isas": backends.compiled_isas(), "rows": table}
        print(json.dumps(result, indent=2))
        return
    active = ", ".join(f"{r.operator}: {r.implementation}" for r in backends.backends() if r.active)
    print(f"threads {arguments.threads}; {active}")
    print("operator               size       ns  definition  faster by   time against PyTorch's own")
    for r in table:
        print(
            f"{r['operator']:12} {r['size']:>14} {r['ns']:8.3f} {r['definition_ns']:11.3f} "
            f"{r['definition_over_kernel']:9.1f}x   {r['kernel_over_compared']:.2f} x {r['compared_with']}"
        )


if __name__ == "__main__":
    main()
