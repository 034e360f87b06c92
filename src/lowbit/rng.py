"""The library's randomness: counter-based uniforms that repeat bit for bit.

A random number depends on (seed, stream, step, element) only. `seed` is the run, `stream` the slot that draws
(one quantizer of one layer), `step` counts its calls. The bits themselves are made by `lowbit.ops.uniform`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.ops.uniform import next_key
from lowbit.ops.uniform import uniform as uniform_op

__all__ = ["Stream", "stream_id", "uniform"]

RANK_STRIDE = 0x9E3779B97F4A7C15
"""Odd, 2**64 divided by the golden ratio: seeds of different ranks differ in both key words."""

REMEMBERED = 1024
"""Calls of one stream that an activation checkpoint may still repeat."""


def _int64(value: int) -> int:
    """`value` modulo 2**64, as a signed 64-bit integer."""
    return ((value + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def stream_id(name: str) -> int:
    """A number in [0, 2**31) that depends on the name of a layer or slot only, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") & 0x7FFFFFFF


def uniform(
    shape: Sequence[int],
    seed: int = 0,
    stream: int = 0,
    step: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniforms in [0, 1): float32 of `shape`, the same bits on every device.

    Args:
        shape: shape of the result.
        seed: any integer; counts modulo 2**64.
        stream, step: any integers; their low 32 bits count.
        device: where the result lies; the CPU if not given.
    """
    key = torch.tensor([_int64(seed), _int64(stream), _int64(step)], dtype=torch.int64, device=device)
    return uniform_op(key, list(shape))


_ONE_STEP = torch.tensor([0, 0, 1])


class Stream(torch.nn.Module):
    """The random state of one slot: a buffer `key` = (seed, stream, step), int64 of shape (3,).

    The buffer is saved in `state_dict`, so a resumed run repeats the original. A checkpoint without it loads
    all the same (strict or not) and leaves the key as it is.

    Activation checkpointing runs a forward twice and must round the same way in both. The first run marks its
    call with a tag drawn from PyTorch's default CPU generator, which `torch.utils.checkpoint` rewinds for the
    second run; the second run draws the same tag and finds the key of the first. So
    `preserve_rng_state=False` is not supported, nor is a backward more than 1024 calls of this stream later.
    Tags are drawn only where a checkpoint is possible: without gradients, or with saved-tensor hooks.

    Args:
        seed: the seed of the run; any integer, counts modulo 2**64.
        stream: number of the slot, or its name (see `stream_id`).
        step: first step.
    """

    key: Tensor

    def __init__(self, seed: int = 0, stream: int | str = 0, step: int = 0) -> None:
        super().__init__()
        number = stream_id(stream) if isinstance(stream, str) else stream
        key = torch.tensor([_int64(seed), _int64(number), _int64(step)], dtype=torch.int64)
        self.register_buffer("key", key)
        self._calls: OrderedDict[int, Tensor] = OrderedDict()  # tag -> key of the call

    def next(self, rank: int = 0) -> Tensor:
        """The key of one call; the next call gets another.

        Args:
            rank: process number in distributed training, if ranks shall differ: the seed becomes
                seed + rank * 0x9E3779B97F4A7C15 modulo 2**64. Rank 0 keeps the seed.

        Returns:
            A new int64 tensor of shape (3,) on the buffer's device: seed, stream, step. In the second run of an
            activation checkpoint: the key of the first run, and the step does not advance.
        """
        if torch.compiler.is_compiling():
            return self._advance(rank)
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass
            known = recall(self._calls)
            return self._advance(rank) if known is None else known.clone()
        key = self._advance(rank)
        remember(self._calls, key)
        return key

    def move(self) -> Tensor:
        """Advance without being remembered: for what a checkpoint's second run does not ask for again."""
        return self._advance(0)

    def _advance(self, rank: int) -> Tensor:
        if torch.compiler.is_compiling():
            # one operator gives both: of a plain copy, the compiler would make another in the backward pass, and by
            # then the buffer has moved on
            key, following = next_key(self.key)
            self.key.copy_(following)
        else:
            key = self.key.clone()
            # in place: who calls the model with buffers of his own (torch.func.functional_call) finds them moved on
            self.key.add_(_ONE_STEP.to(key.device))
        if rank:
            key[0] += _int64(rank * RANK_STRIDE)
        return key

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles start without remembered calls
        return self.__dict__ | {"_calls": OrderedDict()}

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "key" in missing_keys:
            missing_keys.remove(prefix + "key")


def remember(calls: OrderedDict[int, Tensor], value: Tensor) -> None:
    """Keep what a call used, where an activation checkpoint may run it again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None or not torch.is_grad_enabled():
        calls[_tag()] = value.clone()
        if len(calls) > REMEMBERED:
            calls.popitem(last=False)


def recall(calls: OrderedDict[int, Tensor]) -> Tensor | None:
    """Within a backward pass: the value of the call that is being repeated; None in a call of the backward pass
    itself."""
    if not calls:
        return None
    before = torch.get_rng_state()
    known = calls.get(_tag())
    if known is None:
        torch.set_rng_state(before)
    return known


def _tag() -> int:
    return int(torch.randint(1 << 62, (), dtype=torch.int64, device="cpu"))
