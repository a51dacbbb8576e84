"""A linear map given by Kronecker products, in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ext import reference
from peft_ext._loader import is_native


def kron_linear(
    x: Tensor, A: Tensor, B: Tensor, t: Tensor | None = None, bias: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    r"""y = x H + b with H = scaling · Σᵢ Aᵢ ⊗ Bᵢ (Mahabadi et al., 2021, eq. 4 and 5).

    H is formed only where that is the cheapest order: the contraction is chosen by counted cost. Everything
    is computed and summed in float32 (float64 for a float64 ``x``) and rounded once.

    Args:
        x: input ``[..., a_in * b_in]``; float32, float64, bfloat16 or float16.
        A: left factors ``[n, a_in, a_out]``; float32, bfloat16 or float16, or float64 if ``x`` is.
        B: right factors ``[n, b_in, b_out]``. With ``t``, their left factors s ``[n, b_in, rank]``.
        t: ``[n, rank, b_out]``: Bᵢ = sᵢ tᵢ. None: B is dense.
        bias: ``[a_out * b_out]``.
        scaling: factor of H.

        ``A``, ``B``, ``t`` and ``bias`` have one dtype.

    Returns:
        ``[..., a_out * b_out]`` of the dtype of ``x``.

    Raises:
        ValueError: for shapes, devices or values that do not fit.
        TypeError: for dtypes that do not fit.

    Gradients flow to all tensors; layers that share a factor each add theirs.
    There is neither double backward nor forward mode.

    Example:
        >>> import torch
        >>> from peft_ext.ops import kron_linear
        >>> A, B = torch.tensor([[[1.0, 2.0]]]), torch.eye(2)[None]
        >>> kron_linear(torch.tensor([[3.0, 4.0]]), A, B)
        tensor([[3., 4., 6., 8.]])
    """
    if is_native(x):
        return torch.ops.peft_ext.kron_linear(x, A, B, t, bias, scaling)
    return reference.kron_linear(x, A, B, t, bias, scaling)
