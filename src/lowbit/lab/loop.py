"""The training loop of experiments: plain PyTorch on Accelerate, with two lines of lowbit in it.

`Config` is everything that decides a run's result, `resolve` fills in what was left open, `train` runs it in a folder
(see `runs`). The same configuration gives the same bits, also after a kill and a resume: the order of the data is a
function of (seed, epoch, step), weights start from the seed, and a checkpoint holds all that changes.

What is left open comes from three places, in this order: the method's card (what the method needs to be itself), the
model (`TRAINING` below), the kind of data (`EPOCHS`, `MODEL`). Methods are thereby compared on the same work: order of
the data, seeds, epochs, batches and initial weights never depend on the method.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import lowbit
from lowbit.lab import models
from lowbit.lab.data import IGNORE, Data, load
from lowbit.lab.runs import Run, environment, read_state, write_json
from lowbit.methods import find
from lowbit.recipe import Recipe
from lowbit.serial import from_data, nearest

__all__ = [
    "CRITERIA",
    "EPOCHS",
    "MODEL",
    "TRAINING",
    "Config",
    "Diverged",
    "evaluate",
    "load_data",
    "metric_of",
    "open_model",
    "resolve",
    "train",
]

MODEL = {
    "digits": "lenet5",
    "mnist": "lenet5",
    "idx": "lenet5",
    "images": "resnet20",
    "cifar10": "resnet20",
    "text": "gpt_tiny",
    "pairs": "seq2seq",
}
"""Model where none is named, by kind of data."""
EPOCHS = {"digits": 20, "mnist": 5, "idx": 5, "images": 30, "cifar10": 30, "text": 5, "pairs": 10}
"""Epochs where none are given, by kind of data."""

# found by trial on the digits: 98 % there
_SMALL: dict[str, Any] = {"optimizer": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 2e-3, "batch_size": 32}
_RESNET = _SMALL | {"lr": 0.1, "weight_decay": 1e-4, "batch_size": 128}  # He et al., 2016, section 4.2
_TRANSFORMER: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.1,
    "batch_size": 32,
    "warmup": 100,
    "clip_norm": 1.0,
}
TRAINING: dict[str, dict[str, Any]] = {
    "mlp": _SMALL,
    "lenet5": _SMALL,
    "resnet20": _RESNET,
    "resnet32": _RESNET,
    "resnet56": _RESNET,
    "mobilenetv2": _RESNET | {"lr": 0.05, "weight_decay": 4e-5},  # the decay of Sandler et al., 2018
    "vgg_small": _RESNET | {"lr": 0.05},
    "vit_tiny": _TRANSFORMER | {"lr": 5e-4, "weight_decay": 0.05, "batch_size": 128},
    "gpt_tiny": _TRANSFORMER,
    "seq2seq": _TRANSFORMER | {"weight_decay": 0.01, "batch_size": 64},
}
"""Training settings by model."""
USUAL: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.0, "schedule": "cosine", "warmup": 0, "clip_norm": 0.0}
"""Settings that a model above does not name."""
OTHER_LR = {"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3}
"""Learning rate where the optimizer is not the model's own and none is given; then nothing decays either."""
CARD = ("optimizer", "lr", "momentum", "weight_decay", "schedule", "warmup", "clip_norm")
"""What a card's training settings may decide; epochs, batches and the like are the same for all methods."""
EVALUATION_BATCH = 256
"""Examples in a batch of evaluation; fixed, for methods whose scales depend on the batch."""
SCHEDULES = ("cosine", "constant", "step")
AMP = ("no", "bf16")
DEVICES = ("auto", "cpu", "cuda", "mps")


