"""Prompt tuning (Lester et al., 2021): virtual tokens before the text, each a free embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from peft_ext.nn.prompt import PromptEmbedding
from peft_ext.tuners.base import TUNER_CLASSES
from peft_ext.tuners.config import CONFIG_CLASSES, PeftConfig, PeftType, member
from peft_ext.tuners.prompt_learning import PromptLearningConfig, PromptLearningModel


class PromptTuningInit(str, Enum):
    """Where a prompt's first values come from."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Configuration of prompt tuning. Fields, defaults and meaning are Hugging Face PEFT's.

    Args:
        prompt_tuning_init: "RANDOM" (normal values), "SAMPLE_VOCAB" (embeddings of random tokens) or
            "TEXT" (embeddings of a text, cut or repeated to the prompt's length).
        prompt_tuning_init_text: the text.
        tokenizer_name_or_path: whose tokens the text is split into.
        tokenizer_kwargs: passed to ``AutoTokenizer.from_pretrained``; ``trust_remote_code`` is dropped.

    The arguments of :class:`PromptLearningConfig` and :class:`PeftConfig` give length and task.

    Raises:
        ValueError, TypeError: for a value out of range, and for a text without a tokenizer.

    Example:
        >>> from peft_ext import PromptTuningConfig
        >>> PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=8, prompt_tuning_init="SAMPLE_VOCAB").peft_type
        <PeftType.PROMPT_TUNING: 'PROMPT_TUNING'>
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        self.prompt_tuning_init = member(PromptTuningInit, self.prompt_tuning_init, "prompt_tuning_init")
        from_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            if from_text and not getattr(self, name):
                raise ValueError(f"prompt_tuning_init='TEXT' needs {name}, got {getattr(self, name)!r}")
        if self.tokenizer_kwargs and not from_text:
            raise ValueError("tokenizer_kwargs needs prompt_tuning_init='TEXT'")


class PromptTuningModel(PromptLearningModel[PromptTuningConfig]):
    """A model with prompts that are free parameters."""

    def build(self, config: PromptTuningConfig, **factory: Any) -> PromptEmbedding:
        assert config.num_virtual_tokens is not None and config.token_dim is not None
        return PromptEmbedding(config.num_virtual_tokens, config.token_dim, **factory)

    def add_adapter(
        self,
        adapter_name: str,
        config: PromptTuningConfig,
        autocast_adapter_dtype: bool = True,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        # a checkpoint needs no first values: the tokenizer of the text may be long gone
        tokens = self._first_tokens(config) if tensors is None and not config.inference_mode else None
        super().add_adapter(adapter_name, config, autocast_adapter_dtype, tensors)
        if tokens is None:
            return
        _, layer = self._embeddings(config)
        with torch.no_grad():
            layer.prompt_encoder[adapter_name].embedding.weight.copy_(layer.base_layer(tokens))

    def _first_tokens(self, config: PeftConfig) -> Tensor | None:
        """The tokens whose embeddings a prompt starts from, ``[num_virtual_tokens]``; None for random values."""
        if not isinstance(config, PromptTuningConfig) or config.prompt_tuning_init == PromptTuningInit.RANDOM:
            return None
        weight = self._embeddings(config)[1].weight
        assert config.num_virtual_tokens is not None
        if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            return torch.randint(weight.size(0), (config.num_virtual_tokens,)).to(weight.device)
        ids = _token_ids(config)
        if max(ids) >= weight.size(0):
            raise ValueError(
                f"the tokenizer {config.tokenizer_name_or_path!r} gives token {max(ids)}, "
                f"but the model's vocabulary has {weight.size(0)}: it is another model's"
            )
        repeats = -(-config.num_virtual_tokens // len(ids))
        return torch.tensor((ids * repeats)[: config.num_virtual_tokens], device=weight.device)


def _token_ids(config: PromptTuningConfig) -> list[int]:
    from transformers import AutoTokenizer

    # a configuration can come from a stranger's checkpoint: it must not be able to run code
    arguments = {key: value for key, value in (config.tokenizer_kwargs or {}).items() if key != "trust_remote_code"}
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **arguments)
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ValueError(f"prompt_tuning_init_text {config.prompt_tuning_init_text!r} has no tokens")
    return ids


CONFIG_CLASSES[PeftType.PROMPT_TUNING] = PromptTuningConfig
TUNER_CLASSES[PeftType.PROMPT_TUNING] = PromptTuningModel
