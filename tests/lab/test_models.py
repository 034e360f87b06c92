"""The plain models: shapes, gradients, sizes, and the rules that let a library change them."""

import copy

import pytest
import torch
from torch import nn

from lowbit.lab.models import MODELS, build, model
from lowbit.lab.models.blocks import causal_mask
from lowbit.lab.models.seq2seq import sinusoids

SEQUENCES = {"gpt_tiny": (12,), "seq2seq": (2, 12)}
SMALL = {  # options that keep the tests fast, structure unchanged
    "mobilenetv2": {"width": 0.25},
    "vgg_small": {"width": 8},
    "vit_tiny": {"dim": 24, "depth": 2},
    "gpt_tiny": {"dim": 32, "depth": 2},
    "seq2seq": {"dim": 32, "depth": 2, "dropout": 0.0},
}
ALL = sorted(MODELS)
IMAGES = [name for name in ALL if name not in SEQUENCES]


def example(name, shape, classes, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    if name in SEQUENCES:
        return torch.randint(1, classes, (batch, *shape), generator=g)
    return torch.randn(batch, *shape, generator=g)


def test_names():
    resnets = ["resnet20", "resnet32", "resnet56"]
    assert ALL == ["gpt_tiny", "lenet5", "mlp", "mobilenetv2", *resnets, "seq2seq", "vgg_small", "vit_tiny"]


@pytest.mark.parametrize("name", ALL)
def test_output_shape_and_gradients(name):
    shape = SEQUENCES.get(name, (3, 32, 32))
    net = build(name, shape, 11, seed=0, **SMALL.get(name, {}))
    y = net(example(name, shape, 11))
    assert y.shape == ((2, 11) if name in IMAGES else (2, 12, 11))
    assert y.dtype == torch.float32 and y.isfinite().all()
    target = torch.arange(y[..., 0].numel()) % 11
    nn.functional.cross_entropy(y.flatten(0, -2), target).backward()
    still = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 40, 24)])
def test_image_sizes(name, shape):
    net = build(name, shape, 4, seed=0, **SMALL.get(name, {}))
    assert net(example(name, shape, 4)).shape == (2, 4)


@pytest.mark.parametrize("name", ALL)
def test_rules_for_swapping(name):
    """Activations are modules that are used once, and every weight of a product belongs to a known layer."""
    shape = SEQUENCES.get(name, (1, 8, 8))
    net = build(name, shape, 5, seed=0, **SMALL.get(name, {}))
    calls = {}
    kinds = (nn.ReLU, nn.ReLU6, nn.GELU)
    for path, layer in net.named_modules(remove_duplicate=False):
        if isinstance(layer, kinds):
            assert not getattr(layer, "inplace", False)
            calls[path] = 0
            layer.register_forward_hook(lambda *_, path=path: calls.__setitem__(path, calls[path] + 1))
        if isinstance(layer, nn.MultiheadAttention):
            assert layer.batch_first
    assert len(calls) > 0
    assert len({id(m) for m in net.modules() if isinstance(m, kinds)}) == len(calls)
    net(example(name, shape, 5))
    assert set(calls.values()) == {1}
    products = (nn.Linear, nn.Conv2d, nn.MultiheadAttention, nn.Embedding)
    owned = {id(p) for m in net.modules() if isinstance(m, products) for p in m.parameters()}
    other = [n for n, p in net.named_parameters() if id(p) not in owned and p.ndim > 1]
    assert other == (["token", "position"] if name == "vit_tiny" else [])


@pytest.mark.parametrize("name", ["vit_tiny", "gpt_tiny", "seq2seq"])
def test_attention_is_asked_for_no_weights(name, monkeypatch):
    seen = []
    forward = nn.MultiheadAttention.forward

    def spy(self, *args, **kwargs):
        seen.append(kwargs.get("need_weights"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(nn.MultiheadAttention, "forward", spy)
    shape = SEQUENCES.get(name, (1, 8, 8))
    build(name, shape, 5, seed=0, **SMALL[name])(example(name, shape, 5))
    assert seen == [False] * (6 if name == "seq2seq" else 2)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet56", 853_018),
        ("lenet5", 62_006),  # 61,706 of the 1-channel network and 2 * 6 * 25 for two more input channels
        ("mobilenetv2", 2_236_682),
    ],
)
def test_parameter_counts(name, count):
    net = build(name, (3, 32, 32), 10)
    assert sum(p.numel() for p in net.parameters()) == count


def test_lenet_with_normalisation_pools_before_it():
    net = build("lenet5", (1, 28, 28), 10, norm=True)
    names = [type(m).__name__ for m in net.layers]
    assert names[:4] == ["Conv2d", "MaxPool2d", "BatchNorm2d", "ReLU"] and names[-1] == "BatchNorm1d"
    assert sum(p.numel() for p in net.parameters()) == 61_706 + 2 * (6 + 16 + 120 + 84 + 10)


def test_lenet_has_the_sizes_of_the_paper():
    for side in (28, 32):
        net = build("lenet5", (1, side, side), 10)
        assert sum(p.numel() for p in net.parameters()) == 61_706
    assert [m.in_features for m in build("lenet5", (1, 8, 8), 10).modules() if isinstance(m, nn.Linear)] == [
        64,
        120,
        84,
    ]


def test_resnet_shortcut_is_option_a():
    net = build("resnet20", (3, 32, 32), 10, seed=0)
    block = net.blocks[3]  # the first of the second stage
    x = torch.randn(2, 16, 8, 8)
    y = block.shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2]) and not y[:, 16:].any()


