"""What takes the place of a module in an adapted model, and keeps adapters by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


class Entry(NamedTuple):
    """One tensor of an adapter: its key in a checkpoint, its key in the model's state dict.

    A tensor that is computed from others has no key in the model.
    """

    checkpoint_key: str
    model_key: str | None
    tensor: Tensor


class AdapterSlot(nn.Module):
    """A module that holds parts of several adapters, each of them under its name.

    ``part_names`` are the attributes that map adapter names to parts, ``private_names`` further
    attributes whose parameters are not the base model's own any more.
    """

    part_names: tuple[str, ...] = ()
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


class TunerLayer(AdapterSlot):
    """Base of the layers that a method puts around a module of the model, its ``base_layer``."""

    base_layer: Any  # for type checkers an nn.Module's attributes are "Tensor | Module"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []

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

    def mixed_names(self, mix: Mix) -> list[str]:
        if self.merged_adapters:
            raise ValueError(f"adapter_names cannot be given while {self.merged_adapters} are merged: unmerge first")
        return super().mixed_names(mix)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters (by default the active ones) to the base layer's weight."""
        raise NotImplementedError

    def unmerge(self, keep: int = 0) -> None:
        """Takes the merged adapters but the first ``keep`` out of the weight again."""
        raise NotImplementedError


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
