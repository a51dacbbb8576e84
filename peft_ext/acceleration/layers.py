"""Layers of Hugging Face PEFT that change their class: the same object, with a forward of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_ext.acceleration.report import Acceleration

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What the ops compute with."""

Reasons = dict[str | None, str]
"""Why an adapter is not served, by its name; under None, why no adapter of the layer is."""


@dataclass(frozen=True)
class Replacement:
    """What takes the place of a class of PEFT's.

    Args:
        ours: a subclass that overrides nothing but how outputs are computed.
        op: its op.
        reasons: of a layer, what is not served; from (layer, names of its adapters).
    """

    ours: type[nn.Module]
    op: str
    reasons: Callable[[Any, Iterable[str]], Reasons]


LAYERS: dict[type[nn.Module], Replacement] = {}
"""By PEFT's class."""
TUNERS: dict[type[nn.Module], type[nn.Module]] = {}
"""PEFT's classes that make layers, and ours, which accelerate what they make."""


class AcceleratingTuner:
    """Mixin before a tuner of PEFT's: adapters that are added later are accelerated too."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter, as PEFT does."""
        super().inject_adapter(model, *args, **kwargs)  # type: ignore[misc]
        accelerate_layers(model)


def accelerate_layers(model: nn.Module) -> Acceleration:
    """Gives our classes to all layers in a model that they serve, and PEFT's back to those that they do not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    report = Acceleration()
    originals = _originals()
    for name, module in model.named_modules():
        original = originals.get(type(module), type(module))
        if original in TUNERS:
            module.__class__ = TUNERS[original]
        elif isinstance(module, BaseTunerLayer):
            _accelerate_layer(name, module, original, report)
    return report


def restore_layers(model: nn.Module) -> None:
    """Gives all modules in a model PEFT's classes back."""
    originals = _originals()
    for module in model.modules():
        module.__class__ = originals.get(type(module), type(module))


def _originals() -> Mapping[type[nn.Module], type[nn.Module]]:
    """PEFT's class by ours."""
    layers = {replacement.ours: original for original, replacement in LAYERS.items()}
    return layers | {ours: original for original, ours in TUNERS.items()}


def _accelerate_layer(name: str, layer: Any, original: type[nn.Module], report: Acceleration) -> None:
    replacement = LAYERS.get(original)
    if replacement is None:
        report.left[name] = f"there is no op for {original.__module__.removeprefix('peft.tuners.')}.{original.__name__}"
        return
    adapters = sorted(layer._get_available_adapters())
    reasons = replacement.reasons(layer, adapters)
    if None in reasons or (adapters and all(adapter in reasons for adapter in adapters)):
        layer.__class__ = original
        report.left[name] = "; ".join(dict.fromkeys(reasons.values()))
        return
    layer.__class__ = replacement.ours
    report.layers[name] = replacement.op
    report.left.update({f"{name} [{adapter}]": reason for adapter, reason in reasons.items()})
