"""Blocks: every view goes back exactly, padding never leaves, and each product's groups lie along what it sums over."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import blocks as B
from lowbit.blocks import Layout, PerAxis, PerChannel, PerGroup, PerRow, PerTensor, PerTile
from lowbit.layers import CONV, CONV1D, CONV_TRANSPOSE, LINEAR, MATMUL

LAYOUTS = [B.LINEAR_INPUT, B.LINEAR_WEIGHT, B.LINEAR_WEIGHT_T, B.CONV_INPUT, B.CONV_WEIGHT]
LAYOUTS += [B.CONV_TRANSPOSE_WEIGHT, B.MATMUL_LEFT, B.MATMUL_RIGHT]
LAYOUTS += [table.of(role, "grad_w") for table in (LINEAR, CONV, MATMUL) for role in ("A", "E")]
LAYOUTS += [table.of("W", "grad_a") for table in (LINEAR, CONV, CONV1D, CONV_TRANSPOSE, MATMUL)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.sampled_from(LAYOUTS),
    st.one_of(
        st.just(PerTensor()),
        st.just(PerRow()),
        st.just(PerChannel()),
        st.builds(PerAxis, st.integers(-2, 1)),
        st.builds(PerGroup, st.integers(1, 7), st.sampled_from([None, -1, 0, 1])),
        st.builds(PerTile, st.integers(1, 4), st.integers(1, 4)),
    ),
    st.booleans(),
)
def test_unview_undoes_view(shape, layout, blocks, turned):
    x = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    if turned:
        x = x.transpose(0, -1)
    b = blocks.view(x, layout)
    assert b.dim() == 2
    back = blocks.unview(b, x.shape, layout)
    assert back.shape == x.shape and torch.equal(back, x)
    # each element once, the rest zeros
    assert torch.equal(b.flatten().sort().values[-x.numel() :], x.flatten().sort().values)
    assert int((b == 0).sum()) == b.numel() - x.numel()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(2, 7), st.integers(1, 4), st.integers(1, 4))
def test_padding_never_leaks(shape, size, rows, cols):
    x = torch.randn(shape)
    for blocks in (PerGroup(size, -1), PerGroup(size, 0), PerTile(rows, cols)):
        b = blocks.view(x, Layout())
        pad = blocks.view(torch.ones(shape), Layout()) == 0
        assert (b[pad] == 0).all()
        assert torch.equal(blocks.unview(b.masked_fill(pad, torch.nan), x.shape, Layout()), x)


def test_rows_and_channels_of_each_operand():
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert PerRow().view(x, LINEAR.A).tolist() == x.reshape(6, 4).tolist()  # a token
    assert PerChannel().view(x, LINEAR.A).tolist() == x.reshape(6, 4).t().tolist()
    assert PerRow().view(x, CONV.A).tolist() == x.reshape(2, 12).tolist()  # a sample
    assert PerChannel().view(x, CONV.A).tolist() == x.transpose(0, 1).reshape(3, 8).tolist()
    w = torch.arange(6.0).reshape(2, 3)  # out, in
    assert PerRow().view(w, LINEAR.W).tolist() == w.tolist()
    assert PerChannel().view(w, LINEAR.W).tolist() == w.t().tolist()
    assert PerRow().view(w.t(), CONV1D.W).tolist() == w.tolist()  # the same output channels, stored as (in, out)
    q = torch.arange(12.0).reshape(2, 3, 2)  # heads, length, d
    assert PerRow().view(q, MATMUL.A).tolist() == q.reshape(6, 2).tolist()
    assert PerRow().view(q, MATMUL.W).tolist() == q.transpose(1, 2).reshape(4, 3).tolist()  # columns of k^T: a key


@pytest.mark.parametrize(
    "table, role, which, shape, expected",
    [
        (LINEAR, "A", "out", (2, 2, 4), lambda x: x.reshape(8, 2)),
        (LINEAR, "W", "out", (3, 4), lambda x: x.reshape(6, 2)),
        (LINEAR, "E", "grad_a", (2, 2, 4), lambda x: x.reshape(8, 2)),
        (LINEAR, "W", "grad_a", (4, 3), lambda x: x.t().reshape(6, 2)),
        (LINEAR, "E", "grad_w", (2, 2, 3), lambda x: x.reshape(4, 3).t().reshape(6, 2)),  # tokens, sequences joined
        (LINEAR, "A", "grad_w", (4, 3), lambda x: x.t().reshape(6, 2)),
        (CONV1D, "W", "out", (4, 3), lambda x: x.t().reshape(6, 2)),
        (CONV1D, "W", "grad_a", (3, 4), lambda x: x.reshape(6, 2)),
        (CONV, "A", "out", (2, 4, 3), lambda x: x.movedim(1, -1).reshape(12, 2)),
        (CONV, "W", "grad_a", (4, 2, 3), lambda x: x.movedim(0, -1).reshape(12, 2)),
        (CONV, "E", "grad_w", (2, 3, 4), lambda x: x.movedim(1, 0).reshape(12, 2)),
        (MATMUL, "A", "out", (2, 3, 4), lambda x: x.reshape(12, 2)),
        (MATMUL, "W", "out", (2, 4, 3), lambda x: x.mT.reshape(12, 2)),
        (MATMUL, "W", "grad_a", (2, 4, 4), lambda x: x.reshape(16, 2)),
        (MATMUL, "E", "grad_w", (2, 4, 3), lambda x: x.mT.reshape(12, 2)),
    ],
)
def test_groups_lie_along_what_the_product_sums_over(table, role, which, shape, expected):
    x = torch.randn(shape)
    assert torch.equal(PerGroup(2).view(x, table.of(role, which)), expected(x))


def test_groups_of_tokens_where_there_is_one_token():
    x = torch.tensor([1.0, 2.0, 3.0])
    b = PerGroup(2).view(x, LINEAR.of("A", "grad_w"))
    assert b.tolist() == [[1, 0], [2, 0], [3, 0]]
    assert torch.equal(PerGroup(2).unview(b, x.shape, LINEAR.of("A", "grad_w")), x)


def test_tiles():
    x = torch.arange(12.0).reshape(3, 4)
    assert PerTile(2, 2).view(x, Layout()).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 0, 0], [10, 11, 0, 0]]


def test_views_carry_gradients():
    x = torch.randn(3, 5, requires_grad=True)
    for blocks in (PerGroup(2), PerTile(2, 3), PerChannel(), PerTensor()):
        y = blocks.unview(blocks.view(x, LINEAR.A) * 2, x.shape, LINEAR.A)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, torch.full_like(x, 2.0))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="axis 3 does not exist in a tensor of 2"):
        PerAxis(3).view(torch.ones(2, 2), Layout())
    with pytest.raises(ValueError, match="axis 2 does not exist"):
        PerGroup(2, 2).view(torch.ones(2, 2), Layout())
    with pytest.raises(ValueError, match="at least 1; got 0"):
        PerGroup(0)
    with pytest.raises(ValueError, match="got 0 x 4"):
        PerTile(0, 4)
