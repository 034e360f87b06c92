"""A model on disk: exact, small, and safe against damage."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowbit
from lowbit.control import find_control


class Attention(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def recipe(bits: int = 4, **kwargs: object) -> lowbit.Recipe:
    top = 2 ** (bits - 1) - 1
    w = lowbit.QSpec(lowbit.Int(bits, narrow=True), lowbit.PerRow(), lowbit.AbsMax(top))
    return lowbit.Recipe("w", lowbit.Roles(W=w), **kwargs)


def mlp(width: int = 256) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width),
    )


@pytest.mark.parametrize(("bits", "ratio"), [(2, 0.08), (3, 0.11), (4, 0.14), (6, 0.20), (8, 0.27)])
def test_file_is_small_because_codes_are_packed(tmp_path, bits: int, ratio: float) -> None:
    model = mlp(512)
    float_bytes = sum(p.numel() * 4 for p in model.parameters())
    lowbit.apply(model, recipe(bits))
    lowbit.save(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < ratio * float_bytes


@pytest.mark.parametrize("make", [mlp, lambda: Attention()])
def test_round_trip_is_exact(tmp_path, make) -> None:
    model = lowbit.apply(make(), recipe()).eval()
    x = torch.randn(7, 256) if isinstance(model, nn.Sequential) else torch.randn(2, 6, 32)
    lowbit.save(model, tmp_path)
    other = lowbit.load(tmp_path, make())
    assert not other.training
    assert torch.equal(model(x), other(x))
    lowbit.save(other, tmp_path / "again")  # codes of a loaded model are written as they were read
    first, second = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)


def test_attention_projections_are_packed(tmp_path) -> None:
    lowbit.save(lowbit.apply(Attention(64), recipe()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["attention.in_proj_weight.k_proj:codes"].numel() == 64 * 64 // 2
    assert "attention.in_proj_weight" not in tensors


def test_weights_that_are_not_idempotent_are_not_quantized_twice(tmp_path) -> None:
    model = lowbit.apply(mlp(), lowbit.create("sawb")).eval()
    x = torch.randn(5, 256)
    lowbit.save(model, tmp_path)
    other = lowbit.load(tmp_path, mlp())
    assert torch.equal(model(x), other(x))
    other.train()
    other(x)
    assert not any(layer.frozen for layer in lowbit.control.layers_of(other.eval()).values())


def test_a_tied_weight_is_stored_once_in_float(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x))

    model = lowbit.apply(Tied(), recipe()).eval()
    lowbit.save(model, tmp_path)
    assert torch.equal(lowbit.load(tmp_path, Tied())(torch.arange(11)), model(torch.arange(11)))


def test_training_mode_and_values_are_untouched_by_save(tmp_path) -> None:
    model = lowbit.apply(mlp(), lowbit.create("gupta"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lowbit.save(model, tmp_path)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path) -> None:
    lowbit.save(lowbit.apply(mlp(64), recipe()), tmp_path)
    model = mlp(32)
    before, x = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(3, 32)
    y = model(x)
    with pytest.raises(ValueError, match=r"0\.weight.*\[64, 64\] in the file, \[32, 32\] in the model"):
        lowbit.load(tmp_path, model)
    assert find_control(model) is None and type(model[0]) is nn.Linear
    assert set(model.state_dict()) == set(before) and torch.equal(model(x), y)


def test_damaged_and_foreign_files_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="recipe.json"):
        lowbit.load(tmp_path, mlp())
    lowbit.save(lowbit.apply(mlp(), recipe()), tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()

    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        lowbit.load(tmp_path, mlp())

    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="not written by lowbit.save"):
        lowbit.load(tmp_path, mlp())

    path.write_bytes(whole)
    text = json.loads((tmp_path / "recipe.json").read_text())
    text["roles"]["W"]["format"]["spec"] = "os.system"
    (tmp_path / "recipe.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="unknown specification 'os.system'"):
        lowbit.load(tmp_path, mlp())


def test_missing_codes_are_named(tmp_path) -> None:
    lowbit.save(lowbit.apply(mlp(), recipe()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    del tensors["0.weight:codes"]
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    with pytest.raises(ValueError, match=r"0\.weight"):
        lowbit.load(tmp_path, mlp())


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    model = lowbit.apply(mlp(), recipe())
    lowbit.save(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        model[0].weight.add_(1)

    def stop(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError, match="disk full"):
        lowbit.save(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "recipe.json"]


def test_nan_is_refused_before_anything_is_written(tmp_path) -> None:
    model = lowbit.apply(mlp(), recipe())
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        lowbit.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
