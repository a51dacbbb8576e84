"""Attention with a trained prefix before the keys and values, in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ext import reference
from peft_ext._loader import is_native
from peft_ext.ops._dropout import draw_seed


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    r"""drop(softmax(scale · q [Pk; k]ᵀ + mask)) [Pv; v] (Li & Liang, 2021, with He et al., 2022, eq. 3).

    The prefix is shared by the whole batch. It is neither concatenated with the keys nor expanded over the batch,
    and every query sees it: masks speak of the keys only. Everything is computed in float32 (float64 for
    float64).

    Args:
        q: ``[batch, heads, queries, head_dim]``, any strides. float32, float64, bfloat16 or float16.
        k, v: ``[batch, kv_heads, keys, head_dim]``, of the dtype of ``q``; ``kv_heads`` divides ``heads``, and
            query head h reads key head ``h // (heads // kv_heads)``.
        prefix_key, prefix_value: ``[prefix_len, kv_heads, head_dim]`` or the same with a leading 1, any strides;
            ``prefix_len`` may be 0. Of the dtype of ``q``, or float32 beside a half precision.
        attn_mask: broadcastable to ``[batch, heads, queries, keys]``: bool (True = visible), or float32 or of the
            dtype of ``q``, added to the scores. It gets no gradient.
        is_causal: if True, query t sees the keys up to t + keys - queries, so that the last query sees all
            (``keys`` exceeds ``queries`` where the keys come from a cache). Applied besides ``attn_mask``.
        scale: of the scores; 1/sqrt(head_dim) by default.
        dropout_p: probability in [0, 1] that a weight is dropped, rounded to a multiple of 2**-16; the kept ones
            are scaled by 1 / (1 - dropout_p).
        seed: int64 tensor of one element on the device of ``q``: the same seed, the same mask. By default it is
            drawn from torch's generator for that device.

    Returns:
        ``[batch, heads, queries, head_dim]`` of the dtype of ``q``, laid out as ``[batch, queries, heads,
        head_dim]``, so that merging the heads copies nothing. A query that sees nothing gives 0.

    Raises:
        ValueError: for shapes, devices or values that do not fit, and for a mask that requires grad.
        TypeError: for dtypes that do not fit.

    Gradients flow to ``q``, ``k``, ``v``, ``prefix_key`` and ``prefix_value``; those not needed are not computed.
    There is neither double backward nor forward mode.

    Example:
        >>> import torch
        >>> from peft_ext.ops import prefix_attention
        >>> q, k, v = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
        >>> prefix_attention(q, k, v, torch.zeros(1, 1, 4), torch.ones(1, 1, 4), is_causal=True)
        tensor([[[[0.5000, 0.5000, 0.5000, 0.5000],
                  [0.3333, 0.3333, 0.3333, 0.3333]]]])
    """
    if dropout_p > 0.0 and seed is None:
        seed = draw_seed(q)
    prefix_key, prefix_value = _without_batch(prefix_key), _without_batch(prefix_value)
    if scale is None:
        scale = max(q.size(-1), 1) ** -0.5
    arguments = (q, k, v, prefix_key, prefix_value, attn_mask, is_causal, scale, dropout_p, seed)
    if is_native(q):
        return torch.ops.peft_ext.prefix_attention(*arguments)[0]
    return reference.prefix_attention(*arguments)


def _without_batch(prefix: Tensor) -> Tensor:
    return prefix[0] if prefix.dim() == 4 and prefix.size(0) == 1 else prefix
