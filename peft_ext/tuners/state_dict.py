"""Which tensor of a checkpoint belongs to which parameter of an adapted model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from peft_ext.tuners.config import PeftConfig
from peft_ext.tuners.layer import AdapterSlot, Entry, TunerLayer, walk

if TYPE_CHECKING:
    from peft_ext.tuners.model import PeftModel

PREFIX = "base_model.model."
"""What an adapted model has before the name of a module in the plain model."""

SaveEmbeddings = bool | Literal["auto"]
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
_SHOWN_KEYS = 5
PROMPT_ENCODER = "prompt_encoder."


def adapter_entries(model: nn.Module, config: PeftConfig, adapter_name: str) -> list[Entry]:
    """The tensors that a checkpoint of the adapter must have.

    Args:
        model: the model inside the adapted one (``get_base_model()``).
        config: the adapter's configuration; it decides which biases belong to the adapter.
        adapter_name: which adapter.
    """
    own = [
        Entry(
            slot.checkpoint_key(config.checkpoint_prefix + name, key),
            model_key and f"{PREFIX}{name}.{model_key}",
            tensor,
        )
        for name, slot in _slots(model)
        for key, model_key, tensor in slot.entries(slot.parts(adapter_name), adapter_name)
    ]
    return own + [Entry(PREFIX + name, PREFIX + name, bias) for name, bias in trained_biases(model, config)]


def trained_biases(model: nn.Module, config: PeftConfig) -> Iterator[tuple[str, Tensor]]:
    """The base model's biases that ``config.bias`` adds to the adapter, by full name."""
    mode = getattr(config, "bias", "none")
    if mode == "none":
        return
    slots = dict(_slots(model))
    if mode == "all":
        inside = tuple(
            f"{name}.{part}." for name, slot in slots.items() for part in slot.part_names + slot.private_names
        )
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias" and not name.startswith(inside):
                yield name, parameter
    else:
        for name, slot in slots.items():
            if isinstance(slot, TunerLayer) and getattr(slot.base_layer, "bias", None) is not None:
                yield f"{name}.base_layer.bias", slot.base_layer.bias


def get_peft_model_state_dict(
    model: PeftModel,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    save_embedding_layers: SaveEmbeddings = "auto",
) -> dict[str, Tensor]:
    """One adapter's tensors, keyed as in a checkpoint: without the adapter's name.

    Args:
        model: the adapted model.
        state_dict: where values are taken from instead of the model, as when they were gathered
            from several processes; keyed as the model's own.
        adapter_name: which adapter.
        save_embedding_layers: whether the base model's input and output embeddings are included;
            "auto" includes them where they are targets, or have been resized.

    Raises:
        ValueError: if there is no such adapter, or ``state_dict`` lacks one of its tensors.
    """
    config = model.config_of(adapter_name)
    base = model.get_base_model()
    entries = adapter_entries(base, config, adapter_name)
    if save_embedding_layers == "auto":
        save_embedding_layers = _embeddings_changed(base, config)
    if save_embedding_layers:
        entries += _embedding_entries(base)
    if state_dict is None:
        return {entry.checkpoint_key: entry.tensor.detach() for entry in entries}
    missing = {entry.model_key for entry in entries if entry.model_key is not None} - state_dict.keys()
    if missing:
        raise ValueError(
            f"state_dict lacks tensors of adapter {adapter_name!r}: {'; '.join(_listed('missing', missing))}"
        )
    return {
        entry.checkpoint_key: entry.tensor.detach() if entry.model_key is None else state_dict[entry.model_key]
        for entry in entries
    }


