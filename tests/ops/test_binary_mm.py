"""lowbit::pack_signs and lowbit::binary_mm: the definitions against integer products, the kernels against both."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from lowbit import packing
from lowbit.ops import backends
from lowbit.ops.binary_mm import binary_mm, pack_signs

PACK = backends.definition("lowbit::pack_signs")
DEFINITION = backends.definition("lowbit::binary_mm")
ISAS = backends.compiled_isas()


def signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape) * 2 - 1


def test_by_hand() -> None:
    a, b = torch.tensor([[1.0, -1, 1, 1, -1]]), torch.tensor([[1.0, 1, -1, 1, -1]])
    assert pack_signs(a).tolist() == [[0b01101]] and pack_signs(b).tolist() == [[0b11011 - 0b10000]]
    for multiply in (binary_mm, DEFINITION):
        assert multiply(pack_signs(a), pack_signs(b), 5).tolist() == [[1]]  # two of five differ
    special = torch.tensor([0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1e-45, -1e-45])
    assert pack_signs(special).tolist() == PACK(special).tolist() == [0b01010011]
    assert pack_signs(torch.ones(64)).tolist() == PACK(torch.ones(64)).tolist() == [-1]


def test_words_are_the_packed_codes() -> None:
    x = torch.randn(3, 128)
    words = pack_signs(x)
    assert torch.equal(words.view(torch.uint8).flatten(), packing.pack((x >= 0).to(torch.uint8), 1))


@pytest.mark.parametrize("isa", ISAS)
def test_packing_equals_the_definition(isa: str) -> None:
    with backends.using_isa(isa):
        for depth in [*range(0, 140, 3), 64, 128, 1000]:
            x = torch.randn(3, 2, depth + 1)[..., 1:]
            assert torch.equal(torch.ops.lowbit.pack_signs(x), PACK(x)), depth
        x = torch.randn(5, 300)
        for view in (x.t(), x[:, ::2], x[0], x[:0], x[:1].expand(4, 300)):
            assert torch.equal(torch.ops.lowbit.pack_signs(view), PACK(view))


@pytest.mark.parametrize("isa", ISAS)
def test_products_equal_the_integer_product(isa: str) -> None:
    generator = random.Random(4)
    sizes = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 70]
    for _ in range(150):
        m, n = generator.choice(sizes), generator.choice(sizes)
        depth = generator.choice([generator.randint(1, 300), 64 * generator.randint(1, 9)])
        a, b = signs(m, depth), signs(n, depth)
        words = PACK(a.float()), PACK(b.float())
        if generator.random() < 0.3:
            words = words[0].t().contiguous().t(), torch.cat([words[1], words[1]], 1)[:, : words[1].shape[1]]
        with backends.using_isa(isa):
            result = torch.ops.lowbit.binary_mm(*words, depth)
        assert torch.equal(result.long(), a @ b.t()), (m, n, depth)
        assert result.dtype == torch.int32 and torch.equal(result, DEFINITION(*words, depth))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("depth", [1, 63, 64, 65, 5000])
def test_extremes(isa: str, depth: int) -> None:
    a = PACK(signs(1, depth).float())
    opposite = a ^ PACK(torch.ones(1, depth))
    with backends.using_isa(isa):
        assert torch.ops.lowbit.binary_mm(a, torch.cat([a, opposite]), depth).tolist() == [[depth, -depth]]


@pytest.mark.parametrize("shape", [(300, 200), (1, 3000), (3000, 1), (5, 700)])
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, int]) -> None:
    a, b = torch.randn(shape[0], 700), torch.randn(shape[1], 700)
    expected = DEFINITION(PACK(a), PACK(b), 700)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(binary_mm(pack_signs(a), pack_signs(b), 700), expected)
    finally:
        torch.set_num_threads(before)


def test_zero_sizes() -> None:
    for multiply in (torch.ops.lowbit.binary_mm, DEFINITION):
        for m, n, words, depth in [(2, 3, 0, 0), (0, 3, 1, 9), (2, 0, 1, 9)]:
            result = multiply(torch.zeros(m, words).long(), torch.zeros(n, words).long(), depth)
            assert result.shape == (m, n) and not result.any()


@pytest.mark.parametrize("multiply", [binary_mm, DEFINITION], ids=["operator", "definition"])
def test_errors_name_the_value(multiply) -> None:
    a, b = torch.zeros(2, 3).long(), torch.zeros(4, 3).long()
    with pytest.raises(TypeError, match="int32"):
        multiply(a.int(), b, 192)
    with pytest.raises(ValueError, match=r"200 signs is 4 words, got a of shape \(2, 3\)"):
        multiply(a, b, 200)
    with pytest.raises(ValueError, match=r"b of shape \(4, 2\)"):
        multiply(a, b[:, :2], 192)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        multiply(a[0], b, 192)
    with pytest.raises(TypeError, match="float64"):
        pack_signs(torch.ones(3).double())
    with pytest.raises(ValueError, match="axis"):
        pack_signs(torch.tensor(1.0))


@pytest.mark.skipif(not ISAS, reason="the C++ kernels are not built")
def test_the_kernel_checks_what_it_is_given() -> None:
    a, b = torch.zeros(2, 3).long(), torch.zeros(4, 3).long()
    for args in [(a.int(), b, 192), (a, b, 193), (a, b, 128), (a, b[:, :2], 192), (a[0], b, 192), (a, b, -1)]:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            torch.ops.lowbit.binary_mm(*args)


def test_opcheck() -> None:
    x = torch.randn(3, 70)
    torch.library.opcheck(torch.ops.lowbit.pack_signs.default, (x,))
    torch.library.opcheck(torch.ops.lowbit.binary_mm.default, (PACK(x), PACK(x[:2]), 70))
