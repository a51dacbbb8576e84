"""LoRA modules: a trainable low-rank update beside a frozen linear layer (Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_ext.nn._lookup import two_parameters
from peft_ext.nn._lora_checks import (
    check_adapter_dtype,
    check_alpha,
    check_dropout,
    check_enable_lora,
    check_init,
    check_linear,
    check_rank,
    is_conv1d,
)
from peft_ext.nn.attention import SelfAttention
from peft_ext.nn.quantized import QuantizedLinear
from peft_ext.ops import lora_linear, lora_merge_, lora_unmerge_, merged_lora_linear


class _Uncalled(OrderedDict[Any, Any]):
    """Forward pre-hooks, with one that is counted and not called.

    ``nn.TransformerEncoderLayer`` in evaluation reads the weight of a layer without hooks instead of calling it, but a
    hook that is called costs as much as a small kernel. So the dictionary has it and yet counts as empty.
    """

    def __init__(self) -> None:
        super().__init__(uncalled=_be_called)

    def __bool__(self) -> bool:
        return len(self) > 1


def _be_called(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Does nothing, if there are further hooks and this one is called with them."""


@dataclass
class _Update:
    """A low-rank update that was added to a weight, and what takes it out again to the bit."""

    lora_A: Tensor
    lora_B: Tensor
    scale: float
    residual: Tensor
    outliers: Tensor

    def take_out(self, weight: Tensor) -> None:
        lora_unmerge_(weight, self.lora_A, self.lora_B, self.residual, self.outliers, self.scale)