def test_vgg_pools_before_bn_and_relu():
    kinds = [type(m).__name__ for m in build("vgg_small", (3, 32, 32), 10, width=8).features]
    plain, pooled = ["Conv2d", "BatchNorm2d", "ReLU"], ["Conv2d", "MaxPool2d", "BatchNorm2d", "ReLU"]
    assert kinds == (plain + pooled) * 3


def test_gpt_is_causal():
    net = build("gpt_tiny", (12,), 7, seed=1, dim=32, depth=2).eval()
    x = example("gpt_tiny", (12,), 7)
    z = x.clone()
    z[:, 8] = (z[:, 8] + 1) % 7
    with torch.no_grad():
        a, b = net(x), net(z)
        assert torch.allclose(a[:, :8], b[:, :8], atol=1e-6)
        assert (a[:, 8:] - b[:, 8:]).abs().amax(-1).min() > 1e-4
        assert torch.allclose(net(x[:, :5]), a[:, :5], atol=1e-6)
    with pytest.raises(ValueError, match="12 tokens; got 13"):
        net(torch.zeros(1, 13, dtype=torch.long))


def test_seq2seq_masks():
    """The target is causal, the source is seen whole, and padding changes nothing."""
    net = build("seq2seq", (2, 12), 9, seed=1, dim=32, depth=2).eval()
    x = example("seq2seq", (2, 12), 9)
    x[:, 0, 8:] = 0
    later, source = x.clone(), x.clone()
    later[:, 1, 6] = later[:, 1, 6] % 8 + 1
    source[:, 0, 7] = source[:, 0, 7] % 8 + 1
    with torch.no_grad():
        a = net(x)
        assert torch.allclose(net(later)[:, :6], a[:, :6], atol=1e-6)
        assert (net(later)[:, 6:] - a[:, 6:]).abs().max() > 1e-4
        assert (net(source) - a).abs().amax(-1).min() > 1e-5
        short = net.decode(x[:, 1], *net.encode(x[:, 0, :8]))
        assert torch.allclose(short, a, atol=1e-6)
        assert net(torch.zeros(1, 2, 12, dtype=torch.long)).isfinite().all()
    with pytest.raises(ValueError, match="up to 12"):
        net(torch.zeros(1, 3, 12, dtype=torch.long))


def test_sinusoids_and_mask():
    table = sinusoids(5, 6)
    for pos in range(5):
        for i in range(3):
            angle = torch.tensor(pos / 10000 ** (2 * i / 6), dtype=torch.float64)
            assert table[pos, 2 * i].item() == pytest.approx(angle.sin().item(), abs=1e-6)
            assert table[pos, 2 * i + 1].item() == pytest.approx(angle.cos().item(), abs=1e-6)
    assert sinusoids(4, 5).shape == (4, 5)
    assert causal_mask(3).tolist() == [[False, True, True], [False, False, True], [False, False, False]]


def test_initial_weights():
    conv = build("resnet20", (3, 32, 32), 10, seed=0).blocks[-1].conv2.weight  # fan_in 64 * 9
    assert conv.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.02)
    gpt = build("gpt_tiny", (8,), 50, seed=0, dim=128, depth=2)
    assert gpt.blocks[0].feed_forward.up.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert gpt.blocks[0].feed_forward.down.weight.std().item() == pytest.approx(0.01, rel=0.02)  # / sqrt(2 * 2)
    assert gpt.blocks[1].attention.out_proj.weight.std().item() == pytest.approx(0.01, rel=0.03)
    vit = build("vit_tiny", (3, 32, 32), 10, seed=0, dim=48, depth=1)
    assert vit.blocks[0].attention.in_proj_weight.abs().max().item() <= 0.04
    assert build("mobilenetv2", (3, 32, 32), 10, seed=0).fc.weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("name", ALL)
def test_seed_and_copies(name):
    shape = SEQUENCES.get(name, (1, 8, 8))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    nets = [build(name, shape, 5, seed=s, **SMALL.get(name, {})) for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets)
    assert torch.equal(a, b) and not torch.equal(a, c)
    x = example(name, shape, 5)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(nets[0]).eval()(x), nets[1].eval()(x))
    fresh = build(name, shape, 5, **SMALL.get(name, {}))
    fresh.load_state_dict(nets[0].state_dict())


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("resnet2", (3, 32, 32), {}, "did you mean 'resnet"),
        ("resnet20", (3, 32, 32), {"widht": 8}, "did you mean 'width'"),
        ("resnet20", (3, 4, 4), {}, r"at least 8x8 pixels; got \(3, 4, 4\): resize"),
        ("lenet5", (128,), {}, r"got \(128,\): use a digits"),
        ("vit_tiny", (3, 30, 30), {}, "4x4 patches; set patch"),
        ("vit_tiny", (3, 32, 32), {"heads": 5}, "multiple of heads"),
        ("gpt_tiny", (3, 32, 32), {}, "use a text source"),
        ("gpt_tiny", (8,), {"heads": 3}, "multiple of heads"),
        ("seq2seq", (12,), {}, "use a pairs source"),
        ("mlp", (), {}, "positive numbers"),
        ("mlp", (0, 3), {}, "positive numbers"),
    ],
)
def test_errors_name_the_fix(name, shape, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, shape, 10, **options)


def test_one_class_and_double_names_are_refused():
    with pytest.raises(ValueError, match="at least 2 classes; got 1"):
        build("mlp", (4,), 1)
    with pytest.raises(ValueError, match="two models are named 'mlp'"):
        model("mlp")(nn.Linear)


def test_mlp_options():
    net = build("mlp", (2, 3), 4, hidden=(5, 7), batch_norm=True)
    assert [m.out_features for m in net.modules() if isinstance(m, nn.Linear)] == [5, 7, 4]
    assert sum(isinstance(m, nn.BatchNorm1d) for m in net.modules()) == 2
