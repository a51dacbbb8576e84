"""A linear layer whose frozen weight is kept as int8 or 4-bit values, in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ext import reference
from peft_ext._loader import is_native


def quantized_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""y = x Wᵀ + b with W = scale · value, the scale one of each group of a row's values (symmetric, no zero point).

    :func:`peft_ext.quantize_weight` makes the values. For few rows of ``x``, as in decoding, the values are widened
    where they are multiplied, and the sum is float32, rounded once; for more rows, and for float64, W is formed panel
    by panel in the type of ``x``, and never whole on the CPU.

    Args:
        x: input ``[..., in_features]``; float32, float64, bfloat16 or float16.
        weight: int8 ``[out_features, in_features]``, or uint8 ``[out_features, in_features / 2]`` of 4-bit values: of
            each 32 columns, byte j holds column j in its low half and column j + 16 in its high half, both plus 8.
        weight_scale: float32 ``[out_features, groups]``. More groups than one are of a multiple of 32 columns each.
        bias: ``[out_features]`` of the dtype of ``x``, or None; may be trainable.

    Returns:
        ``[..., out_features]`` of the dtype of ``x``.

    Raises:
        ValueError: for shapes or devices that do not fit.
        TypeError: for dtypes that do not fit.

    Gradients flow to ``x`` and ``bias``, to any order. There is no forward mode.

    Example:
        >>> import torch
        >>> from peft_ext.ops import quantized_linear
        >>> weight, scale = torch.tensor([[100, -50], [0, 127]], dtype=torch.int8), torch.tensor([[0.01], [0.02]])
        >>> quantized_linear(torch.tensor([[1.0, 2.0]]), weight, scale)
        tensor([[0.0000, 5.0800]])
    """
    if is_native(x):
        return torch.ops.peft_ext.quantized_linear(x, weight, weight_scale, bias)
    return reference.quantized_linear(x, weight, weight_scale, bias)
