"""lowbit::hadamard: the definition against Sylvester's matrix, the kernels against the definition."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from lowbit.ops import backends
from lowbit.ops.hadamard import hadamard

DEFINITION = backends.definition("lowbit::hadamard")
ISAS = backends.compiled_isas()
SIZES = [2**k for k in range(13)]


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x.contiguous().view(torch.int32), y.contiguous().view(torch.int32))


def sylvester(size: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def random_signs(n: int) -> Tensor:
    return torch.randint(0, 2, (n,)).float() * 2 - 1


@pytest.mark.parametrize("size", SIZES)
def test_definition_is_sylvesters_matrix(size: int) -> None:
    x = torch.randint(-9, 10, (2, 2 * size)).float()  # whole numbers: the sums are exact
    exact = (x.double().view(-1, size) @ sylvester(size)).view(2, 2 * size)
    expected = (exact.float() * torch.tensor(1 / math.sqrt(size), dtype=torch.float32)).float()
    assert torch.equal(DEFINITION(x, size, None, False), expected)
    if math.log2(size) % 2 == 0:
        assert torch.equal(DEFINITION(x, size, None, False).double(), exact / math.sqrt(size))


def test_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert hadamard(x, 4).tolist() == [5.0, -1.0, -2.0, 0.0]
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0])
    assert hadamard(x, 4, signs).tolist() == [3.0, 1.0, -4.0, 2.0]  # the signs multiply the input
    assert hadamard(x, 4, signs, inverse=True).tolist() == [5.0, 1.0, -2.0, 0.0]  # and here the result


@pytest.mark.parametrize("length", [32, 96])
def test_inverse_and_products(length: int) -> None:
    x, w, signs = torch.randn(5, 96), torch.randn(7, 96), random_signs(length)
    y = hadamard(x, 32, signs)
    torch.testing.assert_close(hadamard(y, 32, signs, inverse=True), x)
    torch.testing.assert_close(hadamard(hadamard(x, 32), 32), x)
    torch.testing.assert_close(y @ hadamard(w, 32, signs).t(), x @ w.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.norm(), x.norm())


def cases(number: int) -> list[tuple[Tensor, int, Tensor | None, bool]]:
    generator = random.Random(3)
    made = []
    for _ in range(number):
        size = generator.choice(SIZES)
        n = size * generator.choice([1, 2, 3, 5, 7])
        rows = generator.choice([1, 2, 3]) if size > 64 else generator.choice([1, 3, 10, 33])
        x = torch.randn(rows, n) * 10.0 ** generator.uniform(-40, 38)
        x[generator.randrange(rows), generator.randrange(n)] = generator.choice(
            [0.0, -0.0, math.nan, math.inf, -math.inf, 3e38, 1e-45]
        )
        if generator.random() < 0.2:
            x[0, 0] = math.inf
        shape = generator.randrange(4)
        if shape == 1:
            x = x.t().contiguous().t()
        elif shape == 2:
            x = torch.cat([x, x], 1)[:, ::2] if n % 2 == 0 else x[0]
        elif shape == 3:
            x = torch.cat([torch.zeros(1), x.flatten()])[1:].view(rows, n)  # not aligned
        signs = generator.choice([None, random_signs(size), random_signs(n), random_signs(2 * n)[::2]])
        made.append((x, size, signs, generator.random() < 0.5))
    return made


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_equal_the_definition(isa: str) -> None:
    for x, size, signs, inverse in cases(200):
        with backends.using_isa(isa):
            result = torch.ops.lowbit.hadamard(x, size, signs, inverse)
        assert same_bits(result, DEFINITION(x, size, signs, inverse)), (x.shape, x.stride(), size, inverse)


@pytest.mark.parametrize("size", [8, 64, 4096])
def test_any_number_of_threads_gives_the_same_bits(size: int) -> None:
    x, signs = torch.randn(3, 5, 12288), random_signs(12288)
    expected, plain = DEFINITION(x, size, signs, False), DEFINITION(x, size, None, False)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert same_bits(hadamard(x, size, signs), expected)
            assert same_bits(hadamard(x, size), plain)
    finally:
        torch.set_num_threads(before)


def test_gradient_is_the_transpose() -> None:
    for inverse in (False, True):
        x, g, signs = torch.randn(3, 24, requires_grad=True), torch.randn(3, 24), random_signs(8)
        (grad,) = torch.autograd.grad(hadamard(x, 8, signs, inverse), x, g)
        assert same_bits(grad, hadamard(g, 8, signs, not inverse))
        matrix = hadamard(torch.eye(24), 8, signs, inverse)
        torch.testing.assert_close(grad, g @ matrix.t())
    x = torch.randn(2, 4, requires_grad=True)
    assert torch.autograd.grad(hadamard(x, 4).square().sum(), x, create_graph=True)[0].requires_grad


def test_zero_sizes() -> None:
    for transform in (torch.ops.lowbit.hadamard, DEFINITION):
        assert transform(torch.ones(0, 8), 4, None, False).shape == (0, 8)
        assert transform(torch.ones(3, 0), 4, torch.ones(4), True).shape == (3, 0)


@pytest.mark.parametrize("transform", [torch.ops.lowbit.hadamard, DEFINITION], ids=["operator", "definition"])
def test_errors(transform) -> None:
    x = torch.ones(2, 12)
    for args in [
        (x.double(), 4, None),
        (x, 3, None),
        (x, 0, None),
        (x, 8192, None),
        (x, 8, None),
        (torch.tensor(1.0), 1, None),
        (x, 4, torch.ones(3)),
        (x, 4, torch.ones(4).double()),
        (x, 4, torch.ones(4, 1)),
    ]:
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            transform(*args, False)


def test_errors_name_the_value() -> None:
    x = torch.ones(2, 12)
    with pytest.raises(TypeError, match="float64"):
        hadamard(x.double(), 4)
    with pytest.raises(ValueError, match="power of two, 1 to 4096; got 3"):
        hadamard(x, 3)
    with pytest.raises(ValueError, match=r"multiple of size 8; got shape \(2, 12\)"):
        hadamard(x, 8)
    with pytest.raises(ValueError, match=r"length 4 or 12; got shape \(3,\)"):
        hadamard(x, 4, torch.ones(3))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    x = torch.randn(3, 8, requires_grad=requires_grad)
    for signs, inverse in ((None, False), (random_signs(4), True)):
        torch.library.opcheck(torch.ops.lowbit.hadamard.default, (x, 4, signs, inverse))


def test_compile() -> None:
    x, signs = torch.randn(3, 8, requires_grad=True), random_signs(8)
    compiled = torch.compile(lambda x: hadamard(x, 4, signs) * 2, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(x), hadamard(x, 4, signs) * 2)
    compiled(x).sum().backward()
    assert x.grad is not None
