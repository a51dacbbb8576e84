"""A frozen linear layer whose weight is kept in fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_ext.nn._lora_checks import is_conv1d
from peft_ext.ops import quantized_linear
from peft_ext.reference.quantized_checks import PACKED_BLOCK, check_quantized_weight
from peft_ext.reference.quantized_linear import dequantize, pack

DTYPES = ("int8", "int4", "bfloat16")
"""How a weight can be kept."""

_LARGEST_INT8 = 127
_DEFAULT_GROUPS = {"int8": None, "int4": PACKED_BLOCK}


def quantize_weight(weight: Tensor, dtype: str = "int8", group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Rounds a weight to int8 or 4-bit values and one scale for each group of a row's values.

    int8: scale = max(abs(w)) / 127. int4: scale = m / -8 for the m of largest magnitude, so that m itself is kept and
    all sixteen values are in use (as GGML's Q4_0).

    Args:
        weight: ``[out_features, in_features]``; float32, float64, bfloat16 or float16.
        dtype: "int8" or "int4".
        group_size: how many values share a scale: all of a row, or a multiple of 32 that divides it. By default a row
            for int8, 32 for int4, whose rows must be a multiple of 32 long.

    Returns:
        weight, weight_scale: as :func:`peft_ext.ops.quantized_linear` takes them.

    Raises:
        TypeError: if ``weight`` is no floating-point tensor.
        ValueError: for a shape, a dtype name or a group size that does not fit, and for a weight that is not finite.

    Example:
        >>> import torch
        >>> from peft_ext import dequantize_weight, quantize_weight
        >>> values, scale = quantize_weight(torch.tensor([[0.1, -12.7], [2.0, 1.0]]))
        >>> values
        tensor([[   1, -127],
                [ 127,   64]], dtype=torch.int8)
        >>> dequantize_weight(values, scale)
        tensor([[  0.1000, -12.7000],
                [  2.0000,   1.0079]])
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, but is {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions, but has shape {list(weight.shape)}")
    if dtype not in ("int8", "int4"):
        raise ValueError(f"dtype must be 'int8' or 'int4', got {dtype!r}")
    if not weight.isfinite().all():
        raise ValueError("weight must be finite to be quantized")
    out_features, in_features = weight.shape
    group_size = _checked_group_size(in_features, dtype, group_size)
    groups = weight.detach().to(torch.float32).reshape(out_features, -1, group_size)
    low, high = (-_LARGEST_INT8, _LARGEST_INT8) if dtype == "int8" else (-8, 7)
    scale = _scales(groups, dtype)
    # a group of zeros has a scale of zero
    values = torch.where(scale == 0, 0.0, groups / scale).round_().clamp_(low, high)
    values = values.to(torch.int8).reshape(out_features, in_features)
    return pack(values) if dtype == "int4" else values, scale.squeeze(2).contiguous()


def dequantize_weight(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight ``[out_features, in_features]`` that the values and scales of :func:`quantize_weight` stand for.

    Raises:
        TypeError, ValueError: if they do not fit together, as :func:`peft_ext.ops.quantized_linear` asks.
    """
    check_quantized_weight(weight, weight_scale)
    return dequantize(weight, weight_scale, dtype)


def _checked_group_size(in_features: int, dtype: str, group_size: int | None) -> int:
    size = _DEFAULT_GROUPS[dtype] if group_size is None else group_size
    size = max(in_features, 1) if size is None else size
    whole_row = dtype == "int8" and size == max(in_features, 1)
    if not whole_row and (size <= 0 or in_features % size or size % PACKED_BLOCK):
        also = " or all of them" if dtype == "int8" else ""
        raise ValueError(
            f"group_size must be a multiple of {PACKED_BLOCK} that divides {in_features} in_features{also}, got {size}"
        )
    return size


def _scales(groups: Tensor, dtype: str) -> Tensor:
    if not groups.shape[1]:  # no columns: one group of nothing
        return groups.new_zeros(len(groups), 1, 1)
    if dtype == "int8":
        return groups.abs().amax(dim=2, keepdim=True) / _LARGEST_INT8
    return groups.gather(2, groups.abs().argmax(dim=2, keepdim=True)) / -8


