"""Oracle of :func:`peft_ext.ops.merged_lora_linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_ext.reference.autocast import autocast_off, cast
from peft_ext.reference.checks import check_frozen, check_lora
from peft_ext.reference.dropout import apply_dropout
from peft_ext.reference.lora_linear import compute_dtype
from peft_ext.reference.quantized_linear import frozen_weight


def merged_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    enable_lora: Sequence[bool],
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """A projection of len(enable_lora) equal output slices; the i-th enabled one gets A_i, B_i."""
    check_frozen(weight, weight_scale)
    x, weight, bias = cast(x), cast(weight), cast(bias)
    check_lora(x, weight, bias, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, weight_scale)
    groups = sum(enable_lora)
    dtype = compute_dtype(x.dtype)
    with autocast_off(x.device):
        base = F.linear(x, frozen_weight(weight, weight_scale, x.dtype), bias).to(dtype)
        hidden = apply_dropout(x.to(dtype), dropout_p, seed) @ lora_A.to(dtype).T
        branches = [
            scaling * (h @ b.T) for h, b in zip(hidden.chunk(groups, -1), lora_B.to(dtype).chunk(groups), strict=True)
        ]
    zeros = base.new_zeros(*base.shape[:-1], weight.size(0) // len(enable_lora))
    enabled = iter(branches)
    delta = torch.cat([next(enabled) if on else zeros for on in enable_lora], dim=-1)
    return (base + delta).to(x.dtype)
