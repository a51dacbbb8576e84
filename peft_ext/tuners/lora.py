"""LoRA (Hu et al., 2021): W x + s B A x with a trained A and B of low rank."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_ext.nn._checks import check_sizes
from peft_ext.nn.quantized import QuantizedLinear
from peft_ext.tuners.base import TUNER_CLASSES, BaseTuner, Placement
from peft_ext.tuners.config import CONFIG_CLASSES, PeftType, TargetedConfig, check_patterns
from peft_ext.tuners.layer import ModulesToSaveWrapper, TunerLayer, adapter_dtype, parameter_holders
from peft_ext.tuners.lora_combine import Combination, as_checkpoint, layer_factors
from peft_ext.tuners.lora_init import changes_base, check_init
from peft_ext.tuners.lora_layers import SUPPORTED_TYPES, LoraLayer, LoraSpec, layer_class
from peft_ext.tuners.state_dict import PREFIX
from peft_ext.tuners.targets import (
    NO_TARGETS,
    find_pattern_value,
    find_target_modules,
    is_conv1d,
    resolve_target_modules,
)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_BIASES = ("none", "all", "lora_only")
_UNSUPPORTED = (
    "megatron_config",
    "trainable_token_indices",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "ensure_weight_tying",
)
"""Fields of Hugging Face PEFT's that would change what is computed: they have to stay unset."""


