"""Real AdapterHub, run as a program by an interpreter that has it: it writes what we read, and reads what we write.

    python adapterhub_peer.py write FOLDER   # base models, adapters of random weights, and their outputs
    python adapterhub_peer.py read FOLDER    # outputs of the adapters that others have written, by FOLDER/jobs.json

tests/serialization/data/adapterhub is what ``write`` wrote, with the versions that its README.md names. Needs torch,
transformers, safetensors and adapters, and nothing of peft_ext.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import composition
from safetensors.torch import save_file
from torch import nn

SMALL: dict[str, Any] = {"vocab_size": 30, "attn_implementation": "eager", "initializer_range": 0.3}
LAYERS: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BASES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, **LAYERS, max_position_embeddings=16)
    ),
    "bert-bare": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, **LAYERS, max_position_embeddings=16)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**SMALL, **LAYERS, max_position_embeddings=16)
    ),
    "xlm-roberta": lambda: transformers.XLMRobertaForSequenceClassification(
        transformers.XLMRobertaConfig(**SMALL, **LAYERS, max_position_embeddings=16)
    ),
    "electra": lambda: transformers.ElectraForSequenceClassification(
        transformers.ElectraConfig(**SMALL, **LAYERS, embedding_size=8, max_position_embeddings=16)
    ),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(**SMALL, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SMALL, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, **(LAYERS | {"num_attention_heads": 4}), num_key_value_heads=2)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SMALL, **(LAYERS | {"num_attention_heads": 4}), num_key_value_heads=2)
    ),
}

FEW = {"reduction_factor": 4}
CASES: dict[str, tuple[str, adapters.AdapterConfig]] = {
    "bert-double_seq_bn": ("bert", adapters.DoubleSeqBnConfig(**FEW)),
    "bert-seq_bn": ("bert", adapters.SeqBnConfig(**FEW)),
    "bert-seq_bn-options": (
        "bert",
        adapters.SeqBnConfig(
            reduction_factor=5.3, non_linearity="gelu_new", scaling=0.7, leave_out=[1], dropout=0.1, mh_adapter=True
        ),
    ),
    "bert-seq_bn-learned_scaling": ("bert", adapters.SeqBnConfig(**FEW, scaling="learned", non_linearity="tanh")),
    "bert-compacter": ("bert", adapters.CompacterConfig(**FEW, phm_dim=2)),
    "bert-compacter-factorized": (
        "bert",
        adapters.CompacterConfig(**FEW, phm_dim=2, phm_rank=2, factorized_phm_rule=True, phm_bias=False),
    ),
    "bert-compacter++": ("bert", adapters.CompacterPlusPlusConfig(**FEW, phm_dim=2)),
    "bert-lora": ("bert", adapters.LoRAConfig(r=4, alpha=16)),
    "bert-lora-everywhere": (
        "bert",
        adapters.LoRAConfig(
            r=2, alpha=3, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True, leave_out=[0]
        ),
    ),
    "bert-prefix_tuning": ("bert", adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=4)),
    "bert-prefix_tuning_flat": ("bert", adapters.PrefixTuningConfig(prefix_length=3, flat=True)),
    "bert-prompt_tuning": ("bert", adapters.PromptTuningConfig(prompt_length=3)),
    "bert-prompt_tuning-after_bos": ("bert", adapters.PromptTuningConfig(prompt_length=3, combine="prefix_after_bos")),
    "bert-bare-seq_bn": ("bert-bare", adapters.SeqBnConfig(**FEW)),
    "roberta-seq_bn": ("roberta", adapters.SeqBnConfig(**FEW)),
    "roberta-lora": ("roberta", adapters.LoRAConfig(r=2, alpha=4)),
    "roberta-prompt_tuning": ("roberta", adapters.PromptTuningConfig(prompt_length=3)),
    "xlm-roberta-lora": ("xlm-roberta", adapters.LoRAConfig(r=2, alpha=4)),
    "electra-double_seq_bn": ("electra", adapters.DoubleSeqBnConfig(**FEW)),
    "electra-prompt_tuning": ("electra", adapters.PromptTuningConfig(prompt_length=3)),
    "distilbert-double_seq_bn": ("distilbert", adapters.DoubleSeqBnConfig(**FEW)),
    "distilbert-seq_bn": ("distilbert", adapters.SeqBnConfig(**FEW)),
    "distilbert-lora": ("distilbert", adapters.LoRAConfig(r=2, alpha=4, intermediate_lora=True, output_lora=True)),
    "gpt2-double_seq_bn": ("gpt2", adapters.DoubleSeqBnConfig(**FEW)),
    "gpt2-seq_bn": ("gpt2", adapters.SeqBnConfig(**FEW)),
    "gpt2-compacter++": ("gpt2", adapters.CompacterPlusPlusConfig(**FEW, phm_dim=2)),
    "gpt2-lora": ("gpt2", adapters.LoRAConfig(r=2, alpha=4)),
    "gpt2-lora-everywhere": (
        "gpt2",
        adapters.LoRAConfig(r=2, alpha=3, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True),
    ),
    "gpt2-prefix_tuning": ("gpt2", adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=4)),
    "llama-double_seq_bn": ("llama", adapters.DoubleSeqBnConfig(**FEW)),
    "llama-seq_bn": ("llama", adapters.SeqBnConfig(**FEW)),
    "llama-lora": ("llama", adapters.LoRAConfig(r=2, alpha=4, intermediate_lora=True, output_lora=True)),
    "llama-prefix_tuning": ("llama", adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=4)),
    "mistral-lora": ("mistral", adapters.LoRAConfig(r=2, alpha=4)),
    "mistral-seq_bn": ("mistral", adapters.SeqBnConfig(**FEW)),
}
FUSIONS = {
    "bert-fusion": ("bert", adapters.SeqBnConfig, "dynamic"),
    "bert-fusion-static-double": ("bert", adapters.DoubleSeqBnConfig, "static"),
    "gpt2-fusion": ("gpt2", adapters.SeqBnConfig, "dynamic"),
}
PICKLED = (
    "bert-double_seq_bn",
    "bert-seq_bn",
    "bert-compacter",
    "bert-prompt_tuning",
    "gpt2-lora",
    "bert-fusion-static-double",
)
"""The cases that are written as ``.bin``, beside prefixes, for which AdapterHub's safetensors fail."""


