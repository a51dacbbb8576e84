"""Autocast for the references, as csrc/autocast.cpp has it for the native ops.

The arguments are cast first, and what follows runs with autocast off, which would sum in the half precision.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

# Asked once: torch.compile does not trace the question in every version of torch.
_DEVICES = frozenset(device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device))

MaybeTensor = TypeVar("MaybeTensor", Tensor, "Tensor | None")


def cast(tensor: MaybeTensor) -> MaybeTensor:
    """In the autocast dtype, where autocast is on; float64 and what is no float stay as they are."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    device = tensor.device.type
    on = device in _DEVICES and torch.is_autocast_enabled(device)
    return tensor.to(torch.get_autocast_dtype(device)) if on else tensor


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast."""
    return torch.autocast(device.type, enabled=False) if device.type in _DEVICES else nullcontext()
