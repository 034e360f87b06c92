from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lowbit.ops.backends import compiled_isas, using_isa
from lowbit.ops.uniform import philox, uniform_reference
from lowbit.ops.uniform import uniform as uniform_op
from lowbit.rng import REMEMBERED, Stream, stream_id, uniform

M = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, kat_vectors, philox4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((M, M, M, M), (M, M), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(w) for w in words) == expected


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & M, (p0 >> 32) ^ c[3] ^ k[1], p0 & M]
        k = [(k[0] + 0x9E3779B9) & M, (k[1] + 0xBB67AE85) & M]
    return c


@pytest.mark.parametrize(("seed", "stream", "step"), [(0, 0, 0), (2**40 + 3, 77, 5), (-1, 2**31 - 1, 2**32 - 1)])
def test_the_mapping_of_elements(seed, stream, step):
    got = uniform((11,), seed, stream, step)
    for i in range(11):
        words = philox_in_python([i // 4, 0, step & M, stream & M], [seed & M, (seed >> 32) & M])
        assert got[i].item() == (words[i % 4] >> 8) / 2**24


def test_first_numbers_are_pinned():
    assert uniform((2,)).tolist() == [(0x6627E8D5 >> 8) / 2**24, (0xE169C58D >> 8) / 2**24]


def test_numbers_depend_on_the_element_not_on_the_shape():
    flat = uniform((24,), 1, 2, 3)
    assert torch.equal(uniform((2, 3, 4), 1, 2, 3).reshape(-1), flat)
    assert torch.equal(uniform((7,), 1, 2, 3), flat[:7])
    assert torch.equal(uniform((), 1, 2, 3), flat[0])
    assert uniform((0, 3)).shape == (0, 3)


def test_uniform_moments_and_range():
    u = uniform((100_000,), 7).double()
    assert 0 <= u.min() and u.max() <= 1 - 2.0**-24
    assert torch.equal(u * 2**24, (u * 2**24).round())
    six = 6 / (100_000**0.5)
    assert abs(u.mean() - 1 / 2) < six * (1 / 12) ** 0.5
    assert abs((u**2).mean() - 1 / 3) < six * (4 / 45) ** 0.5


def test_seed_stream_and_step_each_change_all():
    base = uniform((64,), 1, 1, 1)
    for other in ((2, 1, 1), (1, 2, 1), (1, 1, 2), (1 + 2**32, 1, 1)):
        assert (uniform((64,), *other) != base).all()


@pytest.mark.parametrize("shape", [[], [5], [2, 0], [3, 4]])
def test_operator(shape):
    key = torch.tensor([1, 2, 3])
    assert torch.equal(uniform_op(key, shape), uniform_reference(key, shape))
    assert torch.equal(torch.ops.lowbit.uniform(key, shape), uniform_reference(key, shape))
    torch.library.opcheck(torch.ops.lowbit.uniform.default, (key, shape))


@pytest.mark.parametrize("isa", compiled_isas())
@pytest.mark.parametrize("first", [0, 2**32 - 100, 2**32 - 33, 2**32 - 32, 2**32, 3 * 2**32 - 5])
def test_blocks_whose_number_needs_a_second_word(isa, first):
    key = torch.tensor([123, 9, 7])
    with using_isa(isa):
        got = torch.ops.lowbit._uniform_blocks(key, first, 300)
    i = torch.arange(first, first + 300)
    counter = (i & 0xFFFFFFFF, i >> 32, torch.tensor(7), torch.tensor(9))
    words = torch.stack(philox(counter, (torch.tensor(123), torch.tensor(0))), -1).flatten()
    assert torch.equal(got, (words >> 8).float() * 2.0**-24)


def test_operator_refuses_other_keys():
    with pytest.raises(ValueError, match=r"int64 \(seed, stream, step\); got torch.int64 of shape \(2,\)"):
        uniform_op(torch.tensor([1, 2]), [3])
    with pytest.raises(ValueError, match="float32"):
        uniform_op(torch.zeros(3), [3])


def test_stream_ids():
    assert stream_id("layer1.weight") == 2036193689  # first four bytes of its SHA-256: must never change
    assert len({stream_id(f"layer{i}") for i in range(1000)}) == 1000
    assert all(0 <= stream_id(str(i)) < 2**31 for i in range(100))


def test_keys_advance_and_are_copies():
    stream = Stream(5, 9)
    keys = [stream.next() for _ in range(3)]
    assert [k.tolist() for k in keys] == [[5, 9, 0], [5, 9, 1], [5, 9, 2]]
    assert stream.key.tolist() == [5, 9, 3]
    assert Stream(5, "fc").key.tolist() == [5, stream_id("fc"), 0]


def test_a_caller_who_brings_the_buffers_finds_them_moved_on():
    class Drawing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stream = Stream(1, "a")

        def forward(self):
            return self.stream.next()

    model = Drawing()
    own = {"stream.key": model.stream.key.clone()}
    steps = [int(torch.func.functional_call(model, own, ())[2]) for _ in range(3)]
    assert steps == [0, 1, 2] and own["stream.key"][2] == 3 and model.stream.key[2] == 0


def test_ranks_differ_in_the_seed_only():
    keys = [Stream(5, 9).next(rank) for rank in range(4)]
    assert keys[0].tolist() == [5, 9, 0]
    assert len({k[0].item() for k in keys}) == 4
    assert all(k[1:].tolist() == [9, 0] for k in keys)
    assert (keys[3][0].item() - 5) % 2**64 == 3 * 0x9E3779B97F4A7C15 % 2**64
    stream = Stream(2**63 - 1)
    stream.next(1)
    assert stream.key.tolist() == [2**63 - 1, 0, 1]


def test_state_dict_resumes_bit_for_bit():
    one = Stream(3, 4)
    for _ in range(5):
        one.next()
    two = Stream(0, 0)
    two.load_state_dict(one.state_dict())
    assert two.next().tolist() == [3, 4, 5] == one.next().tolist()


def test_a_checkpoint_without_the_key_loads():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Stream(3, 4))
    weights = torch.nn.Sequential(torch.nn.Linear(2, 2)).state_dict()
    result = model.load_state_dict(weights, strict=True)
    assert result.missing_keys == []
    assert model[1].key.tolist() == [3, 4, 0]
    with pytest.raises(RuntimeError, match="0.bias"):
        del weights["0.bias"]
        model.load_state_dict(weights)


def test_copies_and_casts():
    stream = Stream(3, 4)
    with torch.no_grad():
        stream.next()
    assert len(stream._calls) == 1
    for twin in (copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))):
        assert len(twin._calls) == 0
        assert twin.next().tolist() == [3, 4, 1]
    assert stream.key.tolist() == [3, 4, 1]
    assert stream.to(torch.bfloat16).half().double().key.dtype == torch.int64
    assert list(stream.state_dict()) == ["key"]


