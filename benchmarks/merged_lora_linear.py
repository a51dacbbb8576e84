"""merged_lora_linear: LoRA on the query and value slices of one projection, against loralib's layer."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from lora_linear import SCALING, build_frozen, floor_of_orders, frozen_linear, frozen_oracle, layer_task, peak_below
from registry import LAYER_PASSES, TRAINING, Benchmark, Dtypes, Implementation, Shape, Task, Tensors, Work
from torch import Tensor, nn

from peft_ext import reference
from peft_ext.nn import MergedLoRALinear
from peft_ext.ops._dropout import draw_seed

ENABLED = (True, False, True)
GROUPS = sum(ENABLED)


@dataclass(frozen=True)
class MergedShape(Shape):
    """x [M, K], weight [3 N, K], rank r for each of the two enabled slices."""

    M: int
    K: int
    N: int
    r: int
    dropout: float = 0.0


def make_tensors(shape: MergedShape, dtypes: Dtypes) -> Tensors:
    m, k, n, r = shape.M, shape.K, shape.N, shape.r
    out_features = len(ENABLED) * n
    base = {
        "x": torch.randn(m, k),
        "weight": torch.randn(out_features, k) / k**0.5,
        "bias": torch.randn(out_features),
        "grad_y": torch.randn(m, out_features),
    }
    adapter = {"lora_A": torch.randn(GROUPS * r, k) / k**0.5, "lora_B": torch.randn(GROUPS * n, r) / r**0.5}
    return {name: t.to(dtypes.base) for name, t in base.items()} | {
        name: t.to(dtypes.adapter) for name, t in adapter.items()
    }


class EagerMergedLoRA(nn.Module):
    """The formula slice by slice: each enabled slice's product is added to its columns."""

    def __init__(self, linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, dropout: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        slices = list(self.linear(x).chunk(len(ENABLED), -1))
        h = self.dropout(x).to(self.lora_A.dtype) @ self.lora_A.T
        enabled = [i for i, on in enumerate(ENABLED) if on]
        for i, h_i, b_i in zip(enabled, h.chunk(GROUPS, -1), self.lora_B.chunk(GROUPS), strict=True):
            slices[i] = slices[i] + (SCALING * (h_i @ b_i.T)).to(x.dtype)
        return torch.cat(slices, -1)


def build_eager(shape: MergedShape, t: Tensors) -> Task:
    layer = EagerMergedLoRA(frozen_linear(t), t["lora_A"], t["lora_B"], shape.dropout)
    return layer_task(shape, t, layer, lora_A=layer.lora_A, lora_B=layer.lora_B)


def build_loralib(shape: MergedShape, t: Tensors) -> Task:
    layer = importlib.import_module("loralib").MergedLinear(
        shape.K,
        len(ENABLED) * shape.N,
        r=shape.r,
        lora_alpha=SCALING * shape.r,
        lora_dropout=shape.dropout,
        enable_lora=list(ENABLED),
    )
    linear = frozen_linear(t)
    layer.weight, layer.bias = linear.weight, linear.bias
    layer.lora_A, layer.lora_B = nn.Parameter(t["lora_A"]), nn.Parameter(t["lora_B"])
    return layer_task(shape, t, layer, lora_A=layer.lora_A, lora_B=layer.lora_B)


def build_ours(shape: MergedShape, t: Tensors) -> Task:
    layer = MergedLoRALinear(
        frozen_linear(t),
        ENABLED,
        shape.r,
        SCALING * shape.r,
        dropout=shape.dropout,
        adapter_dtype=t["lora_A"].dtype,
    )
    layer.lora_A, layer.lora_B = nn.Parameter(t["lora_A"]), nn.Parameter(t["lora_B"])
    return layer_task(shape, t, layer, lora_A=layer.lora_A, lora_B=layer.lora_B)


def oracle(shape: MergedShape, t: Tensors) -> Tensors:
    lora_A, lora_B = nn.Parameter(t["lora_A"]), nn.Parameter(t["lora_B"])
    seed = draw_seed(t["x"]) if shape.dropout else None

    def layer(x: Tensor) -> Tensor:
        return reference.merged_lora_linear(
            x, t["weight"], t["bias"], lora_A, lora_B, ENABLED, SCALING, shape.dropout, seed
        )

    return layer_task(shape, t, layer, lora_A=lora_A, lora_B=lora_B).results()


def floor(shape: MergedShape, dtypes: Dtypes, pass_name: str) -> float:
    """FLOPs, as for lora_linear, of one branch for each enabled slice."""
    frozen = shape.M * shape.K * shape.N * len(ENABLED)
    skinny = GROUPS * shape.M * shape.r * (shape.K + shape.N)
    return floor_of_orders(frozen, skinny, GROUPS * shape.r * shape.K * shape.N, pass_name, dropout=shape.dropout > 0)


def work(shape: MergedShape, dtypes: Dtypes, pass_name: str) -> Work:
    """As lora_linear's."""
    m, k, n = shape.M, shape.K, shape.N * len(ENABLED)
    forward = (m * k + k * n + n + m * n) * dtypes.base.itemsize
    forward += GROUPS * shape.r * (k + shape.N) * dtypes.adapter.itemsize
    products = 2 * m * k * n * floor(shape, dtypes, pass_name)
    if pass_name != TRAINING:
        return Work(forward, int(products))
    return Work(2 * forward + m * k * dtypes.base.itemsize, int(2 * products))


def target(shape: MergedShape, pass_name: str, ratios: Mapping[str, float]) -> float | None:
    """Half of loralib's overhead, a quarter of it with dropout, and never slower than the formula."""
    share = 0.25 if shape.dropout else 0.5
    limits = [ratios["eager"]] if "eager" in ratios else []
    if "loralib" in ratios:
        limits.append(1 + share * (ratios["loralib"] - 1))
    return min(limits, default=None)


def peak_target(shape: MergedShape, dtypes: Dtypes, peaks: Mapping[str, int]) -> int | None:
    """No more than the formula, and with dropout a copy of x less."""
    return peak_below(peaks.get("eager"), shape, dtypes)


DEFAULT = (
    MergedShape(1, 768, 768, 8),
    MergedShape(512, 768, 768, 8),
    MergedShape(512, 768, 768, 8, 0.1),
    MergedShape(4096, 768, 768, 8),
)

BENCHMARK = Benchmark(
    op="merged_lora_linear",
    passes=LAYER_PASSES,
    shape_type=MergedShape,
    shapes={"default": DEFAULT, "quick": (DEFAULT[0], DEFAULT[2]), "cuda": (DEFAULT[3],)},
    make_tensors=make_tensors,
    implementations=(
        Implementation("frozen", build_frozen, frozen_oracle, peer=False),
        Implementation("eager", build_eager, oracle),
        Implementation("loralib", build_loralib, oracle, requires="loralib"),
        Implementation("ours", build_ours, oracle, oracle_dropout=True),
    ),
    floor=floor,
    target=target,
    peak_target=peak_target,
    work=work,
)
