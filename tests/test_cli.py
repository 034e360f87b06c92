"""The command line: what it prints, its exit status, and that an error is one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import lowbit
from lowbit.lab.commands import app, pairs
from lowbit.methods import METHODS

TINY = [
    "--data",
    "digits",
    "--model",
    "mlp",
    "--model-option",
    "hidden=[16,16]",
    "--epochs",
    "1",
    "--limit",
    "128",
    "--device",
    "cpu",
]


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Runs a command in an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        result = CliRunner().invoke(app, list(words))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert "Traceback" not in result.stderr
        return result.exit_code, result.stdout, result.stderr

    return run


def test_version_and_help(cli):
    assert cli("--version") == (0, f"lowbit {lowbit.__version__}\n", "")
    status, text, _ = cli("--help")
    commands = ("methods", "show", "backends", "train", "compare", "bench", "tables")
    assert status == 0 and all(f" {name} " in text for name in commands)
    for name in commands:
        status, text, _ = cli(name, "--help")
        assert status == 0 and f"lowbit {name}" in text  # each has an example
    assert cli("nothing")[0] == 2 and cli("train", "--nothing")[0] == 2


def test_methods(cli):
    status, text, _ = cli("methods")
    assert status == 0 and all(f" {name} " in text for name in METHODS)
    rows = json.loads(cli("methods", "--role", "W", "--json")[1])
    assert [r["name"] for r in rows] == [c.name for c in lowbit.list_methods(role="W")]
    twn = next(r for r in rows if r["name"] == "twn")
    assert (twn["year"], twn["arxiv"], twn["roles"]) == (2016, "1605.04711", ["W"])
    assert [r["name"] for r in json.loads(cli("methods", "--area", "baseline", "--json")[1])] == ["fp32"]
    status, text, error = cli("methods", "--role", "X")
    assert (status, text) == (2, "") and error.startswith("lowbit: unknown role 'X'") and error.count("\n") == 1


def test_show(cli):
    status, text, _ = cli("show", "twn")
    assert status == 0
    for part in (
        "Ternary Weight Networks (2016, arXiv 1605.04711)",
        "delta = 0.7 * mean|w|",
        "threshold",
        "0.7",
        "Int(bits=2",
        "92.56 % ternary",
    ):
        assert part in text, part
    data = json.loads(cli("show", "twn", "--json")[1])
    assert data["options"]["threshold"] == 0.7 and data["options"]["blocks"] == {"spec": "PerTensor"}
    assert lowbit.Recipe.from_json(json.dumps(data["recipe"])) == lowbit.create("twn")
    status, _, error = cli("show", "twm")
    assert status == 2 and "did you mean 'twn'" in error


@pytest.mark.parametrize("name", sorted(METHODS))
def test_show_every_method(cli, name):
    assert cli("show", name)[0] == 0
    assert json.loads(cli("show", name, "--json")[1])["name"] == name


def test_backends(cli):
    rows = json.loads(cli("backends", "--json")[1])
    assert [vars(r) for r in lowbit.backends()] == rows and "lowbit::uniform" in cli("backends")[1]


def test_train(cli, tmp_path):
    words = ["train", "--method", "twn", "--option", "threshold=0.5", "--layers", "linear", *TINY]
    status, text, _ = cli(*words)
    assert status == 0 and text.startswith("accuracy ") and "runs/twn-mlp-digits-s0" in text
    config = json.loads((tmp_path / "runs/twn-mlp-digits-s0/config.json").read_text())
    assert config["options"] == {"threshold": 0.5, "layers": ["linear"]} and config["epochs"] == 1
    assert config["recipe"]["roles"]["W"]["params"]["threshold"] == 0.5 and config["lr"] == 0.02
    status, _, error = cli(*words)
    assert status == 2 and "continue it with --resume" in error
    result = json.loads(cli("train", "--resume", "runs/twn-mlp-digits-s0", "--json")[1])
    assert result["status"] == "ok" and result["folder"] == "runs/twn-mlp-digits-s0" and result["steps"] == 4


def test_train_from_a_recipe_file(cli, tmp_path):
    recipe = lowbit.create("twn", threshold=0.3)
    (tmp_path / "mine.json").write_text(recipe.to_json())
    status, text, _ = cli(
        "train",
        "--recipe",
        "mine.json",
        *TINY,
        "--lr",
        "0.1",
        "--momentum",
        "0",
        "--optimizer",
        "sgd",
        "--schedule",
        "constant",
        "--seed",
        "4",
        "--out",
        "here",
        "--json",
    )
    assert status == 0 and json.loads(text)["folder"] == "here"
    config = json.loads((tmp_path / "here/config.json").read_text())
    assert lowbit.Recipe.from_json(json.dumps(config["recipe"])) == recipe
    assert (config["method"], config["lr"], config["momentum"], config["schedule"], config["seed"]) == (
        "twn",
        0.1,
        0.0,
        "constant",
        4,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --method NAME or --recipe FILE.json"),
        (["--method", "twm"], "unknown method 'twm'; did you mean 'twn'"),
        (["--method", "twn", "--option", "treshold=1"], "no option 'treshold'; did you mean 'threshold'"),
        (["--method", "twn", "--option", "threshold=-1"], "not negative; got -1"),
        (["--method", "twn", "--option", "threshold"], "--option takes key=value, got 'threshold'"),
        (["--method", "twn", "--model", "lenet"], "did you mean 'lenet5'"),
        (["--method", "twn", "--data", "digit"], "did you mean 'digits'"),
        (["--method", "twn", "--data", "mnist:/nowhere"], "/nowhere"),
        (["--method", "twn", "--lr", "-1"], "lr must be at least 0; got -1.0"),
        (["--recipe", "none.json"], "none.json"),
        (["--recipe", "bad.json"], "not a recipe"),
        (["--recipe", "bad.json", "--option", "a=1"], "a recipe file is complete"),
        (["--resume", "nowhere"], "nowhere holds no run"),
        (["--resume", "nowhere", "--method", "twn"], "leave --method"),
    ],
)
def test_train_refuses(cli, tmp_path, words, message):
    (tmp_path / "bad.json").write_text("{")
    status, text, error = cli("train", *words)
    assert (status, text) == (2, "") and message in error and error.startswith("lowbit: ") and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.json"]


def test_train_diverges(cli):
    status, text, error = cli("train", "--method", "fp32", *TINY, "--lr", "1e9", "--out", "gone")
    assert (status, text) == (1, "") and error.startswith("lowbit: fp32 diverged: the loss is")


def test_debug_shows_where(cli):
    with pytest.raises(ValueError, match="unknown method"):
        cli("--debug", "show", "twm")
    assert cli("show", "twm")[0] == 2  # and only there


def test_values_of_options():
    got = pairs(["a=1", "b=[1,2]", "c=text", "d=true", 'e={"spec": "PerTensor"}', "f-g=x=y"], "--option")
    assert got == {"a": 1, "b": [1, 2], "c": "text", "d": True, "e": {"spec": "PerTensor"}, "f_g": "x=y"}


def test_compare(cli, tmp_path):
    words = [
        "compare",
        "--methods",
        "fp32,twn",
        "--options",
        "twn.threshold=0.5",
        "--seeds",
        "0,1",
        *TINY,
        "--out",
        "c",
        "--save",
        "results/mine.json",
    ]
    status, text, _ = cli(*words)
    assert status == 0 and "accuracy %" in text and "twn threshold=0.5" in text and "c/report.html" in text
    results = json.loads((tmp_path / "c/results.json").read_text())
    assert [m["key"] for m in results["methods"]] == ["fp32", "twn threshold=0.5"] and results["seeds"] == [0, 1]
    page = (tmp_path / "c/report.html").read_text()
    assert "<html" in page and "twn threshold=0.5" in page
    kept = json.loads((tmp_path / "results/mine.json").read_text())
    assert kept["schema"] == "lowbit-result-1" and kept["methods"][1]["options"] == {"threshold": 0.5}
    assert kept["methods"][0]["metric"] == results["methods"][0]["metric"] and kept["data"]["fingerprint"]
    status, text, _ = cli(*words, "--json")
    again = json.loads(text)
    assert status == 0 and [m["metric"] for m in again["methods"]] == [m["metric"] for m in results["methods"]]


def test_compare_goes_on_after_a_failure(cli, monkeypatch):
    real = lowbit.apply

    def apply(model, recipe):
        if recipe.name == "twn":
            raise RuntimeError("out of luck")
        return real(model, recipe)

    monkeypatch.setattr(lowbit, "apply", apply)
    words = ["compare", "--methods", "twn,fp32", *TINY, "--no-timing", "--out", "c"]
    status, text, error = cli(*words)
    assert status == 1 and "failed: RuntimeError: out of luck" in text and error.startswith("lowbit: twn failed:")
    methods = json.loads(cli(*words, "--json")[1])["methods"]
    assert [m["status"] for m in methods] == ["failed", "ok"] and methods[1]["metric"]["mean"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "fp32,twm"], "unknown method 'twm'"),
        (["--methods", "fp32,fp32"], "takes different names"),
        (["--methods", ","], "takes different names"),
        (["--methods", "fp32", "--options", "twn.threshold=1"], "--options takes METHOD.key=value"),
        (["--methods", "twn", "--options", "twn.a=1"], "no option 'a'"),
        (["--methods", "twn", "--seeds", "0,x"], "'x'"),
        (["--methods", "twn", "--seeds", "-1"], "seed must be at least 0"),
    ],
)
def test_compare_refuses(cli, tmp_path, words, message):
    status, text, error = cli("compare", *words)
    assert (status, text) == (2, "") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_bench(cli, monkeypatch):
    monkeypatch.setattr("lowbit.lab.bench.SIZES", (64,))
    before = torch.get_num_threads()
    status, text, _ = cli(
        "bench", "--model", "mlp", "--methods", "twn", "--rounds", "1", "--batch-size", "4", "--threads", "1", "--json"
    )
    data = json.loads(text)
    assert status == 0 and data["environment"]["threads"] == 1 and torch.get_num_threads() == before
    assert [r["case"] for r in data["rows"]][:3] == ["fp32", "bf16 autocast", "twn simulated"]
    for words, message in ((["--model", "x"], "unknown model"), (["--rounds", "0"], "--rounds must be at least 1")):
        status, _, error = cli("bench", *words)
        assert status == 2 and message in error


def test_bench_rows(cli, tmp_path):
    words = ("--rows", "linear", "--quick", "--threads", "1", "--save", "speed.json")
    status, text, _ = cli("bench", *words)
    assert status == 0 and "linear: Linear layers" in text and "float32" in text
    kept = json.loads((tmp_path / "speed.json").read_text())["rows"]["linear"]
    assert kept["environment"]["threads"] == 1 and kept["cases"][0]["case"] == "int8"
    status, text, _ = cli("bench", *words[:5], "--json")
    assert status == 0 and list(json.loads(text)) == ["linear"]
    for refused, message in ((["--rows", "x"], "unknown row"), (["--quick"], "--rows")):
        status, _, error = cli("bench", *refused)
        assert status == 2 and message in error


def test_tables(cli, tmp_path):
    assert cli("tables")[0] == 2  # nothing here
    (tmp_path / "README.md").write_text("<!-- table:methods -->\n<!-- /table:methods -->\n")
    status, _, error = cli("tables", "--check")
    assert status == 1 and error == "lowbit: stale tables in README.md; run `lowbit tables`\n"
    assert cli("tables")[:2] == (0, "written: README.md\n")
    assert cli("tables", "--check")[0] == 0 and "| `twn` |" in (tmp_path / "README.md").read_text()


# Processes of their own


def python(code, *words):
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)


def test_the_library_needs_no_extra():
    code = (
        "import sys, lowbit; print([m for m in ('typer', 'rich', 'accelerate', 'plotly', 'jinja2', 'sklearn') "
        "if m in sys.modules])"
    )
    assert python(code).stdout == "[]\n"


def test_a_missing_extra_is_named(tmp_path):
    block = "import sys; sys.modules[{!r}] = None; from lowbit.cli import main; main(sys.argv[1:])"
    done = python(block.format("typer"), "methods")
    assert done.returncode == 1 and done.stderr == "lowbit: the command line needs typer: pip install 'lowbit[lab]'\n"
    done = python(block.format("accelerate"), "train", "--method", "fp32", *TINY, "--out", str(tmp_path / "run"))
    assert done.returncode == 1 and done.stderr.strip().endswith("pip install 'lowbit[lab]'")
    assert "accelerate" in done.stderr and done.stderr.count("\n") == 1


def test_main():
    done = python("from lowbit.cli import main; main()", "show", "twm")
    assert done.returncode == 2 and done.stderr.startswith("lowbit: unknown method") and done.stdout == ""
