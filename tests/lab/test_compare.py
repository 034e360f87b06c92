"""Comparisons: the same work for all, what is measured, what happens when a method fails, tables."""

from __future__ import annotations

import dataclasses
import json
import statistics

import numpy as np
import pytest
import torch

import lowbit
from lowbit.backward import Coded
from lowbit.formats import E4M3, Int
from lowbit.lab import bench, compare, tables
from lowbit.lab.data import load
from lowbit.lab.loop import Config
from lowbit.lab.runs import read_state, write_json

DIGITS = load("digits")
TINY = Config(model="mlp", model_options={"hidden": [16, 16]}, epochs=2, limit=256, device="cpu")
METHODS = [("fp32", {}), ("twn", {}), ("twn", {"threshold": 0.5})]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return folder, compare.compare(METHODS, TINY, DIGITS, [0, 1], folder, command="lowbit compare ...")


def by_key(results):
    return {m["key"]: m for m in results["methods"]}


def test_what_is_in_the_results(made):
    folder, results = made
    assert json.loads((folder / "results.json").read_text()) == results  # plain and strict JSON
    assert results["schema"] == "lowbit-compare-1" and results["title"] == "mlp on digits"
    assert [m["key"] for m in results["methods"]] == ["fp32", "twn", "twn threshold=0.5"]
    assert results["metric"] == {"name": "accuracy", "unit": "%", "better": "higher"} and results["baseline"] == "fp32"
    assert results["data"]["fingerprint"] == DIGITS.fingerprint
    assert (results["data"]["train"], results["data"]["test"], results["data"]["limit"]) == (1437, 360, 256)
    assert results["model"]["parameters"] == 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    assert results["settings"]["steps_per_epoch"] == 8 and results["seeds"] == [0, 1]
    assert all(m["status"] == "ok" and m["reason"] == "" for m in results["methods"])
    accuracy = {m["key"]: m["metric"]["mean"] for m in results["methods"]}
    assert [accuracy[k] for k in results["ranking"]] == sorted(accuracy.values(), reverse=True)
    assert by_key(results)["twn"]["arxiv"] == "1605.04711" and by_key(results)["twn"]["options"] == {}


