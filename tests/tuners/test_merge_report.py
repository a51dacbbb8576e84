"""The report against what can be measured by hand, and the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_ext import (
    BitFitConfig,
    HoulsbyConfig,
    LoKrConfig,
    LoraConfig,
    MergeReport,
    PeftConfig,
    PromptTuningConfig,
    get_peft_model,
)

Make = Callable[[str], nn.Module]

CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, use_dora=True),
    "lokr": LoKrConfig(r=2, target_modules=["0", "2"], init_weights=False),
    "bitfit": BitFitConfig(),
    "head": LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, modules_to_save=["4"]),
}


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_figures(case: str, dtype: torch.dtype, tiny: Make, snapshot: Any, same: Any) -> None:
    base = tiny("mlp").to(dtype)
    plain = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, CONFIGS[case])
    randomise(model)
    model.train()
    inputs = torch.randn(5, 8, dtype=dtype)
    before, modes = snapshot(model), [module.training for module in model.modules()]
    report = model.merge_report(inputs)
    assert same(model, before)
    assert [module.training for module in model.modules()] == modes
    assert not model.merged_adapters

    model.eval()
    unmerged = model(inputs).detach()
    merged = model.merge_and_unload()
    after = dict(merged.named_parameters())
    changed = {name for name, weight in plain.items() if not torch.equal(after[name], weight)}
    assert {weight.name for weight in report.weights if weight.change} == changed
    for weight in report.weights:
        difference = (after[weight.name].detach().double() - plain[weight.name].double()).abs().max().item()
        assert weight.change == difference
        largest = torch.stack([after[weight.name], plain[weight.name]]).double().abs().max().item()
        assert weight.relative_change == difference / largest
        assert f"torch.{weight.dtype}" == str(dtype)
        eps = torch.finfo(dtype).eps
        assert weight.rounding_error <= 4 * eps * largest
        if dtype == torch.bfloat16 and weight.name == "0.weight" and case != "bitfit":
            assert weight.rounding_error > eps * largest / 16
    assert report.output_error == (merged(inputs).double() - unmerged.double()).abs().max().item()
    assert report.relative_output_error == report.output_error / unmerged.double().abs().max().item()
    assert report.relative_output_error < 16 * torch.finfo(dtype).eps
    assert report.change == max(weight.change for weight in report.weights)
    assert report.adapters == ["default"]


def test_an_update_below_the_steps_of_the_dtype_is_lost() -> None:
    base = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    nn.init.ones_(base[0].weight)
    model = get_peft_model(base, LoraConfig(r=1, target_modules=["0"]))
    layer = model.get_base_model()[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1)
        layer.lora_B["default"].weight.fill_(1e-4)
    (weight,) = model.merge_report().weights
    assert weight.change == 0
    assert weight.lost == pytest.approx(1)
    assert weight.rounding_error == pytest.approx(8e-4)


def test_other_adapters_than_the_active_one(tiny: Make) -> None:
    model = get_peft_model(tiny("bert"), LoraConfig(r=2, init_lora_weights=False, target_modules=["query"]), "a")
    model.add_adapter("b", LoraConfig(r=2, init_lora_weights=False, target_modules=["key"]))
    inputs = {"input_ids": torch.randint(50, (2, 5))}
    for names, found in ((["b"], {"key"}), (["a", "b"], {"query", "key"}), (None, {"query"})):
        with model.disable_adapter():
            report = model.merge_report(inputs, names)
        assert report.adapters == (names or ["a"])
        assert {weight.name.split(".")[-2] for weight in report.weights} == found
        assert report.change > 1e-3
        assert report.relative_output_error < 1e-5
        assert model.active_adapters == ["a"]
    logits = model(**inputs).logits
    assert torch.equal(model.merge_and_unload().eval()(**inputs).logits.argmax(-1), logits.argmax(-1))


def test_a_weight_that_is_tied_shows_in_the_outputs(tiny: Make) -> None:
    with pytest.warns(UserWarning, match="share their weight with other layers"):
        model = get_peft_model(tiny("gpt2"), LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False))
    report = model.merge_report({"input_ids": torch.randint(50, (2, 5))})
    assert report.relative_output_error > 1e-2


def test_it_is_printed_as_a_table(tiny: Make) -> None:
    model = get_peft_model(tiny("bert"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    report = model.merge_report(torch.randint(50, (2, 5)))
    lines = repr(report).splitlines()
    assert lines[0] == "merging default"
    assert lines[1].split() == ["weight", "dtype", "change", "relative", "rounding", "lost"]
    assert len(report.weights) == 14
    assert len(lines) == 2 + 10 + 2
    assert lines[-2].startswith("all 14 (4 not shown) ")
    assert lines[-1].startswith("outputs: within ")
    changes = [float(line.split()[2]) for line in lines[2:-2]]
    assert changes == sorted(changes, reverse=True)
    assert repr(model.merge_report()).endswith("outputs: not compared, as no inputs were given")
    assert repr(MergeReport([], [])).splitlines()[2].split()[0] == "all"


def test_errors(tiny: Make, snapshot: Any, same: Any) -> None:
    model = get_peft_model(tiny("mlp"), copy.deepcopy(CONFIGS["lora"]))
    before = snapshot(model)

    class Integers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).argmax(-1)

    for call, error, match in (
        (
            lambda: model.merge_report("text"),
            TypeError,
            "inputs must be a mapping, a list or tuple, or a tensor, got str",
        ),
        (lambda: model.merge_report(torch.zeros(1, 3)), ValueError, "x must be"),
        (lambda: model.merge_report(None, ["nope"]), ValueError, "there is no adapter 'nope'"),
        (
            lambda: get_peft_model(Integers(), LoraConfig(target_modules=["linear"])).merge_report(torch.zeros(1, 2)),
            ValueError,
            "has no floating-point tensor to compare",
        ),
        (
            lambda: get_peft_model(tiny("bert"), HoulsbyConfig()).merge_report(),
            ValueError,
            "bottleneck adapters cannot be merged",
        ),
        (
            lambda: get_peft_model(tiny("bert"), PromptTuningConfig(num_virtual_tokens=2)).merge_report(),
            ValueError,
            "a prompt is part of the input",
        ),
    ):
        with pytest.raises(error, match=match):
            call()
        assert same(model, before)
        assert not model.merged_adapters
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"unmerge \['default'\] first"):
        model.merge_report()
