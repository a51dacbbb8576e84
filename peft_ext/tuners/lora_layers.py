"""LoRA around linear, embedding and convolution layers, several adapters to a layer.

Attributes and parameter names are Hugging Face PEFT's: ``base_layer``, ``lora_A.{adapter}.weight``,
``lora_B.{adapter}.weight``, ``lora_embedding_A.{adapter}``, ``lora_magnitude_vector.{adapter}.weight``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_ext import ops
from peft_ext.nn._lookup import two_parameters, weight_of, weights_of
from peft_ext.nn.quantized import QuantizedLinear
from peft_ext.tuners.layer import Entry, Part, TunerLayer, has_hooks, merge_dtype
from peft_ext.tuners.lora_init import Init, changes_base, embedding_factors, linear_factors
from peft_ext.tuners.mixed import Mix, add_by_adapter, current_mix
from peft_ext.tuners.targets import is_conv1d


@dataclass(frozen=True)
class LoraSpec:
    """The hyperparameters of one adapter in one layer."""

    r: int
    lora_alpha: float
    dropout: float = 0.0
    init: Init = True
    use_rslora: bool = False
    use_dora: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Magnitude(nn.Module):
    """DoRA's learned magnitude of every output row: ``weight`` [out_features]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class MixedFactors(NamedTuple):
    """What a layer has for a mixed batch, by adapter in the order of ``names``."""

    names: list[str]
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    scalings: Tensor
    fit_one_op: bool


class Merged(NamedTuple):
    """What takes merged adapters out again: their factors, stacked and scaled, and what rounding lost."""

    lora_A: Tensor
    lora_B: Tensor
    residual: Tensor
    outliers: Tensor


