"""The methods that ``train --method`` knows: one entry each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from peft_ext.cli.errors import CliError
from peft_ext.tuners import LoraConfig, PeftConfig, TaskType
from peft_ext.tuners.targets import ALL_LINEAR, DEFAULT_TARGETS

HEAD_NAMES = ("classifier", "classification_head", "pooler", "pre_classifier", "score")
"""What transformers calls the parts between a pretrained body and the classes.

The pooler belongs to them: encoders trained for sentence embeddings do not use it, so it is as
untrained as the head.
"""


@dataclass(frozen=True)
class MethodOptions:
    """What the user chose about the adapter."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | None = None
    rslora: bool = False
    modules_to_save: str | None = None


@dataclass(frozen=True)
class Method:
    """How a method's configuration is made, and a learning rate that suits it."""

    config: Callable[[nn.Module, MethodOptions, TaskType], PeftConfig]
    lr: float


def lora_config(model: nn.Module, options: MethodOptions, task_type: TaskType) -> LoraConfig:
    """LoRA on the chosen modules, with the model's head trained in full."""
    return LoraConfig(
        task_type=task_type,
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        target_modules=_target_modules(model, options.target_modules),
        modules_to_save=_modules_to_save(model, options.modules_to_save),
    )


METHODS: dict[str, Method] = {"lora": Method(lora_config, lr=2e-3)}


def find_method(name: str) -> Method:
    """The method that ``--method`` names."""
    if name not in METHODS:
        raise CliError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]


def head_modules(model: nn.Module) -> list[str]:
    """The names of the model's head parts, each once."""
    last_names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in HEAD_NAMES if name in last_names]


def _split_names(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _target_modules(model: nn.Module, chosen: str | None) -> list[str] | str | None:
    if chosen is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        return None if model_type in DEFAULT_TARGETS else ALL_LINEAR
    return ALL_LINEAR if chosen == ALL_LINEAR else _split_names(chosen)


def _modules_to_save(model: nn.Module, chosen: str | None) -> list[str]:
    return head_modules(model) if chosen is None else _split_names(chosen)
