"""Pictures of a comparison: one HTML page with everything in it, and a small SVG for a README.

`write` takes the results of `compare` (its docstring lists the fields) and writes a page that needs no network: plotly
and the page's own script are inlined, and a content security policy names their hashes, so that no other script runs
and nothing is loaded. Text from the results is escaped by jinja; what the script reads is JSON in ASCII without `<`,
`>` and `&`. `plot` draws the two most important figures as SVG without a browser.

Fields that are absent or null are shown as missing; the same results always give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from .picture import COLOURS, complete, looks_of, mean_of, plain, plot
from .runs import replace

__all__ = ["plot", "write"]

ROLES = "WAEGU"
DASH = "–"


def write(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """The page of a comparison, written at once or not at all.

    Args:
        results: what `compare` returns and keeps as `results.json`.
        path: of the HTML file; its folder is made.

    Raises:
        ImportError: jinja2 or plotly is not installed.
        ValueError: `results` is something else.
    """
    try:
        import jinja2
        import plotly.offline
    except ImportError as e:
        raise ImportError(f"the page needs {e.name}: pip install 'lowbit[lab]'") from e
    data = complete(results)
    files = resources.files(__package__)
    scripts = [plotly.offline.get_plotlyjs(), files.joinpath("report.js").read_text(encoding="utf-8")]
    scripts = [s.replace("\r\n", "\n") for s in scripts]  # as a browser reads it, or the hash would not fit
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"show": _show, "num": _number, "size": _size, "percent": _percent}
    template = env.from_string(files.joinpath("report.html.j2").read_text(encoding="utf-8"))
    text = template.render(
        r=data,
        scripts=scripts,
        hashes=hashes,
        payload=_json(_payload(data)),
        table=_table(data),
        looks=looks_of(data),
        lead=_lead(data),
        papers={m["key"]: _paper(m) for m in data["methods"]},
        roles=ROLES,
        colours=COLOURS,
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace(target, lambda temporary: temporary.write_bytes(text.encode("utf-8", "replace")))
    return target


def _json(value: Any) -> str:
    """JSON that is safe inside a script element: ASCII only, and nothing that could end or open an element."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _band(rows: Iterable[Sequence[Mapping[str, Any]]], x: str, y: str) -> dict[str, list[float]]:
    """Mean and sample standard deviation over the seeds that have a value, at each x."""
    found: dict[float, list[float]] = {}
    for curve in rows:
        for point in curve:
            if point.get(x) is not None and point.get(y) is not None:
                found.setdefault(point[x], []).append(point[y])
    xs = sorted(found)
    spread = [statistics.stdev(found[i]) if len(found[i]) > 1 else 0.0 for i in xs]
    return {"x": xs, "mean": plain([statistics.fmean(found[i]) for i in xs]), "sd": plain(spread)}


def _payload(data: dict[str, Any]) -> dict[str, Any]:
    looks, methods = looks_of(data), []
    for m in data["methods"]:
        epochs = [run.get("curve") or [] for run in m["runs"]]
        curves = {y: _band(epochs, "epoch", y) for y in ("train_loss", "test_loss", "train_metric", "test_metric")}
        curves["batch_loss"] = _band([run.get("steps") or [] for run in m["runs"]], "step", "loss")
        kept = {k: m[k] for k in ("key", "status", "metric", "bits", "bytes", "step", "histograms")}
        layers = [
            {k: row.get(k) for k in ("layer", "role", "format", "bits", "scale", "sqnr", "exact", "clipped", "zero")}
            for row in m["layers"]
            if row.get("role") != "-"
        ]
        methods.append(kept | looks[m["key"]] | {"curves": curves, "layers": layers})
    return {"metric": data["metric"], "baseline": data["baseline"], "methods": methods}


# Text


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return DASH
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.3g} %"