def test_mean_spread_and_curves(made):
    _, results = made
    for m in results["methods"]:
        values = [r["metric"] for r in m["runs"]]
        assert m["metric"]["values"] == values and len(values) == 2
        assert m["metric"]["mean"] == pytest.approx(sum(values) / 2)
        assert m["metric"]["spread"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        for r in m["runs"]:
            assert [c["epoch"] for c in r["curve"]] == [1, 2] and r["curve"][-1]["test_metric"] == r["metric"]
            assert [c["step"] for c in r["steps"]] == [10]


def test_bits_bytes_and_time(made):
    _, results = made
    m = by_key(results)
    assert m["fp32"]["bits"] == dict.fromkeys("WAEGU", 32.0)
    assert m["twn"]["bits"] == dict.fromkeys("WAEGU", 32.0) | {"W": 2.0}
    count, biases, layers = 64 * 16 + 16 * 16 + 16 * 10, 16 + 16 + 10, 3
    assert m["fp32"]["bytes"] == 4 * (count + biases)
    assert m["twn"]["bytes"] == count // 4 + 4 * layers + 4 * biases
    assert m["fp32"]["step"]["ratio"] == 1.0 and m["fp32"]["step"]["ms"] > 0
    assert 1.0 < m["twn"]["step"]["ratio"] < 100 and m["twn"]["step"]["rounds"] >= 5


def test_layers_have_their_error(made):
    folder, results = made
    state = read_state(folder / "runs" / "twn" / "seed0" / "checkpoint.safetensors")["state"]["model"]
    rows = {(r["layer"], r["role"]): r for r in by_key(results)["twn"]["layers"]}
    for name in ("layers.1", "layers.3", "layers.5"):
        w = state[f"{name}.weight"].double().numpy()
        keep = np.abs(w) > 0.7 * np.abs(w).mean()
        q = np.sign(w) * keep * np.abs(w)[keep].mean()
        sqnr = 10 * np.log10((w**2).sum() / ((w - q) ** 2).sum())
        assert rows[name, "W"]["sqnr"] == pytest.approx(sqnr, rel=1e-4) and rows[name, "W"]["exact"] is False
    assert by_key(results)["fp32"]["layers"][0]["role"] == "-"


def test_histograms(made):
    folder, results = made
    state = read_state(folder / "runs" / "twn" / "seed0" / "checkpoint.safetensors")["state"]["model"]
    held = {(h["layer"], h["role"]): h for h in by_key(results)["twn"]["histograms"]}
    assert list(held) == [(f"layers.{i}", r) for i in (1, 3, 5) for r in "WAE"]
    for (name, role), h in held.items():
        assert len(h["edges"]) == 65 and len(h["counts"]) == 64 and sum(h["counts"]) == h["count"]
        zeros = h["magnitudes"]["zeros"]
        assert sum(h["magnitudes"]["counts"]) + zeros == h["count"]
        if role == "W":
            w = state[f"{name}.weight"]
            alpha = w.abs()[w.abs() > 0.7 * w.abs().mean()].mean()
            assert h["levels"] == pytest.approx([-float(alpha), 0, float(alpha)], rel=1e-4)
            assert h["clip"] == pytest.approx([-float(alpha), float(alpha)], rel=1e-4)
            assert h["count"] == w.numel() and h["edges"][0] == pytest.approx(float(w.min()), rel=1e-5)
        else:
            assert h["format"] == "float32" and h["levels"] == [] and h["clip"] is None
    x, _ = next(DIGITS.batches("train", 32, limit=256))
    first = held["layers.1", "A"]
    counts, edges = np.histogram(x.double().numpy(), 64)
    assert np.abs(np.cumsum(first["counts"]) - np.cumsum(counts)).max() <= 2  # values on an edge may go either way
    assert first["edges"] == pytest.approx(edges.tolist(), abs=1e-4)
    assert first["magnitudes"]["zeros"] == int((x == 0).sum())
    floats = by_key(results)["fp32"]["histograms"]
    assert len(floats) == 9 and all(h["format"] == "float32" and not h["levels"] for h in floats)


def test_grid_of_a_histogram():
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    scale = torch.tensor([[0.5], [0.1], [0.2]])
    h = compare.histogram("l", "W", x, Coded(x, scale, Int(3), torch.tensor([[1.0], [2.0], [3.0]])))
    assert h["blocks"] == 3 and h["levels"] == pytest.approx([(c - 3) * 0.2 for c in range(-4, 4)])  # the median block
    assert h["clip"] == pytest.approx([-1.4, 0.0])
    h = compare.histogram("l", "E", x, Coded(x, torch.ones(1, 1), E4M3))
    assert len(h["levels"]) == 65 and h["clip"] == [-448.0, 448.0] == [h["levels"][0], h["levels"][-1]]
    assert 0.0 in h["levels"] and h["levels"] == sorted(h["levels"])
    h = compare.histogram("l", "A", x, Coded(x, torch.ones(1, 1), Int(32)))
    assert len(h["levels"]) == 65
    h = compare.histogram("l", "A", torch.full((1, 5), torch.nan), None)
    assert h["count"] == 0 and sum(h["counts"]) == 0
    h = compare.histogram("l", "A", torch.zeros(1, 5), None)
    assert sum(h["counts"]) == 5 and h["magnitudes"]["zeros"] == 5


def test_layers_with_histograms_are_spread():
    names = [str(i) for i in range(40)]
    chosen = compare.spread_out(names, 12)
    assert len(chosen) == 12 and chosen[0] == "0" and chosen[-1] == "39" and chosen == sorted(chosen, key=int)
    assert compare.spread_out(names[:3], 12) == names[:3]


def test_attention_and_sequences(tmp_path):
    (tmp_path / "input.txt").write_text("the cat sat on the mat. " * 60)
    small = {"dim": 16, "depth": 1, "heads": 2}
    config = Config(
        data=f"text:{tmp_path}",
        data_options={"block": 16},
        model_options=small,
        epochs=1,
        limit=64,
        device="cpu",
        threads=1,
    )
    data = load(config.data, block=16)
    results = compare.compare([("fp32", {}), ("twn", {})], config, data, [0], tmp_path / "out", measure=False)
    assert results["metric"]["name"] == "perplexity" and results["metric"]["better"] == "lower"
    assert results["data"]["source"] == "text:PATH", "a place on this machine is nobody's business"
    m = by_key(results)
    assert m["twn"]["status"] == "ok" and m["twn"]["step"] is None and m["twn"]["metric"]["spread"] is None
    ternary = {h["layer"] for h in m["twn"]["histograms"] if len(h["levels"]) == 3 and h["role"] == "W"}
    parts = [f"blocks.0.attention.{n}_proj" for n in ("q", "k", "v", "out")]
    assert ternary == {*parts, "blocks.0.feed_forward.up", "blocks.0.feed_forward.down", "head"}
    means = [m[k]["metric"]["mean"] for k in results["ranking"]]
    assert means == sorted(means)


# Not twice, and not all or nothing


def test_finished_runs_are_kept(tmp_path, monkeypatch):
    first = compare.compare(METHODS[:2], TINY, DIGITS, [0], tmp_path)
    steps = []

    def trained(event):
        if "step" in event:
            steps.append((event["method"], event["seed"]))

    again = compare.compare(METHODS[:2], TINY, DIGITS, [0, 1], tmp_path, progress=trained)
    assert set(steps) == {("fp32", 1), ("twn", 1)}
    assert [m["runs"][0] for m in again["methods"]] == [m["runs"][0] for m in first["methods"]]
    assert by_key(again)["twn"]["step"] == by_key(first)["twn"]["step"]  # nor is the time measured again
    steps.clear()
    other = dataclasses.replace(TINY, epochs=1)
    compare.compare(
        METHODS[:1], other, DIGITS, [0], tmp_path, measure=False, progress=lambda e: steps.append(e["phase"])
    )
    assert steps.count("train") == 8  # another configuration is another run
    config = json.loads((tmp_path / "runs" / "fp32" / "seed0" / "config.json").read_text())
    assert config["epochs"] == 1


def test_a_run_that_was_cut_off_continues(tmp_path):
    whole = compare.compare(METHODS[:1], TINY, DIGITS, [0], tmp_path / "whole", measure=False)

    def cut(event):
        if event.get("step") == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare.compare(METHODS[:1], TINY, DIGITS, [0], tmp_path / "cut", measure=False, progress=cut)
    steps = []
    rest = compare.compare(
        METHODS[:1],
        TINY,
        DIGITS,
        [0],
        tmp_path / "cut",
        measure=False,
        progress=lambda e: steps.append(e["step"]) if "step" in e else None,
    )
    assert steps[0] == 9 and rest["methods"][0]["metric"] == whole["methods"][0]["metric"]


def test_a_method_that_fails_and_one_that_diverges(tmp_path, monkeypatch):
    real = lowbit.apply

    def apply(model, recipe):
        if recipe.options.get("threshold") == 0.5:
            raise RuntimeError("no such luck\nsecond line")
        return real(model, recipe)

    monkeypatch.setattr(lowbit, "apply", apply)
    real_train = compare.train
    monkeypatch.setattr(
        compare,
        "train",
        lambda config, *a, **k: real_train(
            dataclasses.replace(config, lr=1e9) if config.options.get("threshold") == 0.9 else config, *a, **k
        ),
    )
    methods = [("twn", {"threshold": 0.5}), ("twn", {"threshold": 0.9}), ("fp32", {})]
    results = compare.compare(methods, TINY, DIGITS, [0], tmp_path)
    failed, diverged, ok = results["methods"]
    assert failed["status"] == "failed" and failed["reason"] == "RuntimeError: no such luck"
    assert diverged["status"] == "diverged" and "the loss is" in diverged["reason"]
    assert ok["status"] == "ok" and ok["step"]["ratio"] == 1.0
    assert results["ranking"][0] == "fp32" and results["baseline"] == "fp32"
    assert failed["metric"] is None and failed["bits"] is None and failed["step"] is None and failed["histograms"] == []
    _, rows = compare.table(results)
    assert rows[0][1] == "-" and rows[0][-1] == "failed: RuntimeError: no such luck"
    from lowbit.lab import report_html

    assert report_html.write(results, tmp_path / "r.html").stat().st_size > 1000
    monkeypatch.undo()
    again = compare.compare(methods[:1], TINY, DIGITS, [0], tmp_path, measure=False)
    assert again["methods"][0]["status"] == "ok"  # what failed is tried again


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="each once; got twn, twn"):
        compare.compare([("twn", {}), ("twn", {})], TINY, DIGITS, [0], tmp_path)
    with pytest.raises(ValueError, match="each once"):
        compare.compare([("twn", {})], TINY, DIGITS, [0, 0], tmp_path)


