"""P-tuning v1 (Liu et al., 2021): virtual tokens before the text, made by a small network in training."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from peft_ext.nn._checks import check_sizes
from peft_ext.nn.prompt import PromptEmbedding, PromptEncoder
from peft_ext.tuners.base import TUNER_CLASSES
from peft_ext.tuners.config import CONFIG_CLASSES, PeftType, member
from peft_ext.tuners.prompt_learning import PromptLearningConfig, PromptLearningModel

_MLP_LAYERS = 2


class PromptEncoderReparameterizationType(str, Enum):
    """The network that makes the prompt."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Configuration of P-tuning v1. Fields, defaults and meaning are Hugging Face PEFT's, but for ``gated``.

    The checkpoint holds the prompt that the network made, which is all that inference needs and all
    that Hugging Face PEFT reads, and the network beside it, so that training can go on
    (``is_trainable=True``). An adapter that was loaded for inference has lost the network.

    Args:
        encoder_reparameterization_type: "MLP" or "LSTM", see :class:`peft_ext.nn.PromptEncoder`.
        encoder_hidden_size: the network's width; by default the embeddings'.
        encoder_num_layers: layers of the LSTM; an MLP has its own number.
        encoder_dropout: between the layers of the LSTM.
        gated: scale each virtual token by a learned gate max(g, 0), which starts open at 1 (as the
            token masks of XPrompt, Ma et al., 2022). A token whose gate is closed is left out of the
            input, and stays so, as it gets no gradient: with all of them closed the model is the base
            model. Not Hugging Face PEFT's; while no gate is closed it reads the checkpoint rightly.

    The arguments of :class:`PromptLearningConfig` and :class:`PeftConfig` give length and task.

    Raises:
        ValueError, TypeError: for a value out of range.

    Example:
        >>> from peft_ext import PromptEncoderConfig
        >>> PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, encoder_hidden_size=64).peft_type
        <PeftType.P_TUNING: 'P_TUNING'>
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = _MLP_LAYERS
    encoder_dropout: float = 0.0
    gated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING
        self.encoder_reparameterization_type = member(
            PromptEncoderReparameterizationType, self.encoder_reparameterization_type, "encoder_reparameterization_type"
        )
        if self.encoder_hidden_size is not None:
            check_sizes({"encoder_hidden_size": self.encoder_hidden_size})
        check_sizes({"encoder_num_layers": self.encoder_num_layers})
        if not isinstance(self.encoder_dropout, int | float) or not 0 <= self.encoder_dropout <= 1:
            raise ValueError(f"encoder_dropout must be in [0, 1], got {self.encoder_dropout!r}")
        is_mlp = self.encoder_reparameterization_type == PromptEncoderReparameterizationType.MLP
        if is_mlp and self.encoder_num_layers != _MLP_LAYERS:
            warnings.warn("encoder_num_layers has no effect on an MLP encoder", stacklevel=3)


class PromptEncoderModel(PromptLearningModel[PromptEncoderConfig]):
    """A model with prompts that a network makes; in inference mode they are parameters."""

    def resolve(self, config: PromptEncoderConfig) -> PromptEncoderConfig:
        config = super().resolve(config)
        config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim
        return config

    def build(self, config: PromptEncoderConfig, **factory: Any) -> PromptEmbedding:
        assert config.num_virtual_tokens is not None and config.token_dim is not None
        if config.inference_mode:
            return PromptEmbedding(config.num_virtual_tokens, config.token_dim, **factory)
        assert config.encoder_hidden_size is not None
        return PromptEncoder(
            config.num_virtual_tokens,
            config.token_dim,
            config.encoder_hidden_size,
            config.encoder_reparameterization_type,
            config.encoder_num_layers,
            config.encoder_dropout,
            config.gated,
            **factory,
        )

    def open_tokens(self, config: PromptEncoderConfig, prompt: Tensor) -> Tensor:
        """A closed gate makes a row of zeros: so those are told apart in a checkpoint without gates too."""
        return prompt[prompt.ne(0).any(dim=1)] if config.gated else prompt


CONFIG_CLASSES[PeftType.P_TUNING] = PromptEncoderConfig
TUNER_CLASSES[PeftType.P_TUNING] = PromptEncoderModel
