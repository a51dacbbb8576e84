"""The ops on DTensors: which shards of the arguments give which shards of the results.

Each dimension of the mesh is decided for itself. With y = x Wᵀ + b + s x Aᵀ Bᵀ, by what is sharded along it:

==========  ============  ===========  ===========  ==============  =================================
layout      x             W            A            B, b            y
==========  ============  ===========  ===========  ==============  =================================
by column   everywhere    Shard(0)     everywhere   Shard(0)        Shard(-1)
by row      Shard(-1)     Shard(1)     Shard(1)     everywhere      Partial; one process adds b
by sample   Shard(d)      everywhere   everywhere   everywhere      Shard(d)
everywhere  everywhere    everywhere   everywhere   everywhere      everywhere
==========  ============  ===========  ===========  ==============  =================================

An argument that lies otherwise is redistributed first. A gradient lies as its tensor does, so where that is everywhere
it is summed over the processes at once; but that of ``x`` is left Partial. ``lora_linear`` has all four
layouts, ``quantized_linear`` all but the second, the other ops the last two; ``prefix_attention`` is also sharded by
head, prefixes too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from peft_ext._loader import why_not_native

Arguments = Mapping[str, Any]


class Layout(NamedTuple):
    """Along one dimension of the mesh; what is not named is everywhere.

    Args:
        placements: of arguments and results. A gradient is named ``"grad "`` and its tensor.
        once: the argument that only the first process hands over, because the results are summed.
    """

    placements: Mapping[str, Placement]
    once: str | None = None

    def of(self, name: str) -> Placement:
        return self.placements.get(name, Replicate())


class Rule(NamedTuple):
    """How one op can be laid out.

    Args:
        results: the names of what it returns for some arguments.
        samples: what has a part for each sample (and so has its gradient), the argument that decides first.
        columns: the dimension of the output's features, by name; with ``sums``, the gradients that are Partial then.
        rows: that of the input's features.
        heads: what is sharded by head, in dimension 1, beside the samples.
    """

    results: Callable[[Arguments], list[str]]
    samples: tuple[str, ...]
    columns: Mapping[str, int] = {}
    column_sums: tuple[str, ...] = ()
    rows: Mapping[str, int] = {}
    row_sums: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


def _needed(names: str, needs: Sequence[bool]) -> list[str]:
    return [f"grad {name}" for name, needed in zip(names.split(), needs, strict=True) if needed]


def _multi_lora_gradients(given: Arguments) -> list[str]:
    single = _needed("x bias", [given["needs_x"], given["needs_bias"]])
    return single + ["grad lora_A"] * sum(given["needs_A"]) + ["grad lora_B"] * sum(given["needs_B"])


_LORA = "x bias lora_A lora_B"
_BOTTLENECK = "x down_weight down_bias up_weight up_bias norm_weight norm_bias"
_PREFIXES = ("prefix_key", "prefix_value", "grad prefix_key", "grad prefix_value")
_LINEAR_COLUMNS = {"weight": 0, "weight_scale": 0, "bias": 0, "y": -1, "grad_y": -1}
_LORA_COLUMNS = _LINEAR_COLUMNS | {"lora_B": 0, "grad bias": 0, "grad lora_B": 0}
_LORA_ROWS = {"x": -1, "weight": 1, "lora_A": 1, "grad x": -1, "grad lora_A": 1}

RULES = {
    "lora_linear": Rule(lambda _: ["y"], ("x",), _LORA_COLUMNS, (), _LORA_ROWS, ("y",)),
    "lora_linear_backward": Rule(
        lambda given: _needed(_LORA, given["needs"]),
        ("x", "grad_y"),
        _LORA_COLUMNS,
        ("grad x", "grad lora_A"),
        _LORA_ROWS,
        ("grad lora_B",),
    ),
    "merged_lora_linear": Rule(lambda _: ["y"], ("x",)),
    "merged_lora_linear_backward": Rule(lambda given: _needed(_LORA, given["needs"]), ("x", "grad_y")),
    "multi_lora_linear": Rule(lambda _: ["y"], ("x", "index")),
    "multi_lora_linear_backward": Rule(_multi_lora_gradients, ("x", "index", "grad_y")),
    "quantized_linear": Rule(lambda _: ["y"], ("x",), _LINEAR_COLUMNS),
    "quantized_linear_backward": Rule(lambda _: ["grad x"], ("grad_y", "x"), _LINEAR_COLUMNS, ("grad x",)),
    "kron_linear": Rule(lambda _: ["y"], ("x",)),
    "kron_linear_backward": Rule(lambda given: _needed("x A B t bias", given["needs"]), ("x", "grad_y")),
    "bottleneck_adapter": Rule(lambda _: ["y", "hidden"], ("x",)),
    "bottleneck_adapter_backward": Rule(lambda given: _needed(_BOTTLENECK, given["needs"]), ("x", "hidden", "grad_y")),
    "adapter_fusion": Rule(lambda _: ["mix", "weights", "folded_query"], ("outputs", "query")),
    "adapter_fusion_backward": Rule(
        lambda given: ["grad folded_query"] * given["needs_query"] + ["grad outputs"] * sum(given["needs_outputs"]),
        ("outputs", "folded_query", "weights", "grad_mix", "grad_weights"),
    ),
    "prefix_attention": Rule(lambda _: ["out", "lse"], ("q", "k", "v", "attn_mask"), heads=_PREFIXES),
    "prefix_attention_backward": Rule(
        lambda given: _needed("q k v prefix_key prefix_value", given["needs"]),
        ("q", "k", "v", "attn_mask", "grad_out", "out", "lse"),
        heads=_PREFIXES,
    ),
}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        yield from (item for item in value if isinstance(item, Tensor))


def _shard_of(value: Any, mesh_dim: int) -> int | None:
    """The dimension along which an argument, or the first of a list, is sharded."""
    for tensor in _tensors(value):
        placement = tensor.placements[mesh_dim] if isinstance(tensor, DTensor) else None
        return placement.dim if isinstance(placement, Shard) else None
    return None


def _has_samples(name: str, tensor: Tensor, like: Tensor, dim: int) -> bool:
    """Whether a tensor of that name has the samples in its dimension ``dim``, as ``like`` has."""
    if name in ("query", "folded_query", "grad folded_query", "attn_mask"):
        return tensor.dim() == like.dim() and tensor.size(dim) == like.size(dim)  # else one for all
    return tensor.dim() > dim


def layout_of(
    rule: Rule, given: Arguments, results: Sequence[tuple[str, Tensor]], mesh: DeviceMesh, dim: int
) -> Layout:
    """The layout along one dimension of the mesh. ``results`` have the global shapes."""
    weight = _shard_of(given.get("weight"), dim) if rule.columns else None
    if weight is not None and (weight == 0 or not rule.rows or given["weight_scale"] is not None):
        if weight != 0:
            raise ValueError("a quantized weight that is a DTensor must be sharded in dimension 0, by column")
        return Layout(_within(rule.columns, given) | dict.fromkeys(rule.column_sums, Partial()))
    if weight is not None:
        return Layout(_within(rule.rows, given) | dict.fromkeys(rule.row_sums, Partial()), once="bias")
    return _by_sample(rule, given, results, mesh.size(dim), dim)


def _within(dims: Mapping[str, int], given: Arguments) -> dict[str, Placement]:
    last = next(given[name] for name in ("x", "grad_y") if name in given).dim() - 1
    return {name: Shard(last if dim < 0 else dim) for name, dim in dims.items()}


def _by_sample(
    rule: Rule, given: Arguments, results: Sequence[tuple[str, Tensor]], processes: int, mesh_dim: int
) -> Layout:
    first = rule.samples[0]
    like, at = next(_tensors(given[first])), _shard_of(given[first], mesh_dim)
    by_head = bool(rule.heads) and at == 1
    last = 2 if rule.heads else like.dim() - 1
    if at is None or at >= last or (by_head and given["k"].size(1) % processes):
        return Layout({})
    arguments = [(name, tensor) for name in rule.samples for tensor in _tensors(given.get(name))]
    placements: dict[str, Placement] = dict.fromkeys(rule.heads, Shard(1)) if by_head else {}
    for name, tensor in (*arguments, *results):
        is_parameter = name.startswith("grad ") and name.removeprefix("grad ") not in rule.samples
        if not is_parameter and _has_samples(name, tensor, like, at):
            placements[name] = Shard(at)
        elif name.startswith("grad ") and name not in placements:
            placements[name] = Partial()
    return Layout(placements)


# Made anew for every call, the same by every process.
_PLAIN = ("scalings", "index", "seed")


class _Call:
    """One call of an op with DTensors among its arguments."""

    def __init__(self, name: str, given: Arguments) -> None:
        self.name, self.rule, self.given = name, RULES[name], given
        self.mesh = next(t for value in given.values() for t in _tensors(value) if isinstance(t, DTensor)).device_mesh
        for argument, value in given.items():
            self._check(argument, value)
        probabilities = given.get("dropout_p", 0.0)
        if any(p > 0.0 for p in (probabilities if isinstance(probabilities, list) else [probabilities])):
            raise NotImplementedError(
                f"{name} drops nothing of DTensors, since processes would draw different masks: got "
                f"dropout_p={probabilities}, want 0"
            )

    def _check(self, argument: str, value: Any) -> None:
        for tensor in _tensors(value):
            if not isinstance(tensor, DTensor) and argument not in _PLAIN:
                raise TypeError(f"{argument} of {self.name} must be a DTensor, as other arguments are, but is a Tensor")
            if isinstance(tensor, DTensor) and tensor.device_mesh != self.mesh:
                raise ValueError(
                    f"{argument} of {self.name} is on {tensor.device_mesh}, other arguments on {self.mesh}"
                )

    def run(self, op: Callable[..., Any]) -> Any:
        """The results as DTensors."""
        whole = op(*(self._each(self._on_meta, value) for value in self.given.values()))
        parts = [whole] if isinstance(whole, Tensor) else list(whole)
        results = list(zip(self.rule.results(self.given), parts, strict=True))
        layouts = [layout_of(self.rule, self.given, results, self.mesh, dim) for dim in range(self.mesh.ndim)]
        local = op(*(self._local(layouts, argument, value) for argument, value in self.given.items()))
        locals_ = [local] if isinstance(local, Tensor) else local
        wrapped = [
            self._wrap(part, like, name, [layout.of(name) for layout in layouts])
            for (name, like), part in zip(results, locals_, strict=True)
        ]
        return wrapped[0] if isinstance(whole, Tensor) else type(whole)(wrapped)

    def _wrap(self, part: Tensor, like: Tensor, name: str, placements: list[Placement]) -> DTensor:
        shape, stride = like.shape, like.stride()
        result = DTensor.from_local(part, self.mesh, placements, run_check=False, shape=shape, stride=stride)
        if name == "grad x" or not name.startswith("grad "):
            return result
        summed = [Replicate() if isinstance(placement, Partial) else placement for placement in placements]
        own = next(_tensors(self.given.get(name.removeprefix("grad "))), None)
        return result.redistribute(placements=own.placements if isinstance(own, DTensor) else summed)

    def _local(self, layouts: Sequence[Layout], argument: str, value: Any) -> Any:
        here = [self.mesh.get_local_rank(dim) for dim in range(self.mesh.ndim)]
        if any(layout.once == argument and rank > 0 for layout, rank in zip(layouts, here, strict=True)):
            return None
        placements = [layout.of(argument) for layout in layouts]

        def local(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, DTensor):
                tensor = DTensor.from_local(tensor, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
            return tensor.redistribute(placements=placements).to_local()

        return self._each(local, value)

    @staticmethod
    def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [function(item) if isinstance(item, Tensor) else item for item in value]
        return function(value) if isinstance(value, Tensor) else value

    @staticmethod
    def _on_meta(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _register(name: str) -> None:
    op = getattr(torch.ops.peft_ext, name).default
    arguments = op._schema.arguments

    def dispatch(_: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Arguments | None = None) -> Any:
        rest = [(kwargs or {}).get(argument.name, argument.default_value) for argument in arguments[len(args) :]]
        given = dict(zip((argument.name for argument in arguments), (*args, *rest), strict=True))
        with torch.no_grad():
            return _Call(name, given).run(op)

    torch.library.register_torch_dispatch(f"peft_ext::{name}", DTensor, dispatch)


if why_not_native is None:  # the references are made of torch's own ops
    for _name in RULES:
        _register(_name)
