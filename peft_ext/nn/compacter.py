"""Compacter: bottleneck adapters whose projections are sums of Kronecker products."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peft_ext.nn._checks import check_sizes
from peft_ext.ops import kron_linear
from peft_ext.reference.bottleneck_adapter import ACTIVATIONS


class PHMLinear(nn.Module):
    r"""y = x H + b with H = Σᵢ Aᵢ ⊗ (sᵢ tᵢ), the Aᵢ given with the input so that layers can share them.

    Attributes have AdapterHub's names: ``W_left`` is s ``[terms, in_features / n, rank]``, ``W_right`` is t
    ``[terms, rank, out_features / n]``, ``b`` is ``[out_features]``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        rank: int,
        terms: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.W_left = empty(terms, in_features // n, rank)
        self.W_right = empty(terms, rank, out_features // n)
        self.b = empty(out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """s and t xavier-uniform with gain √2, term by term; b zero."""
        for factor in (*self.W_left, *self.W_right):
            nn.init.xavier_uniform_(factor, gain=math.sqrt(2))
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor, phm_rule: Tensor) -> Tensor:
        """Maps ``x`` ``[..., in_features]`` to ``[..., out_features]`` with the Aᵢ ``phm_rule`` ``[terms, n, n]``."""
        return kron_linear(x, phm_rule, self.W_left, self.W_right, self.b)


class CompacterAdapter(nn.Module):
    r"""x + up(act(down(x))), both projections Σᵢ Aᵢ ⊗ (sᵢ tᵢ) with one A (Mahabadi et al., 2021).

    ``EfficientCompacterAdapter`` is another name of it.

    Args:
        d_model: features; a multiple of ``phm_dim``.
        bottleneck_dim: features between the projections; a multiple of ``phm_dim``.
        rank: rank of sᵢ tᵢ.
        phm_dim: n, the side of the Aᵢ.
        num_kron_terms: terms of the sums; by default n, as in the paper.
        phm_rule: A ``[num_kron_terms, n, n]`` of another adapter, to be shared with it; by default a new one.
        phm_init_range: standard deviation of a new A.
        activation: "gelu_new", "gelu", "relu", "silu" or "tanh".
        residual: whether the input is added to the output.
        device, dtype: of the parameters.

    Attributes:
        shares_phm_rule: whether A was given.
        phm_rule: A; appears in every adapter that shares it, and counts once.
        down, up: :class:`PHMLinear`.

    Raises:
        ValueError: if n does not divide both widths, ``phm_rule`` has another shape, a size is not positive, or the
            activation is unknown.

    Example:
        >>> import torch
        >>> from peft_ext import CompacterAdapter
        >>> first = CompacterAdapter(768, 24, rank=1)
        >>> second = CompacterAdapter(768, 24, rank=1, phm_rule=first.phm_rule)
        >>> sum(p.numel() for p in torch.nn.ModuleList([first, second]).parameters())
        4816
        >>> first(torch.zeros(2, 768)).shape
        torch.Size([2, 768])
    """

    def __init__(
        self,
        d_model: int,
        bottleneck_dim: int,
        rank: int = 1,
        *,
        phm_dim: int = 4,
        num_kron_terms: int | None = None,
        phm_rule: nn.Parameter | None = None,
        phm_init_range: float = 1e-4,
        activation: str = "gelu_new",
        residual: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        terms = phm_dim if num_kron_terms is None else num_kron_terms
        check_compacter(d_model, bottleneck_dim, rank, phm_dim, terms, activation)
        shared = phm_rule is not None
        if phm_rule is None:
            phm_rule = new_phm_rule(phm_dim, terms, phm_init_range, device=device, dtype=dtype)
        if phm_rule.shape != (terms, phm_dim, phm_dim):
            raise ValueError(f"phm_rule must be {[terms, phm_dim, phm_dim]}, but has shape {list(phm_rule.shape)}")
        self.d_model, self.bottleneck_dim, self.rank = d_model, bottleneck_dim, rank
        self.phm_dim, self.num_kron_terms = phm_dim, terms
        self.activation, self.residual = activation, residual
        self.shares_phm_rule = shared
        self.phm_rule = phm_rule
        self.down = PHMLinear(d_model, bottleneck_dim, phm_dim, rank, terms, device=device, dtype=dtype)
        self.up = PHMLinear(bottleneck_dim, d_model, phm_dim, rank, terms, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` ``[..., d_model]`` to the same shape."""
        hidden = ACTIVATIONS[self.activation](self.down(x, self.phm_rule))
        y = self.up(hidden, self.phm_rule)
        return x + y if self.residual else y

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return (
            f"{self.d_model}, {self.bottleneck_dim}, rank={self.rank}, phm_dim={self.phm_dim}, "
            f"num_kron_terms={self.num_kron_terms}, activation={self.activation!r}, residual={self.residual}"
        )


EfficientCompacterAdapter = CompacterAdapter


def new_phm_rule(
    phm_dim: int,
    num_kron_terms: int,
    init_range: float,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Parameter:
    """A ``[num_kron_terms, phm_dim, phm_dim]``, normal with deviation ``init_range``."""
    rule = torch.empty(num_kron_terms, phm_dim, phm_dim, device=device, dtype=dtype)
    return nn.Parameter(nn.init.normal_(rule, std=init_range))


def check_compacter(
    d_model: int, bottleneck_dim: int, rank: int, phm_dim: int, num_kron_terms: int, activation: str
) -> None:
    """Raises a ValueError for settings that no adapter can have."""
    sizes = {"d_model": d_model, "bottleneck_dim": bottleneck_dim, "rank": rank, "phm_dim": phm_dim}
    check_sizes({**sizes, "num_kron_terms": num_kron_terms})
    if d_model % phm_dim or bottleneck_dim % phm_dim:
        common = [n for n in range(1, min(d_model, bottleneck_dim) + 1) if d_model % n == 0 == bottleneck_dim % n]
        nearest = min(common, key=lambda n: abs(n - phm_dim))
        raise ValueError(
            f"phm_dim={phm_dim} must divide d_model={d_model} and bottleneck_dim={bottleneck_dim}; "
            f"the nearest that does: {nearest}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
