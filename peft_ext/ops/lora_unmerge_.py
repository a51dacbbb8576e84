"""Takes a LoRA update out of a weight again, to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ext import reference
from peft_ext._loader import is_native


def lora_unmerge_(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, residual: Tensor, outliers: Tensor, scaling: float = 1.0
) -> None:
    r"""W -= s B A in place, corrected by what ``lora_merge_`` returned: W has its old bits again.

    Args:
        weight: the merged weight ``[out_features, in_features]``; changed in place.
        lora_A, lora_B, scaling: the very values that were merged.
        residual, outliers: what :func:`peft_ext.ops.lora_merge_` returned.

    Raises:
        ValueError, TypeError: for shapes, devices or dtypes that do not fit, and where ``outliers``
            does not belong to ``residual``; W is then unchanged.
    """
    op = torch.ops.peft_ext.lora_unmerge_ if is_native(weight) else reference.lora_unmerge_
    op(weight, lora_A, lora_B, residual, outliers, scaling)
