"""Oracle of :func:`peft_ext.ops.quantized_linear`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_ext.reference.autocast import autocast_off, cast
from peft_ext.reference.checks import check_constant
from peft_ext.reference.quantized_checks import PACKED_BLOCK, check_quantized, in_features_of


def quantized_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b, W formed in the type of x."""
    check_constant("weight_scale", weight_scale)
    x, bias = cast(x), cast(bias)
    check_quantized(x, weight, weight_scale, bias)
    with autocast_off(x.device):
        return F.linear(x, dequantize(weight, weight_scale, x.dtype), bias)


def dequantize(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W [out_features, in_features], each value times its group's scale, rounded to ``dtype`` once."""
    acc = torch.promote_types(dtype, torch.float32)
    values = unpack(weight) if weight.dtype == torch.uint8 else weight
    groups = weight_scale.shape[1]
    scaled = values.reshape(len(values), groups, in_features_of(weight) // groups).to(acc) * weight_scale[..., None]
    return scaled.reshape(values.shape).to(dtype)


def frozen_weight(weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight as a matrix, whichever way it is kept."""
    return weight if weight_scale is None else dequantize(weight, weight_scale, dtype)


def unpack(weight: Tensor) -> Tensor:
    """4-bit values in [-8, 7] of their bytes: one holds, of its block of 32 columns, column j and column j + 16."""
    blocks = weight.reshape(len(weight), -1, PACKED_BLOCK // 2)
    return torch.cat([blocks & 15, blocks >> 4], dim=2).reshape(len(weight), in_features_of(weight)).to(torch.int8) - 8


def pack(values: Tensor) -> Tensor:
    """The inverse of :func:`unpack`."""
    low, high = (values + 8).to(torch.uint8).reshape(len(values), -1, 2, PACKED_BLOCK // 2).unbind(dim=2)
    return (low | high << 4).reshape(len(values), values.shape[1] // 2)