class LoraLayer(TunerLayer):
    """What the layers of all types share."""

    part_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    helper_names = ("lora_dropout",)
    _modules: dict[str, Any]
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_magnitude_vector: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = self.shape_of(base_layer)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float | Tensor] = {}
        self.use_rslora: dict[str, bool] = {}
        self.use_dora: dict[str, bool] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()

    @staticmethod
    def shape_of(base_layer: Any) -> tuple[int, int]:
        """(in_features, out_features)."""
        raise NotImplementedError

    @classmethod
    def check(cls, base_layer: Any, spec: LoraSpec) -> None:
        """Raises a ValueError if this kind of layer cannot do what ``spec`` asks for."""
        kind = type(base_layer).__name__
        if spec.use_dora:
            raise ValueError(f"use_dora is supported for linear layers, not for {kind}")
        if not isinstance(spec.init, bool) and spec.init != "gaussian":
            raise ValueError(f"init_lora_weights={spec.init!r} is supported for linear layers, not for {kind}")

    @classmethod
    def build(cls, base_layer: Any, spec: LoraSpec) -> dict[str, Part]:
        """The parts of a new adapter."""
        raise NotImplementedError

    def matrices(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """W [out, in], A [r, in] and B [out, r] such that W += s B A merges the adapter."""
        raise NotImplementedError

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape and layout as [out, in], a view."""
        raise NotImplementedError

    def add_adapter(self, adapter_name: str, spec: LoraSpec, parts: Mapping[str, Part]) -> None:
        """Adds an adapter made by :meth:`build`, frozen and inactive."""
        self.attach(adapter_name, parts)
        dropout = nn.Dropout(spec.dropout) if spec.dropout > 0 else nn.Identity()
        self.lora_dropout[adapter_name] = dropout.train(self.training)
        self.r[adapter_name] = spec.r
        self.lora_alpha[adapter_name] = spec.lora_alpha
        self.scaling[adapter_name] = spec.scaling
        self.use_rslora[adapter_name] = spec.use_rslora
        self.use_dora[adapter_name] = spec.use_dora

    def detach_adapter(self, adapter_name: str) -> None:
        super().detach_adapter(adapter_name)
        for values in (self.lora_dropout, self.r, self.lora_alpha, self.scaling, self.use_rslora, self.use_dora):
            if adapter_name in values:
                del values[adapter_name]

    def check_active(self, adapter_names: list[str]) -> None:
        mine = [name for name in adapter_names if name in self]
        if len(mine) > 1 and any(self.use_dora[name] for name in mine):
            raise ValueError(f"adapters {mine} cannot be active together: DoRA rescales the weight they share")

    @staticmethod
    def entries(parts: Mapping[str, Part], adapter_name: str) -> Iterator[Entry]:
        """As in the base class, but checkpoints have a bare ``lora_magnitude_vector``."""
        for key, model_key, tensor in TunerLayer.entries(parts, adapter_name):
            yield Entry(key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"), model_key, tensor)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Sets the adapter's scaling to ``scale`` times its initial value."""
        if adapter_name in self.scaling:
            r = self.r[adapter_name]
            initial = self.lora_alpha[adapter_name] / (math.sqrt(r) if self.use_rslora[adapter_name] else r)
            self.put_scaling(adapter_name, scale * initial)

    def put_scaling(self, adapter_name: str, scaling: float) -> None:
        """Sets the adapter's scaling; in place where it is a tensor, for the sake of compiled models."""
        current = self.scaling[adapter_name]
        if isinstance(current, Tensor):
            current.fill_(scaling)
        else:
            self.scaling[adapter_name] = scaling

    def rank_of(self, adapter_name: str) -> int:
        """The rank of the adapter's factors."""
        if adapter_name in self.lora_embedding_A:
            return self.lora_embedding_A[adapter_name].size(0)
        return self.lora_A[adapter_name].weight.size(0)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scaling of the active adapters."""
        for name in self.active_adapters:
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scaling of the active adapters, or sets it back to its initial value."""
        for name in self.active_adapters:
            if scale is None:
                self.set_scale(name, 1.0)
            else:
                self.scaling[name] /= scale

    def merged_weight(self, adapter_names: list[str], dtype: torch.dtype) -> Tensor:
        merged = self.weight.detach().to(dtype, copy=True)
        ops.lora_merge_(self.as_matrix(merged), *self._update(adapter_names, dtype))
        return merged

    def _update(self, adapter_names: list[str], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and s B of several adapters as one of their summed rank: copies, which no training changes."""
        factors = [(*self.matrices(name)[1:], self.scaling[name]) for name in adapter_names]
        lora_A = torch.cat([a.detach().to(dtype) for a, _, _ in factors])
        return lora_A, torch.cat([b.detach().to(dtype) * scaling for _, b, scaling in factors], dim=1)

    def _add(self, adapter_names: list[str]) -> Merged | Tensor:
        return self._add_update(*self._update(adapter_names, merge_dtype(self.weight.dtype)))

    def _add_update(self, lora_A: Tensor, lora_B: Tensor) -> Merged:
        return Merged(lora_A, lora_B, *ops.lora_merge_(self.as_matrix(self.weight.detach()), lora_A, lora_B))

    def _take_out(self, record: Merged | Tensor) -> None:
        if isinstance(record, Merged):
            ops.lora_unmerge_(self.as_matrix(self.weight.detach()), *record)
        else:
            super()._take_out(record)

    def _add_again(self, record: Merged | Tensor, move: Callable[[Tensor], Tensor], merged: Tensor) -> Merged | Tensor:
        if not isinstance(record, Merged):
            return super()._add_again(record, move, merged)
        # a move to a half precision must not round the factors, which merging computes with
        dtype, device = merge_dtype(self.weight.dtype), self.weight.device
        return self._add_update(record.lora_A.to(device, dtype), record.lora_B.to(device, dtype))

    def _is_plain(self) -> bool:
        """Whether the output is the base layer's own."""
        return self.disable_adapters or bool(self.merged_adapters) or not self.active_adapters


class LoraLinear(LoraLayer):
    """``nn.Linear``, or transformers' ``Conv1D``, with LoRA or DoRA."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._look_at_base()

    def replace_base_layer(self, base_layer: nn.Module) -> None:
        super().replace_base_layer(base_layer)
        self._look_at_base()

    def _look_at_base(self) -> None:
        base = self.base_layer
        self.fan_in_fan_out = is_conv1d(base)
        self._is_quantized = isinstance(base, QuantizedLinear)
        self._is_linear = self.fan_in_fan_out or self._is_quantized or type(base).forward is nn.Linear.forward

    @staticmethod
    def shape_of(base_layer: Any) -> tuple[int, int]:
        if isinstance(base_layer, QuantizedLinear):
            return base_layer.in_features, base_layer.out_features
        out_features, in_features = _weight_matrix(base_layer).shape
        return in_features, out_features

    @classmethod
    def check(cls, base_layer: Any, spec: LoraSpec) -> None:
        if spec.init == "orthogonal" and spec.r % 2:
            raise ValueError(f"init_lora_weights='orthogonal' needs an even r, got {spec.r}")
        if isinstance(base_layer, QuantizedLinear) and (spec.use_dora or changes_base(spec.init)):
            what = "use_dora" if spec.use_dora else f"init_lora_weights={spec.init!r}"
            raise ValueError(f"{what} needs the base weight itself, and a QuantizedLinear has it rounded only")

    def check_merge(self, adapter_names: list[str]) -> None:
        if self._is_quantized and self.to_merge(adapter_names):
            raise ValueError(
                f"a base weight in {self.base_layer.weight_dtype} cannot take an update in: "
                "merge into the model as it was before quantize_base"
            )
        super().check_merge(adapter_names)

    @classmethod
    def build(cls, base_layer: Any, spec: LoraSpec) -> dict[str, Part]:
        weight = _weight_matrix(base_layer)
        factors = linear_factors(weight, spec.r, spec.scaling, spec.init)
        parts: dict[str, Part] = {
            "lora_A": _linear(factors.A.to(spec.dtype)),
            "lora_B": _linear(factors.B.to(spec.dtype)),
        }
        if spec.use_dora:
            delta = 0.0 if changes_base(spec.init) else spec.scaling * factors.B @ factors.A
            parts["lora_magnitude_vector"] = Magnitude(_row_norms(weight, delta).to(spec.dtype))
        return parts

    def matrices(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        return _weight_matrix(self.base_layer), *self._factors(adapter_name)

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        # this runs in every layer of every step: a dictionary is faster than what nn.Module has to look up
        modules = self._modules
        return weight_of(modules["lora_A"]._modules[adapter_name]), weight_of(modules["lora_B"]._modules[adapter_name])

    def _frozen(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x and the base's weight, bias and weight_scale, as the ops take them."""
        base = self._modules["base_layer"]
        if self._is_quantized:
            return base.op_arguments(x)
        weight, bias = two_parameters(base, "weight", "bias")
        return x, weight.t() if self.fan_in_fan_out else weight, bias, None

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t() if self.fan_in_fan_out else weight

    def forward(self, x: Tensor) -> Tensor:
        mix = current_mix()
        if mix is not None and not self.disable_adapters:
            return self._forward_mixed(x, mix)
        if self._is_plain():
            return self.base_layer(x)
        names, base = self.active_adapters, self._modules["base_layer"]
        if self._must_be_called(base):
            return self._forward_summed(x, names)
        name = names[0]
        if len(names) == 1 and not self.use_dora[name]:
            lora_A, lora_B = self._factors(name)
            p = self._dropout_p(name) if self.training else 0.0
            return self._with_update(x, lora_A, *_scaled(lora_B, self.scaling[name]), p)
        if any(self._dropout_p(name) for name in names):
            return self._forward_summed(x, names)
        return self._forward_dora(x, name) if self.use_dora[name] else self._forward_stacked(x, names)

    def _with_update(
        self, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0, dropout_p: float = 0.0
    ) -> Tensor:
        """The base layer and one update, in one op."""
        rows, weight, bias, weight_scale = self._frozen(x)
        y = ops.lora_linear(rows, weight, bias, lora_A, lora_B, scaling, dropout_p=dropout_p, weight_scale=weight_scale)
        return y if rows is x else y.to(x.dtype)

    def mixed_names(self, mix: Mix) -> list[str]:
        """As in the base class, by one look-up each."""
        if self.merged_adapters:
            return super().mixed_names(mix)  # which refuses
        mine = self._modules["lora_A"]._modules
        return [name for name in mix.names if name in mine]

    def _forward_mixed(self, x: Tensor, mix: Mix) -> Tensor:
        """All adapters of the batch in one op, whichever rows have them."""
        base = self._modules["base_layer"]
        names, lora_A, lora_B, scalings, fit_one_op = mix.kept_for_inference(self, self._mixed_factors, mix, x)
        if not names:
            return base(x)
        if not fit_one_op or self._must_be_called(base):
            return add_by_adapter(mix, names, x, base(x), lambda name, part: self._change(part, name))
        rows, weight, bias, weight_scale = self._frozen(x)
        y = ops.multi_lora_linear(
            rows,
            weight,
            bias,
            lora_A,
            lora_B,
            scalings,
            mix.index_among(names, x),
            dropout_p=[self._dropout_p(name) for name in names] if self.training else None,
            weight_scale=weight_scale,
        )
        return y if rows is x else y.to(x.dtype)

    def _mixed_factors(self, mix: Mix, x: Tensor) -> MixedFactors:
        names, modules = self.mixed_names(mix), self._modules
        lora_A = weights_of(modules["lora_A"]._modules, names)
        lora_B = weights_of(modules["lora_B"]._modules, names)
        one_dtype = len({factor.dtype for factor in lora_A}) <= 1
        return MixedFactors(
            names,
            lora_A,
            lora_B,
            mix.scalings([self.scaling[name] for name in names], x),
            one_dtype and True not in map(self.use_dora.__getitem__, names),
        )

    def _must_be_called(self, base_layer: Any) -> bool:
        """Whether calling the base layer does more than its formula: a subclass's own forward, or hooks."""
        return not self._is_linear or has_hooks(base_layer)

    def _dropout_p(self, adapter_name: str) -> float:
        dropout = self._modules["lora_dropout"]._modules[adapter_name]
        return dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0

    def _forward_stacked(self, x: Tensor, names: list[str]) -> Tensor:
        """Several adapters as one of their summed rank."""
        lora_A = torch.cat([self.lora_A[name].weight for name in names])
        lora_B = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in names], dim=1)
        return self._with_update(x, lora_A, lora_B)

    def _forward_summed(self, x: Tensor, names: list[str]) -> Tensor:
        """The base layer, and what each adapter changes of its output: each drops another part of ``x``."""
        result = self.base_layer(x)
        total = result
        for name in names:
            total = total + self._change(x, name)
        return total.to(result.dtype)

    def _change(self, x: Tensor, adapter_name: str) -> Tensor:
        dropped = self.lora_dropout[adapter_name](x)
        if self.use_dora[adapter_name]:
            return self._directed(dropped, adapter_name) - F.linear(dropped, _weight_matrix(self.base_layer))
        lora_A, lora_B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        return lora_B(lora_A(dropped.to(lora_A.weight.dtype))) * self.scaling[adapter_name]

    def _forward_dora(self, x: Tensor, adapter_name: str) -> Tensor:
        """y = m/‖W + s B A‖ · x (W + s B A)ᵀ + b (Liu et al., 2024, eq. 5)."""
        directed = self._directed(x, adapter_name)
        bias = self.base_layer.bias
        return directed if bias is None else (directed + bias).to(directed.dtype)

    def _directed(self, x: Tensor, adapter_name: str) -> Tensor:
        weight, lora_A, lora_B = self.matrices(adapter_name)
        directed = ops.lora_linear(x, weight, None, lora_A, *_scaled(lora_B, self.scaling[adapter_name]))
        return (self._dora_gain(adapter_name) * directed).to(directed.dtype)

    def _dora_gain(self, adapter_name: str) -> Tensor:
        """m/‖W + s B A‖ by row; no gradient goes through the norm, as in the paper's section 4.3."""
        weight, lora_A, lora_B = self.matrices(adapter_name)
        with torch.no_grad():
            norms = _row_norms(weight, self.scaling[adapter_name] * (lora_B @ lora_A))
        return self.lora_magnitude_vector[adapter_name].weight / norms

    def merged_weight(self, adapter_names: list[str], dtype: torch.dtype) -> Tensor:
        merged = super().merged_weight(adapter_names, dtype)
        rows = self.as_matrix(merged)
        for name in adapter_names:
            if self.use_dora[name]:  # it is the only one then
                magnitude = self.lora_magnitude_vector[name].weight.detach().to(dtype)
                rows.mul_((magnitude / torch.linalg.vector_norm(rows, dim=1))[:, None])
        return merged

    def _add(self, adapter_names: list[str]) -> Merged | Tensor:
        if any(self.use_dora[name] for name in adapter_names):
            return self._replace_weight(self.merged_weight(adapter_names, merge_dtype(self.weight.dtype)))
        return super()._add(adapter_names)