def test_remembered_calls_are_bounded():
    stream = Stream()
    with torch.no_grad():
        for _ in range(REMEMBERED + 3):
            stream.next()
    assert len(stream._calls) == REMEMBERED


def test_plain_training_does_not_touch_the_default_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    x, stream = torch.ones(4, requires_grad=True), Stream(1, 2)
    (x * uniform_op(stream.next(), [4])).sum().backward()
    assert stream._calls == {}
    assert torch.equal(torch.get_rng_state(), before)


class Noisy(torch.nn.Module):
    """y = x * noise, and the log of the keys that it drew."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.stream = Stream(1, 2)
        self.calls = calls
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.log: list[list[int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.calls):
            key = self.stream.next()
            self.log.append(key.tolist())
            x = torch.nn.functional.dropout(x, 0.3) * (uniform_op(key, list(x.shape)) + 1) * self.weight
        return x


def same(grad: torch.Tensor, y: torch.Tensor) -> None:
    """y is linear in x = 1, so its gradient is y itself if both runs drew the same masks and noise."""
    torch.testing.assert_close(grad, y.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_recomputation_gets_the_keys_of_the_first_run(reentrant, calls):
    module = Noisy(calls)
    torch.manual_seed(1)
    x = torch.ones(5, requires_grad=True)
    y = checkpoint(module, x, use_reentrant=reentrant)
    y.sum().backward()
    first, second = module.log[:calls], module.log[calls:]
    assert first == [[1, 2, i] for i in range(calls)]
    assert second == first[: len(second)] and len(second) >= 1
    assert module.stream.key.tolist() == [1, 2, calls]
    same(x.grad, y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_before_one_backward(reentrant):
    module = Noisy(2)
    torch.manual_seed(1)
    a, b = torch.ones(5, requires_grad=True), torch.ones(5, requires_grad=True)
    ya = checkpoint(module, a, use_reentrant=reentrant)
    yb = checkpoint(module, b, use_reentrant=reentrant)
    (ya.sum() + yb.sum()).backward()
    assert module.log[:4] == [[1, 2, i] for i in range(4)]
    assert module.stream.key.tolist() == [1, 2, 4]
    same(a.grad, ya)
    same(b.grad, yb)
    assert not torch.equal(ya, yb)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_layers_in_one_checkpoint_and_a_second_step(reentrant):
    model = torch.nn.Sequential(Noisy(), Noisy(2))
    for step in range(2):
        x = torch.ones(5, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=reentrant)
        y.sum().backward()
        same(x.grad, y)
        assert model[0].stream.key.tolist() == [1, 2, step + 1]
        assert model[1].stream.key.tolist() == [1, 2, 2 * step + 2]


class DrawsInBoth(torch.autograd.Function):
    """Draws in the forward, where gradients are off, and from another stream in the backward."""

    @staticmethod
    def forward(ctx, x, forward, backward, log):
        ctx.backward_stream, ctx.log = backward, log
        noise = uniform_op(forward.next(), list(x.shape)) + 1
        ctx.save_for_backward(noise)
        return x * noise

    @staticmethod
    def backward(ctx, grad):
        (noise,) = ctx.saved_tensors
        ctx.log.append(ctx.backward_stream.next().tolist())
        return grad * noise, None, None, None


@pytest.mark.parametrize("reentrant", [False, True])
def test_draws_inside_autograd_functions(reentrant):
    forward, backward, log = Stream(1, 2), Stream(1, 3), []
    torch.manual_seed(3)
    for step in range(3):
        x = torch.ones(5, requires_grad=True)

        def run(x):
            return DrawsInBoth.apply(DrawsInBoth.apply(x, forward, backward, log), forward, backward, log)

        y = checkpoint(run, x, use_reentrant=reentrant)
        y.sum().backward()
        same(x.grad, y)
        assert forward.key.tolist() == [1, 2, 2 * step + 2]
    assert log == [[1, 3, i] for i in range(6)]  # the backward's own draws never repeat


def test_one_stream_in_forward_and_backward_advances_in_both():
    stream, log = Stream(1, 2), []
    torch.manual_seed(3)
    x = torch.ones(5, requires_grad=True)
    y = DrawsInBoth.apply(x, stream, stream, log)
    before = torch.get_rng_state()
    y.sum().backward()
    assert log == [[1, 2, 1]] and stream.key.tolist() == [1, 2, 2]
    assert torch.equal(torch.get_rng_state(), before)  # the search for a repeated call leaves no trace


def test_compiled_without_graph_breaks():
    stream = Stream(1, 2)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def draw(x):
        return x + uniform_op(stream.next(1), list(x.shape)), uniform_op(stream.next(), list(x.shape))

    twin = Stream(1, 2)
    for _ in range(2):
        a, b = draw(torch.zeros(6))
        assert torch.equal(a, uniform_reference(twin.next(1), [6]))
        assert torch.equal(b, uniform_reference(twin.next(), [6]))
    assert stream.key.tolist() == [1, 2, 4]
