"""The three products of each layer kind against autograd, directly and lowered to matrix products."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.products import ConvProduct, ConvTransposeProduct, LinearProduct, MatmulProduct, ProductOps

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def check(ops: ProductOps, expected, a: Tensor, w: Tensor) -> None:
    """Both paths of `ops` against the function `expected(a, w)` and its gradients, in float64."""
    a, w = a.double().requires_grad_(), w.double().requires_grad_()
    y = expected(a, w)
    e = torch.randn(y.shape, dtype=torch.float64)
    grad_a, grad_w = torch.autograd.grad(y, (a, w), e)
    a, w = a.detach(), w.detach()
    for mm in (None, torch.mm):
        torch.testing.assert_close(ops.out(a, w, mm), y.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ops.grad_a(e, w, mm), grad_a, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ops.grad_w(e, a, mm), grad_w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 3, 4), (2, 0, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear(lead, transposed):
    a, w = torch.randn(*lead, 6), torch.randn(6, 7) if transposed else torch.randn(7, 6)
    check(LinearProduct(a.shape, w.shape, transposed), lambda a, w: a @ w if transposed else F.linear(a, w), a, w)


@pytest.mark.parametrize(
    "left, right",
    [
        ((3, 4), (4, 5)),
        ((2, 3, 4), (2, 4, 5)),
        ((2, 6, 3, 4), (2, 6, 4, 5)),
        ((2, 1, 3, 4), (6, 4, 5)),
        ((3, 4), (2, 4, 5)),
        ((2, 3, 4), (4, 5)),
        ((0, 3, 4), (0, 4, 5)),
        ((2, 3, 0), (2, 0, 5)),
    ],
)
def test_matmul_broadcasts(left, right):
    a, w = torch.randn(left), torch.randn(right)
    check(MatmulProduct(a.shape, w.shape), torch.matmul, a, w)


@st.composite
def convolutions(draw):
    nd = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    many = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * nd))  # noqa: E731
    kernel, stride, dilation, padding = many(1, 3), many(1, 3), many(1, 2), many(0, 2)
    least = tuple(max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True))
    size = tuple(n + draw(st.integers(0, 4)) for n in least)
    n = draw(st.integers(1, 2))
    a = (n, groups * draw(st.integers(1, 2)), *size)
    w = (groups * draw(st.integers(1, 2)), a[1] // groups, *kernel)
    return a, w, stride, padding, dilation, groups, draw(st.integers(0, 1000))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
def test_convolution(case):
    a, w, stride, padding, dilation, groups, seed = case
    torch.manual_seed(seed)
    ops = ConvProduct(torch.Size(a), torch.Size(w), stride, padding, dilation, groups)
    conv = CONV[len(stride)]
    check(ops, lambda a, w: conv(a, w, None, stride, padding, dilation, groups), torch.randn(a), torch.randn(w))


def test_depthwise_strided_and_dilated():
    a, w = torch.randn(2, 6, 11, 9), torch.randn(12, 1, 3, 2)
    args = ((2, 3), (2, 1), (2, 2), 6)
    check(ConvProduct(a.shape, w.shape, *args), lambda a, w: F.conv2d(a, w, None, *args), a, w)


@pytest.mark.parametrize(
    "stride, padding, extra, dilation, groups",
    [c for c in itertools.product((1, 2, 3), (0, 1, 2), (0, 1), (1, 2), (1, 2)) if c[2] < max(c[0], c[3])],
)
def test_transposed_convolution(stride, padding, extra, dilation, groups):
    a, w = torch.randn(2, 4, 5, 4), torch.randn(4, 3, 3, 2)

    def expected(a, w):
        return F.conv_transpose2d(a, w, None, stride, padding, extra, groups, dilation)

    ops = ConvTransposeProduct(
        a.shape, w.shape, expected(a, w).shape, (stride,) * 2, (padding,) * 2, (dilation,) * 2, groups
    )
    check(ops, expected, a, w)


def test_lowered_sums_run_over_the_natural_axis():
    # accumulators see K = in features for `out`, out features for `grad_a`, samples (and positions) for `grad_w`
    seen: list[int] = []

    def mm(left, right):
        seen.append(left.shape[1])
        return left @ right

    a, w, e = torch.randn(5, 3), torch.randn(7, 3), torch.randn(5, 7)
    ops: ProductOps = LinearProduct(a.shape, w.shape)
    ops.out(a, w, mm), ops.grad_a(e, w, mm), ops.grad_w(e, a, mm)
    assert seen == [3, 7, 5]
    seen.clear()
    a, w, e = torch.randn(2, 3, 6, 6), torch.randn(7, 3, 2, 2), torch.randn(2, 7, 5, 5)
    ops = ConvProduct(a.shape, w.shape, (1, 1), (0, 0), (1, 1))
    ops.out(a, w, mm), ops.grad_a(e, w, mm), ops.grad_w(e, a, mm)
    assert seen == [3 * 4, 7 * 4, 2 * 25]


def test_layouts_that_are_not_contiguous():
    a = torch.randn(2, 6, 5, 3).permute(0, 3, 2, 1)
    w = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    ops = ConvProduct(a.shape, w.shape, (1, 1), (1, 1), (1, 1))
    check(ops, lambda a, w: F.conv2d(a, w, None, 1, 1), a, w)
    check(LinearProduct(torch.Size((5, 6)), torch.Size((7, 6))), F.linear, torch.randn(6, 5).t(), torch.randn(6, 7).t())