def is_safe(case: str) -> bool:
    """Whether a case is written as safetensors."""
    return case not in PICKLED and "prefix" not in case


def inputs() -> dict[str, torch.Tensor]:
    """Two texts, the second with two tokens of padding."""
    ids = torch.randint(2, 30, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head."""
    result = model.eval()(**inputs())
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Moves what AdapterHub would train: adapters, fusions and the head."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))


def build(base: str, folder: Path) -> nn.Module:
    """The base model with AdapterHub's layers in it, and no adapter yet."""
    kind = type(BASES[base]())
    model = kind.from_pretrained(folder / "bases" / base, attn_implementation="eager")
    model.config.name_or_path = f"tiny-{base}"
    adapters.init(model)
    return model


def write(folder: Path) -> None:
    """Everything that tests/serialization/test_adapterhub.py reads."""
    for name, make in BASES.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / "bases" / name)
    outputs = {}
    for case, (base, config) in CASES.items():
        torch.manual_seed(1)
        model = build(base, folder)
        model.add_adapter("task", config=config)
        model.train_adapter("task")
        randomise(model)
        model.save_adapter(str(folder / case), "task", use_safetensors=is_safe(case))
        outputs[case] = output(model)
    for case, (base, config, fusion) in FUSIONS.items():
        torch.manual_seed(1)
        model = build(base, folder)
        setup = composition.Fuse("first", "second")
        for index, name in enumerate(setup):
            model.add_adapter(name, config=config(reduction_factor=4 - index))
        model.add_adapter_fusion(setup, config=fusion)
        model.train_adapter_fusion(setup, unfreeze_adapters=True)
        randomise(model)
        model.save_adapter_setup(str(folder / case), setup, use_safetensors=is_safe(case))
        outputs[case] = output(model)
    save_file(outputs, folder / "outputs.safetensors")


def read(folder: Path) -> None:
    """Loads each job's adapter as a user of AdapterHub would, and keeps its output."""
    jobs = json.loads((folder / "jobs.json").read_text())
    outputs = {}
    for name, job in jobs.items():
        model = build(job["base"], Path(job["bases"]))
        use = {"use_safetensors": job["safetensors"]}
        info: dict[str, list[str]] = {}
        if job["fusion"]:
            model.load_adapter_setup(job["folder"], set_active=True, **use)
        else:
            model.load_adapter(job["folder"], set_active=True, loading_info=info, **use)
        lost = [key for key in info.get("missing_keys", ()) if "adapter" in key or "lora" in key]
        if lost or info.get("unexpected_keys"):
            raise SystemExit(f"{name}: missing {lost}, unexpected {info.get('unexpected_keys')}")
        outputs[name] = output(model)
    save_file(outputs, folder / "outputs.safetensors")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
