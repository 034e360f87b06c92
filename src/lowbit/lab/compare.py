"""Several methods on the same work: the same data order, seeds, epochs and initial weights.

`compare` trains every method with every seed (each in a run folder of its own, see `runs`), measures one training
step of each against float32, and writes `results.json` and `report.html` into its folder.

`results.json`, also what `report_html.write(results, path)` takes: plain JSON values only. `null` stands for what was
not measured or is not a finite number. Fields of one method that failed may all be `null` or empty.

    schema        "lowbit-compare-1"
    title         "lenet5 on digits"
    created       "2025-11-21T10:30:00Z"
    command       the command line
    task          "classification", "lm" or "translation"
    metric        {"name": "accuracy", "unit": "%", "better": "higher"}, values 0 to 100
                  or {"name": "perplexity", "unit": "", "better": "lower"}
    data          {"source", "fingerprint", "train": examples, "test": examples, "input_shape", "classes", "limit"}
    model         {"name", "options": {}, "parameters": count}
    settings      what all methods share: {"epochs", "batch_size", "steps_per_epoch", "schedule", ...}
    seeds         [0, 1]
    baseline      name of the method that ratios refer to ("fp32"), or null if it was not among them
    environment   {"lowbit", "torch", "python", "platform", "cpu", "threads", "device", "revision"}
    methods       a list in the order asked for, each:
      key         unique in this file: "luq", or "luq samples=2" where options were given
      name        "luq"
      options     {"samples": 2}
      title, year, arxiv, area, summary    from the method's card
      status      "ok", "failed" (an error) or "diverged" (loss not finite): the worst of its runs
      reason      one line; "" when ok
      metric      {"mean", "spread", "values": [one a seed, null if it failed]} or null. The final epoch's value on the
                  test split; spread is the sample standard deviation over seeds, null for a single one
      bits        {"W", "A", "E", "G", "U"}: mean stored bits over layers, or null
      bytes       stored weights (codes and scales) in bytes, as lowbit.save writes them, or null
      step        {"ms": median, "ratio": median to float32's in the same rounds, "rounds": n} or null
      training    what this run used: {"optimizer", "lr", "momentum", "weight_decay", "criterion", ...}
      roles       {"W": "Int(bits=2, ...)", ...}: format of each quantized role
      runs        one a seed: {"seed", "folder", "status", "reason", "metric", "loss", "seconds", "curve", "steps"}
        curve     one an epoch: {"epoch": 1 ..., "step", "train_loss", "train_metric", "test_loss", "test_metric"}
                  metrics as in `metric` (percent or perplexity)
        steps     a few hundred at most: {"step", "loss", "lr"}: loss of the training batches
      layers      of the first seed's final weights on one batch, one for each layer and role: {"layer", "kind", "role",
                  "format", "bits", "scale", "sqnr", "exact", "clipped", "zero", "note"}; role W, A, E, G, U, another
                  operand such as "grad_w_right", or "-" for a layer left in float; sqnr in dB, null when not measured
                  or when `exact` is true (nothing lost); clipped and zero are fractions
      histograms  of W, A and E of at most 12 layers on that batch, one for each: {"layer", "role", "format", "count",
                  "edges": 65 bin edges, "counts": 64, "levels": grid levels in real units (at most 65, ascending; fewer
                  than the format has where it has more), "clip": [low, high] of the grid in real units, "blocks":
                  number of scales, "magnitudes": {"edges": 65 values of log2|x|, "counts": 64, "zeros": count}}.
                  Real units throughout. With several blocks `levels` and `clip` belong to the block of median scale.
                  `levels` is [] and `clip` null where the tensor is transformed before it meets its grid. A method
                  that leaves a role in float (fp32) has the histogram with "format": "float32", no levels, no clip.
    ranking       keys of methods, best metric first, failed ones last
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowbit
from lowbit.backward import Coded
from lowbit.control import layers_of
from lowbit.lab import models
from lowbit.lab.data import Data, without_place
from lowbit.lab.loop import (
    CRITERIA,
    RUNTIME,
    Config,
    Diverged,
    flat,
    make_optimizer,
    metric_of,
    open_model,
    reason_of,
    recipe_of,
    resolve,
    torch_settings,
    train,
)
from lowbit.lab.runs import Run, environment, plain, read_json, read_metrics, write_json
from lowbit.methods import find
from lowbit.quantizer import Quantizer, watching

__all__ = ["RESULT", "SCHEMA", "compare", "key_of", "record", "step_times", "stepper", "table"]

RESULT = "lowbit-result-1"  # of `record`
SCHEMA = "lowbit-compare-1"
BINS = 64
LEVELS = 65
"""Grid levels listed at most."""
LAYERS = 12
"""Layers with histograms at most."""
CURVE = 300
"""Points of a curve of training losses at most."""
SHARED = ("data", "model", "epochs", "batch_size", "limit", "augment", "amp", "channels_last", "compile", "device")

Progress = Callable[[dict[str, Any]], None]
"""Called with {"phase": "train", "method", "seed", "run", "runs"} and what `train` reports; then with {"phase":
"measure", "method"}."""


def key_of(name: str, options: dict[str, Any]) -> str:
    """What a method with its options is called in tables."""
    return " ".join([name, *(f"{k}={v}" for k, v in options.items())])


def compare(
    methods: Sequence[tuple[str, dict[str, Any]]],
    config: Config,
    data: Data,
    seeds: Sequence[int],
    folder: str | Path,
    *,
    command: str = "",
    measure: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train every method with every seed and write `results.json`; see the top of this file for what is in it.

    A run that is complete in `folder` with the same configuration is not repeated, one that was cut off continues. A
    method that fails or diverges is marked, and the others go on.

    Args:
        methods: names with their options, in the order of the table.
        config: what all runs share; its method, options and seed are replaced.
        data: the data of `config`.
        seeds: at least one.
        folder: runs go to `folder/runs`.
        command: for the record.
        measure: also time one training step of each method against float32.
        progress: told of every step.

    Raises:
        ValueError: two methods of one name and options, no seed, or another process is at work in `folder`.
    """
    folder = Path(folder)
    keys = [key_of(*m) for m in methods]
    if len(set(keys)) != len(keys) or not keys or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"compare needs methods and seeds, each once; got {', '.join(keys)} and {list(seeds)}")
    folder.mkdir(parents=True, exist_ok=True)
    reference = resolve(dataclasses.replace(config, method="fp32", options={}, recipe=None, criterion=None), data)
    with Run(folder).writing(), torch_settings(reference):
        results = _compare(methods, keys, config, reference, data, seeds, folder, command, measure, progress)
    write_json(folder / "results.json", results)
    return results


