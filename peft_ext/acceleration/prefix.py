"""Hugging Face PEFT's prefix tuning on ``prefix_attention``.

PEFT repeats the prefix for each sample in a key-value cache, and attention concatenates it with the keys of the text.
Here the cache keeps the two apart: it counts and returns the whole as before, but hands attention the text alone, and
the prefix, once, beside it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from peft import PeftType
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_ext.acceleration.report import Acceleration
from peft_ext.tuners.generation import cache_of
from peft_ext.tuners.prefix_tuning import ATTENTION, attention_forward

_SDPA = "sdpa"


class PrefixLayer(DynamicLayer):
    """One layer's keys and values ``[batch, heads, prefix + text, head_dim]``, those of the prefix kept once.

    Whoever reads ``keys`` or ``values`` gets them whole. Whoever sets them, or appends while attention does not ask
    for the text alone, gets the layer that PEFT would have made: the object then becomes a ``DynamicLayer``.

    Args:
        keys, values: of the prefix, ``[heads, prefix, head_dim]``.
        batch_size: how many samples share it.
    """

    def __init__(self, keys: Tensor, values: Tensor, batch_size: int) -> None:
        # not the base class's, which would set keys and values
        self.prefix = keys.transpose(0, 1), values.transpose(0, 1)
        self.batch_size = batch_size
        self.text: list[Tensor] | None = None
        self.text_only = False
        self.is_initialized = True
        self.device, self.dtype = keys.device, keys.dtype

    @property
    def keys(self) -> Tensor:
        """Of prefix and text."""
        return self._whole(0)

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self._become_plain(keys, self.values)

    @property
    def values(self) -> Tensor:
        """Of prefix and text."""
        return self._whole(1)

    @values.setter
    def values(self, values: Tensor) -> None:
        self._become_plain(self.keys, values)

    def _whole(self, part: int) -> Tensor:
        prefix = self.prefix[part].transpose(0, 1).expand(self.batch_size, -1, -1, -1)
        return prefix if self.text is None else torch.cat([prefix, self.text[part]], dim=-2)

    def _become_plain(self, keys: Tensor, values: Tensor) -> None:
        self.__class__ = DynamicLayer  # type: ignore[assignment]
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends text; returns the keys and values of the text, or of the whole, as attention asks for."""
        if not self.text_only:
            self._become_plain(self.keys, self.values)
            return self.update(key_states, value_states, *args, **kwargs)
        new = [key_states, value_states]
        self.text = new if self.text is None else [torch.cat(pair, dim=-2) for pair in zip(self.text, new, strict=True)]
        return self.text[0], self.text[1]

    def get_seq_length(self) -> int:
        """Of prefix and text."""
        return len(self.prefix[0]) + (0 if self.text is None else self.text[0].size(-2))


