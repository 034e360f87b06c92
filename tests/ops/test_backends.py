"""lowbit.ops.backends: what runs, and why the rest does not."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import torch

from lowbit.ops import backends


def rows(operator: str, device: str = "cpu") -> dict[str, backends.Backend]:
    found = [row for row in backends.backends() if (row.operator, row.device) == (operator, device)]
    return {row.implementation.split()[0]: row for row in found}


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what a test's own load_compiled leaves behind."""
    monkeypatch.setattr(backends, "_load_error", backends._load_error)


@pytest.mark.parametrize("operator", ["lowbit::chunked_mm", "lowbit::uniform"])
def test_one_implementation_is_active(operator: str) -> None:
    found = rows(operator)
    assert set(found) == {"C++", "PyTorch"}
    assert sum(row.active for row in found.values()) == 1
    assert found["C++"].active == bool(backends.compiled_isas())
    assert all(row.active == (row.reason == "") for row in found.values())


@pytest.mark.skipif(not backends.compiled_isas(), reason="the C++ kernels are not built")
def test_it_names_the_instruction_set() -> None:
    isas = backends.compiled_isas()
    assert isas[-1] == "portable" and set(isas) <= {"avx512amx", "avx512vnni", "avx512", "avx2", "portable"}
    assert rows("lowbit::chunked_mm")["C++"].implementation == f"C++ {isas[0]}"
    with pytest.raises(RuntimeError, match="z80"), backends.using_isa("z80"):
        pass


def test_rows_are_frozen_and_sorted() -> None:
    found = backends.backends()
    assert [r.operator for r in found] == sorted(r.operator for r in found)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found[0].active = True  # type: ignore[misc]


def test_a_declared_operator_appears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_operators", dict(backends._operators))

    def definition(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    schema = "(Tensor x) -> Tensor"
    op = torch.library.custom_op("lowbit_test::copy", definition, mutates_args=(), schema=schema)
    backends.declare("lowbit_test::copy", definition, {"cpu": "C++", "cuda": "Triton"})
    assert backends.definition("lowbit_test::copy") is definition
    found = rows("lowbit_test::copy")
    assert found["PyTorch"].active and not found["C++"].active and found["C++"].reason
    if not torch.cuda.is_available():
        assert rows("lowbit_test::copy", "cuda")["Triton"].reason == "PyTorch finds no CUDA device"
    op.register_kernel("cpu", lambda x: x.clone())  # the answer comes from the dispatcher
    assert not rows("lowbit_test::copy")["PyTorch"].active


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        backends.declare("nonsense", len)
    with pytest.raises(ValueError, match="lowbit::nothing.*lowbit::chunked_mm"):
        backends.definition("lowbit::nothing")


def test_no_library_gives_the_reason_of_the_build(loading: None, tmp_path: pathlib.Path) -> None:
    backends.load_compiled(tmp_path)
    assert "--no-build-isolation" in str(backends._load_error) and backends.compiled_isas() == ()
    (tmp_path / "_build_info.json").write_text(json.dumps({"ok": False, "reason": "CompileError: no g++"}))
    backends.load_compiled(tmp_path)
    assert backends._load_error == "CompileError: no g++"


def test_a_broken_library_is_a_reason_not_a_crash(loading: None, tmp_path: pathlib.Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"not a library")
    backends.load_compiled(tmp_path)
    assert str(backends._load_error).startswith("_C.so does not load: ")