def test_steps_are_measured_in_turn(monkeypatch):
    now, order = [0.0], []
    cost = {"a": 2.0, "b": 6.0}

    def stepper(config, data):
        while True:
            order.append(config)
            now[0] += cost[config] * (10 if len(order) > 40 else 1)  # the machine slows down for all
            yield

    monkeypatch.setattr(compare, "stepper", stepper)
    monkeypatch.setattr(compare.time, "perf_counter", lambda: now[0])
    times = compare.step_times({"a": "a", "b": "b"}, None, rounds=30, budget=1e9)
    assert order == ["a", "b"] * 32
    assert times["a"]["ratio"] == 1.0 and times["b"]["ratio"] == pytest.approx(3.0) and times["b"]["rounds"] == 30
    order.clear()
    assert compare.step_times({"a": "a", "b": "b"}, None, rounds=30, budget=1.0)["a"]["rounds"] == 5


# Tables


def test_the_table_and_what_is_kept(made, tmp_path):
    _, results = made
    head, rows = compare.table(results)
    assert head[:3] == ["method", "accuracy %", "W"] and [r[0] for r in rows] == ["fp32", "twn", "twn threshold=0.5"]
    assert " ± " in rows[0][1] and rows[1][2] == "2" and rows[0][8] == "1.00x"
    kept = compare.record(results)
    assert kept["methods"][1]["metric"] == results["methods"][1]["metric"] and "histograms" not in kept["methods"][1]
    for field in ("command", "seeds", "environment", "data", "model", "settings"):
        assert kept[field] == results[field]
    assert compare.size_of(512) == "512 B" and compare.size_of(2048) == "2.0 KiB"
    assert compare.size_of(3 * 2**20) == "3.0 MiB"
    assert compare.shown({"mean": 97.123, "spread": None}) == "97.12"


