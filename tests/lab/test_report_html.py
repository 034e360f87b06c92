"""The page and the picture of a comparison: complete, safe whatever the names are, and the same every time."""

import base64
import copy
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lowbit.lab import picture, report_html

NAMES = "fp32 int8 luq twn bwn xnor dorefa wage pact lsq inq fp8 s2fp8 mx4 qil".split()
BITS = (
    (32, 32, 32),
    (8, 8, 8),
    (4, 4, 4),
    (2, 32, 32),
    (1, 32, 32),
    (1, 1, 32),
    (1, 2, 6),
    (2, 8, 8),
    (4, 4, 32),
    (3, 3, 32),
    (5, 32, 32),
    (8, 8, 8),
    (8, 8, 8),
    (4.25, 4.25, 4.25),
    (2, 2, 32),
)
LAYERS = ("stem.conv", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "head.fc")
HOSTILE = "</script><script>alert(1)</script>\"'`<img src=x onerror=alert(2)>\u2028\u2029&lt;%{y}{{ 7*7 }}\x00"


def histogram(rng, layer, role, bits):
    x = rng.normal(size=4000) * {"W": 0.1, "A": 1.0, "E": 1e-4}[role]
    x = np.maximum(x, 0) if role == "A" else x
    counts, edges = np.histogram(x, 64)
    logs = np.log2(np.abs(x[x != 0]))
    log_counts, log_edges = np.histogram(logs, 64)
    step = np.quantile(np.abs(x), 0.995) / max(2 ** (bits - 1) - 1, 1)
    end = 2 ** (bits - 1)
    levels = step * np.unique(np.linspace(-end, end - 1, min(round(2 * end), 65)).round()) if bits < 32 else []
    return {
        "layer": layer,
        "role": role,
        "format": f"Int({bits})" if bits < 32 else "float32",
        "count": 4000,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "levels": list(levels),
        "blocks": 1,
        "clip": [-step * end, step * (end - 1)] if bits < 32 else None,
        "magnitudes": {"edges": log_edges.tolist(), "counts": log_counts.tolist(), "zeros": int((x == 0).sum())},
    }


