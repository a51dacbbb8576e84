"""Argument checks that the LoRA modules share. Each raises before anything is changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

_FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_conv1d(module: nn.Module) -> bool:
    """True for GPT-2's ``Conv1D``, a linear layer whose weight is ``[in_features, out_features]``.

    It is known by its shape, not by its class, so that transformers need not be installed.
    """
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and getattr(module, "nf", None) == weight.size(1)


def check_linear(linear: nn.Module) -> None:
    """``linear`` must be one whose forward is x Wᵀ + b of its own floating-point weight."""
    name = type(linear).__name__
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        raise TypeError(
            "linear is the out_proj of an nn.MultiheadAttention, which reads its weight and never calls it, "
            "so an adapter there would have no effect; use LoRA_MHA or an attention with separate projections"
        )
    if isinstance(linear, nn.Linear):
        if type(linear).forward is not nn.Linear.forward:
            raise TypeError(f"linear is a {name}, an nn.Linear with a forward of its own, which LoRA would bypass")
    elif not is_conv1d(linear):
        raise TypeError(f"linear must be an nn.Linear or a Conv1D (weight [in, out] and attribute nf), got {name}")
    if not isinstance(linear.weight, nn.Parameter):
        raise TypeError(f"linear.weight must be a Parameter, not computed by a parametrization, in {name}")
    if is_lazy(linear.weight):
        raise TypeError(f"linear is a {name} without a weight yet; run one forward pass through it first")
    if linear.weight.dtype not in _FLOAT_DTYPES:
        raise TypeError(f"linear.weight must be {_names(_FLOAT_DTYPES)}, got {linear.weight.dtype}")


def check_rank(rank: int, in_features: int, out_features: int) -> None:
    """``rank`` must be a positive integer; one above the largest that can help only warns."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    largest = min(in_features, out_features)
    if rank > largest:
        warnings.warn(
            f"rank {rank} is above {largest} = min(in_features, out_features); it adds parameters but nothing more",
            stacklevel=4,
        )


def check_alpha(alpha: float) -> None:
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha!r}")


def check_dropout(dropout: float, name: str = "dropout") -> None:
    if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {dropout!r}")


def check_init(init: str) -> None:
    if init not in ("default", "gaussian"):
        raise ValueError(f"init must be 'default' or 'gaussian', got {init!r}")


def check_adapter_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    allowed = [d for d in _FLOAT_DTYPES if d != torch.float64 or weight_dtype == torch.float64]
    if dtype not in allowed:
        raise TypeError(f"adapter_dtype must be {_names(allowed)} for a {weight_dtype} weight, got {dtype!r}")


def check_enable_lora(enable_lora: Sequence[bool], out_features: int) -> None:
    """``enable_lora`` must name slices that ``out_features`` divides into, at least one of them True."""
    if not isinstance(enable_lora, Sequence) or not all(isinstance(on, bool) for on in enable_lora):
        raise TypeError(f"enable_lora must be a sequence of bools, got {enable_lora!r}")
    if not any(enable_lora):
        raise ValueError(f"enable_lora must enable at least one slice, got {list(enable_lora)!r}")
    if out_features % len(enable_lora):
        raise ValueError(
            f"enable_lora names {len(enable_lora)} slices, which do not divide out_features = {out_features}"
        )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)
