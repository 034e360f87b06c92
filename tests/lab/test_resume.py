"""A run killed with SIGKILL at any moment and resumed ends with the same bits as one that was left alone."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from lowbit.lab.data import load
from lowbit.lab.loop import Config, train
from lowbit.lab.runs import Run, read_metrics, read_state
from lowbit.methods import METHODS

# stochastic weights, errors and updates; tracked scales; learned parameters; float as the control
WANTED = ("fp32", "twn", "luq", "wage", "fp8", "lsq", "psq", "gupta")
THERE = [name for name in WANTED if name in METHODS]

# 6 batches an epoch, 18 steps; a checkpoint every 4 steps and at the end of each epoch, a line of metrics at each step
SETTINGS = {
    "data": "digits",
    "model": "mlp",
    "model_options": {"hidden": [16, 16], "batch_norm": True},
    "epochs": 3,
    "batch_size": 32,
    "limit": 200,
    "checkpoint_every": 4,
    "log_every": 1,
    "threads": 1,
    "seed": 3,
    "device": "cpu",
}
# Runs one training with jobs from standard input, each in a forked child: importing torch once is most of the time.
SERVER = """
import json, os, sys
import accelerate, torch, torch._dynamo  # an optimizer imports it
from lowbit.lab.data import load
from lowbit.lab.loop import Config, train
torch.set_num_threads(1)
data = load("digits")

def child(job):
    dying = job.get("die", {})
    step, place = dying.get("step"), dying.get("place")
    real, count = os.replace, [0]
    def replace(source, target):
        if str(target).endswith("checkpoint.safetensors"):
            count[0] += 1
            if place == "before" and count[0] == step:
                os.kill(os.getpid(), 9)
            if place == "torn" and count[0] == step:
                with open(source, "r+b") as file:
                    file.truncate(100)
                os.kill(os.getpid(), 9)
        real(source, target)
        if str(target).endswith("checkpoint.safetensors") and place == "after" and count[0] == step:
            os.kill(os.getpid(), 9)
    os.replace = replace
    def progress(event):
        if place == "step" and event["step"] == step:
            os.kill(os.getpid(), 9)
    train(Config(**job["config"]), job["folder"], data=data, resume=job["resume"], progress=progress)

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        try:
            child(json.loads(line))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@functools.cache
def server():
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(folder, method, resume=False, **die):
    """Exit status of one training run in a process of its own; negative: the signal that ended it."""
    config = SETTINGS | {"method": method}
    job = {"config": config, "folder": str(folder), "resume": resume, "die": die}
    process = server()
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


@pytest.fixture(scope="module", autouse=True)
def _end_server():
    yield
    if server.cache_info().currsize:
        server().stdin.close()
        server().wait(10)


@functools.cache
def undisturbed(method):
    """(checkpoint, metrics) of a run that nobody killed."""
    with tempfile.TemporaryDirectory() as folder:
        assert run(folder, method) == 0
        return read_state(Path(folder) / "checkpoint.safetensors")["state"], timeless(folder)


def timeless(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(Path(folder))]


def assert_same(a, b, where=""):
    """Equal to the last bit, through nested dicts and lists."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key != "seconds":
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num()), where
    else:
        assert a == b, where


def check(folder, method):
    state, metrics = undisturbed(method)
    assert_same(read_state(Path(folder) / "checkpoint.safetensors")["state"], state, method)
    assert timeless(folder) == metrics
    steps = [line["step"] for line in read_metrics(Path(folder)) if line["kind"] == "step"]
    assert steps == list(range(1, 19))
    assert json.loads((Path(folder) / "result.json").read_text())["status"] == "ok"


KILLS = {
    "before the first checkpoint": {"place": "step", "step": 2},
    "at a checkpoint's step": {"place": "step", "step": 8},
    "between checkpoints": {"place": "step", "step": 15},
    "at the end of an epoch": {"place": "step", "step": 12},
    "checkpoint written, not renamed": {"place": "before", "step": 3},
    "checkpoint half written": {"place": "torn", "step": 4},
    "checkpoint renamed": {"place": "after", "step": 2},
}


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("method", THERE)
def test_killed_and_resumed(method, kill, tmp_path):
    assert run(tmp_path, method, **KILLS[kill]) == -signal.SIGKILL
    assert run(tmp_path, method, resume=True) == 0
    check(tmp_path, method)


def test_killed_again_and_again(tmp_path):
    """Each resumed run dies 5 steps later; the one that is left finishes."""
    method = "luq" if "luq" in METHODS else "twn"
    assert run(tmp_path, method, place="step", step=3) == -signal.SIGKILL
    for step in (6, 7, 11, 17):
        assert run(tmp_path, method, resume=True, place="step", step=step) == -signal.SIGKILL
    assert run(tmp_path, method, resume=True) == 0
    check(tmp_path, method)


def test_killed_from_outside(tmp_path):
    """The command line itself, killed by another process as soon as its metrics reach a step."""
    words = [
        "train",
        "--method",
        "twn",
        "--data",
        "digits",
        "--model",
        "mlp",
        "--model-option",
        "hidden=[16,16]",
        "--model-option",
        "batch_norm=true",
        "--epochs",
        "3",
        "--batch-size",
        "32",
        "--limit",
        "200",
        "--seed",
        "3",
        "--checkpoint-every",
        "4",
        "--log-every",
        "1",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
    ]
    command = [sys.executable, "-c", "from lowbit.cli import main; main()"]
    process = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(read_metrics(tmp_path / "run")) < 5:
        assert time.monotonic() < deadline and process.poll() in (None, 0)
        if process.poll() == 0:
            break  # a machine so fast that the run was over: it must then be complete
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert subprocess.run([*command, "train", "--resume", str(tmp_path / "run")], capture_output=True).returncode == 0
    check(tmp_path / "run", "twn")


def test_metrics_torn_in_the_middle_of_a_line(tmp_path):
    assert run(tmp_path, "twn", place="step", step=6) == -signal.SIGKILL
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    assert len(read_metrics(tmp_path)) == 6
    assert run(tmp_path, "twn", resume=True) == 0
    check(tmp_path, "twn")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    assert run(tmp_path, "twn") == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert run(tmp_path, "twn", resume=True) == 0
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


def test_data_that_changed_is_refused(tmp_path):
    assert run(tmp_path, "twn", place="step", step=5) == -signal.SIGKILL
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match="has changed since the run"):
        train(Config(), tmp_path, resume=True, data=load("digits"))


def test_metrics_that_were_cut_are_refused(tmp_path):
    assert run(tmp_path, "twn", place="step", step=5) == -signal.SIGKILL
    os.truncate(tmp_path / "metrics.jsonl", 10)
    with pytest.raises(ValueError, match="metrics.jsonl has 10 bytes"):
        Run(tmp_path).load()
