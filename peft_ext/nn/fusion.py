"""AdapterFusion: what several frozen adapters say, mixed by attention (Pfeiffer et al., 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_ext.nn._checks import check_sizes
from peft_ext.ops import adapter_fusion

VALUE_OFF_DIAGONAL = 1e-6
QUERY_KEY_STD = 0.02


class _Fusion(nn.Module):
    """What both forms share: the number of adapters, and a look at the weights that they got."""

    def __init__(self, hidden_dim: int, num_adapters: int) -> None:
        super().__init__()
        check_sizes({"hidden_dim": hidden_dim, "num_adapters": num_adapters})
        self.hidden_dim = hidden_dim
        self.num_adapters = num_adapters
        self._recorded: list[Tensor] | None = None

    def _mix(
        self, query: Tensor, outputs: Sequence[Tensor] | Tensor, key: nn.Linear, scale: float
    ) -> tuple[Tensor, Tensor]:
        if len(outputs) != self.num_adapters:
            raise ValueError(
                f"adapter_outputs must hold num_adapters = {self.num_adapters} outputs, got {len(outputs)}"
            )
        mix, weights = adapter_fusion(query, outputs, key.weight, key.bias, scale)
        if self._recorded is not None:
            self._recorded.append(weights.detach())
        return mix, weights

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"hidden_dim={self.hidden_dim}, num_adapters={self.num_adapters}"


class AdapterFusion(_Fusion):
    r"""Mixes adapters' outputs by one learned query: softmax over i of q · key_proj(zᵢ) / √d, then Σ wᵢ zᵢ.

    The keys are never formed: see :func:`peft_ext.ops.adapter_fusion`. So ``key_proj.bias``, which moves all logits
    alike, has a gradient of exactly zero.

    Args:
        hidden_dim: width d of the outputs.
        num_adapters: how many adapters there are.
        device, dtype: of the parameters.

    Attributes:
        query: ``[hidden_dim]``, drawn from a standard normal distribution.
        key_proj: ``nn.Linear(hidden_dim, hidden_dim)``.

    Raises:
        ValueError: for sizes below 1; in forward for no outputs, another number than ``num_adapters``, and outputs of
            unequal or wrong width.

    Example:
        >>> import torch
        >>> from peft_ext import AdapterFusion
        >>> fusion = AdapterFusion(64, num_adapters=3)
        >>> outputs = [torch.randn(32, 64) for _ in range(3)]
        >>> fusion(outputs).shape
        torch.Size([32, 64])
        >>> mix, weights = fusion(outputs, return_weights=True)
        >>> weights.shape, torch.allclose(weights.sum(-1), torch.ones(32))
        (torch.Size([32, 3]), True)
    """

    def __init__(
        self,
        hidden_dim: int,
        num_adapters: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_dim, num_adapters)
        self.query = nn.Parameter(torch.randn(hidden_dim, device=device, dtype=dtype))
        self.key_proj = nn.Linear(hidden_dim, hidden_dim, device=device, dtype=dtype)
        self.scale = hidden_dim**-0.5

    def forward(
        self, adapter_outputs: Sequence[Tensor] | Tensor, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Maps N tensors ``[..., hidden_dim]``, or one ``[N, ..., hidden_dim]``, to ``[..., hidden_dim]``.

        With ``return_weights`` also the weights ``[..., N]``.
        """
        mix, weights = self._mix(self.query, adapter_outputs, self.key_proj, self.scale)
        return (mix, weights) if return_weights else mix


class AttentionFusion(_Fusion):
    r"""The paper's form: y = residual + V Σ wᵢ zᵢ, w = softmax over i of Q(x) · K(zᵢ), without 1/√d.

    x is the layer's input at this place, zᵢ are the adapters' outputs before their residual connection. V starts
    near the identity, so that the fusion starts near a mean of the adapters, and :meth:`regularisation` keeps it there.
    With float32 parameters it mixes half-precision outputs too; the result has the dtype of x.

    Args:
        hidden_dim: width d.
        num_adapters: how many adapters there are.
        device, dtype: of the parameters.

    Attributes:
        query, key: ``nn.Linear(hidden_dim, hidden_dim)`` drawn from N(0, 0.02²), biases zero.
        value: ``nn.Linear(hidden_dim, hidden_dim, bias=False)``: diagonal 1, elsewhere 1e-6. The names, as the
            initial values, are AdapterHub's.

    Raises:
        ValueError: as :class:`AdapterFusion`.

    Example:
        >>> import torch
        >>> from peft_ext import AttentionFusion
        >>> fusion = AttentionFusion(8, num_adapters=2)
        >>> x, outputs = torch.randn(4, 5, 8), [torch.randn(4, 5, 8) for _ in range(2)]
        >>> fusion(x, outputs, residual=x).shape
        torch.Size([4, 5, 8])
        >>> bool(fusion.regularisation() < 1e-9)
        True
    """

    def __init__(
        self,
        hidden_dim: int,
        num_adapters: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_dim, num_adapters)
        self.query = nn.Linear(hidden_dim, hidden_dim, device=device, dtype=dtype)
        self.key = nn.Linear(hidden_dim, hidden_dim, device=device, dtype=dtype)
        self.value = nn.Linear(hidden_dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws query and key anew and puts value near the identity."""
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=QUERY_KEY_STD)
            nn.init.zeros_(linear.bias)
        self.value.weight.fill_(VALUE_OFF_DIAGONAL).fill_diagonal_(1.0)

    def forward(
        self,
        x: Tensor,
        adapter_outputs: Sequence[Tensor] | Tensor,
        residual: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The mix ``[..., hidden_dim]``; with ``return_weights`` also the weights ``[..., N]``.

        Args:
            x: what the query is made of, ``[..., hidden_dim]``.
            adapter_outputs: N tensors of that shape, or one ``[N, ..., hidden_dim]``.
            residual: added to the mix, if given.
            return_weights: return the weights too.
        """
        query, value = self.query, self.value
        mix, weights = self._mix(query(x.to(query.weight.dtype)), adapter_outputs, self.key, 1.0)
        fused = F.linear(mix.to(value.weight.dtype), value.weight).to(x.dtype)
        fused = fused if residual is None else residual + fused
        return (fused, weights) if return_weights else fused

    def regularisation(self, strength: float = 0.01) -> Tensor:
        """strength · ‖V - I‖², to be added to the loss (the paper's and AdapterHub's strength is 0.01)."""
        value = self.value.weight
        identity = torch.eye(self.hidden_dim, device=value.device, dtype=value.dtype)
        return strength * (identity - value).square().sum()


@contextmanager
def fusion_weights(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collects the weights that every fusion of ``model`` gives its adapters, call by call.

    Yields:
        Lists by module name, filled as the model runs: one tensor ``[..., N]`` a call, detached.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from peft_ext import AdapterFusion
        >>> from peft_ext.nn import fusion_weights
        >>> model = nn.ModuleDict({"fusion": AdapterFusion(8, num_adapters=2)})
        >>> with fusion_weights(model) as weights:
        ...     _ = model["fusion"]([torch.randn(4, 8), torch.randn(4, 8)])
        >>> [tensor.shape for tensor in weights["fusion"]]
        [torch.Size([4, 2])]
    """
    fusions = {name: module for name, module in model.named_modules() if isinstance(module, _Fusion)}
    recorded: dict[str, list[Tensor]] = {name: [] for name in fusions}
    for name, module in fusions.items():
        module._recorded = recorded[name]
    try:
        yield recorded
    finally:
        for module in fusions.values():
            module._recorded = None
