"""Injecting adapters into a model, and everything done to them there: what the methods share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from peft_ext.tuners import mixed
from peft_ext.tuners.calls import Calls
from peft_ext.tuners.config import PeftConfig, PeftType
from peft_ext.tuners.layer import AdapterSlot, ModulesToSaveWrapper, TunerLayer, walk
from peft_ext.tuners.merge_report import MergeReport, measure_merge
from peft_ext.tuners.state_dict import load_tensors, trained_biases
from peft_ext.tuners.targets import find_modules_to_save, is_within

_PATH_CHARACTERS = frozenset("./\\")


@dataclass
class Placement:
    """One place in the model where an adapter goes, fully prepared.

    Args:
        name: the module's full name.
        module: the module, or the slot that is there already.
        wrap: makes a slot around the module.
        install: puts the adapter into the slot.
        finish: changes what is outside of the slot, once nothing can fail any more.
    """

    name: str
    module: nn.Module
    wrap: Callable[[nn.Module], AdapterSlot]
    install: Callable[[Any], None]
    finish: Callable[[Any], None] | None = None


ConfigT = TypeVar("ConfigT", bound=PeftConfig)


class BaseTuner(nn.Module, Generic[ConfigT]):
    """A model with adapters of one method in it.

    A method's subclass says where an adapter goes and what it is made of (:meth:`plan`).
    """

    mixes: ClassVar[bool] = True
    """Whether rows of one batch can have different adapters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if any(isinstance(module, AdapterSlot) for module in model.modules()):
            raise ValueError(
                f"this {type(model).__name__} has adapters in it already: add_adapter adds one, unload() removes them"
            )
        self.model = model
        self.peft_config: dict[str, ConfigT] = {}
        self.active_adapters: list[str] = []
        self.adapter_ids: dict[str, int] = {}
        self.calls = Calls()

    def resolve(self, config: ConfigT) -> ConfigT:
        """A copy of the configuration with defaults that depend on the model filled in."""
        raise NotImplementedError

    def plan(self, adapter_name: str, config: ConfigT, autocast_adapter_dtype: bool) -> list[Placement]:
        """Everything needed to inject the adapter. Changes nothing.

        Raises:
            ValueError: for a configuration that does not suit the model.
        """
        raise NotImplementedError

    def saved_modules(self, config: ConfigT, places: Collection[str]) -> dict[str, nn.Module]:
        """The modules that the adapter trains in full, by full name.

        Args:
            config: resolved.
            places: full names of where the adapter goes.
        """
        names = getattr(config, "modules_to_save", None)
        found = find_modules_to_save(self.model, names or ())
        if names and not found:
            warnings.warn(f"modules_to_save {names} matches no module of the model", stacklevel=5)
        return found

    def forward(self, *args: Any, adapter_names: mixed.AdapterNames | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            # within another model's call: its mix is not ours
            return mixed.run_with(None, self.model, *args, **kwargs)
        mix = self.mix(adapter_names, args, kwargs)
        if self.training and torch.is_grad_enabled():
            mixed.remember_in_checkpoints(module for _, module in walk(self.model))
        return mixed.run_with(mix, self.model, *args, **kwargs)

    def mix(self, adapter_names: mixed.AdapterNames, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> mixed.Mix:
        """Which adapter each row of the batch has.

        Args:
            adapter_names: see :meth:`PeftModel.forward`.
            args, kwargs: the model's inputs.

        Raises:
            ValueError: for an unknown adapter, a number of names that is not the batch's, or a method that cannot mix.
            TypeError: for what is neither names nor an int64 tensor.
        """
        if not self.mixes:
            raise ValueError(
                f"adapter_names: the rows of a batch cannot have different adapters in a {type(self).__name__}"
            )
        source = mixed.main_input(args, kwargs)
        if isinstance(adapter_names, Tensor):
            mix = mixed.mix_of_indices(adapter_names, self.adapter_ids)
        else:
            mix = mixed.mix_of_names(adapter_names, self.peft_config, None if source is None else source.device)
        mixed.check_batch(mix, source)
        return mix

    def adapter_indices(self, names: Sequence[str] | Sequence[Sequence[str]]) -> Tensor:
        """What can be given in place of names, so that torch.compile does not compile anew for each mix.

        An adapter keeps its index for as long as it is in the model; later another one may get it.

        Args:
            names: of adapters, or "__base__", one for each row, or a list for each row with one for each token.

        Returns:
            int64 ``[batch]`` or ``[batch, length]`` on the model's device.

        Raises:
            ValueError, TypeError: for an unknown name, and for what is no list of names.
        """
        flat = mixed.flat_names(names)
        mixed.check_known(flat, self.peft_config)
        ids = self.adapter_ids | {mixed.BASE: -1}
        device = next(self.model.parameters()).device
        indices = torch.tensor([ids[name] for name in flat], dtype=torch.int64, device=device)
        return indices.view(mixed.names_shape(names))

    def names_in_use(self, adapter_names: Any) -> list[str]:
        """The adapters that a call with these names may touch."""
        if adapter_names is None:
            return list(self.active_adapters)
        if isinstance(adapter_names, Tensor):
            return list(self.peft_config)
        return list(dict.fromkeys(mixed.flat_names(adapter_names)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def slots(self) -> Iterator[tuple[str, AdapterSlot]]:
        """Every module of the model that can hold adapters, by full name."""
        return ((name, module) for name, module in walk(self.model) if isinstance(module, AdapterSlot))

    def add_adapter(
        self,
        adapter_name: str,
        config: ConfigT,
        autocast_adapter_dtype: bool = True,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Injects an adapter. The first one becomes active and freezes the base model; later ones stay inactive.

        Other threads may call the model meanwhile: the adapter has its name only once it is complete.

        Args:
            adapter_name: its name, which no other adapter has.
            config: copied, not changed.
            autocast_adapter_dtype: keep the adapter in float32 where the base is in a half precision.
            tensors: a checkpoint to load into it; by default it keeps its initial values.

        Raises:
            ValueError: for a name, configuration or checkpoint that does not fit. The model is then as it was.
        """
        with self.calls.changing():
            self._add_adapter(adapter_name, config, autocast_adapter_dtype, tensors)

    def _add_adapter(
        self, adapter_name: str, config: ConfigT, autocast_adapter_dtype: bool, tensors: Mapping[str, Tensor] | None
    ) -> None:
        self._check_new_adapter(adapter_name, config)
        config = self.resolve(config)
        plan = self.plan(adapter_name, config, autocast_adapter_dtype)
        plan += self._plan_modules_to_save(adapter_name, config, places=[placement.name for placement in plan])
        first = not self.peft_config
        with ExitStack() as undo:
            slots = [self._install(placement, adapter_name, undo) for placement in plan]
            if tensors is not None:
                load_tensors(self.model, config, adapter_name, tensors)
            undo.pop_all()
        for placement, slot in zip(plan, slots, strict=True):
            if placement.finish is not None:
                placement.finish(slot)
        taken = set(self.adapter_ids.values())
        self.adapter_ids[adapter_name] = next(number for number in range(len(taken) + 1) if number not in taken)
        self.peft_config[adapter_name] = config
        if first:
            self.model.requires_grad_(False)
            self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one or several adapters the active ones.

        They become trainable, unless ``inference_mode``, and all others frozen. Merged adapters are unmerged.

        Raises:
            ValueError: if there is no such adapter, or these cannot be active together.
        """
        names = self.check_names("adapter_name", [adapter_name] if isinstance(adapter_name, str) else adapter_name)
        with self.calls.changing(), self.calls.changing([*self.active_adapters, *names]):
            self._set_adapter(names, inference_mode)

    def _set_adapter(self, names: list[str], inference_mode: bool) -> None:
        slots = [slot for _, slot in self.slots()]
        for slot in slots:
            slot.check_active(names)
        if any(isinstance(slot, TunerLayer) and slot.merged for slot in slots):
            warnings.warn("the merged adapters are unmerged, so that others can be active", stacklevel=4)
            self.unmerge_adapter()
        for slot in slots:
            slot.activate(names)
        self.set_requires_grad(list(self.peft_config), False)
        self.set_requires_grad(names, not inference_mode)
        self.active_adapters = names

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Freezes or unfreezes adapters, with the biases that they train."""
        names = self.check_names("adapter_names", [adapter_names] if isinstance(adapter_names, str) else adapter_names)
        configs = [self.config_of(name) for name in names]
        for _, slot in self.slots():
            for name in names:
                slot.train_adapter(name, requires_grad)
        for config in configs:
            for _, bias in trained_biases(self.model, config):
                bias.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If no other is active then, the first of the rest becomes so.

        That one is trained, unless its configuration has ``inference_mode``; others stay as they are. Calls of other
        threads that use the adapter are waited for.

        Raises:
            ValueError: if there is no such adapter, or it is merged.
        """
        self.config_of(adapter_name)
        with self.calls.changing(), self.calls.changing([adapter_name, *self._successor(adapter_name)]):
            self._delete_adapter(adapter_name)

    def _successor(self, adapter_name: str) -> list[str]:
        """The adapter that becomes active when this one is deleted, if any does."""
        if self.active_adapters != [adapter_name]:
            return []
        return [name for name in self.peft_config if name != adapter_name][:1]

    def _delete_adapter(self, adapter_name: str) -> None:
        self.config_of(adapter_name)
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged: unmerge it before deleting it")
        self.set_requires_grad(adapter_name, False)
        successor = self._successor(adapter_name)
        # calls that come now cannot name it any more
        del self.peft_config[adapter_name], self.adapter_ids[adapter_name]
        for _, slot in self.slots():
            slot.detach_adapter(adapter_name)
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]
        for name in successor:
            self.set_adapter(name, inference_mode=self.peft_config[name].inference_mode)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises a ValueError: only LoRA's updates can be summed, see :meth:`LoraModel.add_weighted_adapter`."""
        raise ValueError(f"add_weighted_adapter is for LoRA, and this is a {type(self).__name__}")

    def enable_adapter_layers(self, enabled: bool = True) -> None:
        """Lets all adapters work, or none; ``enabled=False`` unmerges what is merged."""
        if not enabled:
            self.unmerge_adapter()
        for _, slot in self.slots():
            slot.disable_adapters = not enabled

    def disable_adapter_layers(self) -> None:
        """Lets the model compute what the base model does."""
        self.enable_adapter_layers(False)

    @property
    def merged_adapters(self) -> list[str]:
        """Which adapters are merged in some layer."""
        layers = (slot for _, slot in self.slots() if isinstance(slot, TunerLayer))
        return sorted({name for layer in layers for name in layer.merged_adapters})

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = True) -> None:
        """Adds adapters to the weights of the base model: computed in float32 (float64), and rounded once.

        Args:
            adapter_names: which; by default the active ones. Those merged by one call are rounded together.
            safe_merge: compute every new weight before the first one is touched, and raise a ValueError if one is not
                finite. This takes as long again as merging, and the memory of one weight.

        Raises:
            TypeError, ValueError: for names that are none, and for adapters that cannot be merged, or not together.
                Every weight is then as it was.
        """
        self._merge(adapter_names, safe_merge, progressbar=False)

    def merge_report(self, inputs: Any = None, adapter_names: list[str] | None = None) -> MergeReport:
        """What merging adapters would change, measured: they are merged and taken out again, to the bit.

        Args:
            inputs: what the model is called with, in eval mode, merged and unmerged: a mapping (such as a tokenizer
                returns), a list or tuple of arguments, or a tensor. None compares no outputs.
            adapter_names: which adapters; by default the active ones.

        Raises:
            TypeError, ValueError: as :meth:`merge_adapter` with ``safe_merge``, if something is merged already, and for
                inputs of another type or without a floating-point output.

        Example:
            >>> import torch
            >>> from peft_ext import LoraConfig, get_peft_model
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
            >>> model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
            >>> report = model.merge_report(torch.randn(3, 8))
            >>> [weight.name for weight in report.weights], report.relative_output_error < 1e-5
            (['0.weight'], True)
        """
        names = self._check_merge(adapter_names, safe_merge=True)
        if self.merged_adapters:
            raise ValueError(f"merge_report compares with the unmerged model: unmerge {self.merged_adapters} first")
        return measure_merge(self, dict(self.slots()), names, inputs)

    def unmerge_adapter(self) -> None:
        """Takes all merged adapters out again: the weights have their old bits."""
        for _, slot in reversed(list(self.slots())):  # two layers with one weight: the last to merge goes first
            if isinstance(slot, TunerLayer):
                slot.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base model with adapters merged into it, and nothing of this library left in it.

        Args:
            progressbar: show one.
            safe_merge, adapter_names: as in :meth:`merge_adapter`, whose errors it has too.
        """
        self._merge(adapter_names, safe_merge, progressbar)
        return self._unload(adapter_names)

    def unload(self) -> nn.Module:
        """The base model without adapters: as it was, unless "pissa" or "olora" moved part of its weights."""
        self.unmerge_adapter()
        return self._unload([])

    def check_names(self, argument: str, names: Any) -> list[str]:
        """The names as a list; raises an error that names the argument unless they are adapters, each named once."""
        if not isinstance(names, list | tuple | set):
            raise TypeError(f"{argument} must be a list of names, got {names!r}")
        for name in names:
            self.config_of(name)
        if len(set(names)) < len(names):
            raise ValueError(f"{argument} must name each adapter once, got {list(names)}")
        return list(names)

    def config_of(self, adapter_name: str) -> ConfigT:
        """The adapter's configuration; a ValueError that lists the adapters if there is none of this name."""
        if not isinstance(adapter_name, str) or adapter_name not in self.peft_config:
            raise ValueError(f"there is no adapter {adapter_name!r}: the model has {list(self.peft_config)}")
        return self.peft_config[adapter_name]

    def _check_new_adapter(self, adapter_name: str, config: PeftConfig) -> None:
        if not isinstance(adapter_name, str):
            raise TypeError(f"adapter_name must be a string, got {adapter_name!r}")
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already")
        # names of attributes cannot name submodules, and the name becomes a folder when it is saved
        taken = hasattr(nn.ModuleDict(), adapter_name) or hasattr(nn.ParameterDict(), adapter_name)
        if not adapter_name or taken or _PATH_CHARACTERS & set(adapter_name):
            raise ValueError(f"adapter_name {adapter_name!r} is empty, reserved, or has one of the characters . / \\")
        for other in self.peft_config.values():
            if other.peft_type != config.peft_type:
                raise ValueError(
                    f"adapters of peft_type {other.peft_type} and {config.peft_type} cannot be in one model"
                )
        biased = [c for c in (config, *self.peft_config.values()) if getattr(c, "bias", "none") != "none"]
        if self.peft_config and len(biased) > 1:
            raise ValueError("only one adapter of a model can train biases: set bias='none' for the others")

    def _plan_modules_to_save(self, adapter_name: str, config: ConfigT, places: list[str]) -> list[Placement]:
        found = self.saved_modules(config, places)
        for name in found:
            shared = [place for place in places if is_within(name, place) or is_within(place, name)]
            if shared:
                raise ValueError(f"modules_to_save names {name!r}, but the adapter is at {shared[0]!r}: leave it out")
        return [self._plan_module_to_save(name, module, adapter_name) for name, module in found.items()]

    def _plan_module_to_save(self, name: str, module: nn.Module, adapter_name: str) -> Placement:
        if isinstance(module, TunerLayer | nn.ModuleList | nn.ModuleDict):
            raise ValueError(f"modules_to_save names {name!r}, a {type(module).__name__}, which cannot be replaced")
        original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        if any(isinstance(inner, AdapterSlot) for inner in original.modules()):
            raise ValueError(f"modules_to_save names {name!r}, which has adapters inside")
        copied = {"modules_to_save": copy.deepcopy(original)}
        return Placement(name, module, ModulesToSaveWrapper, lambda slot: slot.attach(adapter_name, copied))

    def _install(self, placement: Placement, adapter_name: str, undo: ExitStack) -> AdapterSlot:
        slot = placement.module
        if not isinstance(slot, AdapterSlot):
            slot = placement.wrap(slot)
            slot.training = placement.module.training
            self._replace(placement.name, slot)
            undo.callback(self._replace, placement.name, placement.module)
            undo.callback(slot.release)
        undo.callback(slot.detach_adapter, adapter_name)
        placement.install(slot)
        return slot

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> list[str]:
        """The adapters to merge; raises an error, before anything is touched, if they cannot be merged."""
        names = self.active_adapters if adapter_names is None else self.check_names("adapter_names", adapter_names)
        slots = dict(self.slots())
        for slot in slots.values():
            slot.check_merge(names)
        if safe_merge:
            for module, slot in slots.items():
                slot.check_finite(names, module)
        return names

    def _merge(self, adapter_names: list[str] | None, safe_merge: bool, progressbar: bool) -> None:
        names = self._check_merge(adapter_names, safe_merge)
        layers: Iterable[TunerLayer] = [slot for _, slot in self.slots() if isinstance(slot, TunerLayer)]
        if progressbar:
            from rich.progress import track

            layers = track(layers, description="merging")
        with ExitStack() as undo:
            for layer in layers:
                undo.callback(layer.unmerge, keep=len(layer.merged_adapters))
                layer.merge(safe_merge=False, adapter_names=names)
            undo.pop_all()

    def _unload(self, adapter_names: list[str] | None) -> nn.Module:
        for name, slot in reversed(list(self.slots())):  # inner ones first, while their names hold
            slot.release()
            if isinstance(slot, TunerLayer):
                self._replace(name, slot.base_layer)
            elif isinstance(slot, ModulesToSaveWrapper):
                self._replace(name, self._chosen_copy(slot, adapter_names))
        mixed.forget_in_checkpoints(self.model.modules())
        self._note_what_is_untied()
        return self.model

    def _note_what_is_untied(self) -> None:
        """If a trained copy took the place of one of two tied embeddings, a model that is loaded must not tie them."""
        model: Any = self.model
        if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
            return
        layers = model.get_input_embeddings(), model.get_output_embeddings()
        if None not in layers and layers[0].weight is not layers[1].weight:
            model.config.tie_word_embeddings = False

    @staticmethod
    def _chosen_copy(slot: ModulesToSaveWrapper, adapter_names: list[str] | None) -> nn.Module:
        names = slot.active_adapters if adapter_names is None else [name for name in adapter_names if name in slot]
        return slot.modules_to_save[names[0]] if names else slot.original_module


TUNER_CLASSES: dict[PeftType, type[BaseTuner]] = {}
"""The tuner of every method. Each method's file adds its own."""
