"""Time of lowbit::cast and its relatives as a multiple of x.clone(), by format, rounding and layout of the blocks.

    python benchmarks/cast.py [--threads 2] [--elements 2000000] [--rounds 15] [--json]

Medians of interleaved runs in one process. "eager" is the same cast in eager PyTorch (x / scale, Format.snap, * scale,
with a tensor of uniforms where rounding is stochastic); "-" where a format has no kernel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit import formats
from lowbit.formats import Codebook, Even, Fixed, Format, Int, Log
from lowbit.ops.cast import block_absmax, block_minmax, cast, cast_absmax, cast_absmax_pair, cast_arguments
from lowbit.ops.uniform import uniform

NAMED = {name: getattr(formats, name) for name in formats.__all__}
FORMATS: dict[str, Format] = {name: fmt for name, fmt in NAMED.items() if isinstance(fmt, Format)} | {
    "Int(8)": Int(8),
    "Int(4)": Int(4),
    "Fixed(4, 12)": Fixed(4, 12),
    "Even(2)": Even(2),
    "Log(2, 0, 7)": Log(2.0, 0, 7),
    "radix-4": Log(4.0, -3, 3),
    "Codebook(16)": Codebook(tuple(float(i * abs(i)) for i in range(-8, 8))),
    "Codebook(256)": Codebook(tuple(float(i * abs(i)) for i in range(-128, 128))),
}
PAIRS = (
    (2048, 512),
    (2048, 2048),
    (2048, 3072),
    (128, 16, 32, 32),
    (128, 64, 8, 8),
    (16, 64, 56, 56),
    (16, 256, 56, 56),
)
"""Activations and errors: matrices, and images with channels last."""
KEY = torch.tensor([1, 2, 3])
ROW_LENGTHS = (16, 64, 100, 512, 1000, 4096)


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def by_format(elements: int, rounds: int) -> list[dict[str, object]]:
    x, scale = 3 * torch.randn(elements), torch.tensor([0.37])
    table = []
    for name, fmt in FORMATS.items():
        calls: dict[str, Callable[[], object]] = {"clone": x.clone}
        for rounding in ("half_even", "stochastic"):
            key = KEY if rounding == "stochastic" else None
            arguments = cast_arguments(fmt, rounding)
            if arguments is not None:
                rest = (*arguments, rounding)
                calls[rounding] = lambda key=key, rest=rest: cast(x, scale, None, key, None, [0], *rest)
            calls[f"eager {rounding}"] = lambda key=key, fmt=fmt, rounding=rounding: eager(x, scale, fmt, rounding, key)
        seconds = interleaved(calls, rounds)
        ratios = {call: seconds[call] / seconds["clone"] for call in seconds if call != "clone"}
        table.append({"format": name, "clone_ms": seconds["clone"] * 1e3} | ratios)
    return table


def eager(x: Tensor, scale: Tensor, fmt: Format, rounding: str, key: Tensor | None) -> Tensor:
    u = None if key is None else uniform(key, x.shape)
    return fmt.snap(x / scale, rounding, u) * scale


def layouts(elements: int) -> dict[str, tuple[Tensor, list[int], int]]:
    """Tensor, block strides and number of blocks."""
    made: dict[str, tuple[Tensor, list[int], int]] = {"per tensor": (torch.randn(elements), [0], 1)}
    for n in ROW_LENGTHS:
        x = torch.randn(elements // n, n)
        made[f"per row of {n}"] = (x, [1, 0], len(x))
        made[f"per column of {n}"] = (x, [0, 1], n)
    for channels, side in ((64, 32), (64, 31), (512, 7)):
        x = torch.randn(max(1, elements // (channels * side * side)), channels, side, side)
        shape = f"{channels} x {side} x {side}"
        last = x.to(memory_format=torch.channels_last)
        made[f"per channel, {shape}"] = (x, [0, 1, 0, 0], channels)
        made[f"per channel, {shape}, channels last"] = (last, [0, 1, 0, 0], channels)
        made[f"per sample, {shape}, channels last"] = (last, [1, 0, 0, 0], len(x))
    return made


def by_layout(elements: int, rounds: int) -> list[dict[str, object]]:
    stochastic, nearest = cast_arguments(Int(8), "stochastic"), cast_arguments(Int(8), "half_even")
    assert stochastic is not None and nearest is not None
    table = []
    for name, (x, strides, blocks) in layouts(elements).items():
        scale = torch.ones(blocks)
        calls: dict[str, Callable[[], object]] = {
            "clone": x.clone,
            "block_absmax": lambda: block_absmax(x, strides, blocks),  # noqa: B023
            "block_minmax": lambda: block_minmax(x, strides, blocks),  # noqa: B023
            "cast half_even": lambda: cast(x, scale, None, None, None, strides, *nearest, "half_even"),  # noqa: B023
            "cast stochastic": lambda: cast(  # noqa: B023
                x,  # noqa: B023
                scale,  # noqa: B023
                None,
                KEY,
                None,
                strides,  # noqa: B023
                *stochastic,
                "stochastic",
            ),
            "cast_absmax codes": lambda: cast_absmax(  # noqa: B023
                x,  # noqa: B023
                KEY,
                strides,  # noqa: B023
                blocks,  # noqa: B023
                127.0,
                *stochastic,
                "stochastic",
            ),
        }
        seconds = interleaved(calls, rounds)
        ratios = {call: seconds[call] / seconds["clone"] for call in seconds if call != "clone"}
        table.append({"layout": name, "clone_ms": seconds["clone"] * 1e3} | ratios)
    return table


def by_pair(rounds: int) -> list[dict[str, object]]:
    """int8 codes by row and by column (sample and channel): two calls of cast_absmax, and one of cast_absmax_pair."""
    table = []
    for shape in PAIRS:
        x = torch.randn(shape)
        if len(shape) == 4:
            x = x.to(memory_format=torch.channels_last)
        inside = [0] * (len(shape) - 2)
        first, second = ([1, 0, *inside], shape[0]), ([0, 1, *inside], shape[1])
        out = torch.empty_like(x, dtype=torch.int8)
        calls: dict[str, Callable[[], object]] = {
            "clone": x.clone,
            "two new results": lambda: [torch.empty_like(out).zero_() for _ in range(2)],  # noqa: B023
            "two old results": lambda: [out.zero_() for _ in range(2)],  # noqa: B023
        }
        for rounding in ("half_even", "stochastic"):
            key = KEY if rounding == "stochastic" else None
            arguments = cast_arguments(Int(8, narrow=True), rounding)
            assert arguments is not None
            calls |= pair_calls(x, key, first, second, (127.0, *arguments), rounding)
        seconds = interleaved(calls, rounds)
        ratios = {call: seconds[call] / seconds["clone"] for call in seconds if call != "clone"}
        table.append({"pair": " x ".join(map(str, shape)), "clone_ms": seconds["clone"] * 1e3} | ratios)
    return table


Partition = tuple[list[int], int]


def pair_calls(
    x: Tensor, key: Tensor | None, first: Partition, second: Partition, rest: tuple[Any, ...], rounding: str
) -> dict[str, Callable[[], object]]:
    half = x.to(torch.bfloat16)
    return {
        f"two {rounding}": lambda: [cast_absmax(x, key, *part, *rest, rounding) for part in (first, second)],
        f"pair {rounding}": lambda: cast_absmax_pair(x, key, key, *first, *second, *rest, rounding, rounding),
        f"bf16 {rounding}": lambda: cast_absmax_pair(half, key, key, *first, *second, *rest, rounding, rounding),
    }


def show(table: list[dict[str, object]]) -> None:
    head = list(max(table, key=len))
    print(f"{head[0]:42}" + "".join(f"{name:>19}" for name in head[1:]))
    for row in table:
        cells = (f"{row[name]:19.2f}" if name in row else f"{'-':>19}" for name in head[1:])
        print(f"{row[head[0]]:42}" + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--elements", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kinds = by_format(arguments.elements, arguments.rounds)
    blocks = by_layout(arguments.elements, arguments.rounds)
    pairs = by_pair(arguments.rounds)
    if arguments.json:
        print(json.dumps({"threads": arguments.threads, "formats": kinds, "layouts": blocks, "pairs": pairs}, indent=2))
        return
    print(f"{arguments.elements} elements, {arguments.threads} threads; clone in ms, the others as multiples of it")
    show(kinds)
    print()
    show(blocks)
    print()
    show(pairs)


if __name__ == "__main__":
    main()
