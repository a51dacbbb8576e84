"""BitFit: only the biases are trained (Ben Zaken et al., 2021)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_ext.tuners.base import TUNER_CLASSES, BaseTuner, Placement
from peft_ext.tuners.config import CONFIG_CLASSES, PeftConfig, PeftType, check_list, check_patterns
from peft_ext.tuners.layer import AdapterSlot, Entry, ModulesToSaveWrapper, Part, StandIn, TunerLayer
from peft_ext.tuners.targets import find_modules_to_save

_SHOWN_NAMES = 5


@dataclass
class BitFitConfig(PeftConfig):
    r"""Configuration of BitFit: which biases are trained.

    A bias is a parameter whose full name contains ``bias``, that of a LayerNorm too. It is trained in the base
    model's dtype.

    Args:
        bias_terms: regular expressions, at least one of which is found in a bias's full name; one string is one
            expression. None takes all. The paper's half: ``["query", "intermediate"]``.
        modules_to_save: names of modules that are trained in full and saved with the biases, such as the head.

    Raises:
        TypeError, ValueError: for expressions that are none; for a model without such biases when it is adapted.

    Example:
        >>> from torch import nn
        >>> from peft_ext import BitFitConfig, get_peft_model
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2))
        >>> get_peft_model(model, BitFitConfig()).get_nb_trainable_parameters()[0]
        34
    """

    bias_terms: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BITFIT
        if not isinstance(self.bias_terms, str):
            check_list("bias_terms", self.bias_terms, str)
        check_patterns("bias_terms", self.patterns())

    def patterns(self) -> list[str]:
        """``bias_terms`` as a list; an empty expression, which is found in every name, stands for all."""
        if self.bias_terms is None:
            return [""]
        return [self.bias_terms] if isinstance(self.bias_terms, str) else list(self.bias_terms)


class BiasLayer(StandIn, TunerLayer):
    """A module whose biases are those of the active adapter, or its own.

    The parameters themselves change places in the module, so it computes as ever, and so does code that reads its
    biases without calling it.
    """

    part_names = ("biases",)
    private_names = ("originals",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.biases = nn.ModuleDict()
        self.originals = nn.ParameterDict()
        self._disabled = False

    @staticmethod
    def entries(parts: Mapping[str, Part], adapter_name: str) -> Iterator[Entry]:
        """As in the base class, but checkpoints have the biases under their names in the plain model."""
        for key, model_key, tensor in AdapterSlot.entries(parts, adapter_name):
            yield Entry(key.removeprefix("biases."), model_key, tensor)

    def original(self, name: str) -> nn.Parameter:
        """The base model's own bias."""
        return self.originals[name] if name in self.originals else self.base_layer._parameters[name]

    def add_adapter(self, adapter_name: str, biases: nn.ParameterDict) -> None:
        """Adds an adapter's biases, by the names that they have in the module."""
        for name in biases:
            self.originals[name] = self.original(name)
        self.attach(adapter_name, {"biases": biases})

    def detach_adapter(self, adapter_name: str) -> None:
        super().detach_adapter(adapter_name)
        self._put_in()

    def check_active(self, adapter_names: list[str]) -> None:
        mine = [name for name in adapter_names if name in self]
        if len(mine) > 1:
            raise ValueError(f"adapters {mine} cannot be active together: each has its own biases of one module")

    def activate(self, adapter_names: list[str]) -> None:
        super().activate(adapter_names)
        self._put_in()

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    @disable_adapters.setter
    def disable_adapters(self, disabled: bool) -> None:
        self._disabled = disabled
        self._put_in()

    def merged_parameters(
        self, adapter_names: list[str], dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        for adapter_name in adapter_names:
            biases: Any = self.biases[adapter_name]
            for key, bias in biases.items():
                yield key, self.originals[key], bias.detach().to(dtype or bias.dtype)

    def merge(self, safe_merge: bool = True, adapter_names: list[str] | None = None) -> None:
        """Leaves the adapter's biases in the module, whatever is active, until they are taken out again."""
        names = self.to_merge(self.active_adapters if adapter_names is None else adapter_names)
        self.check_merge(names)
        if safe_merge:
            self.check_finite(names)
        self.merged_adapters += names
        self._put_in()

    def unmerge(self, keep: int = 0) -> None:
        self.merged_adapters = self.merged_adapters[:keep]
        self._put_in()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def _put_in(self) -> None:
        """Puts the biases that count into the module."""
        chosen = self.merged_adapters or ([] if self._disabled else self.active_adapters)
        biases: Any = self.biases[chosen[0]] if chosen else {}
        for name, original in self.originals.items():
            self.base_layer._parameters[name] = biases.get(name, original)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BiasLayer:
        super()._apply(fn, recurse)
        self._put_in()  # a move may have made parameters anew, each of the two that were one
        return self


class BitFitModel(BaseTuner[Any]):
    """A model that has several sets of biases."""

    mixes = False

    def resolve(self, config: BitFitConfig) -> BitFitConfig:
        return copy.deepcopy(config)

    def plan(self, adapter_name: str, config: BitFitConfig, autocast_adapter_dtype: bool) -> list[Placement]:
        found = self._find(config)
        copies: dict[int, nn.Parameter] = {}  # by the original: a bias that two modules share stays shared
        plan = []
        for name, (module, biases) in found.items():
            own = nn.ParameterDict({key: _copy_once(bias, copies) for key, bias in biases.items()})
            install = partial(_install, adapter_name=adapter_name, biases=own)
            plan.append(Placement(name, module, BiasLayer, install))
        # inner modules first, while the names of outer ones are what they were
        return plan[::-1]

    def _unload(self, adapter_names: list[str] | None) -> nn.Module:
        for _, slot in self.slots():
            if isinstance(slot, BiasLayer):
                slot.activate([])  # merged biases stay
        return super()._unload(adapter_names)

    def _find(self, config: BitFitConfig) -> dict[str, tuple[nn.Module, dict[str, nn.Parameter]]]:
        """The modules that own chosen biases, by full name, with the biases by their names there."""
        saved = tuple(f"{name}." for name in find_modules_to_save(self.model, config.modules_to_save or ()))
        biases = {
            f"{name}.{key}".lstrip("."): (name, module, key, bias)
            for name, module in _own_modules(self.model)
            for key, bias in _own_parameters(module)
        }
        biases = {
            name: value for name, value in biases.items() if "bias" in _plain(name) and not name.startswith(saved)
        }
        if not biases:
            raise ValueError(f"this {type(self.model).__name__} has no parameter whose name contains 'bias' to train")
        chosen: dict[str, tuple[nn.Module, dict[str, nn.Parameter]]] = {}
        for full_name, (name, module, key, bias) in biases.items():
            if not any(re.search(pattern, _plain(full_name)) for pattern in config.patterns()):
                continue
            if not name:
                raise ValueError(f"the bias {key!r} belongs to the model itself, not to a module in it: wrap the model")
            chosen.setdefault(name, (module, {}))[1][key] = bias
        if not chosen:
            shown = ", ".join(list(biases)[:_SHOWN_NAMES])
            raise ValueError(f"bias_terms {config.bias_terms!r} matches none of {len(biases)} biases: {shown}, ...")
        return chosen


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules without those that slots stand for or keep aside."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, BiasLayer):
            inside += tuple(f"{name}.{part}" for part in (*module.part_names, *module.private_names))
        elif isinstance(module, ModulesToSaveWrapper):
            inside += (f"{name}.",)
        parent = model.get_submodule(name.rpartition(".")[0])
        if not (isinstance(parent, BiasLayer) and module is parent.base_layer):
            yield name, module


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    if isinstance(module, BiasLayer):
        yield from ((name, module.original(name)) for name, _ in _own_parameters(module.base_layer))
    else:
        yield from module.named_parameters(recurse=False)


def _plain(name: str) -> str:
    """A name as it is in the plain model."""
    return name.replace(".base_layer", "")


def _copy_once(bias: nn.Parameter, copies: dict[int, nn.Parameter]) -> nn.Parameter:
    if id(bias) not in copies:
        copies[id(bias)] = nn.Parameter(bias.detach().clone(memory_format=torch.preserve_format))
    return copies[id(bias)]


def _install(layer: BiasLayer, adapter_name: str, biases: nn.ParameterDict) -> None:
    layer.add_adapter(adapter_name, biases)


CONFIG_CLASSES[PeftType.BITFIT] = BitFitConfig
TUNER_CLASSES[PeftType.BITFIT] = BitFitModel
