"""A number that tells whether a tensor was changed.

    fingerprint = sum of bits(x_i) * weight_i  modulo 2^64
    weight_i    = start[i % 16] + (i // 16) * step[i % 16]  modulo 2^32

with 32 random constants: two tensors that were not made for it share a fingerprint with probability near 2^-32,
whatever the change was. It is one pass at the speed of memory; the order of the additions does not matter.

Version counters don't see what is written through `.data`, so what is kept for a weight (its codes) is kept together
with its fingerprint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Operator, declare

__all__ = ["fingerprint"]

LANES = 16
# of SHA-256's 64 round constants the first 32; steps are odd
_CONSTANTS = """
428a2f98 71374491 b5c0fbcf e9b5dba5 3956c25b 59f111f1 923f82a4 ab1c5ed5 d807aa98 12835b01 243185be 550c7dc3 72be5d74
80deb1fe 9bdc06a7 c19bf174 e49b69c1 efbe4786 0fc19dc6 240ca1cc 2de92c6f 4a7484aa 5cb0a9dc 76f988da 983e5152 a831c66d
b00327c8 bf597fc7 c6e00bf3 d5a79147 06ca6351 14292967
""".split()
_words = torch.tensor([int(word, 16) for word in _CONSTANTS], dtype=torch.int64).reshape(2, LANES)
_words[1] |= 1
WEIGHTS = torch.where(_words >= 1 << 31, _words - (1 << 32), _words).to(torch.int32)
"""int32 (2, 16): start and step of each lane."""


def _definition(x: Tensor, weights: Tensor) -> int:
    _check(x)
    i = torch.arange(x.numel(), dtype=torch.int64, device=x.device)
    start, step = weights.to(x.device, torch.int64)
    weight = (start[i % LANES] + (i // LANES) * step[i % LANES]) & 0xFFFFFFFF
    bits = x.reshape(-1).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return int((bits * weight).sum())


_op = Operator("lowbit::fingerprint", _definition, "(Tensor x, Tensor weights) -> int")
declare("lowbit::fingerprint", _definition, {"cpu": "C++"})


def fingerprint(x: Tensor) -> int:
    """The fingerprint of a contiguous float32 tensor, a signed 64-bit integer.

    Raises:
        TypeError: another dtype.
        ValueError: not contiguous.
    """
    _check(x)
    return int(torch.ops.lowbit.fingerprint(x, WEIGHTS))


def _check(x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"fingerprint needs float32, got {x.dtype}")
    if not x.is_contiguous():
        raise ValueError("fingerprint needs a contiguous tensor; call .contiguous()")
