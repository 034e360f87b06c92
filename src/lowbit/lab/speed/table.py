"""Rows of the speed table: how they are measured, judged, kept and shown."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowbit.lab.bench import ratio, times_in_turn
from lowbit.lab.compare import size_of
from lowbit.lab.runs import environment, read_json, write_json
from lowbit.ops.backends import compiled_isas, using_isa
from lowbit.serial import nearest

__all__ = [
    "ROWS",
    "SCHEMA",
    "TARGETS",
    "Calls",
    "Case",
    "Settings",
    "head",
    "lines",
    "measure",
    "reached",
    "row",
    "save",
    "wins_from",
]

SCHEMA = "lowbit-speed-1"
Case = dict[str, Any]
Calls = dict[tuple[str, str], Callable[[], Any]]
"""By case and layout ("" where there is one)."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long to measure, and whom to tell."""

    quick: bool = False
    """Small shapes and few rounds: whether it runs, not how fast."""
    tell: Callable[[str], None] = lambda what: None

    def run(self, what: str, calls: Calls, targets: dict[str, dict[str, float]], budget: float = 6.0) -> list[Case]:
        """Cases of one comparison; the first call is what the others are compared with."""
        self.tell(what)
        times = times_in_turn(calls, 2, 0.0, 2) if self.quick else times_in_turn(calls, 51, budget, 3)
        best: dict[str, tuple[str, list[float]]] = {}
        for (case, layout), own in times.items():
            if case not in best or statistics.median(own) < statistics.median(best[case][1]):
                best[case] = layout, own
        _, first = next(iter(best.values()))
        made = []
        for case, (layout, own) in best.items():
            made.append(
                {
                    "what": what,
                    "case": f"{case}, {layout}" if layout else case,
                    "ms": 1000 * statistics.median(own),
                    "rounds": len(own),
                    "ratio": ratio(own, first),
                    "target": targets.get(case),
                    "slower_layouts": {
                        at: 1000 * statistics.median(t) for (c, at), t in times.items() if c == case and at != layout
                    },
                }
            )
        return made


Row = Callable[[Settings], list[Case]]
ROWS: dict[str, tuple[str, Row]] = {}
"""Title and measurement of each row, in the order of the table."""


def row(name: str, title: str) -> Callable[[Row], Row]:
    def register(function: Row) -> Row:
        ROWS[name] = title, function
        return function

    return register


def least(value: float, aim: float) -> dict[str, float]:
    return {"least": value, "aim": aim}


def most(value: float, aim: float) -> dict[str, float]:
    return {"most": value, "aim": aim}


TARGETS: dict[str, dict[str, dict[str, float]]] = {
    "gpt": {"float32": least(2.5, 4.0), "bfloat16": least(1.2, 1.6)},
    "linear": {"float32": least(3.0, 5.0), "bfloat16": least(1.2, 1.8)},
    "resnet20": {"float32": least(1.15, 1.5)},
    "conv": {"float32": least(1.8, 2.8), "bfloat16": least(1.0, 1.4)},
    "saved": {"int8": most(0.4, 0.3)},
    "simulated": {"": most(1.6, 1.3)},
    "cast": {"": most(3.0, 2.0)},
    "binary": {"float32": least(15.0, 40.0)},
    "packed": {"float32": least(3.0, 6.0)},
}
"""By row and case; "" is every case but the first."""


def reached(case: Case) -> str:
    """Whether a case reaches its target: "aim", "yes", "no", or "" where there is none."""
    target = case.get("target")
    if not target:
        return ""
    sign = 1 if "least" in target else -1
    figure = sign * case["ratio"]
    if figure >= sign * target["aim"]:
        return "aim"
    return "yes" if figure >= sign * target.get("least", target.get("most")) else "no"


def measure(names: list[str], settings: Settings) -> dict[str, dict[str, Any]]:
    """Sections by row: {"title", "created", "environment", "command", "cases"}, and "note" where one was not measured.

    Raises:
        ValueError: an unknown row.
    """
    for name in names:
        if name not in ROWS:
            raise ValueError(f"unknown row {name!r}; {nearest(name, ROWS)}")
    where = processor()
    with using_isa(where["kernels"]) if where["kernels"] else contextlib.nullcontext():
        return {name: section(name, settings, where) for name in names}


