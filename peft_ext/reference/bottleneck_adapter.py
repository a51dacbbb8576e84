"""Oracle of :func:`peft_ext.ops.bottleneck_adapter`, and what it accepts.

csrc/common/bottleneck_checks.cpp is the same for the native op.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_ext.reference.autocast import autocast_off
from peft_ext.reference.dtypes import FLOATS

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
NORMS = ("none", "pre", "post")


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    activation: str = "relu",
    norm: str = "none",
    residual: bool = True,
    scaling: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """y = x + s up(act(down(LN(x)))) and its other forms, in float32 (float64 for a float64 x)."""
    check_bottleneck(
        x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation, norm, scaling, eps
    )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide, down, down_b, up, up_b, norm_w, norm_b = (
        None if tensor is None else tensor.to(dtype)
        for tensor in (x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias)
    )
    assert wide is not None and down is not None and up is not None
    with autocast_off(x.device):
        layer_norm = partial(F.layer_norm, normalized_shape=x.shape[-1:], weight=norm_w, bias=norm_b, eps=eps)
        hidden = ACTIVATIONS[activation](F.linear(layer_norm(wide) if norm == "pre" else wide, down, down_b))
        branch = scaling * F.linear(hidden, up, up_b)
        branch = layer_norm(branch) if norm == "post" else branch
    return (wide + branch if residual else branch).to(x.dtype)


def check_bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    norm: str,
    scaling: float,
    eps: float,
) -> None:
    """Raises a ValueError or TypeError for arguments that the op does not take."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, but is {activation!r}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, but is {norm!r}")
    for name, tensor in (("x", x), ("down_weight", down_weight)):
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, but is {tensor.dtype}")
    if down_weight.dtype == torch.float64 and x.dtype != torch.float64:
        raise TypeError(f"down_weight is float64, which only a float64 x takes, but x is {x.dtype}")
    if down_weight.dim() != 2 or down_weight.size(0) == 0 or down_weight.size(1) == 0:
        raise ValueError(
            f"down_weight must be [bottleneck, features] with both > 0, but has shape {list(down_weight.shape)}"
        )
    width, features = down_weight.shape
    if x.dim() == 0 or x.size(-1) != features:
        raise ValueError(
            f"x must be [..., {features}] for down_weight {list(down_weight.shape)}, but has shape {list(x.shape)}"
        )
    if (norm_weight is not None, norm_bias is not None) != (norm != "none", norm != "none"):
        raise ValueError(
            f"norm_weight and norm_bias must be given with norm 'pre' or 'post' and only then, but norm is {norm!r}"
        )
    wanted = {
        "down_weight": (down_weight, [width, features]),
        "up_weight": (up_weight, [features, width]),
        "down_bias": (down_bias, [width]),
        "up_bias": (up_bias, [features]),
        "norm_weight": (norm_weight, [features]),
        "norm_bias": (norm_bias, [features]),
    }
    for name, (parameter, shape) in wanted.items():
        if parameter is not None:
            _check_tensor(name, parameter, shape, x, down_weight)
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, but is {scaling}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and >= 0, but is {eps}")


def _check_tensor(name: str, tensor: Tensor, shape: list[int], x: Tensor, down_weight: Tensor) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be {shape} for down_weight {list(down_weight.shape)}, but has shape {list(tensor.shape)}"
        )
    if tensor.dtype != down_weight.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, but down_weight is {down_weight.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, but x on {x.device}")
