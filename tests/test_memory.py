"""`keep_memory`: in a process of its own, because what it sets can't be read or taken back."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest

import lowbit

# page faults of tensors that are freed at the top of the heap, again and again
FAULTS = """
import resource, sys, torch, lowbit
if sys.argv[1] == "keep":
    assert lowbit.keep_memory()
def use():
    tensors = [torch.ones(2 << 20) for _ in range(24)]  # 8 MiB each
    tensors.append(torch.ones(16 << 20))  # 64 MiB
    del tensors
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError):
        return False


@pytest.mark.skipif(not glibc(), reason="of glibc")
def test_freed_memory_is_written_again_without_page_faults() -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    found = {}
    for way in ("keep", "default"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, way], env=clean, capture_output=True, text=True, check=True, timeout=120
        )
        found[way] = int(done.stdout)
    assert found["keep"] < 100 and found["keep"] <= found["default"]  # 256 MiB are 65,536 pages of 4 KiB


def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("called on another C library")

    monkeypatch.setattr(os, "confstr", lambda name: "musl 1.2")
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert lowbit.keep_memory() is False
    monkeypatch.setattr(os, "confstr", lambda name: None)
    assert lowbit.keep_memory() is False
    monkeypatch.delattr(os, "confstr")
    assert lowbit.keep_memory() is False
