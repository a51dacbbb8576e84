"""Prefix tuning: trained keys and values before those of the sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_ext.nn.attention import SelfAttention
from peft_ext.ops import prefix_attention


class PrefixTuning(nn.Module):
    """A trained prefix of keys and values for one attention layer (Li & Liang, 2021).

    Args:
        prefix_len: number of virtual tokens, 0 or more.
        num_heads: key heads; fewer than query heads where queries share them.
        head_dim: features of each.
        device, dtype: of the parameters, as in ``nn.Linear``.

    Attributes:
        prefix_key, prefix_value: ``[1, prefix_len, num_heads, head_dim]``, drawn from the normal distribution.

    Raises:
        ValueError: for a negative ``prefix_len``, or ``num_heads`` or ``head_dim`` below 1.

    Example:
        >>> from peft_ext import PrefixTuning
        >>> sum(parameter.numel() for parameter in PrefixTuning(10, 12, 64).parameters())
        15360
    """

    def __init__(
        self,
        prefix_len: int,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if prefix_len < 0 or num_heads < 1 or head_dim < 1:
            raise ValueError(
                f"prefix_len must be at least 0, num_heads and head_dim at least 1, "
                f"got {prefix_len}, {num_heads} and {head_dim}"
            )
        self.prefix_len = prefix_len
        self.num_heads = num_heads
        self.head_dim = head_dim
        shape = (1, prefix_len, num_heads, head_dim)
        self.prefix_key = nn.Parameter(torch.randn(shape, device=device, dtype=dtype))
        self.prefix_value = nn.Parameter(torch.randn(shape, device=device, dtype=dtype))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The keys and values ``[1, prefix_len, num_heads, head_dim]`` that attention takes."""
        return self.prefix_key, self.prefix_value

    def get_prefix(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The same for each of ``batch_size`` entries, as views; the op does without."""
        return self.prefix_key.expand(batch_size, -1, -1, -1), self.prefix_value.expand(batch_size, -1, -1, -1)

    def extra_repr(self) -> str:
        """The sizes, for ``repr``."""
        return f"prefix_len={self.prefix_len}, num_heads={self.num_heads}, head_dim={self.head_dim}"


class MHAWithPrefix(SelfAttention):
    """Multi-head self-attention whose queries also see a trained prefix, one for each task.

    ``causal`` and ``attn_mask`` hide positions of the sequence; the prefix is always visible. The projections
    train unless frozen (``freeze_except(model, "prefix")``). The state of a :class:`SelfAttention` loads into it
    with ``strict=False``.

    Args:
        embed_dim, num_heads, causal, device, dtype: as in :class:`SelfAttention`.
        prefix_len: number of virtual tokens.

    Attributes:
        prefixes: ``nn.ModuleDict`` of a :class:`PrefixTuning` for each task; begins with "default".
        task: the name of the one in use.

    Raises:
        ValueError: as :class:`SelfAttention` and :class:`PrefixTuning`.

    Example:
        >>> import torch
        >>> from peft_ext import MHAWithPrefix
        >>> attention = MHAWithPrefix(8, 2, prefix_len=4)
        >>> attention(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
        >>> attention.add_prefix("summarization")
        >>> attention.set_task("summarization")
        >>> sorted(attention.prefixes)
        ['default', 'summarization']
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        prefix_len: int,
        *,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, causal=causal, device=device, dtype=dtype)
        self.prefixes = nn.ModuleDict(
            {"default": PrefixTuning(prefix_len, num_heads, self.head_dim, device=device, dtype=dtype)}
        )
        self.task = "default"

    @property
    def prefix(self) -> PrefixTuning:
        """The prefix in use."""
        prefix = self.prefixes[self.task]
        assert isinstance(prefix, PrefixTuning)
        return prefix

    def add_prefix(self, task: str, prefix: PrefixTuning | None = None) -> None:
        """Keeps a prefix for another task: the given one, or a new one like that in use.

        Raises:
            ValueError: if there is one of this name, or it is of another number or size of heads.
        """
        if task in self.prefixes:
            raise ValueError(f"there is a prefix {task!r} already")
        if prefix is None:
            like = self.prefix
            prefix = PrefixTuning(
                like.prefix_len,
                like.num_heads,
                like.head_dim,
                device=like.prefix_key.device,
                dtype=like.prefix_key.dtype,
            )
        if (prefix.num_heads, prefix.head_dim) != (self.num_heads, self.head_dim):
            raise ValueError(
                f"prefix {task!r} must have {self.num_heads} heads of {self.head_dim} features, "
                f"got {prefix.num_heads} of {prefix.head_dim}"
            )
        self.prefixes[task] = prefix

    def set_task(self, task: str) -> None:
        """Chooses the prefix of a task; a ValueError that lists the tasks if there is none."""
        if task not in self.prefixes:
            raise ValueError(f"there is no prefix {task!r}: there are {list(self.prefixes)}")
        self.task = task

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, causal: bool) -> Tensor:
        prefix_key, prefix_value = self.prefix()
        return prefix_attention(q, k, v, prefix_key, prefix_value, attn_mask, is_causal=causal)
