"""Another adapter under the name of one that is there: in place, without compiling anew. Names are HF PEFT's."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_ext.nn._checks import check_sizes
from peft_ext.serialization import hf_peft
from peft_ext.tuners.config import PeftConfig
from peft_ext.tuners.lora import LoraConfig, layer_spec
from peft_ext.tuners.lora_layers import LoraConv2d, LoraLayer
from peft_ext.tuners.model import PeftModel
from peft_ext.tuners.state_dict import PREFIX, adapter_entries, differences

_FIXED = ("use_dora", "lora_dropout")
_CHECK_COMPILED = ("error", "warn", "ignore")
_RANK_DIMENSION = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}


class _Change(NamedTuple):
    """What an exchange does, prepared as far as it can fail."""

    values: list[tuple[Tensor, Tensor]]
    scalings: list[tuple[LoraLayer, float]]


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Puts a saved LoRA adapter in the place of one of the model's, which keeps its name.

    The values change in place, so a compiled model goes on with its graph, if the ranks are the same, or after
    :func:`prepare_model_for_compiled_hotswap`. Other threads may call the model meanwhile: calls that use the adapter
    are waited for, and later ones see the new values. (``torch.compile(model)`` runs without that lock: call
    ``model.compile()`` instead.) Layers that the new adapter does not have get an update of zero.

    Args:
        model: a :class:`PeftModel`, or one that ``torch.compile`` made.
        model_name_or_path: folder of the new adapter, or its repository on the Hugging Face hub.
        adapter_name: which adapter is exchanged.
        torch_device: Hugging Face PEFT's; the values go to where the old ones are.
        **kwargs: ``subfolder``, and what ``huggingface_hub.snapshot_download`` takes.

    Raises:
        FileNotFoundError: if there is no such adapter to read.
        TypeError: for a model that is no :class:`PeftModel`.
        ValueError: for damaged files, an adapter that does not fit, and one that is merged. The old one is then as it
            was.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from torch import nn
        >>> from peft_ext import LoraConfig, get_peft_model, hotswap_adapter
        >>> def adapted():
        ...     return get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> model, other = adapted(), adapted()
        >>> with TemporaryDirectory() as folder:
        ...     other.save_pretrained(folder)
        ...     hotswap_adapter(model, folder, "default")
        >>> key = "base_model.model.0.lora_A.default.weight"
        >>> torch.equal(model.state_dict()[key], other.state_dict()[key])
        True
    """
    model = _peft_model(model)
    folder = hf_peft.find_folder(model_name_or_path, kwargs.pop("subfolder", None), **kwargs)
    config = PeftConfig.from_dict(hf_peft.read_config(folder))
    hotswap_adapter_from_state_dict(model, hf_peft.read_weights(folder), adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, config: PeftConfig
) -> None:
    """As :func:`hotswap_adapter`, with tensors that are in memory, keyed as in a checkpoint.

    Args:
        model: a :class:`PeftModel`, or one that ``torch.compile`` made.
        state_dict: the new adapter's tensors, as :func:`get_peft_model_state_dict` gives them.
        adapter_name: which adapter is exchanged.
        config: the new adapter's configuration, for ranks and alphas.

    Raises:
        TypeError, ValueError: as :func:`hotswap_adapter`.
    """
    model = _peft_model(model)
    own = model.config_of(adapter_name)
    _check_configs(own, config)
    with model.base_model.calls.changing([adapter_name]):
        own = model.config_of(adapter_name)
        if adapter_name in model.base_model.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: unmerge it before it is exchanged")
        change = _plan(model, state_dict, adapter_name, config)
        _apply(change, adapter_name)
        _describe(model, adapter_name)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Makes room for adapters of other ranks and alphas, so that exchanging them does not compile the model anew.

    Ranks are filled up with zeros, and scalings become tensors. Call it after the adapters are added and before the
    model is compiled.

    Args:
        model: a :class:`PeftModel`.
        target_rank: the largest rank to come; None leaves the ranks alone.
        config: Hugging Face PEFT's: configurations whose ``r`` is to be ``target_rank`` from now on. The model's own
            are kept in step without it.
        check_compiled: what to do with a model that is compiled already: "error", "warn" or "ignore".

    Raises:
        TypeError: for a model that is no :class:`PeftModel`.
        ValueError: for a rank below one that is there, a compiled model, and one without LoRA. The model is then as
            it was.
    """
    if check_compiled not in _CHECK_COMPILED:
        raise ValueError(f"check_compiled must be one of {_CHECK_COMPILED}, got {check_compiled!r}")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        message = "prepare_model_for_compiled_hotswap must be called before the model is compiled"
        if check_compiled == "error":
            raise ValueError(message)
        if check_compiled == "warn":
            warnings.warn(f"{message}: it will be compiled anew", stacklevel=2)
    model = _peft_model(model)
    layers = [layer for _, layer in _lora_layers(model)]
    if not layers:
        raise ValueError("the model has no LoRA layer: load an adapter before this call")
    if target_rank is not None:
        check_sizes({"target_rank": target_rank})
    names = list(model.peft_config)
    with model.base_model.calls.changing(names):
        padded = [pair for layer in layers for pair in _padded_factors(layer, target_rank)]
        for factor, value in padded:
            factor.data = value
        for layer in layers:
            layer.scaling = {
                name: torch.as_tensor(value, dtype=torch.float64, device=layer.weight.device)
                for name, value in layer.scaling.items()
            }
        for name in names:
            _describe(model, name)
    configs = [config] if isinstance(config, LoraConfig) else list((config or {}).values())
    for other in configs:
        if target_rank is not None and all(other is not own for own in model.peft_config.values()):
            other.r = target_rank
            other.rank_pattern = dict.fromkeys(other.rank_pattern, target_rank)


def _peft_model(model: Any) -> PeftModel:
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a PeftModel, got {type(model).__name__}")
    return model


def _lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, slot) for name, slot in model.base_model.slots() if isinstance(slot, LoraLayer))


def _check_configs(own: PeftConfig, new: PeftConfig) -> None:
    for config in (own, new):
        if not isinstance(config, LoraConfig):
            raise ValueError(f"only adapters of peft_type LORA can be exchanged, got {config.peft_type}")
    for name in _FIXED:
        if getattr(own, name) != getattr(new, name):
            raise ValueError(
                f"the adapters cannot be exchanged: {name} is {getattr(own, name)!r} in the model "
                f"and {getattr(new, name)!r} in the new one"
            )


def _plan(model: PeftModel, tensors: Mapping[str, Tensor], adapter_name: str, config: Any) -> _Change:
    """Checks everything, and changes nothing."""
    entries = adapter_entries(model.get_base_model(), model.config_of(adapter_name), adapter_name)
    own = {entry.checkpoint_key: entry.tensor for entry in entries}
    required, values = dict(own), dict(tensors)
    scalings: list[tuple[LoraLayer, float]] = []
    for name, layer in _lora_layers(model):
        if adapter_name not in layer:
            continue
        factors = {key: own[key] for key in (f"{PREFIX}{name}.{factor}" for factor in _RANK_DIMENSION) if key in own}
        if not factors.keys() & tensors.keys() and not config.use_dora:
            values |= {key: torch.zeros_like(factor) for key, factor in factors.items()}
            continue
        spec = layer_spec(name, config)
        scalings.append((layer, spec.scaling))
        required |= {key: _of_rank(key, factor, spec.r, layer) for key, factor in factors.items()}
    problems = differences(values, required, required)
    if problems:
        raise ValueError(f"the checkpoint cannot take the place of adapter {adapter_name!r}: {'; '.join(problems)}")
    return _Change([(own[key], _filled_up(key, value, own[key])) for key, value in values.items()], scalings)


@torch.no_grad()
def _apply(change: _Change, adapter_name: str) -> None:
    for target, value in change.values:
        if target.shape == value.shape:
            target.copy_(value)
        else:
            target.data = value
    for layer, scaling in change.scalings:
        layer.put_scaling(adapter_name, scaling)


def _describe(model: PeftModel, adapter_name: str) -> None:
    """Makes the configuration, and what the layers know of it, say what the factors are: it may be saved."""
    config = model.config_of(adapter_name)
    if not isinstance(config, LoraConfig):
        return
    ranks, alphas = {}, {}
    for name, layer in _lora_layers(model):
        if adapter_name in layer:
            r = layer.rank_of(adapter_name)
            alpha = float(layer.scaling[adapter_name]) * (math.sqrt(r) if layer.use_rslora[adapter_name] else r)
            layer.r[adapter_name] = ranks[name] = r
            layer.lora_alpha[adapter_name] = alphas[name] = round(alpha) if math.isclose(alpha, round(alpha)) else alpha
    config.r, config.rank_pattern = _as_pattern(ranks, config.r)
    config.lora_alpha, config.alpha_pattern = _as_pattern(alphas, config.lora_alpha)


def _as_pattern(values: Mapping[str, Any], default: Any) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and the modules that have another."""
    if not values:
        return default, {}
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {re.escape(name): value for name, value in values.items() if value != common}


