"""LoKr (Yeh et al., 2023): W + s · w1 ⊗ w2, where both factors may have low rank."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_ext import ops
from peft_ext.nn._checks import check_sizes
from peft_ext.nn.kron import kron_terms, split_dimension
from peft_ext.tuners.base import TUNER_CLASSES, BaseTuner, Placement
from peft_ext.tuners.config import CONFIG_CLASSES, PeftType, TargetedConfig, check_patterns
from peft_ext.tuners.layer import Part, TunerLayer, adapter_dtype
from peft_ext.tuners.mixed import add_by_adapter, current_mix
from peft_ext.tuners.targets import find_pattern_value, find_target_modules, resolve_target_modules


@dataclass
class LoKrConfig(TargetedConfig):
    """Configuration of LoKr. Fields, defaults and meaning are Hugging Face PEFT's.

    Args:
        r: rank of the factors that are split; a factor whose sides are below 2 r is kept whole.
        alpha: the update is scaled by ``alpha / r``.
        rank_dropout: probability of dropping a row of the update (an output), in training.
        module_dropout: probability of leaving the update out of a call, in training.
        use_effective_conv2d: split kernels above 1x1 in three (FedPara, proposition 3).
        decompose_both: split w1 too.
        decompose_factor: size of w1; -1: sides as equal as divisors allow.
        rank_dropout_scale: divide what is kept by its share.
        init_weights: True: w1 starts at zero; "lycoris": w2 does; False: neither, so that the adapter changes the
            output at once.
        rank_pattern, alpha_pattern: another rank or alpha by module, keyed by the end of its name or a regular
            expression.

    The arguments of :class:`TargetedConfig` choose the modules: ``nn.Linear`` and ``nn.Conv2d``.

    Raises:
        ValueError, TypeError: for a value out of range.

    Example:
        >>> from torch import nn
        >>> from peft_ext import LoKrConfig, get_peft_model
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> model = get_peft_model(model, LoKrConfig(r=2, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 96 || all params: 4,386 || trainable%: 2.1888
    """

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOKR
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"{name} must be a dict, got {getattr(self, name)!r}")
            check_patterns(name, getattr(self, name))
        check_sizes({f"rank {name!r}": rank for name, rank in {"r": self.r, **self.rank_pattern}.items()})
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise ValueError(f"alpha {name!r} must be a finite number, got {alpha!r}")
        for name in ("rank_dropout", "module_dropout"):
            p = getattr(self, name)
            if not isinstance(p, int | float) or not 0 <= p < 1:
                raise ValueError(f"{name} must be in [0, 1), got {p!r}")
        if self.decompose_factor != -1:
            check_sizes({"decompose_factor, if it is not -1,": self.decompose_factor})
        if self.init_weights not in (True, False, "lycoris"):
            raise ValueError(f"init_weights must be True, False or 'lycoris', got {self.init_weights!r}")


class LoKrLayer(TunerLayer):
    """``nn.Linear`` or ``nn.Conv2d`` with LoKr; parameter names are Hugging Face PEFT's."""

    part_names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for name in self.part_names:
            setattr(self, name, nn.ParameterDict())
        self.settings: dict[str, LoKrConfig] = {}
        self.scaling: dict[str, float] = {}

    def add_adapter(self, adapter_name: str, config: LoKrConfig, scaling: float, parts: Mapping[str, Part]) -> None:
        """Adds an adapter made by :func:`build_factors`, frozen and inactive."""
        self.attach(adapter_name, parts)
        self.settings[adapter_name] = config
        self.scaling[adapter_name] = scaling

    def detach_adapter(self, adapter_name: str) -> None:
        super().detach_adapter(adapter_name)
        self.settings.pop(adapter_name, None)
        self.scaling.pop(adapter_name, None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        mix = current_mix()
        if mix is not None and not self.disable_adapters:
            is_conv = isinstance(self.base_layer, nn.Conv2d)
            return add_by_adapter(mix, self.mixed_names(mix), x, result, self._mixed_update, rows_only=is_conv)
        if self.disable_adapters or self.merged_adapters or not self.active_adapters:
            return result
        total = result
        for name in self.active_adapters:
            if self._takes_part(name):
                total = total + self._update(x, name)
        return total.to(result.dtype)

    def _takes_part(self, adapter_name: str) -> bool:
        return not self.training or bool(torch.rand(()) >= self.settings[adapter_name].module_dropout)

    def _mixed_update(self, adapter_name: str, x: Tensor) -> Tensor:
        update = self._update(x, adapter_name)
        return update if self._takes_part(adapter_name) else torch.zeros_like(update)

    def _update(self, x: Tensor, adapter_name: str) -> Tensor:
        keep = self._kept_rows(adapter_name)
        if isinstance(self.base_layer, nn.Conv2d):
            weight = self.delta_weight(adapter_name)
            if keep is not None:
                weight = weight * keep[:, None, None, None]
            base = self.base_layer
            return F.conv2d(x.to(weight.dtype), weight, None, base.stride, base.padding, base.dilation, base.groups)
        parts = self._factors(adapter_name)
        update = lokr_update(x, first_factor(parts), parts, self.scaling[adapter_name])
        return update if keep is None else update * keep

    def _kept_rows(self, adapter_name: str) -> Tensor | None:
        """For each output 1 (or what keeps the mean) or 0; None where nothing is dropped."""
        config, weight = self.settings[adapter_name], self.base_layer.weight
        if not self.training or config.rank_dropout == 0:
            return None
        keep = (torch.rand(weight.size(0), device=weight.device) >= config.rank_dropout).to(weight.dtype)
        return keep / keep.mean().clamp_min(1 / weight.size(0)) if config.rank_dropout_scale else keep

    def _factors(self, adapter_name: str, dtype: torch.dtype | None = None) -> dict[str, Any]:
        parts: dict[str, Any] = dict(self.parts(adapter_name))
        return parts if dtype is None else {name: part.detach().to(dtype) for name, part in parts.items()}

    def delta_weight(self, adapter_name: str, dtype: torch.dtype | None = None) -> Tensor:
        """What merging adds to the base weight, computed in ``dtype``; in the factors' own by default."""
        parts, shape = self._factors(adapter_name, dtype), self.base_layer.weight.shape
        w2 = _w2(parts)
        if w2.dim() == 4:  # the kernel goes with w2's columns
            w2 = w2.flatten(1)
        return (self.scaling[adapter_name] * kron_terms(first_factor(parts)[None], w2[None])[0]).reshape(shape)

    def merged_weight(self, adapter_names: list[str], dtype: torch.dtype) -> Tensor:
        merged = self.weight.detach().to(dtype, copy=True)
        for name in adapter_names:
            merged += self.delta_weight(name, dtype)
        return merged


def lokr_update(x: Tensor, w1: Tensor, parts: Mapping[str, Any], scaling: float) -> Tensor:
    """s x Wᵀ with W = w1 ⊗ w2, so that Wᵀ is w1ᵀ ⊗ w2ᵀ; w2, or its two factors, are among ``parts``."""
    if "lokr_w2" in parts:
        right, t = parts["lokr_w2"].T[None], None
    else:
        right, t = parts["lokr_w2_b"].T[None], parts["lokr_w2_a"].T[None]
    return ops.kron_linear(x, w1.T[None], right, t, None, scaling)


def first_factor(parts: Mapping[str, Tensor]) -> Tensor:
    """w1, which may be a product itself."""
    return parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]


def _w2(parts: Mapping[str, Tensor]) -> Tensor:
    if "lokr_w2" in parts:
        return parts["lokr_w2"]
    if "lokr_t2" in parts:
        return torch.einsum("ijkl,io,jc->ockl", parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    return parts["lokr_w2_a"] @ parts["lokr_w2_b"]


class LoKrModel(BaseTuner[LoKrConfig]):
    """A model with LoKr adapters in it."""

    def resolve(self, config: LoKrConfig) -> LoKrConfig:
        config = copy.deepcopy(config)
        config.target_modules = resolve_target_modules(self.model, config)
        return config

    def plan(self, adapter_name: str, config: LoKrConfig, autocast_adapter_dtype: bool) -> list[Placement]:
        return [
            _place(name, module, adapter_name, config, autocast_adapter_dtype)
            for name, module in find_target_modules(self.model, config).items()
        ]


def _place(
    name: str, module: nn.Module, adapter_name: str, config: LoKrConfig, autocast_adapter_dtype: bool
) -> Placement:
    base = module.base_layer if isinstance(module, TunerLayer) else module
    if not isinstance(base, nn.Linear | nn.Conv2d):
        raise ValueError(
            f"target module {name!r} is a {type(base).__name__}, which LoKr does not support: it takes Linear, Conv2d"
        )
    if isinstance(base, nn.Conv2d) and base.padding_mode != "zeros":
        raise ValueError(f"target module {name!r}: padding_mode={base.padding_mode!r} is not supported")
    r = int(find_pattern_value(config.rank_pattern, name, config.r))
    alpha = find_pattern_value(config.alpha_pattern, name, config.alpha)
    parts = build_factors(base, r, config, adapter_dtype(base.weight.dtype, autocast_adapter_dtype))
    return Placement(name, module, LoKrLayer, lambda layer: layer.add_adapter(adapter_name, config, alpha / r, parts))


def build_factors(base: nn.Linear | nn.Conv2d, r: int, config: LoKrConfig, dtype: torch.dtype) -> dict[str, Part]:
    """The factors of a new adapter, with the shapes of Hugging Face PEFT's."""
    out_features, in_features, *kernel = base.weight.shape
    out_1, out_2 = split_dimension(out_features, config.decompose_factor)
    in_1, in_2 = split_dimension(in_features, config.decompose_factor)
    shapes: dict[str, tuple[int, ...]]
    if config.decompose_both and r < max(out_1, in_1) / 2:
        shapes = {"lokr_w1_a": (out_1, r), "lokr_w1_b": (r, in_1)}
    else:
        shapes = {"lokr_w1": (out_1, in_1)}
    if r >= max(out_2, in_2) / 2:
        shapes["lokr_w2"] = (out_2, in_2, *kernel)
    elif config.use_effective_conv2d and math.prod(kernel) > 1:
        shapes |= {"lokr_t2": (r, r, *kernel), "lokr_w2_a": (r, out_2), "lokr_w2_b": (r, in_2)}
    else:
        shapes |= {"lokr_w2_a": (out_2, r), "lokr_w2_b": (r, in_2 * math.prod(kernel))}
    zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[config.init_weights]
    parts: dict[str, Part] = {}
    for name, shape in shapes.items():
        factor = torch.zeros(shape, device=base.weight.device, dtype=dtype)
        parts[name] = nn.Parameter(factor if name in zero else nn.init.kaiming_uniform_(factor, a=math.sqrt(5)))
    return parts


CONFIG_CLASSES[PeftType.LOKR] = LoKrConfig
TUNER_CLASSES[PeftType.LOKR] = LoKrModel
