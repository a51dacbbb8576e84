"""Which modules of a model a configuration names."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from peft_ext.nn.quantized import QuantizedLinear
from peft_ext.tuners.config import TargetedConfig, TaskType
from peft_ext.tuners.layer import AdapterSlot, ModulesToSaveWrapper, TunerLayer, walk

ALL_LINEAR = "all-linear"
NO_TARGETS = "dummy-target-modules"
"""As ``target_modules``: no module is adapted, ``modules_to_save`` alone is trained. Hugging Face PEFT's word."""
SEQ_CLS_HEADS = ("classifier", "score")

_QUERY_VALUE = ("query", "value")
_Q_V_PROJ = ("q_proj", "v_proj")
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm", "vit"), _QUERY_VALUE),
    **dict.fromkeys(("llama", "llama4", "mistral", "mixtral", "stablelm", "qwen2", "qwen3"), _Q_V_PROJ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "bart", "opt", "gptj", "gpt_neo"), _Q_V_PROJ),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon", "chatglm"), ("query_key_value",)),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "mpt": ("Wqkv",),
}
"""``target_modules`` by a transformers configuration's ``model_type``, as in Hugging Face PEFT."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, a linear layer with its weight stored ``[in, out]``."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def resolve_target_modules(model: nn.Module, config: TargetedConfig) -> set[str] | str:
    """The configuration's ``target_modules`` with its defaults and shorthands written out."""
    targets = config.target_modules
    if targets is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in DEFAULT_TARGETS:
            raise ValueError(
                f"target_modules must be given for this model ({type(model).__name__}): "
                f"there is no default for model_type {model_type!r}"
            )
        return set(DEFAULT_TARGETS[model_type])
    if isinstance(targets, str):
        return _all_linear(model, config) if targets.lower() == ALL_LINEAR else targets
    return set(targets)


def find_target_modules(model: nn.Module, config: TargetedConfig) -> dict[str, nn.Module]:
    """The modules to adapt, by full name; ``config.target_modules`` must have been resolved.

    Layers that already carry adapters are found under the name of the module they stand for.

    Raises:
        ValueError: if there is none; it lists names that are near.
    """
    if config.target_modules == NO_TARGETS:
        return {}
    candidates = dict(outside_slots(model))
    named = {name: module for name, module in candidates.items() if _is_target(name, config)}
    found = {name: module for name, module in named.items() if not _is_excluded(name, config)}
    if not found:
        raise ValueError(_explain_no_match(candidates, named, config))
    _check_callable(found)
    _check_parents(model, found)
    if isinstance(config.target_modules, set):
        unmatched = sorted(t for t in config.target_modules if not any(has_suffix(name, t) for name in candidates))
        if unmatched:
            warnings.warn(f"target_modules {unmatched} match no module and are ignored", stacklevel=4)
    return found


