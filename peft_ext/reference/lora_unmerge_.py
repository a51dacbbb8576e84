"""Oracle of :func:`peft_ext.ops.lora_unmerge_`."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ext.reference.lora_merge_ import OUTLIER, compute_dtype, flip_negative, lora_delta, ordered_bits


@torch.no_grad()
def lora_unmerge_(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, residual: Tensor, outliers: Tensor, scaling: float = 1.0
) -> None:
    """Undoes ``lora_merge_`` in place, to the bit."""
    dtype = compute_dtype(weight)
    recovered = (weight.to(dtype) - lora_delta(lora_A, lora_B, scaling, dtype)).to(weight.dtype)
    bits = ordered_bits(recovered)
    original = flip_negative(bits + residual.to(bits.dtype)).view(weight.dtype)
    original[residual == OUTLIER] = outliers
    weight.copy_(original)
