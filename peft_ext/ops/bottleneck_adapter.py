"""A bottleneck adapter, in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ext import reference
from peft_ext._loader import is_native


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    activation: str = "relu",
    norm: str = "none",
    residual: bool = True,
    scaling: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    r"""y = x + s · up(act(down(LN(x)))) (Houlsby et al., 2019, fig. 2), with or without its norm and residual.

    Everything is computed and accumulated in float32 (float64 for a float64 ``x``), in one pass over
    blocks of rows. Kept for the backward are the arguments and what the activation takes, ``[..., bottleneck]``;
    norm and activation are computed anew.
    Autocast leaves the op alone, whose output has the dtype of ``x``.

    Args:
        x: input ``[..., features]``; float32, float64, bfloat16 or float16.
        down_weight: ``[bottleneck, features]``; float32, bfloat16 or float16, or float64 if ``x`` is.
        down_bias: ``[bottleneck]`` or None.
        up_weight: ``[features, bottleneck]``.
        up_bias: ``[features]`` or None.
        norm_weight, norm_bias: the layer norm's, ``[features]``; None without a norm. All
            parameters have the dtype of ``down_weight``.
        activation: "relu", "gelu", "gelu_new" (its tanh form), "silu" or "tanh".
        norm: "none"; "pre", LN of the input of ``down``; or "post", LN of the branch,
            y = x + LN(s · up(act(down(x)))).
        residual: whether x is added.
        scaling: s.
        eps: the layer norm's.

    Returns:
        ``[..., features]`` of the dtype of ``x``.

    Raises:
        ValueError: for shapes, devices or values that do not fit.
        TypeError: for dtypes that do not fit.

    Gradients flow to all tensors. There is neither double backward nor forward mode.

    Example:
        >>> import torch
        >>> from peft_ext.ops import bottleneck_adapter
        >>> x = torch.tensor([[1.0, -2.0, 3.0]])
        >>> bottleneck_adapter(x, torch.ones(1, 3), None, torch.ones(3, 1), None, scaling=0.5)
        tensor([[ 2., -1.,  4.]])
    """
    arguments = (x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias)
    settings = (activation, norm, residual, scaling, eps)
    if is_native(x):
        return torch.ops.peft_ext.bottleneck_adapter(*arguments, *settings)[0]
    return reference.bottleneck_adapter(*arguments, *settings)