class LoraEmbedding(LoraLayer):
    """``nn.Embedding`` with LoRA: row i of the table gets s (B A)[:, i]. Dropout does not apply."""

    @staticmethod
    def shape_of(base_layer: Any) -> tuple[int, int]:
        rows, dim = base_layer.weight.shape
        return rows, dim

    @classmethod
    def build(cls, base_layer: Any, spec: LoraSpec) -> dict[str, Part]:
        factors = embedding_factors(base_layer.weight, spec.r, spec.init)
        return {
            "lora_embedding_A": nn.Parameter(factors.A.to(spec.dtype)),
            "lora_embedding_B": nn.Parameter(factors.B.to(spec.dtype)),
        }

    def matrices(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight.t(), self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name]

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        mix = current_mix()
        if mix is not None and not self.disable_adapters:
            return add_by_adapter(mix, self.mixed_names(mix), x, result, lambda name, part: self._branch(part, name))
        if self._is_plain():
            return result
        total = result
        for name in self.active_adapters:
            total = total + self._branch(x, name)
        return total.to(result.dtype)

    def _branch(self, x: Tensor, adapter_name: str) -> Tensor:
        base = self.base_layer
        rows = F.embedding(
            x,
            self.lora_embedding_A[adapter_name].T,
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )
        branch = (rows @ self.lora_embedding_B[adapter_name].T) * self.scaling[adapter_name]
        # Gemma's embeddings scale what they look up
        embed_scale = getattr(base, "embed_scale", None)
        return branch if embed_scale is None else branch * embed_scale


