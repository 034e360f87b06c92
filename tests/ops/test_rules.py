"""The backward passes of gradient rules: their formulas in numpy, and every kernel equal to its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lowbit.ops import rules
from lowbit.ops.backends import compiled_isas, definition, using_isa

SHAPES = [(1, 5000), (1, 1024), (3, 1023), (7, 9), (1, 1), (2, 0), (0, 4), (2, 40_000)]
NAMES = ("in_range_backward", "step_backward", "clip_backward")


def arguments(name: str, shape: tuple[int, int], seed: int = 0) -> tuple[object, ...]:
    g = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=g) for _ in range(2))
    step = torch.rand(shape[0], generator=g) + 0.25
    if name == "in_range_backward":
        return grad, x, -step, 2 * step, True
    if name == "clip_backward":
        return grad, x, step
    return grad, x, (x / step[:, None]).clamp(-2, 1).round() * step[:, None], step, -2.0, 1.0


def results(given: object) -> tuple[torch.Tensor, ...]:
    return (given,) if isinstance(given, torch.Tensor) else tuple(given)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    signs = torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())
    return a.dtype == b.dtype and signs and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("isa", compiled_isas() or [None])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_equal_their_definition_bit_for_bit(name, isa):
    if isa is None:
        pytest.skip("no compiled kernels")
    for shape in SHAPES:
        given = arguments(name, shape)
        wanted = results(definition(f"lowbit::{name}")(*given))
        with using_isa(isa):
            threads = torch.get_num_threads()
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                try:
                    got = results(getattr(rules, name)(*given))
                finally:
                    torch.set_num_threads(threads)
                assert all(same(a, b) for a, b in zip(got, wanted, strict=True)), (shape, count)


@pytest.mark.parametrize("isa", compiled_isas() or [None])
@pytest.mark.parametrize("name", NAMES)
def test_special_numbers_too(name, isa):
    if isa is None:
        pytest.skip("no compiled kernels")
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-38, 3e38, -3e38, 0.5, -0.5, 1.0])
    grad, x = (t.flatten() for t in torch.meshgrid(special, special, indexing="ij"))
    for one in (1.0, 1.2e-38, 3e38):
        bound = torch.full((len(x),), one)
        given = (grad[:, None], x[:, None], *(b for b in arguments(name, (len(x), 1))[2:]))
        if name == "in_range_backward":
            given = (*given[:2], -bound, bound, False)
        elif name == "clip_backward":
            given = (*given[:2], bound)
        else:
            q = (x / bound).clamp(-2, 1).round() * bound
            given = (*given[:2], q[:, None], bound, -2.0, 1.0)
        wanted = results(definition(f"lowbit::{name}")(*given))
        with using_isa(isa):
            got = results(getattr(rules, name)(*given))
        assert all(same(a, b) for a, b in zip(got, wanted, strict=True)), one


def test_step_is_the_paper_s_formula():
    grad, x, q, step, low, high = arguments("step_backward", (2, 3000), 1)
    grad_x, grad_step = rules.step_backward(grad, x, q, step, low, high)
    z = x.numpy() / step.numpy()[:, None]  # float32, as the forward divides
    inside = (z > low) & (z < high)
    slope = np.where(z <= low, low, np.where(z >= high, high, np.round(z) - z))
    assert np.array_equal(grad_x.numpy(), grad.numpy() * inside)
    assert grad_step.numpy() == pytest.approx((grad.double().numpy() * slope).sum(1), rel=1e-5)


def test_clip_and_range():
    grad, x, clip = arguments("clip_backward", (2, 3000), 2)
    grad_x, grad_clip = rules.clip_backward(grad, x, clip)
    above = x.numpy() >= clip.numpy()[:, None]
    assert np.array_equal(grad_x.numpy(), grad.numpy() * ((x.numpy() >= 0) & ~above))
    assert grad_clip.numpy() == pytest.approx((grad.double().numpy() * above).sum(1), rel=1e-6)
    one, edge = torch.ones(1, 3), torch.tensor([[-1.0, 0.0, 2.0]])
    bounds = torch.tensor([-1.0]), torch.tensor([2.0])
    assert rules.in_range_backward(one, edge, *bounds).tolist() == [[1, 1, 1]]
    assert rules.in_range_backward(one, edge, *bounds, closed=False).tolist() == [[0, 1, 0]]


def test_a_sum_follows_its_order():
    # 2^60 + 1 - 2^60: the first half of a chunk is added to the second, element 0 to element 512
    grad = torch.zeros(1, 1024)
    grad[0, 0], grad[0, 1], grad[0, 512] = 2.0**60, 1.0, -(2.0**60)
    _, total = rules.clip_backward(grad, torch.ones(1, 1024), torch.ones(1))
    assert total.item() == 1


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.lowbit, name).default, arguments(name, (3, 70)))


def test_wrong_arguments_are_named():
    grad, x, clip = arguments("clip_backward", (2, 5))
    with pytest.raises(ValueError, match=r"x must have the shape of grad, \(2, 5\); got \(5, 2\)"):
        rules.clip_backward(grad, x.t(), clip)
    with pytest.raises(ValueError, match=r"clip must have one value a block, shape \(2,\); got \(3,\)"):
        rules.clip_backward(grad, x, torch.ones(3))
    with pytest.raises(TypeError, match="x must be float32; got torch.float64"):
        rules.clip_backward(grad, x.double(), clip)
    with pytest.raises(ValueError, match=r"bounds must lie in order within 2\^21; got 1"):
        rules.step_backward(grad, x, x, clip, 1.0, -1.0)
