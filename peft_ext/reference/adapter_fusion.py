"""Oracle of :func:`peft_ext.ops.adapter_fusion`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_ext.reference.autocast import autocast_off, cast
from peft_ext.reference.checks import check_fusion
from peft_ext.reference.lora_linear import compute_dtype


def adapter_fusion(
    query: Tensor,
    outputs: Sequence[Tensor],
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """w = softmax_i(s q . (K z_i + b)) and sum_i w_i z_i, in float32 (float64 for float64 outputs)."""
    query, outputs = cast(query), [cast(output) for output in outputs]
    key_weight, key_bias = cast(key_weight), cast(key_bias)
    check_fusion(query, outputs, key_weight, key_bias, scale)
    dtype = compute_dtype(outputs[0].dtype)
    stacked = torch.stack([output.to(dtype) for output in outputs], dim=-2)
    keys = stacked
    if key_weight is not None:
        with autocast_off(stacked.device):
            keys = F.linear(stacked, key_weight.to(dtype), None if key_bias is None else key_bias.to(dtype))
    logits = scale * (keys * query.to(dtype).unsqueeze(-2)).sum(-1)
    weights = logits.softmax(-1)
    mix = (weights.unsqueeze(-1) * stacked).sum(-2)
    return mix.to(outputs[0].dtype), weights
