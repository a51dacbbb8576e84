"""What takes the place of a module in an adapted model, and keeps adapters by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_ext.tuners.mixed import Mix, by_adapter, current_mix

_TOKEN_MODULES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
"""What can be applied to a row of tokens without the others."""

Part = nn.Module | nn.Parameter
"""What one adapter adds to one module under one attribute, such as the ``nn.Linear`` in ``lora_A``."""


def adapter_dtype(dtype: torch.dtype, autocast_adapter_dtype: bool) -> torch.dtype:
    """The dtype of a new adapter of a module in ``dtype``: float32 over a half precision, unless told to keep it."""
    return torch.float32 if autocast_adapter_dtype and dtype != torch.float64 else dtype


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Within this context nothing is recorded for gradients, and autocast lowers no precision."""
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def merge_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype merging computes what goes into a weight of ``dtype``: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class Entry(NamedTuple):
    """One tensor of an adapter: its key in a checkpoint, its key in the model's state dict.

    A tensor that is computed from others has no key in the model.
    """

    checkpoint_key: str
    model_key: str | None
    tensor: Tensor


class AdapterSlot(nn.Module):
    """A module that holds parts of several adapters, each of them under its name.

    ``part_names`` are the attributes that map adapter names to parts, ``helper_names`` those that map them to
    modules without parameters, ``private_names`` further
    attributes whose parameters are not the base model's own any more.
    """

    part_names: tuple[str, ...] = ()
    helper_names: tuple[str, ...] = ()
    private_names: tuple[str, ...] = ()
    disable_adapters = False

    def __init__(self) -> None:
        super().__init__()
        self.active_adapters: list[str] = []

    def __contains__(self, adapter_name: str) -> bool:
        return any(adapter_name in getattr(self, attribute) for attribute in self.part_names)

    def parts(self, adapter_name: str) -> dict[str, Part]:
        """The adapter's parts by attribute."""
        holders = {attribute: getattr(self, attribute) for attribute in self.part_names}
        return {name: holder[adapter_name] for name, holder in holders.items() if adapter_name in holder}

    def attach(self, adapter_name: str, parts: Mapping[str, Part]) -> None:
        """Adds an adapter, frozen and inactive."""
        for attribute, part in parts.items():
            if isinstance(part, nn.Module):
                part.train(self.training)
            getattr(self, attribute)[adapter_name] = part.requires_grad_(False)

    def detach_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; the others stay as they are."""
        for attribute in self.parts(adapter_name):
            del getattr(self, attribute)[adapter_name]
        if adapter_name in self.active_adapters:
            self.active_adapters = [name for name in self.active_adapters if name != adapter_name]

    def mixed_names(self, mix: Mix) -> list[str]:
        """Those adapters of a mixed batch that this module has."""
        return [name for name in mix.names if name in self]

    def check_active(self, adapter_names: list[str]) -> None:
        """Raises a ValueError if these adapters cannot be active together."""

    def activate(self, adapter_names: list[str]) -> None:
        """Makes those of the named adapters active that this module has."""
        self.active_adapters = [name for name in adapter_names if name in self]

    def train_adapter(self, adapter_name: str, requires_grad: bool) -> None:
        """Freezes or unfreezes an adapter's parameters."""
        for part in self.parts(adapter_name).values():
            part.requires_grad_(requires_grad)

    def to_merge(self, adapter_names: list[str]) -> list[str]:
        """Which of the adapters merging them changes something of here."""
        return [name for name in adapter_names if name in self]

    def check_merge(self, adapter_names: list[str]) -> None:
        """Raises a ValueError if these adapters, beside those that are merged, cannot be merged."""
        self.check_active(adapter_names)

    def merged_parameters(
        self, adapter_names: list[str], dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """What merging makes of the module's parameters, computed and left in ``dtype``; changes nothing.

        Args:
            adapter_names: as :meth:`to_merge` has them.
            dtype: by default what merging itself computes in, see :func:`merge_dtype`.

        Yields:
            The parameter's name in the plain module, its value now, and its value before it is rounded.
        """
        return iter(())

    def check_finite(self, adapter_names: list[str], module: str = "") -> None:
        """Raises a ValueError if merging these adapters would make a parameter that is not finite.

        Args:
            adapter_names: those that this module does not have, or has merged, are passed over.
            module: the full name of this one, for the message.
        """
        names = self.to_merge(adapter_names)
        for key, parameter, merged in self.merged_parameters(names):
            if not merged.to(parameter.dtype).isfinite().all():
                shown, name = ", ".join(map(repr, names)), f"{module}.{key}".lstrip(".")
                raise ValueError(
                    f"merging adapter {shown} would make weights that are not finite, in {name!r}: "
                    "only safe_merge=False merges it"
                )

    def release(self) -> None:
        """Undoes what the slot has done to its module, when it goes out of the model."""

    def checkpoint_key(self, name: str, key: str) -> str:
        """The key in a checkpoint of what this module, of the given full name, calls ``key``."""
        return f"{name}.{key}"

    @staticmethod
    def entries(parts: Mapping[str, Part], adapter_name: str) -> Iterator[Entry]:
        """The tensors of an adapter's parts, with keys relative to this module."""
        for attribute, part in parts.items():
            if isinstance(part, nn.Parameter):
                yield Entry(attribute, f"{attribute}.{adapter_name}", part)
                continue
            for key, tensor in part.state_dict(keep_vars=True).items():
                yield Entry(f"{attribute}.{key}", f"{attribute}.{adapter_name}.{key}", tensor)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``named_modules()``, without what adapters consist of: with fifty of them it takes as long as with one."""
    return _walk(model, "", set())


def parameter_holders(model: nn.Module) -> dict[int, set[int]]:
    """The ids of the modules that have a parameter, by its id: several where it is tied."""
    holders: dict[int, set[int]] = {}
    for _, module in walk(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(id(module))
    return holders


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    yield name, module
    holders = (*module.part_names, *module.helper_names) if isinstance(module, AdapterSlot) else ()
    for child_name, child in module._modules.items():
        if child is not None and child_name not in holders:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)


class TunerLayer(AdapterSlot):
    """Base of the layers that a method puts around a module of the model, its ``base_layer``.

    A method that merges says what it makes of the weight (:meth:`merged_weight`). By default the old weight is kept,
    to be put back; a method may know a smaller way (:meth:`_add`, :meth:`_take_out`, :meth:`_add_again`).
    """

    base_layer: Any  # for type checkers an nn.Module's attributes are "Tensor | Module"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._merges: list[tuple[int, Any]] = []  # of each call: how many adapters, and what takes them out again

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: model code reads its dtype or its device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def replace_base_layer(self, base_layer: nn.Module) -> None:
        """Puts another layer of the same sizes under the adapters."""
        self.base_layer = base_layer

    def mixed_names(self, mix: Mix) -> list[str]:
        if self.merged_adapters:
            raise ValueError(f"adapter_names cannot be given while {self.merged_adapters} are merged: unmerge first")
        return super().mixed_names(mix)

    def to_merge(self, adapter_names: list[str]) -> list[str]:
        return [name for name in super().to_merge(adapter_names) if name not in self.merged_adapters]

    def check_merge(self, adapter_names: list[str]) -> None:
        super().check_merge([*self.merged_adapters, *self.to_merge(adapter_names)])

    def merged_parameters(
        self, adapter_names: list[str], dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        if adapter_names:
            weight = self.weight
            with full_precision(weight.device.type):
                merged = self.merged_weight(adapter_names, dtype or merge_dtype(weight.dtype))
            yield "weight", weight, merged

    def merged_weight(self, adapter_names: list[str], dtype: torch.dtype) -> Tensor:
        """A new tensor: what merging these adapters makes of the weight, computed in ``dtype`` and not rounded."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = True, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base layer's weight, in place: computed in float32, and rounded once.

        A float64 weight is computed in float64. What is merged comes out again by :meth:`unmerge`, to the bit, whatever
        has become of the adapters' parameters since.

        Args:
            safe_merge: raise a ValueError, with the weight untouched, if the new one would not be finite.
            adapter_names: which adapters; by default the active ones. Those that are merged already,
                or that this layer does not have, are passed over.
        """
        names = self.to_merge(self.active_adapters if adapter_names is None else adapter_names)
        self.check_merge(names)
        if safe_merge:
            self.check_finite(names)
        if names:
            with full_precision(self.weight.device.type):
                self._merges.append((len(names), self._add(names)))
            self.merged_adapters += names

    def unmerge(self, keep: int = 0) -> None:
        """Takes merged adapters out: the weight has the very bits that it had before they were merged.

        Args:
            keep: how many of those merged first stay. Adapters that were merged by one call come out together.
        """
        while len(self.merged_adapters) > keep:
            count, record = self._merges[-1]
            with full_precision(self.weight.device.type):
                self._take_out(record)
            self._merges.pop()
            del self.merged_adapters[-count:]

    def _add(self, adapter_names: list[str]) -> Any:
        """Merges, and returns what :meth:`_take_out` needs."""
        return self._replace_weight(self.merged_weight(adapter_names, merge_dtype(self.weight.dtype)))

    def _take_out(self, record: Any) -> None:
        self.weight.copy_(record)

    def _add_again(self, record: Any, move: Callable[[Tensor], Tensor], merged: Tensor) -> Any:
        """Merges what was taken out before the layer was moved; ``merged`` is what the weight then was, moved."""
        return self._replace_weight(merged)

    def _replace_weight(self, merged: Tensor) -> Tensor:
        original = self.weight.detach().clone()
        self.weight.copy_(merged)
        return original

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TunerLayer:
        """Moves a merged layer by way of the unmerged one, as what is kept holds for one dtype and one device."""
        moves = []
        with torch.no_grad():
            for count, record in reversed(self._merges):
                moves.append((count, record, self.weight.detach().clone()))
                self._take_out(record)
            super()._apply(fn, recurse)
            self._merges = [
                (count, self._add_again(record, fn, fn(merged))) for count, record, merged in reversed(moves)
            ]
        return self


class StandIn(nn.Module):
    """Mixin before a slot around any module: what the slot lacks is looked for in its ``base_layer``."""

    base_layer: Any

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self._modules:
                raise
            return getattr(self.base_layer, name)


class ModulesToSaveWrapper(AdapterSlot):
    """A module of the model that is trained in full: each adapter has a copy of its own."""

    part_names = ("modules_to_save",)
    private_names = ("original_module",)

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()

    @staticmethod
    def entries(parts: Mapping[str, Part], adapter_name: str) -> Iterator[Entry]:
        """As in the base class, but checkpoints leave ``modules_to_save`` out of the keys."""
        for key, model_key, tensor in AdapterSlot.entries(parts, adapter_name):
            yield Entry(key.removeprefix("modules_to_save."), model_key, tensor)

    def check_active(self, adapter_names: list[str]) -> None:
        mine = [name for name in adapter_names if name in self]
        if len(mine) > 1:
            raise ValueError(f"adapters {mine} cannot be active together: each has its own copy of one module")

    def merged_parameters(
        self, adapter_names: list[str], dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The adapter's copies, which take the places of the module's own parameters when the model is unloaded."""
        for adapter_name in adapter_names:
            copies = dict(self.modules_to_save[adapter_name].named_parameters())
            for key, parameter in self.original_module.named_parameters():
                yield key, parameter, copies[key].detach().to(dtype or merge_dtype(parameter.dtype))

    @property
    def active_module(self) -> nn.Module:
        if self.disable_adapters or not self.active_adapters:
            return self.original_module
        return self.modules_to_save[self.active_adapters[0]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mix = current_mix()
        if mix is None or self.disable_adapters:
            return self.active_module(*args, **kwargs)
        names = self.mixed_names(mix)
        if not names:
            return self.original_module(*args, **kwargs)
        return self._forward_mixed(mix, names, *args, **kwargs)

    def _forward_mixed(self, mix: Mix, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Each copy on its own rows of the first argument; further ones are passed on as they are."""
        if not args or not isinstance(args[0], Tensor):
            raise TypeError(
                f"adapter_names: a {type(self.original_module).__name__} in modules_to_save must be given a tensor "
                "as its first positional argument"
            )
        x, *args = args  # type: ignore[assignment]

        def run(name: str | None, part: Tensor) -> Tensor:
            module = self.original_module if name is None else self.modules_to_save[name]
            output = module(part, *args, **kwargs)
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"adapter_names: the copies of a {type(self.original_module).__name__} in modules_to_save give "
                    f"{type(output).__name__}, which cannot be put together from rows: a tensor can"
                )
            return output

        return by_adapter(mix, names, x, run, rows_only=not isinstance(self.original_module, _TOKEN_MODULES))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self._modules:
                raise
            return getattr(self.active_module, name)
