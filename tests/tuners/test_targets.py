from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from peft_ext import CompacterConfig, HoulsbyConfig, LoKrConfig, LoraConfig, PfeifferConfig, get_peft_model
from peft_ext.tuners.config import TargetedConfig
from peft_ext.tuners.targets import (
    find_modules_to_save,
    find_pattern_value,
    find_target_modules,
    resolve_target_modules,
)

Make = Callable[[str], nn.Module]


def found(model: nn.Module, **arguments: Any) -> list[str]:
    config = LoraConfig(**arguments)
    config.target_modules = resolve_target_modules(model, config)
    return list(find_target_modules(model, config))


def test_names_are_whole_or_end_after_a_dot(tiny: Make) -> None:
    model = tiny("llama")
    assert found(model, target_modules=["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert found(model, target_modules=["1.mlp.up_proj", "lm_head"]) == ["model.layers.1.mlp.up_proj", "lm_head"]
    with pytest.raises(ValueError, match="matches no module"):
        found(model, target_modules=["_proj"])


def test_a_string_is_a_regular_expression_for_the_whole_name(tiny: Make) -> None:
    model = tiny("llama")
    assert found(model, target_modules=r".*\.1\..*(q|k)_proj") == [f"model.layers.1.self_attn.{n}_proj" for n in "qk"]
    with pytest.raises(ValueError, match="matches no module"):
        found(model, target_modules="q_proj")


def test_modules_to_save_are_named_by_ends_but_numbers_are_whole() -> None:
    model = nn.ModuleDict({"pre_classifier": nn.Linear(2, 2), "classifier": nn.Linear(2, 2), "fc1": nn.Linear(2, 2)})
    model["layers"] = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    assert list(find_modules_to_save(model, ["classifier"])) == ["pre_classifier", "classifier"]
    assert list(find_modules_to_save(model, ["1"])) == ["layers.1"]
    assert list(find_modules_to_save(model, ["layers.1"])) == ["layers.1"]
    rest = found(model, target_modules="all-linear", modules_to_save=["classifier", "1"])
    assert rest == ["fc1", "layers.0", *(f"layers.{i}" for i in range(2, 12))]
    # a name is no regular expression
    assert "layers.1" in found(model, target_modules=["layers.1", "fc1"], modules_to_save=["l.yers.1"])


def test_excluded_modules_and_modules_to_save_are_no_targets(tiny: Make) -> None:
    model = tiny("mlp")
    assert found(model, target_modules="all-linear", exclude_modules=["0"]) == ["2", "4"]
    assert found(model, target_modules="all-linear", exclude_modules="[02]") == ["4"]
    assert found(model, target_modules="all-linear", modules_to_save=["4"]) == ["0", "2"]
    with pytest.raises(ValueError, match="taken out again by exclude_modules"):
        found(model, target_modules=["0"], exclude_modules=["0"])


@pytest.mark.parametrize(("kind", "count"), [("bert", 13), ("gpt2", 8), ("llama", 14), ("mlp", 3)])
def test_all_linear_leaves_the_output_head(tiny: Make, kind: str, count: int) -> None:
    names = found(tiny(kind), target_modules="all-linear", task_type="SEQ_CLS" if kind == "bert" else None)
    assert len(names) == count
    assert not {"lm_head", "classifier"} & set(names)


def test_layers_to_transform(tiny: Make) -> None:
    model = tiny("bert")
    assert found(model, target_modules=["query"], layers_to_transform=1) == [
        "bert.encoder.layer.1.attention.self.query"
    ]
    assert len(found(model, target_modules=["query"], layers_to_transform=[0, 1], layers_pattern="layer")) == 2
    with pytest.raises(ValueError, match=r"within layers_to_transform=\[5\]"):
        found(model, target_modules=["query"], layers_to_transform=[5])
    # a full name is meant literally
    full = "bert.encoder.layer.0.attention.self.query"
    assert found(model, target_modules=[full], layers_to_transform=[1]) == [full]


def test_no_match_lists_near_names(tiny: Make) -> None:
    with pytest.raises(ValueError, match=r"Near names: .*q_proj"):
        found(tiny("llama"), target_modules=["q_porj"])
    with pytest.raises(ValueError, match="Its linear layers end with: 0, 2, 4"):
        found(tiny("mlp"), target_modules=["something else"])


def test_a_name_among_others_that_matches_nothing_is_warned_of(tiny: Make) -> None:
    with pytest.warns(UserWarning, match=r"\['nope'\] match no module"):
        assert found(tiny("mlp"), target_modules=["0", "nope"]) == ["0"]


def test_a_model_without_defaults_needs_targets(tiny: Make) -> None:
    with pytest.raises(ValueError, match=r"must be given for this model \(Sequential\)"):
        found(tiny("mlp"))


def test_patterns_match_the_end_of_names() -> None:
    patterns = {"layer.0.query": 3, "query": 4, r"\d+\.key": 5}
    assert find_pattern_value(patterns, "encoder.layer.0.query", 8) == 3
    assert find_pattern_value(patterns, "encoder.layer.1.query", 8) == 4
    assert find_pattern_value(patterns, "encoder.layer.1.key", 8) == 5
    assert find_pattern_value(patterns, "encoder.subquery", 8) == 8


@pytest.mark.parametrize("method", [LoraConfig, LoKrConfig, HoulsbyConfig, PfeifferConfig, CompacterConfig])
def test_an_out_proj_that_is_read_but_never_called_is_refused(method: Callable[..., TargetedConfig]) -> None:
    with pytest.raises(ValueError, match=r"'0.out_proj': .* reads its out_proj's weight without calling it"):
        get_peft_model(nn.Sequential(nn.MultiheadAttention(128, 2)), method(target_modules=["out_proj"]))


def test_layers_whose_fast_path_passes_them_over_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, dropout=0.0)
    with pytest.raises(ValueError, match="fast path would pass the adapter over"):
        get_peft_model(layer, LoraConfig(target_modules="all-linear"))
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = get_peft_model(layer, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
        assert [name for name, _ in model.base_model.slots()] == ["linear1", "linear2"]
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            adapted = model(x)
            with model.disable_adapter():
                assert not torch.allclose(model(x), adapted)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
