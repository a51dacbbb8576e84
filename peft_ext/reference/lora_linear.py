"""Oracle of :func:`peft_ext.ops.lora_linear`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_ext.reference.autocast import autocast_off, cast
from peft_ext.reference.checks import check_frozen, check_lora
from peft_ext.reference.dropout import apply_dropout
from peft_ext.reference.quantized_linear import frozen_weight


def compute_dtype(base: torch.dtype) -> torch.dtype:
    """The type that the low-rank branch is computed and accumulated in."""
    return torch.float64 if base == torch.float64 else torch.float32


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """y = x W^T + b + s drop(x) A^T B^T, the branch in float32 (float64 for a float64 base)."""
    check_frozen(weight, weight_scale)
    x, weight, bias = cast(x), cast(weight), cast(bias)
    check_lora(x, weight, bias, lora_A, lora_B, [True], scaling, dropout_p, seed, weight_scale)
    dtype = compute_dtype(x.dtype)
    with autocast_off(x.device):
        hidden = apply_dropout(x.to(dtype), dropout_p, seed) @ lora_A.to(dtype).T
        branch = scaling * (hidden @ lora_B.to(dtype).T)
        return (F.linear(x, frozen_weight(weight, weight_scale, x.dtype), bias).to(dtype) + branch).to(x.dtype)
