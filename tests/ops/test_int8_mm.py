"""The exact int8 matrix product: any shape, any codes, sums longer than int32 holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.ops.int8_mm import SAFE, _definition, int8_mm


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 33), st.integers(0, 70), st.integers(0, 33), st.integers(0, 99), st.booleans(), st.booleans())
def test_equals_the_definition_and_int64(m, k, n, seed, turned_a, turned_b):
    g = torch.Generator().manual_seed(seed)
    a = torch.randint(-128, 128, (k, m) if turned_a else (m, k), dtype=torch.int8, generator=g)
    b = torch.randint(-128, 128, (n, k) if turned_b else (k, n), dtype=torch.int8, generator=g)
    a, b = a.t() if turned_a else a, b.t() if turned_b else b
    y = int8_mm(a, b)
    assert y.dtype == torch.int32 and torch.equal(y, _definition(a, b, SAFE))
    assert torch.equal(y.long(), a.long() @ b.long())


def test_safe_is_the_largest_length_that_cannot_overflow():
    assert SAFE * 128**2 <= 2**31 - 1 < (SAFE + 1) * 128**2
    assert 133_144 * 127**2 <= 2**31 - 1 < 133_145 * 127**2  # with codes of ±127 only


@pytest.mark.parametrize("value, k", [(-128, SAFE), (127, 133_144), (-128, 2 * SAFE + 7), (127, 133_145)])
def test_longest_sums(value, k):
    a, b = torch.full((2, k), value, dtype=torch.int8), torch.full((k, 1), value, dtype=torch.int8)
    y = int8_mm(a, b)
    assert y.tolist() == [[k * value**2]] * 2
    assert y.dtype == (torch.int32 if k <= SAFE else torch.int64)


@pytest.mark.parametrize("split", [1, 3, 16, 17, 64])
def test_split_changes_nothing_but_the_type(split):
    a, b = torch.randint(-128, 128, (5, 64), dtype=torch.int8), torch.randint(-128, 128, (64, 3), dtype=torch.int8)
    assert torch.equal(int8_mm(a, b, split).long(), a.long() @ b.long())


def test_one_row_and_one_column():
    for m, k, n in ((1, 1, 1), (1, 9, 4), (4, 9, 1), (1, 300, 1)):
        a, b = torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.randint(-128, 128, (k, n), dtype=torch.int8)
        assert torch.equal(int8_mm(a, b).long(), a.long() @ b.long())


def test_refuses_what_it_cannot_do_exactly():
    a, b = torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3, 2, dtype=torch.int8)
    with pytest.raises(TypeError, match="int8 operands"):
        int8_mm(a.float(), b)
    with pytest.raises(ValueError, match="got"):
        int8_mm(a, b.t())
    for split in (0, SAFE + 1):
        with pytest.raises(ValueError, match="131071"):
            int8_mm(a, b, split)


def test_operator_is_well_declared():
    a, b = torch.randint(-128, 128, (4, 8), dtype=torch.int8), torch.randint(-128, 128, (8, 3), dtype=torch.int8)
    for split in (SAFE, 5):
        torch.library.opcheck(
            torch.ops.lowbit.int8_mm.default, (a, b, split), test_utils=("test_schema", "test_faketensor")
        )
