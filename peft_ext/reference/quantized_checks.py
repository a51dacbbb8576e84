"""What quantized_linear accepts; csrc/common/quantized_checks.cpp is the same for the native op."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ext.reference.dtypes import FLOATS

PACKED_BLOCK = 32
"""Columns that share 16 bytes of 4-bit values."""


def in_features_of(weight: Tensor) -> int:
    """Of the weight before it was quantized."""
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)


def check_quantized_weight(weight: Tensor, weight_scale: Tensor) -> None:
    """The values, and the scales of their groups."""
    if weight.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"weight must be int8, or uint8 for 4-bit values, but is {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions, but has shape {list(weight.shape)}")
    in_features = in_features_of(weight)
    if weight.dtype == torch.uint8 and in_features % PACKED_BLOCK:
        raise ValueError(
            f"weight of 4-bit values must have a multiple of {PACKED_BLOCK // 2} bytes a row, "
            f"but has shape {list(weight.shape)}"
        )
    if weight_scale.dtype != torch.float32:
        raise TypeError(f"weight_scale must be float32, but is {weight_scale.dtype}")
    if weight_scale.dim() != 2 or weight_scale.shape[0] != weight.shape[0] or weight_scale.shape[1] == 0:
        wanted = f"[{weight.shape[0]}, groups] with groups > 0"
        raise ValueError(f"weight_scale must be {wanted}, but has shape {list(weight_scale.shape)}")
    groups = weight_scale.shape[1]
    if groups != 1 and in_features % (groups * PACKED_BLOCK):
        raise ValueError(
            f"weight_scale has {groups} groups, which do not cut weight's {in_features} columns "
            f"into multiples of {PACKED_BLOCK}"
        )
    if weight_scale.device != weight.device:
        raise ValueError(f"weight_scale is on {weight_scale.device}, but weight on {weight.device}")


def check_quantized(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """All arguments of quantized_linear."""
    check_quantized_weight(weight, weight_scale)
    _check_rows("x", x, weight, in_features_of(weight))
    if bias is None:
        return
    if list(bias.shape) != [weight.shape[0]]:
        raise ValueError(
            f"bias must be [{weight.shape[0]}] for weight {list(weight.shape)}, but has shape {list(bias.shape)}"
        )
    if bias.dtype != x.dtype:
        raise TypeError(f"bias is {bias.dtype}, but x is {x.dtype}")
    if bias.device != weight.device:
        raise ValueError(f"bias is on {bias.device}, but weight on {weight.device}")


def check_quantized_grad(grad_y: Tensor, weight: Tensor, weight_scale: Tensor) -> None:
    """The arguments of its backward."""
    check_quantized_weight(weight, weight_scale)
    _check_rows("grad_y", grad_y, weight, weight.shape[0])


def _check_rows(name: str, rows: Tensor, weight: Tensor, features: int) -> None:
    if rows.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, but is {rows.dtype}")
    if rows.dim() == 0 or rows.shape[-1] != features:
        raise ValueError(
            f"{name} must be [..., {features}] for a {weight.dtype} weight {list(weight.shape)}, "
            f"but has shape {list(rows.shape)}"
        )
    if rows.device != weight.device:
        raise ValueError(f"{name} is on {rows.device}, but weight on {weight.device}")
