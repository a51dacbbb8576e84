"""Prompts behind the embeddings: AdapterHub's form. Its real outputs are in tests/serialization/test_adapterhub.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_ext import HiddenPromptConfig, PeftModel, get_peft_model

Make = Callable[[str], nn.Module]
IDS = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def _prompt(model: nn.Module, name: str = "default") -> Tensor:
    return next(p for key, p in model.named_parameters() if key.endswith(f"prompt_encoder.{name}.embedding.weight"))


@torch.no_grad()
def _by_hand(base: Any, prompt: Tensor, mask: Tensor, after: int) -> Tensor:
    """The classifier's logits with the prompt put among the embedding module's output."""
    hidden = base.bert.embeddings(input_ids=IDS)
    hidden = torch.cat([hidden[:, :after], prompt.expand(2, -1, -1), hidden[:, after:]], dim=1)
    mask = torch.cat([torch.ones(2, len(prompt), dtype=mask.dtype), mask], dim=1)
    bias = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
    for layer in base.bert.encoder.layer:
        result = layer(hidden, attention_mask=bias)
        hidden = result[0] if isinstance(result, tuple) else result
    return base.classifier(base.bert.pooler(hidden))


@pytest.mark.parametrize(("combine", "after"), [("prefix", 0), ("prefix_after_bos", 1)])
def test_equals_the_definition(tiny: Make, combine: str, after: int) -> None:
    base = tiny("bert")
    base.set_attn_implementation("eager")
    model = get_peft_model(copy.deepcopy(base), HiddenPromptConfig(num_virtual_tokens=3, combine=combine)).eval()
    wanted = _by_hand(base, _prompt(model), MASK, after)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS, attention_mask=MASK).logits, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(IDS, MASK).logits, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            model(input_ids=IDS).logits,
            _by_hand(base, _prompt(model), torch.ones_like(IDS), after),
            rtol=1e-5,
            atol=1e-5,
        )


def test_trains_saves_and_switches(tiny: Make, run: Callable[[nn.Module], Tensor], tmp_path: Path) -> None:
    base = tiny("bert")
    plain = run(base)
    model = get_peft_model(base, HiddenPromptConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in names} == {"embedding", "default"}
    before = _prompt(model).detach().clone()
    model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    assert _prompt(model).grad is not None and _prompt(model).grad.abs().sum() > 0
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(tiny("bert"), tmp_path)), run(model))
    first = run(model)
    model.add_adapter("other", HiddenPromptConfig(num_virtual_tokens=2, combine="prefix_after_bos"))
    assert torch.equal(run(model), first)
    model.set_adapter("other")
    assert not torch.equal(run(model), first)
    with model.disable_adapter():
        torch.testing.assert_close(run(model), plain)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(run(copy.deepcopy(model)), first)
    assert torch.equal(_prompt(model), before)
    unloaded = model.unload()
    assert torch.equal(run(unloaded), plain)
    assert unloaded.get_input_embeddings() is unloaded.bert.embeddings.word_embeddings


def test_mistakes(tiny: Make, snapshot: Any, same: Any) -> None:
    with pytest.raises(ValueError, match="combine must be one of"):
        HiddenPromptConfig(num_virtual_tokens=2, combine="suffix")
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        HiddenPromptConfig()
    base = tiny("gpt2")
    before = snapshot(base)
    with pytest.raises(ValueError, match="one module 'embeddings', as BERT has: GPT2LMHeadModel has"):
        get_peft_model(base, HiddenPromptConfig(num_virtual_tokens=2))
    assert same(base, before)
    model = get_peft_model(tiny("bert"), HiddenPromptConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, length\]"):
        model(input_ids=IDS, attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match="only one prompt"):
        model.add_adapter("other", HiddenPromptConfig(num_virtual_tokens=2))
        model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="no weight that it could be merged into"):
        model.merge_and_unload()