def _padded_factors(layer: LoraLayer, rank: int | None) -> list[tuple[Tensor, Tensor]]:
    """A layer's factors with the same ones of a larger rank."""
    pairs = []
    for name in layer.scaling:
        for entry in layer.entries(layer.parts(name), name):
            if rank is not None and entry.checkpoint_key in _RANK_DIMENSION:
                wanted = _of_rank(entry.checkpoint_key, entry.tensor, rank, layer)
                if any(new < old for new, old in zip(wanted.shape, entry.tensor.shape, strict=True)):
                    raise ValueError(f"target_rank is {rank}, but adapter {name!r} has rank {layer.rank_of(name)}")
                pairs.append((entry.tensor, _filled_up(entry.checkpoint_key, entry.tensor.detach(), wanted)))
    return pairs


def _rank_dimension(key: str) -> int | None:
    return next((dimension for end, dimension in _RANK_DIMENSION.items() if key.endswith(end)), None)


def _of_rank(key: str, factor: Tensor, rank: int, layer: LoraLayer) -> Tensor:
    """An empty tensor like the factor, but of this rank."""
    groups = layer.base_layer.groups if isinstance(layer, LoraConv2d) else 1
    dimension = _rank_dimension(key)
    assert dimension is not None
    own_rank = factor.size(dimension) * (groups if dimension else 1)
    if groups > 1 and rank != own_rank:
        raise ValueError(f"{key}: the rank of an adapter of a Conv2d with groups must stay {own_rank}, got {rank}")
    shape = list(factor.shape)
    shape[dimension] = rank // (groups if dimension else 1)
    return torch.empty(shape, dtype=factor.dtype, device="meta")


def _filled_up(key: str, value: Tensor, like: Tensor) -> Tensor:
    """The value in the dtype, and on the device, of ``like``, with zeros up to its rank if that is larger."""
    device = value.device if like.is_meta else like.device
    value = value.to(device=device, dtype=like.dtype)
    dimension = _rank_dimension(key)
    missing = 0 if dimension is None else like.size(dimension) - value.size(dimension)
    if missing <= 0:
        return value
    zeros = value.new_zeros([missing if d == dimension else size for d, size in enumerate(value.shape)])
    return torch.cat([value, zeros], dim=dimension or 0)
