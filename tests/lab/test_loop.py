"""The training loop: what decides a run, its losses, its bits, and that it learns."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import lowbit
from lowbit.lab import loop, models
from lowbit.lab.data import IGNORE, load
from lowbit.lab.loop import CRITERIA, Config, Diverged, evaluate, flat, lr_factor, open_model, resolve, train
from lowbit.lab.runs import read_metrics, read_state
from lowbit.methods import METHODS, Card

DIGITS = load("digits")
TINY = Config(model="mlp", model_options={"hidden": [16, 16]}, epochs=1, limit=128, device="cpu", log_every=1)
needs_wage = pytest.mark.skipif("wage" not in METHODS, reason="wage is not installed")


def weights(folder):
    state = read_state(folder / "checkpoint.safetensors")["state"]["model"]
    return {k: v for k, v in state.items() if "quant" not in k}


# What decides a run


def test_defaults():
    full = resolve(Config(), DIGITS)
    assert (full.model, full.epochs, full.batch_size, full.threads) == ("lenet5", 20, 32, 1)
    assert (full.optimizer, full.lr, full.momentum, full.weight_decay) == ("sgd", 0.02, 0.9, 2e-3)
    assert (full.schedule, full.warmup, full.criterion) == ("cosine", 0, "cross_entropy")
    assert full.fingerprint == DIGITS.fingerprint


def test_every_model_and_kind_of_data_has_defaults():
    from lowbit.lab.data import SOURCES

    assert set(loop.TRAINING) == set(models.MODELS)
    assert set(loop.MODEL) == set(loop.EPOCHS) == set(SOURCES)
    assert set(loop.MODEL.values()) <= set(models.MODELS)


def test_resolving_twice_changes_nothing():
    full = resolve(Config(method="twn", epochs=3), DIGITS)
    assert resolve(dataclasses.replace(full, recipe=None), DIGITS) == full
    assert Config.from_data(json.loads(json.dumps(full.to_data()))) == full


@needs_wage
def test_the_card_decides_before_the_model_and_the_user_before_both():
    full = resolve(Config(method="wage"), DIGITS)
    assert (full.lr, full.momentum, full.weight_decay, full.criterion) == (8.0, 0.0, 0.0, "sse")
    full = resolve(Config(method="wage", lr=2.0, criterion="cross_entropy"), DIGITS)
    assert (full.lr, full.momentum, full.criterion) == (2.0, 0.0, "cross_entropy")


def test_a_card_with_another_optimizer(monkeypatch):
    card = Card("twn", "", 2016, "", "weights", training={"optimizer": "adam", "lr": 5e-3, "epochs": 99, "batch": 7})
    entry = dataclasses.replace(METHODS["twn"], card=card)
    monkeypatch.setitem(METHODS, "twn", entry)
    full = resolve(Config(method="twn"), DIGITS)
    assert (full.optimizer, full.lr, full.weight_decay, full.epochs, full.batch_size) == ("adam", 5e-3, 0.0, 20, 32)
    full = resolve(Config(method="twn", optimizer="sgd"), DIGITS)  # the card's rate belongs to its optimizer
    assert (full.optimizer, full.lr) == ("sgd", 0.02)


def test_the_seed_reaches_the_recipe():
    assert resolve(Config(method="twn", seed=5), DIGITS).recipe["seed"] == 5
    assert resolve(Config(method="twn", seed=5, options={"seed": 7}), DIGITS).recipe["seed"] == 7


def test_options_may_be_specifications():
    full = resolve(Config(method="twn", options={"blocks": {"spec": "PerAxis", "axis": 0}}), DIGITS)
    assert loop.recipe_of(full).roles.W.blocks == lowbit.PerAxis(0)


def test_a_recipe_of_ones_own_with_rules():
    recipe = lowbit.create("twn", rules=[lowbit.Rule(where="last", type="linear", roles=lowbit.Roles())])
    full = resolve(Config(recipe=json.loads(recipe.to_json())), DIGITS)
    assert full.method == "twn" and loop.recipe_of(full).rules == recipe.rules
    assert loop.recipe_of(full).to_json() == recipe.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "lug"}, "unknown method 'lug'"),
        ({"model": "lenet"}, "unknown model 'lenet'; did you mean 'lenet5'"),
        ({"method": "twn", "options": {"treshold": 1}}, "did you mean 'threshold'"),
        ({"optimizer": "adan"}, "unknown optimizer 'adan'; did you mean 'adam'"),
        ({"schedule": "cos"}, "unknown schedule 'cos'; did you mean 'cosine'"),
        ({"criterion": "mse"}, "unknown criterion 'mse'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"lr": -1.0}, "lr must be at least 0; got -1.0"),
        ({"lr": math.inf}, "lr must be at least 0; got inf"),
        ({"batch_size": 2000}, "128 training examples don't fill a batch of 2000"),
        ({"tracker": "wandbb"}, "tracker 'wandbb' is not installed"),
    ],
)
def test_refusals(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(TINY, **change), tmp_path / "run", data=DIGITS)
    assert not (tmp_path / "run").exists()


# Losses and schedules


def test_criteria_against_numpy():
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(7, 4, generator=g, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2, 0, 3])
    o, hot = z.numpy(), np.eye(4)[y.numpy()]
    p = np.exp(o) / np.exp(o).sum(1, keepdims=True)
    want = {
        "cross_entropy": -np.log((p * hot).sum(1)).mean(),
        "sse": 0.5 * ((o - hot) ** 2).sum(),
        "squared_hinge": (np.maximum(0, 1 - (2 * hot - 1) * o) ** 2).mean(),
    }
    for name, value in want.items():
        assert float(CRITERIA[name](z, y)) == pytest.approx(value, rel=1e-12), name
    z.requires_grad_()
    CRITERIA["sse"](z, y).backward()
    assert np.allclose(z.grad.numpy(), o - hot, atol=1e-14)  # WAGE's first error: output - target


def test_positions_that_do_not_count():
    logits, target = torch.randn(2, 3, 5), torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, 4]])
    kept, labels = flat(logits, target)
    assert labels.tolist() == [1, 2, 4]
    assert torch.equal(kept, torch.stack([logits[0, 0], logits[0, 2], logits[1, 2]]))


def test_learning_rates():
    config = Config(schedule="cosine", warmup=0)
    factor = lr_factor(config, 100)
    assert (factor(0), factor(50)) == (1.0, pytest.approx(0.5)) and factor(100) == pytest.approx(0.0)
    warm = lr_factor(dataclasses.replace(config, warmup=4), 104)
    assert [warm(i) for i in range(4)] == [0.25, 0.5, 0.75, 1.0] and warm(54) == pytest.approx(0.5)
    steps = lr_factor(dataclasses.replace(config, schedule="step"), 100)
    assert [steps(i) for i in (0, 49, 50, 74, 75, 99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert lr_factor(dataclasses.replace(config, schedule="constant"), 10)(9) == 1.0


def test_the_rate_of_each_step(tmp_path):
    train(dataclasses.replace(TINY, epochs=2, lr=0.1), tmp_path, data=DIGITS)
    lines = [m for m in read_metrics(tmp_path) if m["kind"] == "step"]
    assert [m["step"] for m in lines] == list(range(1, 9))
    assert [m["lr"] for m in lines] == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])


# Runs


def test_it_learns_and_says_so(tmp_path):
    config = Config(model="mlp", model_options={"hidden": [64]}, epochs=6, device="cpu")
    seen = []
    result = train(config, tmp_path, data=DIGITS, progress=seen.append)
    assert result["status"] == "ok" and result["metric"] >= 95.0
    assert result["steps"] == 6 * 44 == len(seen) == seen[-1]["step"] == seen[-1]["steps"]
    epochs = [m for m in read_metrics(tmp_path) if m["kind"] == "epoch"]
    assert [m["epoch"] for m in epochs] == [1, 2, 3, 4, 5, 6] and epochs[-1]["test_metric"] == result["metric"]
    assert epochs[-1]["train_loss"] < 0.5 * epochs[0]["train_loss"]
    assert result["bytes"] == 4 * (64 * 64 + 64 + 64 * 10 + 10)
    # the figure is what the stored model gives
    model = models.build("mlp", (1, 8, 8), 10, hidden=[64])
    lowbit.load(tmp_path / "model", model)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in DIGITS.batches("test", 256))
    assert 100 * right / 360 == result["metric"]
    assert json.loads((tmp_path / "environment.json").read_text())["torch"] == torch.__version__


def test_a_quantized_method_learns(tmp_path):
    config = Config(method="twn", model="mlp", model_options={"hidden": [64]}, epochs=6, device="cpu")
    result = train(config, tmp_path, data=DIGITS)
    assert result["metric"] >= 93.0
    assert result["bytes"] == (64 * 64 + 64 * 10) // 4 + 2 * 4 + 4 * (64 + 10)  # 2 bits a weight, 2 scales, biases


def test_same_seed_same_bits(tmp_path):
    for name, change in {"a": {}, "b": {}, "two threads": {"threads": 2}, "other seed": {"seed": 1}}.items():
        train(dataclasses.replace(TINY, method="twn", **change), tmp_path / name, data=DIGITS)
    torch.manual_seed(99)
    train(dataclasses.replace(TINY, method="twn"), tmp_path / "other global state", data=DIGITS)
    first = weights(tmp_path / "a")
    for name in ("b", "two threads", "other global state"):
        again = weights(tmp_path / name)
        assert all(torch.equal(first[k], again[k]) for k in first), name
    assert not torch.equal(first["layers.1.weight"], weights(tmp_path / "other seed")["layers.1.weight"])


def test_methods_see_the_same_data_and_start(tmp_path, monkeypatch):
    seen = {}
    real = type(DIGITS).batches

    def spy(self, split, *args, **kwargs):
        for x, y in real(self, split, *args, **kwargs):
            if split == "train":
                seen.setdefault(method, []).append((float(x.double().sum()), y.tolist()))
            yield x, y

    monkeypatch.setattr(type(DIGITS), "batches", spy)
    start = {}
    real_apply = lowbit.apply
    monkeypatch.setattr(
        lowbit,
        "apply",
        lambda model, recipe: (
            start.__setitem__(method, [p.detach().clone() for p in model.parameters()]),
            real_apply(model, recipe),
        )[1],
    )
    for method in ("fp32", "twn"):
        train(dataclasses.replace(TINY, method=method, epochs=2), tmp_path / method, data=DIGITS)
    assert len(seen["fp32"]) == 8 and seen["fp32"] == seen["twn"]
    assert seen["fp32"][:4] != seen["fp32"][4:]  # each epoch has an order of its own
    assert all(torch.equal(a, b) for a, b in zip(start["fp32"], start["twn"], strict=True))


def test_the_penalty_is_part_of_the_loss(tmp_path, monkeypatch):
    """Half a squared norm as the penalty is weight decay."""
    plain = dataclasses.replace(TINY, momentum=0.0, weight_decay=0.3)
    train(plain, tmp_path / "decay", data=DIGITS)
    monkeypatch.setattr(lowbit, "penalty", lambda model: 0.15 * sum(p.square().sum() for p in model.parameters()))
    train(dataclasses.replace(plain, weight_decay=0.0), tmp_path / "penalty", data=DIGITS)
    a, b = weights(tmp_path / "decay"), weights(tmp_path / "penalty")
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
    # the loss that is shown is without it
    first = [read_metrics(tmp_path / name)[0]["loss"] for name in ("decay", "penalty")]
    assert first[0] == first[1]


def test_clipping_bounds_the_step(tmp_path):
    config = dataclasses.replace(TINY, momentum=0.0, weight_decay=0.0, schedule="constant", lr=1.0, clip_norm=1e-3)
    train(config, tmp_path, data=DIGITS)
    start = models.build("mlp", (1, 8, 8), 10, seed=0, hidden=[16, 16]).state_dict()
    end = weights(tmp_path)
    moved = math.sqrt(sum(float((end[k] - start[k]).square().sum()) for k in start))
    assert 0 < moved <= 4 * 1e-3 * 1.001  # 4 steps


def test_divergence(tmp_path):
    with pytest.raises(Diverged, match="at step"):
        train(dataclasses.replace(TINY, lr=1e9, epochs=3), tmp_path, data=DIGITS)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "diverged" and "loss is" in result["reason"]
    assert train(Config(), tmp_path, data=DIGITS, resume=True) == result  # nothing to continue


def test_failures_are_noted_and_may_be_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(lowbit, "attach", lambda *a: (_ for _ in ()).throw(RuntimeError("out of luck\nand more")))
    with pytest.raises(RuntimeError):
        train(TINY, tmp_path, data=DIGITS)
    assert json.loads((tmp_path / "result.json").read_text()) == {"status": "failed", "reason": "out of luck"}
    monkeypatch.undo()
    assert train(TINY, tmp_path, data=DIGITS, resume=True)["status"] == "ok"


def test_bf16_autocast(tmp_path):
    result = train(dataclasses.replace(TINY, amp="bf16"), tmp_path / "half", data=DIGITS)
    train(TINY, tmp_path / "full", data=DIGITS)
    half, full = (read_metrics(tmp_path / n)[0]["loss"] for n in ("half", "full"))
    assert result["status"] == "ok" and 0 < abs(half - full) < 0.05


def test_adam(tmp_path):
    result = train(dataclasses.replace(TINY, optimizer="adam", limit=None, epochs=2, lr=0.02), tmp_path, data=DIGITS)
    assert result["metric"] > 80
    assert resolve(dataclasses.replace(TINY, optimizer="adamw"), DIGITS).lr == 1e-3


@needs_wage
def test_sse_is_shown_for_an_example(tmp_path):
    """A sum over the batch in the backward pass; the figures do not depend on the size of the batch."""
    train(dataclasses.replace(TINY, method="wage", model_options={"hidden": [64, 64]}), tmp_path, data=DIGITS)
    model, loss = open_model(tmp_path, DIGITS).eval(), 0.0
    for x, y in DIGITS.batches("test", 256):
        loss += 0.5 * float((model(x).detach() - torch.eye(10)[y]).square().sum())
    assert read_metrics(tmp_path)[-1]["test_loss"] == pytest.approx(loss / 360, rel=1e-5)


def test_perplexity_of_text(tmp_path):
    (tmp_path / "input.txt").write_text("abcdefgh" * 400)
    data = load(f"text:{tmp_path}", block=16)
    config = Config(
        data=f"text:{tmp_path}",
        data_options={"block": 16},
        model_options={"dim": 32, "depth": 1},
        epochs=12,
        method="twn",
        lr=0.01,
        warmup=0,
        device="cpu",
        threads=1,
    )
    result = train(config, tmp_path / "run", data=data)
    assert result["metric_name"] == "perplexity" and result["metric"] < 2.0 < 8  # 8 letters; the next one is certain
    assert result["metric"] == pytest.approx(math.exp(result["loss"]), rel=1e-9)
    model = open_model(tmp_path / "run", data)
    full = Config.from_data(json.loads((tmp_path / "run" / "config.json").read_text()))
    assert evaluate(model, data, full, torch.device("cpu"))[1] == pytest.approx(result["metric"], rel=1e-6)
    logits = torch.cat([model(x).flatten(0, 1)[(y != IGNORE).flatten()] for x, y in data.batches("test", 7)])
    labels = torch.cat([y[y != IGNORE] for _, y in data.batches("test", 7)])
    own = torch.log_softmax(logits.detach().double(), -1)[torch.arange(len(labels)), labels]
    assert math.exp(-float(own.mean())) == pytest.approx(result["metric"], rel=1e-4)