def set_peft_model_state_dict(
    model: PeftModel, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Loads tensors, keyed as in a checkpoint, into an adapter that the model has.

    Raises:
        ValueError: if there is no such adapter, it is merged, a key is missing or unexpected, or a tensor does not
            fit or is not finite; the message names them, and nothing is changed.
    """
    config = model.config_of(adapter_name)
    if adapter_name in model.merged_adapters:
        raise ValueError(f"adapter {adapter_name!r} is merged: unmerge it before loading new values")
    with model.base_model.calls.changing([adapter_name]):
        load_tensors(model.get_base_model(), config, adapter_name, peft_model_state_dict)


@torch.no_grad()
def load_tensors(model: nn.Module, config: PeftConfig, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Checks that ``tensors`` are those of the adapter, then copies them. See :func:`adapter_entries`."""
    entries = adapter_entries(model, config, adapter_name)
    required = {entry.checkpoint_key: entry.tensor for entry in entries}
    known = {entry.checkpoint_key: entry.tensor for entry in _layer_entries(_embeddings(model))} | required
    tensors = {key: tensor for key, tensor in tensors.items() if not _is_redundant(key, required)}
    problems = differences(tensors, required, known)
    if problems:
        raise ValueError(f"the checkpoint does not fit adapter {adapter_name!r}: {'; '.join(problems)}")
    for key, tensor in tensors.items():
        known[key].copy_(_laid_out(tensor, known[key]))


def whole(tensor: Tensor) -> Tensor:
    """The tensor; if it is a DTensor, gathered from its shards by all processes together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _laid_out(tensor: Tensor, like: Any) -> Tensor:
    """``tensor``, which every process has read, as shards if ``like`` is a DTensor."""
    if not hasattr(like, "placements") or hasattr(tensor, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def differences(
    tensors: Mapping[str, Tensor], required: Mapping[str, Tensor], known: Mapping[str, Tensor]
) -> list[str]:
    """In words, what is wrong with a checkpoint that must have ``required`` tensors and may have ``known`` ones."""
    problems = [
        *_listed("missing", required.keys() - tensors.keys()),
        *_listed("unexpected", tensors.keys() - known.keys()),
        *(_misfit(key, tensors[key], known[key]) for key in sorted(tensors.keys() & known.keys())),
    ]
    return [problem for problem in problems if problem]


def _slots(model: nn.Module) -> Iterator[tuple[str, AdapterSlot]]:
    return ((name, module) for name, module in walk(model) if isinstance(module, AdapterSlot))


def _listed(kind: str, keys: Iterable[str]) -> Iterator[str]:
    names = sorted(keys)
    if names:
        more = f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
        yield f"{kind} keys: {', '.join(names[:_SHOWN_KEYS])}{more}"


def _misfit(key: str, found: Any, wanted: Tensor) -> str:
    if not isinstance(found, Tensor):
        return f"{key} is a {type(found).__name__} instead of a tensor"
    if found.shape != wanted.shape:
        return f"{key} has shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"
    if found.is_floating_point() != wanted.is_floating_point():
        return f"{key} has dtype {found.dtype} instead of {wanted.dtype}"
    if found.is_floating_point() and not found.to(wanted.dtype).isfinite().all():
        return f"{key} has values that are not finite in {wanted.dtype}"
    return ""


def _is_redundant(key: str, required: Iterable[str]) -> bool:
    """Whether an adapter can do without this.

    Hugging Face PEFT writes some biases with ``bias="all"`` though they are frozen, or written twice;
    and only further training needs the encoder that a prompt was made by.
    """
    if key.startswith(PROMPT_ENCODER):
        return not any(name.startswith(PROMPT_ENCODER) for name in required)
    return key.endswith((".original_module.bias", ".modules_to_save.bias"))


def _embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """The base model's input and output embeddings by full name; inside of their adapters, if they have any."""
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    layers = [getter() for getter in getters if getter is not None]
    plain = {getattr(layer, "base_layer", layer) for layer in layers}
    return {name: module for name, module in walk(model) if module in plain}


def _embedding_entries(model: nn.Module) -> list[Entry]:
    """The embeddings that are saved on demand: those with adapters, or all if none has any."""
    layers = _embeddings(model)
    adapted = {name: layer for name, layer in layers.items() if name.endswith(".base_layer")}
    return _layer_entries(adapted or layers)


def _layer_entries(layers: Mapping[str, nn.Module]) -> list[Entry]:
    return [
        Entry(f"{PREFIX}{name}.{key}", f"{PREFIX}{name}.{key}", tensor)
        for name, layer in layers.items()
        for key, tensor in layer.named_parameters(recurse=False)
    ]


def _embeddings_changed(model: nn.Module, config: PeftConfig) -> bool:
    """Whether embeddings are targets under their usual names, or have another size than the original's."""
    targets = {name.rpartition(".")[2] for name, slot in _slots(model) if isinstance(slot, TunerLayer)}
    if targets & set(_EMBEDDING_NAMES):
        warnings.warn("embedding layers are among the targets: the base model's are saved too", stacklevel=4)
        return True
    rows = getattr(getattr(model, "config", None), "vocab_size", None)
    original = Path(config.base_model_name_or_path or "") / "config.json"
    if rows is None or not original.is_file():
        return False
    return json.loads(original.read_text(encoding="utf-8")).get("vocab_size", rows) != rows
