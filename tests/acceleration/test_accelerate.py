"""What accelerate serves and reports, and that restore undoes it."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import peft_ext

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")


def adapted(model: nn.Module, **options) -> nn.Module:
    config = {"r": 2, "target_modules": ["0", "2", "4"], "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_importing_peft_ext_imports_neither_peft_nor_transformers():
    code = "import sys, peft_ext; sys.exit(any(name in sys.modules for name in ('peft', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("call", [peft_ext.accelerate, peft_ext.restore])
def test_what_is_no_peft_model_is_named(tiny, call):
    ours = peft_ext.get_peft_model(tiny("mlp"), peft_ext.LoraConfig(target_modules=["0"]))
    for wrong, name in (
        (tiny("mlp"), "torch.nn.modules.container.Sequential"),
        (3, "builtins.int"),
        (ours, "peft_ext."),
    ):
        with pytest.raises(TypeError, match=f"Hugging Face PEFT.* got {name}"):
            call(wrong)


def test_restore_gives_all_classes_back(tiny):
    model = adapted(tiny("mlp"))
    before = classes(model)
    report = peft_ext.accelerate(model)
    assert classes(model) != before
    after = classes(model)
    assert peft_ext.accelerate(model) == report
    assert classes(model) == after
    peft_ext.restore(model)
    assert classes(model) == before
    peft_ext.restore(model)
    assert classes(model) == before


def test_report_of_a_served_model(tiny):
    report = peft_ext.accelerate(adapted(tiny("mlp")))
    assert report.layers == dict.fromkeys([f"base_model.model.{i}" for i in (0, 2, 4)], "lora_linear")
    assert report.left == {}
    assert repr(report) == "Acceleration: 3 layers on lora_linear, 0 left"


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def unserved_models(tiny):
    yield (
        "a base class of its own",
        adapted(nn.Sequential(Doubled(4, 4)), target_modules=["0"]),
        "base layer is a Doubled",
    )
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    yield "conv", adapted(conv, target_modules=["0"]), "no op for lora.layer.Conv2d"
    yield (
        "embedding",
        adapted(nn.Sequential(nn.Embedding(9, 4)), target_modules=["0"]),
        "no op for lora.layer.Embedding",
    )
    yield "bias", adapted(tiny("mlp"), target_modules=["0"], lora_bias=True), "it has lora_bias"
    variant = (
        {"velora_config": peft.tuners.lora.config.VeloraConfig()}
        if hasattr(peft.tuners.lora.config, "VeloraConfig")
        else {}
    )
    if variant:
        yield "variant", adapted(tiny("mlp"), target_modules=["0"], **variant), "LoRA variant VeloraLinearVariant"
    hooked = adapted(tiny("mlp"), target_modules=["0"])
    hooked.base_model.model[0].base_layer.register_forward_hook(lambda *_: None)
    yield "hooks", hooked, "its base layer has hooks"
    mixed = adapted(tiny("mlp"), target_modules=["0"])
    mixed.base_model.model[0].lora_B.to(torch.bfloat16)
    yield "dtypes", mixed, "its factors are torch.float32 and torch.bfloat16"
    trained = adapted(tiny("mlp"), target_modules=["0"])
    trained.base_model.model[0].base_layer.weight.requires_grad_()
    yield "trained", trained, "its base weight is trained"
    quantized = adapted(tiny("mlp"), target_modules=["0"])
    weight = quantized.base_model.model[0].base_layer.weight
    quantized.base_model.model[0].base_layer.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    yield "float8", quantized, "its base weight is torch.float8_e4m3fn"


def test_unserved_layers_are_left_and_listed(tiny):
    for name, model, reason in unserved_models(tiny):
        layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
        before = type(layer)
        report = peft_ext.accelerate(model)
        assert type(layer) is before, name
        assert report.layers == {} and list(report.left) == ["base_model.model.0"], name
        assert reason in report.left["base_model.model.0"], name
        assert reason in repr(report), name


def test_an_unserved_adapter_beside_a_served_one(tiny):
    model = adapted(tiny("mlp"), target_modules=["0"])
    model.add_adapter("biased", peft.LoraConfig(r=2, target_modules=["0"], lora_bias=True, init_lora_weights=False))
    theirs = copy.deepcopy(model)
    report = peft_ext.accelerate(model)
    assert report.layers == {"base_model.model.0": "lora_linear"}
    assert report.left == {"base_model.model.0 [biased]": "it has lora_bias"}
    x = torch.randn(2, 8)
    for name in ("default", "biased"):
        model.set_adapter(name)
        theirs.set_adapter(name)
        torch.testing.assert_close(model(x), theirs(x))
    model.eval(), theirs.eval()
    names = ["default", "biased"]
    torch.testing.assert_close(model(x, adapter_names=names), theirs(x, adapter_names=names))


def test_a_second_call_serves_what_can_be_served_now(tiny):
    model = adapted(tiny("mlp"), target_modules=["0"])
    base = model.base_model.model[0].base_layer
    handle = base.register_forward_hook(lambda *_: None)
    assert not peft_ext.accelerate(model).layers
    handle.remove()
    assert peft_ext.accelerate(model).layers
    base.register_forward_hook(lambda *_: None)
    assert not peft_ext.accelerate(model).layers
    assert type(model.base_model.model[0]) is peft.tuners.lora.Linear


def test_injected_adapters_and_a_model_around(tiny):
    """inject_adapter_in_model makes no PeftModel."""
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False), tiny("mlp")
    )
    theirs = copy.deepcopy(model)
    around = nn.Sequential(model)
    assert list(peft_ext.accelerate(around).layers) == ["0.0", "0.2"]
    x = torch.randn(2, 8)
    torch.testing.assert_close(around(x), theirs(x))
    peft_ext.restore(around)
    assert classes(model) == classes(theirs)


def test_mixed_adapter_types(tiny):
    model = peft.get_peft_model(
        tiny("mlp"), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), mixed=True
    )
    model.add_adapter("kron", peft.LoKrConfig(r=2, target_modules=["0", "2"], init_weights=False))
    model.set_adapter(["default", "kron"])
    theirs = copy.deepcopy(model)
    report = peft_ext.accelerate(model)
    assert set(report.layers.values()) <= {"lora_linear", "kron_linear"} and report.layers
    x = torch.randn(2, 8)
    torch.testing.assert_close(model(x), theirs(x))


def test_modules_to_save(tiny):
    model = adapted(tiny("mlp"), target_modules=["0"], modules_to_save=["4"])
    theirs = copy.deepcopy(model)
    assert list(peft_ext.accelerate(model).layers) == ["base_model.model.0"]
    x = torch.randn(2, 8)
    torch.testing.assert_close(model(x), theirs(x))
