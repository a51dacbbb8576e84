"""A small GPT to try every method on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_ext.nn import (
    Adapter,
    AdapterFusion,
    CompacterAdapter,
    HoulsbyAdapter,
    LoRA_MHA,
    MHAWithPrefix,
    SelfAttention,
    SimpleAdapter,
)
from peft_ext.nn.prompt import prepend


class _Parts(NamedTuple):
    """What a method puts into a block: its attention, and modules that work on the stream after each layer norm."""

    attention: nn.Module
    after_attention: nn.Module | None = None
    after_ffn: nn.Module | None = None


def _none(hidden_dim: int, num_heads: int, causal: bool) -> _Parts:
    return _Parts(SelfAttention(hidden_dim, num_heads, causal=causal))


class _FusedAdapters(nn.Module):
    """x + the mix of several frozen adapters' outputs."""

    def __init__(self, hidden_dim: int, num_adapters: int = 3, **options: Any) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(Adapter(hidden_dim, **options) for _ in range(num_adapters))
        self.adapters.requires_grad_(False)
        self.fusion = AdapterFusion(hidden_dim, num_adapters)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fusion([adapter(x) for adapter in self.adapters])


def _fusion(hidden_dim: int, num_heads: int, causal: bool, **options: Any) -> _Parts:
    attention = SelfAttention(hidden_dim, num_heads, causal=causal)
    return _Parts(attention, after_ffn=_FusedAdapters(hidden_dim, **options))


def _lora(hidden_dim: int, num_heads: int, causal: bool, **options: Any) -> _Parts:
    return _Parts(LoRA_MHA(hidden_dim, num_heads, causal=causal, **options))


def _adapter(hidden_dim: int, num_heads: int, causal: bool, **options: Any) -> _Parts:
    attention = SelfAttention(hidden_dim, num_heads, causal=causal)
    return _Parts(attention, after_ffn=SimpleAdapter(hidden_dim, **options))


def _houlsby(hidden_dim: int, num_heads: int, causal: bool, **options: Any) -> _Parts:
    attention = SelfAttention(hidden_dim, num_heads, causal=causal)
    return _Parts(attention, HoulsbyAdapter(hidden_dim, **options), HoulsbyAdapter(hidden_dim, **options))


def _compacter(hidden_dim: int, num_heads: int, causal: bool, bottleneck_dim: int = 8, **options: Any) -> _Parts:
    first = CompacterAdapter(hidden_dim, bottleneck_dim, **options)
    second = CompacterAdapter(hidden_dim, bottleneck_dim, **{**options, "phm_rule": first.phm_rule})
    return _Parts(SelfAttention(hidden_dim, num_heads, causal=causal), first, second)


def _prefix(hidden_dim: int, num_heads: int, causal: bool, **options: Any) -> _Parts:
    return _Parts(MHAWithPrefix(hidden_dim, num_heads, causal=causal, **options))


_METHODS: dict[str, Callable[..., _Parts]] = {
    "none": _none,
    "adapter": _adapter,
    "houlsby": _houlsby,
    "compacter": _compacter,
    "fusion": _fusion,
    "lora": _lora,
    "prefix": _prefix,
}


