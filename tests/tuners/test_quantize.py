"""quantize_base: models whose frozen base is kept in fewer bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_ext import (
    LoKrConfig,
    LoraConfig,
    PrefixTuningConfig,
    QuantizedLinear,
    TaskType,
    get_peft_model,
    quantize_base,
)

DTYPES = ["int8", "int4", "bfloat16"]


def model_of(width=64):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def random_adapter(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_before_and_after_adapters_are_the_same(dtype):
    config = LoraConfig(target_modules=["0", "2"], r=4)
    plain = model_of()
    after = random_adapter(get_peft_model(copy.deepcopy(plain), config))
    report = quantize_base(after, dtype)
    quantize_base(plain, dtype)
    before = get_peft_model(plain, config)
    before.load_state_dict(after.state_dict())
    x = torch.randn(5, 64)
    assert after(x).equal(before(x))
    assert [weight.name for weight in report.weights] == [f"base_model.model.{i}" for i in (0, 2, 4)]
    assert report.bytes_after < report.bytes_before * {"int8": 0.27, "int4": 0.17, "bfloat16": 0.51}[dtype]
    assert 0 < report.relative_error < 0.1
    assert dtype in repr(report)


@pytest.mark.parametrize("dtype", DTYPES)
def test_trains_and_saves(dtype, tmp_path):
    model = model_of()
    quantize_base(model, dtype)
    adapted = get_peft_model(model, LoraConfig(target_modules=["0", "2"], r=4, lora_dropout=0.1))
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    x, target = torch.randn(32, 64), torch.randint(4, (32,))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(adapted(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    adapted.save_pretrained(tmp_path)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.dtype == torch.float32 for p in trained.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_batches(dtype):
    model = random_adapter(get_peft_model(model_of(), LoraConfig(target_modules=["0", "2"], r=4)))
    model.add_adapter("other", LoraConfig(target_modules=["0", "2"], r=8))
    random_adapter(model)
    quantize_base(model, dtype)
    model.eval()
    x = torch.randn(3, 64)
    mixed = model(x, adapter_names=["default", "__base__", "other"])
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-5
    for row, name in ((0, "default"), (2, "other")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(x)[row], rtol=tolerance, atol=tolerance)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(x)[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_transformers(tiny, kind, dtype):
    model = tiny(kind)
    report = quantize_base(model, dtype)
    heads = {"bert": "classifier", "gpt2": "lm_head", "llama": "lm_head"}
    assert report.left.get(heads[kind]) == "an output head"
    kept = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(kept) == len(report.weights) > 0
    adapted = get_peft_model(model, LoraConfig())
    ids = torch.randint(50, (2, 7))
    adapted(input_ids=ids, labels=torch.tensor([0, 1]) if kind == "bert" else ids).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_" in name)


def test_methods_beside_lora(tiny):
    model = tiny("gpt2")
    quantize_base(model)
    adapted = get_peft_model(model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    ids = torch.randint(50, (2, 7))
    adapted(input_ids=ids, labels=ids).loss.backward()
    other = model_of()
    quantize_base(other)
    with pytest.raises(ValueError, match="is a QuantizedLinear, which LoKr does not support"):
        get_peft_model(other, LoKrConfig(target_modules=["0"]))


def test_what_is_left():
    tied = nn.Linear(32, 32)
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(32, 32),
            "narrow": nn.Linear(24, 32),
            "tied": tied,
            "twin": nn.Linear(32, 32),
            "classifier": nn.Linear(32, 2),
            "skipped": nn.Linear(32, 32),
            "attention": nn.MultiheadAttention(32, 2),
        }
    )
    model["twin"].weight = tied.weight
    report = quantize_base(model, "int4", skip_modules=["skipped"])
    assert [weight.name for weight in report.weights] == ["plain"]
    assert report.left == {
        "narrow": "its 24 columns are no multiple of 32",
        "tied": "its weight is another module's too",
        "twin": "its weight is another module's too",
        "classifier": "an output head",
        "skipped": "in skip_modules",
        "attention.out_proj": "its weight is read without calling it",
    }
    assert "left: narrow, its 24 columns" in repr(report)


def test_what_adapters_keep():
    model = get_peft_model(model_of(), LoraConfig(target_modules=["0"], use_dora=True, modules_to_save=["4"]))
    report = quantize_base(model)
    assert [weight.name for weight in report.weights] == ["base_model.model.2"]
    assert report.left == {"base_model.model.0": "DoRA needs its weight"}
    other = get_peft_model(model_of(), LoKrConfig(target_modules=["0"]))
    assert quantize_base(other).left == {"base_model.model.0": "LoKrLayer needs its weight"}


def test_merging_is_refused():
    model = random_adapter(get_peft_model(model_of(), LoraConfig(target_modules=["0"])))
    x = torch.randn(2, 64)
    quantize_base(model, "int4")
    before = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="a base weight in int4 cannot take an update in"):
            merge()
    assert model(x).equal(before)
    plain = model.unload()
    assert isinstance(plain[0], QuantizedLinear)


def test_errors_leave_the_model_alone():
    model = random_adapter(get_peft_model(model_of(), LoraConfig(target_modules=["0"])))
    x = torch.randn(2, 64)
    before = model(x)
    with pytest.raises(ValueError, match="dtype must be one of"):
        quantize_base(model, "int3")
    with pytest.raises(ValueError, match="group_size must be a multiple of 32 that divides 64"):
        quantize_base(model, "int4", group_size=48)
    with pytest.raises(ValueError, match="no frozen linear layer"):
        quantize_base(model, skip_modules=["0", "2", "4"])
    assert model(x).equal(before)
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapters \\['default'\\] are merged into the base"):
        quantize_base(model)


def test_adapters_that_need_the_weight_are_refused():
    model = model_of()
    quantize_base(model)
    for config in (
        LoraConfig(target_modules=["0"], use_dora=True),
        LoraConfig(target_modules=["0"], init_lora_weights="pissa"),
    ):
        with pytest.raises(ValueError, match="needs the base weight itself"):
            get_peft_model(model, config)


def test_peft_models_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model_of(), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"has Hugging Face PEFT's .* in it"):
        quantize_base(model)
