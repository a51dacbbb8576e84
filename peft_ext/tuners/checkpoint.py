"""Reading a checkpoint in either format, as an adapted model takes it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peft_ext.serialization import adapterhub, hf_peft
from peft_ext.tuners.adapterhub.layouts import LAYOUTS, BaseModel
from peft_ext.tuners.adapterhub.reading import from_adapterhub, head_modules, is_flexible

_KEY = "base_model.model."


def read_checkpoint(folder: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter's configuration and tensors, keyed as Hugging Face PEFT has them.

    Of AdapterHub's format the head is left out, with a warning, where the model has no such modules.

    Args:
        folder: in Hugging Face PEFT's format, which this library's own is too, or in AdapterHub's.
        model: the model that the adapter is for.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if its files are damaged, or what they hold is not supported.
    """
    if not adapterhub.is_adapterhub(folder):
        return hf_peft.read_config(folder), hf_peft.read_weights(folder)
    stored = adapterhub.read(folder)
    if isinstance(stored, adapterhub.StoredAdapter):
        stored = _with_usable_head(stored, model)
    else:
        fused = {name: _with_usable_head(adapter, model) for name, adapter in stored.adapters.items()}
        stored = stored._replace(adapters=fused)
    config, tensors = from_adapterhub(stored, num_layers=_num_layers(model))
    return config, {_in_model(key, model): tensor for key, tensor in tensors.items()}


def _with_usable_head(stored: adapterhub.StoredAdapter, model: nn.Module) -> adapterhub.StoredAdapter:
    head = stored.head
    if head is None or (not is_flexible(head) and all(hasattr(model, name) for name in head_modules(head))):
        return stored
    warnings.warn(
        f"the adapter's prediction head, of a {head.config.get('model_class')}, is left out: "
        f"{type(model).__name__} has none like it",
        stacklevel=4,
    )
    return stored._replace(head=None)


def _num_layers(model: nn.Module) -> int | None:
    """How many layers a transformers model has, if its architecture is one that AdapterHub's adapters are read for."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in LAYOUTS:
        return None
    return BaseModel.of_model(model).num_layers


def _in_model(key: str, model: nn.Module) -> str:
    """A key of an adapter that was made for the same model with, or without, a head."""
    base = getattr(model, "base_model_prefix", "")
    if not base or not key.startswith(_KEY):
        return key
    path = key.removeprefix(_KEY)
    if hasattr(model, path.partition(".")[0]):
        return key
    return _KEY + (f"{base}.{path}" if hasattr(model, base) else path.removeprefix(f"{base}."))
