"""The seed of counter-based dropout."""

from __future__ import annotations

import torch
from torch import Tensor

_INT64 = torch.iinfo(torch.int64)


def draw_seed(device: torch.device) -> Tensor:
    """A fresh int64 seed ``[1]`` from torch's generator of ``device``, so ``manual_seed`` governs it."""
    return torch.randint(_INT64.min, _INT64.max, (1,), dtype=torch.int64, device=device)
