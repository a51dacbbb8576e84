"""Houlsby and Pfeiffer adapters, and AdapterDrop, in transformers' models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_ext import AdapterDrop, HoulsbyConfig, PeftModel, PfeifferConfig, get_peft_model
from peft_ext.models import MiniGPT
from peft_ext.tuners.sublayer_tuner import SublayerSlot, layer_of

KINDS = ["bert", "gpt2", "llama"]
CONFIGS = {"houlsby": HoulsbyConfig, "pfeiffer": PfeifferConfig}


@pytest.fixture(params=CONFIGS)
def config_class(request):
    return CONFIGS[request.param]


def train(model, run, steps=3, lr=0.1):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (run(model) - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


def strengthen(model):
    """Weights that show in the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.normal_(std=0.5)


def branch(adapter, x):
    """up(act(down(x))) in plain PyTorch."""
    act = {"gelu": F.gelu, "relu": F.relu}[adapter.activation]
    return adapter.up_proj(act(adapter.down_proj(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_train_save_load(tiny, run, tmp_path, kind, config_class):
    base = tiny(kind)
    start = run(base)
    model = get_peft_model(base, config_class(bottleneck_dim=4))
    torch.testing.assert_close(run(model), start, atol=5e-2, rtol=0)  # near the identity
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, run)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert all(".adapter." in name or ".modules_to_save." in name for name in trained)
    assert any(not torch.equal(parameters[name], value) for name, value in trained.items() if ".adapter." in name)
    wanted = run(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path)
    assert torch.equal(run(loaded), wanted)
    with model.disable_adapter():
        assert torch.equal(run(model), start)
    assert torch.equal(run(model.unload()), start)


def test_houlsby_on_bert_is_the_definition(tiny):
    model = get_peft_model(tiny("bert"), HoulsbyConfig(bottleneck_dim=4))
    strengthen(model)
    output = model.get_base_model().bert.encoder.layer[1].output
    hidden, residual = torch.randn(2, 3, 32), torch.randn(2, 3, 16)
    h = output.dense(hidden)
    adapter, norm = output.dropout.adapter["default"], output.LayerNorm.modules_to_save["default"]
    torch.testing.assert_close(output(hidden, residual), norm(h + branch(adapter, h) + residual))
    assert adapter.activation == "gelu"


def test_pfeiffer_on_bert_is_adapterhubs(tiny):
    model = get_peft_model(tiny("bert"), PfeifferConfig(bottleneck_dim=4))
    strengthen(model)
    output = model.get_base_model().bert.encoder.layer[1].output
    hidden, residual = torch.randn(2, 3, 32), torch.randn(2, 3, 16)
    norm, adapter = output.LayerNorm.base_layer, output.LayerNorm.adapter["default"]
    s = output.dense(hidden) + residual
    torch.testing.assert_close(output(hidden, residual), norm(s + branch(adapter, norm(s))))
    assert not any("LayerNorm" in n and ".adapter." not in n for n, p in model.named_parameters() if p.requires_grad)


def test_pfeiffer_on_a_pre_norm_model_works_on_the_layers_output(tiny):
    model = get_peft_model(tiny("llama"), PfeifferConfig(bottleneck_dim=4))
    strengthen(model)
    decoder = model.get_base_model().model
    slot, x = decoder.layers[0], torch.randn(1, 3, 16)
    embeddings = decoder.rotary_emb(x, torch.arange(3)[None])
    s = slot.base_layer.forward(x, position_embeddings=embeddings)
    torch.testing.assert_close(slot(x, position_embeddings=embeddings), s + branch(slot.adapter["default"], s))


@pytest.mark.parametrize("recorded_before", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_recorded_hidden_states_are_what_the_adapters_give(tiny, run, kind, recorded_before):
    base, batch = tiny(kind), {"input_ids": torch.arange(6).view(2, 3), "output_hidden_states": True}
    plain = base(**batch).hidden_states if recorded_before else tiny(kind)(**batch).hidden_states
    model = get_peft_model(base, PfeifferConfig(bottleneck_dim=4)).eval()
    strengthen(model)
    slots = [module for module in model.modules() if isinstance(module, SublayerSlot)]
    recorded = model(**batch).hidden_states
    torch.testing.assert_close(recorded[1], plain[1] + branch(slots[0].adapter["default"], plain[1]))
    with model.disable_adapter():
        assert torch.equal(model(**batch).hidden_states[1], plain[1])
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).hidden_states[1], recorded[1])
    assert torch.equal(twin.unload()(**batch).hidden_states[1], plain[1])
    assert torch.equal(model(**batch).hidden_states[1], recorded[1])
    assert torch.equal(model.unload()(**batch).hidden_states[1], plain[1])


def test_a_failing_injection_leaves_no_hooks(tiny):
    base = tiny("llama")
    with pytest.raises(ValueError, match="missing keys"):
        PeftModel(base, PfeifferConfig(), tensors={})
    assert not any(module._forward_hooks for module in base.modules())


def test_counts(tiny):
    """2 layers of width 16: two adapters a layer of 2dk + k + d, and every layer norm."""
    k, d = 4, 16
    adapter = 2 * d * k + k + d
    count = get_peft_model(tiny("bert"), HoulsbyConfig(bottleneck_dim=k)).get_nb_trainable_parameters()[0]
    assert count == 4 * adapter + 5 * 2 * d
    config = HoulsbyConfig(bottleneck_dim=k, train_layer_norms=False)
    assert get_peft_model(tiny("bert"), config).get_nb_trainable_parameters()[0] == 4 * adapter
    config = PfeifferConfig(reduction_factor=4)
    assert get_peft_model(tiny("bert"), config).get_nb_trainable_parameters()[0] == 2 * adapter


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters(tiny, run, kind, config_class):
    model = get_peft_model(tiny(kind), config_class(bottleneck_dim=4)).eval()
    model.add_adapter("other", config_class(bottleneck_dim=2))
    strengthen(model)
    first = run(model)
    model.set_adapter("other")
    assert not torch.allclose(run(model), first)
    model.delete_adapter("other")
    assert torch.equal(run(model), first)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(tiny, run, kind, config_class):
    gradients = []
    for checkpointing in (False, True):
        base = tiny(kind)
        if checkpointing:
            base.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model = get_peft_model(base, config_class(bottleneck_dim=4)).train()
        run(model).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if ".adapter." in n})
    assert gradients[0]
    for name, plain in gradients[0].items():
        torch.testing.assert_close(plain, gradients[1][name], msg=name)


SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OTHERS = {
    "roberta": SIZES,
    "electra": {**SIZES, "embedding_size": 16},
    "distilbert": {"vocab_size": 50, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
    "mistral": {**SIZES, "num_key_value_heads": 1},
    "qwen2": {**SIZES, "num_key_value_heads": 1},
    "phi3": {**SIZES, "num_key_value_heads": 1, "pad_token_id": 0},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_places_in_other_architectures(kind, config_class):
    """A sublayer or layer that gave h gives adapter(h); around a norm, norm(s + branch(norm(s)))."""
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **OTHERS[kind]))
    model = get_peft_model(base.eval(), config_class(bottleneck_dim=4))
    strengthen(model)
    slots = [module for module in model.modules() if isinstance(module, SublayerSlot)]
    assert len(slots) == (4 if config_class is HoulsbyConfig else 2)
    seen = {}
    for slot in slots:
        slot.base_layer.register_forward_hook(lambda module, _, output: seen.update({module: output}), prepend=True)
        slot.register_forward_hook(lambda module, inputs, output: seen.update({module: (inputs[0], output)}))
    model(input_ids=torch.arange(1, 9).view(2, 4))
    for slot in slots:
        adapter, base_layer, (s, got) = slot.adapter["default"], slot.base_layer, seen[slot]
        if isinstance(base_layer, nn.LayerNorm):
            wanted = base_layer(s + branch(adapter, base_layer(s)))
        else:
            wanted = seen[base_layer] + branch(adapter, seen[base_layer])
        torch.testing.assert_close(got, wanted)


