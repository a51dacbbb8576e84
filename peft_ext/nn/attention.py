"""Multi-head self-attention with separate projections, which adapters can replace one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    r"""softmax(q kᵀ / √d) v over ``num_heads`` heads, projected by ``out_proj``.

    Args:
        embed_dim: features of input and output; a multiple of ``num_heads``.
        num_heads: number of heads, each of d = embed_dim / num_heads features.
        causal: if True, position t sees positions up to t only.
        device, dtype: of the parameters, as in ``nn.Linear``.

    Raises:
        ValueError: if ``num_heads`` is not positive or does not divide ``embed_dim``.

    Example:
        >>> import torch
        >>> from peft_ext.nn import SelfAttention
        >>> SelfAttention(8, 2)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"num_heads must be positive and divide embed_dim = {embed_dim}, got {num_heads}")
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.causal = causal
        self.q_proj: nn.Module = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.k_proj: nn.Module = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.v_proj: nn.Module = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.out_proj: nn.Module = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool | None = None) -> Tensor:
        """Attends over the sequence.

        Args:
            x: ``[batch, length, embed_dim]``.
            attn_mask: what may be seen, broadcastable to ``[batch, num_heads, length, length]``: bool
                (True = visible) or float (added to the scores). A causal layer applies both.
            is_causal: overrides the layer's ``causal`` for this call.

        Returns:
            ``[batch, length, embed_dim]``.
        """
        causal = self.causal if is_causal is None else is_causal
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        context = self._attend(q, k, v, attn_mask, causal)
        return self.out_proj(context.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, causal: bool) -> Tensor:
        if causal and attn_mask is not None:
            attn_mask, causal = _hide_future(attn_mask, q.size(2)), False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=causal)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def _hide_future(attn_mask: Tensor, length: int) -> Tensor:
    past = torch.ones(length, length, dtype=torch.bool, device=attn_mask.device).tril()
    if attn_mask.dtype == torch.bool:
        return attn_mask & past
    return attn_mask.masked_fill(~past, float("-inf"))
