"""What merging adapters changes: of every weight, and of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_ext.tuners.layer import AdapterSlot, TunerLayer, full_precision

_SHOWN_WEIGHTS = 10
_COLUMNS = ("weight", "dtype", "change", "relative", "rounding", "lost")


@dataclass(frozen=True)
class WeightChange:
    """What merging makes of one parameter W, to be compared with the exact sum S: in float64, not rounded.

    Args:
        name: its full name in the plain model.
        dtype: its dtype, such as "bfloat16".
        change: the largest change of an element, max |W' - W|.
        relative_change: the same, by the largest element of W and W' (W can be all zeros).
        rounding_error: the largest rounding error of an element, max |W' - S|.
        lost: how much of the update rounding has lost, ‖W' - S‖ / ‖S - W‖. Near 1, all of it: the update is smaller
            than the steps that the dtype has.
    """

    name: str
    dtype: str
    change: float
    relative_change: float
    rounding_error: float
    lost: float


@dataclass(frozen=True, repr=False)
class MergeReport:
    """What merging changes of a model; printed as a table.

    Args:
        adapters: what was merged.
        weights: what became of each parameter that merging changes; for modules that an adapter has trained in full
            (``modules_to_save``), how its copy differs from the original.
        output_error: how far the merged model's outputs are from the unmerged one's, at most; None without inputs.
        relative_output_error: the same, by the largest output.
    """

    adapters: list[str]
    weights: list[WeightChange]
    output_error: float | None = None
    relative_output_error: float | None = None

    @property
    def change(self) -> float:
        """The largest change of an element of any weight."""
        return _largest(weight.change for weight in self.weights)

    @property
    def relative_change(self) -> float:
        """The largest relative change of a weight."""
        return _largest(weight.relative_change for weight in self.weights)

    @property
    def rounding_error(self) -> float:
        """The largest rounding error of an element of any weight."""
        return _largest(weight.rounding_error for weight in self.weights)

    @property
    def lost(self) -> float:
        """The largest share of an update that rounding has lost."""
        return _largest(weight.lost for weight in self.weights)

    def rows(self, limit: int = _SHOWN_WEIGHTS) -> list[tuple[str, ...]]:
        """The table's rows under its heading: the ``limit`` weights that change most, then the whole."""
        most = sorted(self.weights, key=lambda weight: weight.change, reverse=True)[:limit]
        left_out = len(self.weights) - len(most)
        whole = f"all {len(self.weights)}" + (f" ({left_out} not shown)" if left_out else "")
        return [
            _COLUMNS,
            *((weight.name, weight.dtype, *_figures(weight)) for weight in most),
            (whole, "", *_figures(self)),
        ]

    def output_line(self) -> str:
        """The errors of the outputs, in words."""
        if self.output_error is None:
            return "outputs: not compared, as no inputs were given"
        return (
            f"outputs: within {self.output_error:.2g} of the unmerged model's "
            f"({self.relative_output_error:.2g} of the largest)"
        )

    def __repr__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"merging {', '.join(self.adapters)}", *lines, self.output_line()])


def call_with(model: Callable[..., Any], inputs: Any) -> Any:
    """Calls a model with what a mapping (keyword arguments), a list or tuple (positional ones) or a tensor holds."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, list | tuple):
        return model(*inputs)
    if isinstance(inputs, Tensor):
        return model(inputs)
    raise TypeError(f"inputs must be a mapping, a list or tuple, or a tensor, got {type(inputs).__name__}")


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, whatever they are nested in, in float64."""
    if isinstance(output, Tensor):
        return [output.detach().double()] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in output_tensors(value)]
    return []


def output_errors(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[float, float]:
    """The largest difference of two outputs, and what it is by the largest value of ``wanted``."""
    error = _largest((one - other).abs().max().item() for one, other in zip(found, wanted, strict=True) if one.numel())
    scale = _largest(tensor.abs().max().item() for tensor in wanted if tensor.numel())
    return error, _ratio(error, scale)


@torch.no_grad()
def measure_merge(
    model: nn.Module, slots: Mapping[str, AdapterSlot], adapter_names: list[str], inputs: Any
) -> MergeReport:
    """Merges, measures, and takes the adapters out again. The model is in eval mode meanwhile.

    Args:
        model: what is called with ``inputs``.
        slots: all of it, by full name; nothing is merged in them.
        adapter_names: which adapters; they can be merged.
        inputs: see :func:`call_with`; None: outputs are not compared.
    """
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(_active(slots.values(), adapter_names))
        wanted = [] if inputs is None else output_tensors(call_with(model, inputs))
        if inputs is not None and not wanted:
            raise ValueError("inputs: the model's output for them has no floating-point tensor to compare")
        weights = []
        for name, slot in slots.items():
            if isinstance(slot, TunerLayer):
                stack.callback(slot.unmerge)
            weights += _merge_slot(name, slot, adapter_names)
        errors = (None, None) if inputs is None else output_errors(output_tensors(call_with(model, inputs)), wanted)
    return MergeReport(adapter_names, weights, *errors)


def _merge_slot(module: str, slot: AdapterSlot, adapter_names: list[str]) -> list[WeightChange]:
    """Merges adapters into one module, and compares its parameters with what they were and with float64."""
    found = slot.merged_parameters(slot.to_merge(adapter_names), torch.float64)
    parameters = [(key, parameter.detach().clone(), exact) for key, parameter, exact in found]
    if isinstance(slot, TunerLayer):
        slot.merge(safe_merge=False, adapter_names=adapter_names)
        merged = {key: slot.base_layer.get_parameter(key) for key, _, _ in parameters}
    else:  # a module that was trained in full: its copy takes the original's place
        merged = {key: exact.to(before.dtype) for key, before, exact in parameters}
    return [_compare(f"{module}.{key}", before, exact, merged[key]) for key, before, exact in parameters]


def _compare(name: str, before: Tensor, exact: Tensor, merged: Tensor) -> WeightChange:
    dtype = str(before.dtype).removeprefix("torch.")
    if not before.numel():
        return WeightChange(name, dtype, 0.0, 0.0, 0.0, 0.0)
    with full_precision(before.device.type):
        before, merged = before.double(), merged.detach().double()
        change, error = (merged - before).abs().max().item(), merged - exact
        update = (exact - before).norm().item()
        return WeightChange(
            name=name,
            dtype=dtype,
            change=change,
            relative_change=_ratio(change, max(before.abs().max().item(), merged.abs().max().item())),
            rounding_error=error.abs().max().item(),
            lost=_ratio(error.norm().item(), update),
        )


def _largest(values: Iterable[float]) -> float:
    """The largest of the values, 0 of none; not a number if one of them is none, which ``max`` may not see."""
    return torch.tensor([0.0, *values], dtype=torch.float64).max().item()


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else float("inf")


def _figures(change: WeightChange | MergeReport) -> tuple[str, ...]:
    return (
        f"{change.change:.2g}",
        f"{change.relative_change:.2%}",
        f"{change.rounding_error:.1g}",
        f"{change.lost:.2%}",
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _active(slots: Iterable[AdapterSlot], adapter_names: list[str]) -> Iterator[None]:
    """Within this context these adapters are at work, whichever were."""
    before = [(slot, slot.active_adapters, slot.disable_adapters) for slot in slots]
    try:
        for slot, _, _ in before:
            slot.activate(adapter_names)
            slot.disable_adapters = False
        yield
    finally:
        for slot, active, disabled in before:
            slot.activate(active)
            slot.disable_adapters = disabled
