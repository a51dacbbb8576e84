"""Bottleneck adapters: a small trained network, added to the stream of a frozen model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_ext.nn._checks import check_sizes
from peft_ext.ops import bottleneck_adapter
from peft_ext.reference.bottleneck_adapter import ACTIVATIONS


def _check_arguments(hidden_dim: int, bottleneck_dim: int, activation: str) -> None:
    check_sizes({"hidden_dim": hidden_dim, "bottleneck_dim": bottleneck_dim})
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


class Adapter(nn.Module):
    """up(act(down(x))), without a residual: what AdapterFusion mixes (Pfeiffer et al., arXiv:2005.00247).

    Parameters are those of ``down_proj`` and ``up_proj``, 2 d k + k + d in number.

    Args:
        hidden_dim: d, features of input and output.
        bottleneck_dim: k, features in between.
        activation: "relu", "gelu", "gelu_new" (its tanh form), "silu" or "tanh".
        scaling: the output is multiplied by it.
        bias: whether both projections have biases.
        device, dtype: of the parameters, as in ``nn.Linear``.

    Raises:
        ValueError: for a size that is not positive, or an unknown activation.

    Example:
        >>> import torch
        >>> from peft_ext import Adapter
        >>> Adapter(8, 2)(torch.zeros(3, 8)).shape
        torch.Size([3, 8])
    """

    residual = False

    def __init__(
        self,
        hidden_dim: int,
        bottleneck_dim: int,
        *,
        activation: str = "relu",
        scaling: float = 1.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(hidden_dim, bottleneck_dim, activation)
        self.activation = activation
        self.scaling = scaling
        self.down_proj = nn.Linear(hidden_dim, bottleneck_dim, bias=bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(bottleneck_dim, hidden_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` ``[..., hidden_dim]`` to the same shape and dtype."""
        down, up = self.down_proj, self.up_proj
        return bottleneck_adapter(
            x,
            down.weight,
            down.bias,
            up.weight,
            up.bias,
            activation=self.activation,
            residual=self.residual,
            scaling=self.scaling,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, scaling={self.scaling}"


class SimpleAdapter(Adapter):
    """x + up(act(down(x))); arguments and parameters are :class:`Adapter`'s.

    Example:
        >>> from peft_ext import SimpleAdapter, trainable_parameters
        >>> trainable_parameters(SimpleAdapter(768, 64))
        (99136, 99136)
    """

    residual = True


class HoulsbyAdapter(nn.Module):
    """x + up(act(down(LN(x)))), used after attention and after the FFN (Houlsby et al., arXiv:1902.00751).

    Parameters are those of ``norm``, ``down`` and ``up``.

    Args:
        hidden_dim, bottleneck_dim, activation, bias, device, dtype: as in :class:`Adapter`.

    Raises:
        ValueError: for a size that is not positive, or an unknown activation.

    Example:
        >>> from peft_ext import HoulsbyAdapter
        >>> adapter = HoulsbyAdapter(768, 64)
        >>> adapter.down.weight.numel() + adapter.up.weight.numel()
        98304
    """

    def __init__(
        self,
        hidden_dim: int,
        bottleneck_dim: int,
        *,
        activation: str = "relu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(hidden_dim, bottleneck_dim, activation)
        self.activation = activation
        self.norm = nn.LayerNorm(hidden_dim, device=device, dtype=dtype)
        self.down = nn.Linear(hidden_dim, bottleneck_dim, bias=bias, device=device, dtype=dtype)
        self.up = nn.Linear(bottleneck_dim, hidden_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` ``[..., hidden_dim]`` to the same shape and dtype."""
        return bottleneck_adapter(
            x,
            self.down.weight,
            self.down.bias,
            self.up.weight,
            self.up.bias,
            self.norm.weight,
            self.norm.bias,
            activation=self.activation,
            norm="pre",
            eps=self.norm.eps,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