class QuantizedLinear(nn.Module):
    r"""A frozen linear layer y = x Wᵀ + b whose weight is kept as int8 or 4-bit values, or in bfloat16.

    It computes in the dtype of its input, by :func:`peft_ext.ops.quantized_linear`; a bfloat16 weight in bfloat16,
    whatever the input, as autocast would. LoRA goes around it as around an ``nn.Linear``
    (:class:`peft_ext.LoRALinear`, :class:`peft_ext.LoraConfig`) and stays in float32. Nothing can be merged into it.

    ``to(dtype)``, ``half()`` and the like move it and leave what it keeps as it is. ``load_state_dict`` takes the state
    of a plain layer too, and quantizes its weight.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``; the bias stays a parameter of the default dtype.
        dtype: "int8", "int4" or "bfloat16".
        group_size: as in :func:`quantize_weight`.
        device: of its tensors.

    Attributes:
        weight: the values, as :func:`peft_ext.ops.quantized_linear` takes them, or bfloat16
            ``[out_features, in_features]``.
        weight_scale: float32 ``[out_features, groups]``; None for bfloat16.

    Raises:
        ValueError: for a dtype name or a group size that does not fit.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from peft_ext import LoRALinear, QuantizedLinear
        >>> base = QuantizedLinear.from_linear(nn.Linear(64, 8), "int4")
        >>> base.weight.shape, base.weight.dtype, base.weight_scale.shape
        (torch.Size([8, 32]), torch.uint8, torch.Size([8, 2]))
        >>> LoRALinear(base, rank=2)(torch.zeros(3, 64)).shape
        torch.Size([3, 8])
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: str = "int8",
        group_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
        self.in_features, self.out_features = in_features, out_features
        self.weight_dtype = dtype
        self.group_size: int | None = None
        self.transposed = False
        if dtype == "bfloat16":
            if group_size is not None:
                raise ValueError(f"group_size is for 'int8' and 'int4', got {group_size} for 'bfloat16'")
            self._keep(torch.zeros(out_features, in_features, dtype=torch.bfloat16, device=device), None)
        else:
            self.group_size = _checked_group_size(in_features, dtype, group_size)
            groups = max(in_features // self.group_size, 1)
            values = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
            scale = torch.zeros(out_features, groups, device=device)
            self._keep(pack(values) if dtype == "int4" else values, scale)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, device=device)) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Module, dtype: str = "int8", group_size: int | None = None) -> QuantizedLinear:
        """The layer that stands for an ``nn.Linear`` or transformers' ``Conv1D``; the bias parameter is the same one.

        Raises:
            TypeError: if ``linear`` is another module.
            ValueError: as :func:`quantize_weight`.
        """
        if not isinstance(linear, nn.Linear) and not is_conv1d(linear):
            raise TypeError(f"linear must be an nn.Linear or a Conv1D, got {type(linear).__name__}")
        weight: Any = linear.weight
        transposed = is_conv1d(linear)
        matrix = weight.detach().t() if transposed else weight.detach()
        layer = cls(matrix.shape[1], matrix.shape[0], False, dtype=dtype, group_size=group_size, device="meta")
        layer.transposed = transposed
        layer._quantize(matrix)
        layer.bias = linear.bias  # type: ignore[assignment]
        return layer.train(linear.training)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W ``[out_features, in_features]``, a new tensor."""
        if self.weight_scale is None:
            return self.weight.detach().to(dtype, copy=True)
        return dequantize_weight(self.weight.detach(), self.weight_scale.detach(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` ``[..., in_features]`` to ``[..., out_features]``."""
        rows, weight, bias, weight_scale = self.op_arguments(x)
        y = F.linear(rows, weight, bias) if weight_scale is None else quantized_linear(rows, weight, weight_scale, bias)
        return y if rows is x else y.to(x.dtype)

    def op_arguments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x, weight, bias and weight_scale as the ops take them, x and bias cast where they have to be."""
        weight, weight_scale = self.weight, self.weight_scale
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):  # which casts by itself
            return x, weight, bias, weight_scale
        if weight_scale is None and x.dtype != weight.dtype:
            x = x.to(weight.dtype)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return x, weight, bias, weight_scale

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        group = f", group_size={self.group_size}" if self.group_size is not None else ""
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{features}, bias={self.bias is not None}, dtype={self.weight_dtype}{group}"

    def _quantize(self, matrix: Tensor) -> None:
        if self.weight_dtype == "bfloat16":
            self._keep(matrix.to(torch.bfloat16, copy=True), None)
        else:
            self._keep(*quantize_weight(matrix, self.weight_dtype, self.group_size))

    def _keep(self, weight: Tensor, weight_scale: Tensor | None) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        scale = None if weight_scale is None else nn.Parameter(weight_scale, requires_grad=False)
        self.register_parameter("weight_scale", scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves the layer, but lets no cast touch the scales or a bfloat16 weight."""
        before = {name: self._parameters[name] for name in ("weight", "weight_scale")}
        kept = {name: parameter.data for name, parameter in before.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, data in kept.items():
            moved: Any = self._parameters[name]
            if moved.dtype != data.dtype:
                moved.data = data.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes a plain layer's weight as well."""
        weight = state_dict.get(f"{prefix}weight")
        scaled = f"{prefix}weight_scale" in state_dict
        if isinstance(weight, Tensor) and weight.is_floating_point() and self.weight_dtype != "bfloat16" and not scaled:
            matrix = weight.t() if self.transposed else weight
            if matrix.shape == (self.out_features, self.in_features):
                values, scale = quantize_weight(matrix, self.weight_dtype, self.group_size)
                state_dict[f"{prefix}weight"], state_dict[f"{prefix}weight_scale"] = values, scale
        elif isinstance(weight, Tensor) and self.weight_dtype == "bfloat16" and self.transposed:
            state_dict[f"{prefix}weight"] = weight.t() if weight.dtype != torch.bfloat16 else weight
        super()._load_from_state_dict(state_dict, prefix, *args)


__all__ = ["QuantizedLinear", "dequantize_weight", "quantize_weight"]
