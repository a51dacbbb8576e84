"""Oracle of :func:`peft_ext.ops.kron_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ext.reference.autocast import autocast_off, cast
from peft_ext.reference.kron_checks import check_kron


def kron_linear(
    x: Tensor, A: Tensor, B: Tensor, t: Tensor | None = None, bias: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    """y = x H + bias, H = scaling sum_i A_i (x) B_i formed in full, in float32 (float64 for a float64 x)."""
    x = cast(x)
    check_kron(x, A, B, t, bias, scaling)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with autocast_off(x.device):
        dense = B.to(dtype) if t is None else B.to(dtype) @ t.to(dtype)
        product = torch.einsum("npq,nuv->puqv", A.to(dtype), dense).reshape(x.size(-1), -1)
        y = x.to(dtype) @ (scaling * product)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)
