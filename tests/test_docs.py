"""The documentation is true: it builds, its examples run, its tables are those of the registry and of results/."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import lowbit
from lowbit.lab import tables
from lowbit.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_the_tables_are_fresh() -> None:
    assert tables.refresh(ROOT, check=True) == [], "run `make tables`"


def test_the_readme_lists_every_method() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in METHODS if f"| `{name}` |" not in text]
    assert not missing


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = PYTHON.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "model-luq" / "model.safetensors").stat().st_size > 1000


def test_the_examples_of_the_recipe_page_run() -> None:
    import torch

    blocks = PYTHON.findall((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"))
    assert len(blocks) == 3
    names: dict[str, object] = {"lowbit": lowbit, "w": torch.randn(8, 16)}
    for code in blocks:
        exec(compile(code, "recipes.md", "exec"), names)
    both = names["both"]
    assert isinstance(both, lowbit.Recipe) and both.roles.E == lowbit.create("luq").roles.E
    assert isinstance(names["q"], lowbit.Quantizer)


def test_the_site_builds_with_a_page_for_every_method(tmp_path: Path) -> None:
    config = pytest.importorskip("mkdocs.config")
    build = pytest.importorskip("mkdocs.commands.build")
    logging.getLogger("mkdocs").setLevel(logging.ERROR)
    build.build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    for name, entry in METHODS.items():
        page = (tmp_path / "methods" / name / "index.html").read_text(encoding="utf-8")
        assert entry.card.title in page.replace("&amp;", "&")