def _size(value: float | None) -> str:
    if value is None:
        return DASH
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _show(value: Any) -> str:
    """One line for a plain value."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_show(v)}" for k, v in value.items()) or DASH
    if isinstance(value, list):
        return " × ".join(map(str, value)) if all(isinstance(v, int) for v in value) else ", ".join(map(_show, value))
    if value is None or value == "":
        return DASH
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _figure(value: float | None, unit: str, sign: str = "") -> str:
    """A metric with as many digits as are worth reading."""
    return DASH if value is None else f"{value:{sign}.{2 if unit == '%' or abs(value) < 100 else 1}f}"


def _paper(m: Mapping[str, Any]) -> str:
    """Address of the paper, or "" where `arxiv` is not a number of arXiv."""
    return f"https://arxiv.org/abs/{m['arxiv']}" if re.fullmatch(r"\d{4}\.\d{4,5}", str(m["arxiv"])) else ""


def _lead(data: dict[str, Any]) -> str:
    """The sentence under the title."""
    name, unit = data["metric"]["name"], data["metric"]["unit"]
    done = [m for m in data["methods"] if mean_of(m) is not None]
    base = next((m for m in done if m["key"] == data["baseline"]), None)
    best = next((m for m in done if m is not base), None)
    parts = [f"{base['key']} reaches {name} {_figure(mean_of(base), unit)}{unit and ' ' + unit}"] if base else []
    if best:
        others = sum(m["key"] != data["baseline"] for m in data["methods"])
        text = f"{best['key']} is the best of {others} methods with" if others > 1 else f"{best['key']} reaches"
        parts.append(f"{text} {_figure(mean_of(best), unit)}{unit and ' ' + unit}")
    bad = [m["key"] for m in data["methods"] if m["status"] != "ok"]
    return "; ".join(parts + ([f"{len(bad)} failed or diverged"] if bad else []))


def _table(data: dict[str, Any]) -> dict[str, Any]:
    """Heads and rows of the headline table; a cell has text, a small second line, a value to sort by and `best`."""
    metric, base = data["metric"], next((m for m in data["methods"] if m["key"] == data["baseline"]), None)
    unit = metric["unit"]
    heads = [f"{metric['name'].capitalize()}{unit and ', ' + unit}"]
    makers: list[Callable[[dict[str, Any]], tuple[Any, ...]]] = []

    def of_metric(m: dict[str, Any]) -> tuple[Any, ...]:
        got = m["metric"] or {}
        values, spread = got.get("values") or [], got.get("spread")
        done = sum(v is not None for v in values)
        few = f"{done} of {len(values)} seeds" if 0 < done < len(values) else ""
        text = _figure(mean_of(m), unit) + (f" ± {_figure(spread, unit)}" if spread is not None else "")
        return text, few, mean_of(m)

    makers.append(of_metric)
    if base is not None and mean_of(base) is not None:
        origin: float = mean_of(base)  # type: ignore[assignment]
        heads.append(f"Against {base['key']}")

        def against(m: dict[str, Any]) -> tuple[Any, ...]:
            value = mean_of(m)
            if m is base or value is None:
                return DASH, "", 0.0 if m is base else None
            return _figure(value - origin, unit, "+").replace("-", "−"), "", value - origin

        makers.append(against)
    for role in ROLES:
        heads.append(f"{role} bits")
        makers.append(partial(_bits_cell, role))
    heads += ["Weights", "Step time"]
    whole = (base or {}).get("bytes")

    def weights(m: dict[str, Any]) -> tuple[Any, ...]:
        return _size(m["bytes"]), f"{m['bytes'] / whole:.3g} ×" if whole and m["bytes"] else "", m["bytes"]

    def time(m: dict[str, Any]) -> tuple[Any, ...]:
        ratio, ms = ((m["step"] or {}).get(k) for k in ("ratio", "ms"))
        return DASH if ratio is None else f"{ratio:.2f} ×", "" if ms is None else f"{ms:.3g} ms", ratio

    makers += [weights, time]
    rows = [[dict(zip(("text", "sub", "value"), make(m), strict=True)) for make in makers] for m in data["methods"]]
    for head, better in (heads[0], metric["better"]), ("Weights", "lower"), ("Step time", "lower"):
        column = heads.index(head)
        cells = [
            r[column]
            for m, r in zip(data["methods"], rows, strict=True)
            if m is not base and r[column]["value"] is not None
        ]
        top = (max if better == "higher" else min)((c["value"] for c in cells), default=None)
        for cell in cells:
            cell["best"] = len(cells) > 1 and cell["value"] == top
    return {"heads": heads, "rows": rows}


def _bits_cell(role: str, m: Mapping[str, Any]) -> tuple[Any, ...]:
    value = (m["bits"] or {}).get(role)
    return _number(value), "", value
