"""Hugging Face PEFT's LoRA layers on ``lora_linear`` and ``multi_lora_linear``.

Whatever an op does not compute is left to PEFT's own forward, call by call: see :func:`base_reason`,
:func:`adapter_reason` and :meth:`Linear._takes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners import lora, mixed
from peft.tuners.lora import dora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from peft_ext import ops
from peft_ext.acceleration.layers import FLOATS, LAYERS, TUNERS, AcceleratingTuner, Reasons, Replacement
from peft_ext.nn._lookup import same_device
from peft_ext.tuners.layer import has_hooks

# as they are now: who replaces them later wants the replacement called
_LINEAR, _CONV1D = nn.Linear.forward, Conv1D.forward
_DROPOUT, _IDENTITY = nn.Dropout.forward, nn.Identity.forward


# What follows runs in every layer of every step. Dictionaries are faster than what nn.Module has to look up.


def base_reason(base: Any) -> str | None:
    """Why a layer around ``base`` runs PEFT's forward; None if the op computes what ``base`` does."""
    forward = type(base).forward
    if forward is not _LINEAR and forward is not _CONV1D:
        return f"its base layer is a {type(base).__name__}"
    if has_hooks(base):
        return "its base layer has hooks"
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return f"its base weight is a {type(base.weight).__name__}"
    if weight.dtype not in FLOATS:
        return f"its base weight is {weight.dtype}"
    if bias is not None and bias.dtype != weight.dtype:
        return f"its base weight is {weight.dtype}, but its bias {bias.dtype}"
    return "its base weight is trained" if weight.requires_grad else None


def adapter_reason(layer: Any, name: str) -> str | None:
    """Why a layer runs PEFT's forward for one of its adapters; None if the op computes what PEFT does."""
    modules = layer._modules
    lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"it is of the LoRA variant {type(variant).__name__}"
    if type(lora_A).forward is not _LINEAR or type(lora_B).forward is not _LINEAR:
        return f"its factors are a {type(lora_A).__name__} and a {type(lora_B).__name__}"
    if type(dropout).forward is not _IDENTITY and type(dropout).forward is not _DROPOUT:
        return f"its dropout is a {type(dropout).__name__}"
    if has_hooks(lora_A) or has_hooks(lora_B) or has_hooks(dropout):
        return "its modules have hooks"
    if lora_A._parameters.get("bias") is not None or lora_B._parameters.get("bias") is not None:
        return "it has lora_bias"
    A, B = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
    if A is None or B is None:
        return "its factors are computed"
    if A.dtype != B.dtype or A.dtype not in FLOATS:
        return f"its factors are {A.dtype} and {B.dtype}"
    if A.dtype == torch.float64 and modules["base_layer"].weight.dtype != torch.float64:
        return f"its factors are {A.dtype}, but the base weight is not"
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor) or not -math.inf < scaling < math.inf:
        return "its scaling is a tensor or not finite"
    return None if variant is None else _dora_reason(modules["lora_magnitude_vector"]._modules[name])


def _dora_reason(magnitude: nn.Module) -> str | None:
    if type(magnitude) is not dora.DoraLinearLayer or has_hooks(magnitude):
        return f"its magnitude is a {type(magnitude).__name__} or has hooks"
    return "PEFT caches DoRA's weights" if dora.ENABLE_DORA_CACHING else None


def layer_reasons(layer: Any, adapters: Iterable[str]) -> Reasons:
    """Everything that runs PEFT's forward."""
    reason = base_reason(layer.base_layer)
    if reason is not None:
        return {None: reason}
    reasons = {adapter: adapter_reason(layer, adapter) for adapter in adapters}
    return {adapter: reason for adapter, reason in reasons.items() if reason is not None}


