"""The adapted model as users handle it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_ext
from peft_ext import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft_ext.tuners.layer import ModulesToSaveWrapper
from peft_ext.tuners.lora_layers import LoraConv2d, LoraEmbedding, LoraLinear

Make = Callable[[str], nn.Module]
Run = Callable[[nn.Module], Tensor]

TARGETS = {"bert": ["query", "dense"], "gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "v_proj"], "mlp": ["0", "4"]}
KINDS = list(TARGETS)


def adapted(model: nn.Module, kind: str, **arguments: Any) -> PeftModel:
    config = LoraConfig(**{"r": 2, "target_modules": TARGETS[kind], "init_lora_weights": False, **arguments})
    return get_peft_model(model, config).eval()


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_training_moves_the_adapter_alone(tiny: Make, run: Run, kind: str) -> None:
    base = tiny(kind)
    expected = run(base)
    model = adapted(base, kind, init_lora_weights=True)
    assert torch.equal(run(model), expected)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # A moves only once B is not zero any more
        optimizer.zero_grad()
        run(model).square().sum().backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained_names(model)) == {name for name in before if ".lora_" in name}


@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_unloading(tiny: Make, run: Run, kind: str) -> None:
    base = tiny(kind)
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    plain, names = run(base), [type(module) for module in base.modules()]
    model = adapted(base, kind)
    expected = run(model)
    model.merge_adapter()
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(run(model), plain)
    model.unmerge_adapter()
    assert all(
        torch.equal(p, weights[n.replace("base_layer.", "")]) for n, p in base.named_parameters() if "lora" not in n
    )

    twin = copy.deepcopy(model)
    assert model.unload() is base
    assert torch.equal(run(base), plain)
    merged = twin.merge_and_unload()
    torch.testing.assert_close(run(merged), expected, rtol=1e-4, atol=1e-5)
    for unloaded in (base, merged):
        assert [type(module) for module in unloaded.modules()] == names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_pickles(tiny: Make, run: Run, kind: str, merged: bool) -> None:
    model = adapted(tiny(kind), kind, task_type="SEQ_CLS" if kind == "bert" else None)
    if merged:
        model.merge_adapter()
    expected = run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin), expected)
        assert type(twin) is type(model)
        assert trained_names(twin) == trained_names(model)
        twin.unmerge_adapter()
        assert not twin.merged_adapters
    model.unmerge_adapter()
    fresh = adapted(tiny(kind), kind, task_type="SEQ_CLS" if kind == "bert" else None)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(fresh), run(model))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [*((kind, {}) for kind in KINDS), ("mlp", {"use_dora": True}), ("mlp", {"lora_dropout": 0.3})],
)
def test_compiles_without_a_graph_break(tiny: Make, run: Run, kind: str, arguments: dict[str, Any]) -> None:
    model = adapted(tiny(kind), kind, **arguments)
    expected = run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), expected)
    run(compiled.train()).sum().backward()


def test_several_adapters_compile(tiny: Make, run: Run) -> None:
    model = adapted(tiny("mlp"), "mlp")
    model.add_adapter("other", LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    model.set_adapter(["default", "other"])
    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager")), run(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tiny: Make, run: Run, reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        base = tiny("llama")
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = adapted(base, "llama").train()
        run(model).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(grad is not None for grad in grads[1].values())
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generates(tiny: Make, kind: str) -> None:
    model = adapted(tiny(kind), kind, task_type="CAUSAL_LM")
    ids = torch.tensor([[3, 4, 5]])
    found = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)


def test_half_precision_base_with_a_float32_adapter(tiny: Make, run: Run) -> None:
    model = adapted(tiny("llama").to(torch.bfloat16), "llama")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    output = run(model)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_autocast(tiny: Make, run: Run) -> None:
    model = adapted(tiny("llama"), "llama")
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), run(model), rtol=0.1, atol=0.05)


# --- several adapters ----------------------------------------------------------------------------


def test_adapters_are_switched_and_deleted(tiny: Make, run: Run) -> None:
    model = adapted(tiny("mlp"), "mlp")
    first = run(model)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["2"], init_lora_weights=False))
    assert model.active_adapters == ["default"]
    assert torch.equal(run(model), first)
    assert all("default" in name for name in trained_names(model))

    model.set_adapter("other")
    assert model.active_adapter == "other"
    other = run(model)
    assert not torch.allclose(other, first)
    assert trained_names(model) == [f"base_model.model.2.lora_{x}.other.weight" for x in "AB"]
    model.set_adapter("default", inference_mode=True)
    assert not trained_names(model)
    assert torch.equal(run(model), first)

    model.set_adapter(["default", "other"])
    assert len(trained_names(model)) == 6
    assert model.active_adapter == ["default", "other"]
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(run(model), other)
    assert not any("default" in name for name in model.state_dict())
    model.delete_adapter("other")
    assert model.active_adapters == []
    torch.testing.assert_close(run(model), run(tiny("mlp")))


def test_deleting_an_adapter_unfreezes_no_other(tiny: Make, run: Run) -> None:
    model = adapted(tiny("mlp"), "mlp", inference_mode=True)
    config = LoraConfig(r=2, target_modules=["2"], init_lora_weights=False, inference_mode=True)
    model.add_adapter("other", config)
    model.add_adapter("third", config)
    assert not trained_names(model)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert not trained_names(model)
    model.set_adapter(["other", "third"], inference_mode=True)
    model.merge_adapter(["third"])
    expected = run(model)
    model.delete_adapter("other")
    assert model.active_adapters == ["third"]
    assert model.merged_adapters == ["third"]
    assert not trained_names(model)
    torch.testing.assert_close(run(model), expected)


def test_the_next_adapter_takes_over_from_a_deleted_one(tiny: Make, run: Run) -> None:
    model = adapted(tiny("mlp"), "mlp")
    expected = run(model)
    model.add_adapter("other", LoraConfig(target_modules=["0"]))
    model.set_adapter("other")
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(run(model), expected)


def test_setting_an_adapter_unmerges(tiny: Make, run: Run) -> None:
    model = adapted(tiny("mlp"), "mlp")
    model.add_adapter("other", LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.set_adapter("other")
    expected = run(model)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="are unmerged"):
        model.set_adapter("other")
    assert torch.equal(run(model), expected)


def test_disabling_nests_and_keeps_flags(tiny: Make, run: Run) -> None:
    base = tiny("mlp")
    plain = run(base)
    model = adapted(base, "mlp", modules_to_save=["2"])
    with torch.no_grad():
        model.get_base_model()[2].modules_to_save["default"].weight.add_(1)
    expected, names = run(model), trained_names(model)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(run(model), plain)
        assert torch.equal(run(model), plain)
    assert torch.equal(run(model), expected)
    assert trained_names(model) == names


def test_modules_to_save(tiny: Make, run: Run) -> None:
    base = tiny("bert")
    before = run(base)
    model = adapted(base, "bert", task_type="SEQ_CLS", init_lora_weights=True)
    wrapper = base.classifier
    assert isinstance(wrapper, ModulesToSaveWrapper)
    assert wrapper.out_features == 2
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
    assert {name for name in trained_names(model) if "lora" not in name} == {
        f"base_model.model.classifier.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.zero_()
    assert not torch.allclose(run(model), before)
    with model.disable_adapter():
        assert torch.equal(run(model), before)
    expected = run(model)
    trained = wrapper.modules_to_save["default"]
    assert model.merge_and_unload().classifier is trained
    assert torch.equal(run(base), expected)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases(tiny: Make, bias: str) -> None:
    model = adapted(tiny("mlp"), "mlp", bias=bias)
    biases = [name for name in trained_names(model) if name.endswith("bias")]
    names = {"none": [], "lora_only": ["0.base_layer", "4.base_layer"], "all": ["0.base_layer", "2", "4.base_layer"]}
    assert biases == [f"base_model.model.{name}.bias" for name in names[bias]]
    model.set_adapter("default", inference_mode=True)
    assert not trained_names(model)


def test_only_one_adapter_trains_biases(tiny: Make) -> None:
    model = adapted(tiny("mlp"), "mlp", bias="lora_only")
    model.add_adapter("other", LoraConfig(target_modules=["2"]))
    with pytest.raises(ValueError, match="only one adapter of a model can train biases"):
        model.add_adapter("third", LoraConfig(target_modules=["2"], bias="all"))


def test_counts(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(tiny("mlp"), "mlp")
    trained = 2 * (8 + 16) + 2 * (16 + 4)
    total = trained + 8 * 16 + 16 + 16 * 16 + 16 + 16 * 4 + 4
    assert model.get_nb_trainable_parameters() == (trained, total)
    model.print_trainable_parameters()
    line = f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}\n"
    assert capsys.readouterr().out == line


def test_layer_types() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Conv2d(1, 1, 1))
    get_peft_model(model, LoraConfig(r=1, target_modules=["0", "1", "2"]))
    assert [type(module) for module in model] == [LoraEmbedding, LoraLinear, LoraConv2d]


def test_a_configuration_is_not_changed_and_can_be_used_again(tiny: Make) -> None:
    config = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    before = copy.deepcopy(config)
    get_peft_model(tiny("bert"), config)
    get_peft_model(tiny("gpt2"), config)
    assert config == before


def test_question_answering(tiny: Make) -> None:
    transformers = pytest.importorskip("transformers")
    base = transformers.BertForQuestionAnswering(tiny("bert").config)
    model = adapted(base, "bert", task_type="QUESTION_ANS")
    assert type(model).__name__ == "PeftModelForQuestionAnswering"
    assert base.qa_outputs.modules_to_save["default"].weight.requires_grad
    ids, first = torch.tensor([[3, 4, 5]]), torch.tensor([1])
    output = model(ids, start_positions=first, end_positions=first)
    assert torch.equal(output.loss, base(ids, start_positions=first, end_positions=first).loss)


def test_values_can_come_from_a_gathered_state_dict(tiny: Make) -> None:
    model = adapted(tiny("mlp"), "mlp", modules_to_save=["2"])
    gathered = {name: torch.full_like(tensor, 5) for name, tensor in model.state_dict().items()}
    tensors = peft_ext.get_peft_model_state_dict(model, gathered)
    assert tensors.keys() == peft_ext.get_peft_model_state_dict(model).keys()
    assert all((tensor == 5).all() for tensor in tensors.values())


@pytest.mark.parametrize("training", [False, True])
def test_injection_keeps_the_mode_of_every_module(tiny: Make, training: bool) -> None:
    base = tiny("mlp").train(training)
    base[4].train(not training)
    model = get_peft_model(base, LoraConfig(target_modules=["0"], modules_to_save=["4"], lora_dropout=0.5))
    assert base[0].training == base[0].lora_dropout["default"].training == training
    assert base[4].training == base[4].modules_to_save["default"].training == (not training)
    assert model.train().get_base_model()[4].modules_to_save["default"].training


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"target_modules": ["nope"]}, "matches no module"),
        (
            {"target_modules": ["0", "1"]},
            "target module '1' is a ReLU, which LoRA does not support: it supports Linear",
        ),
        ({"target_modules": ["0"], "modules_to_save": ["2", "4"], "r": 3, "init_lora_weights": "orthogonal"}, "even r"),
    ],
)
def test_a_failing_injection_changes_nothing(
    tiny: Make, snapshot: Any, same: Any, arguments: dict[str, Any], match: str
) -> None:
    base = tiny("mlp")
    before = snapshot(base)
    with pytest.raises(ValueError, match=match):
        get_peft_model(base, LoraConfig(**arguments))
    assert same(base, before)
    model = adapted(base, "mlp")
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        model.add_adapter("other", LoraConfig(**arguments))
    assert same(model, before)


def test_an_injection_that_breaks_half_way_is_undone(
    tiny: Make, snapshot: Any, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny("mlp")
    before = snapshot(base)
    add, calls = LoraLinear.add_adapter, []

    def fail_second(*args: Any) -> None:
        calls.append(args)
        add(*args)
        if len(calls) == 2:
            raise MemoryError

    monkeypatch.setattr(LoraLinear, "add_adapter", fail_second)
    with pytest.raises(MemoryError):
        get_peft_model(base, LoraConfig(target_modules=["0", "2"], modules_to_save=["4"]))
    assert len(calls) == 2
    assert same(base, before)


@pytest.mark.parametrize(
    ("module", "arguments", "match"),
    [
        (nn.Embedding(4, 4), {"use_dora": True}, "use_dora is supported for linear layers, not for Embedding"),
        (nn.Conv2d(1, 1, 1), {"init_lora_weights": "pissa"}, "'pissa' is supported for linear layers, not for Conv2d"),
        (nn.Conv2d(1, 1, 1, padding_mode="reflect"), {}, "padding_mode='reflect' is not supported"),
        (nn.Conv2d(4, 4, 1, groups=4), {"r": 2}, "divisible by the Conv2d's groups, got r=2, groups=4"),
        (nn.Linear(4, 4).to(torch.complex64), {}, "weight of torch.complex64"),
        (nn.Conv1d(1, 1, 1), {}, "is a Conv1d, which LoRA does not support"),
    ],
)
def test_layers_that_do_not_suit(module: nn.Module, arguments: dict[str, Any], match: str) -> None:
    model = nn.Sequential(module)
    with pytest.raises(ValueError, match=match):
        get_peft_model(model, LoraConfig(target_modules=["0"], **arguments))
    assert model[0] is module


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "keys", "pop", "training"])
def test_names_that_cannot_be(tiny: Make, name: str) -> None:
    with pytest.raises(ValueError, match="is empty, reserved, or has one of the characters"):
        get_peft_model(tiny("mlp"), LoraConfig(target_modules=["0"]), name)


def test_names_that_clash_or_do_not_exist(tiny: Make, snapshot: Any, same: Any) -> None:
    model = adapted(tiny("mlp"), "mlp")
    before = snapshot(model)
    with pytest.raises(ValueError, match="there is an adapter 'default' already"):
        model.add_adapter("default", LoraConfig(target_modules=["2"]))
    for call in (
        model.set_adapter,
        model.delete_adapter,
        model.set_requires_grad,
        lambda name: model.merge_adapter([name]),
        lambda name: model.save_pretrained("unused", selected_adapters=[name]),
        lambda name: peft_ext.set_peft_model_state_dict(model, {}, name),
    ):
        with pytest.raises(ValueError, match=r"there is no adapter 'nope': the model has \['default'\]"):
            call("nope")
    with pytest.raises(TypeError, match="adapter_names must be a list of names"):
        model.merge_adapter("default")
    assert same(model, before)


def test_a_configuration_of_no_method(tiny: Make) -> None:
    with pytest.raises(TypeError, match="must be of a method, such as LoraConfig, got PeftConfig"):
        get_peft_model(tiny("mlp"), PeftConfig())
    with pytest.raises(ValueError, match=r"LORA and None cannot be in one model"):
        adapted(tiny("mlp"), "mlp").add_adapter("other", PeftConfig())


def test_a_model_is_not_adapted_twice(tiny: Make) -> None:
    model = adapted(tiny("mlp"), "mlp")
    for again in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="has adapters in it already"):
            get_peft_model(again, LoraConfig(target_modules=["2"]))


def test_adapters_that_exclude_each_other(tiny: Make, run: Run) -> None:
    model = adapted(tiny("mlp"), "mlp", use_dora=True)
    model.add_adapter("same", LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    model.add_adapter("twin", LoraConfig(target_modules=["4"], modules_to_save=["2"]))
    expected = run(model)
    for names in (["default", "same"], ["same", "twin"]):
        with pytest.raises(ValueError, match="cannot be active together"):
            model.set_adapter(names)
    assert model.active_adapters == ["default"]
    assert torch.equal(run(model), expected)
    with pytest.raises(ValueError, match=r"target module '2' is trained in full by another adapter"):
        model.add_adapter("bad", LoraConfig(target_modules=["2"]))


def test_an_adapted_module_is_not_trained_in_full_too(tiny: Make) -> None:
    model = adapted(tiny("mlp"), "mlp")
    with pytest.raises(ValueError, match=r"modules_to_save names '0', a LoraLinear"):
        model.add_adapter("other", LoraConfig(target_modules=["2"], modules_to_save=["0"]))
    model = adapted(tiny("bert"), "bert")
    with pytest.raises(ValueError, match=r"modules_to_save names 'bert.pooler', which has adapters inside"):
        model.add_adapter("other", LoraConfig(target_modules=["query"], modules_to_save=["pooler"]))


def test_what_must_not_happen_while_merged(tiny: Make, snapshot: Any, same: Any) -> None:
    model = adapted(tiny("mlp"), "mlp")
    tensors = peft_ext.get_peft_model_state_dict(model)
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter 'default' is merged: unmerge it before deleting it"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match="adapter 'default' is merged: unmerge it before loading new values"):
        peft_ext.set_peft_model_state_dict(model, tensors)
    for arguments in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ValueError, match=r"starts from the base weights: unmerge \['default'\] first"):
            model.add_adapter("other", LoraConfig(r=2, target_modules=["2"], **arguments))
    assert same(model, before)


def test_pissa_of_a_shared_weight(tiny: Make) -> None:
    with pytest.raises(ValueError, match=r"'pissa' changes weights that \['lm_head'\] share with other layers"):
        get_peft_model(tiny("gpt2"), LoraConfig(target_modules=["lm_head"], init_lora_weights="pissa"))


def test_a_progress_bar(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    adapted(tiny("mlp"), "mlp").merge_and_unload(progressbar=True)
    shown = capsys.readouterr().out
    assert "merging" in shown
    assert "100%" in shown


def test_a_merge_that_is_not_finite_is_refused_whole(tiny: Make, snapshot: Any, same: Any) -> None:
    model = adapted(tiny("mlp"), "mlp")
    with torch.no_grad():
        model.get_base_model()[4].lora_B["default"].weight[0, 0] = torch.nan
    weights = [layer.weight.detach().clone() for layer in (model.get_base_model()[0], model.get_base_model()[4])]
    with pytest.raises(ValueError, match="merging adapter 'default' would make weights that are not finite"):
        model.merge_adapter(safe_merge=True)
    assert not model.merged_adapters
    for layer, weight in zip((model.get_base_model()[0], model.get_base_model()[4]), weights, strict=True):
        assert torch.equal(layer.weight, weight)


def test_warnings_of_what_is_allowed_but_odd(tiny: Make) -> None:
    with pytest.warns(UserWarning, match=r"r exceeds the smaller side of the weight in \['4'\]"):
        adapted(tiny("mlp"), "mlp", r=5)
    with pytest.warns(UserWarning, match=r"\['transformer.wte'\] share their weight with other layers"):
        get_peft_model(tiny("gpt2"), LoraConfig(target_modules=["wte"]))
    model = adapted(tiny("mlp"), "mlp")
    with pytest.warns(UserWarning, match="'pissa' changes the base model under its other adapters"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    with pytest.warns(UserWarning, match="'nope' in rank_pattern or alpha_pattern matches no target module"):
        adapted(tiny("mlp"), "mlp", rank_pattern={"nope": 3, "0": 1})
    with pytest.warns(UserWarning, match=r"modules_to_save \['nope'\] matches no module"):
        adapted(tiny("mlp"), "mlp", modules_to_save=["nope"])