@dataclass
class LoraConfig(TargetedConfig):
    """Configuration of LoRA. Fields, defaults and meaning are Hugging Face PEFT's.

    Args:
        r: rank of the update.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        lora_dropout: probability of dropping an element of the update's input, in training.
        fan_in_fan_out: whether weights are stored ``[in, out]``. Follows from the layer's type.
        bias: which biases of the base model are trained: "none", "all", or "lora_only", those of the
            adapted layers.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` (Kalajdzievski, 2023).
        init_lora_weights: True: A uniform as in ``nn.Linear`` and B zero; "gaussian": A normal with
            deviation 1/r; "pissa", "pissa_niter_N" and "olora": from the base weight's own factors,
            which are taken out of it; "orthogonal": B A is zero with neither of them zero; False:
            both random, so that the adapter changes the output at once.
        rank_pattern: another rank by module, keyed by the end of its name or a regular expression.
        alpha_pattern: likewise, another alpha.
        use_dora: learn the magnitude of every output row apart (Liu et al., 2024); linear layers.

    The arguments of :class:`TargetedConfig` and :class:`PeftConfig` choose the modules and the task.
    Further fields are Hugging Face PEFT's; they must keep their defaults where they would change
    what is computed.

    Raises:
        ValueError, TypeError: for a value out of range, and for a field that is not supported.

    Example:
        >>> from torch import nn
        >>> from peft_ext import LoraConfig, get_peft_model
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 48 || all params: 226 || trainable%: 21.2389
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False

    # Hugging Face PEFT's further fields, kept and written back
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: Any = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"{name} must be a dict, got {getattr(self, name)!r}")
            check_patterns(name, getattr(self, name))
        check_sizes({f"rank {name!r}": rank for name, rank in {"r": self.r, **self.rank_pattern}.items()})
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise ValueError(f"alpha {name!r} must be a finite number, got {alpha!r}")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout <= 1:
            raise ValueError(f"lora_dropout must be in [0, 1], got {self.lora_dropout!r}")
        if self.bias not in _BIASES:
            raise ValueError(f"bias must be one of {_BIASES}, got {self.bias!r}")
        self.init_lora_weights = check_init(self.init_lora_weights)
        for name in _UNSUPPORTED:
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported")


class LoraModel(BaseTuner[LoraConfig]):
    """A model with LoRA adapters in it."""

    def resolve(self, config: LoraConfig) -> LoraConfig:
        config = copy.deepcopy(config)
        config.target_modules = resolve_target_modules(self.model, config)
        return config

    def plan(self, adapter_name: str, config: LoraConfig, autocast_adapter_dtype: bool) -> list[Placement]:
        targets = find_target_modules(self.model, config)
        specs = {
            name: self._spec(name, _base(module), config, autocast_adapter_dtype) for name, module in targets.items()
        }
        self._check_base_weights(config, targets)
        self._warn(config, targets, specs)
        config.fan_in_fan_out = any(is_conv1d(_base(module)) for module in targets.values())
        return [_place(name, module, adapter_name, specs[name]) for name, module in targets.items()]

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Adds an adapter made of others: the update s B A of each, times its weight. Arguments are HF PEFT's.

        The new adapter is inactive. It has a scaling of 1 (also where the others have rsLoRA), and the trained modules
        of the one that has any.

        Args:
            adapters: which ones.
            weights: one for each; negative ones subtract.
            adapter_name: the new one's.
            combination_type: "cat" (A and B stacked) is exact, its rank is the sum; "svd" is the nearest of its rank;
                "linear" sums A and B by themselves, which is no sum of updates, and needs equal ranks. "ties",
                "dare_linear", "dare_ties" and "magnitude_prune" drop elements of A and B before they sum, with
                "_svd" elements of the updates.
            svd_rank: the rank of "svd"; by default the largest of the adapters'.
            svd_clamp: clamp what "svd" gives at this quantile.
            svd_full_matrices, svd_driver: passed to ``torch.linalg.svd``.
            density: the share of elements that is kept.
            majority_sign_method: "total" or "frequency": how the sign of "ties" is chosen.

        Raises:
            ValueError: for unknown names, another number of weights, a value out of range, DoRA, ranks that differ
                where they must not, and several adapters that have trained copies of one module.

        Example:
            >>> from torch import nn
            >>> from peft_ext import LoraConfig, get_peft_model
            >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]), "a")
            >>> model.add_adapter("b", LoraConfig(r=4, target_modules=["0"]))
            >>> model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "both", combination_type="cat")
            >>> model.peft_config["both"].r
            6
        """
        self._check_combined(adapters, weights)
        kind = "linear" if len(adapters) == 1 else combination_type
        how = Combination(kind, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method)
        configs = [self.peft_config[name] for name in adapters]
        rank = how.rank([max(config.r, *config.rank_pattern.values(), 0) for config in configs])
        with self.calls.changing():
            tensors, places = self._combined(adapters, weights, how, rank)
            saved = self._saved_copies(adapters)
            config = replace(
                configs[0],
                r=rank,
                lora_alpha=rank,
                use_rslora=False,
                init_lora_weights=True,
                bias="none",
                rank_pattern={},
                alpha_pattern={},
                target_modules=places or NO_TARGETS,
                exclude_modules=None,
                layers_to_transform=None,
                layers_pattern=None,
                modules_to_save=next((c.modules_to_save for c in configs if c.modules_to_save), None),
            )
            self.add_adapter(adapter_name, config, tensors=tensors | saved)

    def _check_combined(self, adapters: list[str], weights: list[float]) -> None:
        if not adapters:
            raise ValueError("adapters must name at least one adapter, got none")
        if len(weights) != len(adapters):
            raise ValueError(f"weights must have one number for each of {len(adapters)} adapters, got {len(weights)}")
        for name in adapters:
            if self.config_of(name).use_dora:
                raise ValueError(f"adapter {name!r} has DoRA, which rescales the base weight: it cannot be combined")

    def _combined(
        self, adapters: list[str], weights: list[float], how: Combination, rank: int
    ) -> tuple[dict[str, Tensor], set[str]]:
        """The new adapter's tensors, keyed as in a checkpoint, and the modules that it has."""
        tensors, places = {}, set()
        for name, layer in self.slots():
            mine = [(other, weight) for other, weight in zip(adapters, weights, strict=True) if other in layer]
            if not mine or not isinstance(layer, LoraLayer):
                continue
            factors = [layer_factors(layer, other) for other, _ in mine]
            scalings = [float(layer.scaling[other]) for other, _ in mine]
            combined = how.combine(factors, scalings, [weight for _, weight in mine], rank)
            for key, tensor in as_checkpoint(layer, mine[0][0], combined, rank).items():
                tensors[f"{PREFIX}{name}.{key}"] = tensor
            places.add(name)
        return tensors, places

    def _saved_copies(self, adapters: list[str]) -> dict[str, Tensor]:
        """The tensors of modules that one of the adapters has trained in full."""
        tensors = {}
        for name, slot in self.slots():
            owners = [other for other in adapters if other in slot]
            if not isinstance(slot, ModulesToSaveWrapper) or not owners:
                continue
            if len(owners) > 1:
                raise ValueError(
                    f"adapters {owners} have copies of {name!r} in modules_to_save, which cannot be combined"
                )
            for entry in slot.entries(slot.parts(owners[0]), owners[0]):
                tensors[slot.checkpoint_key(PREFIX + name, entry.checkpoint_key)] = entry.tensor
        return tensors

    def _check_base_weights(self, config: LoraConfig, targets: dict[str, nn.Module]) -> None:
        """Raises a ValueError where initial values would meet weights that are not the layer's own."""
        tied, changed = _tied_targets(self.model, targets), changes_base(config.init_lora_weights)
        if changed and tied:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes weights that {tied} share with other layers"
            )
        if (changed or config.use_dora) and self.merged_adapters:
            raise ValueError(f"the new adapter starts from the base weights: unmerge {self.merged_adapters} first")

    @staticmethod
    def _spec(name: str, base_layer: Any, config: LoraConfig, autocast_adapter_dtype: bool) -> LoraSpec:
        """The layer's hyperparameters; raises a ValueError for a layer that cannot have them."""
        kind = layer_class(base_layer)
        if kind is None:
            raise ValueError(
                f"target module {name!r} is a {type(base_layer).__name__}, which LoRA does not support: "
                f"it supports {', '.join(SUPPORTED_TYPES)}"
            )
        dtype = torch.float32 if isinstance(base_layer, QuantizedLinear) else base_layer.weight.dtype
        if dtype not in _DTYPES:
            raise ValueError(f"target module {name!r} has a weight of {dtype}: must be one of {_DTYPES}")
        spec = replace(layer_spec(name, config), dtype=adapter_dtype(dtype, autocast_adapter_dtype))
        try:
            kind.check(base_layer, spec)
        except ValueError as error:
            raise ValueError(f"target module {name!r}: {error}") from None
        return spec

    def _warn(self, config: LoraConfig, targets: dict[str, nn.Module], specs: dict[str, LoraSpec]) -> None:
        large = [name for name, spec in specs.items() if spec.r > min(_shape(_base(targets[name])))]
        if large:
            warnings.warn(
                f"r exceeds the smaller side of the weight in {large}: the update has full rank", stacklevel=5
            )
        if changes_base(config.init_lora_weights) and self.peft_config:
            warnings.warn(
                f"init_lora_weights={config.init_lora_weights!r} changes the base model under its other adapters",
                stacklevel=5,
            )
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            if all(find_pattern_value({pattern: 1}, name, 0) == 0 for name in targets):
                warnings.warn(f"{pattern!r} in rank_pattern or alpha_pattern matches no target module", stacklevel=5)
        tied = _tied_targets(self.model, targets)
        if tied:
            warnings.warn(f"{tied} share their weight with other layers: merging will change those too", stacklevel=5)


