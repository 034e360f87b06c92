"""The folder of one training run, made so that a run killed at any moment continues bit for bit.

    config.json               all that decides the result: method, options, recipe, model, data, training settings
    environment.json          where it ran: versions, revision, processor, threads, device
    metrics.jsonl             one line every few steps and one an epoch
    checkpoint.safetensors    the newest state: weights, optimizer, schedule, position, random numbers
    result.json               how it ended
    model/                    what `lowbit.save` wrote at the end

Files are written beside their place, flushed to the disk and renamed, so each is either the old or the new one. A
checkpoint knows how long `metrics.jsonl` was; what was appended later is cut off when the run continues. Nothing is
pickled: a checkpoint is one safetensors file whose header holds the part that is not tensors as JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "Run",
    "environment",
    "metrics_line",
    "read_json",
    "read_metrics",
    "read_state",
    "replace",
    "write_json",
    "write_state",
]

VERSION = "1"


# ---- files that are whole at any moment ------------------------------------------------------------------------------


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Put what `write(temporary)` writes in the place of `path`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the new name is on the disk once its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def plain(value: Any) -> Any:
    """JSON values of `value`: numbers that are not finite become null, tuples lists, paths text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON that any reader takes, whole or not at all."""
    text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """The JSON value in a file.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists, tuples, plain values and tensors to one file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_pack(state, tensors))
    replace(path, lambda temporary: save_file(tensors, temporary, {"lowbit": VERSION, "state": skeleton}))


def read_state(path: Path) -> Any:
    """What `write_state` wrote; tensors on the CPU.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged, or another kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  (no iterator on this object)
        if metadata.get("lowbit") != VERSION:
            raise ValueError("it is no checkpoint of this version")
        return _unpack(json.loads(metadata["state"]), tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):  # keys may be numbers, as those of an optimizer's state
        return {"dict": [[k, _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_pack(v, tensors) for v in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values, not {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {k: _unpack(v, tensors) for k, v in inner}
    items = [_unpack(v, tensors) for v in inner]
    return tuple(items) if kind == "tuple" else items


# ---- where it ran ----------------------------------------------------------------------------------------------------


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Versions, the source's revision where it lies in a git work tree, processor, threads and device."""
    import numpy
    import safetensors

    import lowbit

    found = {
        "lowbit": lowbit.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "revision": _revision(),
    }
    with contextlib.suppress(ImportError):
        import accelerate

        found["accelerate"] = accelerate.__version__
    if torch.device(device).type == "cuda":
        found["gpu"], found["cuda"] = torch.cuda.get_device_name(), torch.version.cuda
    return found


def _cpu() -> str:
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _revision() -> str | None:
    """The commit of the source tree this package runs from, with "-dirty" where tracked files differ."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "data.py")  # an environment inside some other project's tree is not ours
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


# ---- metrics ---------------------------------------------------------------------------------------------------------


def metrics_line(line: dict[str, Any]) -> str:
    """One line of metrics.jsonl."""
    return json.dumps(plain(line), allow_nan=False) + "\n"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a last one that was cut off in the middle is left out."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


# ---- the folder ------------------------------------------------------------------------------------------------------


class Run:
    """A run folder. Whoever writes to it does so inside `writing()`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._metrics: Any = None

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @contextlib.contextmanager
    def writing(self) -> Iterator[Run]:
        """Within the context the folder belongs to this process.

        Raises:
            ValueError: another process writes to it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w", encoding="utf-8") as lock:
            _lock(lock, self.folder)
            try:
                yield self
            finally:
                if self._metrics is not None:
                    self._metrics.close()
                    self._metrics = None

    def begin(self, config: dict[str, Any]) -> None:
        """Write the configuration of a new run.

        Raises:
            FileExistsError: the folder holds a run.
        """
        if (self.folder / "config.json").exists():
            raise FileExistsError(
                f"{self.folder} holds a run already; continue it with --resume {self.folder}, or "
                "choose another folder with --out"
            )
        write_json(self.folder / "config.json", config)

    def config(self) -> dict[str, Any]:
        """The configuration of the run.

        Raises:
            FileNotFoundError: the folder holds no run.
        """
        if not (self.folder / "config.json").is_file():
            raise FileNotFoundError(f"{self.folder} holds no run: it has no config.json")
        return read_json(self.folder / "config.json")

    def result(self) -> dict[str, Any] | None:
        """How the run ended; None before that."""
        path = self.folder / "result.json"
        return read_json(path) if path.is_file() else None

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; it is in the file when this returns."""
        if self._metrics is None:
            self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._metrics.write(metrics_line(line))
        self._metrics.flush()

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint."""
        path = self.folder / "metrics.jsonl"
        size = 0
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())  # the lines that the checkpoint counts are on the disk before it is
        if path.is_file():
            size = path.stat().st_size
        write_state(self.checkpoint, {"state": state, "metrics": size})

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint's state, None if there is none; metrics.jsonl is cut to where it was then."""
        state, size = None, 0
        if self.checkpoint.is_file():
            stored = read_state(self.checkpoint)
            state, size = stored["state"], stored["metrics"]
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            if size:
                raise ValueError(f"{path} is gone; the checkpoint counts on its first {size} bytes")
            return state
        content = path.read_bytes()
        if len(content) < size:
            raise ValueError(f"{path} has {len(content)} bytes and the checkpoint counts on {size}; it was changed")
        if len(content) > size:
            replace(path, lambda temporary: temporary.write_bytes(content[:size]))
        return state


def _lock(file: Any, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on this system: two writers are then the user's business
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"another process is writing to {folder}; wait for it or end it") from None