class LoraConv2d(LoraLayer):
    """``nn.Conv2d`` with LoRA: a convolution to r channels, then a 1x1 convolution."""

    @staticmethod
    def shape_of(base_layer: Any) -> tuple[int, int]:
        return base_layer.in_channels, base_layer.out_channels

    @classmethod
    def check(cls, base_layer: Any, spec: LoraSpec) -> None:
        super().check(base_layer, spec)
        if base_layer.padding_mode != "zeros":
            raise ValueError(f"a Conv2d with padding_mode={base_layer.padding_mode!r} is not supported")
        if spec.r % base_layer.groups:
            raise ValueError(f"r must be divisible by the Conv2d's groups, got r={spec.r}, groups={base_layer.groups}")

    @classmethod
    def build(cls, base_layer: Any, spec: LoraSpec) -> dict[str, Part]:
        in_channels, out_channels = cls.shape_of(base_layer)
        down = nn.Conv2d(
            in_channels,
            spec.r,
            base_layer.kernel_size,
            base_layer.stride,
            base_layer.padding,
            base_layer.dilation,
            bias=False,
            device="meta",
        )
        up = nn.Conv2d(spec.r, out_channels, 1, groups=base_layer.groups, bias=False, device="meta")
        like = base_layer.weight.new_empty(out_channels, down.weight[0].numel())
        factors = linear_factors(like, spec.r, spec.scaling, spec.init)
        down.weight = nn.Parameter(factors.A.view(down.weight.shape).to(spec.dtype))
        up.weight = nn.Parameter(factors.B[:, : up.weight.size(1)].reshape(up.weight.shape).to(spec.dtype))
        return {"lora_A": down, "lora_B": up}

    def check_merge(self, adapter_names: list[str]) -> None:
        if self.base_layer.groups > 1 and self.to_merge(adapter_names):
            raise ValueError("an adapter of a Conv2d with groups > 1 mixes all channels: it cannot be merged")
        super().check_merge(adapter_names)

    def matrices(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        lora_A, lora_B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        return self.as_matrix(self.weight), lora_A.permute(self._order()).flatten(1), lora_B.flatten(1)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.permute(self._order()).view(len(weight), -1)

    def _order(self) -> tuple[int, int, int, int]:
        """The order in memory, so that the matrix is a view of the weight for either memory format."""
        return (0, 1, 2, 3) if self.weight.is_contiguous() else (0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        mix = current_mix()
        if mix is not None and not self.disable_adapters:
            names = self.mixed_names(mix)
            return add_by_adapter(mix, names, x, result, lambda name, part: self._branch(part, name), rows_only=True)
        if self._is_plain():
            return result
        total = result
        for name in self.active_adapters:
            total = total + self._branch(x, name)
        return total.to(result.dtype)

    def _branch(self, x: Tensor, adapter_name: str) -> Tensor:
        lora_A, lora_B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        dropped = self.lora_dropout[adapter_name](x.to(lora_A.weight.dtype))
        return lora_B(lora_A(dropped)) * self.scaling[adapter_name]


def layer_class(module: nn.Module) -> type[LoraLayer] | None:
    """Which of the layers goes around ``module``; None if none does."""
    if isinstance(module, nn.Linear | QuantizedLinear) or is_conv1d(module):
        return LoraLinear
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    if isinstance(module, nn.Conv2d):
        return LoraConv2d
    return None


SUPPORTED_TYPES = ("Linear", "QuantizedLinear", "Conv1D (transformers)", "Embedding", "Conv2d")


def _weight_matrix(base_layer: Any) -> Tensor:
    """The weight as ``[out, in]``, a view but of a quantized one."""
    if isinstance(base_layer, QuantizedLinear):
        return base_layer.dequantized()
    return base_layer.weight.t() if is_conv1d(base_layer) else base_layer.weight


def _scaled(lora_B: Tensor, scaling: float | Tensor) -> tuple[Tensor, float]:
    """B and a number that together scale by ``scaling``: a tensor, which may change under a graph, goes into B."""
    return (lora_B * scaling, 1.0) if isinstance(scaling, Tensor) else (lora_B, scaling)


def _linear(weight: Tensor) -> nn.Linear:
    """A linear layer without bias that has this weight."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def _row_norms(weight: Tensor, delta: Tensor | float) -> Tensor:
    return torch.linalg.vector_norm(weight + delta, dim=1)
