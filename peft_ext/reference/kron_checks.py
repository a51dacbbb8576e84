"""What kron_linear accepts; csrc/common/kron_checks.cpp is the same for the native op.

Messages are formed only where they are raised: sizes may be symbolic under torch.compile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peft_ext.reference.dtypes import FLOATS


def _check_factor(name: str, factor: Tensor, A: Tensor, x: Tensor) -> None:
    if factor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, but is {factor.dtype}")
    if factor.dtype != A.dtype:
        raise TypeError(f"{name} is {factor.dtype}, but A is {A.dtype}: A, B, t and bias must have one dtype")
    if factor.device != x.device:
        raise ValueError(f"{name} is on {factor.device}, but x on {x.device}")


def _check_terms(name: str, factor: Tensor, A: Tensor, x: Tensor) -> None:
    _check_factor(name, factor, A, x)
    if factor.dim() != 3 or factor.numel() == 0:
        raise ValueError(f"{name} must have 3 dimensions, none of them empty, but has shape {list(factor.shape)}")
    if factor.size(0) != A.size(0):
        raise ValueError(
            f"{name} must have the {A.size(0)} terms of A {list(A.shape)}, but has shape {list(factor.shape)}"
        )


def check_kron(x: Tensor, A: Tensor, B: Tensor, t: Tensor | None, bias: Tensor | None, scaling: float) -> None:
    """All arguments of the op."""
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, but is {x.dtype}")
    _check_terms("A", A, A, x)
    _check_terms("B", B, A, x)
    if A.dtype == torch.float64 and x.dtype != torch.float64:
        raise TypeError(f"A is float64, which only a float64 x takes, but x is {x.dtype}")
    if t is not None:
        _check_terms("t", t, A, x)
        if t.size(1) != B.size(2):
            raise ValueError(
                f"t must be [{A.size(0)}, {B.size(2)}, b_out] for B {list(B.shape)}, but has shape {list(t.shape)}"
            )
    in_features, out_features = A.size(1) * B.size(1), A.size(2) * (B if t is None else t).size(2)
    if x.dim() == 0 or x.size(-1) != in_features:
        raise ValueError(
            f"x must be [..., {in_features}] for A {list(A.shape)} and B {list(B.shape)}, but has shape {list(x.shape)}"
        )
    if bias is not None:
        _check_factor("bias", bias, A, x)
        if bias.dim() != 1 or bias.size(0) != out_features:
            raise ValueError(f"bias must be [{out_features}], but has shape {list(bias.shape)}")
    if not -math.inf < scaling < math.inf:
        raise ValueError(f"scaling must be finite, but is {scaling}")
