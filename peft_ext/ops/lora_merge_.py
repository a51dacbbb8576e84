"""Folds a LoRA update into the frozen weight, in place and reversibly."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ext import reference
from peft_ext._loader import is_native


def lora_merge_(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""W += s B A in place; returns what :func:`peft_ext.ops.lora_unmerge_` needs to undo it to the bit.

    The sum is formed in float32 (float64 for a float64 weight) and rounded once to W's dtype.

    Args:
        weight: ``[out_features, in_features]``, any strides; changed in place.
        lora_A: ``[rank, in_features]``.
        lora_B: ``[out_features, rank]``.
        scaling: s.

    Returns:
        ``(residual, outliers)``: int8 ``[out_features, in_features]``, the distance in units in the
        last place between W and (W + s B A) - s B A; and, in W's dtype, the few weights for which
        it does not fit eight bits, in row-major order, however W lies in memory: a copy of W with other strides can
        be unmerged too, to within a rounding of s B A.

    Raises:
        ValueError, TypeError: for shapes, devices or dtypes that do not fit; W is then unchanged.

    Example:
        >>> import torch
        >>> from peft_ext.ops import lora_merge_, lora_unmerge_
        >>> weight, a, b = torch.tensor([[0.1, 1e-9]]), torch.ones(1, 2), torch.ones(1, 1)
        >>> before = weight.clone()
        >>> residual, outliers = lora_merge_(weight, a, b)
        >>> lora_unmerge_(weight, a, b, residual, outliers)
        >>> torch.equal(weight, before)
        True
    """
    op = torch.ops.peft_ext.lora_merge_ if is_native(weight) else reference.lora_merge_
    return op(weight, lora_A, lora_B, scaling)
