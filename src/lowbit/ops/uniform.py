"""Uniform random numbers from a counter: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011).

Element i of a call is a function of (seed, stream, step, i) alone, so every backend and any number of threads
give the same bits:

    counter = (low32(i // 4), high32(i // 4), low32(step), low32(stream))
    key     = (low32(seed), high32(seed))
    u_i     = (word >> 8) * 2^-24        word = output word i % 4 of philox(counter, key)

u lies in [0, 1 - 2^-24]. A stream repeats after 2^32 steps.
"""

from collections.abc import Sequence  # torch.library reads real annotations: no postponed ones in this file

import torch
from torch import Tensor

from .backends import Operator, declare

__all__ = ["next_key", "philox", "uniform", "uniform_reference"]

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Salmon et al., table 2
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1: the key of the next round
ROUNDS = 10


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10.

    Args:
        counter: four int64 tensors with values in [0, 2**32), broadcastable.
        key: two of the same kind.

    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # wraps modulo 2**64; the bits are those of uint64
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def uniform_reference(key: Tensor, shape: Sequence[int]) -> Tensor:
    """The definition of the operator `lowbit::uniform` in plain PyTorch; see `uniform`."""
    _check(key)
    count = 1
    for n in shape:
        count *= n
    i = torch.arange((count + 3) // 4, dtype=torch.int64, device=key.device)
    seed, stream, step = key.unbind()
    counter = (i & MASK, (i >> 32) & MASK, step & MASK, stream & MASK)
    words = philox(counter, (seed & MASK, (seed >> 32) & MASK))
    word = torch.stack(words, dim=-1).reshape(-1)[:count]
    return ((word >> 8).to(torch.float32) * 2.0**-24).reshape(tuple(shape))


def _check(key: Tensor) -> None:
    if key.dtype != torch.int64 or key.shape != (3,):
        raise ValueError(f"a key is int64 (seed, stream, step); got {key.dtype} of shape {tuple(key.shape)}")


_op = Operator("lowbit::uniform", uniform_reference, "(Tensor key, SymInt[] shape) -> Tensor")


@_op.register_fake
def _(key: Tensor, shape: Sequence[int]) -> Tensor:
    _check(key)
    return key.new_empty(tuple(shape), dtype=torch.float32)


declare("lowbit::uniform", uniform_reference, {"cpu": "C++"})


def uniform(key: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform random numbers in [0, 1).

    Args:
        key: int64 of shape (3,): seed, stream, step.
        shape: shape of the result.

    Returns:
        float32 of `shape` on the key's device, multiples of 2**-24.

    Raises:
        ValueError: a key of another dtype or shape.
    """
    _check(key)
    return torch.ops.lowbit.uniform(key, list(shape))


def _next_key(key: Tensor) -> tuple[Tensor, Tensor]:
    _check(key)
    following = key.clone()
    following[2] += 1
    return key.clone(), following


_next = Operator("lowbit::next_key", _next_key, "(Tensor key) -> (Tensor, Tensor)")


@_next.register_fake
def _(key: Tensor) -> tuple[Tensor, Tensor]:
    _check(key)
    return torch.empty_like(key), torch.empty_like(key)


def next_key(key: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of a key, and the key of the step after it."""
    return torch.ops.lowbit.next_key(key)
