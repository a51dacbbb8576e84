"""Oracle of :func:`peft_ext.ops.lora_merge_`.

Adding s B A to W and subtracting it again loses the low bits of W. The merge therefore returns
what the subtraction misses: the distance, in units in the last place, between W and what would be
recovered. It nearly always fits eight bits; the few weights for which it does not (W much smaller
than the update, or not a number) are kept whole, in row-major order, as ``outliers``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ext.reference.checks import check_factors, check_frozen, check_writable
from peft_ext.reference.lora_linear import compute_dtype

OUTLIER = -128
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def ordered_bits(value: Tensor) -> Tensor:
    """The bits of a float as integers in the order of the floats they stand for (a bijection)."""
    return flip_negative(value.view(_BITS[value.dtype]))


def flip_negative(bits: Tensor) -> Tensor:
    """Turns sign-magnitude bits into ordered ones, and ordered ones back."""
    info = torch.iinfo(bits.dtype)
    return torch.where(bits < 0, bits ^ info.max, bits)


def lora_delta(lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """s B A summed rank by rank: unlike a GEMM, the same bits at any thread count."""
    a, b = lora_A.to(dtype), lora_B.to(dtype) * scaling
    delta = torch.zeros(b.size(0), a.size(1), dtype=dtype, device=a.device)
    for j in range(a.size(0)):
        delta.addcmul_(b[:, j : j + 1], a[j : j + 1])
    return delta


def lora_merge_(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """W += s B A in place with one rounding; returns (residual int8 like W, outliers [count])."""
    check_frozen(weight)
    check_factors(weight, lora_A, lora_B, scaling)
    check_writable(weight)
    with torch.no_grad():
        return _merge(weight, lora_A, lora_B, scaling)


def _merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(weight.dtype)
    delta = lora_delta(lora_A, lora_B, scaling, dtype)
    merged = (weight.to(dtype) + delta).to(weight.dtype)
    recovered = (merged.to(dtype) - delta).to(weight.dtype)
    distance = ordered_bits(weight.contiguous()) - ordered_bits(recovered)
    fits = (distance > OUTLIER) & (distance < -OUTLIER) & ~recovered.isnan()
    residual = torch.where(fits, distance, OUTLIER).to(torch.int8)
    outliers = weight[~fits]
    weight.copy_(merged)
    return residual, outliers