class Linear(lora.Linear):
    """PEFT's LoRA around ``nn.Linear`` or ``Conv1D``; the class has PEFT's name, so that models print as before."""

    _modules: dict[str, Any]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, on our ops where they compute the same."""
        if args or kwargs or self._disable_adapters or self.merged_adapters or not self._takes(x):
            return super().forward(x, *args, **kwargs)
        held = self._modules["lora_A"]._modules
        names = [name for name in self.active_adapters if name in held]
        if len(names) == 1 and adapter_reason(self, names[0]) is None:
            return self._forward_dora(x, names[0]) if names[0] in self.lora_variant else self._forward_one(x, names[0])
        if len(names) > 1 and self._agree(names) and not any(map(self._dropout_p, names)):
            return self._forward_stacked(x, names)
        return super().forward(x)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """One adapter for each sample. PEFT's forward has checked the names before."""
        held = self._modules["lora_A"]._modules
        names = [name for name in dict.fromkeys(adapter_names) if name in held]
        given = args or any(value is not None for value in kwargs.values())  # aLoRA's offsets, or for the base layer
        if given or x.dim() < 2 or not self._takes(x) or not self._agree(names):
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        places = {name: place for place, name in enumerate(names)}
        lora_A, lora_B = zip(*map(self._factors, names), strict=True) if names else ((), ())
        return ops.multi_lora_linear(
            x,
            *self._base(),
            lora_A,
            lora_B,
            torch.tensor([self.scaling[name] for name in names], dtype=torch.float64, device=x.device),
            torch.tensor([places.get(name, -1) for name in adapter_names], device=x.device),
            dropout_p=[self._dropout_p(name) for name in names],
        )

    def _agree(self, names: list[str]) -> bool:
        """Whether one call of the op computes all these adapters: plain LoRA, of one dtype."""
        if self.lora_variant.keys() & names or any(adapter_reason(self, name) is not None for name in names):
            return False
        return len({self._factors(name)[0].dtype for name in names}) < 2

    def _takes(self, x: Tensor) -> bool:
        """Whether the op takes ``x`` and the base layer; PEFT's code raises the errors that users know."""
        base = self._modules["base_layer"]
        if base_reason(base) is not None or _has_any_global_hook() or not self.cast_input_dtype_enabled:
            return False
        weight = base._parameters["weight"]
        if x.dim() == 0 or x.size(-1) != self.in_features or not same_device(x, weight):
            return False
        if x.dtype == weight.dtype:
            return True
        is_double = x.dtype == torch.float64 or weight.dtype == torch.float64
        return x.is_floating_point() and not is_double and torch.is_autocast_enabled(x.device.type)

    def _base(self) -> tuple[Tensor, Tensor | None]:
        """The base weight as ``[out, in]``, a view, and the bias."""
        base = self._modules["base_layer"]
        weight = base._parameters["weight"]
        return weight.t() if type(base).forward is _CONV1D else weight, base._parameters.get("bias")

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        modules = self._modules
        lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return lora_A._parameters["weight"], lora_B._parameters["weight"]

    def _dropout_p(self, name: str) -> float:
        dropout = self._modules["lora_dropout"]._modules[name]
        return dropout.p if dropout.training and type(dropout).forward is _DROPOUT else 0.0

    def _forward_one(self, x: Tensor, name: str) -> Tensor:
        p = self._dropout_p(name)
        return ops.lora_linear(x, *self._base(), *self._factors(name), self.scaling[name], dropout_p=p)

    def _forward_stacked(self, x: Tensor, names: list[str]) -> Tensor:
        """Several adapters as one of their summed rank."""
        factors = [self._factors(name) for name in names]
        lora_A = torch.cat([lora_A for lora_A, _ in factors])
        lora_B = torch.cat([lora_B * self.scaling[name] for name, (_, lora_B) in zip(names, factors, strict=True)], 1)
        return ops.lora_linear(x, *self._base(), lora_A, lora_B)

    def _forward_dora(self, x: Tensor, name: str) -> Tensor:
        """y = W x + b + (m/‖W + s B A‖ - 1) W drop(x) + m/‖W + s B A‖ s B A drop(x), as PEFT has it."""
        weight, bias = self._base()
        p = self._dropout_p(name)
        dropped = F.dropout(x, p) if p else x
        directed = ops.lora_linear(dropped, weight, None, *self._factors(name), self.scaling[name])
        scaled = self._dora_gain(name) * directed
        if p:
            # one product of the frozen weight for both of what dropping changes
            scaled = scaled + F.linear(x - dropped, weight)
        return (scaled if bias is None else scaled + bias).to(directed.dtype)

    def _dora_gain(self, name: str) -> Tensor:
        """m/‖W + s B A‖; PEFT lets no gradient through the norm."""
        magnitude, (lora_A, lora_B) = self._modules["lora_magnitude_vector"]._modules[name], self._factors(name)
        weight = self._modules["base_layer"].weight.to(lora_A.dtype)
        with torch.no_grad():
            delta = (lora_B.detach() @ lora_A.detach()).to(lora_A.dtype)
            norm = magnitude.get_weight_norm(weight, delta, self.scaling[name], adapter_name=name)
        return magnitude.weight / norm


class LoraModel(AcceleratingTuner, lora.LoraModel):
    """PEFT's, which accelerates the layers that it makes."""


class MixedModel(AcceleratingTuner, mixed.MixedModel):
    """PEFT's, which accelerates the layers that it makes."""


LAYERS[lora.Linear] = Replacement(Linear, "lora_linear", layer_reasons)
TUNERS |= {lora.LoraModel: LoraModel, mixed.MixedModel: MixedModel}
