"""Tables of the documentation, from the registry and from `results/*.json`.

A region is everything between `<!-- table:NAME -->` and `<!-- /table:NAME -->`:

    methods        every method: paper, area, roles
    paper          what each paper reports, and the best result of that method in `results/`
    results        one table a comparison in `results/`, with a heading
    speed          the rows with targets of `results/speed.json`, with headings
    speed-ROW      one row of it
    wins           sizes from which int8 wins, from its row `break_even`
    any other      the table of `results/NAME.json`, or all its tables if `lowbit bench --save` wrote it
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowbit.lab import speed
from lowbit.lab.compare import RESULT, shown, size_of
from lowbit.lab.runs import read_json, replace
from lowbit.methods import list_methods

__all__ = ["FILES", "refresh", "stored"]

FILES = ("README.md", "docs/results.md", "docs/speed.md")
SPEED = "speed"
"""The file in `results/` that "speed" and "speed-ROW" mean."""
REGION = re.compile(r"(<!-- table:(?P<name>[\w.-]+) -->\n)(?P<body>.*?)(<!-- /table:(?P=name) -->)", re.DOTALL)
OPENING = re.compile(r"<!-- table:([\w.-]+) -->")


def stored(root: Path) -> dict[str, dict[str, Any]]:
    """What the comparisons in `results/*.json` below `root` hold, by name.

    Raises:
        ValueError: a file that is not from `lowbit compare --save` or `lowbit bench --save`.
    """
    return _files(root, RESULT)


def measured(root: Path) -> dict[str, dict[str, Any]]:
    """The rows of each speed table in `results/*.json` below `root`, by the file's name.

    Raises:
        ValueError: a file that is not from `lowbit compare --save` or `lowbit bench --save`.
    """
    return {name: data["rows"] for name, data in _files(root, speed.SCHEMA).items()}


def _files(root: Path, schema: str) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted((root / "results").glob("*.json")):
        data = read_json(path)
        if not isinstance(data, dict) or data.get("schema") not in (RESULT, speed.SCHEMA):
            raise ValueError(f"{path} was not written by `lowbit compare --save` or `lowbit bench --save`")
        if data["schema"] == schema:
            found[path.stem] = data
    return found


def refresh(root: Path, check: bool = False) -> list[Path]:
    """Write the marked regions of `FILES` below `root` anew.

    Returns:
        The files whose tables were stale; with `check` they are left as they are.

    Raises:
        ValueError: a region without its end, or of a name that is no table.
    """
    results, speeds = stored(root), measured(root)
    stale = []
    for name in FILES:
        path = root / name
        if not path.is_file():
            continue
        old = path.read_text(encoding="utf-8")
        if sorted(OPENING.findall(old)) != sorted(m["name"] for m in REGION.finditer(old)):
            raise ValueError(f"{path}: a <!-- table:NAME --> has no <!-- /table:NAME --> after it")
        new, end = "", 0
        for m in REGION.finditer(old):
            new, end = new + old[end : m.start()] + m[1] + body(m["name"], results, speeds, path) + m[4], m.end()
        new += old[end:]
        if new != old:
            stale.append(path)
            if not check:
                replace(path, lambda temporary, text=new: temporary.write_text(text, encoding="utf-8"))  # type: ignore
    return stale


def body(name: str, results: dict[str, dict[str, Any]], speeds: dict[str, dict[str, Any]], path: Path) -> str:
    """The Markdown of a table, ending in a newline; "" if there is nothing to show."""
    rows = speeds.get(SPEED, {})
    if name == "methods":
        return methods()
    if name == "paper":
        return paper(results)
    if name == "results":
        return "\n".join(f"\n### {r['title']}\n\n{result(r)}" for r in results.values())
    if name == SPEED:
        return speed_rows([n for n in speed.ROWS if n in speed.TARGETS], rows)
    if name.partition("-")[0] == "speed" and name.partition("-")[2] in speed.ROWS:
        return speed_row(name.partition("-")[2], rows)
    if name == "wins":
        return wins(rows)
    if name in speeds:
        return speed_rows([n for n in speed.ROWS if n in speeds[name]], speeds[name])
    if name not in results:
        raise ValueError(
            f"{path}: no table {name!r}; there are methods, paper, results, speed, speed-ROW, wins and the files "
            f"in results/: {', '.join([*results, *speeds]) or 'none yet'}"
        )
    return result(results[name])


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([" ".join(c.replace("|", r"\|").split()) for c in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def source(arxiv: str) -> str:
    """A link for an arXiv number; other sources as they are."""
    return f"[arXiv {arxiv}](https://arxiv.org/abs/{arxiv})" if re.fullmatch(r"[\d.]+", arxiv) else arxiv


def methods() -> str:
    rows = [
        (f"`{c.name}`", c.title, f"{c.year}, {source(c.arxiv)}", c.area, " ".join(c.roles) or "none")
        for c in list_methods()
    ]
    return markdown(("method", "paper", "where", "area", "quantizes"), rows)


def paper(results: dict[str, dict[str, Any]]) -> str:
    rows = [(f"`{c.name}`", "<br>".join(c.headline), ours(c.name, results)) for c in list_methods() if c.headline]
    return markdown(("method", "the paper reports", "we get"), rows)


def ours(name: str, results: dict[str, dict[str, Any]]) -> str:
    """Every result of a method with default options, beside float32's on the same work."""
    lines = []
    for r in results.values():
        by = {m["key"]: m for m in r["methods"]}
        base = by.get(r["baseline"] or "")
        if name in by and by[name]["metric"] is not None:
            against = f", float {value(base, r)}" if base is not None and base["metric"] and name != "fp32" else ""
            lines.append(f"{r['title']}: {value(by[name], r)}{against}")
    return "<br>".join(lines) or "no run yet"


