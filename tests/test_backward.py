"""Gradient rules against their formulas, element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbit import (
    AbsMax,
    InRange,
    Int,
    Learned,
    LearnedClip,
    LearnedStep,
    MinMax,
    PassThrough,
    PerAxis,
    PerTensor,
    QSpec,
    Static,
)
from lowbit.backward import straight_through
from lowbit.quantizer import Quantizer


def run(spec: QSpec, x: torch.Tensor, grad: torch.Tensor, learned: float | None = None, like=None):
    q = Quantizer.make(spec, like=like)
    if learned is not None:
        q.learned.data.fill_(learned)
        q.seen.fill_(1)
    x = x.clone().requires_grad_()
    y = q(x)
    y.backward(grad)
    return y.detach(), x.grad, q


X = torch.tensor([-9.0, -2.5, -2.0, -1.6, -0.4, 0.0, 0.3, 0.5, 0.9, 1.4, 1.5, 1.6, 2.0, 7.0])
G = torch.arange(1.0, 15.0)


def test_pass_through_is_the_identity_beyond_the_range_too():
    y, grad, _ = run(QSpec(Int(2), scale=Static(1.0)), X, G)  # -2 ... 1
    assert y.min() == -2 and y.max() == 1
    assert torch.equal(grad, G)


@pytest.mark.parametrize("margin, closed", [(0.0, True), (0.0, False), (0.5, True), (0.5, False)])
def test_in_range(margin, closed):
    _, grad, _ = run(QSpec(Int(2), scale=Static(1.0), backward=InRange(margin=margin, closed=closed)), X, G)
    x = X.numpy().astype(float)
    low, high = -2 - margin, 1 + margin
    inside = (x >= low) & (x <= high) if closed else (x > low) & (x < high)
    assert np.array_equal(grad.numpy(), G.numpy() * inside)


def test_in_range_with_bounds_of_its_own():
    _, grad, _ = run(QSpec(Int(2), scale=Static(0.5), backward=InRange(-1.0, 1.0)), X, G)
    assert np.array_equal(grad.numpy(), G.numpy() * (np.abs(X.numpy()) <= 1))


def test_in_range_follows_scale_and_zero_point():
    x = torch.tensor([-1.0, 0.0, 3.0])  # 2 bits: step 4/3, zero point 1, so codes 0...3 are -4/3 ... 8/3
    spec = QSpec(Int(2, signed=False), scale=MinMax(3), backward=InRange())
    _, grad, q = run(spec, x, torch.ones(3))
    scale, zero = q.spec.scale.compute(x.reshape(1, -1))
    assert float(scale) == pytest.approx(4 / 3) and float(zero) == 1
    assert grad.tolist() == [1, 1, 0]  # 3 lies beyond 8/3


@pytest.mark.parametrize("fmt", [Int(3), Int(3, narrow=True), Int(3, signed=False)])
def test_learned_step_is_the_paper_s(fmt):
    step = 0.75
    spec = QSpec(fmt, scale=Learned(fmt.max), backward=LearnedStep())
    y, grad, q = run(spec, X, G, step)
    z = X.double().numpy() / step
    n, p = fmt.min, fmt.max
    inside = (z > n) & (z < p)
    slope = np.where(z <= n, n, np.where(z >= p, p, np.round(z) - z))  # Esser et al., eq. 3
    assert np.array_equal(grad.numpy(), G.numpy() * inside)
    assert float(q.learned.grad) == pytest.approx(float((G.double().numpy() * slope).sum()), rel=1e-6)
    assert np.allclose(y.numpy(), step * np.clip(np.round(z), n, p))


def test_learned_step_of_each_block():
    x = torch.randn(3, 40)
    spec = QSpec(Int(3), PerAxis(0), Learned(3), backward=LearnedStep())
    y, _, q = run(spec, x, torch.ones(3, 40), 0.3, like=x)
    z = x.double().numpy() / np.float32(0.3)
    slope = np.where(z <= -4, -4, np.where(z >= 3, 3, np.round(z) - z)).sum(1, keepdims=True)
    assert q.learned.shape == (3, 1)
    np.testing.assert_allclose(q.learned.grad.numpy(), slope, rtol=1e-4, atol=1e-4)


def test_learned_clip_is_pact_s():
    clip = 1.5
    spec = QSpec(Int(2, signed=False), scale=Learned(3, "clip"), backward=LearnedClip())
    y, grad, q = run(spec, X, G, clip)
    x = X.numpy()
    assert np.array_equal(grad.numpy(), G.numpy() * ((x >= 0) & (x < clip)))
    assert float(q.learned.grad) == float(G.numpy()[x >= clip].sum())  # the clip itself counts
    assert np.allclose(y.numpy(), np.round(np.clip(x, 0, clip) * 3 / clip) * clip / 3)


def test_statistics_are_constants():
    # the scale depends on the largest element, its gradient doesn't go there
    x = torch.tensor([0.3, -2.0, 0.7])
    _, grad, _ = run(QSpec(Int(4, narrow=True), scale=AbsMax(7)), x, torch.tensor([1.0, 2.0, 3.0]))
    assert grad.tolist() == [1, 2, 3]


def test_straight_through():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    q = straight_through(x, torch.zeros(2))
    q.backward(torch.tensor([3.0, -1.0]))
    assert q.tolist() == [0, 0] and x.grad.tolist() == [3, -1]


def test_gradients_keep_the_type_of_the_input():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(8, dtype=dtype, requires_grad=True)
        for backward in (PassThrough(), InRange()):
            y = Quantizer.make(QSpec(Int(4), PerTensor(), AbsMax(7), backward=backward))(x)
            (grad,) = torch.autograd.grad(y.sum(), x)
            assert y.dtype == grad.dtype == dtype and grad.isfinite().all()


def test_a_rule_and_a_scale_must_belong_together():
    with pytest.raises(ValueError, match="needs LearnedStep or LearnedClip, not PassThrough"):
        Quantizer.make(QSpec(Int(4), scale=Learned(7)))
    with pytest.raises(ValueError, match="LearnedStep needs a Learned scale"):
        Quantizer.make(QSpec(Int(4), scale=AbsMax(7), backward=LearnedStep()))
