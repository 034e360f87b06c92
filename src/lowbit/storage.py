"""`save` and `load`: a model on disk as `recipe.json` and `model.safetensors`.

Weights of quantized layers are stored as codes, packed below eight bits, with their scales; everything else as it is.
No pickle: a file from a stranger holds numbers and the names of this library's own specifications.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .attention import PROJECTIONS, QMultiheadAttention
from .control import control_of, layers_of
from .formats import Format
from .layers import LayerQuant, Quantized
from .model import convert
from .quantizer import QTensor, Quantizer
from .recipe import Recipe
from .serial import from_data, to_data

__all__ = ["load", "save"]

VERSION = "1"
FIELDS = ("codes", "scale", "zero")


@dataclasses.dataclass(frozen=True)
class Packed:
    """One weight, or the rows of one that PyTorch packs with others, that is stored as codes."""

    param: str
    """Name of the parameter in the model's `state_dict`."""
    rows: slice
    layer: LayerQuant
    quant: Quantizer


def _packed(model: nn.Module) -> dict[str, Packed]:
    """What is stored as codes, by the name it has in the file."""
    found: dict[str, Packed] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, QMultiheadAttention):
            found |= _packed_attention(prefix, module)
        elif isinstance(module, Quantized) and isinstance(module._parameters.get("weight"), nn.Parameter):  # type: ignore
            quant = module.quant._role("W")
            if quant is not None:
                found[f"{prefix}weight"] = Packed(f"{prefix}weight", slice(None), module.quant, quant)
    return found


def _packed_attention(prefix: str, module: QMultiheadAttention) -> dict[str, Packed]:
    layers: dict[str, Any] = dict(module.projections.items())
    quants = {k: q for k, v in layers.items() if (q := v._role("W")) is not None}
    found: dict[str, Packed] = {}
    for i, name in enumerate(PROJECTIONS):
        if name not in quants:
            continue
        if name == "out_proj" or not module._qkv_same_embed_dim:
            param = key = f"{prefix}out_proj.weight" if name == "out_proj" else f"{prefix}{name}_weight"
            rows = slice(None)
        elif set(PROJECTIONS[:3]) <= set(quants):  # all of the packed parameter, or none of it
            param, key = f"{prefix}in_proj_weight", f"{prefix}in_proj_weight.{name}"
            rows = slice(i * module.embed_dim, (i + 1) * module.embed_dim)
        else:
            continue
        found[key] = Packed(param, rows, layers[name], quants[name])
    return found