def test_marked_regions(made, tmp_path):
    _, results = made
    for name in ("results", "docs"):
        (tmp_path / name).mkdir()
    write_json(tmp_path / "results" / "mine.json", compare.record(results))
    page = tmp_path / "docs" / "results.md"
    page.write_text(
        "# R\n<!-- table:mine -->\nstale\n<!-- /table:mine -->\nbetween\n<!-- table:paper -->\n<!-- /table:paper -->\n"
    )
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- table:methods -->\n<!-- /table:methods -->\nz\n")
    assert tables.refresh(tmp_path, check=True) == [readme, page] and "stale" in page.read_text()
    assert tables.refresh(tmp_path) == [readme, page]
    text = page.read_text()
    assert "stale" not in text and "\nbetween\n" in text and text.startswith("# R\n<!-- table:mine -->\n| method |")
    mean = statistics.fmean(by_key(results)["twn"]["metric"]["values"])
    assert f"| `twn` | {mean:.2f} ±" in text and "2 / 32 / 32 / 32 / 32" in text
    assert f"mlp on digits: {mean:.2f} ±" in text and "92.56 % ternary" in text
    assert "| `twn` | Ternary Weight Networks | 2016, [arXiv 1605.04711]" in readme.read_text()
    assert readme.read_text().startswith("a\n") and readme.read_text().endswith("-->\nz\n")
    assert tables.refresh(tmp_path, check=True) == []
    write_json(tmp_path / "results" / "other.json", {"schema": "x"})
    with pytest.raises(ValueError, match="was not written by"):
        tables.refresh(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table:nothing -->\n<!-- /table:nothing -->\n", "no table 'nothing'"),
        ("<!-- table:methods -->\n", "has no <!-- /table:NAME -->"),
    ],
)
def test_wrong_regions(tmp_path, text, message):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        tables.refresh(tmp_path)
    assert (tmp_path / "README.md").read_text() == text


def test_bench(monkeypatch):
    monkeypatch.setattr(bench, "SIZES", (64,))
    rows = bench.bench("mlp", ("twn", "no such method"), 8, 2)
    what = [r["what"] for r in rows]
    assert what[0] == "training step, mlp, batch 8" and "product 64x64x64" in what
    assert [r["case"] for r in rows if r["what"] == what[0]] == ["fp32", "bf16 autocast", "twn simulated"]
    assert all(r["ms"] > 0 and r["ratio"] > 0 for r in rows)
    firsts = [next(r for r in rows if r["what"] == w) for w in dict.fromkeys(what)]
    assert all(r["ratio"] == 1.0 for r in firsts)
