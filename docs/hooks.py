"""Pages made when the site is built: one for each method, from its docstring and card, and their index."""

from __future__ import annotations

import inspect

from mkdocs.structure.files import File

from lowbit.methods import METHODS, Entry
from lowbit.serial import TAG, to_data


def on_files(files, config):  # type: ignore[no-untyped-def]
    for name, entry in sorted(METHODS.items()):
        files.append(File.generated(config, f"methods/{name}.md", content=page(name, entry)))
    files.append(File.generated(config, "methods/index.md", content=index()))
    return files


def index() -> str:
    rows = ["| method | paper | year | area | quantizes |", "|---|---|---|---|---|"]
    for name, entry in sorted(METHODS.items()):
        card = entry.card
        rows.append(
            f"| [`{name}`]({name}.md) | {card.title} ({source(card.arxiv)}) | {card.year} | {card.area} | "
            f"{' '.join(card.roles) or 'nothing'} |"
        )
    return "# Methods\n\n" + "\n".join(rows) + "\n"


def source(arxiv: str) -> str:
    return f"[arXiv {arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv.replace(".", "").isdigit() else arxiv


def page(name: str, entry: Entry) -> str:
    card = entry.card
    title, _, body = entry.doc.partition("\n")
    parts = [f"# {name}", f"**{title}**", f"{card.title}, {card.year}, {source(card.arxiv)}.", blocks(body)]
    if card.headline:
        parts.append("## What the paper reports\n\n" + "\n".join(f"- {line}" for line in card.headline))
    options = inspect.signature(entry.function).parameters
    if options:
        rows = ["| option | default |", "|---|---|"]
        rows += [f"| `{o.name}` | `{o.default!r}` |" for o in options.values()]
        parts.append("## Options\n\n" + "\n".join(rows))
    if card.training:
        rows = [f"- {k}: `{v}`" for k, v in card.training.items()]
        parts.append("## Training settings it needs\n\n" + "\n".join(rows))
    parts.append(
        '## Use\n\n```python\nrecipe = lowbit.create("' + name + '")\nlowbit.apply(model, recipe)\n'
        "lowbit.attach(model, optimizer)\n```"
    )
    roles = {r: to_data(s) for r, s in entry.function().roles.named().items()}
    if roles:
        rows = ["| role | grid | rounding | gradient rule |", "|---|---|---|---|"]
        for role, data in roles.items():
            grid = ", ".join(f"{k}={v}" for k, v in data["format"].items() if k != TAG and v is not None)
            rows.append(f"| {role} | {data['format'][TAG]}({grid}) | {data['rounding']} | {data['backward'][TAG]} |")
        parts.append("## Roles by default\n\n" + "\n".join(rows))
    return "\n\n".join(p for p in parts if p.strip()) + "\n"


def blocks(text: str) -> str:
    """A docstring as Markdown: indented formulas become code blocks, the rest is kept."""
    out: list[str] = []
    code: list[str] = []
    for line in [*inspect.cleandoc(text).splitlines(), ""]:
        if line.startswith("    ") or (code and not line.strip() and code[-1].strip()):
            code.append(line)
            continue
        if code:
            out += ["", "```text", *inspect.cleandoc("\n".join(code)).splitlines(), "```", ""]
            code = []
        out.append(line)
    return "\n".join(out)