def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the model that evaluation would run: codes of its quantized weights, the rest in float.

    The folder is made if needed; files are written beside their place and renamed, so an interrupted save leaves the
    old ones. A weight that is tied to another parameter is stored in float.

    Returns:
        The folder.

    Raises:
        ValueError: no recipe was applied, or a weight holds NaN and its grid has none.
    """
    control = control_of(model)
    was_training = {m: m.training for m in model.modules()}
    stored = {layer: layer.stored for layer in layers_of(model).values()}
    model.eval()
    try:
        tensors, coded = _collect(model)
    finally:
        for module, mode in was_training.items():
            module.training = mode
        for layer, codes in stored.items():
            layer.stored = codes
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"lowbit": VERSION, "coded": json.dumps(coded)}
    _replace(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata))
    _replace(folder / "recipe.json", lambda path: Path(path).write_text(control.recipe.to_json(), encoding="utf-8"))
    return folder


def _collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = model.state_dict()
    shared: dict[int, int] = {}
    for tensor in state.values():
        if tensor.numel():
            shared[tensor.data_ptr()] = shared.get(tensor.data_ptr(), 0) + 1
    alone = {k for k, v in state.items() if shared.get(v.data_ptr(), 1) == 1}
    packed = {n: p for n, p in _packed(model).items() if p.param in alone}
    gone = {p.param for p in packed.values()}
    tensors = {k: v.detach().clone().contiguous() for k, v in state.items() if k not in gone}
    coded: dict[str, Any] = {}
    for name, entry in packed.items():
        q = entry.layer.stored if entry.layer.frozen else None
        q = entry.quant.encode(state[entry.param][entry.rows].detach()) if q is None else q
        parts = {"codes": q.codes, "scale": q.scale} | ({} if q.zero is None else {"zero": q.zero}) | dict(q.extra)
        tensors |= {f"{name}:{k}": v.contiguous() for k, v in parts.items()}
        coded[name] = {
            "format": to_data(q.format),
            "count": q.count,
            "shape": list(q.shape),
            "dtype": str(q.dtype).removeprefix("torch."),
            "extra": sorted(q.extra),
        }
    return tensors, coded


def _replace(path: Path, write: Any) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(folder: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Load what `save` wrote into `model`, a float model of the same architecture; it returns converted, in evaluation
    mode, and computes exactly what the saved model computed in evaluation.

    Its weights stay on their grid: they are not quantized a second time.

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: the files are damaged, or belong to another architecture; the message names the tensor.
    """
    folder = Path(folder)
    for name in ("recipe.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; lowbit.save writes it")
    recipe = Recipe.from_json((folder / "recipe.json").read_text(encoding="utf-8"))
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  (no iterator on this object)
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'} is damaged: {error}") from None
    if metadata.get("lowbit") != VERSION:
        raise ValueError(f"{folder / 'model.safetensors'} was not written by lowbit.save")
    try:
        coded = json.loads(metadata["coded"])
    except (KeyError, json.JSONDecodeError):
        raise ValueError(f"{folder / 'model.safetensors'} lacks its table of codes") from None
    undo = convert(model, recipe)
    try:
        _fill(model, tensors, coded)
    except BaseException:
        undo()
        raise
    return model.eval()


def _fill(model: nn.Module, tensors: dict[str, Tensor], coded: dict[str, Any]) -> None:
    packed = _packed(model)
    stored: dict[str, QTensor] = {}
    own = model.state_dict()
    whole: dict[str, Tensor] = {}
    for name, entry in coded.items():
        if name not in packed:
            raise ValueError(f"{name} is stored as codes, but this model has no quantized weight of that name")
        place = packed[name]
        target = own[place.param]
        q = stored[name] = _read(name, entry, tensors, place, target[place.rows])
        whole.setdefault(place.param, torch.empty_like(target))[place.rows] = _decode(name, q)
    for param in whole:
        if missing := [n for n, p in packed.items() if p.param == param and n not in coded]:
            raise ValueError(f"the file lacks {missing[0]}")
    _take(model, tensors | whole)
    for name, q in stored.items():
        packed[name].layer.stored = q


def _read(name: str, entry: Any, tensors: dict[str, Tensor], place: Packed, weight: Tensor) -> QTensor:
    try:
        fmt = from_data(entry["format"])
        if not isinstance(fmt, Format) or list(weight.shape) != list(entry["shape"]):
            raise ValueError(f"shape {entry['shape']} in the file, {list(weight.shape)} in the model")
        extra = {k: tensors.pop(f"{name}:{k}") for k in entry["extra"]}
        codes, scale = tensors.pop(f"{name}:codes"), tensors.pop(f"{name}:scale")
        zero = tensors.pop(f"{name}:zero", None)
        return QTensor(
            codes,
            scale,
            zero,
            extra,
            place.quant.spec,
            fmt,
            place.quant.layout,
            weight.shape,
            int(entry["count"]),
            weight.dtype,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"can't read {name}: {error}") from None


def _decode(name: str, q: QTensor) -> Tensor:
    try:
        return q.decode()
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"can't decode {name}: {error}") from None


def _take(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = model.state_dict()
    lazy = {k for k in tensors if k.endswith(".tracked")}  # scales that take the size they were saved with
    for key, value in tensors.items():
        if key not in own:
            raise ValueError(f"the file has {key}, which this model lacks")
        if key not in lazy and own[key].shape != value.shape:
            raise ValueError(f"{key} is {list(value.shape)} in the file and {list(own[key].shape)} in this model")
    if absent := sorted(set(own) - set(tensors)):
        raise ValueError(f"the file lacks {absent[0]}")
    with torch.no_grad():
        model.load_state_dict(tensors)