def _compare(
    methods: Sequence[tuple[str, dict[str, Any]]],
    keys: Sequence[str],
    config: Config,
    reference: Config,
    data: Data,
    seeds: Sequence[int],
    folder: Path,
    command: str,
    measure: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    resolved: dict[str, Config] = {}
    for i, ((name, options), key) in enumerate(zip(methods, keys, strict=True)):
        runs = []
        for j, seed in enumerate(seeds):
            place = {
                "phase": "train",
                "method": key,
                "seed": seed,
                "run": i * len(seeds) + j,
                "runs": len(keys) * len(seeds),
            }
            own = dataclasses.replace(config, method=name, options=options, recipe=None, seed=seed)
            runs.append(_run(own, data, folder / "runs" / _slug(key) / f"seed{seed}", folder, place, progress))
            if (full := runs[-1].pop("config")) is not None:
                resolved.setdefault(key, full)
        found.append(_method(key, name, options, runs, resolved.get(key)))
        if progress is not None:
            progress({"phase": "measure", "method": key})
        _analyse(found[-1], folder, data)
    baseline = next((m["key"] for m in found if m["name"] == "fp32"), None)
    if measure:
        _time(found, resolved, reference, data, folder, progress)
    return plain(_results(found, reference, data, seeds, baseline, command))


def _slug(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", key)


# ---- one run ---------------------------------------------------------------------------------------------------------


def _run(
    config: Config, data: Data, folder: Path, out: Path, place: dict[str, Any], progress: Progress | None
) -> dict[str, Any]:
    def tell(event: dict[str, Any]) -> None:
        if progress is not None:
            progress(place | event)

    line: dict[str, Any] = {
        "seed": config.seed,
        "folder": str(folder.relative_to(out)),
        "status": "failed",
        "reason": "",
        "metric": None,
        "loss": None,
        "seconds": None,
        "bytes": None,
        "curve": [],
        "steps": [],
        "config": None,
    }
    try:
        full = resolve(config, data)
        line["config"] = full
        resume = _matches(folder, full)
        if not resume and folder.exists():
            shutil.rmtree(folder)  # another configuration's run, in a folder that this function made
        result = train(full, folder, data=data, resume=resume, progress=tell)
        line |= {k: result.get(k) for k in ("status", "reason", "metric", "loss", "seconds", "bytes")}
    except Diverged as error:
        line |= {"status": "diverged", "reason": reason_of(error)}
    except (
        ArithmeticError,
        ImportError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        LookupError,
        AssertionError,
        AttributeError,
    ) as error:
        line |= {"status": "failed", "reason": f"{type(error).__name__}: {reason_of(error)}"}
    metrics = read_metrics(folder)
    line["curve"] = [
        {k: m[k] for k in ("epoch", "step", "train_loss", "train_metric", "test_loss", "test_metric")}
        for m in metrics
        if m["kind"] == "epoch"
    ]
    steps = [{k: m[k] for k in ("step", "loss", "lr")} for m in metrics if m["kind"] == "step"]
    line["steps"] = steps[:: max(1, -(-len(steps) // CURVE))]
    return line


def _matches(folder: Path, config: Config) -> bool:
    """Whether `folder` holds a run of `config`, finished or not."""
    try:
        held = Run(folder).config()
    except (FileNotFoundError, ValueError):
        return False
    asked = plain(config.to_data())
    return {k: v for k, v in held.items() if k not in RUNTIME} == {k: v for k, v in asked.items() if k not in RUNTIME}


def _method(
    key: str, name: str, options: dict[str, Any], runs: list[dict[str, Any]], config: Config | None
) -> dict[str, Any]:
    card = find(name).card
    worst = max(runs, key=lambda r: ("ok", "diverged", "failed").index(r["status"]))
    values = [r["metric"] if r["status"] == "ok" else None for r in runs]
    good = [v for v in values if v is not None]
    metric = None
    if good:
        spread = statistics.stdev(good) if len(good) > 1 else None
        metric = {"mean": statistics.fmean(good), "spread": spread, "values": values}
    training = (
        {}
        if config is None
        else {
            k: getattr(config, k)
            for k in ("optimizer", "lr", "momentum", "weight_decay", "schedule", "warmup", "clip_norm", "criterion")
        }
    )
    return {
        "key": key,
        "name": name,
        "options": options,
        "title": card.title,
        "year": card.year,
        "arxiv": card.arxiv,
        "area": card.area,
        "summary": card.summary,
        "status": worst["status"],
        "reason": worst["reason"],
        "metric": metric,
        "bits": None,
        "bytes": next((b for r in runs if (b := r.pop("bytes")) is not None), None),
        "step": None,
        "training": training,
        "roles": {},
        "runs": runs,
        "layers": [],
        "histograms": [],
    }


def _results(
    found: list[dict[str, Any]], config: Config, data: Data, seeds: Sequence[int], baseline: str | None, command: str
) -> dict[str, Any]:
    metric = metric_of(data.task)
    sign = -1 if metric["better"] == "higher" else 1
    size, limit = int(config.batch_size or 1), config.limit
    plain_model = models.build(str(config.model), data.input_shape, data.classes, seed=0, **config.model_options)
    examples = data.steps(1), data.steps(1, split="test")
    settings = {k: getattr(config, k) for k in SHARED if k not in ("data", "model")}
    return {
        "schema": SCHEMA,
        "title": f"{config.model} on {config.data.partition(':')[0]}",
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
        "task": data.task,
        "metric": metric,
        "data": {
            "source": without_place(config.data),
            "fingerprint": data.fingerprint,
            "train": examples[0],
            "test": examples[1],
            "input_shape": list(data.input_shape),
            "classes": data.classes,
            "limit": limit,
        },
        "model": {
            "name": config.model,
            "options": config.model_options,
            "parameters": sum(p.numel() for p in plain_model.parameters()),
        },
        "settings": settings | {"steps_per_epoch": data.steps(size, limit), "schedule": config.schedule},
        "seeds": list(seeds),
        "baseline": baseline,
        "environment": environment(),
        "methods": found,
        "ranking": [
            m["key"]
            for m in sorted(
                found,
                key=lambda m: (
                    m["status"] != "ok",
                    m["metric"] is None,
                    sign * m["metric"]["mean"] if m["metric"] else 0,
                ),
            )
        ],
    }


# ---- what quantization does to the tensors ---------------------------------------------------------------------------


def _analyse(method: dict[str, Any], folder: Path, data: Data) -> None:
    """Fill in bits, roles, layers and histograms from the first run that ended well."""
    run = next((r for r in method["runs"] if r["status"] == "ok"), None)
    if run is None:
        return
    place = folder / run["folder"]
    config = Config.from_data(Run(place).config())
    model = open_model(place, data)
    x, y = next(data.batches("train", int(config.batch_size or 1), config.seed, limit=config.limit))
    criterion = CRITERIA[str(config.criterion)]

    def loss(output: Any) -> Tensor:
        return criterion(*flat(output, y))

    report = lowbit.report(model, x, loss)
    rows = report.to_list()
    for row in rows:
        row["exact"] = row["sqnr"] is not None and math.isinf(row["sqnr"])
        row["sqnr"] = None if row["exact"] else row["sqnr"]
    method["layers"] = rows
    method["bits"] = {role: 32.0 for role in "WAEGU"} | report.bits()
    roles = [r for r in rows if r["role"] in "WAEGU"]
    method["roles"] = {r["role"]: r["format"] for r in reversed(roles)}
    method["histograms"] = histograms(model, x, loss)


def histograms(model: nn.Module, x: Tensor, loss: Callable[[Any], Tensor]) -> list[dict[str, Any]]:
    """Histograms of W, A and E of a converted model's layers on one batch, with their grids; `model` is not changed."""
    twin = copy.deepcopy(model)
    products = {n: m for n, m in twin.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
    quantized = layers_of(twin)
    place = {n: i for i, (n, _) in enumerate(twin.named_modules())}
    order = sorted({**products, **quantized}, key=lambda n: place.get(n, place.get(n.rpartition(".")[0], -1)))
    chosen = set(spread_out(order, LAYERS))
    owner = {id(q): (name, slot) for name, layer in quantized.items() for slot, q in layer.slots.items()}
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def watch(quant: Quantizer, blocks: Tensor, q: Tensor, coded: Coded) -> None:
        layer, role = owner.get(id(quant), ("", ""))
        if layer in chosen and role in ("W", "A", "E") and (layer, role) not in found:
            found[layer, role] = histogram(layer, role, blocks.detach(), coded)

    floats: dict[tuple[str, str], Tensor] = {}

    def hook(name: str, module: nn.Module) -> None:
        floats[name, "W"] = module.weight.detach()  # type: ignore[assignment,union-attr,operator]
        module.register_forward_pre_hook(lambda m, args: floats.__setitem__((name, "A"), args[0].detach()))
        module.register_forward_hook(
            lambda m, args, out: out.register_hook(lambda g: floats.__setitem__((name, "E"), g.detach())) and None
        )

    for name, module in products.items():
        if name in chosen:
            hook(name, module)
    quantizers = [q for layer in quantized.values() for q in layer.slots.values() if isinstance(q, Quantizer)]
    with watching(quantizers, watch):
        twin.train()
        total: Any = loss(twin(x))
        total.backward()
    for (name, role), tensor in floats.items():
        if (name, role) not in found:
            found[name, role] = histogram(name, role, tensor.reshape(1, -1), None)
    return [found[n, r] for n in order for r in "WAE" if (n, r) in found]


def spread_out(items: Sequence[str], most: int) -> list[str]:
    """At most `most` of `items`: the first, the last and evenly between."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def histogram(layer: str, role: str, x: Tensor, coded: Coded | None) -> dict[str, Any]:
    """One entry of `histograms`; `x (blocks, n)` in real units."""
    values = x.double().flatten()
    values = values[values.isfinite()]
    edges, counts = _bins(values)
    size = values[values != 0].abs().log2()
    log_edges, log_counts = _bins(size)
    out: dict[str, Any] = {
        "layer": layer,
        "role": role,
        "format": "float32",
        "count": values.numel(),
        "edges": edges,
        "counts": counts,
        "levels": [],
        "clip": None,
        "blocks": 1,
        "magnitudes": {"edges": log_edges, "counts": log_counts, "zeros": values.numel() - size.numel()},
    }
    if coded is None:
        return out
    scales = coded.scale.double().flatten()
    out |= {"format": str(coded.format), "blocks": scales.numel()}
    if coded.extra or not scales.numel():
        return out
    middle = int(scales.argsort()[(scales.numel() - 1) // 2])
    zero = 0.0 if coded.zero is None else float(coded.zero.double().flatten().expand(scales.numel())[middle])
    scale = float(scales[middle])
    fmt = coded.format
    levels = fmt.levels() if fmt.bits <= 16 else torch.linspace(fmt.min, fmt.max, LEVELS, dtype=torch.float64)
    if len(levels) > LEVELS:
        levels = levels[torch.linspace(0, len(levels) - 1, LEVELS).round().long()]
    out["levels"] = [_short((float(v) - zero) * scale) for v in levels]
    out["clip"] = [_short((v - zero) * scale) for v in (fmt.min, fmt.max)]
    return out


def _bins(values: Tensor) -> tuple[list[float], list[int]]:
    low, high = (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    counts = torch.histc(values, BINS, low, high) if values.numel() else torch.zeros(BINS)
    return [_short(float(e)) for e in edges], [int(c) for c in counts]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


# ---- time of a step --------------------------------------------------------------------------------------------------


def step_times(
    configs: dict[str, Config],
    data: Data,
    *,
    rounds: int = 30,
    budget: float = 60.0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Time of a real training step of each configuration, measured in turn: in every round each makes one step, so what
    else the machine does hits all alike.

    Args:
        configs: resolved configurations; the first is the reference of the ratios.
        data: of all of them.
        rounds: rounds at most, after two that do not count.
        budget: seconds after which no round begins, once there are five.

    Returns:
        For each name {"ms": median, "ratio": median of its time to the reference's in the same round, "rounds"}.
    """
    steppers = {name: stepper(config, data) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in configs}
    first = next(iter(configs))
    began = time.perf_counter()
    for i in range(rounds + 2):
        if i >= 7 and time.perf_counter() - began > budget:
            break
        for name, step in steppers.items():
            if progress is not None:
                progress(name)
            start = time.perf_counter()
            next(step)
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    out = {}
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, times[first], strict=True))
        out[name] = {"ms": 1000 * statistics.median(own), "ratio": ratio, "rounds": len(own)}
    return out


def stepper(config: Config, data: Data, channels_last: bool = False) -> Iterator[None]:
    """Makes one training step of `config` each time it is asked, with images and weights in one of the two layouts."""
    device = torch.device("cuda" if config.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
    model = models.build(str(config.model), data.input_shape, data.classes, seed=config.seed, **config.model_options)
    lowbit.apply(model.to(device), recipe_of(config))
    optimizer = make_optimizer(config, model)
    lowbit.attach(model, optimizer)
    net: Any = torch.compile(model) if config.compile else model
    criterion = CRITERIA[str(config.criterion)]
    model.train()
    size = int(config.batch_size or 1)
    held = [b for b, _ in zip(data.batches("train", size, limit=config.limit, device=device), range(8), strict=False)]
    if channels_last or config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        held = [(x.to(memory_format=torch.channels_last), y) for x, y in held]
    while True:
        for x, y in held:
            amp = torch.autocast(device.type, torch.bfloat16) if config.amp == "bf16" else contextlib.nullcontext()
            with amp:
                output = net(x)
            (criterion(*flat(output, y)) + lowbit.penalty(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield


def _time(
    found: list[dict[str, Any]],
    resolved: dict[str, Config],
    reference: Config,
    data: Data,
    folder: Path,
    progress: Progress | None,
) -> None:
    """Fill in `step`; measured again only where the methods or their settings changed."""
    configs = {"fp32": reference} | {m["key"]: resolved[m["key"]] for m in found if m["status"] == "ok"}
    asked = plain({k: c.to_data() for k, c in configs.items()} | {"threads": torch.get_num_threads()})
    cache = folder / "runs" / "step-times.json"
    try:
        held = read_json(cache)
    except (FileNotFoundError, ValueError):
        held = None
    if held is None or held["asked"] != asked:

        def tell(key: str) -> None:
            if progress is not None:
                progress({"phase": "time", "method": key})

        times = step_times(configs, data, progress=tell)
        write_json(cache, {"asked": asked, "times": times})
    else:
        times = held["times"]
    for method in found:
        method["step"] = times.get(method["key"])


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of a comparison, as text."""
    metric = results["metric"]
    unit = f" {metric['unit']}" if metric["unit"] else ""
    head = ["method", f"{metric['name']}{unit}", "W", "A", "E", "G", "U", "weights", "step", "note"]
    rows = []
    for m in results["methods"]:
        bits = m["bits"] or {}
        step = m["step"]
        rows.append(
            [
                m["key"],
                shown(m["metric"]),
                *(f"{bits[r]:.3g}" if r in bits else "" for r in "WAEGU"),
                "" if m["bytes"] is None else size_of(m["bytes"]),
                "" if step is None else f"{step['ratio']:.2f}x",
                "" if m["status"] == "ok" else f"{m['status']}: {m['reason']}",
            ]
        )
    return head, rows


def shown(metric: dict[str, Any] | None) -> str:
    """A metric's mean and spread as text."""
    if metric is None:
        return "-"
    return f"{metric['mean']:.2f}" + ("" if metric["spread"] is None else f" ± {metric['spread']:.2f}")


def size_of(count: int) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024 or unit == "MiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count = count / 1024  # type: ignore[assignment]
    raise AssertionError("unreachable")


def record(results: dict[str, Any]) -> dict[str, Any]:
    """What `results/NAME.json` keeps of a comparison: every figure of the table and what it takes to repeat it."""
    kept = ("key", "name", "options", "status", "reason", "metric", "bits", "bytes", "step", "training")
    common = (
        "title",
        "created",
        "command",
        "task",
        "metric",
        "data",
        "model",
        "settings",
        "seeds",
        "baseline",
        "environment",
    )
    return {
        "schema": RESULT,
        **{k: results[k] for k in common},
        "methods": [{k: m[k] for k in kept} for m in results["methods"]],
    }
