"""Soft prompts: learned embeddings in front of the input's."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

ENCODER_TYPES = ("MLP", "LSTM")


def prepend(prompt: Tensor, embeds: Tensor) -> Tensor:
    """``[P, D]`` before each row of ``[B, T, D]``: ``[B, P + T, D]``, in the dtype of ``embeds``."""
    return torch.cat([prompt.to(embeds.dtype).expand(embeds.size(0), -1, -1), embeds], dim=1)


class PromptTuningClassifier(nn.Module):
    """Classifies the mean over a soft prompt and the embeddings of a frozen embedder.

    Args:
        vocab_size: number of tokens.
        embed_dim: features of an embedding.
        prompt_len: virtual tokens before the text's.
        num_classes: number of classes.
        embedding_model: maps tokens ``[batch, length]`` to ``[batch, length, embed_dim]``; frozen. By
            default an ``nn.Embedding`` of random values.

    Raises:
        ValueError: if ``prompt_len`` is negative.

    Source: Lester et al., 2021 (prompt tuning).

    Example:
        >>> import torch
        >>> from peft_ext import PromptTuningClassifier, trainable_parameters
        >>> model = PromptTuningClassifier(vocab_size=100, embed_dim=16, prompt_len=4, num_classes=2)
        >>> model(torch.randint(100, (3, 7))).shape
        torch.Size([3, 2])
        >>> trainable_parameters(model)  # 4 * 16 for the prompt, 16 * 2 + 2 for the classifier
        (98, 1698)
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        prompt_len: int,
        num_classes: int,
        embedding_model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if prompt_len < 0:
            raise ValueError(f"prompt_len must be >= 0, got {prompt_len}")
        embedding_model = nn.Embedding(vocab_size, embed_dim) if embedding_model is None else embedding_model
        self.embedding_model = embedding_model.requires_grad_(False)
        self.prompt = nn.Parameter(torch.randn(prompt_len, embed_dim))
        self.classifier = nn.Linear(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens ``[batch, length]`` to logits ``[batch, num_classes]``."""
        return self.classifier(prepend(self.prompt, self.embedding_model(x)).mean(dim=1))


class PromptEmbedding(nn.Module):
    """A prompt that is its own parameters.

    Args:
        num_virtual_tokens: rows of the prompt.
        token_dim: features of the model's embeddings.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        token_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_virtual_tokens, token_dim, device=device, dtype=dtype)

    def forward(self) -> Tensor:
        """The prompt, ``[num_virtual_tokens, token_dim]``."""
        return self.embedding.weight

    @torch.no_grad()
    def prompt_embeddings(self) -> Tensor:
        """The prompt as inference sees it: without dropout, also in training."""
        training = self.training
        self.eval()
        prompt = self().detach()
        self.train(training)
        return prompt


class PromptEncoder(PromptEmbedding):
    """A prompt made by a small network from embeddings of its own (P-tuning v1, Liu et al., 2021).

    Args:
        num_virtual_tokens: rows of the prompt.
        token_dim: features of the model's embeddings.
        hidden_size: width of the network.
        encoder_type: "MLP" (three layers), or "LSTM" (bidirectional, then an MLP of two layers).
        num_layers, dropout: of the LSTM.
        gated: scale each virtual token by a learned gate max(g, 0) that starts at 1. A gate at or
            below 0 is closed: the row is zero.
        device, dtype: of the parameters.

    Raises:
        ValueError: for an unknown ``encoder_type``.

    Example:
        >>> from peft_ext.nn import PromptEncoder
        >>> PromptEncoder(4, 16, hidden_size=8, encoder_type="LSTM")().shape
        torch.Size([4, 16])
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        token_dim: int,
        hidden_size: int,
        encoder_type: str = "MLP",
        num_layers: int = 2,
        dropout: float = 0.0,
        gated: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_virtual_tokens, token_dim, device=device, dtype=dtype)
        if encoder_type not in ENCODER_TYPES:
            raise ValueError(f"encoder_type must be one of {ENCODER_TYPES}, got {encoder_type!r}")
        self.lstm_head: nn.LSTM | None = None
        widths = [token_dim, hidden_size, hidden_size, token_dim]
        if encoder_type == "LSTM":
            widths = [2 * hidden_size, 2 * hidden_size, token_dim]
            self.lstm_head = nn.LSTM(
                token_dim, hidden_size, num_layers, dropout=dropout, bidirectional=True, device=device, dtype=dtype
            )
        self.mlp_head = _mlp(widths, device, dtype)
        self.gate = nn.Parameter(torch.ones(num_virtual_tokens, device=device, dtype=dtype)) if gated else None

    def forward(self) -> Tensor:
        hidden = self.embedding.weight
        if self.lstm_head is not None:
            hidden = self.lstm_head(hidden)[0]
        prompt = self.mlp_head(hidden)
        return prompt if self.gate is None else self.gate.relu().unsqueeze(1) * prompt


def _mlp(widths: list[int], device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, device=device, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
