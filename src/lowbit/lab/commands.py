"""The commands of `lowbit`: thin functions over the library and the experiment tools.

Tables go to standard output, progress and errors to standard error. Exit status: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import functools
import inspect
import json
import shlex
import sys
import warnings
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import lowbit
from lowbit.methods import METHODS, find
from lowbit.serial import nearest, to_data

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, quantize and compare neural networks in few bits.",
)

TRAIN, METHOD = "How to train", "What to train"
AS_JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class Usage(ValueError):
    """The user asked for something that can't be."""


class Failed(Exception):
    """What was asked for was tried and failed; the message is the reason."""


@contextmanager
def usage() -> Iterator[None]:
    """Within the context a refused value is the user's mistake, not a failure."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        raise Usage(error) from error


def command(**options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose errors are one line on standard error; `--debug` shows where they came from."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @app.command(**options)
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                with _plain_warnings():
                    function(*args, **kwargs)
            except (typer.Exit, typer.Abort, typer.BadParameter):
                raise
            except Exception as error:
                if state["debug"]:
                    raise
                text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
                if not isinstance(error, (Usage, Failed, ValueError, ImportError, OSError)):
                    text = f"{type(error).__name__}: {text} (--debug shows where)"
                if isinstance(error, ModuleNotFoundError) and "pip install" not in text:
                    text = f"this command needs {error.name}: pip install 'lowbit[lab]'"
                print(f"lowbit: {text}", file=sys.stderr)
                raise typer.Exit(2 if isinstance(error, Usage) else 1) from None

        return run

    return register


state = {"debug": False}
"""Options of the command line as a whole."""


@contextmanager
def _plain_warnings() -> Iterator[None]:
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *rest, **more: f"lowbit: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _version(value: bool) -> None:
    if value:
        print(f"lowbit {lowbit.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    state["debug"] = debug


# ---- printing --------------------------------------------------------------------------------------------------------


def out() -> Console:
    """Standard output; wide where it is no terminal, so that no figure is cut."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)


def show_json(value: Any) -> None:
    from lowbit.lab.runs import plain

    print(json.dumps(plain(value), indent=2, allow_nan=False))


def show_table(head: list[str], rows: list[list[str]], title: str | None = None, right: tuple[str, ...] = ()) -> None:
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", show_edge=False)
    for name in head:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(escape, row))
    out().print(made)


