"""Shapes and dtypes of the native ops, for FakeTensor, meta tensors and torch.compile.

The arguments are checked as the kernels check them, so that a mistake shows while tracing too: all but how many
outliers a residual marks, which is in its values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import register_fake

from peft_ext.reference.bottleneck_adapter import check_bottleneck
from peft_ext.reference.checks import (
    check_factors,
    check_fusion,
    check_lora,
    check_multi_lora,
    check_residual,
    check_saved,
    check_writable,
)
from peft_ext.reference.kron_checks import check_kron
from peft_ext.reference.lora_linear import compute_dtype
from peft_ext.reference.prefix_attention import check_prefix_attention
from peft_ext.reference.quantized_checks import check_quantized, check_quantized_grad, in_features_of


def _linear_output(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _lora_gradients(
    grad_y: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    check_saved("grad_y", grad_y, [*x.shape[:-1], weight.shape[0]], x.dtype, x.device)
    shapes = [(x, x.shape), (x, weight.shape[:1]), (lora_A, lora_A.shape), (lora_B, lora_B.shape)]
    return [like.new_empty(shape) for (like, shape), needed in zip(shapes, needs, strict=True) if needed]


@register_fake("peft_ext::lora_linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    check_lora(x, weight, bias, lora_A, lora_B, [True], scaling, dropout_p, seed, weight_scale)
    return _linear_output(x, weight)


@register_fake("peft_ext::lora_linear_backward")
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    weight_scale: Tensor | None = None,
) -> list[Tensor]:
    check_lora(x, weight, None, lora_A, lora_B, [True], scaling, dropout_p, seed, weight_scale)
    return _lora_gradients(grad_y, x, weight, lora_A, lora_B, needs)


@register_fake("peft_ext::merged_lora_linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    enable_lora: Sequence[bool],
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    check_lora(x, weight, bias, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, weight_scale)
    return _linear_output(x, weight)


@register_fake("peft_ext::merged_lora_linear_backward")
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    enable_lora: Sequence[bool],
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    weight_scale: Tensor | None = None,
) -> list[Tensor]:
    check_lora(x, weight, None, lora_A, lora_B, enable_lora, scaling, dropout_p, seed, weight_scale)
    return _lora_gradients(grad_y, x, weight, lora_A, lora_B, needs)


@register_fake("peft_ext::multi_lora_linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Tensor,
    index: Tensor,
    dropout_p: Sequence[float] = (),
    seed: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    check_multi_lora(x, weight, bias, lora_A, lora_B, scalings, index, dropout_p, seed, weight_scale)
    return _linear_output(x, weight)


@register_fake("peft_ext::multi_lora_linear_backward")
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Tensor,
    index: Tensor,
    dropout_p: Sequence[float],
    seed: Tensor | None,
    needs_x: bool,
    needs_bias: bool,
    needs_A: Sequence[bool],
    needs_B: Sequence[bool],
    weight_scale: Tensor | None = None,
) -> list[Tensor]:
    check_multi_lora(x, weight, None, lora_A, lora_B, scalings, index, dropout_p, seed, weight_scale)
    check_saved("grad_y", grad_y, [*x.shape[:-1], weight.shape[0]], x.dtype, x.device)
    for name, flags in (("needs_A", needs_A), ("needs_B", needs_B)):
        if len(flags) != len(lora_A):
            raise ValueError(f"{name} must have {len(lora_A)} elements, but has {len(flags)}")
    factors = zip([*lora_A, *lora_B], [*needs_A, *needs_B], strict=True)
    grads = [factor.new_empty(factor.shape) for factor, needed in factors if needed]
    if needs_bias:
        grads.insert(0, x.new_empty(weight.shape[:1]))
    return [x.new_empty(x.shape), *grads] if needs_x else grads


@register_fake("peft_ext::lora_merge_")
def _(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    check_factors(weight, lora_A, lora_B, scaling)
    check_writable(weight)
    outliers = weight.new_empty(torch.library.get_ctx().new_dynamic_size())
    rows, columns = weight.shape
    if weight.stride(0) == 1 and weight.stride(1) != 1:
        return weight.new_empty(columns, rows, dtype=torch.int8).t(), outliers
    return weight.new_empty(rows, columns, dtype=torch.int8), outliers


@register_fake("peft_ext::lora_unmerge_")
def _(weight: Tensor, lora_A: Tensor, lora_B: Tensor, residual: Tensor, outliers: Tensor, scaling: float = 1.0) -> None:
    check_factors(weight, lora_A, lora_B, scaling)
    check_writable(weight)
    check_residual(weight, residual, outliers)


@register_fake("peft_ext::bottleneck_adapter")
def _(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    activation: str = "relu",
    norm: str = "none",
    residual: bool = True,
    scaling: float = 1.0,
    eps: float = 1e-5,
    keep_hidden: bool = False,
) -> tuple[Tensor, Tensor]:
    check_bottleneck(
        x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation, norm, scaling, eps
    )
    shape = (*x.shape[:-1], down_weight.shape[0]) if keep_hidden else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=compute_dtype(x.dtype))


@register_fake("peft_ext::bottleneck_adapter_backward")
def _(
    grad_y: Tensor,
    x: Tensor,
    hidden: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    norm: str,
    residual: bool,
    scaling: float,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    check_bottleneck(
        x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation, norm, scaling, eps
    )
    width, features = down_weight.shape
    check_saved("grad_y", grad_y, x.shape, x.dtype, x.device)
    check_saved("hidden", hidden, [*x.shape[:-1], width], compute_dtype(x.dtype), x.device)
    shapes = [[width, features], [width], [features, width], [features], [features], [features]]
    grads = [down_weight.new_empty(shape) for shape, needed in zip(shapes, needs[1:], strict=True) if needed]
    return [x.new_empty(x.shape), *grads] if needs[0] else grads


@register_fake("peft_ext::adapter_fusion")
def _(
    query: Tensor,
    outputs: Sequence[Tensor],
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    check_fusion(query, outputs, key_weight, key_bias, scale)
    *lead, width = outputs[0].shape
    weights = outputs[0].new_empty(*lead, len(outputs), dtype=compute_dtype(outputs[0].dtype))
    folded = query.new_empty(0) if key_weight is None else query.new_empty(*query.shape[:-1], width)
    return outputs[0].new_empty(outputs[0].shape), weights, folded


@register_fake("peft_ext::adapter_fusion_backward")
def _(
    grad_mix: Tensor | None,
    grad_weights: Tensor | None,
    folded_query: Tensor,
    outputs: Sequence[Tensor],
    weights: Tensor,
    scale: float,
    needs_query: bool,
    needs_outputs: Sequence[bool],
) -> list[Tensor]:
    check_fusion(folded_query, outputs, None, None, scale)
    output, wide = outputs[0], compute_dtype(outputs[0].dtype)
    weights_shape = [*output.shape[:-1], len(outputs)]
    check_saved("weights", weights, weights_shape, wide, output.device)
    if grad_mix is not None:
        check_saved("grad_mix", grad_mix, output.shape, output.dtype, output.device)
    if grad_weights is not None:
        check_saved("grad_weights", grad_weights, weights_shape, wide, output.device)
    if len(needs_outputs) != len(outputs):
        raise ValueError(f"needs_outputs must have {len(outputs)} elements, but has {len(needs_outputs)}")
    needed = [folded_query] if needs_query else []
    needed += [output for output, needs in zip(outputs, needs_outputs, strict=True) if needs]
    return [tensor.new_empty(tensor.shape) for tensor in needed]


@register_fake("peft_ext::kron_linear")
def _(
    x: Tensor, A: Tensor, B: Tensor, t: Tensor | None = None, bias: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    check_kron(x, A, B, t, bias, scaling)
    return x.new_empty(*x.shape[:-1], A.shape[2] * (B if t is None else t).shape[2])


@register_fake("peft_ext::kron_linear_backward")
def _(
    grad_y: Tensor, x: Tensor, A: Tensor, B: Tensor, t: Tensor | None, scaling: float, needs: Sequence[bool]
) -> list[Tensor]:
    check_kron(x, A, B, t, None, scaling)
    right = B if t is None else t
    check_saved("grad_y", grad_y, [*x.shape[:-1], A.shape[2] * right.shape[2]], x.dtype, x.device)
    if t is None and needs[3]:
        raise ValueError("needs asks for the gradient of t, which is not given")
    likes = [(x, x.shape), (A, A.shape), (B, B.shape), (right, right.shape), (A, grad_y.shape[-1:])]
    return [like.new_empty(shape) for (like, shape), needed in zip(likes, needs, strict=True) if needed]


@register_fake("peft_ext::prefix_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_prefix_attention(q, k, v, prefix_key, prefix_value, attn_mask, scale, dropout_p, seed)
    batch, heads, queries, dim = q.shape
    out = q.new_empty(batch, queries, heads, dim).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, dtype=compute_dtype(q.dtype))


@register_fake("peft_ext::prefix_attention_backward")
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    check_prefix_attention(q, k, v, prefix_key, prefix_value, attn_mask, scale, dropout_p, seed)
    check_saved("grad_out", grad_out, q.shape, q.dtype, q.device)
    check_saved("out", out, q.shape, q.dtype, q.device)
    check_saved("lse", lse, q.shape[:3], compute_dtype(q.dtype), q.device)
    gradients = [_like_with_contiguous_rows(t) for t in (q, k, v)] + [
        prefix.new_empty(prefix.shape) for prefix in (prefix_key, prefix_value)
    ]
    return [gradient for gradient, needed in zip(gradients, needs, strict=True) if needed]


def _like_with_contiguous_rows(tensor: Tensor) -> Tensor:
    """What the kernel makes: empty_like of its argument, itself copied where its rows are not contiguous."""
    like = torch.empty_like(tensor) if _has_contiguous_rows(tensor) else tensor.new_empty(tensor.shape)
    return like if _has_contiguous_rows(like) else tensor.new_empty(tensor.shape)


def _has_contiguous_rows(tensor: Tensor) -> bool:
    return tensor.size(-1) <= 1 or tensor.stride(-1) == 1


@register_fake("peft_ext::quantized_linear")
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    check_quantized(x, weight, weight_scale, bias)
    return _linear_output(x, weight)


@register_fake("peft_ext::quantized_linear_backward")
def _(grad_y: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    check_quantized_grad(grad_y, weight, weight_scale)
    return grad_y.new_empty(*grad_y.shape[:-1], in_features_of(weight))
