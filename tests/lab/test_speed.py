"""The speed table: rows are measured, judged, kept and shown; saved bytes are those of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.lab import bench, speed, tables
from lowbit.lab.runs import read_json, write_json
from lowbit.lab.saved import saved_bytes
from lowbit.lab.speed import explain, kernels, table, training

QUICK = speed.Settings(quick=True)


@pytest.fixture(scope="module")
def sections():
    return speed.measure(["gpt", "linear", "saved", "break_even"], QUICK)


def test_every_target_has_a_row_and_explains_itself():
    assert set(speed.TARGETS) <= set(speed.ROWS)
    for cases in speed.TARGETS.values():
        for target in cases.values():
            better = target["aim"] > target["least"] if "least" in target else target["aim"] < target["most"]
            assert better and target["aim"] > 0


def test_cases_of_a_step(sections):
    cases = sections["gpt"]["cases"]
    assert [c["case"] for c in cases] == ["int8", "int8, bfloat16 between", "float32", "bfloat16"]
    assert cases[0]["ratio"] == 1.0
    assert [c["target"] for c in cases] == [None, None, {"least": 2.5, "aim": 4.0}, {"least": 1.2, "aim": 1.6}]
    assert all(c["ms"] > 0 and c["rounds"] == 2 for c in cases)
    where = sections["gpt"]["environment"]
    assert where["threads"] == torch.get_num_threads() and isinstance(where["amx"], bool)
    assert sections["gpt"]["command"].startswith(("lowbit bench --rows gpt --threads", "ONEDNN_MAX_CPU_ISA"))


def test_amx_is_used_on_both_sides_or_on_none(monkeypatch):
    monkeypatch.setattr(table, "compiled_isas", lambda: ("avx512amx", "avx512vnni", "portable"))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    found = table.processor()
    assert found["amx"] is False and found["kernels"] == "avx512vnni"
    assert table.command("gpt", QUICK).startswith("ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 lowbit bench --rows gpt")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    if "amx_int8" in found["instructions"]:
        assert table.processor()["kernels"] == "avx512amx"


def test_the_faster_layout_stands_in_the_table(monkeypatch):
    seconds = {("a", "x"): [2.0, 2.0, 2.0], ("a", "y"): [1.0, 1.0, 4.0], ("b", "x"): [3.0, 4.0, 4.0]}
    monkeypatch.setattr(table, "times_in_turn", lambda *_: seconds)
    a, b = speed.Settings().run("what", dict.fromkeys(seconds, int), {"b": {"least": 2.0, "aim": 3.0}})
    assert a["case"] == "a, y" and a["ms"] == 1000 and a["slower_layouts"] == {"x": 2000}
    assert b["case"] == "b, x" and b["ratio"] == 3.0 and speed.reached(b) == "aim"


@pytest.mark.parametrize(
    ("target", "ratio", "verdict"),
    [
        ({"least": 2.0, "aim": 3.0}, 1.9, "no"),
        ({"least": 2.0, "aim": 3.0}, 2.0, "yes"),
        ({"least": 2.0, "aim": 3.0}, 3.0, "aim"),
        ({"most": 3.0, "aim": 2.0}, 3.1, "no"),
        ({"most": 3.0, "aim": 2.0}, 3.0, "yes"),
        ({"most": 3.0, "aim": 2.0}, 2.0, "aim"),
        (None, 1.0, ""),
    ],
)
def test_verdicts(target, ratio, verdict):
    assert speed.reached({"ratio": ratio, "target": target}) == verdict


def test_rounds_and_ratios():
    calls = {"a": lambda: None, "b": lambda: None}
    assert [len(t) for t in bench.times_in_turn(calls, rounds=4, budget=9).values()] == [4, 4]
    assert [len(t) for t in bench.times_in_turn(calls, rounds=9, budget=0, least=2).values()] == [2, 2]
    assert bench.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0


def test_saved_bytes_of_float_layers():
    x = torch.randn(10, 6, requires_grad=True)
    linear = nn.Linear(6, 4)
    found = saved_bytes(linear, lambda: linear(x))
    assert (found.layers, found.others, found.weights) == (10 * 6 * 4, 0, 0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3), nn.Softmax(-1))
    found = saved_bytes(model, lambda: model(x))
    # the ReLU keeps its output, which is the second layer's input: once; the softmax its own
    assert (found.layers, found.others) == (10 * 6 * 4 + 10 * 4 * 4, 10 * 3 * 4)


def test_saved_bytes_find_what_python_objects_keep():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.codes = (x * 2).to(torch.int8)
            ctx.save_for_backward(w * 2)
            return x @ w.t()

        @staticmethod
        def backward(ctx, e):
            return None, None

    class Layer(nn.Linear):
        def forward(self, x):
            return Keeps.apply(x, self.weight)

    layer, x = Layer(6, 4), torch.randn(10, 6, requires_grad=True)
    found = saved_bytes(layer, lambda: layer(x))
    assert (found.activations, found.weights) == (10 * 6, 6 * 4 * 4)


def test_saved_row(sections):
    cases = sections["saved"]["cases"]
    assert cases[0]["bytes"] == 64 * 768 * 4 and cases[0]["target"] is None
    assert cases[1]["ratio"] == cases[1]["bytes"] / cases[0]["bytes"] and cases[1]["target"] == {
        "most": 0.4,
        "aim": 0.3,
    }


def test_int8_wins_from():
    def case(size, opponent, ratio):
        return {"path": "p", "size": size, "case": opponent, "ratio": ratio}

    cases = [case(8, "int8, x", 1.0), case(8, "float32, x", 1.2), case(16, "float32, y", 0.9), case(32, "float32", 1.1)]
    cases += [case(64, "float32", 2.0), case(8, "bfloat16", 0.9), case(64, "bfloat16", 0.5)]
    assert speed.wins_from({"cases": cases}) == [("p", "float32", "32"), ("p", "bfloat16", "nowhere in 8 to 64")]


def test_the_profile_names_operators():
    cases = explain.profile(QUICK)
    assert {c["what"] for c in cases} == {"GPT blocks", "resnet20, channels-last"}
    assert 0 < sum(c["share"] for c in cases if c["what"] == "GPT blocks") <= 1


def test_limits():
    cases = explain.limits(QUICK)
    assert [c["unit"] for c in cases] == ["Gop/s"] * 4 + ["GB/s"] * 3 and all(c["rate"] > 0 for c in cases)


@pytest.mark.parametrize("row", ["resnet20", "conv"])
def test_image_rows(row):
    found = {c["case"].partition(",")[0] for c in speed.ROWS[row][1](QUICK)}
    assert found - {"the bytes that int8 moves"} == {"int8", "float32", "bfloat16"}


@pytest.mark.parametrize("row", [r for r in ("cast", "binary", "packed") if r in speed.ROWS])
def test_operator_rows(row):
    try:
        cases = speed.ROWS[row][1](QUICK)
    except ImportError as error:
        assert "lowbit.ops" in str(error)
    else:
        assert all(c["ms"] > 0 for c in cases) and any(c["target"] for c in cases)


def test_a_pointwise_linear_is_a_linear():
    linear, other = nn.Linear(5, 3), training.PointwiseLinear(5, 3, 1)
    other.weight.data, other.bias.data = linear.weight.data.view(3, 5, 1, 1), linear.bias.data
    x = torch.randn(7, 5)
    assert torch.allclose(linear(x), other(x), atol=1e-6)


def test_every_format_family_is_cast():
    named = {type(f) for f in kernels.FORMATS.values()}
    assert named == {getattr(lowbit.formats, n) for n in ("Int", "Even", "Fixed", "Float", "Log", "Codebook")}


def test_kept_and_shown(sections, tmp_path):
    path = tmp_path / "results" / "speed.json"
    speed.save(path, {"linear": sections["linear"], "break_even": sections["break_even"]})
    speed.save(path, {"gpt": sections["gpt"]})
    assert list(read_json(path)["rows"]) == ["gpt", "linear", "break_even"]  # others stay; the order is the table's
    page = tmp_path / "docs" / "speed.md"
    page.parent.mkdir()
    regions = ("speed", "speed-limits", "wins", "results")
    page.write_text("".join(f"<!-- table:{n} -->\n<!-- /table:{n} -->\n" for n in regions))
    assert tables.refresh(tmp_path, check=True) == [page] and tables.refresh(tmp_path) == [page]
    assert tables.refresh(tmp_path, check=True) == []
    text = page.read_text()
    float32 = sections["gpt"]["cases"][2]
    assert f"|  | float32 | {float32['ms']:.3f} | {float32['ratio']:.2f}x | ≥ 2.5x | 4x | no |" in text
    assert "Not measured yet: `lowbit bench --rows limits --save results/speed.json`." in text
    assert "### Training step of a GPT block stack" in text and "int8 wins against" in text
    speed.save(path.with_name("elsewhere.json"), {"linear": sections["linear"]})
    page.write_text("<!-- table:elsewhere -->\n<!-- /table:elsewhere -->\n")
    tables.refresh(tmp_path)
    text = page.read_text()
    assert "### Linear layers" in text and "GPT" not in text
    write_json(path, {"schema": "x"})
    for call in (lambda: speed.save(path, {}), lambda: tables.refresh(tmp_path)):
        with pytest.raises(ValueError, match="was not written by.*`lowbit bench --save`"):
            call()


def test_a_row_without_its_operator_says_so(monkeypatch):
    def missing(s):
        raise ImportError("No module named 'lowbit.ops.nothing'")

    monkeypatch.setitem(speed.ROWS, "gpt", ("title", missing))
    section = speed.measure(["gpt"], QUICK)["gpt"]
    assert section["cases"] == [] and section["note"] == "not measured: No module named 'lowbit.ops.nothing'"
    assert tables.speed_row("gpt", {"gpt": section}).startswith("Not measured: ")


def test_unknown_rows():
    with pytest.raises(ValueError, match="unknown row 'gtp'.*gpt"):
        speed.measure(["gtp"], QUICK)
