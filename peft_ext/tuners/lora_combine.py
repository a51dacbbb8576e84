"""One LoRA adapter made of several, in Hugging Face PEFT's ways (``add_weighted_adapter``)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_ext.nn._checks import check_sizes
from peft_ext.tuners.lora_init import Factors
from peft_ext.tuners.lora_layers import LoraLayer

_PRUNED = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
COMBINATIONS = ("svd", "linear", "cat", *_PRUNED, *(f"{name}_svd" for name in _PRUNED))
_MAJORITIES = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """How adapters are combined; the fields are the arguments of ``add_weighted_adapter``.

    Raises:
        ValueError: for a value out of range.
    """

    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        if self.combination_type not in COMBINATIONS:
            raise ValueError(f"combination_type must be one of {COMBINATIONS}, got {self.combination_type!r}")
        if self.svd_rank is not None:
            check_sizes({"svd_rank": self.svd_rank})
        if self.majority_sign_method not in _MAJORITIES:
            raise ValueError(f"majority_sign_method must be one of {_MAJORITIES}, got {self.majority_sign_method!r}")
        if self.prunes and (self.density is None or not 0 <= self.density <= 1):
            raise ValueError(
                f"combination_type={self.combination_type!r} needs a density in [0, 1], got {self.density!r}"
            )
        if self.svd_clamp is not None and not 0 <= self.svd_clamp <= 1:
            raise ValueError(f"svd_clamp must be a quantile in [0, 1], got {self.svd_clamp!r}")
        if self.prunes and self.density == 1:
            warnings.warn("density=1 prunes nothing", stacklevel=5)

    @property
    def prunes(self) -> bool:
        """Whether values are dropped first."""
        return self.combination_type.removesuffix("_svd") in _PRUNED

    @property
    def decomposes(self) -> bool:
        """Whether updates are summed, and factors made of the sum."""
        return self.combination_type.endswith("svd")

    def rank(self, ranks: Sequence[int]) -> int:
        """The rank of what adapters of these ranks become."""
        if self.combination_type == "cat":
            return sum(ranks)
        if self.decomposes:
            return self.svd_rank or max(ranks)
        if len(set(ranks)) > 1:
            raise ValueError(
                f"combination_type={self.combination_type!r} needs adapters of one rank, got {list(ranks)}: "
                "'svd' and 'cat' take any"
            )
        return ranks[0]

    @torch.no_grad()
    def combine(
        self, factors: Sequence[Factors], scalings: Sequence[float], weights: Sequence[float], rank: int
    ) -> Factors:
        """The factors of Σ wᵢ sᵢ Bᵢ Aᵢ, with a scaling of 1, or what comes near it.

        Args:
            factors: of one layer, as matrices.
            scalings: the adapters' own.
            weights: what each is multiplied by.
            rank: at most that of the result.
        """
        scaled = [weight * scaling for weight, scaling in zip(weights, scalings, strict=True)]
        if self.combination_type == "cat":
            stacked = torch.cat([weight * A for (A, _), weight in zip(factors, scaled, strict=True)])
            return Factors(stacked, torch.cat([B for _, B in factors], dim=1))
        if self.decomposes:
            updates = [scaling * (B @ A) for (A, B), scaling in zip(factors, scalings, strict=True)]
            return self._decompose(self._merge(updates, weights), rank)
        roots = [math.sqrt(abs(weight)) for weight in scaled]
        # the sign on one side only, or it would cancel
        signed = [math.copysign(root, weight) for root, weight in zip(roots, scaled, strict=True)]
        return Factors(self._merge([A for A, _ in factors], signed), self._merge([B for _, B in factors], roots))

    def _merge(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        kind = self.combination_type.removesuffix("_svd")
        if self.prunes and self.density != 1:
            prune = _keep_random if kind.startswith("dare") else _keep_largest
            tensors = [prune(tensor, float(self.density or 0)) for tensor in tensors]
        stacked = torch.stack(list(tensors))
        weighted = stacked * torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).view(-1, 1, 1)
        if not kind.endswith("ties"):
            return weighted.sum(dim=0)
        agrees = self._agrees(stacked)
        return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp_min(1)

    def _agrees(self, stacked: Tensor) -> Tensor:
        """Which elements have the sign that most of the adapters have there (TIES, Yadav et al., 2023)."""
        votes = stacked if self.majority_sign_method == "total" else stacked.sign()
        return stacked.sign() == torch.where(votes.sum(dim=0) >= 0, 1, -1)

    def _decompose(self, update: Tensor, rank: int) -> Factors:
        """The best factors of a rank, with all of the singular values in B."""
        u, s, vh = torch.linalg.svd(update, full_matrices=self.svd_full_matrices, driver=self.svd_driver)
        A, B = vh[:rank], u[:, :rank] * s[:rank]
        if self.svd_clamp is None:
            return Factors(A, B)
        high = torch.quantile(torch.cat([B.flatten(), A.flatten()]), self.svd_clamp)
        return Factors(A.clamp(-high, high), B.clamp(-high, high))


def _keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Zero but for the share of elements that are largest."""
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten().index_fill(0, kept, 1)
    return tensor * mask.view(tensor.shape)


def _keep_random(tensor: Tensor, density: float) -> Tensor:
    """Zero but for a random share, which is scaled up (DARE, Yu et al., 2023)."""
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if density > 0 else kept


def layer_factors(layer: LoraLayer, adapter_name: str) -> Factors:
    """A and B of an adapter as matrices, in float32 or float64.

    Raises:
        ValueError: for a convolution with groups, whose update is not B A.
    """
    if getattr(layer.base_layer, "groups", 1) > 1:
        raise ValueError("adapters of a Conv2d with groups > 1 cannot be combined")
    A, B = _parameters(layer, adapter_name).values()
    dtype = A.dtype if A.dtype == torch.float64 else torch.float32
    return Factors(A.detach().flatten(1).to(dtype), B.detach().flatten(1).to(dtype))


def as_checkpoint(layer: LoraLayer, like: str, factors: Factors, rank: int) -> dict[str, Tensor]:
    """Factors, filled up with zeros to ``rank``, in the shapes and under the keys of the adapter ``like``."""
    A, B = factors
    A = torch.cat([A, A.new_zeros(rank - len(A), A.size(1))])
    B = torch.cat([B, B.new_zeros(len(B), rank - B.size(1))], dim=1)
    (key_A, like_A), (key_B, like_B) = _parameters(layer, like).items()
    return {key_A: A.reshape(rank, *like_A.shape[1:]), key_B: B.reshape(len(B), rank, *like_B.shape[2:])}


def _parameters(layer: LoraLayer, adapter_name: str) -> dict[str, Any]:
    """A and B by their keys in a checkpoint."""
    entries = layer.entries(layer.parts(adapter_name), adapter_name)
    found = {entry.checkpoint_key: entry.tensor for entry in entries if "magnitude" not in entry.checkpoint_key}
    return dict(sorted(found.items()))  # lora_A.weight before lora_B.weight