def layer_spec(name: str, config: LoraConfig) -> LoraSpec:
    """The hyperparameters that the configuration gives a layer."""
    return LoraSpec(
        r=int(find_pattern_value(config.rank_pattern, name, config.r)),
        lora_alpha=find_pattern_value(config.alpha_pattern, name, config.lora_alpha),
        dropout=config.lora_dropout,
        init=config.init_lora_weights,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def _shape(base_layer: Any) -> tuple[int, int]:
    kind = layer_class(base_layer)
    assert kind is not None
    return kind.shape_of(base_layer)


def _base(module: nn.Module) -> Any:
    return module.base_layer if isinstance(module, TunerLayer) else module


def _place(name: str, module: nn.Module, adapter_name: str, spec: LoraSpec) -> Placement:
    base_layer = _base(module)
    kind = layer_class(base_layer)
    assert kind is not None
    parts = kind.build(base_layer, spec)
    placement = Placement(name, module, kind, lambda layer: layer.add_adapter(adapter_name, spec, parts))
    if changes_base(spec.init):
        # copied, because a checkpoint may be loaded into the parts before the base weight is changed
        initial = {key: tensor.detach().clone() for key, _, tensor in kind.entries(parts, adapter_name)}
        lora_A, lora_B = initial["lora_A.weight"], initial["lora_B.weight"]
        placement.finish = lambda layer: _subtract(layer.matrices(adapter_name)[0], spec.scaling * lora_B @ lora_A)
    return placement


@torch.no_grad()
def _subtract(weight: Tensor, update: Tensor) -> None:
    weight.copy_(weight - update)


def _tied_targets(model: nn.Module, targets: dict[str, nn.Module]) -> list[str]:
    """The targets whose weight is a parameter of other layers too."""
    holders = parameter_holders(model)
    return [name for name, module in targets.items() if len(holders[id(_base(module).weight)]) > 1]


CONFIG_CLASSES[PeftType.LORA] = LoraConfig
TUNER_CLASSES[PeftType.LORA] = LoraModel
