"""Whole models and other people's loops: Hugging Face models with quantized attention, Accelerate, Trainer."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit import AbsMax, Int, QSpec, Recipe, Roles, Rule
from lowbit.control import control_of, layers_of
from lowbit.quantizer import IDENTITY

transformers = pytest.importorskip("transformers")

ALL = ("linear", "conv", "embedding", "attention")
INT8 = QSpec(Int(8, narrow=True), scale=AbsMax(127))
SR = QSpec(Int(8, narrow=True), scale=AbsMax(127), rounding="stochastic")
NOTHING = Recipe("nothing", Roles(W=IDENTITY, A=IDENTITY, E=IDENTITY), layers=ALL)
ATTENTION = Recipe("attention", Roles(A=INT8, E=SR), layers=("attention",))
INT8_TRAINING = Recipe("int8", Roles(W=INT8, A=INT8, E=SR), layers=("linear", "conv", "attention"))


def bert():
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
        attn_implementation="eager",
    )
    return transformers.BertForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation="eager",
    )
    return transformers.GPT2LMHeadModel(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return transformers.ViTForImageClassification(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)


def batch(name: str, n: int = 4) -> dict:
    g = torch.Generator().manual_seed(3)
    if name == "vit":
        return {"pixel_values": torch.randn(n, 1, 8, 8, generator=g), "labels": torch.randint(0, 3, (n,), generator=g)}
    ids = torch.randint(2, 40, (n, 7), generator=g)
    mask = torch.ones(n, 7, dtype=torch.long)
    mask[0, 5:] = mask[1, 3:] = 0
    labels = torch.randint(0, 3, (n,), generator=g) if name == "bert" else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


MODELS = {"bert": bert, "gpt2": gpt2, "vit": vit, "llama": llama}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]()


@pytest.mark.parametrize("training", [True, False])
def test_identity_quantizers_leave_a_model_as_it_is(name, training):
    plain = make(name).train(training)
    model = lowbit.apply(copy.deepcopy(plain), NOTHING)
    assert model.config._attn_implementation == "lowbit" and plain.config._attn_implementation == "eager"
    results = []
    for m in (plain, model):
        out = m(**batch(name))
        out.loss.backward()
        results.append([out.loss, out.logits, *(p.grad for p in m.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_model_in_float64_is_equal_to_its_last_digits(name):
    plain = make(name).double().eval()
    model = lowbit.apply(copy.deepcopy(plain), NOTHING)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch(name).items()}
    torch.testing.assert_close(plain(**inputs).logits, model(**inputs).logits, rtol=1e-6, atol=1e-8)


def test_the_products_of_every_attention_layer_are_quantized_and_reported(name):
    plain = make(name).eval()
    model = lowbit.apply(copy.deepcopy(plain), ATTENTION)
    layers = [n for n in layers_of(model)]
    assert len(layers) == 4 and all(n.endswith((".scores", ".context")) for n in layers)
    rows = [r for r in lowbit.report(model, batch(name)).rows if r.kind == "attention" and r.role in "WAE"]
    assert len(rows) == 12 and all(r.bits == 8 and r.sqnr > 20 for r in rows)
    a, b = plain(**batch(name)).logits, model(**batch(name)).logits
    assert 1e-6 < float((a - b).abs().max() / a.abs().max()) < 0.05


def test_training_in_eight_bits_learns(name):
    model = lowbit.apply(make(name), INT8_TRAINING)
    optimizer = lowbit.attach(model, torch.optim.Adam(model.parameters(), 0.01))
    losses = []
    for _ in range(12):
        loss = model(**batch(name)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    assert torch.equal(model(**batch(name)).logits, model(**batch(name)).logits)


def test_every_layer_with_a_weight_is_quantized_or_explained(name):
    model = lowbit.apply(make(name), INT8_TRAINING)
    known = {r.layer for r in lowbit.report(model).rows}
    for path, module in model.named_modules():
        if any(p.dim() >= 2 for p in module.parameters(recurse=False)):
            assert path in known, f"{path} is silently skipped"
    assert len(model.state_dict()) > 10


def test_float_checkpoints_load_before_and_after(name):
    state = make(name, 1).state_dict()
    before = make(name)
    before.load_state_dict(state)
    lowbit.apply(before, INT8_TRAINING)
    after = lowbit.apply(make(name), INT8_TRAINING)
    after.load_state_dict(state, strict=True)
    assert torch.equal(before.eval()(**batch(name)).logits, after.eval()(**batch(name)).logits)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_masked_tokens_have_no_influence(name):
    model = lowbit.apply(
        make(name),
        Recipe("w", Roles(W=INT8, A=QSpec(Int(12), lowbit.PerRow(), AbsMax(2047))), layers=("linear", "attention")),
    ).eval()
    inputs = batch(name)
    other = dict(inputs, input_ids=inputs["input_ids"].clone())
    other["input_ids"][1, 3:] = 5
    a, b = model(**inputs).logits, model(**other).logits
    a, b = (t[1] if name == "bert" else t[1, :3] for t in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-4)  # nothing but the scale of a column of values can differ
    for key in ("attention_mask",):
        assert not torch.allclose(a, model(**dict(inputs, **{key: torch.ones_like(inputs[key])})).logits[1][: len(a)])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_language_models_stay_causal_and_generate(name):
    model = lowbit.apply(make(name), NOTHING).eval()
    ids = batch(name)["input_ids"]
    a = model(ids).logits
    later = ids.clone()
    later[:, 4:] = 7
    torch.testing.assert_close(a[:, :4], model(later).logits[:, :4])
    plain = make(name).eval()
    kwargs = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(plain.generate(ids, **kwargs), model.generate(ids, **kwargs))


def test_gpt2_s_own_linear_layer():
    model = lowbit.apply(make("gpt2"), Recipe("w", Roles(W=QSpec(Int(4, narrow=True), lowbit.PerRow(), AbsMax(7)))))
    layer = model.transformer.h[0].attn.c_attn
    assert layer.weight.shape == (16, 48) and type(layer).__name__ == "QConv1D"
    x = torch.randn(3, 16)
    step = layer.weight.detach().abs().amax(0) / 7  # an output channel is a column
    torch.testing.assert_close(layer(x), x @ ((layer.weight / step).round() * step) + layer.bias)
    assert model.lm_head.weight is model.transformer.wte.weight
    layer = lowbit.apply(transformers.pytorch_utils.Conv1D(5, 4).double(), NOTHING)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,)) and torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)), (layer.weight,)
    )


def test_rules_leave_single_products_in_float():
    model = make("bert")
    rules = (Rule("*.layer.0.*", roles=Roles()), Rule("*.context", roles=Roles()))
    lowbit.apply(model, Recipe("r", Roles(A=INT8, E=INT8), rules=rules, layers=("attention",)))
    assert list(layers_of(model)) == ["bert.encoder.layer.1.attention.self.scores"]
    plain = make("bert")
    torch.testing.assert_close(
        model.eval()(**batch("bert")).logits, plain.eval()(**batch("bert")).logits, rtol=0.1, atol=0.02
    )


def test_without_attention_in_layers_nothing_of_it_changes(name):
    model = lowbit.apply(make(name), Recipe("l", Roles(W=INT8)))
    assert model.config._attn_implementation == "eager"
    reasons = {left.name: left.reason for left in control_of(model).left}
    assert sum(n.endswith((".scores", ".context")) for n in reasons) == 4


def test_a_failed_apply_gives_the_attention_back(name):
    model = make(name).eval()
    expected = model(**batch(name)).logits
    keys = list(model.state_dict())
    bad = Recipe("bad", Roles(A=INT8), layers=ALL, steps=(object(),))
    with pytest.raises(AttributeError):
        lowbit.apply(model, bad)
    assert model.config._attn_implementation == "eager" and list(model.state_dict()) == keys
    assert not any(hasattr(m, "products") for m in model.modules())
    assert torch.equal(model(**batch(name)).logits, expected)


def test_attention_that_needs_more_is_refused():
    from lowbit.huggingface import attention_forward

    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="'softcap'.*leave 'attention' out"):
        attention_forward(nn.Identity(), q, q, q, None, softcap=30.0)


def test_dropout_and_returned_weights():
    from lowbit.huggingface import attention_forward

    module = nn.Identity()
    q, k, v = torch.randn(2, 4, 5, 4), torch.randn(2, 2, 5, 4), torch.ones(2, 2, 5, 4)
    y, w = attention_forward(module, q, k, v, None, dropout=0.5)
    assert y.shape == (2, 5, 4, 4) and w.shape == (2, 4, 5, 5) and float((w == 0).float().mean()) > 0.3
    y, w = attention_forward(module.eval(), q, k, v, None, dropout=0.5)
    torch.testing.assert_close(y, torch.ones_like(y))
    module.is_causal = True
    y, w = attention_forward(module, q, k, v, None, scaling=0.1)
    assert torch.equal(w, w.tril())
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1, enable_gqa=True)
    torch.testing.assert_close(y, expected.transpose(1, 2))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(name, reentrant):
    model = lowbit.apply(make(name), Recipe("n", Roles(W=SR, A=SR, E=SR), layers=("linear", "attention")))
    saved = copy.deepcopy(model)
    saved.gradient_checkpointing_enable({"use_reentrant": reentrant})
    grads = []
    for m in (model, saved):
        m.train()
        m(**batch(name)).loss.backward()
        grads.append([p.grad for p in m.parameters()])
    for a, b in zip(*grads, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its settings for the life of the process; another test may have left others."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_accelerate(name, fresh_accelerate):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = lowbit.apply(make(name), INT8_TRAINING)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    data = batch(name, 8)
    samples = [{k: v[i] for k, v in data.items()} for i in range(8)]
    loader = torch.utils.data.DataLoader(samples, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    lowbit.attach(model, optimizer)
    losses = []
    for _ in range(6):
        for part in loader:
            with accelerator.accumulate(model):
                loss = model(**part).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < sum(losses[:4]) and all(torch.isfinite(p).all() for p in model.parameters())
    assert int(control_of(model).step) == 12


def test_trainer(name, tmp_path, fresh_accelerate):
    data = batch(name, 8)
    samples = [{k: v[i] for k, v in data.items()} for i in range(8)]
    model = lowbit.apply(make(name), INT8_TRAINING)
    before = [p.detach().clone() for p in model.parameters()]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        save_steps=3,
        learning_rate=0.01,
        disable_tqdm=True,
        logging_steps=1,
        gradient_accumulation_steps=1,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=samples)
    result = trainer.train()
    assert result.global_step == 3 and result.training_loss > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    if name == "vit":  # transformers writes its older names for this model, and its Trainer doesn't read them back
        return
    again = lowbit.apply(make(name, 5), INT8_TRAINING)
    trainer = transformers.Trainer(again, arguments, train_dataset=samples)
    trainer._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-3"))
    for (key, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_save_and_load(name, tmp_path):
    model = lowbit.apply(make(name), INT8_TRAINING).eval()
    lowbit.save(model, tmp_path / "m")
    loaded = lowbit.load(tmp_path / "m", make(name, 3))
    torch.testing.assert_close(model(**batch(name)).logits, loaded(**batch(name)).logits, rtol=0, atol=1e-6)


def test_transformers_is_imported_only_for_its_models():
    code = (
        "import sys, lowbit; from torch import nn; s = lowbit.QSpec(lowbit.Int(8), scale=lowbit.AbsMax(127));"
        "lowbit.apply(nn.TransformerEncoderLayer(8, 2, 8), lowbit.Recipe('r', lowbit.Roles(A=s), "
        "layers=('linear', 'attention'))); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
