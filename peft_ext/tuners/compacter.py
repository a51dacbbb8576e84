"""Compacter and Compacter++ (Mahabadi et al., 2021): adapters whose projections are sums of Kronecker products."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from peft_ext.nn._checks import check_not_negative, check_sizes
from peft_ext.nn.compacter import CompacterAdapter, check_compacter, new_phm_rule
from peft_ext.tuners.adapter_drop import DropState
from peft_ext.tuners.base import TUNER_CLASSES, Placement
from peft_ext.tuners.config import CONFIG_CLASSES, PeftType
from peft_ext.tuners.layer import Entry, Part
from peft_ext.tuners.pfeiffer import LayerSlot, NormSlot
from peft_ext.tuners.sublayer_tuner import Site, SublayerConfig, SublayerSlot, SublayerTuner
from peft_ext.tuners.sublayers import resolve_sublayers


@dataclass
class CompacterConfig(SublayerConfig):
    """Configuration of Compacter: an adapter on what attention and FFN give, before the residual is added.

    Args:
        phm_dim: n: the Aᵢ are ``[n, n]``; must divide features and bottleneck.
        phm_rank: rank of the Bᵢ = sᵢ tᵢ.
        num_kron_terms: terms of the sums Σᵢ Aᵢ ⊗ Bᵢ; None takes ``phm_dim``, as the paper.
        phm_init_range: standard deviation of a new A. AdapterHub has 1e-4, the paper's configuration 1e-2.
        shared_phm_rule: one A for all adapters of the model; otherwise each has its own.
        original_ln_before: False: the adapter works on what a sublayer gives, before the residual is added, as in the
            paper. True: on the sum, around the layer norm that follows the FFN, as in :class:`PfeifferConfig`; this
            is AdapterHub's Compacter++.
        share_across_tasks: further adapters added with this option use the first one's A: training any of them
            moves it for all, and loading one loads it for all. Needs ``shared_phm_rule``.

    The further arguments are those of :class:`SublayerConfig`.

    Raises:
        ValueError, TypeError: for a value out of range.

    Example:
        >>> from torch import nn
        >>> from peft_ext import CompacterConfig, get_peft_model
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> model = get_peft_model(model, CompacterConfig(reduction_factor=8, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 280 || all params: 986 || trainable%: 28.3976
    """

    reduction_factor: float = 32
    non_linearity: str = "gelu_new"
    phm_dim: int = 4
    phm_rank: int = 1
    num_kron_terms: int | None = None
    phm_init_range: float = 1e-4
    shared_phm_rule: bool = True
    original_ln_before: bool = False
    share_across_tasks: bool = False

    method: ClassVar[PeftType] = PeftType.COMPACTER

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method
        check_sizes({"phm_dim": self.phm_dim, "phm_rank": self.phm_rank, "num_kron_terms": self.terms})
        check_compacter(self.phm_dim, self.phm_dim, self.phm_rank, self.phm_dim, self.terms, self.non_linearity)
        check_not_negative({"phm_init_range": self.phm_init_range})
        if self.share_across_tasks and not self.shared_phm_rule:
            raise ValueError("share_across_tasks needs shared_phm_rule")
        if not isinstance(self.original_ln_before, bool):
            raise TypeError(f"original_ln_before must be a bool, got {self.original_ln_before!r}")

    @property
    def terms(self) -> int:
        """Terms of the sums."""
        return self.phm_dim if self.num_kron_terms is None else self.num_kron_terms


@dataclass
class CompacterPlusPlusConfig(CompacterConfig):
    """Configuration of Compacter++: :class:`CompacterConfig`, on what the FFN gives only."""

    method: ClassVar[PeftType] = PeftType.COMPACTER_PLUS_PLUS


class CompacterSlot(SublayerSlot):
    """A module with Compacter adapters on its output; the model's first slot names the A that they share."""

    part_names = ("adapter", "phm_rule")

    def __init__(self, base_layer: nn.Module, layer: int, drop: DropState) -> None:
        super().__init__(base_layer, layer, drop)
        self.phm_rule = nn.ParameterDict()

    @staticmethod
    def entries(parts: Mapping[str, Part], adapter_name: str) -> Iterator[Entry]:
        """As in the base class, but a shared A appears once, as the first slot's ``phm_rule``."""
        shared = getattr(parts.get("adapter"), "shares_phm_rule", False)
        for entry in SublayerSlot.entries(parts, adapter_name):
            if not (shared and entry.checkpoint_key == "adapter.phm_rule"):
                yield entry


class CompacterNormSlot(CompacterSlot, NormSlot):
    """A layer norm with Compacter adapters around it: LN(s + adapter(LN(s)))."""


class CompacterLayerSlot(CompacterSlot, LayerSlot):
    """A layer with Compacter adapters on its output."""


class CompacterModel(SublayerTuner[CompacterConfig]):
    """A model with Compacter adapters in it."""

    @staticmethod
    def slot_class(base_layer: nn.Module, config: CompacterConfig) -> type[SublayerSlot]:
        if not config.original_ln_before:
            return CompacterSlot
        return CompacterNormSlot if isinstance(base_layer, nn.LayerNorm) else CompacterLayerSlot

    def resolve(self, config: CompacterConfig) -> CompacterConfig:
        config = copy.deepcopy(config)
        places = ("ffn_norm",) if config.original_ln_before else self.places
        config.target_modules = resolve_sublayers(self.model, config, places)
        return config

    def plan(self, adapter_name: str, config: CompacterConfig, autocast_adapter_dtype: bool) -> list[Placement]:
        plan = super().plan(adapter_name, config, autocast_adapter_dtype)
        for placement in plan:
            slot = placement.module
            if isinstance(slot, CompacterSlot) and type(slot) is not self.slot_class(slot.base_layer, config):
                raise ValueError(f"original_ln_before: another adapter at {placement.name!r} has it otherwise")
        return plan

    def build_parts(self, config: CompacterConfig, sites: Sequence[Site]) -> list[dict[str, Part]]:
        if not sites or not config.shared_phm_rule:
            return [{"adapter": _build(config, site, site.like, None)} for site in sites]
        like = sites[0].like
        rule = self._shared_rule(config, like)
        parts: list[dict[str, Part]] = [{"adapter": _build(config, site, like, rule)} for site in sites]
        parts[0]["phm_rule"] = rule
        return parts

    def add_adapter(
        self,
        adapter_name: str,
        config: CompacterConfig,
        autocast_adapter_dtype: bool = True,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        try:
            super().add_adapter(adapter_name, config, autocast_adapter_dtype, tensors)
        finally:
            self._train_shared_rules()

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._train_shared_rules()

    def _train_shared_rules(self) -> None:
        """An A trains as long as any of the adapters that share it does, whatever froze it for another."""
        for adapter in self._adapters(self.peft_config):
            if adapter.down.b.requires_grad:
                adapter.phm_rule.requires_grad_(True)

    def phm_rule(self, adapter_name: str) -> nn.Parameter:
        """The A that the adapter's layers share."""
        return next(adapter.phm_rule for adapter in self._adapters([adapter_name]))

    def _shared_rule(self, config: CompacterConfig, like: Tensor) -> nn.Parameter:
        shape = (config.terms, config.phm_dim, config.phm_dim)
        for name, other in self.peft_config.items():
            if config.share_across_tasks and other.share_across_tasks:
                rule = self.phm_rule(name)
                if rule.shape != shape:
                    raise ValueError(
                        f"share_across_tasks: A of adapter {name!r} is {list(rule.shape)}, not {list(shape)}"
                    )
                return rule
        return new_phm_rule(config.phm_dim, config.terms, config.phm_init_range, device=like.device, dtype=like.dtype)

    def _adapters(self, adapter_names: Iterable[str]) -> Iterator[CompacterAdapter]:
        slots: list[Any] = [slot for _, slot in self.slots() if isinstance(slot, CompacterSlot)]
        return (slot.adapter[name] for name in adapter_names for slot in slots if name in slot)


class CompacterPlusPlusModel(CompacterModel):
    """A model with Compacter++ adapters in it."""

    places = ("ffn",)


def _build(config: CompacterConfig, site: Site, like: Tensor, rule: nn.Parameter | None) -> CompacterAdapter:
    try:
        return CompacterAdapter(
            site.width,
            config.inner_width(site.width),
            config.phm_rank,
            phm_dim=config.phm_dim,
            num_kron_terms=config.num_kron_terms,
            phm_rule=rule,
            phm_init_range=config.phm_init_range,
            activation=config.non_linearity,
            residual=not (config.original_ln_before and isinstance(site.base_layer, nn.LayerNorm)),
            device=like.device,
            dtype=like.dtype,
        )
    except ValueError as error:
        raise ValueError(f"module {site.name!r}: {error}") from None


CONFIG_CLASSES[PeftType.COMPACTER] = CompacterConfig
CONFIG_CLASSES[PeftType.COMPACTER_PLUS_PLUS] = CompacterPlusPlusConfig
TUNER_CLASSES[PeftType.COMPACTER] = CompacterModel
TUNER_CLASSES[PeftType.COMPACTER_PLUS_PLUS] = CompacterPlusPlusModel