def find_modules_to_save(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The outermost modules that ``names`` name, see :class:`TargetedConfig`."""
    names = tuple(names)
    found: dict[str, nn.Module] = {}
    for name, module in outside_slots(model):
        if _is_saved(name, names) and not any(is_within(name, outer) for outer in found):
            found[name] = module
    return found


def is_within(name: str, outer: str) -> bool:
    """Whether a module is another one, or inside of it; both by full name."""
    return name == outer or name.startswith(f"{outer}.")


def find_pattern_value(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that matches the end of ``name``, or ``default``."""
    matches = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(matches, default)


def outside_slots(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Named modules, without the model itself and without the insides of adapted ones."""
    inside: tuple[str, ...] = ()
    for name, module in walk(model):
        if not name or name.startswith(inside):
            continue
        if isinstance(module, AdapterSlot):
            inside = (f"{name}.",)  # the walk is done with earlier ones
        yield name, module


def has_suffix(name: str, suffix: str) -> bool:
    """Whether a full name ends with ``suffix``, in whole parts."""
    return name == suffix or name.endswith(f".{suffix}")


def _is_saved(name: str, names: Iterable[str]) -> bool:
    """Whether ``modules_to_save`` names the module.

    As in Hugging Face PEFT the end of a word is enough: its checkpoints of DistilBERT have ``pre_classifier``, which
    is nowhere named but by ``classifier``. A number must be whole: "1" does not name "11".
    """
    return any(has_suffix(name, end) or (name.endswith(end) and not end[:1].isdigit()) for end in names)


def _matches(patterns: Iterable[str] | str, name: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(has_suffix(name, suffix) for suffix in patterns)


def _is_target(name: str, config: TargetedConfig) -> bool:
    targets = config.target_modules
    if targets is None or not _matches(targets, name):
        return False
    # a full name is meant literally: layers_to_transform selects among suffixes
    if name in targets or config.layers_to_transform in (None, []):
        return True
    return _layer_index(name, config.layers_pattern) in _as_list(config.layers_to_transform)


def _layer_index(name: str, patterns: list[str] | str | None) -> int | None:
    """The first number in a module's name, or the one that follows the layer list's name."""
    for pattern in _as_list(patterns) or [r"[^.]*"]:
        match = re.match(rf"(?:.*?\.)??(?:{pattern})\.(\d+)\.", name)
        if match:
            return int(match.group(1))
    return None


def _as_list(value: object) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple | set) else [value]


def _is_excluded(name: str, config: TargetedConfig) -> bool:
    if config.exclude_modules and _matches(config.exclude_modules, name):
        return True
    # a module that is trained in full needs no adapter, in it or around it
    parts = name.split(".")
    around = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return any(_is_saved(outer, config.modules_to_save or ()) for outer in around)


def _all_linear(model: nn.Module, config: TargetedConfig) -> set[str]:
    head = _output_head(model, config)
    return {
        name
        for name, module in outside_slots(model)
        if _is_linear(module.base_layer if isinstance(module, TunerLayer) else module)
        and module is not head
        and not _is_attention_projection(module)
    }


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | QuantizedLinear) or is_conv1d(module)


def _is_attention_projection(module: nn.Module) -> bool:
    """Whether it is ``nn.MultiheadAttention``'s ``out_proj``, whose weight is read and never called."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _output_head(model: nn.Module, config: TargetedConfig) -> nn.Module | None:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if get_output_embeddings is None:
        return None
    head = get_output_embeddings()
    if head is None and config.task_type == TaskType.SEQ_CLS:
        head = next((getattr(model, name) for name in SEQ_CLS_HEADS if hasattr(model, name)), None)
    return head


def _check_callable(targets: Mapping[str, nn.Module]) -> None:
    """Refuses what an adapter could stand in for, but never be called as."""
    for name, module in targets.items():
        if isinstance(module, ModulesToSaveWrapper):
            raise ValueError(f"target module {name!r} is trained in full by another adapter of the model")
        if _is_attention_projection(module):
            raise ValueError(
                f"target module {name!r}: nn.MultiheadAttention reads its out_proj's weight without calling it: "
                "not supported"
            )


def _check_parents(model: nn.Module, names: Iterable[str]) -> None:
    """Torch's own encoder layer reads its linear layers' weights in inference, without calling them."""
    if torch.backends.mha.get_fastpath_enabled():
        for name in names:
            if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
                raise ValueError(
                    f"{name!r} is in an nn.TransformerEncoderLayer, whose fast path would pass the adapter over: "
                    "turn it off first by torch.backends.mha.set_fastpath_enabled(False)"
                )


def _explain_no_match(candidates: dict[str, nn.Module], named: Iterable[str], config: TargetedConfig) -> str:
    if named:
        return (
            f"all modules that target_modules {_shown(config.target_modules)} names are taken out again by "
            f"exclude_modules {_shown(config.exclude_modules)} or modules_to_save {config.modules_to_save}"
        )
    message = f"target_modules {_shown(config.target_modules)} matches no module of the model"
    if config.layers_to_transform is not None:
        message += f" (within layers_to_transform={config.layers_to_transform})"
    # both last parts and full names: people mistype either
    names = {part for name in candidates for part in (name, name.rpartition(".")[2])}
    wanted = _as_list(config.target_modules)
    near = {match for target in wanted for match in difflib.get_close_matches(target, names, n=5, cutoff=0.5)}
    if near:
        return f"{message}. Near names: {', '.join(sorted(near))}"
    kinds = {name.rpartition(".")[2] for name, module in candidates.items() if _is_linear(module)}
    return f"{message}. Its linear layers end with: {', '.join(sorted(kinds)) or 'none'}"


def _shown(value: object) -> object:
    return sorted(value) if isinstance(value, set) else repr(value)