class _LoRALayer(nn.Module):
    """LoRA on the enabled ones of ``len(enable_lora)`` equal slices of a linear layer's outputs."""

    # An nn.Linear or, known by duck-typing, a Conv1D.
    linear: Any

    def __init__(
        self,
        linear: nn.Module,
        enable_lora: Sequence[bool],
        rank: int,
        alpha: float,
        dropout: float,
        init: str,
        rslora: bool,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self._is_quantized = isinstance(linear, QuantizedLinear)
        if not self._is_quantized:
            check_linear(linear)
        self.linear = linear
        self._transposed = is_conv1d(linear)
        check_enable_lora(enable_lora, self.out_features)
        slices, enabled = len(enable_lora), sum(enable_lora)
        slice_features = self.out_features // slices
        check_rank(rank, self.in_features, slice_features)
        check_alpha(alpha)
        check_dropout(dropout)
        check_init(init)
        base_dtype = torch.float32 if self._is_quantized else self.weight.dtype
        dtype = base_dtype if adapter_dtype is None else adapter_dtype
        check_adapter_dtype(dtype, base_dtype)

        self.enable_lora = list(enable_lora)
        self.rank = rank
        self.alpha = alpha
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = dropout
        self.init = init
        self._updates: list[_Update] | None = None
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(enabled * rank, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(enabled * slice_features, rank, device=device, dtype=dtype))
        self.reset_parameters()
        self.register_state_dict_post_hook(_save_unmerged)
        self.register_load_state_dict_pre_hook(_load_unmerged)
        self._forward_pre_hooks = _Uncalled()
        linear.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Draws the factors anew, as ``init`` says."""
        if self.init == "gaussian":
            nn.init.normal_(self.lora_A, std=0.01)
            nn.init.normal_(self.lora_B, std=0.01)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    @property
    def in_features(self) -> int:
        return self.linear.in_features if self._is_quantized else self._out_in(self.weight).size(1)

    @property
    def out_features(self) -> int:
        return self.linear.out_features if self._is_quantized else self._out_in(self.weight).size(0)

    @property
    def weight(self) -> nn.Parameter:
        """The base layer's weight, in its own layout; it holds the update too while merged."""
        return self.linear.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias."""
        return self.linear.bias

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the update now."""
        return self._updates is not None

    def merge(self, safe_merge: bool = True) -> None:
        """Adds the update to the base weight, in place, so that forward costs what the plain layer's does.

        The sum is formed in float32 (float64 for a float64 weight) and rounded once. While merged, the
        factors are out of use: they get no gradient, changing them changes no output, and dropout does
        not act. Nothing happens if the layer is merged already. A weight that is tied to another
        module's changes there too.

        Args:
            safe_merge: raise a ValueError, with the weight untouched, if the sum is not finite.

        Raises:
            ValueError: also if the base is a :class:`peft_ext.QuantizedLinear`.
        """
        if self.merged:
            return
        if self._is_quantized:
            kept = self.linear.weight_dtype
            raise ValueError(f"a base weight in {kept} cannot take an update in: merge into a plain layer")
        enabled = sum(self.enable_lora)
        # Copies: training goes on with the parameters, unmerging needs what was merged.
        lora_A, lora_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        factors = [(a, b, self.scale) for a, b in zip(lora_A.chunk(enabled), lora_B.chunk(enabled), strict=True)]
        if safe_merge:
            self._check_finite(factors)
        self._add(factors)

    def unmerge(self) -> None:
        """Gives the base weight the very bits that it had before :meth:`merge`.

        It is the update as merged that is taken out, whatever has become of the factors since.
        Nothing happens if the layer is not merged.
        """
        self._take_out(self.weight)
        self._updates = None

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, merged={self.merged}"

    def _frozen(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x and the base's weight, bias and weight_scale, as the ops take them."""
        linear: Any = self._modules["linear"]
        if self._is_quantized:
            return linear.op_arguments(x)
        weight, bias = two_parameters(linear, "weight", "bias")
        return x, weight.t() if self._transposed else weight, bias, None

    def _out_in(self, weight: Tensor) -> Tensor:
        return weight.t() if self._transposed else weight

    def _enabled_slices(self, weight: Tensor) -> list[Tensor]:
        slices = self._out_in(weight.detach()).chunk(len(self.enable_lora))
        return [rows for rows, enabled in zip(slices, self.enable_lora, strict=True) if enabled]

    def _check_finite(self, factors: list[tuple[Tensor, Tensor, float]]) -> None:
        for rows, (a, b, scale) in zip(self._enabled_slices(self.weight), factors, strict=True):
            trial = rows.clone()
            lora_merge_(trial, a, b, scale)
            if not trial.isfinite().all():
                raise ValueError("merging would make weights that are not finite: only safe_merge=False merges them")

    def _add(self, factors: list[tuple[Tensor, Tensor, float]]) -> None:
        self._updates = []
        try:
            for rows, (a, b, scale) in zip(self._enabled_slices(self.weight), factors, strict=True):
                self._updates.append(_Update(a, b, scale, *lora_merge_(rows, a, b, scale)))
        except BaseException:
            self.unmerge()
            raise

    def _take_out(self, weight: Tensor) -> None:
        # Fewer updates than slices means that adding them failed half way.
        for rows, update in zip(self._enabled_slices(weight), self._updates or [], strict=False):
            update.take_out(rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _LoRALayer:
        """Moves a merged layer by way of the unmerged one.

        What makes unmerging exact holds for one dtype and one device's arithmetic only.
        """
        updates = self._updates
        self.unmerge()
        super()._apply(fn, recurse)
        if updates is not None:
            self._add([(fn(update.lora_A), fn(update.lora_B), update.scale) for update in updates])
        return self


def _save_unmerged(layer: _LoRALayer, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """A checkpoint holds the base and the factors, merged or not: loading it must not add the update twice."""
    if layer.merged:
        weight = layer.weight.detach().clone()
        layer._take_out(weight)
        state_dict[f"{prefix}linear.weight"] = weight


def _load_unmerged(layer: _LoRALayer, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Loading unmerges; a plain linear layer's entries go to the base and leave the factors as they are."""
    layer.unmerge()
    if f"{prefix}weight" not in state_dict:
        return
    for name in ("weight", "weight_scale", "bias"):
        if f"{prefix}{name}" in state_dict:
            state_dict[f"{prefix}linear.{name}"] = state_dict.pop(f"{prefix}{name}")
    for name in ("lora_A", "lora_B"):
        state_dict.setdefault(f"{prefix}{name}", getattr(layer, name))


class LoRALinear(_LoRALayer):
    r"""A frozen linear layer and its trainable low-rank update: y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ.

    The layer is wrapped, not copied, and stands where it stood: it has its ``in_features``,
    ``out_features``, ``weight`` and ``bias``. Those are the base's, so code that reads the weight
    instead of calling the layer does without the update unless it is merged. Hooks of the wrapped
    layer run only while merged. Inside ``nn.TransformerEncoder``, padding masks need that module's
    ``enable_nested_tensor=False``.

    ``state_dict`` holds ``linear.weight``, ``linear.bias``, ``lora_A`` and ``lora_B``, with the base's
    own weight also while merged. ``load_state_dict`` unmerges first, and takes a plain layer's
    state (``weight``, ``bias``) too: that loads the base and leaves the factors as they are.
    Copying, pickling and moving (``to``, ``half``, ...) keep a merged layer merged, and exact to undo.

    Args:
        linear: the layer to adapt, an ``nn.Linear`` or transformers' ``Conv1D``, of float32, float64,
            bfloat16 or float16, which input and output have too; or a :class:`peft_ext.QuantizedLinear`. Its
            parameters are frozen; the bias may be thawed afterwards, the weight gets no gradient.
        rank: r, inner size of the update. One above min(in_features, out_features) warns.
        alpha: s = alpha / rank (``scale``).
        dropout: probability in [0, 1) of dropping an element of the update's input, in training.
        init: ``"default"``: A by ``kaiming_uniform_(a=√5)`` and B zero, so that the adapted layer begins
            as the base. ``"gaussian"``: normal of standard deviation 0.01 in both, so it does not.
        rslora: s = alpha / √rank instead (Kalajdzievski, arXiv:2312.03732).
        adapter_dtype: of A and B; the base's by default, float32 on a quantized one. float32 on a bfloat16 or
            float16 base keeps small steps of the optimizer from rounding away. float64 needs a float64 base.

    Attributes:
        lora_A: ``[rank, in_features]``.
        lora_B: ``[out_features, rank]``.

    Raises:
        TypeError: if ``linear`` is no such layer or its weight is not of those dtypes.
        ValueError: if another argument is out of range. ``linear`` is then as it was.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from peft_ext import LoRALinear
        >>> layer = LoRALinear(nn.Linear(16, 8), rank=4, alpha=8.0)
        >>> layer(torch.zeros(2, 3, 16)).shape
        torch.Size([2, 3, 8])
        >>> [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        ['lora_A', 'lora_B']
        >>> before = layer.weight.clone()
        >>> layer.merge()
        >>> layer.unmerge()
        >>> torch.equal(layer.weight, before)
        True
    """

    def __init__(
        self,
        linear: nn.Module,
        rank: int = 4,
        alpha: float = 1.0,
        *,
        dropout: float = 0.0,
        init: str = "default",
        rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(linear, [True], rank, alpha, dropout, init, rslora, adapter_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` ``[..., in_features]`` to ``[..., out_features]``."""
        if self._updates is not None:
            return self.linear(x)
        rows, weight, bias, weight_scale = self._frozen(x)
        lora_A, lora_B = two_parameters(self, "lora_A", "lora_B")
        p = self.dropout if self.training else 0.0
        y = lora_linear(rows, weight, bias, lora_A, lora_B, self.scale, dropout_p=p, weight_scale=weight_scale)
        return y if rows is x else y.to(x.dtype)


class MergedLoRALinear(_LoRALayer):
    r"""LoRA on chosen slices of one frozen projection, such as query and value in GPT-2's ``c_attn``.

    The outputs of ``linear`` are ``len(enable_lora)`` slices of equal size, one after the other. Each
    enabled slice i gets an update s · drop(x) Aᵢᵀ Bᵢᵀ of its own; all slices see the same dropped
    input. This is loralib's ``MergedLinear``, with its parameter names and shapes.

    Args:
        linear, rank, alpha, dropout, init, rslora, adapter_dtype: as in :class:`LoRALinear`; a rank
            above min(in_features, slice size) warns.
        enable_lora: which slices have an update, one bool for each.

    Attributes:
        lora_A: ``[g * rank, in_features]`` for g enabled slices.
        lora_B: ``[g * out_features / len(enable_lora), rank]``.

    Merging, checkpoints, copies and moves are as in :class:`LoRALinear`; merging leaves the slices
    without an update alone.

    Raises:
        TypeError, ValueError: as :class:`LoRALinear`, and if the slices do not divide
            ``out_features`` or none is enabled.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from peft_ext import MergedLoRALinear
        >>> layer = MergedLoRALinear(nn.Linear(16, 3 * 16), [True, False, True], rank=4)
        >>> layer.lora_A.shape, layer.lora_B.shape
        (torch.Size([8, 16]), torch.Size([32, 4]))
        >>> layer(torch.zeros(2, 16)).shape
        torch.Size([2, 48])
    """

    def __init__(
        self,
        linear: nn.Module,
        enable_lora: Sequence[bool] = (True, False, True),
        rank: int = 4,
        alpha: float = 1.0,
        *,
        dropout: float = 0.0,
        init: str = "default",
        rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(linear, enable_lora, rank, alpha, dropout, init, rslora, adapter_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` ``[..., in_features]`` to ``[..., out_features]``."""
        if self._updates is not None:
            return self.linear(x)
        rows, weight, bias, weight_scale = self._frozen(x)
        y = merged_lora_linear(
            rows,
            weight,
            bias,
            *two_parameters(self, "lora_A", "lora_B"),
            self.enable_lora,
            self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            weight_scale=weight_scale,
        )
        return y if rows is x else y.to(x.dtype)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"enable_lora={self.enable_lora}, {super().extra_repr()}"


class LoRA_MHA(SelfAttention):
    """Multi-head self-attention with LoRA on the query and value projections.

    ``q_proj`` and ``v_proj`` are :class:`LoRALinear`, ``k_proj`` and ``out_proj`` are ``nn.Linear``; these
    two train unless frozen (``freeze_except(model, r"lora_[AB]$")``). The state of a
    :class:`SelfAttention` loads into it: see :class:`LoRALinear`.

    Args:
        embed_dim, num_heads, causal, device, dtype: as in :class:`SelfAttention`.
        lora_rank, alpha: rank and alpha of both updates.
        lora_dropout: dropout of both updates' input.
        init: of both updates' factors, as in :class:`LoRALinear`.

    Example:
        >>> import torch
        >>> from peft_ext import LoRA_MHA
        >>> LoRA_MHA(8, 2, lora_rank=2, causal=True)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        lora_rank: int = 4,
        *,
        alpha: float = 1.0,
        lora_dropout: float = 0.0,
        init: str = "default",
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, causal=causal, device=device, dtype=dtype)
        self.q_proj = LoRALinear(self.q_proj, lora_rank, alpha, dropout=lora_dropout, init=init)
        self.v_proj = LoRALinear(self.v_proj, lora_rank, alpha, dropout=lora_dropout, init=init)
