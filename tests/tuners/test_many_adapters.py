"""The work of adding and loading adapters, counted: calls of Python functions, which no busy machine changes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from peft_ext import LoraConfig, PeftModel, get_peft_model

transformers = pytest.importorskip("transformers")


def python_calls(function: Callable[[], object]) -> int:
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def llama(layers: int) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def config() -> LoraConfig:
    return LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def test_loading_does_not_grow_with_the_adapters_present(tmp_path):
    get_peft_model(llama(3), config()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(3), tmp_path)
    calls = [python_calls(lambda name=i: model.load_adapter(tmp_path, f"adapter{name}")) for i in range(20)]
    assert max(calls[10:]) <= 1.1 * min(calls[1:5])
    # nor with their parts' modes: what is loaded for inference is in evaluation, whatever was before
    model.train()
    model.load_adapter(tmp_path, "last")
    assert not any(module.training for module in model.modules())


def test_injecting_grows_with_the_layers_alone():
    calls = [python_calls(lambda layers=n: get_peft_model(llama(layers), config())) for n in (4, 8)]
    made = [python_calls(lambda layers=n: llama(layers)) for n in (4, 8)]
    assert calls[1] - made[1] <= 2.2 * (calls[0] - made[0])
