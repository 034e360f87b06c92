"""lowbit::magnitudes: the definition against float64 sums, the kernels against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.ops import backends
from lowbit.ops.magnitudes import magnitudes

DEFINITION = backends.definition("lowbit::magnitudes")
ISAS = backends.compiled_isas()


def matrices() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    special = torch.randn(9, 2500, generator=g)
    special[1, 3], special[2, 2400], special[3, 7], special[4] = math.nan, math.inf, -math.inf, 0.0
    special[5] *= 1e-42
    special[6] *= 1e37
    special[7, 1], special[7, 2] = -math.nan, math.inf
    return {
        "one": torch.randn(1, 1, generator=g),
        "short rows": torch.randn(70, 5, generator=g),
        "tails": torch.randn(3, 4099, generator=g),
        "many chunks": torch.randn(2, 70_001, generator=g),
        "odd place": torch.randn(3 + 4 * 1024, generator=g)[3:].view(4, 1024),
        "special": special,
        "no block": torch.empty(0, 7),
    }


def test_equals_plain_sums() -> None:
    x = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1))
    size = x.double().abs()
    expected = torch.stack([size.amax(1), size.sum(1), size.square().sum(1)], 1)
    torch.testing.assert_close(magnitudes(x), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", matrices())
def test_kernels_equal_the_definition(name: str, isa: str) -> None:
    x = matrices()[name]
    expected, threads = DEFINITION(x), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with backends.using_isa(isa):
                got = torch.ops.lowbit.magnitudes(x)
            assert got.shape == (len(x), 3) and torch.equal(got.view(torch.int64), expected.view(torch.int64))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("message", "x"),
    [
        ("float64", torch.zeros(2, 3, dtype=torch.float64)),
        ("contiguous", torch.zeros(3, 2).t()),
        ("matrix", torch.zeros(3)),
        ("an element", torch.zeros(2, 0)),
    ],
)
def test_errors_name_the_value(message: str, x: Tensor) -> None:
    for call in (magnitudes, DEFINITION):
        with pytest.raises((TypeError, ValueError), match=message):
            call(x)
    if ISAS:
        with pytest.raises(RuntimeError):
            torch.ops.lowbit.magnitudes(x)


def test_opcheck() -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    found = torch.library.opcheck(torch.ops.lowbit.magnitudes.default, (torch.randn(3, 40),), test_utils=checks)
    assert found == dict.fromkeys(checks, "SUCCESS")
