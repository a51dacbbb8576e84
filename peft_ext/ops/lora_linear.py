"""LoRA on a frozen linear layer, in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ext import reference
from peft_ext._loader import is_native
from peft_ext.ops._dropout import draw_seed


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    r"""y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ, with W frozen (Hu et al., 2021, eq. 3).

    The low-rank branch is computed and accumulated in float32 (float64 for a float64 base) and
    added to the base output with one rounding. On CUDA it is the branch, with the bias, that is
    rounded first, and the base that is accumulated in float32 and added.

    Args:
        x: input ``[..., in_features]``, of the dtype of ``weight``.
        weight: frozen weight ``[out_features, in_features]``, any strides: pass ``weight.t()`` for
            GPT-2's ``Conv1D``. float32, float64, bfloat16 or float16.
        bias: ``[out_features]`` or None; may be trainable.
        lora_A: ``[rank, in_features]``; float32, bfloat16 or float16, or float64 if ``weight`` is.
        lora_B: ``[out_features, rank]``, of the dtype of ``lora_A``.
        scaling: s, usually alpha / rank.
        dropout_p: probability in [0, 1] that an element of the branch's input is dropped. It is
            rounded to a multiple of 2**-16; the kept elements are scaled by 1 / (1 - dropout_p).
        seed: int64 tensor of one element on the device of ``x``: the same seed, the same mask. By
            default it is drawn from torch's generator for that device.
        weight_scale: for a quantized base, that of :func:`peft_ext.ops.quantized_linear`, with ``weight`` as there;
            ``x`` then has the dtype that is asked of ``weight`` here.

    Returns:
        ``[..., out_features]`` of the dtype of ``x``.

    Raises:
        ValueError: for shapes, devices or values that do not fit, and for a ``weight`` that
            requires grad (it gets none).
        TypeError: for dtypes that do not fit.

    Gradients flow to ``x``, ``bias``, ``lora_A`` and ``lora_B``. There is neither double backward nor forward mode.

    Example:
        >>> import torch
        >>> from peft_ext.ops import lora_linear
        >>> x, weight = torch.ones(2, 4), torch.eye(3, 4)
        >>> lora_linear(x, weight, None, torch.ones(1, 4), torch.ones(3, 1), 0.5)
        tensor([[3., 3., 3.],
                [3., 3., 3.]])
    """
    if dropout_p > 0.0 and seed is None:
        seed = draw_seed(x)
    if is_native(x):
        return torch.ops.peft_ext.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, weight_scale)
    return reference.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, weight_scale)