class PrefixPrompt:
    """Mixin before a ``PeftModel`` class: a prompt whose prefix is kept once."""

    def get_prompt(self, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; the cache that it returns reads as PEFT's does."""
        get_prompt = super().get_prompt  # type: ignore[misc]
        if prefix_reason(self, self.active_peft_config) is not None:  # type: ignore[attr-defined]
            return get_prompt(batch_size, *args, **kwargs)
        cache: Any = get_prompt(1, *args, **kwargs)
        cache.layers = [PrefixLayer(layer.keys[0], layer.values[0], batch_size) for layer in cache.layers]
        return cache


class PeftModel(PrefixPrompt, peft.PeftModel):
    """PEFT's, with a prefix that is kept once."""


class PeftModelForCausalLM(PrefixPrompt, peft.PeftModelForCausalLM):
    """PEFT's, with a prefix that is kept once."""


class PeftModelForFeatureExtraction(PrefixPrompt, peft.PeftModelForFeatureExtraction):
    """PEFT's, with a prefix that is kept once."""


class PeftModelForQuestionAnswering(PrefixPrompt, peft.PeftModelForQuestionAnswering):
    """PEFT's, with a prefix that is kept once."""


class PeftModelForSequenceClassification(PrefixPrompt, peft.PeftModelForSequenceClassification):
    """PEFT's, with a prefix that is kept once."""


class PeftModelForTokenClassification(PrefixPrompt, peft.PeftModelForTokenClassification):
    """PEFT's, with a prefix that is kept once."""


MODELS: dict[type[nn.Module], type[nn.Module]] = {
    peft.PeftModel: PeftModel,
    peft.PeftModelForCausalLM: PeftModelForCausalLM,
    peft.PeftModelForFeatureExtraction: PeftModelForFeatureExtraction,
    peft.PeftModelForQuestionAnswering: PeftModelForQuestionAnswering,
    peft.PeftModelForSequenceClassification: PeftModelForSequenceClassification,
    peft.PeftModelForTokenClassification: PeftModelForTokenClassification,
}
_ORIGINALS = {ours: original for original, ours in MODELS.items()}


def prefix_reason(model: Any, config: Any) -> str | None:
    """Why a prompt of PEFT's runs PEFT's code; None if the op computes what attention does."""
    if config.peft_type != PeftType.PREFIX_TUNING:
        return f"there is no op for {config.peft_type.value}"
    base = model.get_base_model().config
    if base.model_type not in ATTENTION or config.num_transformer_submodules != 1:
        return f"prefix tuning of a {base.model_type!r} is not known"
    if base._attn_implementation != _SDPA:
        return f"attn_implementation is {base._attn_implementation!r}, not {_SDPA!r}"
    if getattr(base, "sliding_window", None) is not None and getattr(base, "use_sliding_window", True):
        return "a sliding window hides the prefix from late tokens"
    return None


def accelerate_prompts(model: nn.Module, report: Acceleration) -> None:
    """Gives every ``PeftModel`` with prompts in a model our class, and its attention modules our hooks."""
    for name, module in model.named_modules():
        if isinstance(module, peft.PeftModel):
            _accelerate(f"{name}." if name else "", module, report)


def restore_prompts(model: nn.Module) -> None:
    """Undoes :func:`accelerate_prompts`."""
    for module in model.modules():
        if type(module) in _ORIGINALS:
            _restore(module)


def _accelerate(prefix: str, model: peft.PeftModel, report: Acceleration) -> None:
    original: type[nn.Module] = _ORIGINALS.get(type(model), type(model))
    prompts = {name: config for name, config in model.peft_config.items() if config.is_prompt_learning}
    reasons = {name: prefix_reason(model, config) for name, config in prompts.items()}
    if original not in MODELS:
        reasons = dict.fromkeys(prompts, f"there is no op for the prompts of a {original.__name__}")
    for name, reason in reasons.items():
        if reason is not None:
            report.left[f"{prefix}prompt_encoder.{name}"] = reason
    if None not in reasons.values():
        return
    _wrap_sdpa()
    model.__class__ = MODELS[original]  # type: ignore[assignment]
    for name, module in _attention_modules(model):
        report.layers[prefix + name] = "prefix_attention"
        if _offer_prefix not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_offer_prefix, with_kwargs=True)
            module.register_forward_hook(_withdraw_prefix, with_kwargs=True, always_call=True)


def _restore(model: Any) -> None:
    model.__class__ = _ORIGINALS[type(model)]
    for _, module in _attention_modules(model):
        _remove_hook(_offer_prefix, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        after = module._forward_hooks_with_kwargs, module._forward_hooks_always_called
        _remove_hook(_withdraw_prefix, module._forward_hooks, *after)


def _attention_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    pattern = ATTENTION[model.get_base_model().config.model_type]
    return ((name, module) for name, module in model.named_modules() if re.fullmatch(pattern, name))


def _remove_hook(hook: Callable[..., Any], hooks: dict[int, Any], *flags: dict[int, Any]) -> None:
    for key in [key for key, value in hooks.items() if value is hook]:
        for registered in (hooks, *flags):
            registered.pop(key, None)


def _prefix_layer(module: Any, kwargs: dict[str, Any]) -> PrefixLayer | None:
    """The module's layer of the cache, where that has a prefix of ours."""
    layers, index = getattr(cache_of(kwargs), "layers", []), getattr(module, "layer_idx", None)
    layer = layers[index] if index is not None and index < len(layers) else None
    return layer if isinstance(layer, PrefixLayer) else None


def _offer_prefix(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Before an attention module of transformers runs: it passes what it does not know on to :func:`_attention`."""
    layer = _prefix_layer(module, kwargs)
    if layer is None or module.config._attn_implementation != _SDPA or ALL_ATTENTION_FUNCTIONS[_SDPA] is not _attention:
        return None
    layer.text_only = True
    return args, {**kwargs, "peft_ext_prefix": layer.prefix}


def _withdraw_prefix(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    layer = _prefix_layer(module, kwargs)
    if layer is not None:
        layer.text_only = False


def _wrap_sdpa() -> None:
    """Lets transformers' function "sdpa" take a prefix. Without one it is what it was, for all models."""
    global _without_prefix
    if ALL_ATTENTION_FUNCTIONS[_SDPA] is not _attention:
        _without_prefix = ALL_ATTENTION_FUNCTIONS[_SDPA]
        ALL_ATTENTION_FUNCTIONS[_SDPA] = _attention


_without_prefix: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[_SDPA]


@functools.wraps(_without_prefix)
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    peft_ext_prefix: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if peft_ext_prefix is None:
        return _without_prefix(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None:
        # every query sees the prefix: PEFT's mask is True there
        attention_mask = attention_mask[..., len(peft_ext_prefix[0]) :]
    return attention_forward(module, query, key, value, attention_mask, prefix=peft_ext_prefix, **kwargs)
