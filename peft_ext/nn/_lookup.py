"""What layers ask at every call, in ways that cost less than a small kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn


def same_device(a: Tensor, b: Tensor) -> bool:
    """``a.device == b.device``, on the CPU without making the two devices."""
    return (a.is_cpu and b.is_cpu) or a.device == b.device


# nn.Module searches for an attribute and finds a parameter last.


def weight_of(module: nn.Module) -> Any:
    """``module.weight``."""
    try:
        return module._parameters["weight"]
    except KeyError:  # it is computed, or sharded
        return module.weight


def weights_of(modules: Mapping[str, Any], names: Iterable[str]) -> list[Any]:
    """The ``weight`` of several modules."""
    try:
        return [modules[name]._parameters["weight"] for name in names]
    except KeyError:
        return [modules[name].weight for name in names]


def two_parameters(module: nn.Module, first: str, second: str) -> tuple[Any, Any]:
    """Two parameters of a module by name."""
    parameters = module._parameters
    try:
        return parameters[first], parameters[second]
    except KeyError:
        return getattr(module, first), getattr(module, second)
