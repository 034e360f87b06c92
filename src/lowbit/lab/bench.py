"""Speed of this machine: a training step in float32, bfloat16 and low-bit simulation, and each operator.

Everything compared is measured in turn, round by round, and the median of the ratios within a round is shown: what else
the machine does then hits all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lowbit.lab.compare import step_times
from lowbit.lab.dataset import Data
from lowbit.lab.loop import Config, resolve
from lowbit.methods import METHODS
from lowbit.ops.backends import backends, definition
from lowbit.ops.int8_mm import int8_mm
from lowbit.recipe import Int32
from lowbit.rng import uniform

__all__ = ["bench", "in_turn", "random_images", "ratio", "times_in_turn"]

SIZES = (128, 512, 1024)
"""Products of square matrices of these sizes."""


def times_in_turn(
    calls: dict[Any, Callable[[], Any]], rounds: int = 15, budget: float = 3.0, least: int = 3
) -> dict[Any, list[float]]:
    """Seconds of each call in each round, after two rounds that don't count. No round begins after `budget` seconds,
    once there are `least`."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for i in range(rounds + 2):
        if i >= least + 2 and time.perf_counter() - began > budget:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(own: list[float], reference: list[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(own, reference, strict=True))


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int = 15, budget: float = 3.0) -> dict[str, dict[str, Any]]:
    """Median time of each call, and of its ratio to the first one's in the same round."""
    times = times_in_turn(calls, rounds, budget)
    first = next(iter(times.values()))
    return {
        name: {"ms": 1000 * statistics.median(own), "rounds": len(own), "ratio": ratio(own, first)}
        for name, own in times.items()
    }


def random_images(batch: int, shape: tuple[int, int, int] = (3, 32, 32)) -> Data:
    """Images and labels without meaning."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (4 * batch, *shape), generator=g, dtype=torch.uint8)
    y = torch.randint(10, (4 * batch,), generator=g)
    return Data(
        "classification",
        (x, y),
        (x, y),
        shape,
        10,
        tuple("0123456789"),
        "random images",
        "0" * 64,
        (127.5,) * shape[0],
        (73.9,) * shape[0],
    )


def bench(
    model: str = "lenet5",
    methods: tuple[str, ...] = ("int8", "luq"),
    batch: int = 32,
    rounds: int = 15,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows {"what", "case", "ms", "ratio", "rounds"}; the ratio is to the first case of the same `what`.

    Args:
        model: whose training step is measured, on random 32x32 images.
        methods: simulated beside float32 and bfloat16; those that are not in the registry are left out.
        batch: images in a batch.
        rounds: rounds of each measurement at most.
        progress: told what is being measured.

    Raises:
        ValueError: unknown model, or sizes below 1.
    """
    data = random_images(batch)
    configs = {
        "fp32": Config(model=model, batch_size=batch, data="images"),
        "bf16 autocast": Config(model=model, batch_size=batch, data="images", amp="bf16"),
    }
    configs |= {
        f"{m} simulated": Config(method=m, model=model, batch_size=batch, data="images")
        for m in methods
        if m in METHODS
    }
    full = {name: resolve(config, data) for name, config in configs.items()}
    times = step_times(full, data, rounds=rounds, budget=20.0, progress=progress)
    rows = [{"what": f"training step, {model}, batch {batch}", "case": k} | v for k, v in times.items()]
    for what, calls in (_products() | _operators()).items():
        if progress is not None:
            progress(what)
        rows += [{"what": what, "case": k} | v for k, v in in_turn(calls, rounds).items()]
    return rows


def _products() -> dict[str, dict[str, Callable[[], Any]]]:
    found: dict[str, dict[str, Callable[[], Any]]] = {}
    for n in SIZES:
        a, b = (uniform((n, n), stream=i) - 0.5 for i in range(2))
        half, codes = (a.bfloat16(), b.bfloat16()), ((a * 254).to(torch.int8), (b * 254).to(torch.int8))
        found[f"product {n}x{n}x{n}"] = {
            "float32": lambda a=a, b=b: a @ b,  # type: ignore[misc]
            "bfloat16": lambda h=half: h[0] @ h[1],  # type: ignore[misc]
            "lowbit::int8_mm": lambda c=codes: int8_mm(*c),  # type: ignore[misc]
        }
    return found


def _operators() -> dict[str, dict[str, Callable[[], Any]]]:
    """Each operator with a faster implementation than its definition, on this machine, beside the definition."""
    key = torch.tensor([0, 0, 0])
    a, b = uniform((64, 256)), uniform((256, 64))
    codes = (a * 127).to(torch.int8), (b * 127).to(torch.int8), Int32().split
    arguments: dict[str, tuple[Any, ...]] = {
        "lowbit::uniform": (key, [1 << 18]),
        "lowbit::chunked_mm": (a, b, 64, 6, 9, 31),
        "lowbit::int8_mm": codes,
    }
    found: dict[str, dict[str, Callable[[], Any]]] = {}
    for row in backends():
        if row.active and row.device == "cpu" and row.operator in arguments and "definition" not in row.implementation:
            slow, given = definition(row.operator), arguments[row.operator]
            fast = getattr(torch.ops.lowbit, row.operator.partition("::")[2])
            found[row.operator] = {
                "PyTorch definition": partial(slow, *given),
                row.implementation: partial(fast, *given),
            }
    return found
