"""The methods that ``train --method`` knows: one entry each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from peft_ext.cli.errors import CliError
from peft_ext.tuners import (
    BitFitConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    HoulsbyConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PfeifferConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    SideTuningConfig,
    TaskType,
)
from peft_ext.tuners.targets import ALL_LINEAR, DEFAULT_TARGETS, NO_TARGETS

HEAD_NAMES = ("classifier", "classification_head", "pooler", "pre_classifier", "score")
"""What transformers calls the parts between a pretrained body and the classes.

The pooler belongs to them: encoders trained for sentence embeddings do not use it, so it is as
untrained as the head.
"""


@dataclass(frozen=True)
class MethodOptions:
    """What can be chosen about an adapter: every option of every method, each an option of ``train``.

    A method reads those that its entry in :data:`METHODS` lists; they are there filled in.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | None = None
    rslora: bool = False
    reduction_factor: int = 16
    num_virtual_tokens: int = 20
    side_layers: int = 2
    modules_to_save: str | None = None


@dataclass(frozen=True)
class Method:
    """How a method's configuration is made.

    Args:
        config: makes it for a model; None trains the whole model instead of an adapter.
        lr: a learning rate that suits it.
        defaults: the options that it takes, by their names in :class:`MethodOptions`, with the values
            that suit it. Every adapter takes ``modules_to_save`` besides.
        merges: whether the weights of a plain model can hold what it learned.
    """

    config: Callable[[nn.Module, MethodOptions, TaskType], PeftConfig] | None
    lr: float
    defaults: Mapping[str, Any] = field(default_factory=dict)
    merges: bool = False


def lora_config(model: nn.Module, options: MethodOptions, task_type: TaskType) -> LoraConfig:
    """LoRA on the chosen modules, with the model's head trained in full."""
    return LoraConfig(
        task_type=task_type,
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        target_modules=target_modules(model, options.target_modules),
        modules_to_save=modules_to_save(model, options.modules_to_save),
    )


def head_config(model: nn.Module, options: MethodOptions, task_type: TaskType) -> LoraConfig:
    """The head alone, the yardstick: LoRA on no module, as Hugging Face PEFT writes it."""
    head = modules_to_save(model, options.modules_to_save)
    if not head:
        raise ValueError(f"{type(model).__name__} has no head to train alone: name modules with --modules-to-save")
    return LoraConfig(task_type=task_type, target_modules=NO_TARGETS, modules_to_save=head)


def houlsby_config(model: nn.Module, options: MethodOptions, task_type: TaskType) -> HoulsbyConfig:
    """Adapters after attention and FFN; the layer norms and the model's head train too."""
    return HoulsbyConfig(
        task_type=task_type,
        reduction_factor=options.reduction_factor,
        modules_to_save=modules_to_save(model, options.modules_to_save),
    )


def pfeiffer_config(model: nn.Module, options: MethodOptions, task_type: TaskType) -> PfeifferConfig:
    """An adapter after each FFN, with the model's head trained in full."""
    return PfeifferConfig(
        task_type=task_type,
        reduction_factor=options.reduction_factor,
        modules_to_save=modules_to_save(model, options.modules_to_save),
    )


def bitfit_config(model: nn.Module, options: MethodOptions, task_type: TaskType) -> BitFitConfig:
    """All biases, with the model's head trained in full."""
    return BitFitConfig(task_type=task_type, modules_to_save=modules_to_save(model, options.modules_to_save))


def side_config(model: nn.Module, options: MethodOptions, task_type: TaskType) -> SideTuningConfig:
    """The body's first layers beside it, with the head that is outside of the body trained in full."""
    body = getattr(model, "base_model_prefix", "")
    head = [name for name, _ in model.named_children() if name in HEAD_NAMES and name != body]
    chosen = head if options.modules_to_save is None else modules_to_save(model, options.modules_to_save)
    return SideTuningConfig(task_type=task_type, num_layers=options.side_layers, modules_to_save=chosen)


def prompt_config(model: nn.Module, options: MethodOptions, task_type: TaskType) -> PromptTuningConfig:
    """A prompt that begins with tokens of the vocabulary: random values learn far more slowly."""
    return PromptTuningConfig(
        task_type=task_type,
        num_virtual_tokens=options.num_virtual_tokens,
        prompt_tuning_init="SAMPLE_VOCAB",
        modules_to_save=modules_to_save(model, options.modules_to_save),
    )


def ptuning_config(model: nn.Module, options: MethodOptions, task_type: TaskType) -> PromptEncoderConfig:
    """A prompt that an MLP makes."""
    return PromptEncoderConfig(
        task_type=task_type,
        num_virtual_tokens=options.num_virtual_tokens,
        modules_to_save=modules_to_save(model, options.modules_to_save),
    )


