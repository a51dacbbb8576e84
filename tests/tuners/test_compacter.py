"""Compacter and Compacter++ in models: training, checkpoints, switching, sharing, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_ext import AdapterDrop, CompacterConfig, CompacterPlusPlusConfig, PeftModel, get_peft_model

KINDS = ["bert", "gpt2", "llama"]


def config_for(kind: str, cls: type[CompacterConfig] = CompacterConfig, **options: Any) -> CompacterConfig:
    targets = {"target_modules": ["0", "2"]} if kind == "sequential" else {}
    return cls(**{"reduction_factor": 4, "phm_init_range": 0.5, **targets, **options})


@pytest.mark.parametrize("kind", [*KINDS, "sequential"])
@pytest.mark.parametrize("cls", [CompacterConfig, CompacterPlusPlusConfig])
def test_train_save_load(tiny: Any, run: Any, kind: str, cls: type[CompacterConfig], tmp_path: Path) -> None:
    model = get_peft_model(tiny(kind), config_for(kind, cls))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = run(model).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        assert parameter.requires_grad == (".adapter." in name or ".phm_rule." in name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path)
    assert type(loaded.peft_config["default"]) is cls
    assert torch.equal(run(loaded), run(model))


def test_shared_rule_is_saved_once_and_counts_once(tiny: Any, tmp_path: Path) -> None:
    for shared, rules in ((True, 1), (False, 4)):
        model = get_peft_model(tiny("bert"), config_for("bert", shared_phm_rule=shared))
        one = 2 * (4 * 4 + 4 * 1) + 4 + 16  # factors and biases of an adapter
        assert model.get_nb_trainable_parameters()[0] == 4 * one + rules * 64
        model.save_pretrained(tmp_path)
        keys = load_file(tmp_path / "adapter_model.safetensors")
        assert sum(key.endswith("phm_rule") for key in keys) == rules


def test_a_module_that_gives_a_tuple_and_has_attributes(tiny: Any, run: Any) -> None:
    model = get_peft_model(tiny("bert"), config_for("bert", target_modules=["attention.self"], bottleneck_dim=8))
    slot = model.get_base_model().bert.encoder.layer[0].attention.self
    assert slot.query is slot.base_layer.query
    x = torch.randn(1, 3, 16)
    got, base = slot(x), slot.base_layer(x)
    torch.testing.assert_close(got[0], slot.adapter["default"](base[0]))
    assert len(got) == len(base)
    run(model).sum().backward()


def test_adapter_drop(tiny: Any, run: Any) -> None:
    plain = run(tiny("bert"))
    model = get_peft_model(tiny("bert"), config_for("bert", adapter_drop=AdapterDrop("robust"))).eval()
    full = run(model)
    model.drop_adapter_layers(1)
    half = run(model)
    assert not torch.equal(half, full)
    model.drop_adapter_layers(2)
    assert torch.equal(run(model), plain)
    specialised = config_for("bert", adapter_drop=AdapterDrop("specialised", 1))
    names = [name for name, _ in get_peft_model(tiny("bert"), specialised).named_parameters() if ".adapter." in name]
    assert names
    assert all(".layer.1." in name for name in names)


def test_places(tiny: Any) -> None:
    for cls, places in ((CompacterConfig, 4), (CompacterPlusPlusConfig, 2)):
        model = get_peft_model(tiny("bert"), config_for("bert", cls))
        assert sum(1 for _ in model.base_model.slots()) == places


def test_switch_disable_delete_unload(tiny: Any, run: Any) -> None:
    base = tiny("gpt2")
    plain = run(base)
    model = get_peft_model(base, config_for("gpt2"))
    first = run(model)
    model.add_adapter("other", config_for("gpt2", phm_rank=2))
    assert torch.equal(run(model), first)
    model.set_adapter("other")
    assert not torch.equal(run(model), first)
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    model.delete_adapter("other")
    assert torch.equal(run(model), first)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    assert torch.equal(run(model.unload()), plain)


def test_tasks_share_the_rule(tiny: Any, run: Any) -> None:
    config = config_for("bert", share_across_tasks=True)
    model = get_peft_model(tiny("bert"), config)
    rule = model.base_model.phm_rule("default")
    model.add_adapter("other", config)
    assert model.base_model.phm_rule("other") is rule
    assert rule.requires_grad  # "default" is still being trained
    model.set_adapter("other")
    assert rule.requires_grad
    run(model).sum().backward()
    assert rule.grad is not None
    model.delete_adapter("default")
    assert rule.requires_grad
    model.set_requires_grad("other", False)
    assert not rule.requires_grad
    with pytest.raises(ValueError, match=r"A of adapter 'other' is \[4, 4, 4\], not \[2, 2, 2\]"):
        model.add_adapter("third", config_for("bert", share_across_tasks=True, phm_dim=2))


@pytest.mark.parametrize("change", ["add", "fail to add", "delete", "freeze"])
def test_a_rule_that_tasks_share_trains_with_the_active_one(tiny: Any, run: Any, change: str) -> None:
    """In every place: the other adapter is in places of its own too."""
    shared = {"share_across_tasks": True}
    model = get_peft_model(tiny("bert"), config_for("bert", target_modules=["query"], **shared))
    other = config_for("bert", target_modules=["key"], **shared)
    if change == "fail to add":
        with pytest.raises(ValueError, match="missing keys"):
            model.base_model.add_adapter("other", other, tensors={})
    else:
        model.add_adapter("other", other)
    if change == "delete":
        model.delete_adapter("other")
    if change == "freeze":
        model.set_requires_grad("other", False)
    rule = model.base_model.phm_rule("default")
    assert rule.requires_grad
    run(model).sum().backward()
    assert rule.grad is not None


def test_gradient_checkpointing(tiny: Any, run: Any) -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny("llama"), config_for("llama")).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run(model).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(grads[0], grads[1])


def test_half_precision_base(tiny: Any, run: Any) -> None:
    model = get_peft_model(tiny("bert").bfloat16(), config_for("bert"))
    assert run(model).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction_factor": 5}, "phm_dim=4 must divide d_model=16 and bottleneck_dim=3"),
        ({"reduction_factor": 8}, "phm_dim=4 must divide d_model=16 and bottleneck_dim=2"),
        ({"target_modules": ["nothing"]}, "matches no module"),
    ],
)
def test_a_failing_injection_changes_nothing(
    tiny: Any, snapshot: Any, same: Any, options: dict[str, Any], message: str
) -> None:
    model = tiny("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config_for("bert", **options))
    assert same(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction_factor": 0}, "reduction_factor must be a finite number > 0"),
        ({"phm_rank": 0}, "rank must be an integer > 0"),
        ({"phm_dim": 4.0}, "must be an integer > 0, got 4.0"),
        ({"phm_init_range": -1.0}, "phm_init_range"),
        ({"non_linearity": "swoosh"}, "non_linearity must be one of"),
        ({"share_across_tasks": True, "shared_phm_rule": False}, "needs shared_phm_rule"),
    ],
)
def test_bad_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompacterConfig(**options)


def test_a_reduction_factor_need_not_be_an_integer(tiny: Any) -> None:
    model = get_peft_model(tiny("bert"), config_for("bert", reduction_factor=4.0))
    assert model.base_model.phm_rule("default").shape == (4, 4, 4)
    assert next(model.base_model._adapters(["default"])).bottleneck_dim == 4


def test_the_output_is_the_modules_plus_the_adapters(tiny: Any) -> None:
    model = tiny("sequential")
    x, linear = torch.randn(3, 8), model[0]
    adapted = get_peft_model(model, config_for("sequential", target_modules=["0"]))
    layer = adapted.get_base_model()[0]
    assert layer.base_layer is linear
    torch.testing.assert_close(layer(x), layer.adapter["default"](linear(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_around_the_norm_after_the_ffn(tiny: Any, run: Any, kind: str, tmp_path: Path) -> None:
    """``original_ln_before``: LN(s + f(LN(s))) with a norm, s + f(s) without; f of no residual, by dense matrices."""
    model = get_peft_model(tiny(kind), config_for(kind, CompacterPlusPlusConfig, original_ln_before=True)).eval()
    slots = [m for m in model.modules() if type(m).__name__ in ("CompacterNormSlot", "CompacterLayerSlot")]
    assert len(slots) == 2
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(tiny(kind), tmp_path)), run(model))
    if kind != "bert":
        assert not torch.equal(run(model), run(tiny(kind)))
        return
    slot, s = slots[0], torch.randn(2, 3, 16)
    adapter = slot.adapter["default"]
    down, up = (
        sum(torch.kron(a, left @ right) for a, left, right in zip(adapter.phm_rule, p.W_left, p.W_right, strict=True))
        for p in (adapter.down, adapter.up)
    )
    normed = slot.base_layer(s)
    hidden = torch.nn.functional.gelu(normed @ down + adapter.down.b, approximate="tanh")
    torch.testing.assert_close(slot(s), slot.base_layer(s + hidden @ up + adapter.up.b), rtol=1e-5, atol=1e-5)


def test_one_place_cannot_have_both_forms(tiny: Any, run: Any, snapshot: Any, same: Any) -> None:
    where = {"target_modules": [f"{index}.output.LayerNorm" for index in (0, 1)]}
    model = get_peft_model(tiny("bert"), config_for("bert", **where))
    before = snapshot(model)
    with pytest.raises(ValueError, match="original_ln_before: another adapter at"):
        model.add_adapter("other", config_for("bert", original_ln_before=True, **where))
    assert same(model, before)
    with pytest.raises(TypeError, match="original_ln_before must be a bool"):
        CompacterConfig(original_ln_before=1)
