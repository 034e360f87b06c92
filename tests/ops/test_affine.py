"""lowbit::affine: the definition by hand-made numbers, the kernel against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.ops import backends
from lowbit.ops.affine import affine

DEFINITION = backends.definition("lowbit::affine")
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("low", "high", "code", "scale", "zero"),
    [
        (-1.0, 3.0, True, 0.5, 2),  # of 8 steps
        (-1.0, 3.0, False, 0.5, 2),
        (-1.25, 2.75, True, 0.5, 2),  # 2.5, to even
        (-1.25, 2.75, False, 0.5, 2.5),
        (2.0, 4.0, True, 0.5, 0),  # the range is extended to 0
        (2.0, 4.0, False, 0.25, -8),
        (-4.0, -2.0, True, 0.5, 8),
        (3.0, 3.0, False, 3.0, -1),  # no range: its own magnitude
        (-3.0, -3.0, False, 3.0, 1),
        (0.0, 0.0, True, 1.0, 0),
    ],
)
def test_hand_made(low: float, high: float, code: bool, scale: float, zero: float, dtype: torch.dtype) -> None:
    s, z = affine(torch.tensor([[low]], dtype=dtype), torch.tensor([[high]], dtype=dtype), 8, code)
    assert s.dtype == z.dtype == dtype and s.shape == z.shape == (1, 1)
    assert (s.item(), z.item()) == (scale, zero)


def test_a_span_beyond_the_range_has_a_scale() -> None:
    s, z = affine(torch.tensor([-3e38]), torch.tensor([3e38]), 255, True)
    assert s.item() == pytest.approx(6e38 / 255) and z.item() == 128


def pairs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 3e38, -3e38, 1e-42, -1e-42, 7.0, -127.5, 1e-38])
    low, high = (t.flatten() for t in torch.meshgrid(special, special, indexing="ij"))
    a, b = (torch.randn(20_000, generator=g) * 10 ** (torch.rand(20_000, generator=g) * 60 - 30) for _ in range(2))
    return torch.cat([low, torch.minimum(a, b)]), torch.cat([high, torch.maximum(a, b)])


@pytest.mark.skipif(not backends.compiled_isas(), reason="no compiled kernels")
@pytest.mark.parametrize("code", [True, False])
@pytest.mark.parametrize("denominator", [1.0, 3.0, 7.5, 255.0])
def test_kernel_equals_the_definition(denominator: float, code: bool) -> None:
    low, high = pairs()
    for a, b in (
        (low, high),
        (low[::3], high[::3]),
        (low[:0], high[:0]),
        (low[:12].view(3, 4).t(), high[:12].view(4, 3)),
    ):
        for got, expected in zip(
            torch.ops.lowbit.affine(a, b, denominator, code), DEFINITION(a, b, denominator, code), strict=True
        ):
            assert got.shape == expected.shape and got.is_contiguous() and expected.is_contiguous()
            assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("float16", {"low": torch.zeros(2, dtype=torch.float16)}),
        ("float64", {"high": torch.zeros(2, dtype=torch.float64)}),
        ("(3,)", {"high": torch.zeros(3)}),
        ("-1", {"denominator": -1.0}),
        ("nan", {"denominator": NAN}),
    ],
)
def test_errors_name_the_value(message: str, change: dict[str, object]) -> None:
    good = {"low": torch.zeros(2), "high": torch.zeros(2), "denominator": 3.0, "code": True}
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    for call in (affine, DEFINITION):
        with pytest.raises((TypeError, ValueError), match=pattern):
            call(**good | change)
    if backends.compiled_isas():
        with pytest.raises(RuntimeError):
            torch.ops.lowbit.affine(*(good | change).values())


def test_opcheck() -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    ends = -torch.rand(5, 1), torch.rand(5, 1)
    found = torch.library.opcheck(torch.ops.lowbit.affine.default, (*ends, 15.0, True), test_utils=checks)
    assert found == dict.fromkeys(checks, "SUCCESS")
