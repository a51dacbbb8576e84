"""Oracle of :func:`peft_ext.ops.lora_unmerge_`."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ext.reference.checks import check_factors, check_frozen, check_residual, check_writable
from peft_ext.reference.lora_linear import compute_dtype
from peft_ext.reference.lora_merge_ import OUTLIER, flip_negative, lora_delta, ordered_bits


def lora_unmerge_(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, residual: Tensor, outliers: Tensor, scaling: float = 1.0
) -> None:
    """Undoes ``lora_merge_`` in place, to the bit."""
    check_frozen(weight)
    check_factors(weight, lora_A, lora_B, scaling)
    check_writable(weight)
    check_residual(weight, residual, outliers)
    marked = residual == OUTLIER
    if outliers.numel() != (count := int(marked.sum())):
        raise ValueError(f"outliers must have the {count} elements that residual marks, but has {outliers.numel()}")
    dtype = compute_dtype(weight.dtype)
    with torch.no_grad():
        recovered = (weight.to(dtype) - lora_delta(lora_A, lora_B, scaling, dtype)).to(weight.dtype)
        bits = ordered_bits(recovered)
        original = flip_negative(bits + residual.to(bits.dtype))
        original[marked] = outliers.view(bits.dtype)  # as bits: on CUDA, indexing rewrites a NaN of half precision
        weight.copy_(original.view(weight.dtype))
