"""Which kernel runs each operator on this machine, and why the others do not.

An operator's own file calls `declare` once; nothing else is edited to make it appear here. The answer is read
from PyTorch's dispatcher, not from what was meant to be registered.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Backend", "Operator", "backends", "compiled_isas", "declare", "definition", "load_compiled", "using_isa"]

_PACKAGE = Path(__file__).resolve().parent.parent
_DEFINITION = "PyTorch definition"


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator on one kind of device."""

    operator: str  # qualified name, such as "lowbit::chunked_mm"
    device: str  # "cpu" or "cuda"
    implementation: str  # such as "C++ avx512" or "PyTorch definition"
    active: bool  # True where calls really go to it
    reason: str  # why it is not active; empty where it is


@dataclass(frozen=True)
class _Operator:
    name: str
    definition: Callable[..., Any]
    kernels: Mapping[str, str]  # device -> implementation that may exist there


_operators: dict[str, _Operator] = {}
_isas: tuple[str, ...] = ()
_load_error: str | None = "lowbit.ops has not tried to load the compiled kernels yet"  # None: they are loaded


def declare(name: str, definition: Callable[..., Any], kernels: Mapping[str, str] | None = None) -> None:
    """Makes operator `name` ("lowbit::...") known here, with the plain PyTorch function that defines it.

    `kernels` says which faster implementations exist, by device: {"cpu": "C++", "cuda": "Triton"}.
    """
    if name.count("::") != 1:
        raise ValueError(f"an operator's name reads 'lowbit::name', got {name!r}")
    _operators[name] = _Operator(name, definition, dict(kernels or {}))


class Operator:
    """An operator of PyTorch: its schema, its definition on every device, and what else is registered for it.

    `torch.library.custom_op` does the same and more, through some 30 microseconds of Python a call, even where a C++
    kernel answers: more than a product of small matrices takes. An operator without `register_autograd` is not
    differentiable: PyTorch warns when a backward pass reaches it.
    """

    def __init__(self, name: str, definition: Callable[..., Any], schema: str) -> None:
        """`name` is "lowbit::...", `schema` its arguments and results."""
        self.name = name
        self._library = torch.library.Library(name.partition("::")[0], "FRAGMENT")
        self._library.define(name.partition("::")[2] + schema)
        self._library.impl(name.partition("::")[2], definition, "CompositeExplicitAutograd")

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes, types and strides of the result without data."""
        torch.library.register_fake(self.name, function, lib=self._library)
        return function

    def register_kernel(self, device: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A faster kernel in Python for one kind of device."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self._library.impl(self.name.partition("::")[2], function, device.upper())
            return function

        return register

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
        """As `torch.library.register_autograd`."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=self._library)


def definition(name: str) -> Callable[..., Any]:
    """The plain PyTorch function that defines operator `name`; every kernel is tested against it."""
    if name not in _operators:
        raise ValueError(f"no operator {name!r}; declared are {', '.join(sorted(_operators))}")
    return _operators[name].definition


def load_compiled(folder: Path = _PACKAGE) -> None:
    """Loads the C++ kernels that the installation left in `folder`; a failure is kept for `backends`."""
    global _load_error, _isas  # written once, when lowbit.ops is imported
    files = sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd")) + sorted(folder.glob("_C*.dylib"))
    if not files:
        _load_error = _build_reason(folder)
        return
    try:
        torch.ops.load_library(str(files[0]))
        _load_error = None
        _isas = tuple(torch.ops.lowbit._isas().split())
    except (OSError, RuntimeError) as error:
        _load_error = f"{files[0].name} does not load: {_first_line(error)}"


def compiled_isas() -> tuple[str, ...]:
    """Instruction sets that the C++ kernels use on this CPU, best first; empty if they are not loaded."""
    return () if _load_error is not None else _isas


@contextlib.contextmanager
def using_isa(isa: str) -> Iterator[None]:
    """Within the context this process runs the C++ kernels of one instruction set: for tests and benchmarks.

    Raises:
        RuntimeError: this CPU has no such instruction set.
    """
    torch.ops.lowbit._use_isa(isa)
    try:
        yield
    finally:
        torch.ops.lowbit._use_isa("")


def backends() -> list[Backend]:
    """One row per operator, kind of device and implementation, in the operators' alphabetical order."""
    rows = []
    isas = compiled_isas()
    for operator in sorted(_operators.values(), key=lambda o: o.name):
        for device in ("cpu", "cuda"):
            implementation = operator.kernels.get(device)
            active = implementation is not None and _has_kernel(operator.name, device)
            if implementation == "C++" and active and isas:
                implementation = f"C++ {isas[0]}"
            if implementation is not None:
                reason = "" if active else _why_not(implementation, device)
                rows.append(Backend(operator.name, device, implementation, active, reason))
            if device == "cuda" and not torch.cuda.is_available():
                continue
            reason = f"{implementation} is used instead" if active else ""
            rows.append(Backend(operator.name, device, _DEFINITION, not active, reason))
    return rows


def _has_kernel(name: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())


def _why_not(implementation: str, device: str) -> str:
    if implementation.startswith("C++"):
        return _load_error or "the compiled library has no kernel for this operator: build it again"
    if device == "cuda" and not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    return f"no {implementation} kernel is registered"


def _build_reason(folder: Path) -> str:
    """Why there is no compiled library: setup.py leaves the answer in _build_info.json."""
    try:
        info = json.loads((folder / "_build_info.json").read_text(encoding="utf-8"))
        return str(info["reason"] or "the C++ kernels were built, but their file is gone: install again")
    except (OSError, ValueError, KeyError, TypeError):
        return "the C++ kernels were not built: install with `pip install --no-build-isolation .` after torch"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
