"""What the ops accept; csrc/common/*_checks.cpp is the same for the native ops.

Messages are formed only where they are raised: sizes may be symbolic under torch.compile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_ext.reference.dtypes import FLOATS
from peft_ext.reference.quantized_checks import check_quantized, in_features_of


def check_frozen(weight: Tensor, weight_scale: Tensor | None = None) -> None:
    """The base weight gets no gradient and must not ask for one, nor must its scale."""
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError("weight requires grad, but is frozen here: call weight.requires_grad_(False) first")
    if weight_scale is not None:
        check_constant("weight_scale", weight_scale)


def check_constant(name: str, tensor: Tensor) -> None:
    """An argument without a derivative must not ask for one."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{name} requires grad, but gets no gradient: pass {name}.detach()")


def check_writable(weight: Tensor) -> None:
    """An in-place op needs memory of its own for every element: not an expanded weight."""
    if any(stride == 0 and size > 1 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
        raise ValueError(f"weight shares memory among its elements (strides {weight.stride()}): clone it first")


def _check_matrix(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, but is {tensor.dtype}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, but has shape {list(tensor.shape)}")
    if tensor.device != weight.device:
        raise ValueError(f"{name} is on {tensor.device}, but weight on {weight.device}")


def _check_shape(name: str, tensor: Tensor, wanted: list[int], weight: Tensor) -> None:
    if list(tensor.shape) != wanted:
        raise ValueError(f"{name} must be {wanted} for weight {list(weight.shape)}, but has shape {list(tensor.shape)}")


class _Base(NamedTuple):
    """The frozen weight, and what a quantized one does not say itself."""

    weight: Tensor
    in_features: int
    dtype: torch.dtype
    typed: str  # which argument is of that dtype


def _plain(weight: Tensor) -> _Base:
    _check_matrix("weight", weight, weight)
    return _Base(weight, weight.size(1), weight.dtype, "weight")


def _check_pair(base: _Base, lora_A: Tensor, lora_B: Tensor, groups: int = 1, slices: int = 1, place: str = "") -> None:
    """The two factors of ``groups`` of the ``slices`` of a weight; ``place`` is where they are in their lists."""
    weight = base.weight
    _check_matrix(f"lora_A{place}", lora_A, weight)
    _check_matrix(f"lora_B{place}", lora_B, weight)
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"lora_A{place} is {lora_A.dtype} and lora_B{place} {lora_B.dtype}: both must have one dtype")
    if lora_A.dtype == torch.float64 and base.dtype != torch.float64:
        raise TypeError(
            f"lora_A{place} is float64, which only a float64 {base.typed} takes, but {base.typed} is {base.dtype}"
        )
    rank = lora_B.size(1)
    if rank == 0:
        raise ValueError(
            f"lora_B{place} must be [out_features, rank] with rank > 0, but has shape {list(lora_B.shape)}"
        )
    _check_shape(f"lora_A{place}", lora_A, [groups * rank, base.in_features], weight)
    _check_shape(f"lora_B{place}", lora_B, [groups * (weight.size(0) // slices), rank], weight)


def check_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    """The weight and the two factors that are merged."""
    _check_pair(_plain(weight), lora_A, lora_B)
    _check_scaling(scaling)


def _check_scaling(scaling: float) -> None:
    if not -math.inf < scaling < math.inf:
        raise ValueError(f"scaling must be finite, but is {scaling}")


def check_saved(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """What a backward gets, a gradient or a saved result, against what it must be."""
    if list(tensor.shape) != list(shape):
        raise ValueError(f"{name} must be {list(shape)}, but has shape {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, but is {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, but is on {tensor.device}")


def check_dropout(dropout_p: float, seed: Tensor | None, x: Tensor) -> None:
    """A probability, and a seed on the device of ``x`` where it is not 0."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], but is {dropout_p}")
    if dropout_p == 0.0:
        return
    if seed is None:
        raise ValueError(f"seed must be given with dropout_p = {dropout_p}")
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be int64, but is {seed.dtype}")
    if seed.numel() != 1 or seed.device != x.device:
        raise ValueError(f"seed must have 1 element on {x.device}, but has shape {list(seed.shape)} on {seed.device}")


def _check_base(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype}, but weight is {weight.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, but weight on {weight.device}")
    if x.dim() == 0 or x.size(-1) != weight.size(1):
        raise ValueError(
            f"x must be [..., {weight.size(1)}] for weight {list(weight.shape)}, but has shape {list(x.shape)}"
        )
    if bias is not None:
        _check_shape("bias", bias, [weight.size(0)], weight)
        if bias.dtype != weight.dtype:
            raise TypeError(f"bias is {bias.dtype}, but weight is {weight.dtype}")
        if bias.device != weight.device:
            raise ValueError(f"bias is on {bias.device}, but weight on {weight.device}")


def _checked_base(x: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None) -> _Base:
    """The frozen layer, plain or quantized: x then has the dtype that a plain weight has."""
    if weight_scale is not None:
        check_quantized(x, weight, weight_scale, bias)
        return _Base(weight, in_features_of(weight), x.dtype, "x")
    base = _plain(weight)
    _check_base(x, weight, bias)
    return base


def check_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    enable_lora: Sequence[bool],
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    weight_scale: Tensor | None = None,
) -> None:
    """All arguments of a layer whose output has ``len(enable_lora)`` equal slices."""
    groups, slices = sum(enable_lora), len(enable_lora)
    if groups == 0:
        raise ValueError(f"enable_lora must enable a slice, but is {list(enable_lora)}")
    if weight.dim() == 2 and weight.size(0) % slices != 0:
        raise ValueError(f"enable_lora has {slices} slices, which do not divide weight's {weight.size(0)} outputs")
    _check_pair(_checked_base(x, weight, bias, weight_scale), lora_A, lora_B, groups, slices)
    _check_scaling(scaling)
    check_dropout(dropout_p, seed, x)


def check_multi_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Tensor,
    index: Tensor,
    dropout_p: Sequence[float],
    seed: Tensor | None,
    weight_scale: Tensor | None = None,
) -> None:
    """All arguments of ``multi_lora_linear`` but the values of ``scalings`` and ``index``."""
    base = _checked_base(x, weight, bias, weight_scale)
    count = len(lora_A)
    if len(lora_B) != count:
        raise ValueError(f"lora_B must have {count} tensors, as lora_A has, but has {len(lora_B)}")
    for i, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        _check_pair(base, a, b, place=f"[{i}]")
        if a.dtype != lora_A[0].dtype:
            raise TypeError(f"lora_A must have one dtype, but lora_A[0] is {lora_A[0].dtype} and lora_A[{i}] {a.dtype}")
    if scalings.dtype not in FLOATS:
        raise TypeError(f"scalings must be float32, float64, bfloat16 or float16, but is {scalings.dtype}")
    if list(scalings.shape) != [count]:
        raise ValueError(f"scalings must be [{count}] for {count} adapters, but has shape {list(scalings.shape)}")
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, but is {index.dtype}")
    leading = x.shape[:-1]
    if index.dim() > len(leading) or list(index.shape) != list(leading[: index.dim()]):
        raise ValueError(
            f"index must have leading sizes of x, whose shape is {list(x.shape)}, but has shape {list(index.shape)}"
        )
    for name, tensor in (("scalings", scalings), ("index", index)):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, but is on {tensor.device}")
    if len(dropout_p) not in (0, count):
        raise ValueError(f"dropout_p must be empty or have {count} values, but has {len(dropout_p)}")
    for p in dropout_p:
        check_dropout(p, seed, x)


def check_multi_lora_values(scalings: Tensor, index: Tensor) -> None:
    """What only the values of ``multi_lora_linear``'s arguments show; raises for the first that does not fit."""
    count = len(scalings)
    wrong = (index.flatten() < -1) | (index.flatten() >= count)
    if wrong.any():
        raise ValueError(
            f"index must be in [-1, {count}) for {count} adapters, but holds {int(index.flatten()[wrong][0])}"
        )
    if not scalings.isfinite().all():
        raise ValueError(f"scalings must be finite, but is {scalings.tolist()}")


def check_residual(weight: Tensor, residual: Tensor, outliers: Tensor) -> None:
    """What ``lora_merge_`` returned for this weight."""
    if residual.dtype != torch.int8:
        raise TypeError(f"residual must be int8, but is {residual.dtype}")
    if residual.shape != weight.shape:
        raise ValueError(
            f"residual must have weight's shape {list(weight.shape)}, but has shape {list(residual.shape)}"
        )
    if outliers.dtype != weight.dtype:
        raise TypeError(f"outliers is {outliers.dtype}, but weight is {weight.dtype}")
    if outliers.dim() != 1:
        raise ValueError(f"outliers must have 1 dimension, but has shape {list(outliers.shape)}")
    if residual.device != weight.device or outliers.device != weight.device:
        raise ValueError(
            f"residual is on {residual.device} and outliers on {outliers.device}, but weight on {weight.device}"
        )


def _check_fused(outputs: Sequence[Tensor]) -> None:
    if len(outputs) == 0:
        raise ValueError("outputs must hold the output of at least one adapter, but is empty")
    first = outputs[0]
    if first.dtype not in FLOATS:
        raise TypeError(f"outputs must be float32, float64, bfloat16 or float16, but is {first.dtype}")
    if first.dim() == 0:
        raise ValueError(f"outputs must be [..., width], but outputs[0] has shape {list(first.shape)}")
    for i, output in enumerate(outputs):
        if output.shape != first.shape:
            raise ValueError(
                f"outputs must have one shape, but outputs[0] has {list(first.shape)} "
                f"and outputs[{i}] {list(output.shape)}"
            )
        if output.dtype != first.dtype:
            raise TypeError(
                f"outputs must have one dtype, but outputs[0] is {first.dtype} and outputs[{i}] {output.dtype}"
            )
        if output.device != first.device:
            raise ValueError(
                f"outputs must be on one device, but outputs[0] is on {first.device} "
                f"and outputs[{i}] on {output.device}"
            )


def check_fusion(
    query: Tensor, outputs: Sequence[Tensor], key_weight: Tensor | None, key_bias: Tensor | None, scale: float
) -> None:
    """All arguments of ``adapter_fusion``."""
    _check_fused(outputs)
    output = outputs[0]
    wide = torch.float64 if output.dtype == torch.float64 else torch.float32
    if query.dtype not in (output.dtype, wide):
        raise TypeError(f"query is {query.dtype}, but outputs is {output.dtype}")
    if query.device != output.device:
        raise ValueError(f"query is on {query.device}, but outputs on {output.device}")
    if query.dim() != 1 and (query.dim() != output.dim() or query.shape[:-1] != output.shape[:-1]):
        raise ValueError(
            f"query must be [width], or have the leading sizes of outputs {list(output.shape)}, "
            f"but has shape {list(query.shape)}"
        )
    if key_weight is None:
        if query.size(-1) != output.size(-1):
            raise ValueError(
                f"query must be [..., {output.size(-1)}] for outputs {list(output.shape)} without key_weight, "
                f"but has shape {list(query.shape)}"
            )
    elif list(key_weight.shape) != [query.size(-1), output.size(-1)]:
        raise ValueError(
            f"key_weight must be [{query.size(-1)}, {output.size(-1)}] for query {list(query.shape)} "
            f"and outputs {list(output.shape)}, but has shape {list(key_weight.shape)}"
        )
    elif key_weight.dtype != query.dtype:
        raise TypeError(f"key_weight is {key_weight.dtype}, but query is {query.dtype}")
    elif key_weight.device != query.device:
        raise ValueError(f"key_weight is on {key_weight.device}, but query on {query.device}")
    if key_bias is not None:
        if list(key_bias.shape) != [query.size(-1)]:
            raise ValueError(
                f"key_bias must be [{query.size(-1)}] for query {list(query.shape)}, "
                f"but has shape {list(key_bias.shape)}"
            )
        if key_bias.dtype != query.dtype:
            raise TypeError(f"key_bias is {key_bias.dtype}, but query is {query.dtype}")
        if key_bias.device != query.device:
            raise ValueError(f"key_bias is on {key_bias.device}, but query on {query.device}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, but is {scale}")