def bar() -> Progress:
    """A progress bar on standard error; nothing where that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def figures(event: dict[str, Any], unit: str) -> str:
    speed = event["step"] / max(event["seconds"], 1e-9)
    return f"loss {event['loss']:.3f}  {event['metric']:.1f}{unit}  {speed:.1f} steps/s"


# ---- what there is ---------------------------------------------------------------------------------------------------


@command()
def methods(
    role: Annotated[str | None, typer.Option(help="Only methods that quantize this role: W, A, E, G or U.")] = None,
    area: Annotated[str | None, typer.Option(help="Only methods of this area, such as training or weights.")] = None,
    as_json: AS_JSON = False,
) -> None:
    """List the methods.

    Examples: `lowbit methods`, `lowbit methods --role E`, `lowbit methods --area training --json`
    """
    with usage():
        cards = lowbit.list_methods(area=area, role=role)
    if as_json:
        show_json([card_data(c) for c in cards])
        return
    show_table(
        ["method", "quantizes", "area", "year", "paper", "arXiv"],
        [[c.name, " ".join(c.roles) or "-", c.area, str(c.year), c.title, c.arxiv] for c in cards],
    )


def card_data(card: Any) -> dict[str, Any]:
    return {
        "name": card.name,
        "title": card.title,
        "year": card.year,
        "arxiv": card.arxiv,
        "area": card.area,
        "roles": list(card.roles),
        "summary": card.summary,
        "headline": list(card.headline),
        "training": dict(card.training),
    }


@command()
def show(name: Annotated[str, typer.Argument(help="Name of a method.")], as_json: AS_JSON = False) -> None:
    """One method: citation, formulas, roles, options, headline numbers.

    Examples: `lowbit show luq`, `lowbit show twn --json`
    """
    with usage():
        entry = find(name)
    card, recipe = entry.card, entry.function()
    allowed = inspect.signature(entry.function).parameters
    roles = recipe.roles.named()
    if as_json:
        show_json(
            card_data(card)
            | {
                "doc": entry.doc,
                "options": {k: _option(p.default) for k, p in allowed.items()},
                "recipe": json.loads(recipe.to_json()),
            }
        )
        return
    console = out()
    arxiv = f"arXiv {card.arxiv}" if card.arxiv.replace(".", "").isdigit() else card.arxiv
    console.print(f"[bold]{escape(card.name)}[/]  {escape(card.title)} ({card.year}, {escape(arxiv)}); {card.area}\n")
    console.print(escape(entry.doc) + "\n", soft_wrap=True)
    if roles:
        show_table(
            ["role", "format", "bits", "blocks", "scale", "rounding", "gradient"],
            [
                [r, str(s.format), f"{s.format.bits:g}", str(s.blocks), _scale(s), s.rounding, str(s.backward)]
                for r, s in roles.items()
            ],
        )
        floats = [r.where for r in recipe.rules if r.where != "any" and r.roles is not None and not r.roles.named()]
        if floats:
            console.print(f"In float: the {' and the '.join(floats)} layer.\n")
    if allowed:
        show_table(["option", "default"], [[k, repr(p.default)] for k, p in allowed.items()])
    for line in card.headline:
        console.print(f"  paper: {escape(line)}", soft_wrap=True)
    if card.training:
        console.print("  trains with: " + escape(", ".join(f"{k} {v}" for k, v in card.training.items())))


def _option(default: Any) -> Any:
    try:
        return to_data(default)
    except TypeError:
        return repr(default)


def _scale(spec: Any) -> str:
    return f"by {spec.kind}" if spec.kind != "grid" else str(spec.scale)


@command()
def backends(as_json: AS_JSON = False) -> None:
    """Which kernel runs each operator here, and why the others do not.

    Example: `lowbit backends`
    """
    rows = lowbit.backends()
    if as_json:
        show_json([vars(r) for r in rows])
        return
    show_table(
        ["operator", "device", "implementation", "active", "why not"],
        [[r.operator, r.device, r.implementation, "yes" if r.active else "no", r.reason] for r in rows],
    )


# ---- train -----------------------------------------------------------------------------------------------------------

Text = str | None
Texts = list[str] | None
Int = int | None
Real = float | None


def _opt(text: str, *names: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


@command()
def train(
    method: Annotated[Text, _opt("Name of a method; `lowbit methods` lists them.", panel=METHOD)] = None,
    model: Annotated[Text, _opt("mlp, lenet5, resnet20, ...; a default for each kind of data.", panel=METHOD)] = None,
    data: Annotated[
        str, _opt("digits, mnist:PATH, cifar10:PATH, images:PATH, text:PATH, pairs:PATH.", panel=METHOD)
    ] = "digits",
    option: Annotated[Texts, _opt("Option of the method, `key=JSON`; repeatable.", panel=METHOD)] = None,
    recipe: Annotated[Path | None, _opt("A recipe as JSON instead of a method.", panel=METHOD)] = None,
    layers: Annotated[Text, _opt("Kinds of layer to quantize: linear,conv,embedding,attention.", panel=METHOD)] = None,
    model_option: Annotated[Texts, _opt("Option of the model, `key=JSON`; repeatable.", panel=METHOD)] = None,
    data_option: Annotated[Texts, _opt("Option of the data, `key=JSON`; repeatable.", panel=METHOD)] = None,
    epochs: Annotated[Int, _opt("Passes over the data.", panel=TRAIN)] = None,
    batch_size: Annotated[Int, _opt("Examples in a batch.", panel=TRAIN)] = None,
    lr: Annotated[Real, _opt("Learning rate.", panel=TRAIN)] = None,
    optimizer: Annotated[Text, _opt("sgd, adam or adamw.", panel=TRAIN)] = None,
    momentum: Annotated[Real, _opt("Momentum of SGD, first beta of Adam.", panel=TRAIN)] = None,
    weight_decay: Annotated[Real, _opt("Weight decay.", panel=TRAIN)] = None,
    schedule: Annotated[Text, _opt("cosine, constant or step.", panel=TRAIN)] = None,
    warmup: Annotated[Int, _opt("Steps of linear warm-up.", panel=TRAIN)] = None,
    clip_norm: Annotated[Real, _opt("Largest norm of the gradient; 0 is no limit.", panel=TRAIN)] = None,
    criterion: Annotated[Text, _opt("cross_entropy, sse or squared_hinge.", panel=TRAIN)] = None,
    seed: Annotated[int, _opt("Of weights, order of the data and random rounding.", panel=TRAIN)] = 0,
    limit: Annotated[Int, _opt("Training examples of an epoch at most.", panel=TRAIN)] = None,
    augment: Annotated[bool, _opt("Random crops and mirroring, for images of 28 pixels or more.", panel=TRAIN)] = True,
    amp: Annotated[str, _opt("no or bf16: autocast for what stays in float.", panel=TRAIN)] = "no",
    channels_last: Annotated[bool, _opt("Images with their channels together in memory.", panel=TRAIN)] = False,
    compile_: Annotated[bool, _opt("torch.compile the model.", "--compile", panel=TRAIN)] = False,
    out_: Annotated[Path | None, _opt("Folder of the run; runs/METHOD-MODEL-DATA-sSEED if not given.", "--out")] = None,
    resume: Annotated[Path | None, _opt("Continue the run in this folder, bit for bit.")] = None,
    checkpoint_every: Annotated[Int, _opt("Steps between checkpoints; an epoch if not given.")] = None,
    log_every: Annotated[int, _opt("Steps between lines of metrics.jsonl.")] = 10,
    tracker: Annotated[Text, _opt("A tracker that Accelerate knows, such as tensorboard.")] = None,
    threads: Annotated[Int, _opt("Threads of PyTorch.")] = None,
    device: Annotated[str, _opt("auto, cpu, cuda or mps.")] = "auto",
    as_json: AS_JSON = False,
) -> None:
    """Train one model, or continue a run.

    What is not given comes from the method (what it needs to be itself), then the model, then the data.

    Examples:

    `lowbit train --method luq --model lenet5 --data digits --out runs/luq`

    `lowbit train --method luq --option samples=2 --model resnet20 --data cifar10:PATH --epochs 3 --limit 10000`

    `lowbit train --resume runs/luq`
    """
    from lowbit.lab import loop

    config = loop.Config(
        method=method or "fp32",
        options=pairs(option, "--option"),
        data=data,
        model=model,
        model_options=pairs(model_option, "--model-option"),
        data_options=pairs(data_option, "--data-option"),
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        limit=limit,
        augment=augment,
        optimizer=optimizer,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup=warmup,
        clip_norm=clip_norm,
        criterion=criterion,
        amp=amp,
        channels_last=channels_last,
        compile=compile_,
        device=device,
        threads=threads,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        tracker=tracker,
    )
    if resume is not None:
        if method is not None or recipe is not None or out_ is not None:
            raise Usage("--resume continues a run as it was begun; leave --method, --recipe and --out out")
        with usage():
            begun = loop.Run(resume).config()
        config, folder = loop.dataclasses.replace(loop.Config.from_data(begun), device=device, threads=threads), resume
        held = _load(config, folder)
    else:
        config = _method_of(config, method, recipe, layers)
        held = _load(config, out_ if out_ is not None else Path("runs/run"))
        with usage():
            full = loop.resolve(config, held)
        name = f"{full.method}-{full.model}-{data.partition(':')[0]}-s{seed}"
        folder = out_ if out_ is not None else Path("runs") / name
        if (folder / "config.json").exists():
            raise Usage(f"{folder} holds a run already; continue it with --resume {folder}, or name another with --out")
    unit = "%" if held.task == "classification" else ""
    with bar() as progress:
        task = progress.add_task(config.method, total=None, figures="")

        def tell(event: dict[str, Any]) -> None:
            progress.update(
                task,
                completed=event["step"],
                total=event["steps"],
                figures=figures(event, unit),
                description=f"{config.method} epoch {event['epoch']}/{event['epochs']}",
            )

        try:
            result = loop.train(config, folder, data=held, resume=resume is not None, progress=tell)
        except loop.Diverged as error:
            raise Failed(f"{config.method} diverged: {error}; its figures are in {folder}") from error
    if as_json:
        show_json({"folder": str(folder)} | result)
    elif result["status"] == "ok":
        print(
            f"{result['metric_name']} {result['metric']:.2f}{unit} after {result['epochs']} epochs, "
            f"{result['steps']} steps, {result['seconds']:.1f} s; {folder}"
        )
    if result["status"] != "ok":
        raise Failed(f"{config.method} {result['status']}: {result['reason']}")


def _method_of(config: Any, method: str | None, recipe: Path | None, layers: str | None) -> Any:
    import dataclasses

    if (method is None) == (recipe is None):
        raise Usage("say what to train: either --method NAME or --recipe FILE.json")
    options = dict(config.options)
    if layers is not None:
        options["layers"] = layers.split(",")
    if recipe is None:
        return dataclasses.replace(config, options=options)
    if options:
        raise Usage("a recipe file is complete; --option and --layers belong to --method")
    with usage():
        parsed = lowbit.Recipe.from_json(recipe.read_text(encoding="utf-8"))
    return dataclasses.replace(config, recipe=json.loads(parsed.to_json()))


def _load(config: Any, folder: Path) -> Any:
    """The data, with a bar while images are decoded."""
    from lowbit.lab.loop import load_data

    with usage(), bar() as progress:
        task = progress.add_task("reading data", total=None, figures="")
        return load_data(
            config, folder.parent / "cache", lambda done, total: progress.update(task, completed=done, total=total)
        )


def pairs(items: list[str] | None, name: str) -> dict[str, Any]:
    """`key=JSON` texts as a dict; what is no JSON counts as text.

    Raises:
        Usage: an item without `=`.
    """
    found: dict[str, Any] = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise Usage(f"{name} takes key=value, got {item!r}")
        try:
            found[key.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            found[key.replace("-", "_")] = value
    return found


# ---- compare ---------------------------------------------------------------------------------------------------------


@command()
def compare(
    methods: Annotated[str, _opt("Names, separated by commas.", panel=METHOD)],
    data: Annotated[
        str, _opt("digits, mnist:PATH, cifar10:PATH, images:PATH, text:PATH, pairs:PATH.", panel=METHOD)
    ] = "digits",
    model: Annotated[Text, _opt("mlp, lenet5, resnet20, ...; a default for each kind of data.", panel=METHOD)] = None,
    options: Annotated[
        Texts, _opt("Option of one method, `method.key=JSON`; repeatable.", "--options", "--option", panel=METHOD)
    ] = None,
    seeds: Annotated[str, _opt("Numbers, separated by commas.", panel=METHOD)] = "0",
    model_option: Annotated[Texts, _opt("Option of the model, `key=JSON`; repeatable.", panel=METHOD)] = None,
    data_option: Annotated[Texts, _opt("Option of the data, `key=JSON`; repeatable.", panel=METHOD)] = None,
    epochs: Annotated[Int, _opt("Passes over the data.", panel=TRAIN)] = None,
    batch_size: Annotated[Int, _opt("Examples in a batch.", panel=TRAIN)] = None,
    lr: Annotated[Real, _opt("Learning rate of all methods.", panel=TRAIN)] = None,
    optimizer: Annotated[Text, _opt("sgd, adam or adamw, for all methods.", panel=TRAIN)] = None,
    momentum: Annotated[Real, _opt("Momentum of SGD, first beta of Adam.", panel=TRAIN)] = None,
    weight_decay: Annotated[Real, _opt("Weight decay.", panel=TRAIN)] = None,
    schedule: Annotated[Text, _opt("cosine, constant or step.", panel=TRAIN)] = None,
    limit: Annotated[Int, _opt("Training examples of an epoch at most.", panel=TRAIN)] = None,
    augment: Annotated[bool, _opt("Random crops and mirroring, for images of 28 pixels or more.", panel=TRAIN)] = True,
    amp: Annotated[str, _opt("no or bf16: autocast for what stays in float.", panel=TRAIN)] = "no",
    channels_last: Annotated[bool, _opt("Images with their channels together in memory.", panel=TRAIN)] = False,
    compile_: Annotated[bool, _opt("torch.compile the models.", "--compile", panel=TRAIN)] = False,
    out_: Annotated[Path | None, _opt("Folder of the comparison; runs/compare-DATA if not given.", "--out")] = None,
    save: Annotated[Path | None, _opt("Also keep the figures in this file, such as results/NAME.json.")] = None,
    timing: Annotated[bool, _opt("Measure the time of a training step.")] = True,
    open_report: Annotated[Literal["yes", "no"], _opt("Open report.html in a browser at the end.")] = "no",
    threads: Annotated[Int, _opt("Threads of PyTorch.")] = None,
    device: Annotated[str, _opt("auto, cpu, cuda or mps.")] = "auto",
    as_json: AS_JSON = False,
) -> None:
    """Several methods on one task: same data order, seeds and epochs. A table and one HTML page with plots.

    Runs that are complete in the folder are not repeated. A method that fails or diverges is shown as such; the others
    go on, and the exit status is 1.

    Examples:

    `lowbit compare --methods fp32,int8,luq,twn --data digits`

    `lowbit compare --methods fp32,luq --options luq.samples=2 --seeds 0,1 --data digits --save results/luq.json`
    """
    from lowbit.lab import compare as comparing
    from lowbit.lab import loop, report_html
    from lowbit.lab.runs import write_json

    with usage():
        asked = _asked(methods, options)
        numbers = [int(s) for s in seeds.split(",")]
    config = loop.Config(
        data=data,
        model=model,
        model_options=pairs(model_option, "--model-option"),
        data_options=pairs(data_option, "--data-option"),
        epochs=epochs,
        batch_size=batch_size,
        limit=limit,
        augment=augment,
        optimizer=optimizer,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        amp=amp,
        channels_last=channels_last,
        compile=compile_,
        device=device,
        threads=threads,
    )
    folder = out_ if out_ is not None else Path("runs") / f"compare-{data.partition(':')[0]}"
    held = _load(config, folder)
    with usage():
        for name, own in asked:
            for seed in numbers:
                loop.resolve(loop.dataclasses.replace(config, method=name, options=own, seed=seed), held)
    unit = "%" if held.task == "classification" else ""
    with bar() as progress:
        task = progress.add_task("starting", total=len(asked) * len(numbers), figures="")

        def tell(event: dict[str, Any]) -> None:
            if event["phase"] == "train":
                done = event["run"] + event["step"] / event["steps"]
                progress.update(
                    task,
                    completed=done,
                    description=f"{event['method']} seed {event['seed']}",
                    figures=figures(event, unit),
                )
            else:
                text = {"measure": "measuring errors of", "time": "timing a step of"}[event["phase"]]
                progress.update(task, description=f"{text} {event['method']}", figures="")

        line = "lowbit " + shlex.join(_shortened(sys.argv[1:])) if sys.argv[1:2] == ["compare"] else "lowbit compare"
        results = comparing.compare(asked, config, held, numbers, folder, command=line, measure=timing, progress=tell)
    page = report_html.write(results, folder / "report.html")
    report_html.plot(results, folder / "picture.svg")
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        write_json(save, comparing.record(results))
    if as_json:
        show_json(
            {k: v for k, v in results.items() if k != "methods"}
            | {"methods": comparing.record(results)["methods"], "folder": str(folder), "report": str(page)}
        )
    else:
        head, rows = comparing.table(results)
        if not any(row[-1] for row in rows):
            head, rows = head[:-1], [row[:-1] for row in rows]
        title = f"{results['title']}, {results['settings']['epochs']} epochs, seeds {', '.join(map(str, numbers))}"
        show_table(head, rows, title, right=tuple(head[1:9]))
        print(
            "\nW A E G U: stored bits of weights, activations, errors, weight gradients and updates, the mean over "
            "quantized layers\nweights: codes, scales and what stays in float"
            "\nstep: time of a training step, float32 = 1 (int8 multiplies codes where it can; the others are "
            f"simulated)\n\n{page}"
        )
    if open_report == "yes":
        webbrowser.open(page.resolve().as_uri())
    bad = [m for m in results["methods"] if m["status"] != "ok"]
    if bad:
        raise Failed("; ".join(f"{m['key']} {m['status']}: {m['reason']}" for m in bad))


def _shortened(words: list[str]) -> list[str]:
    """The command line without the places of files on this machine."""
    from lowbit.lab.data import without_place

    out, skip = [], False
    for word in words:
        if skip or word.partition("=")[0] in ("--out", "--save", "--open-report"):
            skip = not skip and "=" not in word
            continue
        out.append(without_place(word))
    return out


def _asked(names: str, options: list[str] | None) -> list[tuple[str, dict[str, Any]]]:
    wanted = [n.strip() for n in names.split(",") if n.strip()]
    own: dict[str, list[str]] = {name: [] for name in wanted}
    for name in wanted:
        find(name)
    for item in options or []:
        name, dot, rest = item.partition(".")
        if not dot or name not in own:
            raise ValueError(f"--options takes METHOD.key=value, got {item!r}; {nearest(name, wanted)}")
        own[name].append(rest)
    if len(own) != len(wanted) or not wanted:
        raise ValueError(f"--methods takes different names separated by commas; got {names!r}")
    return [(name, pairs(own[name], "--options")) for name in wanted]


# ---- bench and tables ------------------------------------------------------------------------------------------------


@command()
def bench(
    model: Annotated[str, _opt("Whose training step is measured.")] = "lenet5",
    methods: Annotated[str, _opt("Methods to simulate beside float32 and bfloat16.")] = "int8,luq",
    batch_size: Annotated[int, _opt("Images in a batch.")] = 32,
    rounds: Annotated[int, _opt("Rounds of each measurement at most.")] = 15,
    rows: Annotated[Text, _opt("Measure rows of the speed table instead: names separated by commas, or all.")] = None,
    quick: Annotated[bool, _opt("With --rows: small shapes, to see whether it runs.")] = False,
    save: Annotated[Path | None, _opt("With --rows: write them to this file, beside the others that it holds.")] = None,
    threads: Annotated[Int, _opt("Threads of PyTorch.")] = None,
    as_json: AS_JSON = False,
) -> None:
    """Speed of this machine: a training step, products and operators, measured in turn.

    `--rows` measures the table of docs/speed.md instead, in minutes. Its ratios are to the first case of each part.

    Examples: `lowbit bench`, `lowbit bench --model resnet20 --methods int8 --threads 1 --json`,
    `lowbit bench --rows gpt,linear`, `lowbit bench --rows all --save results/speed.json`
    """
    import torch

    from lowbit.lab import speed
    from lowbit.lab.bench import bench as measure

    with usage():
        names = tuple(n for n in methods.split(",") if n)
        for name in names if methods != "int8,luq" else ():
            find(name)
        for value, what in ((batch_size, "--batch-size"), (rounds, "--rounds"), (threads or 1, "--threads")):
            if value < 1:
                raise ValueError(f"{what} must be at least 1; got {value}")
        if rows is None and (quick or save):
            raise ValueError("--quick and --save go with --rows")
        wanted = list(speed.ROWS) if rows == "all" else [n for n in (rows or "").split(",") if n]
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with bar() as progress:
            task = progress.add_task("measuring", total=None, figures="")

            def tell(what: str) -> None:
                progress.update(task, description=what)

            with usage():
                if rows is not None:
                    sections = speed.measure(wanted, speed.Settings(quick, tell))
                else:
                    found = measure(model, names, batch_size, rounds, tell)
    finally:
        torch.set_num_threads(before)
    if rows is not None:
        if save is not None:
            with usage():
                speed.save(save, sections)
        if as_json:
            show_json(sections)
            return
        for name, section in sections.items():
            title = f"{name}: {section['title']}"
            if "note" in section:
                print(f"{title}: {section['note']}")
                continue
            show_table(list(speed.head(section)), [list(line) for line in speed.lines(section)], title=title)
        return
    if as_json:
        from lowbit.lab.runs import environment

        show_json({"environment": environment() | {"threads": threads or before}, "rows": found})
        return
    table, last = [], None
    for r in found:
        table.append(["" if r["what"] == last else r["what"], r["case"], f"{r['ms']:.3f}", f"{r['ratio']:.2f}x"])
        last = r["what"]
    show_table(["what", "case", "ms", "ratio"], table, right=("ms", "ratio"))


@command()
def tables(
    check: Annotated[bool, _opt("Change nothing; exit with 1 if a table is stale.")] = False,
    root: Annotated[Path, _opt("Folder with README.md, docs/ and results/.")] = Path("."),
) -> None:
    """Write the tables of README.md and docs/ anew, from results/*.json and the registry.

    Examples: `lowbit tables`, `lowbit tables --check`
    """
    from lowbit.lab.tables import FILES, refresh

    with usage():
        if not any((root / name).is_file() for name in FILES):
            raise ValueError(f"{root} has none of {', '.join(FILES)}; say where they are with --root")
    stale = refresh(root, check)
    names = ", ".join(str(p) for p in stale)
    if check and stale:
        raise Failed(f"stale tables in {names}; run `lowbit tables`")
    print(f"written: {names}" if stale else f"up to date ({len(METHODS)} methods)")
