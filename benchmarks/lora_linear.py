"""lora_linear: the frozen layer, the formula that people copy, Hugging Face PEFT's layer, and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from registry import (
    LAYER_PASSES,
    TRAINING,
    Benchmark,
    Dtypes,
    Implementation,
    Shape,
    Task,
    Tensors,
    Work,
    training_task,
)
from torch import Tensor, nn
from torch.nn import functional as F

from peft_ext import reference
from peft_ext.nn import LoRALinear
from peft_ext.ops._dropout import draw_seed

SCALING = 2
GRID_MULTIPLY_ADDS = 2**32  # most that the frozen layer may have, to keep the grid to minutes


@dataclass(frozen=True)
class LinearShape(Shape):
    """x [M, K], weight [N, K], rank r."""

    M: int
    K: int
    N: int
    r: int
    dropout: float = 0.0


def make_tensors(shape: LinearShape, dtypes: Dtypes) -> Tensors:
    m, k, n, r = shape.M, shape.K, shape.N, shape.r
    base = {
        "x": torch.randn(m, k),
        "weight": torch.randn(n, k) / k**0.5,
        "bias": torch.randn(n),
        "grad_y": torch.randn(m, n),
    }
    adapter = {"lora_A": torch.randn(r, k) / k**0.5, "lora_B": torch.randn(n, r) / r**0.5}
    return {name: t.to(dtypes.base) for name, t in base.items()} | {
        name: t.to(dtypes.adapter) for name, t in adapter.items()
    }


def frozen_linear(t: Tensors) -> nn.Linear:
    """The base layer on the problem's own tensors, so that all implementations read the same memory."""
    linear = nn.Linear(1, 1, device="meta")
    linear.weight = nn.Parameter(t["weight"], requires_grad=False)
    linear.bias = nn.Parameter(t["bias"], requires_grad=False)
    linear.out_features, linear.in_features = t["weight"].shape
    return linear


def layer_task(shape: Shape, t: Tensors, layer: Callable[[Tensor], Tensor], **parameters: Tensor) -> Task:
    return training_task(layer, parameters, t["x"], t["grad_y"], dropout=shape.dropout_p > 0)


def build_frozen(shape: Shape, t: Tensors) -> Task:
    return layer_task(shape, t, frozen_linear(t))