def test_a_module_cannot_be_saved_where_an_adapter_goes(tiny, snapshot, same):
    base = tiny("llama")
    before = snapshot(base)
    config = PfeifferConfig(modules_to_save=["input_layernorm"])
    with pytest.raises(ValueError, match=r"names 'model.layers.0.input_layernorm', but the adapter is at 'model.la"):
        get_peft_model(base, config)
    assert same(base, before)


def trained_names(model):
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}


def test_houlsby_trains_the_norms_and_nothing_of_a_like_name(tmp_path):
    """Norms are known by their full names: "1" is neither "11" nor "2.1"."""

    def base():
        return nn.Sequential(
            nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), *[nn.Linear(4, 4)] * 9
        )

    model = get_peft_model(base(), HoulsbyConfig(bottleneck_dim=2, target_modules=["0", "2.0", "2.1"]))
    prefixes = {name.partition(".default")[0] for name in trained_names(model)}
    assert prefixes == {"0.adapter", "1.modules_to_save", "2.0.adapter", "2.1.adapter"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert trained_names(loaded) == trained_names(model)


def test_houlsby_with_norms_in_its_targets(tiny):
    base = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    model = get_peft_model(base, HoulsbyConfig(bottleneck_dim=2, target_modules=["1"]))
    assert {name.partition(".default")[0] for name in trained_names(model)} == {"0.modules_to_save", "1.adapter"}
    with pytest.raises(ValueError, match=r"'\S+0.attention.output.LayerNorm' is in the target '\S+0.attention.output'"):
        get_peft_model(tiny("bert"), HoulsbyConfig(target_modules=["attention.output"]))


def test_a_module_that_another_adapter_trains_in_full_is_no_target(tiny, snapshot, same, config_class):
    model = get_peft_model(tiny("bert"), config_class(modules_to_save=["pooler"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'bert.pooler' is trained in full by another adapter"):
        model.add_adapter("other", config_class(target_modules=["pooler"]))
    assert same(model, before)


def test_minigpt_and_user_named_modules(config_class):
    model = MiniGPT(20, 16, 8, n_layers=2, n_heads=2, method="none")
    adapted = get_peft_model(model, config_class(bottleneck_dim=4))
    assert sum(name.endswith("adapter.default.up_proj.weight") for name, _ in adapted.named_parameters()) in (2, 4)
    plain = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    x = torch.randn(3, 8)
    adapted = get_peft_model(plain, config_class(bottleneck_dim=4, target_modules=["0", "1"]))
    assert adapted(x).shape == (3, 4)
    with pytest.raises(ValueError, match="target_modules must be given"):
        get_peft_model(nn.Sequential(nn.Linear(8, 8)), config_class())


def test_merging_is_an_error(tiny, run, config_class):
    model = get_peft_model(tiny("bert"), config_class()).eval()
    before = run(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    assert torch.equal(run(model), before)


def calls(model, run):
    """How many adapters one forward computes."""
    counted = []
    adapters = [m for n, m in model.named_modules() if n.endswith(".adapter.default")]
    hooks = [m.register_forward_hook(lambda *_: counted.append(1)) for m in adapters]
    run(model)
    for hook in hooks:
        hook.remove()
    return len(counted)


def test_specialised_adapter_drop(tiny, run, config_class):
    model = get_peft_model(tiny("bert"), config_class(bottleneck_dim=4, adapter_drop=AdapterDrop("specialised", 1)))
    names = [name for name, _ in model.named_parameters() if ".adapter." in name]
    assert names
    assert all(".layer.1." in name for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_robust_adapter_drop(tiny, run, tmp_path, kind, config_class):
    model = get_peft_model(tiny(kind), config_class(bottleneck_dim=4, adapter_drop=AdapterDrop("robust")))
    strengthen(model)
    per_layer = 2 if config_class is HoulsbyConfig else 1
    model.train()
    assert {calls(model, run) for _ in range(20)} == {per_layer, 2 * per_layer}
    model.eval()
    assert calls(model, run) == 2 * per_layer
    outputs = [run(model)]
    for n in (1, 2):
        model.drop_adapter_layers(n)
        assert calls(model, run) == (2 - n) * per_layer
        outputs.append(run(model))
    assert not torch.allclose(outputs[0], outputs[1])
    model.drop_adapter_layers(0)
    assert torch.equal(run(model), outputs[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path)
    assert loaded.active_peft_config.adapter_drop == AdapterDrop("robust")


def working_layers(model, run):
    """Which layers' adapters one forward computes, by the number in the layer's name."""
    seen = set()
    named = model.get_base_model().named_modules()
    slots = [(layer_of(name), module) for name, module in named if isinstance(module, SublayerSlot)]
    hooks = [
        adapter.register_forward_hook(lambda *_, layer=layer: seen.add(layer))
        for layer, slot in slots
        for adapter in slot.adapter.values()
    ]
    run(model)
    for hook in hooks:
        hook.remove()
    return seen


def test_adapter_drop_counts_the_layers_of_all_adapters(run):
    """The first layers are the model's, not those where the first adapter is."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**{**SIZES, "num_hidden_layers": 6})
    model = get_peft_model(
        transformers.BertForSequenceClassification(config).eval(),
        PfeifferConfig(layers_to_transform=[4, 5], adapter_drop=AdapterDrop("robust")),
    )
    model.add_adapter("all", PfeifferConfig())
    model.drop_adapter_layers(2)
    assert working_layers(model, run) == {4, 5}
    model.set_adapter("all")
    assert working_layers(model, run) == {2, 3, 4, 5}
    model.drop_adapter_layers(6)
    assert working_layers(model, run) == set()
    model.drop_adapter_layers(0)
    assert working_layers(model, run) == set(range(6))
    # what is drawn in training does not depend on adapters that are not active
    model.set_adapter("default")
    model.train()
    drawn = {frozenset(working_layers(model, run)) for _ in range(20)}
    assert drawn == {frozenset({4, 5}), frozenset({5})}
    while working_layers(model, run) != {5}:
        pass
    model.set_adapter("all")
    assert working_layers(model, run) == set(range(6))  # nothing is left of what another adapter drew
    model.delete_adapter("all")
    with pytest.raises(ValueError, match="layers must be an integer from 0 to 2"):
        model.drop_adapter_layers(3)


def test_adapter_drop_of_too_many_layers(tiny, snapshot, same, config_class):
    base = tiny("bert")
    before = snapshot(base)
    for mode in ("specialised", "robust"):
        with pytest.raises(ValueError, match=r"adapter_drop.layers is 2, but the model has 2 layers"):
            get_peft_model(base, config_class(adapter_drop=AdapterDrop(mode, 2)))
        assert same(base, before)
    model = get_peft_model(base, config_class())
    with pytest.raises(ValueError, match="layers must be an integer from 0 to 2"):
        model.drop_adapter_layers(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bottleneck_dim": 0}, "bottleneck_dim must be an integer > 0"),
        ({"bottleneck_dim": 2.5}, "bottleneck_dim must be an integer > 0, got 2.5"),
        ({"reduction_factor": 0}, "reduction_factor must be a finite number > 0"),
        ({"reduction_factor": "8"}, "reduction_factor must be a finite number > 0, got '8'"),
        ({"adapter_drop": 3}, "adapter_drop must be an AdapterDrop or a dict of its fields, got 3"),
        ({"adapter_drop": {"layers": 1.5}}, "layers must be an integer > 0, got 1.5"),
        ({"non_linearity": "swish"}, "non_linearity must be one of relu.* got 'swish'"),
        ({"adapter_drop": {"mode": "other"}}, "mode must be 'specialised' or 'robust'"),
        ({"adapter_drop": {"mode": "specialised"}}, "layers must be given"),
        ({"adapter_drop": {"layers": 0}}, "layers must be an integer > 0"),
    ],
)
def test_bad_configurations(arguments, message, config_class):
    with pytest.raises((ValueError, TypeError), match=message):
        config_class(**arguments)
