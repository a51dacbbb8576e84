"""lora_merge_: W += s B A in place, by torch's addmm_, the formula, PEFT's layer, and ours.

Ours also writes what undoes the merge to the bit, which the others cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from lora_linear import SCALING, frozen_linear, hf_peft_layer
from registry import Benchmark, Dtypes, Implementation, Shape, Task, Tensors, Work
from torch import Tensor

from peft_ext.ops import lora_merge_

MERGE = "merge"


@dataclass(frozen=True)
class WeightShape(Shape):
    """weight [N, K], rank r."""

    N: int
    K: int
    r: int


def make_tensors(shape: WeightShape, dtypes: Dtypes) -> Tensors:
    n, k, r = shape.N, shape.K, shape.r
    return {
        "weight": (torch.randn(n, k) / k**0.5).to(dtypes.base),
        "bias": torch.zeros(n, dtype=dtypes.base),
        "lora_A": (torch.randn(r, k) / k**0.5).to(dtypes.adapter),
        "lora_B": (torch.randn(n, r) / r**0.5).to(dtypes.adapter),
    }


def in_place_task(pass_name: str, change: Callable[[Tensor], object], before: Tensor) -> Task:
    """``change`` alters the weight that it is given, and gets one equal to ``before`` every time."""
    weight = before.clone()

    def results() -> Tensors:
        change(weight)
        return {"weight": weight}

    return Task({pass_name: lambda: change(weight)}, results, setup=lambda: weight.copy_(before))


def build_addmm(shape: WeightShape, t: Tensors) -> Task:
    return in_place_task(MERGE, lambda weight: weight.addmm_(t["lora_B"], t["lora_A"], alpha=SCALING), t["weight"])


def build_eager(shape: WeightShape, t: Tensors) -> Task:
    return in_place_task(MERGE, lambda weight: weight.add_(SCALING * (t["lora_B"] @ t["lora_A"])), t["weight"])


def build_ours(shape: WeightShape, t: Tensors) -> Task:
    return in_place_task(MERGE, lambda weight: lora_merge_(weight, t["lora_A"], t["lora_B"], SCALING), t["weight"])


def build_hf_peft(shape: WeightShape, t: Tensors) -> Task:
    layer = hf_peft_layer(frozen_linear(t | {"weight": t["weight"].clone()}), t["lora_A"], t["lora_B"])
    weight = layer.base_layer.weight.data

    def setup() -> None:
        if layer.merged:
            layer.unmerge()
        weight.copy_(t["weight"])

    def results() -> Tensors:
        layer.merge()
        return {"weight": weight}

    return Task({MERGE: layer.merge}, results, setup)


def oracle(shape: WeightShape, t: Tensors) -> Tensors:
    return {"weight": t["weight"] + SCALING * (t["lora_B"] @ t["lora_A"])}


def floor(shape: WeightShape, dtypes: Dtypes, pass_name: str) -> float:
    """Bytes of an element: W read and written, and one for the residual; addmm_ has no residual."""
    weight = 2 * dtypes.base.itemsize
    return (weight + 1) / weight


def work(shape: WeightShape, dtypes: Dtypes, pass_name: str) -> Work:
    """The weight read and written, and a byte of residual; the update's product."""
    n, k, r = shape.N, shape.K, shape.r
    return Work(n * k * (2 * dtypes.base.itemsize + 1) + r * (n + k) * dtypes.adapter.itemsize, 2 * n * k * r)


def target(shape: WeightShape, pass_name: str, ratios: Mapping[str, float]) -> float | None:
    """Never slower than the formula or PEFT."""
    return min((ratios[name] for name in ("eager", "hf_peft") if name in ratios), default=None)


def peak_target(shape: WeightShape, dtypes: Dtypes, peaks: Mapping[str, int]) -> int | None:
    """No more than PEFT."""
    return peaks.get("hf_peft")


DEFAULT = (
    WeightShape(768, 768, 8),
    WeightShape(2304, 768, 8),
    WeightShape(768, 768, 64),
    WeightShape(4096, 4096, 16),
)
SHAPES = {"default": DEFAULT, "quick": DEFAULT[:1], "cuda": DEFAULT[3:]}

BENCHMARK = Benchmark(
    op="lora_merge_",
    passes=(MERGE,),
    shape_type=WeightShape,
    shapes=SHAPES,
    make_tensors=make_tensors,
    implementations=(
        Implementation("addmm_", build_addmm, oracle),
        Implementation("eager", build_eager, oracle),
        Implementation("hf_peft", build_hf_peft, oracle, requires="peft"),
        Implementation("ours", build_ours, oracle),
    ),
    floor=floor,
    target=target,
    peak_target=peak_target,
    work=work,
)