class Diverged(ArithmeticError):
    """The loss is no longer finite."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run. None means: `resolve` decides."""

    method: str = "fp32"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the method."""
    recipe: dict[str, Any] | None = None
    """The recipe as JSON data; None makes it from method, options and seed."""
    data: str = "digits"
    data_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: str | None = None
    """Of the data; filled in, and checked when a run is resumed."""
    model: str | None = None
    model_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    """Of the initial weights, the order of the data and the method's random streams."""
    epochs: int | None = None
    batch_size: int | None = None
    limit: int | None = None
    """Training examples of an epoch at most; None is all."""
    augment: bool = True
    """Random crops (and mirroring) of images of 28 pixels and more."""
    optimizer: str | None = None
    """sgd, adam or adamw."""
    lr: float | None = None
    momentum: float | None = None
    """Momentum of SGD, first beta of Adam."""
    weight_decay: float | None = None
    schedule: str | None = None
    """cosine (to zero), constant, or step (a tenth after one half and again after three quarters)."""
    warmup: int | None = None
    """Steps over which the learning rate climbs linearly from zero."""
    clip_norm: float | None = None
    """Largest norm of the gradient; 0 is no limit."""
    criterion: str | None = None
    """cross_entropy, sse or squared_hinge."""
    amp: str = "no"
    channels_last: bool = False
    """Images with their channels together in memory, which convolutions on a CPU like better."""
    compile: bool = False
    device: str = "auto"
    threads: int | None = None
    """Threads of PyTorch; None is one for the digits, whose tensors are too small to share out, and as many as PyTorch
    has now otherwise. PyTorch's convolutions round differently with another number, so a resumed run keeps it."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None is an epoch. There is one at the end of each epoch anyway."""
    log_every: int = 10
    """Steps between lines of metrics."""
    tracker: str | None = None
    """A tracker that Accelerate knows, such as tensorboard."""

    def to_data(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_data(data: dict[str, Any]) -> Config:
        """The configuration that `to_data` wrote.

        Raises:
            ValueError: a field that a configuration has not.
        """
        allowed = [f.name for f in dataclasses.fields(Config)]
        for name in data:
            if name not in allowed:
                raise ValueError(f"a run has no setting {name!r}; {nearest(name, allowed)}")
        return Config(**data)


RUNTIME = ("device", "threads", "checkpoint_every", "log_every", "tracker")
"""Fields of a `Config` that don't decide the result."""


def resolve(config: Config, data: Data) -> Config:
    """`config` with everything decided.

    Raises:
        ValueError: an unknown name or a value out of range; the message names it and what is allowed.
    """
    kind = config.data.partition(":")[0]
    model = config.model or MODEL[kind]
    if model not in models.MODELS:
        raise ValueError(f"unknown model {model!r}; {nearest(model, models.MODELS)}")
    if config.recipe is None:
        recipe = lowbit.create(config.method, **from_data(config.options))
        if "seed" not in config.options:
            recipe = dataclasses.replace(recipe, seed=config.seed)
    else:
        recipe = recipe_of(config)
    card = dict(find(config.method).card.training) if config.recipe is None else {}
    usual = USUAL | TRAINING[model]
    optimizer = config.optimizer or card.get("optimizer") or usual["optimizer"]
    if optimizer != usual["optimizer"]:
        usual |= {"lr": OTHER_LR.get(optimizer), "momentum": 0.9, "weight_decay": 0.0}
    if config.optimizer is not None and config.optimizer != card.get("optimizer", config.optimizer):
        card = {k: v for k, v in card.items() if k not in ("lr", "momentum")}  # they belong to the card's optimizer
    decided = usual | {k: v for k, v in card.items() if k in CARD}
    decided |= {"optimizer": optimizer, "epochs": EPOCHS[kind], "model": model, "fingerprint": data.fingerprint}
    decided |= {"recipe": json.loads(recipe.to_json()), "criterion": recipe.criterion or "cross_entropy"}
    decided["threads"] = 1 if kind == "digits" else torch.get_num_threads()
    if config.recipe is not None:
        decided["method"] = recipe.name
    asked = {
        k: v for k, v in config.to_data().items() if v is not None and k not in ("method", "recipe", "fingerprint")
    }
    full = Config(**({"method": config.method} | decided | asked))
    _check(full, data)
    if config.warmup is None and "warmup" not in card:  # a short run is not all warm-up
        total = int(full.epochs or 1) * data.steps(int(full.batch_size or 1), full.limit)
        full = dataclasses.replace(full, warmup=min(int(full.warmup or 0), total // 10))
    return full


def _check(config: Config, data: Data) -> None:
    for name, value, allowed in (
        ("optimizer", config.optimizer, OTHER_LR),
        ("schedule", config.schedule, SCHEDULES),
        ("amp", config.amp, AMP),
        ("criterion", config.criterion, CRITERIA),
        ("device", config.device, DEVICES),
    ):
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}; {nearest(str(value), allowed)}")
    for name, least in (
        ("epochs", 1),
        ("batch_size", 1),
        ("limit", 1),
        ("checkpoint_every", 1),
        ("log_every", 1),
        ("threads", 1),
        ("seed", 0),
        ("warmup", 0),
        ("lr", 0),
        ("momentum", 0),
        ("weight_decay", 0),
        ("clip_norm", 0),
    ):
        value = getattr(config, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise ValueError(f"{name} must be at least {least}; got {value}")
    assert config.batch_size is not None
    data.steps(config.batch_size, config.limit)
    if config.tracker is not None:
        from accelerate.tracking import get_available_trackers

        if config.tracker not in (found := [str(t) for t in get_available_trackers()]):
            raise ValueError(
                f"tracker {config.tracker!r} is not installed or unknown to Accelerate; installed: "
                f"{', '.join(found) or 'none'}"
            )


def recipe_of(config: Config) -> Recipe:
    """The recipe of a resolved configuration."""
    return Recipe.from_json(json.dumps(config.recipe))


def load_data(config: Config, cache: Path | None = None, progress: Callable[[int, int], None] | None = None) -> Data:
    """The data of a run; decoded images are kept in `cache`."""
    return load(config.data, **config.data_options, cache=cache, progress=progress)


# ---- losses and metrics ----------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over examples."""
    return F.cross_entropy(logits, target)


def sse(logits: Tensor, target: Tensor) -> Tensor:
    """Half the sum of squared errors on one-hot targets, over classes and batch; its gradient is output - target."""
    return 0.5 * (logits - F.one_hot(target, logits.shape[-1])).square().sum()


def squared_hinge(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over examples and classes of max(0, 1 - t * output)^2, t = 1 for the class and -1 for the others."""
    signs = 2 * F.one_hot(target, logits.shape[-1]) - 1
    return (1 - signs * logits).clamp_min(0).square().mean()


CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "sse": sse,
    "squared_hinge": squared_hinge,
}
"""Losses by name: logits `(n, classes)` and targets int64 `(n,)` to a scalar."""


@dataclasses.dataclass
class Tally:
    """Sums over the batches of an epoch."""

    loss: float = 0.0
    entropy: float = 0.0
    correct: int = 0
    count: int = 0

    def add(self, criterion: str, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        n = len(target)
        self.loss += float(loss.detach()) * (1 if criterion == "sse" else n)  # that one is a sum already
        self.entropy += float(F.cross_entropy(logits.detach(), target)) * n
        self.correct += int((logits.argmax(-1) == target).sum())
        self.count += n

    def figures(self, task: str) -> tuple[float, float]:
        """Loss of an example, and the metric: accuracy in percent, or perplexity."""
        n = max(1, self.count)
        if task == "classification":
            return self.loss / n, 100 * self.correct / n
        return self.loss / n, math.exp(min(self.entropy / n, 700.0))  # exp(700) is still a float


def metric_of(task: str) -> dict[str, str]:
    """Name, unit and direction of the metric of a task."""
    if task == "classification":
        return {"name": "accuracy", "unit": "%", "better": "higher"}
    return {"name": "perplexity", "unit": "", "better": "lower"}


def flat(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `(n, classes)` in float32 and targets `(n,)` of the positions that count."""
    logits, target = logits.flatten(0, -2).float(), target.flatten()
    keep = target != IGNORE
    return (logits, target) if bool(keep.all()) else (logits[keep], target[keep])


@torch.no_grad()
def evaluate(net: nn.Module, data: Data, config: Config, device: torch.device) -> tuple[float, float]:
    """Loss and metric on the test split, in evaluation mode."""
    net.eval()
    tally = Tally()
    size = EVALUATION_BATCH if data.task == "classification" else int(config.batch_size or 1)
    for x, y in data.batches("test", size, device=device):
        logits, target = flat(net(x), y)
        tally.add(str(config.criterion), CRITERIA[str(config.criterion)](logits, target), logits, target)
    return tally.figures(data.task)


# ---- the loop --------------------------------------------------------------------------------------------------------


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over all parameters of `model`."""
    lr, decay, beta = float(config.lr or 0), float(config.weight_decay or 0), float(config.momentum or 0)
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=beta, weight_decay=decay)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=lr, betas=(beta, 0.999), weight_decay=decay)


def lr_factor(config: Config, total: int) -> Callable[[int], float]:
    """The learning rate at a step, as a multiple of the configured one."""
    warmup = int(config.warmup or 0)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if config.schedule == "step":
            return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
        return 1.0

    return factor


@dataclasses.dataclass
class Position:
    """How far a run is."""

    epoch: int = 0
    """Epochs that are complete."""
    batch: int = 0
    """Steps of the present epoch."""
    step: int = 0
    """Optimizer steps in all."""
    seconds: float = 0.0
    """Time of training so far, resumed runs included."""
    tally: Tally = dataclasses.field(default_factory=Tally)
    """Of the present epoch."""


Progress = Callable[[dict[str, Any]], None]
"""Called after each step with {"step", "steps", "epoch", "epochs", "loss", "metric", "seconds"}."""


def train(
    config: Config,
    folder: str | Path,
    *,
    data: Data | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train as `config` says, in `folder`, and return what is then in its result.json.

    Args:
        config: see `Config`; ignored with `resume`, except for `RUNTIME`, where the folder's own counts.
        folder: of the run; made if needed.
        data: the data, where the caller has it; None loads it.
        resume: continue the run in `folder`, bit for bit; a finished one is not touched.
        progress: told of every step.

    Raises:
        Diverged: the loss is not finite. result.json says so too.
        FileExistsError: without `resume`, `folder` holds a run.
        FileNotFoundError: with `resume`, it holds none.
        ValueError: a setting that is refused, or data that has changed since the run began.
    """
    run = Run(folder)
    if resume:
        stored = Config.from_data(run.config())
        config = dataclasses.replace(
            stored,
            **{k: getattr(config, k) for k in ("device", "threads") if getattr(config, k) != getattr(Config(), k)},
        )
        if (result := run.result()) is not None and result["status"] != "failed":
            return result
    cache = run.folder.parent / "cache"
    data = load_data(config, cache) if data is None else data
    if resume and data.fingerprint != config.fingerprint:
        raise ValueError(f"{config.data} has changed since the run in {run.folder} began: start a new run")
    config = config if resume else resolve(config, data)
    with run.writing(), torch_settings(config):
        if not resume:
            run.begin(config.to_data())
        write_json(run.folder / "environment.json", environment(_device(config)))
        try:
            return _train(config, run, data, resume, progress)
        except Exception as error:
            status = "diverged" if isinstance(error, Diverged) else "failed"  # a failed run may be resumed
            write_json(run.folder / "result.json", {"status": status, "reason": reason_of(error)})
            raise


def _train(config: Config, run: Run, data: Data, resume: bool, progress: Progress | None) -> dict[str, Any]:
    accelerator = _accelerator(config, run.folder)
    criterion, device = CRITERIA[str(config.criterion)], accelerator.device
    batch_size, epochs = int(config.batch_size or 1), int(config.epochs or 1)
    per_epoch = data.steps(batch_size, config.limit)
    every = config.checkpoint_every or per_epoch

    model = models.build(str(config.model), data.input_shape, data.classes, seed=config.seed, **config.model_options)
    torch.manual_seed(config.seed)
    lowbit.apply(model, recipe_of(config))
    if config.channels_last:  # the layout of the weights decides that of the activations
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(config, model)
    net, prepared = accelerator.prepare(torch.compile(model) if config.compile else model, optimizer)
    lowbit.attach(model, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(config, epochs * per_epoch))
    torch.manual_seed(config.seed)  # dropout starts from here, whatever the method drew to set itself up

    at, parts = Position(), {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    if resume:
        at = _restore(run, parts)
    clock = time.perf_counter() - at.seconds

    for epoch in range(at.epoch, epochs):
        net.train()
        batches = data.batches("train", batch_size, config.seed, epoch, config.augment, config.limit, device, at.batch)
        for x, y in batches:
            logits, target = flat(net(x), y)
            loss = criterion(logits, target)
            accelerator.backward(loss + lowbit.penalty(model))
            if config.clip_norm:
                accelerator.clip_grad_norm_(net.parameters(), config.clip_norm)
            lr = optimizer.param_groups[0]["lr"]
            prepared.step()
            scheduler.step()
            prepared.zero_grad()

            at.batch, at.step, at.seconds = at.batch + 1, at.step + 1, time.perf_counter() - clock
            at.tally.add(str(config.criterion), loss, logits, target)
            value = float(loss.detach()) / (len(target) if config.criterion == "sse" else 1)
            if not math.isfinite(value):
                raise Diverged(f"the loss is {value} at step {at.step} (epoch {epoch + 1})")
            if at.step % config.log_every == 0:
                line = {"step": at.step, "epoch": epoch + 1, "loss": value, "lr": lr, "seconds": round(at.seconds, 3)}
                run.log({"kind": "step"} | line)
                accelerator.log({"loss": value, "lr": lr}, step=at.step)
            if at.step % every == 0 and at.batch < per_epoch:
                run.save(_state(parts, at))
            if progress is not None:
                progress(
                    {
                        "step": at.step,
                        "steps": epochs * per_epoch,
                        "epoch": epoch + 1,
                        "epochs": epochs,
                        "loss": value,
                        "metric": at.tally.figures(data.task)[1],
                        "seconds": at.seconds,
                    }
                )

        train_loss, train_metric = at.tally.figures(data.task)
        test_loss, test_metric = evaluate(net, data, config, device)
        at = Position(epoch + 1, 0, at.step, time.perf_counter() - clock)
        figures = {
            "train_loss": train_loss,
            "train_metric": train_metric,
            "test_loss": test_loss,
            "test_metric": test_metric,
        }
        line = {"kind": "epoch", "epoch": epoch + 1, "step": at.step, "seconds": round(at.seconds, 3)}
        run.log(line | figures)
        accelerator.log(figures, step=at.step)
        run.save(_state(parts, at) | {"figures": figures})
        if not math.isfinite(test_loss):
            raise Diverged(f"the test loss is {test_loss} after epoch {epoch + 1}")

    accelerator.end_training()
    return _finish(config, run, data, model, at)


def _state(parts: dict[str, Any], at: Position) -> dict[str, Any]:
    state = {name: part.state_dict() for name, part in parts.items()}
    state["scheduler"].pop("lr_lambdas", None)  # functions of the configuration, not state
    state |= {"position": dataclasses.asdict(at), "random": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random_cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore(run: Run, parts: dict[str, Any]) -> Position:
    state = run.load()
    if state is None:  # killed before its first checkpoint
        return Position()
    for name, part in parts.items():
        held = state[name] | {"lr_lambdas": part.state_dict()["lr_lambdas"]} if name == "scheduler" else state[name]
        part.load_state_dict(held)
    torch.set_rng_state(state["random"])
    if "random_cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    position = dict(state["position"])
    return Position(**position | {"tally": Tally(**position["tally"])})


def _finish(config: Config, run: Run, data: Data, model: nn.Module, at: Position) -> dict[str, Any]:
    state = run.load() or {}
    figures = state.get("figures", {})
    result: dict[str, Any] = {
        "status": "ok",
        "reason": "",
        "method": config.method,
        "metric_name": metric_of(data.task)["name"],
        "metric": figures.get("test_metric"),
        "loss": figures.get("test_loss"),
        "epochs": at.epoch,
        "steps": at.step,
        "seconds": round(at.seconds, 3),
        "bytes": None,
    }
    try:
        lowbit.save(model, run.folder / "model")
        result["bytes"] = stored_bytes(run.folder / "model", config, data)
    except ValueError as error:  # a weight without a code; the training itself is complete
        result["reason"] = f"the model was not saved: {error}"
    write_json(run.folder / "result.json", result)
    return result


def stored_bytes(folder: Path, config: Config, data: Data) -> int:
    """Bytes that a saved model's file spends on the float model's own state: codes with their scales, and what stayed
    in float. Random streams and the like are not counted."""
    names = set(
        models.build(str(config.model), data.input_shape, data.classes, seed=0, **config.model_options).state_dict()
    )
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        held = [file.get_tensor(k) for k in file.keys() if k.partition(":")[0] in names]  # noqa: SIM118
    return sum(t.numel() * t.element_size() for t in held)


def open_model(folder: str | Path, data: Data) -> nn.Module:
    """The model of a run with the weights of its newest checkpoint, in training mode, on the CPU.

    Raises:
        FileNotFoundError: no run, or one without a checkpoint.
    """
    run = Run(folder)
    config = Config.from_data(run.config())
    model = models.build(str(config.model), data.input_shape, data.classes, seed=config.seed, **config.model_options)
    lowbit.apply(model, recipe_of(config))
    lowbit.attach(model, make_optimizer(config, model))  # some state exists only once it is attached
    model.load_state_dict(read_state(run.checkpoint)["state"]["model"])
    return model


# ---- around it -------------------------------------------------------------------------------------------------------


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _device(config: Config) -> str:
    if config.device != "auto":
        return config.device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _accelerator(config: Config, folder: Path) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state:  # one process may train several runs with different settings
        AcceleratorState._reset_state(True)
    accelerator = Accelerator(
        cpu=_device(config) == "cpu", mixed_precision=config.amp, log_with=config.tracker, project_dir=str(folder)
    )
    if accelerator.device.type != torch.device(_device(config)).type:
        raise ValueError(f"device {config.device!r} is not available here; Accelerate found {accelerator.device.type}")
    if accelerator.num_processes > 1:
        raise ValueError("an experiment runs in one process; in a distributed script of your own call apply and attach")
    if config.tracker is not None:
        values = {k: v for k, v in config.to_data().items() if isinstance(v, (int, float, str))}
        accelerator.init_trackers("lowbit", values)
    return accelerator


@contextlib.contextmanager
def torch_settings(config: Config) -> Iterator[None]:
    """Threads and reproducible kernels, for the time of a run."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark = before
