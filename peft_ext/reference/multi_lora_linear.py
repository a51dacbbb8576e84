"""Oracle of :func:`peft_ext.ops.multi_lora_linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_ext.reference.autocast import autocast_off, cast
from peft_ext.reference.checks import check_constant, check_frozen, check_multi_lora, check_multi_lora_values
from peft_ext.reference.dropout import apply_dropout
from peft_ext.reference.lora_linear import compute_dtype
from peft_ext.reference.quantized_linear import frozen_weight


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Tensor,
    index: Tensor,
    dropout_p: Sequence[float] = (),
    seed: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """y_i = x_i W^T + b + s_a drop_a(x_i) A_a^T B_a^T with a = index_i, in float32 (float64 for a float64 base)."""
    check_frozen(weight, weight_scale)
    check_constant("scalings", scalings)
    x, weight, bias = cast(x), cast(weight), cast(bias)
    check_multi_lora(x, weight, bias, lora_A, lora_B, scalings, index, dropout_p, seed, weight_scale)
    if not torch.compiler.is_compiling():  # the values are not there yet
        check_multi_lora_values(scalings, index)
    dtype = compute_dtype(x.dtype)
    adapter = index.reshape(index.shape + (1,) * (x.dim() - index.dim()))
    with autocast_off(x.device):
        y = F.linear(x, frozen_weight(weight, weight_scale, x.dtype), bias).to(dtype)
        for i, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
            # Zeros in the rows of others, before and after: a NaN there is none of this adapter's, nor the reverse.
            rows = torch.where(adapter == i, x.to(dtype), 0.0)
            hidden = apply_dropout(rows, dropout_p[i] if dropout_p else 0.0, seed) @ a.to(dtype).T
            branch = scalings[i].to(dtype) * (hidden @ b.to(dtype).T)
            y = y + torch.where(adapter == i, branch, 0.0)
    return y.to(x.dtype)
