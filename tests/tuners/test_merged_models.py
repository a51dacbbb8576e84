"""What a merged model is once it is saved: a plain transformers model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_ext import BitFitConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model

transformers = pytest.importorskip("transformers")

Make = Callable[[str], nn.Module]
Run = Callable[[nn.Module], Tensor]

CASES: dict[str, tuple[str, PeftConfig]] = {
    "bert classifier": ("bert", LoraConfig(r=2, task_type="SEQ_CLS", modules_to_save=["pooler"], bias="lora_only")),
    "bert dora": ("bert", LoraConfig(r=2, task_type="SEQ_CLS", use_dora=True)),
    "bert lokr": ("bert", LoKrConfig(r=2, task_type="SEQ_CLS")),
    "bert bitfit": ("bert", BitFitConfig(task_type="SEQ_CLS", modules_to_save=["classifier"])),
    "gpt2": ("gpt2", LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")),
    "llama": ("llama", LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "tied llama": ("tied llama", LoraConfig(r=2, task_type="CAUSAL_LM")),
    "tied llama, new embeddings": (
        "tied llama",
        LoraConfig(r=2, task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"]),
    ),
}

PLAIN = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    kind = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    auto = transformers.AutoModelForSequenceClassification if "Sequence" in kind else transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    wanted = torch.load(f"{folder}/wanted.pt")
    torch.testing.assert_close(model.eval()(wanted["ids"]).logits, wanted["logits"], rtol=1e-5, atol=1e-5)
assert not {name for name in sys.modules if name.startswith("peft_ext")}
"""


def make_base(tiny: Make, kind: str) -> Any:
    if kind != "tied llama":
        return tiny(kind)
    config = copy.deepcopy(tiny("llama").config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def entries(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def merged_folders() -> list[Path]:
    return []


@pytest.mark.parametrize("case", CASES)
def test_a_merged_folder_is_that_of_a_plain_model(
    case: str, tiny: Make, run: Run, tmp_path: Path, merged_folders: list[Path]
) -> None:
    kind, config = CASES[case]
    base = make_base(tiny, kind)
    if base.can_generate():
        base.generation_config.max_new_tokens = 7
    base.save_pretrained(tmp_path / "plain")
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    logits = run(model)
    merged: Any = model.merge_and_unload()
    folder = tmp_path / "merged"
    merged.save_pretrained(folder)
    assert type(merged) is type(base)

    untied = "new embeddings" in case
    wanted = entries(tmp_path / "plain")
    if untied:
        wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    assert entries(folder) == wanted
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "plain").iterdir()}
    for path in folder.glob("*.json"):
        values, before = json.loads(path.read_text()), json.loads((tmp_path / "plain" / path.name).read_text())
        if untied and path.name == "config.json":
            assert values.pop("tie_word_embeddings") is False
            assert before.pop("tie_word_embeddings") is True
        assert values == before
    if base.can_generate():
        assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 7

    loaded: Any = type(base).from_pretrained(folder).eval()
    torch.testing.assert_close(run(loaded), logits, rtol=1e-5, atol=1e-5)
    if "tied" in case:
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) != untied
    ids = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(1))
    torch.save({"ids": ids, "logits": logits.detach()}, folder / "wanted.pt")
    merged_folders.append(folder)


def test_merged_folders_load_without_this_library(merged_folders: list[Path], tmp_path: Path) -> None:
    assert merged_folders
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    done = subprocess.run([sys.executable, script, *merged_folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unloading_leaves_tied_weights_tied(tiny: Make) -> None:
    base = make_base(tiny, "tied llama")
    plain = get_peft_model(base, LoraConfig(r=2, modules_to_save=["lm_head"])).unload()
    assert plain.config.tie_word_embeddings is True
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:.*share their weight with other layers")
def test_adapters_of_both_of_two_tied_embeddings_come_out_to_the_bit(tiny: Make) -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False)
    model = get_peft_model(make_base(tiny, "tied llama"), config)
    weight = model.get_base_model().lm_head.weight
    before = weight.detach().clone()
    model.merge_adapter()
    assert not torch.equal(weight, before)
    model.unmerge_adapter()
    assert torch.equal(weight, before)
