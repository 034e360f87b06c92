"""What explains the speed table: limits of the machine, sizes from which int8 wins, where the time of a step goes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from lowbit.lab.bench import times_in_turn
from lowbit.lab.speed.table import Case, Settings, row
from lowbit.lab.speed.training import conv_calls, gpt_shape, gpt_step, image_step, linear_calls


@row("limits", "What this machine reaches at best")
def limits(s: Settings) -> list[Case]:
    n = 64 if s.quick else 2048
    a, b = torch.randn(n, n), torch.randn(n, n)
    codes = (a * 30).to(torch.int8), (b * 30).to(torch.int8)
    half = a.bfloat16(), b.bfloat16()
    image = torch.randn(1, n, 1, n).to(memory_format=torch.channels_last)
    weight = torch.randn(n, n, 1, 1)
    out = torch.empty_like(a)
    large = torch.randn(1 << (16 if s.quick else 25))
    into = torch.empty_like(large)
    size, product = f"{large.nbytes >> 20} MiB", (2 * n**3, "Gop/s")
    # each with what it makes or moves, and in what unit that is told
    calls: dict[str, tuple[Callable[[], Any], tuple[int, str]]] = {
        f"float32 mm, {n}^3": (lambda: torch.mm(a, b, out=out), product),
        f"float32 as oneDNN's 1x1 convolution, {n}^3": (lambda: torch.conv2d(image, weight), product),
        f"bfloat16 mm, {n}^3": (lambda: half[0] @ half[1], product),
        f"int8 mm with int32 sums, {n}^3": (lambda: torch._int_mm(*codes), product),
        f"read of {size}": (large.sum, (large.nbytes, "GB/s")),
        f"write of {size}": (lambda: into.fill_(1.0), (large.nbytes, "GB/s")),
        f"copy of {size}, both ways": (lambda: into.copy_(large), (2 * large.nbytes, "GB/s")),
    }
    s.tell("limits")
    times = times_in_turn({name: call for name, (call, _) in calls.items()}, 2 if s.quick else 15, 8.0)
    cases = []
    for name, own in times.items():
        seconds, (amount, unit) = statistics.median(own), calls[name][1]
        cases.append(
            {"what": "machine", "case": name, "ms": 1000 * seconds, "rate": amount / seconds / 1e9, "unit": unit}
        )
    return cases


WIDTHS = (64, 128, 256, 384, 512, 768, 1024)
CHANNELS = (8, 16, 32, 64, 128)
TOKENS = (64, 256, 1024)


@row("break_even", "Sizes from which int8 wins, forward and backward")
def break_even(s: Settings) -> list[Case]:
    cases = []
    for tokens in (16,) if s.quick else TOKENS:
        for width in (16,) if s.quick else WIDTHS:
            what = f"linear, {tokens} tokens, {width} to {width}"
            calls = {k: v for k, v in linear_calls(tokens, width, width).items() if "oneDNN" not in k[0]}
            cases += [
                c | {"path": f"linear, {tokens} tokens", "size": width} for c in s.run(what, calls, {}, budget=0.7)
            ]
    for channels in (8,) if s.quick else CHANNELS:
        what = f"convolution 3x3, {channels} channels, 32x32, batch 32"
        calls = conv_calls(2 if s.quick else 32, channels, channels, 32, 3)
        path = {"path": "convolution 3x3, 32x32, batch 32", "size": channels}
        cases += [c | path for c in s.run(what, calls, {}, budget=1.5)]
    return cases


@row("profile", "Where the time of an int8 step goes, by operator")
def profile(s: Settings) -> list[Case]:
    steps = {
        "GPT blocks": gpt_step("int8", *gpt_shape(s)),
        "resnet20, channels-last": image_step("int8", s, "channels-last"),
    }
    cases = []
    for what, step in steps.items():
        s.tell(f"profile of {what}")
        for _ in range(1 if s.quick else 10):  # in the first ones the process still grows
            step()
        profiles = []
        for _ in range(1 if s.quick else 5):
            step()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                step()
            events = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
            profiles.append((sum(e.self_cpu_time_total for e in events), events))
        # what the profiler notes lies between the tensors, and where they no longer fit they cost page faults
        total, events = min(profiles, key=lambda profile: profile[0])
        for e in events[:12]:
            part = e.self_cpu_time_total
            cases.append({"what": what, "case": e.key, "ms": part / 1000, "share": part / total, "calls": e.count})
    return cases
