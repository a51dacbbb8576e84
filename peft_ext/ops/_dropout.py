"""The seed of counter-based dropout."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.compiler import is_compiling

from peft_ext._loader import why_not_native

_INT64 = torch.iinfo(torch.int64)
_draw_on_cpu = None if why_not_native else importlib.import_module("peft_ext._C").draw_seed


def draw_seed(x: Tensor) -> Tensor:
    """A fresh int64 seed ``[1]`` from torch's generator of the device of ``x``, so ``manual_seed`` governs it."""
    if _draw_on_cpu is not None and x.is_cpu and not is_compiling():
        seed: Tensor = _draw_on_cpu()  # The same, sooner.
        return seed
    return torch.randint(_INT64.min, _INT64.max, (1,), dtype=torch.int64, device=x.device)
