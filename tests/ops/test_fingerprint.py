"""lowbit::fingerprint: the kernel equals the definition, and every kind of change shows."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops import backends
from lowbit.ops.fingerprint import WEIGHTS, fingerprint

DEFINITION = backends.definition("lowbit::fingerprint")


@pytest.mark.parametrize("isa", backends.compiled_isas())
@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernel_equals_the_definition(isa: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with backends.using_isa(isa):
            for count in (0, 1, 15, 16, 17, 1000, 65535, 65536, 65537, 200003):
                x = torch.randn(count + 1)[1:]  # not aligned
                assert fingerprint(x) == DEFINITION(x, WEIGHTS)
    finally:
        torch.set_num_threads(before)


def test_changes_show() -> None:
    x = torch.randn(1 << 12)
    seen = {fingerprint(x)}
    swapped = x.clone()
    swapped[[3, 700]] = swapped[[700, 3]]
    changed = [2 * x, -x, x.flip(0), x.roll(16), x + 1, swapped, x * (1 + 2**-23), torch.zeros_like(x), -0.0 * x.abs()]
    for i in range(0, len(x), 97):  # one bit of one element
        y = x.clone()
        y.view(torch.int32)[i] ^= 1
        changed.append(y)
    for y in changed:
        seen.add(fingerprint(y))
    assert len(seen) == 1 + len(changed)


def test_other_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        fingerprint(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="contiguous"):
        fingerprint(torch.zeros(3, 4).t())