def lokr_config(model: nn.Module, options: MethodOptions, task_type: TaskType) -> LoKrConfig:
    """LoKr on the chosen modules, with the model's head trained in full."""
    return LoKrConfig(
        task_type=task_type,
        r=options.rank,
        alpha=options.alpha,
        rank_dropout=options.dropout,
        target_modules=target_modules(model, options.target_modules),
        modules_to_save=modules_to_save(model, options.modules_to_save),
    )


def compacter_config(
    kind: type[CompacterConfig], model: nn.Module, options: MethodOptions, task_type: TaskType
) -> CompacterConfig:
    """Adapters of Kronecker products, with the model's head trained in full."""
    return kind(
        task_type=task_type,
        reduction_factor=options.reduction_factor,
        phm_init_range=1e-2,
        modules_to_save=modules_to_save(model, options.modules_to_save),
    )


def prefix_config(model: nn.Module, options: MethodOptions, task_type: TaskType) -> PrefixTuningConfig:
    """A prefix in every layer, made by an MLP as in its paper: the plain one learns far more slowly."""
    return PrefixTuningConfig(
        task_type=task_type,
        num_virtual_tokens=options.num_virtual_tokens,
        prefix_projection=True,
        modules_to_save=modules_to_save(model, options.modules_to_save),
    )


def ptuning_v2_config(model: nn.Module, options: MethodOptions, task_type: TaskType) -> PrefixTuningConfig:
    """P-tuning v2: a plain prefix in every layer, here with gates."""
    return replace(prefix_config(model, options, task_type), prefix_projection=False, gated=True)


METHODS: dict[str, Method] = {
    "head": Method(head_config, lr=2e-3, merges=True),
    "full": Method(None, lr=1e-4),
    "lora": Method(
        lora_config,
        lr=2e-3,
        defaults={"rank": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": None, "rslora": False},
        merges=True,
    ),
    "houlsby": Method(houlsby_config, lr=2e-3, defaults={"reduction_factor": 16}),
    "pfeiffer": Method(pfeiffer_config, lr=2e-3, defaults={"reduction_factor": 16}),
    "bitfit": Method(bitfit_config, lr=5e-3, merges=True),
    "side": Method(side_config, lr=5e-4, defaults={"side_layers": 2}),
    "prompt": Method(prompt_config, lr=1e-2, defaults={"num_virtual_tokens": 20}),
    "ptuning": Method(ptuning_config, lr=6e-3, defaults={"num_virtual_tokens": 20}),
    "ptuning-v2": Method(ptuning_v2_config, lr=1e-2, defaults={"num_virtual_tokens": 20}),
    "prefix": Method(prefix_config, lr=2e-3, defaults={"num_virtual_tokens": 20}),
    "compacter": Method(partial(compacter_config, CompacterConfig), lr=5e-3, defaults={"reduction_factor": 32}),
    "compacter++": Method(
        partial(compacter_config, CompacterPlusPlusConfig), lr=5e-3, defaults={"reduction_factor": 32}
    ),
    "lokr": Method(
        lokr_config,
        lr=5e-3,
        defaults={"rank": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": None},
        merges=True,
    ),
}


def find_method(name: str) -> Method:
    """The method that ``--method`` names."""
    if name not in METHODS:
        raise CliError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]


def choose_options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a method: its defaults, and what was given instead.

    Args:
        method: its name.
        given: options by name; None where the user gave none.

    Raises:
        CliError: for an option that the method does not take.
    """
    options = dict(find_method(method).defaults)
    if find_method(method).config is not None:
        options["modules_to_save"] = None
    chosen = {name: value for name, value in given.items() if value is not None}
    foreign = [_flag(name) for name in chosen if name not in options]
    if foreign:
        known = ", ".join(map(_flag, options)) or "none"
        raise CliError(f"method {method!r} has no option {', '.join(foreign)}: it takes {known}")
    return options | chosen


def option_help(name: str, text: str) -> str:
    """An option's help, with the methods that take it and their defaults."""
    defaults = {key: method.defaults[name] for key, method in METHODS.items() if name in method.defaults}
    shown = (key if value in (None, False) else f"{key} {value:g}" for key, value in defaults.items())
    return f"{text} For: {', '.join(shown)}."


def head_modules(model: nn.Module) -> list[str]:
    """The names of the model's head parts, each once."""
    last_names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in HEAD_NAMES if name in last_names]


def target_modules(model: nn.Module, chosen: str | None) -> list[str] | str | None:
    """``--target-modules`` as a configuration takes it; all linear layers if the model's type has no default."""
    if chosen is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        return None if model_type in DEFAULT_TARGETS else ALL_LINEAR
    return ALL_LINEAR if chosen == ALL_LINEAR else _split_names(chosen)


def modules_to_save(model: nn.Module, chosen: str | None) -> list[str]:
    """``--modules-to-save`` as a configuration takes it; by default the model's head."""
    return head_modules(model) if chosen is None else _split_names(chosen)


def _split_names(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
