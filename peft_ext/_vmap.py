"""``torch.vmap`` over the ops: one sample after the other, as each is computed alone.

Per-sample gradients (``vmap(grad(...))``) are exact, and take as long as a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NAMES = (
    "lora_linear",
    "merged_lora_linear",
    "multi_lora_linear",
    "quantized_linear",
    "kron_linear",
    "bottleneck_adapter",
    "adapter_fusion",
    "prefix_attention",
)


def _sample(value: Any, dim: Any, number: int) -> Any:
    """Of an argument that is batched along ``dim``, or of a list of some that are."""
    if isinstance(dim, list | tuple):
        return [_sample(item, item_dim, number) for item, item_dim in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, number)


def _one_by_one(op: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError(f"{op} cannot be mapped over a dimension of size 0")
        samples = range(info.batch_size)
        results = [op(*(_sample(*pair, number) for pair in zip(args, in_dims, strict=True))) for number in samples]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        kind = type(results[0])
        return kind(stacked), kind([0] * len(stacked))

    return rule


for _name in _NAMES:
    for _op_name in (_name, f"{_name}_backward"):
        _op = getattr(torch.ops.peft_ext, _op_name).default
        torch.library.register_vmap(f"peft_ext::{_op_name}", _one_by_one(_op))
