"""One batch, a different adapter for each row or each token: who has which, and how the layers learn of it.

A call's :class:`Mix` is kept in a variable of the thread, so that several threads can call one model with different
mixes, and nothing is changed in the model for a call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_ext.nn._lookup import same_device

BASE = "__base__"
"""Stands for the base model where an adapter's name is expected."""

AdapterNames = Sequence[str] | Sequence[Sequence[str]] | Tensor
"""A name for each row, or for each token of each row, or the tensor that ``adapter_indices`` makes of them."""

_INPUTS = ("input_ids", "inputs", "inputs_embeds")
_NO_ADAPTER = -2
_CHECKPOINT = "_gradient_checkpointing_func"


class Mix:
    """Which adapter each row, or each token, of a batch has.

    Args:
        names: adapters.
        index: int64 ``[batch]`` or ``[batch, length]``: positions in ``names``, or -1 for the base model.
        expands: whether layers may see each row several times in succession, as in beam search.
    """

    def __init__(self, names: tuple[str, ...], index: Tensor, expands: bool = False) -> None:
        self.names = names
        self.index = index
        self.expands = expands
        self._cache: dict[Any, Any] = {}

    @property
    def per_token(self) -> bool:
        """Whether tokens of one row have different adapters."""
        return self.index.dim() == 2

    def index_among(self, names: Sequence[str], x: Tensor) -> Tensor:
        """The index into ``names``, in their order, which some adapters may lack, for a layer's input ``x``.

        Raises:
            ValueError: if ``x`` has other rows, or tokens, than the batch.
        """
        index = self.index if len(names) == len(self.names) else self._kept(("index", *names), self._remap, names)
        if not same_device(index, x):
            index = index.to(x.device)
        if x.shape[: index.dim()] == index.shape:
            return index
        if self.expands and index.dim() == 1 and x.size(0) % index.size(0) == 0:
            return index.repeat_interleave(x.size(0) // index.size(0))
        raise ValueError(
            f"adapter_names is for a batch of {list(index.shape)}, but a layer got an input of {list(x.shape)}"
        )

    def scalings(self, values: Sequence[float | Tensor], like: Tensor) -> Tensor:
        """The scalings of a layer's adapters as one tensor; layers with the same ones share it."""
        # a tensor stands for itself in the key: nobody changes it during a call
        return self._kept(("scalings", like.device, *values), _scalings, values, like.device)

    def groups(self, names: Sequence[str], x: Tensor) -> list[tuple[str | None, Tensor]]:
        """The rows (or tokens, counted through) of ``x`` by adapter; None for those with none of ``names``."""
        return self._kept(("groups", x.size(0), x.device, *names), _groups, names, self.index_among(names, x))

    def kept_for_inference(self, layer: nn.Module, make: Callable[..., Any], *args: Any) -> Any:
        """What ``make`` gives, made once a call for each layer while no gradients are recorded.

        A call is a whole ``generate``, and a token's weights have gone through the caches: to look up 32 parameters of
        a layer then takes as long as to multiply with them. With gradients it is made anew: sharding may exchange
        parameters between a layer's forward and its second one under gradient checkpointing.
        """
        return make(*args) if torch.is_grad_enabled() else self._kept(layer, make, *args)

    def _remap(self, names: Sequence[str]) -> Tensor:
        positions = {name: position for position, name in enumerate(names)}
        # -1, the base model, counts from the end
        table = [*(positions.get(name, -1) for name in self.names), -1]
        return torch.tensor(table, device=self.index.device)[self.index]

    def _kept(self, key: Any, make: Callable[..., Any], *args: Any) -> Any:
        """What ``make`` gives, made once a call."""
        if torch.compiler.is_compiling():  # a graph has no use for it, and would be guarded by it
            return make(*args)
        if key not in self._cache:
            self._cache[key] = make(*args)
        return self._cache[key]


def _scalings(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    return torch.tensor(values, dtype=torch.float64, device=device)


def _groups(names: Sequence[str], index: Tensor) -> list[tuple[str | None, Tensor]]:
    flat = index.flatten()
    return [
        (None if position < 0 else names[position], (flat == position).nonzero().squeeze(1))
        for position in flat.unique().tolist()
    ]


class _Local(threading.local):
    def __init__(self) -> None:
        self.mix: Mix | None = None


_local = _Local()


def current_mix() -> Mix | None:
    """The mix of the call that this thread is in, if it is in one."""
    return _local.mix


def run_with(mix: Mix | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls ``function`` with ``mix`` as the current one."""
    before, _local.mix = _local.mix, mix
    try:
        return function(*args, **kwargs)
    finally:
        _local.mix = before


def by_adapter(
    mix: Mix,
    names: Sequence[str],
    x: Tensor,
    run: Callable[[str | None, Tensor], Tensor],
    rows_only: bool = False,
) -> Tensor:
    """Runs each adapter on its own rows, or tokens, of ``x`` and puts the results in their places. Differentiable.

    A graph of torch.compile cannot depend on who has which adapter: there each runs on everything.

    Args:
        mix: who has which.
        names: those of ``mix.names`` that the layer has.
        x: ``[batch, ...]``, or ``[batch, length, ...]`` where the mix is by token.
        run: maps an adapter's name (or None, for rows that have none of ``names``) and its part of ``x`` to as many
            rows of the result.
        rows_only: whether ``x`` has no tokens.

    Raises:
        ValueError: for a mix by token with ``rows_only``.
    """
    if rows_only:
        check_per_row(mix, "a module that is not applied token by token")
    index = mix.index_among(names, x)
    flat = x.flatten(0, index.dim() - 1) if index.dim() > 1 else x
    if torch.compiler.is_compiling():
        result = _everywhere(names, index.flatten(), flat, run)
    else:
        result = _grouped(mix.groups(names, x), flat, run)
    return result.unflatten(0, index.shape) if index.dim() > 1 else result


def _grouped(groups: list[tuple[str | None, Tensor]], x: Tensor, run: Callable[[str | None, Tensor], Tensor]) -> Tensor:
    if len(groups) <= 1:
        return run(groups[0][0] if groups else None, x)
    pieces = torch.cat([run(name, x.index_select(0, rows)) for name, rows in groups])
    return pieces.index_select(0, torch.cat([rows for _, rows in groups]).argsort())


def _everywhere(names: Sequence[str], index: Tensor, x: Tensor, run: Callable[[str | None, Tensor], Tensor]) -> Tensor:
    result = run(None, x)
    for position, name in enumerate(names):
        is_its = (index == position).view(-1, *[1] * (result.dim() - 1))
        result = torch.where(is_its, run(name, x), result)
    return result


def add_by_adapter(
    mix: Mix,
    names: Sequence[str],
    x: Tensor,
    result: Tensor,
    update: Callable[[str, Tensor], Tensor],
    rows_only: bool = False,
) -> Tensor:
    """``result`` and what each adapter adds to it for its part of ``x``: see :func:`by_adapter`."""
    shape = result.shape[mix.index.dim() :]

    def run(name: str | None, part: Tensor) -> Tensor:
        return result.new_zeros(part.size(0), *shape) if name is None else update(name, part)

    return (result + by_adapter(mix, names, x, run, rows_only)).to(result.dtype)


def check_per_row(mix: Mix, what: str) -> None:
    """Raises a ValueError if tokens of a row have different adapters."""
    if mix.per_token:
        raise ValueError(f"adapter_names must name one adapter for each row, not for each token, with {what}")


def flat_names(adapter_names: Any) -> list[str]:
    """The names in a list, or in a list of lists, in order.

    Raises:
        TypeError: for anything else.
        ValueError: for lists of different lengths.
    """
    if not isinstance(adapter_names, list | tuple):
        raise TypeError(
            "adapter_names must be a list of names, a list of such lists, or the tensor that adapter_indices() makes, "
            f"got {adapter_names!r}"
        )
    nested = [row for row in adapter_names if isinstance(row, list | tuple)]
    if nested and (len(nested) < len(adapter_names) or len({len(row) for row in nested}) > 1):
        raise ValueError("adapter_names must have a name for each token of each row: lists of one length")
    names = [name for row in nested for name in row] if nested else list(adapter_names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"adapter_names must hold names, got {name!r}")
    return names


def names_shape(adapter_names: Sequence[Any]) -> tuple[int, ...]:
    """``(batch,)``, or ``(batch, length)`` for names by token."""
    by_token = len(adapter_names) > 0 and isinstance(adapter_names[0], list | tuple)
    return (len(adapter_names), len(adapter_names[0])) if by_token else (len(adapter_names),)


def mix_of_names(adapter_names: Sequence[Any], known: Collection[str], device: torch.device | None) -> Mix:
    """The mix that names make; only adapters that occur are in it.

    Raises:
        ValueError: for an unknown name.
    """
    flat = flat_names(adapter_names)
    names = tuple(dict.fromkeys(name for name in flat if name != BASE))
    check_known(names, known)
    positions = {name: position for position, name in enumerate(names)} | {BASE: -1}
    index = torch.tensor([positions[name] for name in flat], dtype=torch.int64, device=device)
    return Mix(names, index.view(names_shape(adapter_names)))


def check_known(names: Collection[str], known: Collection[str]) -> None:
    """Raises a ValueError that lists the adapters if there is none of some name."""
    unknown = sorted(set(names) - set(known) - {BASE})
    if unknown:
        raise ValueError(f"adapter_names has {unknown}, but the model has {list(known)} and {BASE!r}")


def mix_of_indices(indices: Tensor, ids: Mapping[str, int]) -> Mix:
    """The mix of an index tensor. In a graph all adapters are in it, so that it serves any of them.

    Args:
        indices: int64 ``[batch]`` or ``[batch, length]``, of ``ids``, or -1 for the base model.
        ids: by adapter.

    Raises:
        TypeError: for another dtype.
        ValueError: for another number of dimensions, and (in eager mode) an index that is no adapter's.
    """
    if indices.dtype != torch.int64:
        raise TypeError(f"adapter_names must be an int64 tensor, as adapter_indices() makes it, got {indices.dtype}")
    if indices.dim() not in (1, 2):
        raise ValueError(f"adapter_names must be [batch] or [batch, length], got {list(indices.shape)}")
    named = {number: name for name, number in list(ids.items())}  # a copy: another thread may add one
    taken = sorted(named)
    if not torch.compiler.is_compiling():
        found = indices.unique().tolist()
        strangers = sorted(set(found) - {-1, *taken})
        if strangers:
            raise ValueError(f"adapter_names has the indices {strangers}, which no adapter has: the model has {ids}")
        taken = [number for number in found if number >= 0]
    if taken != list(range(len(taken))):
        table = [_NO_ADAPTER] * (max(taken) + 1) + [-1]
        for position, number in enumerate(taken):
            table[number] = position
        indices = torch.tensor(table, device=indices.device)[indices]
    return Mix(tuple(named[number] for number in taken), indices)


def main_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor among a model's inputs whose first dimension is the batch."""
    candidates = (*(kwargs.get(name) for name in _INPUTS), *args, *kwargs.values())
    return next((value for value in candidates if isinstance(value, Tensor) and value.dim() > 0), None)


def check_batch(mix: Mix, source: Tensor | None) -> None:
    """Raises a ValueError unless the mix has an adapter for each row, or token, of the batch."""
    shape = mix.index.shape
    if source is not None and source.shape[: len(shape)] != shape:
        unit = "token" if mix.per_token else "row"
        raise ValueError(
            f"adapter_names must have one name for each {unit} of the batch: got {list(shape)} for an input of "
            f"{list(source.shape)}"
        )


class MixedCheckpoint:
    """Gradient checkpointing whose second forward, in the backward pass, sees the mix of the first."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mix = current_mix()
        return self.checkpoint(function if mix is None else partial(run_with, mix, function), *args, **kwargs)


def remember_in_checkpoints(modules: Iterable[nn.Module]) -> None:
    """Wraps the function that a transformers model's layers call for gradient checkpointing."""
    for module in modules:
        function = vars(module).get(_CHECKPOINT)
        if function is not None and not isinstance(function, MixedCheckpoint):
            setattr(module, _CHECKPOINT, MixedCheckpoint(function))


def forget_in_checkpoints(modules: Iterable[nn.Module]) -> None:
    """Undoes :func:`remember_in_checkpoints`."""
    for module in modules:
        function = vars(module).get(_CHECKPOINT)
        if isinstance(function, MixedCheckpoint):
            setattr(module, _CHECKPOINT, function.checkpoint)
