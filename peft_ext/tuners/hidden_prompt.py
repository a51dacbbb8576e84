"""Prompt tuning in AdapterHub's form: virtual tokens among the first hidden states, behind the embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_ext.nn.prompt import PromptEmbedding, prepend
from peft_ext.tuners.base import TUNER_CLASSES, Placement
from peft_ext.tuners.config import CONFIG_CLASSES, PeftType
from peft_ext.tuners.layer import StandIn, adapter_dtype
from peft_ext.tuners.prompt_learning import PromptLayer, PromptLearningConfig, PromptLearningModel

COMBINE = ("prefix", "prefix_after_bos")
_INIT_RANGE = 0.5
_EMBEDDINGS = "embeddings"


@dataclass
class HiddenPromptConfig(PromptLearningConfig):
    """Configuration of prompt tuning in AdapterHub's form, for encoders such as BERT.

    The virtual tokens come after the embedding module, which so adds no positions to them and does not normalise them;
    the text keeps its positions. :class:`PromptTuningConfig` has them before it, as Hugging Face PEFT does. The two are
    trained alike, but one's prompt is of no use to the other.

    Args:
        combine: "prefix", before the text, or "prefix_after_bos", after its first token.

    The arguments of :class:`PromptLearningConfig` and :class:`PeftConfig` give length and task.

    Raises:
        ValueError, TypeError: for a value out of range.

    Example:
        >>> from peft_ext import HiddenPromptConfig
        >>> HiddenPromptConfig(num_virtual_tokens=8).peft_type
        <PeftType.HIDDEN_PROMPT: 'HIDDEN_PROMPT'>
    """

    combine: str = "prefix"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.HIDDEN_PROMPT
        if self.combine not in COMBINE:
            raise ValueError(f"combine must be one of {COMBINE}, got {self.combine!r}")


class HiddenPromptLayer(StandIn, PromptLayer):
    """A model's embedding module and, by name, the prompts that can go into its output."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__(base_layer)
        self.after_first: dict[str, bool] = {}

    def detach_adapter(self, adapter_name: str) -> None:
        super().detach_adapter(adapter_name)
        self.after_first.pop(adapter_name, None)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden = self.base_layer(*args, **kwargs)
        prompt = self.prompt()
        if prompt is None:
            return hidden
        first = hidden[:, : int(self.after_first[self.active_adapters[0]])]
        return torch.cat([first, prepend(prompt, hidden[:, first.size(1) :])], dim=1)


class HiddenPromptModel(PromptLearningModel[HiddenPromptConfig]):
    """A model with prompts among its first hidden states. One is active at a time, for all rows of a batch."""

    mixes = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._longest = None  # virtual tokens take no positions

    def build(self, config: HiddenPromptConfig, **factory: Any) -> PromptEmbedding:
        assert config.num_virtual_tokens is not None and config.token_dim is not None
        prompt = PromptEmbedding(config.num_virtual_tokens, config.token_dim, **factory)
        nn.init.uniform_(prompt.embedding.weight, -_INIT_RANGE, _INIT_RANGE)
        return prompt

    def plan(self, adapter_name: str, config: HiddenPromptConfig, autocast_adapter_dtype: bool) -> list[Placement]:
        name, module = self._embedding_module()
        weight = self._embeddings(config)[1].weight
        dtype = adapter_dtype(weight.dtype, autocast_adapter_dtype)
        part = {"prompt_encoder": self.build(config, device=weight.device, dtype=dtype)}

        def install(layer: HiddenPromptLayer) -> None:
            layer.attach(adapter_name, part)
            layer.after_first[adapter_name] = config.combine == "prefix_after_bos"

        return [Placement(name, module, HiddenPromptLayer, install, lambda _: self._listen())]

    def _embedding_module(self) -> tuple[str, nn.Module]:
        """The module that makes the first hidden states of token ids, with its full name."""
        found = [(n, m) for n, m in self.model.named_modules() if n.rpartition(".")[2] == _EMBEDDINGS]
        if len(found) != 1:
            raise ValueError(
                "HIDDEN_PROMPT needs an encoder with one module 'embeddings', as BERT has: "
                f"{type(self.model).__name__} has {[name for name, _ in found]}"
            )
        return found[0]

    def _listen(self) -> None:
        if not self._hooks:
            self._hooks = [self.model.register_forward_pre_hook(self._lengthen_mask, with_kwargs=True)]

    def _lengthen_mask(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        layer = self._embedding_module()[1]
        prompt = layer.prompt() if isinstance(layer, HiddenPromptLayer) else None
        if prompt is None:
            return None
        inputs = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        mask = inputs.get("attention_mask")
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError(f"with a prompt, attention_mask must be [batch, length], got {mask!r}")
        return (), inputs | {"attention_mask": F.pad(mask, (len(prompt), 0), value=1)}


CONFIG_CLASSES[PeftType.HIDDEN_PROMPT] = HiddenPromptConfig
TUNER_CLASSES[PeftType.HIDDEN_PROMPT] = HiddenPromptModel