def section(name: str, settings: Settings, where: dict[str, Any]) -> dict[str, Any]:
    title, function = ROWS[name]
    made: dict[str, Any] = {
        "title": title,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "environment": environment() | where,
        "command": command(name, settings),
    }
    torch.manual_seed(0)
    try:
        return made | {"cases": function(settings)}
    except ImportError as error:  # an operator that this version has not
        return made | {"cases": [], "note": f"not measured: {error}"}


def command(name: str, settings: Settings) -> str:
    """What measures a row again."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    start = f"ONEDNN_MAX_CPU_ISA={limit} " if limit else ""
    return f"{start}lowbit bench --rows {name} --threads {torch.get_num_threads()}{' --quick' * settings.quick}"


def processor() -> dict[str, Any]:
    """Instructions of this processor that decide how fast int8 and bfloat16 are, whether PyTorch's oneDNN may use AMX,
    and our kernels: with AMX only where oneDNN has it too."""
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                flags = set(line.split(":", 1)[1].split())
                break
    except OSError:
        pass
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    named = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if f in flags]
    amx = "amx_int8" in flags and (limit is None or "AMX" in limit.upper() or limit.upper() in ("ALL", "DEFAULT"))
    kernels = [isa for isa in compiled_isas() if amx or not isa.endswith("amx")]
    return {
        "instructions": named,
        "amx": amx,
        "ONEDNN_MAX_CPU_ISA": limit,
        "kernels": kernels[0] if kernels else None,
    }


def save(path: Path, sections: dict[str, dict[str, Any]]) -> None:
    """Write sections to a file; those of other rows that it holds stay, in the order of the table.

    Raises:
        ValueError: a file that is something else.
    """
    held: dict[str, Any] = {}
    if path.exists():
        data = read_json(path)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"{path} was not written by `lowbit bench --save`; name another file")
        held = data["rows"]
    held |= sections
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"schema": SCHEMA, "rows": {name: held[name] for name in ROWS if name in held}})


# ---- showing ---------------------------------------------------------------------------------------------------------


def wins_from(section: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Path, opponent and the smallest measured size from which int8 is faster there and at all larger ones."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for c in section["cases"]:
        opponent = c["case"].partition(",")[0]
        if opponent != "int8":
            found.setdefault((c["path"], opponent), {})[c["size"]] = c["ratio"]
    lines = []
    for (path, opponent), ratios in found.items():
        size = None
        for n in sorted(ratios, reverse=True):
            if ratios[n] <= 1:
                break
            size = n
        tried = f"{min(ratios)} to {max(ratios)}"
        lines.append((path, opponent, f"{size}" if size is not None else f"nowhere in {tried}"))
    return lines


def head(section: dict[str, Any]) -> tuple[str, ...]:
    """Columns that the cases of a section need."""
    cases = section["cases"]
    columns = ["what", "case"]
    if any("ms" in c for c in cases):
        columns.append("ms")
    columns += [name for name in ("bytes", "rate", "share", "ratio") if any(name in c for c in cases)]
    if any(c.get("target") for c in cases):
        columns += ["at least / at most", "aim", "reached"]
    return tuple(columns)


def lines(section: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cases as text, for the columns of `head`."""
    made, last = [], None
    for c in section["cases"]:
        target = c.get("target") or {}
        limit = next((f"{sign} {target[k]:g}x" for k, sign in (("least", "≥"), ("most", "≤")) if k in target), "")
        text = {
            "what": "" if c["what"] == last else c["what"],
            "case": c["case"],
            "ms": f"{c['ms']:.3f}" if "ms" in c else "",
            "bytes": size_of(c["bytes"]) if "bytes" in c else "",
            "rate": f"{c['rate']:.0f} {c['unit']}" if "rate" in c else "",
            "share": f"{100 * c['share']:.1f} %" if "share" in c else "",
            "ratio": f"{c['ratio']:.2f}x" if "ratio" in c else "",
            "at least / at most": limit,
            "aim": f"{target['aim']:g}x" if target else "",
            "reached": reached(c),
        }
        last = c["what"]
        made.append(tuple(text[column] for column in head(section)))
    return made