def value(method: dict[str, Any], results: dict[str, Any]) -> str:
    metric = results["metric"]
    unit = f" {metric['unit']}" if metric["unit"] else f" {metric['name']}"
    return shown(method["metric"]) + unit


def result(r: dict[str, Any]) -> str:
    metric, head = r["metric"], ["method"]
    head += [
        f"{metric['name']}{' ' + metric['unit'] if metric['unit'] else ''}",
        "W / A / E / G / U bits",
        "weights",
        "step time",
        "seeds",
        "optimizer",
    ]
    rows = []
    for m in r["methods"]:
        bits = " / ".join(f"{m['bits'][role]:.3g}" for role in "WAEGU") if m["bits"] else ""
        failed = "" if m["status"] == "ok" else f" ({m['status']}: {m['reason']})"
        training = m["training"]
        rows.append(
            (
                f"`{m['key']}`",
                shown(m["metric"]) + failed,
                bits,
                size_of(m["bytes"]) if m["bytes"] else "",
                f"{m['step']['ratio']:.2f}x" if m["step"] else "",
                ", ".join(map(str, r["seeds"])),
                f"{training['optimizer']}, lr {training['lr']:g}" if training else "",
            )
        )
    data, settings = r["data"], r["settings"]
    part = "" if data["limit"] is None else f", {data['limit']} training examples an epoch"
    where, threads = r["environment"], r["environment"]["threads"]
    line = (
        f"{settings['epochs']} epochs{part}, batch {settings['batch_size']}; {where['cpu']}, "
        f"{threads} thread{'s' if threads != 1 else ''}, PyTorch {where['torch']}; data "
        f"{data['fingerprint'][:12]}."
    )
    return f"{markdown(head, rows)}\n{line} `{r['command']}`\n"


def speed_rows(names: list[str], rows: dict[str, dict[str, Any]]) -> str:
    """Rows of a speed table, with headings."""
    return "\n".join(f"\n### {speed.ROWS[n][0]}\n\n{speed_row(n, rows)}" for n in names)


def speed_row(name: str, rows: dict[str, dict[str, Any]]) -> str:
    """The cases of a row, and where they were measured."""
    if name not in rows:
        return f"Not measured yet: `lowbit bench --rows {name} --save results/{SPEED}.json`.\n"
    section = rows[name]
    if "note" in section:
        return f"{section['note'].capitalize()}.\n"
    return f"{markdown(speed.head(section), speed.lines(section))}\n{machine(section)}\n"


def wins(rows: dict[str, dict[str, Any]]) -> str:
    if "break_even" not in rows:
        return speed_row("break_even", rows)
    section = rows["break_even"]
    head = ("forward and backward of", "int8 wins against", "from")
    return f"{markdown(head, speed.wins_from(section))}\n{machine(section)}\n"


def machine(section: dict[str, Any]) -> str:
    where, threads = section["environment"], section["environment"]["threads"]
    amx = "in use" if where["amx"] else "not in use"
    return (
        f"{where['cpu']}, {threads} thread{'s' if threads != 1 else ''}, AMX {amx}, "
        f"kernels {where['kernels'] or 'none'}, PyTorch {where['torch']}. `{section['command']}`"
    )
