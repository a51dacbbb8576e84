"""Oracle of :func:`peft_ext.ops.prefix_attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peft_ext.reference.autocast import autocast_off, cast
from peft_ext.reference.checks import check_dropout
from peft_ext.reference.dropout import apply_dropout
from peft_ext.reference.dtypes import FLOATS
from peft_ext.reference.lora_linear import compute_dtype


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """drop(softmax(scale q [Pk; k]^T + mask)) [Pv; v], in float32 (float64 for float64)."""
    q, k, v = cast(q), cast(k), cast(v)
    prefix_key, prefix_value = _cast_half(prefix_key), _cast_half(prefix_value)
    attn_mask = None if attn_mask is None else _cast_half(attn_mask)
    check_prefix_attention(q, k, v, prefix_key, prefix_value, attn_mask, scale, dropout_p, seed)
    if attn_mask is not None and torch.is_grad_enabled() and attn_mask.requires_grad:
        raise ValueError("attn_mask requires grad, but gets none here: detach it first")
    dtype, groups = compute_dtype(q.dtype), q.size(1) // k.size(1)
    keys, values = (_concatenate(prefix, own, groups, dtype) for prefix, own in ((prefix_key, k), (prefix_value, v)))
    with autocast_off(q.device):
        scores = scale * (q.to(dtype) @ keys.transpose(-2, -1))
        own = _mask(scores[..., prefix_key.size(0) :], attn_mask, is_causal)
        scores = torch.cat([scores[..., : prefix_key.size(0)], own], dim=-1)
        # softmax, but 0 where nothing is visible
        largest = scores.detach().amax(-1, keepdim=True) if scores.size(-1) else scores.new_zeros(*scores.shape[:-1], 1)
        exponentials = (scores - torch.where(largest == -math.inf, 0.0, largest)).exp()
        sums = exponentials.sum(-1, keepdim=True)
        weights = exponentials / torch.where(sums == 0, 1.0, sums)
        return (apply_dropout(weights, dropout_p, seed) @ values).to(q.dtype)


def _cast_half(tensor: Tensor) -> Tensor:
    """A float32 prefix or mask keeps its dtype under autocast; another goes the way of q."""
    return tensor if tensor.dtype == torch.float32 else cast(tensor)


def _concatenate(prefix: Tensor, own: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[batch, heads, prefix_len + keys, head_dim]."""
    prefix = prefix.to(dtype).transpose(0, 1).expand(own.size(0), -1, -1, -1)
    return torch.cat([prefix, own.to(dtype)], dim=2).repeat_interleave(groups, dim=1)


def _mask(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    queries, keys = scores.shape[-2:]
    if is_causal:
        visible = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
        scores = scores.masked_fill(~visible, -math.inf)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -math.inf)
    return scores + attn_mask.to(scores.dtype)


def check_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """What the op accepts; csrc/common/prefix_attention_checks.cpp is the same for the native op."""
    _check_keys(q, k, v)
    _check_prefix("prefix_key", prefix_key, q, k)
    _check_prefix("prefix_value", prefix_value, q, k)
    if prefix_value.shape != prefix_key.shape:
        raise ValueError(
            f"prefix_value must have prefix_key's shape {list(prefix_key.shape)}, "
            f"but has shape {list(prefix_value.shape)}"
        )
    if attn_mask is not None:
        _check_mask(attn_mask, q, k)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, but is {scale}")
    check_dropout(dropout_p, seed, q)


def _check_like(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}, but q on {q.device}")
    if tensor.dtype != q.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, but q is {q.dtype}")


def _check_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in FLOATS:
        raise TypeError(f"q must be float32, float64, bfloat16 or float16, but is {q.dtype}")
    if q.dim() != 4 or q.size(3) == 0:
        raise ValueError(
            f"q must be [batch, heads, queries, head_dim] with head_dim > 0, but has shape {list(q.shape)}"
        )
    _check_like("k", k, q)
    _check_like("v", v, q)
    if k.dim() != 4 or k.size(0) != q.size(0) or k.size(3) != q.size(3):
        raise ValueError(
            f"k must be [{q.size(0)}, kv_heads, keys, {q.size(3)}] for q {list(q.shape)}, but has shape {list(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {list(k.shape)}, but has shape {list(v.shape)}")
    if k.size(1) == 0 or q.size(1) % k.size(1):
        raise ValueError(f"k has {k.size(1)} heads, which do not divide q's {q.size(1)}")


def _check_prefix(name: str, prefix: Tensor, q: Tensor, k: Tensor) -> None:
    if prefix.dim() != 3 or prefix.size(1) != k.size(1) or prefix.size(2) != k.size(3):
        raise ValueError(
            f"{name} must be [prefix_len, {k.size(1)}, {k.size(3)}] for k {list(k.shape)}, "
            f"but has shape {list(prefix.shape)}"
        )
    if prefix.device != q.device:
        raise ValueError(f"{name} is on {prefix.device}, but q on {q.device}")
    if prefix.dtype != q.dtype and (prefix.dtype != torch.float32 or q.dtype == torch.float64):
        or_float32 = "" if q.dtype == torch.float64 else " or be float32"
        raise TypeError(f"{name} must have q's dtype {q.dtype}{or_float32}, but is {prefix.dtype}")


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    if mask.dtype not in (torch.bool, q.dtype, torch.float32):
        raise TypeError(f"attn_mask must be bool, float32 or of q's dtype {q.dtype}, but is {mask.dtype}")
    if mask.device != q.device:
        raise ValueError(f"attn_mask is on {mask.device}, but q on {q.device}")
    sizes = [*q.shape[:3], k.size(2)]
    fits = mask.dim() <= 4 and all(
        size == 1 or size == wanted for size, wanted in zip(reversed(mask.shape), reversed(sizes), strict=False)
    )
    if not fits:
        raise ValueError(
            f"attn_mask must broadcast to [batch, heads, queries, keys] = {sizes}, but has shape {list(mask.shape)}"
        )
