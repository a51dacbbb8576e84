"""What the methods share that put an adapter on the output of sublayers: Houlsby, Pfeiffer, Compacter."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from peft_ext.nn._checks import check_sizes
from peft_ext.reference.bottleneck_adapter import ACTIVATIONS
from peft_ext.tuners.adapter_drop import AdapterDrop, DropState
from peft_ext.tuners.base import BaseTuner, Placement
from peft_ext.tuners.config import TargetedConfig
from peft_ext.tuners.layer import Part, StandIn, TunerLayer, adapter_dtype
from peft_ext.tuners.mixed import AdapterNames, Mix, by_adapter, current_mix
from peft_ext.tuners.sublayers import layer_index, output_width, resolve_sublayers
from peft_ext.tuners.targets import find_target_modules


@dataclass
class SublayerConfig(TargetedConfig):
    """What the configurations of these methods have. Names are AdapterHub's where it has them.

    Args:
        bottleneck_dim: the adapter's inner width; None derives it from ``reduction_factor``.
        reduction_factor: features of the model for each inner one.
        non_linearity: "relu", "gelu", "gelu_new" (its tanh form), "silu" or "tanh".
        adapter_drop: which layers go without an adapter; an :class:`AdapterDrop`, or its fields.
        target_modules: the modules whose output the adapters take; None for the architecture's
            places (:mod:`peft_ext.tuners.sublayers`).

    The further arguments are those of :class:`TargetedConfig`.

    Raises:
        ValueError, TypeError: for a value out of range.
    """

    bottleneck_dim: int | None = None
    reduction_factor: float = 16
    non_linearity: str = "relu"
    adapter_drop: AdapterDrop | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.adapter_drop, Mapping):
            self.adapter_drop = AdapterDrop(**self.adapter_drop)
        if not isinstance(self.adapter_drop, AdapterDrop | None):
            raise TypeError(f"adapter_drop must be an AdapterDrop or a dict of its fields, got {self.adapter_drop!r}")
        if self.bottleneck_dim is not None:
            check_sizes({"bottleneck_dim": self.bottleneck_dim})
        factor = self.reduction_factor
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise ValueError(f"reduction_factor must be a finite number > 0, got {factor!r}")
        if not isinstance(self.non_linearity, str) or self.non_linearity not in ACTIVATIONS:
            raise ValueError(f"non_linearity must be one of {', '.join(ACTIVATIONS)}, got {self.non_linearity!r}")

    def inner_width(self, width: int) -> int:
        """The adapter's inner width in a model of ``width`` features."""
        return self.bottleneck_dim or max(1, int(width // self.reduction_factor))


class SublayerSlot(StandIn, TunerLayer):
    """A module with adapters on its output, one after the other: y = adapter(base(x)).

    Of an output that is a tuple the first element is adapted. Unknown attributes are the module's own.

    Args:
        base_layer: the module.
        layer: index of the layer that it is in.
        drop: which layers go without their adapters.
    """

    part_names: tuple[str, ...] = ("adapter",)

    def __init__(self, base_layer: nn.Module, layer: int, drop: DropState) -> None:
        super().__init__(base_layer)
        self.adapter = nn.ModuleDict()
        self.layer_index = layer
        self._drop = drop

    def is_dropped(self) -> bool:
        """Whether this layer goes without adapters now."""
        return self.disable_adapters or self.layer_index < (self._drop.drawn if self.training else self._drop.chosen)

    def working_adapters(self) -> Iterator[nn.Module]:
        """The active adapters, none while this layer is dropped."""
        return iter(()) if self.is_dropped() else (self.adapter[name] for name in self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.adapt(self.base_layer(*args, **kwargs))

    def adapt(self, output: Any) -> Any:
        """What the working adapters make of the module's output."""
        if isinstance(output, tuple):
            return (self.adapt(output[0]), *output[1:])
        mix = current_mix()
        if mix is not None:
            return self.adapt_mixed(output, mix)
        for adapter in self.working_adapters():
            output = adapter(output)
        return output

    def adapt_mixed(self, output: Tensor, mix: Mix) -> Tensor:
        """The same for a batch of several adapters."""
        if self.is_dropped():
            return output
        return by_adapter(
            mix, self.mixed_names(mix), output, lambda name, part: part if name is None else self.adapter[name](part)
        )

    def check_merge(self, adapter_names: list[str]) -> None:
        """Raises a ValueError: these adapters are not linear, so no weight can hold them."""
        raise ValueError("bottleneck adapters cannot be merged: unload() takes them out of the model")


class Site(NamedTuple):
    """Where an adapter goes, and what it has to fit.

    Args:
        name: the module's full name.
        module: the module, or the slot that is there already.
        base_layer: the module itself.
        width: features of its output.
        like: an empty tensor on the device and in the dtype that the adapter gets.
    """

    name: str
    module: nn.Module
    base_layer: nn.Module
    width: int
    like: Tensor


SublayerConfigT = TypeVar("SublayerConfigT", bound=SublayerConfig)


class SublayerTuner(BaseTuner[SublayerConfigT]):
    """A model with such adapters in it. A subclass says in which ``places``, and builds the adapter."""

    places: tuple[str, ...] = ("attention", "ffn")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._drop = DropState()

    def build(self, config: SublayerConfigT, site: Site) -> nn.Module:
        """A new adapter for one place."""
        raise NotImplementedError

    def build_parts(self, config: SublayerConfigT, sites: Sequence[Site]) -> list[dict[str, Part]]:
        """What a new adapter puts into each of the places."""
        return [{"adapter": self.build(config, site)} for site in sites]

    @staticmethod
    def slot_class(base_layer: nn.Module, config: SublayerConfigT) -> type[SublayerSlot]:
        """What goes around a module."""
        return SublayerSlot

    def resolve(self, config: SublayerConfigT) -> SublayerConfigT:
        config = copy.deepcopy(config)
        config.target_modules = resolve_sublayers(self.model, config, self.places)
        return config

    def plan(self, adapter_name: str, config: SublayerConfigT, autocast_adapter_dtype: bool) -> list[Placement]:
        sites = find_sites(self.model, find_places(self.model, config), autocast_adapter_dtype)
        return [
            place(adapter_name, site, self.slot_class(site.base_layer, config), self._drop, parts)
            for site, parts in zip(sites, self.build_parts(config, sites), strict=True)
        ]

    def forward(self, *args: Any, adapter_names: AdapterNames | None = None, **kwargs: Any) -> Any:
        if self.training:
            self._draw([name for name in self.names_in_use(adapter_names) if name in self.peft_config])
        return super().forward(*args, adapter_names=adapter_names, **kwargs)

    def drop_adapter_layers(self, layers: int) -> None:
        """Leaves out the adapters of the first ``layers`` layers, until called again; 0 leaves out none.

        Layers count in which any adapter of the model is, active or not. Adapters left out are not computed. One
        trained with ``AdapterDrop("robust")`` is made for this. In training this holds too, unless the active
        adapter draws the number itself.

        Raises:
            ValueError: for more layers than have adapters.
        """
        adapted = self._adapted_layers(list(self.peft_config))
        total = len(adapted)
        if isinstance(layers, bool) or not isinstance(layers, int) or not 0 <= layers <= total:
            raise ValueError(f"layers must be an integer from 0 to {total}, the layers with adapters, got {layers!r}")
        self._drop.choose(layers, adapted)

    def _draw(self, adapter_names: Sequence[str]) -> None:
        drops = [self.peft_config[name].adapter_drop for name in adapter_names]
        robust = [drop for drop in drops if drop is not None and drop.mode == "robust"]
        if not robust:
            self._drop.drawn = self._drop.chosen
            return
        adapted = self._adapted_layers(adapter_names)
        self._drop.draw(min(drop.layers or len(adapted) - 1 for drop in robust), adapted)

    def _adapted_layers(self, adapter_names: Sequence[str]) -> list[int]:
        """Indices of the layers in which the adapters are, in order."""
        slots = (slot for _, slot in self.slots() if isinstance(slot, SublayerSlot))
        return sorted({slot.layer_index for slot in slots if any(name in slot for name in adapter_names)})


def find_places(model: nn.Module, config: SublayerConfig) -> dict[str, nn.Module]:
    """The modules that get an adapter, by full name.

    ``config.target_modules`` must have been resolved.

    Raises:
        ValueError: if there is none, or AdapterDrop leaves none.
    """
    targets = find_target_modules(model, config)
    drop = config.adapter_drop
    if drop is None:
        return targets
    layers = sorted({layer_of(name) for name in targets})
    drop.check(len(layers))
    kept = set(layers[drop.layers :] if drop.mode == "specialised" else layers)
    return {name: module for name, module in targets.items() if layer_of(name) in kept}


def layer_of(name: str) -> int:
    """Index of the layer that a module is in; modules outside of numbered layers count as in the first."""
    return layer_index(name) or 0


def find_sites(model: nn.Module, places: Mapping[str, nn.Module], autocast_adapter_dtype: bool) -> list[Site]:
    """What adapters in these places have to fit."""
    return [_site(model, name, module, autocast_adapter_dtype) for name, module in places.items()]


def place(
    adapter_name: str, site: Site, slot_class: type[SublayerSlot], drop: DropState, parts: Mapping[str, Part]
) -> Placement:
    """How an adapter's parts get into a place."""
    wrap = partial(slot_class, layer=layer_of(site.name), drop=drop)
    return Placement(site.name, site.module, wrap, lambda slot: slot.attach(adapter_name, parts))


def _site(model: nn.Module, name: str, module: nn.Module, autocast_adapter_dtype: bool) -> Site:
    base_layer = module.base_layer if isinstance(module, TunerLayer) else module
    width = output_width(model, name, base_layer)
    return Site(name, module, base_layer, width, _adapter_like(model, name, autocast_adapter_dtype))


def _adapter_like(model: nn.Module, name: str, autocast_adapter_dtype: bool) -> Tensor:
    """An empty tensor on the device and in the dtype that an adapter of this module has."""
    like = _parameter_like(model, name)
    return torch.empty(0, device=like.device, dtype=adapter_dtype(like.dtype, autocast_adapter_dtype))


def _parameter_like(model: nn.Module, name: str) -> Tensor:
    """A parameter of the module, or of the nearest one around it that has any."""
    while True:
        parameter = next(model.get_submodule(name).parameters(), None)
        if parameter is not None:
            return parameter
        if not name:
            raise ValueError(f"this {type(model).__name__} has no parameters, so nothing tells the adapters' dtype")
        name = name.rpartition(".")[0]
