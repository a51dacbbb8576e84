"""LoRA on chosen slices of one frozen projection (query, key and value in one weight)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_ext import reference
from peft_ext._loader import is_native
from peft_ext.ops._dropout import draw_seed


def merged_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    enable_lora: Sequence[bool],
    scaling: float = 1.0,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    r"""y = x Wᵀ + b, where the i-th enabled slice of y also gets s · drop(x) Aᵢᵀ Bᵢᵀ.

    ``weight`` holds ``len(enable_lora)`` projections of equal width one after the other, as in
    GPT-2's ``c_attn`` (loralib's ``MergedLinear``). With g slices enabled:

    Args:
        x: input ``[..., in_features]``, of the dtype of ``weight``.
        weight: frozen weight ``[out_features, in_features]``, any strides (``weight.t()`` for Conv1D).
        bias: ``[out_features]`` or None; may be trainable.
        lora_A: ``[g * rank, in_features]``, the A of the enabled slices one after the other.
        lora_B: ``[g * out_features / len(enable_lora), rank]``, likewise.
        enable_lora: which slices have an adapter.
        scaling, dropout_p, seed, weight_scale: as in :func:`peft_ext.ops.lora_linear`; all slices see the same
            dropped input.

    Returns:
        ``[..., out_features]`` of the dtype of ``x``.

    Raises:
        ValueError, TypeError: as :func:`peft_ext.ops.lora_linear`.

    Example:
        >>> import torch
        >>> from peft_ext.ops import merged_lora_linear
        >>> x, weight = torch.ones(1, 2), torch.zeros(3, 2)
        >>> merged_lora_linear(x, weight, None, torch.ones(2, 2), torch.ones(2, 1), [True, False, True])
        tensor([[2., 0., 2.]])
    """
    if dropout_p > 0.0 and seed is None:
        seed = draw_seed(x)
    op = torch.ops.peft_ext.merged_lora_linear if is_native(x) else reference.merged_lora_linear
    return op(x, weight, bias, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, weight_scale)