def results(methods=4, seeds=3, epochs=10, task="classification", layers=LAYERS):
    """What `compare` would give; the last of three or more methods failed, the one before lost a seed."""
    rng = np.random.default_rng(0)
    accuracy = task == "classification"
    found = []
    for i, name in enumerate(NAMES[:methods]):
        bits = dict(zip("WAE", BITS[i], strict=True)) | {"G": 32.0, "U": 32.0}
        runs = []
        for seed in range(seeds):
            end = 97.5 - 0.35 * i + rng.normal() * 0.3 if accuracy else 5.2 * 1.03**i + rng.normal() * 0.05
            t = np.arange(1, epochs + 1)
            metric = end - 40 * np.exp(-t / 1.7) if accuracy else end + 25 * np.exp(-t / 1.7)
            loss = 0.05 + 0.01 * i + 1.8 * np.exp(-t / 2.2) + rng.random(epochs) * 0.02
            curve = [
                {
                    "epoch": int(e),
                    "step": int(e) * 12,
                    "train_loss": float(a),
                    "train_metric": float(b),
                    "test_loss": float(a) * 1.2,
                    "test_metric": float(b),
                }
                for e, a, b in zip(t, loss, metric, strict=True)
            ]
            steps = [
                {"step": s, "loss": 0.05 + 2.2 * math.exp(-s / 30) + rng.random() * 0.1, "lr": 0.1}
                for s in range(1, 12 * epochs, 3)
            ]
            runs.append(
                {
                    "seed": seed,
                    "folder": f"{name}-{seed}",
                    "status": "ok",
                    "reason": "",
                    "seconds": 3.2,
                    "metric": float(metric[-1]),
                    "loss": float(loss[-1]),
                    "curve": curve,
                    "steps": steps,
                }
            )
        if i >= 2 and i == methods - 2 and seeds > 1:
            runs[-1] |= {
                "status": "diverged",
                "reason": "loss is nan at step 40",
                "metric": None,
                "curve": runs[-1]["curve"][:3],
            }
        failed = i >= 2 and i == methods - 1
        if failed:
            runs = [
                r | {"status": "failed", "reason": "needs a convolution", "metric": None, "curve": [], "steps": []}
                for r in runs
            ]
        values = [r["metric"] for r in runs]
        done = [v for v in values if v is not None]
        worst = "failed" if failed else "diverged" if None in values else "ok"
        rows = [
            {
                "layer": layer,
                "kind": "conv",
                "role": role,
                "format": f"Int(bits={bits[role]})",
                "bits": bits[role],
                "scale": 0.01,
                "sqnr": 6.02 * bits[role] - 3 + rng.normal(),
                "exact": False,
                "clipped": 0.004,
                "zero": 0.1,
                "note": "",
            }
            for layer in layers
            for role in "WAE"
            if bits[role] < 32
        ]
        if name == "int8":
            rows[0] |= {"exact": True, "sqnr": None}
        found.append(
            {
                "key": name,
                "name": name,
                "options": {"samples": 2} if name == "luq" else {},
                "title": f"The {name} paper",
                "year": 2020,
                "arxiv": "1605.04711" if name == "twn" else "CVPR 2019",
                "area": "training",
                "summary": "One line.",
                "status": worst,
                "reason": next((r["reason"] for r in runs if r["reason"]), ""),
                "metric": {
                    "mean": float(np.mean(done)),
                    "values": values,
                    "spread": float(np.std(done, ddof=1)) if len(done) > 1 else None,
                }
                if done
                else None,
                "bits": None if failed else bits,
                "bytes": None if failed else int(61706 * bits["W"] / 8),
                "step": None if failed else {"ms": 4.0 + i, "ratio": (4.0 + i) / 4, "rounds": 9},
                "training": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
                "roles": {"W": "Int(bits=4)"},
                "runs": runs,
                "layers": [] if failed else rows,
                "histograms": []
                if failed
                else [histogram(rng, layer, r, bits[r]) for layer in layers[:3] for r in "WAE"],
            }
        )
    sign = -1 if accuracy else 1
    order = sorted(found, key=lambda m: sign * m["metric"]["mean"] if m["metric"] else math.inf)
    return {
        "schema": "lowbit-compare-1",
        "title": "lenet5 on digits",
        "created": "2025-11-21T10:30:00Z",
        "command": "lowbit compare --methods fp32,int8,luq,twn --data digits",
        "task": task,
        "metric": {"name": "accuracy", "unit": "%", "better": "higher"}
        if accuracy
        else {"name": "perplexity", "unit": "", "better": "lower"},
        "data": {
            "source": "digits",
            "fingerprint": "3f0c",
            "train": 1437,
            "test": 360,
            "input_shape": [1, 8, 8],
            "classes": 10,
            "limit": None,
        },
        "model": {"name": "lenet5", "options": {}, "parameters": 61706},
        "settings": {"epochs": epochs, "batch_size": 128, "steps_per_epoch": 12, "schedule": "cosine"},
        "seeds": list(range(seeds)),
        "baseline": "fp32",
        "methods": found,
        "ranking": [m["key"] for m in order],
        "environment": {
            "lowbit": "0.1.0",
            "torch": "2.13.0",
            "python": "3.11.2",
            "platform": "Linux",
            "cpu": "Xeon",
            "threads": 2,
            "device": "cpu",
            "revision": "825a88f",
        },
    }


