"""The frozen base of a model in fewer bits, under adapters in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peft_ext.nn.quantized import QuantizedLinear
from peft_ext.reference.quantized_checks import PACKED_BLOCK
from peft_ext.tuners.layer import AdapterSlot, ModulesToSaveWrapper, TunerLayer, parameter_holders, walk
from peft_ext.tuners.lora_layers import LoraLinear
from peft_ext.tuners.targets import SEQ_CLS_HEADS, has_suffix, is_conv1d, is_within

_HEADS = (*SEQ_CLS_HEADS, "lm_head", "qa_outputs")
_SHOWN_WEIGHTS = 10


@dataclass(frozen=True)
class QuantizedWeight:
    """What became of one weight W.

    Args:
        name: the layer's full name.
        relative_error: ‖W' - W‖ / ‖W‖ for the W' that is computed with now.
        bytes_before, bytes_after: what the weight, with its scales, takes.
    """

    name: str
    relative_error: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, repr=False)
class QuantizationReport:
    """What :func:`quantize_base` did to a model; printed as a list.

    Args:
        dtype: how the weights are kept now.
        weights: those that were quantized.
        left: why other linear layers were left as they were, by full name.
    """

    dtype: str
    weights: list[QuantizedWeight]
    left: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        """What the quantized weights took before."""
        return sum(weight.bytes_before for weight in self.weights)

    @property
    def bytes_after(self) -> int:
        """What they take now."""
        return sum(weight.bytes_after for weight in self.weights)

    @property
    def relative_error(self) -> float:
        """The largest relative error of a weight."""
        return max(weight.relative_error for weight in self.weights)

    def __repr__(self) -> str:
        worst = sorted(self.weights, key=lambda weight: weight.relative_error, reverse=True)[:_SHOWN_WEIGHTS]
        lines = [
            f"{len(self.weights)} weights in {self.dtype}: {self.bytes_before / 2**20:.1f} MiB before, "
            f"{self.bytes_after / 2**20:.1f} MiB now, relative error at most {self.relative_error:.2e}",
            *(f"  {weight.name}: {weight.relative_error:.2e}" for weight in worst),
            *(f"  left: {name}, {reason}" for name, reason in self.left.items()),
        ]
        return "\n".join(lines)


@torch.no_grad()
def quantize_base(
    model: nn.Module, dtype: str = "int8", *, group_size: int | None = None, skip_modules: Iterable[str] = ()
) -> QuantizationReport:
    """Keeps the frozen linear layers of a model as int8 or 4-bit values, or in bfloat16.

    Each ``nn.Linear`` and ``Conv1D`` of the base gives its place to a :class:`peft_ext.QuantizedLinear`. Call it before
    or after adapters are added: LoRA runs fused on such a base and keeps its own dtype; methods that leave the linear
    layers alone (prompts, prefixes, bottleneck adapters) work as before. Merging is refused from then on.

    Left as they are, with the reason in the report: the output embeddings and heads, weights shared with another
    module, layers that are trained or that another method than LoRA adapts, and what ``skip_modules`` names.

    Args:
        model: changed in place; a plain model or an adapted one.
        dtype: "int8" (a quarter of float32), "int4" (about a sixth) or "bfloat16" (half, and computed in bfloat16).
        group_size: as in :func:`peft_ext.quantize_weight`.
        skip_modules: ends of full names, such as "down_proj".

    Returns:
        What was quantized, with the error of each weight.

    Raises:
        ValueError: if a dtype name or group size does not fit, if adapters are merged, or if there is nothing to
            quantize. The model is then as it was.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from peft_ext import LoraConfig, get_peft_model, quantize_base
        >>> model = get_peft_model(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), LoraConfig(target_modules=["0"]))
        >>> report = quantize_base(model, "int8")
        >>> report.bytes_before, report.bytes_after, report.relative_error < 0.01
        (16384, 4352, True)
    """
    merged = sorted({name for _, slot in walk(model) if isinstance(slot, TunerLayer) for name in slot.merged_adapters})
    if merged:
        raise ValueError(f"adapters {merged} are merged into the base: unmerge them before it is quantized")
    foreign = next((type(m).__name__ for m in model.modules() if type(m).__module__.startswith("peft.tuners")), None)
    if foreign is not None:
        raise ValueError(f"model has Hugging Face PEFT's {foreign} in it: quantize the plain model, then adapt it here")
    left: dict[str, str] = {}
    plan: dict[str, QuantizedLinear] = {}
    weights = []
    reason_to_leave = _Reasons(model, skip_modules)
    for name, linear in _linear_layers(model):
        reason = reason_to_leave(name, linear)
        in_features, _ = LoraLinear.shape_of(linear)
        if reason is None and dtype == "int4" and in_features % PACKED_BLOCK:
            reason = f"its {in_features} columns are no multiple of {PACKED_BLOCK}"
        if reason is not None:
            left[_shown(name)] = reason
            continue
        plan[name] = QuantizedLinear.from_linear(linear, dtype, group_size)
        weights.append(_measure(_shown(name), linear, plan[name]))
    if not plan:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in left.items())
        raise ValueError(f"model has no frozen linear layer to quantize{reasons}")
    for name, layer in plan.items():
        _replace(model, name, layer)
    return QuantizationReport(dtype, weights, left)


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """By full name, without what adapters consist of and without modules that an adapter trains in full."""
    trained: list[str] = []
    for name, module in walk(model):
        if isinstance(module, ModulesToSaveWrapper):
            trained.append(name)
        elif (isinstance(module, nn.Linear) or is_conv1d(module)) and not any(is_within(name, t) for t in trained):
            yield name, module


class _Reasons:
    """Why a linear layer of a model is left as it is; what all layers share is looked up once."""

    def __init__(self, model: nn.Module, skip_modules: Iterable[str]) -> None:
        self.model = model
        self.skip_modules = tuple(skip_modules)
        self.holders = parameter_holders(model)
        self.is_adapted = any(isinstance(module, AdapterSlot) for _, module in walk(model))
        get_output_embeddings = getattr(model, "get_output_embeddings", None)
        self.output_embeddings = None if get_output_embeddings is None else get_output_embeddings()

    def __call__(self, name: str, linear: Any) -> str | None:
        parent = self.model.get_submodule(name.rpartition(".")[0])
        shown = _shown(name)
        if any(has_suffix(shown, end) for end in self.skip_modules):
            return "in skip_modules"
        if linear is self.output_embeddings or shown.rpartition(".")[2] in _HEADS:
            return "an output head"
        if isinstance(linear, NonDynamicallyQuantizableLinear) or isinstance(parent, nn.TransformerEncoderLayer):
            return "its weight is read without calling it"
        if isinstance(linear, nn.Linear) and type(linear).forward is not nn.Linear.forward:
            return f"a {type(linear).__name__} with a forward of its own"
        if len(self.holders.get(id(linear.weight), ())) > 1:
            return "its weight is another module's too"
        if linear.weight.requires_grad and self.is_adapted:
            return "it is trained"
        if isinstance(parent, TunerLayer) and not isinstance(parent, LoraLinear):
            return f"{type(parent).__name__} needs its weight"
        if isinstance(parent, LoraLinear) and any(parent.use_dora.values()):
            return "DoRA needs its weight"
        return None


def _shown(name: str) -> str:
    """The name of the layer that an adapter stands around."""
    return name.removesuffix(".base_layer")


def _measure(name: str, linear: Any, layer: QuantizedLinear) -> QuantizedWeight:
    weight = linear.weight.detach().t() if is_conv1d(linear) else linear.weight.detach()
    exact = weight.to(torch.float32)
    error = torch.linalg.vector_norm(layer.dequantized() - exact) / torch.linalg.vector_norm(exact).clamp_min(1e-30)
    kept = [tensor for tensor in (layer.weight, layer.weight_scale) if tensor is not None]
    return QuantizedWeight(name, error.item(), weight.nbytes, sum(tensor.nbytes for tensor in kept))


def _replace(model: nn.Module, name: str, layer: QuantizedLinear) -> None:
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, TunerLayer):
        parent.replace_base_layer(layer)
    else:
        setattr(parent, attribute, layer)
