"""The mix of several adapters' outputs by attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_ext import reference
from peft_ext._loader import is_native


def adapter_fusion(
    query: Tensor,
    outputs: Sequence[Tensor] | Tensor,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""w = softmax_i(s · q · (K zᵢ + b)) over N adapters' outputs zᵢ, and Σ wᵢ zᵢ (arXiv:2005.00247).

    The outputs are read where they lie, neither stacked nor projected: q · (K z + b) = (Kᵀ q) · z + q · b takes one
    product a query instead of one an adapter, and q · b, the same for all adapters, does not change a softmax.
    Logits, softmax and sums are formed in float32 (float64 for float64 outputs).

    A value projection V needs no place here either: Σ wᵢ V zᵢ = V Σ wᵢ zᵢ is one product of the result.

    Args:
        query: ``[key_width]``, one for all rows, or ``[..., key_width]`` with the leading sizes of the outputs;
            of their dtype, or float32 under bfloat16 or float16 outputs.
        outputs: N tensors ``[..., width]``, or one ``[N, ..., width]``; for another order of one tensor pass
            ``stacked.unbind(dim)``, which copies nothing. float32, float64, bfloat16 or float16.
        key_weight: K ``[key_width, width]`` of the dtype of ``query``; None stands for the identity.
        key_bias: b ``[key_width]``, likewise. It does not change the result, and its gradient is exactly zero.
        scale: s.

    Returns:
        ``(mix, weights)``: ``[..., width]`` of the outputs' dtype, and ``[..., N]`` in float32 or float64.

    Raises:
        ValueError: for no outputs, outputs of unequal shape, and other shapes, devices or values that do not fit.
        TypeError: for dtypes that do not fit.

    Gradients flow to all tensors, through both results. There is neither double backward nor forward mode.

    Example:
        >>> import torch
        >>> from peft_ext.ops import adapter_fusion
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> adapter_fusion(torch.zeros(2), [a, b])
        (tensor([[0.5000, 0.5000]]), tensor([[0.5000, 0.5000]]))
    """
    parts = outputs.unbind(0) if isinstance(outputs, Tensor) else outputs
    if is_native(query):
        return torch.ops.peft_ext.adapter_fusion(query, parts, key_weight, key_bias, scale)[:2]
    return reference.adapter_fusion(query, parts, key_weight, key_bias, scale)