def hostile():
    """Every text of the results is an attack."""

    def attack(value, key=""):
        if isinstance(value, dict):
            return {(k if k != "optimizer" else HOSTILE): attack(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [attack(v, key) for v in value]
        kept = not isinstance(value, str) or key in ("schema", "role", "better", "status")
        return value if kept else value + HOSTILE

    return attack(results())


class Page(HTMLParser):
    """Elements, texts and scripts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.rows = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and not data.isspace():
            self.scripts[-1] += data
        elif self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")

    def handle_endtag(self, tag):
        if tag == "table":
            self.rows.append([])

    @property
    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = report_html.write(results(), tmp_path_factory.mktemp("page") / "new" / "report.html")
    return path, path.read_text(encoding="utf-8")


def test_nothing_comes_from_the_network_and_only_our_scripts_run(page):
    parsed = Page(page[1])
    links = [v for tag, k, v in parsed.attributes if k in ("src", "href")]
    assert links == ["https://arxiv.org/abs/1605.04711"]  # a link to read, the only one
    assert not {"link", "img", "iframe", "base"} & set(parsed.tags) and len(parsed.scripts) == 3
    policy = next(v for tag, k, v in parsed.attributes if v and v.startswith("default-src 'none'"))
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in parsed.scripts[1:]]
    assert [f"'sha256-{h}'" in policy for h in hashes] == [True, True]
    assert 4e6 < page[0].stat().st_size < 6e6


def test_table_shows_the_figures(page):
    rows = {row[0].split()[0]: row for row in Page(page[1]).rows[1:5]}
    made = results()
    assert list(rows) == made["ranking"]
    for m in made["methods"]:
        row = rows[m["key"]]
        if m["metric"]:
            got, spread = (float(v) for v in re.match(r"([\d.]+) ± ([\d.]+)", row[1]).groups())
            assert got == pytest.approx(m["metric"]["mean"], abs=0.005)
            assert spread == pytest.approx(m["metric"]["spread"], abs=0.005)
            assert [float(v) for v in row[3:8]] == list(m["bits"].values())
    base, int8 = (m["metric"]["mean"] for m in made["methods"][:2])
    assert rows["int8"][2] == f"{int8 - base:+.2f}".replace("-", "−")
    assert rows["int8"][8] == "60.3 KiB0.25 ×" and rows["int8"][9] == "1.25 ×5 ms"
    assert rows["luq"][1].endswith("2 of 3 seeds") and "diverged: loss is nan at step 40" in rows["luq"][0]
    assert "failed: needs a convolution" in rows["twn"][0] and set(rows["twn"][1:]) == {"–"}


def test_best_is_marked_apart_from_the_baseline(page):
    best = re.findall(r'<tr><td data-v="(\w+)">(.*?)</tr>', page[1], re.S)
    assert {key: text.count('class="best"') for key, text in best} == {"fp32": 0, "int8": 2, "luq": 1, "twn": 0}


def test_lead_names_baseline_best_and_failures(page):
    made = results()
    base, best = (f"{m['metric']['mean']:.2f} %" for m in made["methods"][:2])
    assert f"fp32 reaches accuracy {base}; int8 is the best of 3 methods with {best}; 2 failed or diverged." in page[1]


def test_curves_are_means_over_the_seeds_that_got_there(page):
    made, methods = results(), {m["key"]: m for m in Page(page[1]).data["methods"]}
    raw = np.array([[p["train_loss"] for p in run["curve"]] for run in made["methods"][1]["runs"]])
    got = methods["int8"]["curves"]["train_loss"]
    assert got["x"] == list(range(1, 11))
    np.testing.assert_allclose(got["mean"], raw.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got["sd"], raw.std(0, ddof=1), rtol=1e-3)
    part = [run["curve"][9]["test_metric"] for run in made["methods"][2]["runs"][:2]]  # the third diverged in epoch 3
    assert methods["luq"]["curves"]["test_metric"]["mean"][9] == pytest.approx(np.mean(part), rel=1e-5)
    assert methods["twn"]["curves"]["test_metric"]["x"] == []


def test_histograms_and_layers_reach_the_page(page):
    made, methods = results()["methods"][2], {m["key"]: m for m in Page(page[1]).data["methods"]}
    got = methods["luq"]["histograms"][4]
    assert got["counts"] == made["histograms"][4]["counts"] and got["magnitudes"]["zeros"] > 0
    np.testing.assert_allclose(got["levels"], made["histograms"][4]["levels"], rtol=1e-5)
    sqnr = [row["sqnr"] for row in made["layers"]]
    assert [row["sqnr"] for row in methods["luq"]["layers"]] == pytest.approx(sqnr, rel=1e-5)
    assert methods["int8"]["layers"][0]["exact"] is True


def test_hostile_text_stays_text(tmp_path):
    text = report_html.write(hostile(), tmp_path / "r.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert len(parsed.scripts) == 3 and "img" not in parsed.tags
    assert not [k for _, k, _ in parsed.attributes if k.startswith("on")]
    key = parsed.data["methods"][0]["key"]
    assert key.endswith(HOSTILE) and "49" not in key
    embedded = text[text.index('id="data">') : text.index("</script>", text.index('id="data">'))]
    assert embedded.isascii() and not re.search("[<&]", embedded.removeprefix('id="data">'))
    assert html.escape(HOSTILE.split("\u2028")[0]).replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in text


def test_an_address_is_linked_only_when_arxiv_is_a_number(tmp_path):
    made = results()
    made["methods"][3]["arxiv"] = "1605.04711\n" + 'javascript:alert(1)"'
    parsed = Page(report_html.write(made, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert [v for _, k, v in parsed.attributes if k == "href"] == []


@pytest.mark.parametrize(
    "text", ["\ud800", "a" * 5000, "层" * 60, "\u202ereversed"], ids=["surrogate", "long", "wide", "rtl"]
)
def test_odd_names(tmp_path, text):
    made = results(2, 1)
    made["methods"][1]["key"] = made["ranking"][made["ranking"].index("int8")] = text
    assert Page(report_html.write(made, tmp_path / "r.html").read_text(encoding="utf-8")).data["methods"][1]["key"] in (
        text,
        "fp32",
    )
    assert ET.fromstring(report_html.plot(made, tmp_path / "r.svg").read_bytes()) is not None


def test_the_same_results_give_the_same_bytes_and_stay_as_they_are(page, tmp_path):
    made = results()
    before = copy.deepcopy(made)
    again = report_html.write(made, tmp_path / "again.html")
    assert again.read_bytes() == page[0].read_bytes()
    report_html.plot(made, tmp_path / "a.svg")
    assert made == before and [p.name for p in sorted(tmp_path.iterdir())] == ["a.svg", "again.html"]


@pytest.mark.parametrize(
    "bad", [{}, [], {"schema": "lowbit-compare-9", "methods": [{}]}, {"schema": picture.SCHEMA, "methods": []}]
)
def test_other_things_are_refused_and_leave_the_old_page(tmp_path, bad):
    (tmp_path / "r.html").write_text("old")
    for call in report_html.write, report_html.plot:
        with pytest.raises(ValueError, match="lowbit-compare-1"):
            call(bad, tmp_path / ("r.html" if call is report_html.write else "r.svg"))
    assert (tmp_path / "r.html").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_method_without_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match='"key"'):
        report_html.write({"schema": picture.SCHEMA, "methods": [{"name": "luq"}]}, tmp_path / "r.html")


def test_least_results(tmp_path):
    """A key is enough: all that is missing is shown as missing, and NaN is missing too."""
    least = {"schema": picture.SCHEMA, "methods": [{"key": "a", "metric": {"mean": math.nan}}, {"key": "b"}]}
    parsed = Page(report_html.write(least, tmp_path / "r.html").read_text(encoding="utf-8"))
    assert parsed.rows[1][1:] == ["–"] * 8 and parsed.data["methods"][0]["metric"]["mean"] is None
    assert len(ET.fromstring(report_html.plot(least, tmp_path / "r.svg").read_bytes())) > 5


def test_perplexity(tmp_path):
    made = results(4, 1, task="lm")
    text = report_html.write(made, tmp_path / "r.html").read_text(encoding="utf-8")
    rows = Page(text).rows[:5]
    assert rows[0][1] == "Perplexity" and "lower is better" in text
    assert rows[1][1] == f"{made['methods'][0]['metric']['mean']:.2f}"  # one seed: no spread
    best = re.findall(r'<tr><td data-v="(\w+)">(?:(?!</td>).)*</td><td data-v="[\d.]+"><span class="best">', text)
    lowest = min((m for m in made["methods"][1:] if m["metric"]), key=lambda m: m["metric"]["mean"])
    assert best == [lowest["key"]]


@pytest.mark.parametrize("methods", [2, 15])
def test_picture_shows_every_method_where_its_figures_are(tmp_path, methods):
    made = results(methods)
    root = ET.fromstring(report_html.plot(made, tmp_path / "p.svg").read_bytes())
    name = "{http://www.w3.org/2000/svg}"
    texts = [t.text for t in root.iter(name + "text")]
    done = [m for m in made["methods"] if m["metric"]]
    assert set(m["key"] for m in made["methods"]) <= set(texts)
    at = [tuple(map(float, re.findall(r"-?[\d.]+", p.get("transform")))) for p in root.iter(name + "path")]
    assert len(at) == 2 * len(done)
    rank = {k: i for i, k in enumerate(made["ranking"])}
    means = [m["metric"]["mean"] for m in sorted(done, key=lambda m: rank[m["key"]])]
    left, right = at[: len(done)], at[len(done) :]
    assert abs(np.corrcoef(means, [p[0] for p in left])[0, 1]) > 0.9999  # a linear axis, to the right
    assert np.corrcoef(means, [p[1] for p in right])[0, 1] < -0.9999  # and upwards
    bits = [
        np.log2(np.mean(m["bits"]["W"] + m["bits"]["A"] + m["bits"]["E"]) / 3)
        for m in sorted(done, key=lambda m: rank[m["key"]])
    ]
    assert np.corrcoef(bits, [p[0] for p in right])[0, 1] > 0.9999
    assert len({(p.get("fill"), p.get("d")) for p in root.iter(name + "path")}) == len(done)


def test_labels_meet_no_label_and_no_point():
    rng = np.random.default_rng(1)
    points = [(float(x), float(y), f"method{i}") for i, (x, y) in enumerate(rng.uniform((80, 80), (300, 200), (15, 2)))]
    points += [(350.0, 150.0, "same"), (350.0, 150.0, "same again")]
    boxes = picture._places(points, (50.0, 50.0, 450.0, 350.0))
    assert sum(b is not None for b in boxes) >= 15
    boxes = [b for b in boxes if b is not None]
    for i, a in enumerate(boxes):
        others = boxes[:i] + [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
        assert all(a[0] >= b[2] or a[2] <= b[0] or a[1] >= b[3] or a[3] <= b[1] for b in others)


def test_pictures_are_svg(tmp_path):
    with pytest.raises(ValueError, match=r"end it in \.svg"):
        report_html.plot(results(2), tmp_path / "p.png")


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (92.1, 98.4, [93, 94, 95, 96, 97, 98]),
        (-3, 250, [0, 50, 100, 150, 200, 250]),
    ],
)
def test_ticks(low, high, expected):
    assert picture._ticks(low, high) == expected


def test_the_template_and_the_script_are_installed():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    patterns = re.search(r'package-data\]\n"\*" = (\[.*\])', text).group(1)
    assert {"*.j2", "*.js"} <= set(json.loads(patterns))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the chromium browser")
@pytest.mark.parametrize("made", [results(15), results(2, 1, task="lm"), hostile()], ids=["many", "few", "hostile"])
def test_a_browser_draws_every_plot(tmp_path, made):
    path = report_html.write(made, tmp_path / "r.html")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1000,2000",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=20000",
        "--dump-dom",
    ]
    dom = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert 'data-drawn="true"' in dom and ">This plot could not be drawn" not in dom
    parts = re.findall(r'<div class="([^"]*)" id="p-(\w+)"', dom)
    assert {name for _, name in parts} == {"metric", "loss", "bits", "step", "layer", "W", "A", "E"}
    assert not [name for classes, name in parts if "empty" in classes]
    assert dom.count("main-svg") >= 8
