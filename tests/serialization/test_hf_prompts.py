"""Prompts against real Hugging Face PEFT."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peft_ext

peft = pytest.importorskip("peft")

Make = Callable[[str], nn.Module]
Greedy = Callable[[nn.Module, Tensor, int], Tensor]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")

TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
METHODS = {
    "prompt": ("PromptTuningConfig", {}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 8}),
    "lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"}),
}
CASES = [(kind, method) for kind in TASKS for method in METHODS]


def adapt(library: Any, base: nn.Module, kind: str, method: str) -> nn.Module:
    name, arguments = METHODS[method]
    config = getattr(library, name)(task_type=TASKS[kind], num_virtual_tokens=3, **arguments)
    model = library.get_peft_model(copy.deepcopy(base), config).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (2, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    labels = torch.tensor([0, 1]) if kind == "bert" else ids
    more = {"token_type_ids": torch.tensor([[0, 0, 1, 1, 1]] * 2)} if kind == "bert" else {}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **more}


def assert_equal_outputs(ours: nn.Module, theirs: nn.Module, kind: str, greedy: Greedy) -> None:
    with torch.no_grad():
        mine, other = ours(**inputs(kind)), theirs(**inputs(kind))
    torch.testing.assert_close(mine.logits, other.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(mine.loss, other.loss, rtol=0, atol=1e-6)
    if kind == "bert":
        return
    ids = inputs(kind)["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    made = ours.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(made, greedy(theirs, ids, 5))


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_we_load_pefts(tiny: Make, greedy: Greedy, tmp_path: Path, kind: str, method: str) -> None:
    theirs = adapt(peft, tiny(kind), kind, method)
    theirs.save_pretrained(tmp_path)
    assert_equal_outputs(peft_ext.PeftModel.from_pretrained(tiny(kind), tmp_path), theirs, kind, greedy)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_peft_loads_ours(tiny: Make, greedy: Greedy, tmp_path: Path, kind: str, method: str) -> None:
    ours = adapt(peft_ext, tiny(kind), kind, method)
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():  # an encoder in the file is no cause for complaint
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(tiny(kind), tmp_path)
    assert_equal_outputs(ours, theirs, kind, greedy)
    loaded = {name for name in load_file(tmp_path / "adapter_model.safetensors") if "prompt_encoder" not in name}
    head = {f"base_model.classifier.{name}" for name in ("weight", "bias")} if kind == "bert" else set()
    assert loaded == {"prompt_embeddings"} | head
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys() == loaded


@pytest.mark.parametrize("method", METHODS)
def test_an_open_gate_and_gradients_equal_pefts(tiny: Make, method: str) -> None:
    ours, theirs = adapt(peft_ext, tiny("llama"), "llama", method), adapt(peft, tiny("llama"), "llama", method)
    mine = ours.get_input_embeddings().prompt_encoder["default"]
    other = theirs.prompt_encoder["default"]
    assert mine.state_dict().keys() == other.state_dict().keys()
    mine.load_state_dict(other.state_dict())
    for model in (ours, theirs):
        model(**inputs("llama")).loss.backward()
    for (name, parameter), (_, twin) in zip(mine.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad, msg=name)


@pytest.mark.parametrize("name", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_fields_and_defaults_are_pefts(name: str) -> None:
    theirs = getattr(peft, name)(num_virtual_tokens=4).to_dict()
    ours = getattr(peft_ext, name)(num_virtual_tokens=4).to_dict()
    assert theirs.keys() == ours.keys()
    assert {key: value for key, value in theirs.items() if ours[key] != value}.keys() <= {"peft_version"}


def test_a_gated_prompt_in_peft(tiny: Make, greedy: Greedy, tmp_path: Path) -> None:
    config = peft_ext.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8, gated=True
    )
    ours = peft_ext.get_peft_model(tiny("llama"), config).eval()
    with torch.no_grad():
        ours.get_input_embeddings().prompt_encoder["default"].gate.mul_(0.5)
    ours.save_pretrained(tmp_path)
    assert dataclasses.asdict(peft_ext.PeftConfig.from_pretrained(tmp_path))["gated"] is True
    with pytest.warns(UserWarning, match="gated"):
        theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert_equal_outputs(ours, theirs, "llama", greedy)
