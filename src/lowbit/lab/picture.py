"""The results of a comparison as one small picture: SVG without a browser, for a README.

Left the metric of each method with its seeds, right the metric against the mean bits of weights, activations and
errors. What the page of `report_html` shares with the picture is here too: complete results, colours and styles.
"""

from __future__ import annotations

import math
import os
import statistics
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .runs import replace

__all__ = ["COLOURS", "complete", "looks_of", "mean_of", "plain", "plot"]

SCHEMA = "lowbit-compare-1"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#C05C97", "#B87F00", "#4199D6")
"""After Okabe and Ito (2008), "Color Universal Design", the lighter ones darkened to stay visible on white."""
INK, GREY, FAINT = "#1c2128", "#59636e", "#dde1e6"
SHAPES = ("M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z", "M-4.5-4.5H4.5V4.5H-4.5Z", "M0-6L5.5 4.5H-5.5Z", "M0-6L6 0L0 6L-6 0Z")
"""Markers; the page has a dash for each as well, so 24 methods look different."""


def complete(results: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(results, Mapping) or results.get("schema") != SCHEMA or not results.get("methods"):
        found = results.get("schema") if isinstance(results, Mapping) else type(results).__name__
        raise ValueError(f"results must be those of compare, schema {SCHEMA!r}, with a method in them; got {found!r}")
    data = plain(results)
    if any(not isinstance(m, dict) or not isinstance(m.get("key"), str) for m in data["methods"]):
        raise ValueError('every method of the results needs its "key"; are they complete?')
    empty: dict[str, Any] = {
        "title": "",
        "created": "",
        "command": "",
        "task": "",
        "baseline": None,
        "ranking": [],
        "data": {},
        "model": {},
        "settings": {},
        "seeds": [],
        "environment": {},
    }
    method: dict[str, Any] = {
        "title": "",
        "year": None,
        "arxiv": "",
        "area": "",
        "summary": "",
        "status": "ok",
        "reason": "",
        "metric": None,
        "bits": None,
        "bytes": None,
        "step": None,
        "training": {},
        "roles": {},
        "runs": [],
        "layers": [],
        "histograms": [],
        "options": {},
    }
    data = empty | {k: v for k, v in data.items() if v is not None}
    data["metric"] = {"name": "loss", "unit": "", "better": "lower"} | (data.get("metric") or {})
    full = [method | {k: v for k, v in m.items() if v is not None} for m in data["methods"]]
    for m in full:
        m["roles"] = {role: m["roles"][role] for role in sorted(m["roles"], key=lambda r: "WAEGU".find(r[:1]))}
    place = {key: i for i, key in enumerate(data["ranking"])}
    data["methods"] = sorted(full, key=lambda m: place.get(m["key"], len(place)))
    return data


def plain(value: Any) -> Any:
    """JSON values: numbers of six digits, None for those that are not finite."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return str(value)


def looks_of(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour and style of each method, the same whatever its rank; the baseline has the colour of the text."""
    keys = sorted(m["key"] for m in data["methods"] if m["key"] != data["baseline"])
    looks = {k: {"colour": i % len(COLOURS), "style": i // len(COLOURS) % len(SHAPES)} for i, k in enumerate(keys)}
    return looks | {data["baseline"]: {"colour": -1, "style": 0}}


def mean_of(m: Mapping[str, Any]) -> float | None:
    return (m["metric"] or {}).get("mean")


def plot(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Metric by method with its spread, and against the mean bits of W, A and E, as SVG.

    Raises:
        ValueError: `results` is not from `compare`, or `path` does not end in .svg.
    """
    target = Path(path)
    if target.suffix.lower() != ".svg":
        raise ValueError(f"pictures are SVG; got {target.name!r}, end it in .svg")
    data = complete(results)
    shown = [m for m in data["methods"] if mean_of(m) is not None]
    height = max(380, 24 * len(data["methods"]) + 110)
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 1000 {height}",
            "font-family": "system-ui, sans-serif",
            "font-size": "13",
            "fill": INK,
        },
    )
    _mark(svg, "rect", width=1000, height=height, rx=8, fill="#ffffff")
    _text(svg, 20, 30, data["title"], 50, font_size=16, font_weight=600)
    values = [v for m in shown for v in (*(m["metric"].get("values") or []), mean_of(m)) if v is not None] or [0.0, 1.0]
    pad = (max(values) - min(values)) * 0.05 or abs(values[0]) * 0.05 or 1.0
    low, high = min(values) - pad, max(values) + pad
    label = _short(data["metric"]["name"], 24) + (data["metric"]["unit"] and ", " + data["metric"]["unit"])
    looks, bottom = looks_of(data), height - 55

    def across(v: float) -> float:
        return 190 + (v - low) / (high - low) * 280

    for tick in _ticks(low, high):
        _mark(svg, "line", x1=across(tick), x2=across(tick), y1=50, y2=bottom, stroke=FAINT)
        _text(svg, across(tick), bottom + 18, f"{tick:g}", anchor="middle", fill=GREY)
    _text(svg, 330, bottom + 40, f"{label}: mean, seeds, ± spread", 48, anchor="middle", fill=GREY)
    for i, m in enumerate(data["methods"]):
        y, look = 50 + (i + 0.5) * (bottom - 50) / len(data["methods"]), looks[m["key"]]
        _text(svg, 180, y + 4, m["key"], 20, anchor="end")
        mean = mean_of(m)
        if mean is None:
            _text(svg, 196, y + 4, f"{m['status']}: {m['reason']}", 42, fill=GREY, font_style="italic")
            continue
        spread, colour = m["metric"].get("spread") or 0.0, _colour(look)
        left, right = across(max(mean - spread, low)), across(min(mean + spread, high))
        _mark(svg, "line", x1=left, x2=right, y1=y, y2=y, stroke=colour, stroke_width=2)
        for value in m["metric"].get("values") or []:
            if value is not None:
                _mark(svg, "circle", cx=across(value), cy=y, r=2.5, fill="none", stroke=colour)
        _point(svg, across(mean), y, look)

    bits = {
        m["key"]: statistics.fmean(b)
        for m in shown
        if (b := [m["bits"][r] for r in "WAE" if (m["bits"] or {}).get(r) is not None])
    }
    x0, x1 = 570.0, 970.0
    first, last = min([2.0, *bits.values()]), max([32.0, *bits.values()])

    def over(b: float) -> float:
        return x0 + 20 + math.log2(b / first) / math.log2(last / first) * (x1 - x0 - 40)

    def up(v: float) -> float:
        return bottom - (v - low) / (high - low) * (bottom - 50)

    for tick in _ticks(low, high):
        _mark(svg, "line", x1=x0, x2=x1, y1=up(tick), y2=up(tick), stroke=FAINT)
        _text(svg, x0 - 8, up(tick) + 4, f"{tick:g}", anchor="end", fill=GREY)
    for tick in (1, 2, 4, 8, 16, 32):
        if first <= tick <= last:
            _mark(svg, "line", x1=over(tick), x2=over(tick), y1=50, y2=bottom, stroke=FAINT)
            _text(svg, over(tick), bottom + 18, str(tick), anchor="middle", fill=GREY)
    _text(svg, (x0 + x1) / 2, bottom + 40, "mean bits of W, A and E (log scale)", anchor="middle", fill=GREY)
    _text(svg, x0, 42, label, 40, fill=GREY)
    points = [(over(bits[m["key"]]), up(mean_of(m)), m["key"]) for m in shown if m["key"] in bits]  # type: ignore[arg-type]
    for x, y, key in points:
        _point(svg, x, y, looks[key])
    for (x, y, key), box in zip(points, _places(points, (x0, 50.0, x1, bottom)), strict=True):
        if box is not None:
            near = min(max(x, box[0]), box[2]), (box[1] + box[3]) / 2
            if math.dist(near, (x, y)) > 16:
                _mark(svg, "line", x1=x, y1=y, x2=near[0], y2=near[1], stroke=GREY, stroke_width=0.6)
            _text(svg, box[0], box[3] - 3, key, 18, font_size=12)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace(target, lambda temporary: temporary.write_bytes(ET.tostring(svg, encoding="utf-8")))
    return target


def _colour(look: Mapping[str, Any]) -> str:
    return INK if look["colour"] < 0 else COLOURS[look["colour"]]


def _mark(parent: ET.Element, tag: str, **attributes: Any) -> ET.Element:
    plain = {k.replace("_", "-"): f"{v:.2f}" if isinstance(v, float) else str(v) for k, v in attributes.items()}
    return ET.SubElement(parent, tag, plain)


def _short(text: str, most: int) -> str:
    """Without what XML can't hold, in at most `most` columns."""
    clean = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Cn") else c for c in text)
    return clean if _columns(clean) <= most else clean[: max(1, most // (1 + (_columns(clean) > len(clean))) - 1)] + "…"


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _text(parent: ET.Element, x: float, y: float, text: str, most: int = 99, anchor: str = "start", **how: Any) -> None:
    _mark(parent, "text", x=x, y=y, text_anchor=anchor, **how).text = _short(text, most)


def _point(svg: ET.Element, x: float, y: float, look: Mapping[str, Any]) -> None:
    _mark(svg, "path", d=SHAPES[look["style"]], transform=f"translate({x:.2f} {y:.2f})", fill=_colour(look))


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 7)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _places(points: list[tuple[float, float, str]], area: tuple[float, float, float, float]) -> list[Any]:
    """A box (left, top, right, bottom) for each point's label that meets no other label or point; None without room."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y, _ in points]
    found: list[Any] = []
    for x, y, key in points:
        wide = 6.8 * _columns(_short(key, 18)) + 2
        spots = (
            (x + s * (9 + abs(d) / 3) - (s < 0) * wide - (s == 0) * wide / 2, y + d - 8)
            for d in (v * sign for v in (*range(0, 60, 6), *range(60, 400, 12)) for sign in (-1, 1))
            for s in ((1, -1, 0) if abs(d) > 14 else (1, -1))
        )
        boxes = ((a, b, a + wide, b + 16) for a, b in spots)
        box = next(
            (
                b
                for b in boxes
                if b[0] >= area[0]
                and b[1] >= area[1]
                and b[2] <= area[2]
                and b[3] <= area[3]
                and all(b[0] >= t[2] or b[2] <= t[0] or b[1] >= t[3] or b[3] <= t[1] for t in taken)
            ),
            None,
        )
        if box is not None:
            taken.append(box)
        found.append(box)
    return found
