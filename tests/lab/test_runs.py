"""The run folder: files that are whole at any moment, checkpoints without pickle, metrics cut to a checkpoint."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from safetensors import safe_open

from lowbit.lab import runs
from lowbit.lab.runs import Run, environment, read_json, read_metrics, read_state, replace, write_json, write_state


def test_replace_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def fail(temporary):
        temporary.write_text('{"x": 2')
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace(path, fail)
    assert read_json(path) == {"x": 1}
    write_json(path, {"x": 3})  # what was left over does not stand in the way
    assert read_json(path) == {"x": 3} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_file_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), rename(a, b)))
    write_state(tmp_path / "s.safetensors", {"a": 1})
    assert calls[:2] == ["fsync", "replace"]


def test_json_has_no_number_that_json_lacks(tmp_path):
    write_json(tmp_path / "a.json", {"a": math.nan, "b": [math.inf, 1.5], "c": tmp_path, 3: (1, None)})
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": str(tmp_path), "3": [1, None]}


STATE = {
    "tensors": {0: torch.arange(6).reshape(2, 3).t(), 1: torch.tensor(2.5, dtype=torch.float64)},
    "kinds": [torch.zeros(0, 1), torch.tensor([True, False]), torch.tensor([1, 2], dtype=torch.uint8)],
    "plain": {"none": None, "pair": (0.9, 0.1 + 0.2), "text": "ä\n", "flag": True, "nested": [{"x": (1,)}]},
    "special": [math.inf, -math.inf],
    "half": torch.tensor([1.0, -3.0], dtype=torch.bfloat16),
}


def test_state_round_trip(tmp_path):
    write_state(tmp_path / "s", STATE)
    back = read_state(tmp_path / "s")
    assert back["plain"] == STATE["plain"] and type(back["plain"]["pair"]) is tuple
    assert back["special"] == STATE["special"]
    assert list(back["tensors"]) == [0, 1]  # keys stay numbers
    for a, b in [
        (back["tensors"][0], STATE["tensors"][0]),
        (back["tensors"][1], STATE["tensors"][1]),
        (back["half"], STATE["half"]),
        *zip(back["kinds"], STATE["kinds"], strict=True),
    ]:
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def test_tied_tensors_are_both_there(tmp_path):
    w = torch.ones(3)
    write_state(tmp_path / "s", {"a": w, "b": w, "view": w[:2]})
    back = read_state(tmp_path / "s")
    assert torch.equal(back["a"], w) and torch.equal(back["b"], w) and torch.equal(back["view"], w[:2])


def test_a_checkpoint_is_safetensors_with_a_json_header(tmp_path):
    write_state(tmp_path / "s", STATE)
    with safe_open(tmp_path / "s", framework="pt") as file:
        header = file.metadata()
        assert len(list(file.keys())) == 6
    assert json.loads(header["state"])["dict"][2][0] == "plain"


def test_objects_are_refused(tmp_path):
    with pytest.raises(TypeError, match="not SGD"):
        write_state(tmp_path / "s", {"o": torch.optim.SGD([torch.zeros(1)])})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "foreign"])
def test_damaged_checkpoints(tmp_path, damage):
    path = tmp_path / "s"
    write_state(path, STATE)
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes({"empty": b"", "cut": path.read_bytes()[:-3], "text": b"hello, this is no tensor"}[damage])
    with pytest.raises(ValueError, match="can't be read"):
        read_state(path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "s")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Run(tmp_path).config()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        Run(tmp_path).config()
    assert Run(tmp_path).result() is None and read_metrics(tmp_path) == []


def test_metrics_are_cut_to_the_checkpoint(tmp_path):
    run = Run(tmp_path)
    with run.writing():
        run.begin({"a": 1})
        for step in (1, 2):
            run.log({"kind": "step", "step": step, "loss": math.nan})
        run.save({"w": torch.ones(2)})
        for step in (3, 4):
            run.log({"kind": "step", "step": step})
        assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2, 3, 4]  # in the file at once
    again = Run(tmp_path)
    with again.writing():
        assert torch.equal(again.load()["w"], torch.ones(2))
        again.log({"kind": "step", "step": 3})
    lines = read_metrics(tmp_path)
    assert [m["step"] for m in lines] == [1, 2, 3] and lines[0]["loss"] is None


def test_metrics_without_a_checkpoint_start_again(tmp_path):
    run = Run(tmp_path)
    with run.writing():
        run.log({"kind": "step", "step": 1})
    assert Run(tmp_path).load() is None and read_metrics(tmp_path) == []


def test_metrics_that_are_gone(tmp_path):
    run = Run(tmp_path)
    with run.writing():
        run.log({"step": 1})
        run.save({})
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="is gone"):
        Run(tmp_path).load()


def test_one_writer(tmp_path):
    with Run(tmp_path).writing():
        with pytest.raises(ValueError, match="another process is writing"), Run(tmp_path).writing():
            pass
    with Run(tmp_path).writing():  # free again
        pass


def test_a_folder_holds_one_run(tmp_path):
    Run(tmp_path).begin({"a": 1})
    with pytest.raises(FileExistsError, match="--resume"):
        Run(tmp_path).begin({"a": 2})
    assert Run(tmp_path).config() == {"a": 1}


def test_environment(monkeypatch):
    found = environment()
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu" and found["cores"] == os.cpu_count()
    assert found["revision"] is None or len(found["revision"].removesuffix("-dirty")) == 40
    json.dumps(found, allow_nan=False)
    monkeypatch.setattr(runs.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError("git")))
    assert environment()["revision"] is None  # a machine without git
