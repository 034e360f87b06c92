"""lowbit::reflect: the definition against dense matrices, the kernels against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.formats import Float, Int
from lowbit.ops import backends
from lowbit.ops.cast import cast, cast_arguments
from lowbit.ops.reflect import reflect, reflect_cast, reflect_minmax

DEFINITION = backends.definition("lowbit::reflect")
ISAS = backends.compiled_isas()


def case(
    rows: int, groups: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """group, v, before, after; one group has no mirror."""
    g = torch.Generator().manual_seed(seed)
    group = torch.randint(0, groups, (rows,), generator=g)
    v = torch.randn(rows, generator=g, dtype=dtype)
    v[group == 0] = 0
    before, after = (torch.rand(rows, generator=g, dtype=dtype) * 9 + 0.1 for _ in range(2))
    return group, v, before, after


def dense(group: Tensor, v: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """The matrix of the operator."""
    v, before, after = v.double(), before.double(), after.double()
    h = torch.eye(len(v), dtype=torch.float64)
    for number in group.unique():
        inside = torch.where(group == number, v, 0)
        if inside.any():
            h -= 2 * torch.outer(inside, inside) / inside.square().sum()
    return after[:, None] * h * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (2, 1), (9, 3), (40, 40)])
def test_equals_the_matrix(rows: int, groups: int, dtype: torch.dtype) -> None:
    group, v, before, after = case(rows, groups, dtype=dtype)
    x = torch.randn(rows, 3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = (dense(group, v, before, after) @ x.double().flatten(1)).reshape(x.shape)
    y = reflect(x, group, v, before, after)
    assert y.dtype == dtype and y.shape == x.shape
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-5 if dtype == torch.float32 else 1e-12)
    back = reflect(reflect(x, group, v, before=before), group, v, after=1 / before)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


def test_a_row_without_a_mirror_stays() -> None:
    x = torch.randn(3, 4)
    group, v = torch.tensor([0, 1, 2]), torch.zeros(3)
    assert torch.equal(reflect(x, group, v), x)
    assert torch.equal(reflect(x, group, v, after=torch.full_like(v, 0.5)), x / 2)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def tensors() -> dict[str, Tensor]:
    x = torch.randn(33, 6, 7, 5, generator=torch.Generator().manual_seed(2)) * 3
    special = x.flatten(1).clone()
    special[3, 5], special[4, 9], special[20, 20], special[7] = math.nan, math.inf, -math.inf, 0.0
    special[12, 30:50], special[13] = 3e38, 1e-42
    return {
        "contiguous": x,
        "channels last": x.to(memory_format=torch.channels_last),
        "columns": x.transpose(0, 1),
        "gaps": x[:, :, ::2],
        "odd place": torch.cat([torch.zeros(3), x.flatten()])[3:].view(x.shape),
        "vector": torch.randn(17, generator=torch.Generator().manual_seed(3)),
        "one row": x[:1],
        "expanded": x[:1].expand(9, -1, -1, -1),
        "special": special,
        "long": torch.randn(5, 70_001, generator=torch.Generator().manual_seed(4)),
        "tall": torch.randn(3000, 19, generator=torch.Generator().manual_seed(5)),
        "no row": x[:0],
        "no column": x[:, :0],
    }


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", tensors())
def test_kernels_equal_the_definition(name: str, isa: str) -> None:
    x = tensors()[name]
    group, v, before, after = case(len(x), max(1, len(x) // 4), seed=7)
    threads = torch.get_num_threads()
    try:
        for first, last in [(None, None), (before, None), (None, after), (before, after)]:
            expected = DEFINITION(x, group, v, first, last)
            for count in (1, 3):
                torch.set_num_threads(count)
                with backends.using_isa(isa):
                    got = torch.ops.lowbit.reflect(x, group, v, first, last)
                assert same_bits(got, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("float16", {"x": torch.zeros(2, 3, dtype=torch.float16)}),
        ("scalar", {"x": torch.zeros(())}),
        ("group.*int32", {"group": torch.zeros(2, dtype=torch.int32)}),
        ("v must.*(3,)", {"v": torch.zeros(3)}),
        ("before.*float64", {"before": torch.zeros(2, dtype=torch.float64)}),
        ("after.*(2, 1)", {"after": torch.zeros(2, 1, dtype=torch.float64)}),
        ("0 to rows - 1.*got 2", {"group": torch.tensor([0, 2])}),
        ("0 to rows - 1.*got -1", {"group": torch.tensor([0, -1])}),
    ],
)
def test_errors_name_the_value(message: str, change: dict[str, Tensor]) -> None:
    good = {
        "x": torch.zeros(2, 3),
        "group": torch.zeros(2, dtype=torch.int64),
        "v": torch.zeros(2),
        "before": None,
        "after": None,
    }
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    for call in (reflect, DEFINITION):
        with pytest.raises((RuntimeError, TypeError, ValueError), match=pattern):
            call(**good | change)
    if ISAS:
        with pytest.raises(RuntimeError):
            torch.ops.lowbit.reflect(*(good | change).values())


# ---- together with statistics and a cast ----------------------------------------------------------------------------

FORMATS = {
    "int5": (Int(5, signed=False), "stochastic"),
    "nearest": (Int(4), "half_even"),
    "float": (Float(4, 3), "stochastic"),
}


def mirrored(x: Tensor) -> tuple[Tensor, ...]:
    """group, v and factor, and scale and offset of 31 steps from end to end."""
    group, v, factor, _ = case(len(x), max(1, len(x) // 4), seed=7)
    low, high = backends.definition("lowbit::reflect_minmax")(x, group, v, factor)
    return group, v, factor, ((high - low) / 31).nan_to_num(1.0, 1.0, 1.0) + 1e-30, low


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", tensors())
def test_ends_and_casts_equal_the_definitions(name: str, isa: str) -> None:
    x, key = tensors()[name], torch.tensor([7, 3, 2])
    mirror = mirrored(x)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            expected = backends.definition("lowbit::reflect_minmax")(x, *mirror[:3])
            with backends.using_isa(isa):
                got = torch.ops.lowbit.reflect_minmax(x, *mirror[:3])
            assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
            for fmt, rounding in FORMATS.values():
                how = None if rounding != "stochastic" else key, *cast_arguments(fmt, rounding), rounding
                wanted = backends.definition("lowbit::reflect_cast")(x, *mirror, *how)
                with backends.using_isa(isa):
                    assert same_bits(torch.ops.lowbit.reflect_cast(x, *mirror, *how), wanted)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(7, 40), (6, 5, 9, 8), (130, 64, 3, 3), (9, 300, 2)])
def test_cast_between_two_reflections(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    group, v, factor, scale, offset = mirrored(x)
    key, how = torch.tensor([1, 2, 3]), cast_arguments(Int(5, signed=False), "stochastic")
    low, high = reflect_minmax(x, group, v, factor)
    mixed = reflect(x, group, v, before=factor)
    assert torch.equal(low, mixed.flatten(1).amin(1)) and torch.equal(high, mixed.flatten(1).amax(1))
    strides = [1] + [0] * (x.dim() - 1)
    q = cast(mixed, scale, None, key, None, strides, *how, "stochastic", "values", offset)
    got = reflect_cast(x, group, v, factor, scale, offset, key, *how, "stochastic")
    assert same_bits(got, reflect(q, group, v, after=1 / factor)) and got.stride() == x.stride()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("float64", {"x": torch.zeros(2, 3, dtype=torch.float64)}),
        ("v must", {"v": torch.zeros(3)}),
        ("scale.*(5,)", {"scale": torch.ones(5)}),
        ("offset", {"offset": torch.ones(2, dtype=torch.float64)}),
        ("key", {"key": None}),
        ("numbers", {"numbers": [1.0]}),
    ],
)
def test_errors_of_the_cast_name_the_value(message: str, change: dict[str, Any]) -> None:
    kind, numbers, table = cast_arguments(Int(5), "stochastic")
    good = {
        "x": torch.zeros(2, 3),
        "group": torch.zeros(2, dtype=torch.int64),
        "v": torch.zeros(2),
        "factor": torch.ones(2),
        "scale": torch.ones(2),
        "offset": torch.zeros(2),
        "key": torch.tensor([0, 0, 0]),
        "kind": kind,
        "numbers": numbers,
        "table": table,
        "rounding": "stochastic",
    }
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    for call in (reflect_cast, backends.definition("lowbit::reflect_cast")):
        with pytest.raises((TypeError, ValueError), match=pattern):
            call(*(good | change).values())
    if ISAS:
        with pytest.raises(RuntimeError):
            torch.ops.lowbit.reflect_cast(*(good | change).values())


# ---- torch.library --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 5, 4)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    group, v, before, _ = case(len(x), 2)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    how = before, -before, torch.tensor([0, 0, 0]), *cast_arguments(Int(5), "stochastic"), "stochastic"
    for operator, rest in (
        ("reflect", (before, None)),
        ("reflect_minmax", (before,)),
        ("reflect_cast", (before, *how)),
    ):
        overload = getattr(torch.ops.lowbit, operator).default
        found = torch.library.opcheck(overload, (x, group, v, *rest), test_utils=checks)
        assert found == dict.fromkeys(checks, "SUCCESS")