class EagerLoRA(nn.Module):
    """The formula as tutorials have it."""

    def __init__(self, linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, dropout: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.mixed = lora_A.dtype != linear.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.mixed:
            h = self.dropout(x).to(self.lora_A.dtype) @ self.lora_A.T
            return self.linear(x) + (SCALING * (h @ self.lora_B.T)).to(x.dtype)
        return self.linear(x) + SCALING * ((self.dropout(x) @ self.lora_A.T) @ self.lora_B.T)


def build_eager(shape: LinearShape, t: Tensors) -> Task:
    layer = EagerLoRA(frozen_linear(t), t["lora_A"], t["lora_B"], shape.dropout)
    return layer_task(shape, t, layer, lora_A=layer.lora_A, lora_B=layer.lora_B)


def build_compiled(shape: LinearShape, t: Tensors) -> Task:
    torch.compiler.reset()  # else shapes compiled before count as recompilations, which are limited
    layer = EagerLoRA(frozen_linear(t), t["lora_A"], t["lora_B"], shape.dropout)
    return layer_task(shape, t, torch.compile(layer), lora_A=layer.lora_A, lora_B=layer.lora_B)


def hf_peft_layer(linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, dropout: float = 0.0) -> Any:
    """The layer that PEFT itself puts into a model, in train mode, with these A and B."""
    from peft import LoraConfig, get_peft_model

    rank = lora_A.size(0)
    config = LoraConfig(r=rank, lora_alpha=SCALING * rank, lora_dropout=dropout, target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(linear), config)
    layer = model.base_model.model[0].train()
    layer.lora_A["default"].weight = nn.Parameter(lora_A)
    layer.lora_B["default"].weight = nn.Parameter(lora_B)
    return layer


def build_hf_peft(shape: LinearShape, t: Tensors) -> Task:
    layer = hf_peft_layer(frozen_linear(t), t["lora_A"], t["lora_B"], shape.dropout)
    return layer_task(shape, t, layer, lora_A=layer.lora_A["default"].weight, lora_B=layer.lora_B["default"].weight)


def build_ours(shape: LinearShape, t: Tensors) -> Task:
    layer = LoRALinear(
        frozen_linear(t), shape.r, SCALING * shape.r, dropout=shape.dropout, adapter_dtype=t["lora_A"].dtype
    )
    layer.lora_A, layer.lora_B = nn.Parameter(t["lora_A"]), nn.Parameter(t["lora_B"])
    return layer_task(shape, t, layer, lora_A=layer.lora_A, lora_B=layer.lora_B)


def frozen_oracle(shape: Shape, t: Tensors) -> Tensors:
    def layer(x: Tensor) -> Tensor:
        return F.linear(x, t["weight"], t["bias"])

    return layer_task(shape, t, layer).results()


def lora_oracle(shape: LinearShape, t: Tensors) -> Tensors:
    lora_A, lora_B = nn.Parameter(t["lora_A"]), nn.Parameter(t["lora_B"])
    seed = draw_seed(t["x"]) if shape.dropout else None

    def layer(x: Tensor) -> Tensor:
        return reference.lora_linear(x, t["weight"], t["bias"], lora_A, lora_B, SCALING, shape.dropout, seed)

    return layer_task(shape, t, layer, lora_A=lora_A, lora_B=lora_B).results()


def floor(shape: LinearShape, dtypes: Dtypes, pass_name: str) -> float:
    """FLOPs of the cheaper order, over those of the frozen layer."""
    frozen, skinny = shape.M * shape.K * shape.N, shape.M * shape.r * (shape.K + shape.N)
    return floor_of_orders(frozen, skinny, shape.r * shape.K * shape.N, pass_name, dropout=shape.dropout > 0)


def floor_of_orders(frozen: int, skinny: int, update: int, pass_name: str, *, dropout: bool) -> float:
    """The order that costs less, in multiply-adds: the branch apart, or W + s B A formed first.

    Args:
        frozen: of x Wᵀ, and of its backward to x.
        skinny: of the branch, h = x Aᵀ and h Bᵀ. Its backward to A, B and x is twice that.
        update: of B A. The sum serves the forward and the gradient of x, but those of A and B still
            need x Aᵀ and three more skinny products: 2 ``skinny`` in all. With dropout there is no such sum.
    """
    backward = pass_name == TRAINING
    apart = 3 * skinny if backward else skinny
    formed = update + 2 * skinny if backward else update
    base = 2 * frozen if backward else frozen
    return (base + (apart if dropout else min(apart, formed))) / base


def work(shape: LinearShape, dtypes: Dtypes, pass_name: str) -> Work:
    """Weight, factors, rows in and out, and the floor's FLOPs; the backward reads them again, and the gradient."""
    m, k, n = shape.M, shape.K, shape.N
    forward = (m * k + k * n + n + m * n) * dtypes.base.itemsize + shape.r * (k + n) * dtypes.adapter.itemsize
    products = 2 * m * k * n * floor(shape, dtypes, pass_name)
    if pass_name != TRAINING:
        return Work(forward, int(products))
    return Work(2 * forward + m * k * dtypes.base.itemsize, int(2 * products))


def target(shape: LinearShape, pass_name: str, ratios: Mapping[str, float]) -> float | None:
    """Half of PEFT's overhead, a quarter of it with dropout, and never slower than the formula."""
    share = 0.25 if shape.dropout else 0.5
    limits = [ratios["eager"]] if "eager" in ratios else []
    if "hf_peft" in ratios:
        limits.append(1 + share * (ratios["hf_peft"] - 1))
    return min(limits, default=None)


def peak_target(shape: LinearShape, dtypes: Dtypes, peaks: Mapping[str, int]) -> int | None:
    """No more than PEFT, and with dropout a copy of x less."""
    return peak_below(peaks.get("hf_peft"), shape, dtypes)


def peak_below(peer: int | None, shape: Any, dtypes: Dtypes) -> int | None:
    copy_of_x = shape.M * shape.K * dtypes.base.itemsize if shape.dropout else 0
    return None if peer is None else peer - copy_of_x


DEFAULT = (
    LinearShape(1, 768, 768, 8),
    LinearShape(512, 768, 768, 8),
    LinearShape(512, 768, 768, 8, 0.1),
    LinearShape(4096, 768, 768, 8),
    LinearShape(4096, 768, 768, 64),
    LinearShape(256, 4096, 4096, 16, 0.05),
)
ON_DEVICE = (
    LinearShape(4096, 4096, 4096, 16),
    LinearShape(4096, 4096, 4096, 16, 0.05),
    LinearShape(64, 4096, 4096, 16),
    LinearShape(1, 4096, 4096, 16),
)
GRID = tuple(
    LinearShape(m, k, n, r)
    for m, k, n, r in product(
        (1, 8, 32, 128, 512, 2048, 4096), (64, 256, 768, 1024, 4096), (64, 256, 768, 1024, 4096), (4, 16)
    )
    if m * k * n <= GRID_MULTIPLY_ADDS
)

BENCHMARK = Benchmark(
    op="lora_linear",
    passes=LAYER_PASSES,
    shape_type=LinearShape,
    shapes={
        "default": DEFAULT,
        "quick": (DEFAULT[0], DEFAULT[2]),
        "grid": GRID,
        "cuda": ON_DEVICE,
        "cuda float32": ON_DEVICE[:1],
        "cuda compiled": (ON_DEVICE[0], ON_DEVICE[-1]),
    },
    make_tensors=make_tensors,
    implementations=(
        Implementation("frozen", build_frozen, frozen_oracle, peer=False),
        Implementation("eager", build_eager, lora_oracle),
        Implementation("hf_peft", build_hf_peft, lora_oracle, requires="peft"),
        Implementation("ours", build_ours, lora_oracle, oracle_dropout=True),
        Implementation("compiled", build_compiled, lora_oracle, default=False, capturable=False),
    ),
    floor=floor,
    target=target,
    peak_target=peak_target,
    work=work,
)
