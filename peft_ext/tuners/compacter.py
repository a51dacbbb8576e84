"""Compacter and Compacter++ (Mahabadi et al., 2021): adapters whose projections are sums of Kronecker products."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft_ext.nn.compacter import CompacterAdapter, check_compacter, new_phm_rule
from peft_ext.tuners.base import TUNER_CLASSES, BaseTuner, Placement
from peft_ext.tuners.config import CONFIG_CLASSES, PeftType, TargetedConfig
from peft_ext.tuners.layer import Entry, Part, TunerLayer
from peft_ext.tuners.sublayers import output_width, resolve_sublayers
from peft_ext.tuners.targets import find_target_modules


@dataclass
class CompacterConfig(TargetedConfig):
    """Configuration of Compacter: an adapter on what attention and FFN give, before the residual is added.

    Args:
        reduction_factor: the bottleneck has 1/``reduction_factor`` of the features; must divide them.
        phm_dim: n: the Aᵢ are ``[n, n]``; must divide features and bottleneck.
        phm_rank: rank of the Bᵢ = sᵢ tᵢ.
        num_kron_terms: terms of the sums Σᵢ Aᵢ ⊗ Bᵢ; None takes ``phm_dim``, as the paper.
        phm_init_range: standard deviation of a new A. AdapterHub has 1e-4, the paper's configuration 1e-2.
        shared_phm_rule: one A for all adapters of the model; otherwise each has its own.
        share_across_tasks: further adapters added with this option use the first one's A: training any of them
            moves it for all, and loading one loads it for all. Needs ``shared_phm_rule``.
        non_linearity: "gelu_new", "gelu", "relu", "silu" or "tanh".

    ``target_modules`` names the modules whose output the adapters take; by default these follow from the
    architecture. The other arguments are :class:`TargetedConfig`'s.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> from torch import nn
        >>> from peft_ext import CompacterConfig, get_peft_model
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> model = get_peft_model(model, CompacterConfig(reduction_factor=8, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 280 || all params: 986 || trainable%: 28.3976
    """

    reduction_factor: int = 32
    phm_dim: int = 4
    phm_rank: int = 1
    num_kron_terms: int | None = None
    phm_init_range: float = 1e-4
    shared_phm_rule: bool = True
    share_across_tasks: bool = False
    non_linearity: str = "gelu_new"

    method: ClassVar[PeftType] = PeftType.COMPACTER
    places: ClassVar[tuple[str, ...]] = ("attention", "ffn")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method
        if self.reduction_factor <= 0:
            raise ValueError(f"reduction_factor must be > 0, got {self.reduction_factor}")
        check_compacter(self.phm_dim, self.phm_dim, self.phm_rank, self.phm_dim, self.terms, self.non_linearity)
        if not 0 <= self.phm_init_range < math.inf:
            raise ValueError(f"phm_init_range must be a finite number >= 0, got {self.phm_init_range!r}")
        if self.share_across_tasks and not self.shared_phm_rule:
            raise ValueError("share_across_tasks needs shared_phm_rule")

    @property
    def terms(self) -> int:
        """Terms of the sums."""
        return self.phm_dim if self.num_kron_terms is None else self.num_kron_terms


@dataclass
class CompacterPlusPlusConfig(CompacterConfig):
    """Configuration of Compacter++: :class:`CompacterConfig`, on what the FFN gives only."""

    method: ClassVar[PeftType] = PeftType.COMPACTER_PLUS_PLUS
    places: ClassVar[tuple[str, ...]] = ("ffn",)


class CompacterLayer(TunerLayer):
    """A module and the adapters on its output."""

    part_names = ("compacter", "compacter_phm_rule")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.compacter = nn.ModuleDict()
        self.compacter_phm_rule = nn.ParameterDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters or not self.active_adapters:
            return output
        for name in self.active_adapters:
            adapter = self.compacter[name]
            output = adapter(output.to(adapter.phm_rule.dtype)).to(output.dtype)
        return output

    def attach(self, adapter_name: str, parts: Mapping[str, Part]) -> None:
        super().attach(adapter_name, parts)
        self._train_shared_rule()

    def train_adapter(self, adapter_name: str, requires_grad: bool) -> None:
        super().train_adapter(adapter_name, requires_grad)
        self._train_shared_rule()

    def _train_shared_rule(self) -> None:
        """An A that several tasks share trains with the active one, whatever happens to the others."""
        for name in self.active_adapters:
            adapter: Any = self.compacter[name]
            if adapter.down.b.requires_grad:
                adapter.phm_rule.requires_grad_(True)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises a ValueError: no weight does what an adapter with an activation does."""
        raise ValueError("Compacter adapters have an activation and cannot be merged into a weight")

    def unmerge(self, keep: int = 0) -> None:
        """Nothing is ever merged."""

    @staticmethod
    def entries(parts: Mapping[str, Part], adapter_name: str) -> Iterator[Entry]:
        """As in the base class, but a shared A appears once, as the first layer's ``compacter_phm_rule``."""
        shared = getattr(parts.get("compacter"), "shares_phm_rule", False)
        for entry in TunerLayer.entries(parts, adapter_name):
            if not (shared and entry.checkpoint_key == "compacter.phm_rule"):
                yield entry


class CompacterModel(BaseTuner[CompacterConfig]):
    """A model with Compacter adapters in it."""

    def resolve(self, config: CompacterConfig) -> CompacterConfig:
        config = copy.deepcopy(config)
        targets = resolve_sublayers(self.model, config, config.places)
        config.target_modules = targets if isinstance(targets, str) else set(targets)
        return config

    def plan(self, adapter_name: str, config: CompacterConfig, autocast_adapter_dtype: bool) -> list[Placement]:
        targets = find_target_modules(self.model, config)
        like = next(self.model.parameters())
        half = like.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if autocast_adapter_dtype and half else like.dtype
        rule = self._shared_rule(config, like.device, dtype) if config.shared_phm_rule else None
        plan: list[Placement] = []
        for name, module in targets.items():
            adapter = self._build(name, output_width(self.model, name, module), config, rule, like.device, dtype)
            parts: dict[str, Part] = {"compacter": adapter}
            if rule is not None and not plan:
                parts["compacter_phm_rule"] = rule
            plan.append(_place(name, module, adapter_name, parts))
        return plan

    def _shared_rule(self, config: CompacterConfig, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
        shape = (config.terms, config.phm_dim, config.phm_dim)
        for name, other in self.peft_config.items():
            if config.share_across_tasks and other.share_across_tasks:
                rule = self.phm_rule(name)
                if rule.shape != shape:
                    raise ValueError(
                        f"share_across_tasks: A of adapter {name!r} is {list(rule.shape)}, not {list(shape)}"
                    )
                return rule
        return new_phm_rule(config.phm_dim, config.terms, config.phm_init_range, device=device, dtype=dtype)

    def phm_rule(self, adapter_name: str) -> nn.Parameter:
        """The A that the adapter's layers share."""
        layers = (slot for _, slot in self.slots() if isinstance(slot, CompacterLayer) and adapter_name in slot)
        adapter: Any = next(layers).compacter[adapter_name]
        return adapter.phm_rule

    @staticmethod
    def _build(
        name: str,
        width: int,
        config: CompacterConfig,
        rule: nn.Parameter | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> CompacterAdapter:
        if width % config.reduction_factor:
            raise ValueError(
                f"reduction_factor={config.reduction_factor} must divide the {width} features of module {name!r}"
            )
        try:
            return CompacterAdapter(
                width,
                width // config.reduction_factor,
                config.phm_rank,
                phm_dim=config.phm_dim,
                num_kron_terms=config.num_kron_terms,
                phm_rule=rule,
                phm_init_range=config.phm_init_range,
                activation=config.non_linearity,
                device=device,
                dtype=dtype,
            )
        except ValueError as error:
            raise ValueError(f"module {name!r}: {error}") from None


def _place(name: str, module: nn.Module, adapter_name: str, parts: Mapping[str, Part]) -> Placement:
    def install(layer: CompacterLayer) -> None:
        layer.attach(adapter_name, parts)
        layer.compacter.train(layer.training)

    return Placement(name, module, CompacterLayer, install)


CONFIG_CLASSES[PeftType.COMPACTER] = CompacterConfig
CONFIG_CLASSES[PeftType.COMPACTER_PLUS_PLUS] = CompacterPlusPlusConfig
TUNER_CLASSES[PeftType.COMPACTER] = CompacterModel
TUNER_CLASSES[PeftType.COMPACTER_PLUS_PLUS] = CompacterModel
