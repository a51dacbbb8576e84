"""LoRA on a frozen linear layer, a different adapter for each row or sequence of the batch, in one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_ext import reference
from peft_ext._loader import is_native
from peft_ext.ops._dropout import draw_seed


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Tensor,
    index: Tensor,
    *,
    dropout_p: Sequence[float] | None = None,
    seed: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    r"""yᵢ = xᵢ Wᵀ + b + sₐ · dropₐ(xᵢ) Aₐᵀ Bₐᵀ with a = index[i], and W frozen (several LoRA adapters in one batch).

    The rows are grouped by adapter inside the op: one product with W serves all of them, and each adapter is applied
    to its rows alone. A row whose index is -1 gets the base output. The branches are computed and accumulated in
    float32 (float64 for a float64 base) and added to the base output with one rounding. (Punica and S-LoRA, 2023,
    serve mixed batches in this way; here they train as well.)

    Args:
        x: input ``[..., in_features]``, of the dtype of ``weight``.
        weight: frozen weight ``[out_features, in_features]``, any strides: pass ``weight.t()`` for
            GPT-2's ``Conv1D``. float32, float64, bfloat16 or float16.
        bias: ``[out_features]`` or None; may be trainable.
        lora_A: n tensors ``[rank_a, in_features]`` of one dtype, whose ranks may differ; float32, bfloat16 or
            float16, or float64 if ``weight`` is. n may be 0.
        lora_B: n tensors ``[out_features, rank_a]`` of that dtype.
        scalings: ``[n]``, floating point, each usually alpha / rank. A tensor, so that an adapter can be exchanged
            without compiling anew; it gets no gradient.
        index: int64, the adapter of each row, or -1 for none. Its shape is a leading part of that of x: ``[B]`` gives
            one adapter to each sequence of x ``[B, T, in_features]``, ``[B, T]`` one to each token. On CUDA its values
            and those of ``scalings`` are not checked, as that would wait for the device: one outside [-1, n) is -1.
        dropout_p: n probabilities as in :func:`peft_ext.ops.lora_linear`; None for no dropout.
        seed: int64 tensor of one element on the device of ``x``, one for all adapters: an element of x is dropped
            as ``lora_linear`` would drop it under the same seed. By default it is drawn from torch's generator.
        weight_scale: for a quantized base, that of :func:`peft_ext.ops.quantized_linear`, with ``weight`` as there;
            ``x`` then has the dtype that is asked of ``weight`` here.

    Returns:
        ``[..., out_features]`` of the dtype of ``x``.

    Raises:
        ValueError: for shapes, devices or values that do not fit (an index outside [-1, n) among them), and for
            a ``weight`` or ``scalings`` that requires grad (they get none).
        TypeError: for dtypes that do not fit.

    Gradients flow to ``x``, ``bias`` and every factor; they are zero for an adapter that no row uses. There is neither
    double backward nor forward mode.

    Example:
        >>> import torch
        >>> from peft_ext.ops import multi_lora_linear
        >>> x, weight = torch.ones(3, 4), torch.eye(2, 4)
        >>> lora_A, lora_B = [torch.ones(1, 4), torch.ones(2, 4)], [torch.ones(2, 1), torch.ones(2, 2)]
        >>> multi_lora_linear(x, weight, None, lora_A, lora_B, torch.ones(2), torch.tensor([1, -1, 0]))
        tensor([[9., 9.],
                [1., 1.],
                [5., 5.]])
    """
    dropout_p = [] if dropout_p is None else list(dropout_p)
    if seed is None and any(p > 0.0 for p in dropout_p):
        seed = draw_seed(x)
    op = torch.ops.peft_ext.multi_lora_linear if is_native(x) else reference.multi_lora_linear
    return op(x, weight, bias, lora_A, lora_B, scalings, index, dropout_p, seed, weight_scale)