class GPTBlock(nn.Module):
    """Attention and feed-forward, each followed by residual and layer norm (post-norm).

    Args:
        hidden_dim: features; a multiple of ``num_heads``.
        num_heads: attention heads.
        method: ``"none"`` (no adapter), ``"adapter"`` (:class:`peft_ext.SimpleAdapter` after the FFN),
            ``"houlsby"`` (:class:`peft_ext.HoulsbyAdapter` after attention and after the FFN), ``"compacter"``
            (:class:`peft_ext.CompacterAdapter`, likewise), ``"fusion"`` (frozen :class:`peft_ext.Adapter` s after
            the FFN under a :class:`peft_ext.AdapterFusion`), ``"lora"`` (:class:`peft_ext.LoRA_MHA`) or ``"prefix"``
            (:class:`peft_ext.MHAWithPrefix`). Methods that put nothing into a block, such as BitFit, side-tuning and
            AdapterDrop, come from :func:`peft_ext.get_peft_model` on ``"none"``.
        causal: if True, a position sees only itself and those before it.
        options: the method's own. ``"adapter"``, ``"houlsby"``: ``bottleneck_dim``, ``activation="relu"``.
            ``"fusion"``: the same, and ``num_adapters=3``.
            ``"compacter"``: ``bottleneck_dim=8`` and those of ``CompacterAdapter``; a ``phm_rule`` given here is
            shared by all blocks. ``"lora"``: ``lora_rank=4``, ``alpha=1.0``, ``lora_dropout=0.0``,
            ``init="default"``. ``"prefix"``: ``prefix_len``.

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> import torch
        >>> from peft_ext.models import GPTBlock
        >>> GPTBlock(8, 2, method="lora", lora_rank=2)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self, hidden_dim: int, num_heads: int, *, method: str = "lora", causal: bool = True, **options: Any
    ) -> None:
        super().__init__()
        if method not in _METHODS:
            raise ValueError(f"method must be one of {sorted(_METHODS)}, got {method!r}")
        self.attn, self.adapter1, self.adapter2 = _METHODS[method](hidden_dim, num_heads, causal, **options)
        self.ln1 = nn.LayerNorm(hidden_dim)
        self.ffn = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim), nn.ReLU(), nn.Linear(4 * hidden_dim, hidden_dim)
        )
        self.ln2 = nn.LayerNorm(hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` ``[batch, length, hidden_dim]`` to the same shape."""
        x = _apply(self.adapter1, self.ln1(x + self.attn(x)))
        return _apply(self.adapter2, self.ln2(x + self.ffn(x)))


def _apply(adapter: nn.Module | None, x: Tensor) -> Tensor:
    return x if adapter is None else adapter(x)


class MiniGPT(nn.Module):
    """Token and position embeddings, ``n_layers`` blocks, layer norm, vocabulary head.

    To adapt a pretrained one, load its state into the adapted model: the base layers take it, the
    adapters stay as they begin (see :class:`peft_ext.LoRALinear`). All parameters train until
    :func:`peft_ext.freeze_except` says otherwise, except the layers under an adapter.

    Args:
        vocab_size: number of tokens.
        hidden_dim: features; a multiple of ``n_heads``.
        seq_len: longest sequence.
        n_layers, n_heads: blocks, and attention heads in each.
        method, causal, options: as in :class:`GPTBlock`; and ``"prompt"``, a soft prompt of
            ``prompt_len=8`` virtual tokens before the embeddings, whose outputs are left out.

    Raises:
        ValueError: for an unknown method, and for a sequence longer than ``seq_len``.

    Example:
        >>> import torch
        >>> from peft_ext import freeze_except
        >>> from peft_ext.models import MiniGPT
        >>> size = dict(vocab_size=100, hidden_dim=128, seq_len=16, n_layers=2, n_heads=4)
        >>> pretrained = MiniGPT(**size, method="none")
        >>> model = MiniGPT(**size, method="lora", lora_rank=4)
        >>> model.load_state_dict(pretrained.state_dict())
        <All keys matched successfully>
        >>> freeze_except(model, r"lora_[AB]$")
        (4096, 428644)
        >>> tokens = torch.randint(100, (2, 16))
        >>> torch.allclose(model(tokens), pretrained(tokens), atol=1e-5)
        True
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_dim: int,
        seq_len: int,
        n_layers: int,
        n_heads: int,
        *,
        method: str = "lora",
        causal: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.prompt: nn.Parameter | None = None
        if method == "prompt":
            self.prompt = nn.Parameter(torch.randn(options.pop("prompt_len", 8), hidden_dim))
            method = "none"  # of the blocks
        self.embed = nn.Embedding(vocab_size, hidden_dim)
        self.pos_embed = nn.Parameter(torch.randn(1, seq_len, hidden_dim))
        self.blocks = nn.Sequential(
            *(GPTBlock(hidden_dim, n_heads, method=method, causal=causal, **options) for _ in range(n_layers))
        )
        self.ln_f = nn.LayerNorm(hidden_dim)
        self.head = nn.Linear(hidden_dim, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps token ids ``[batch, length]`` to logits ``[batch, length, vocab_size]``."""
        length, longest = tokens.size(1), self.pos_embed.size(1)
        if length > longest:
            raise ValueError(f"tokens must have a length of at most seq_len = {longest}, got {length}")
        x = self.embed(tokens) + self.pos_embed[:, :length]
        if self.prompt is not None:
            x = prepend(self.prompt, x)
        return self.head(self.ln_f(self.blocks(x)[:, -length:]))
