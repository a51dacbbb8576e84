"""lora_unmerge_: takes s B A out of W again, by the ways of lora_merge_; ours gives back the very bits."""

from __future__ import annotations

from lora_linear import SCALING, frozen_linear, hf_peft_layer
from lora_merge_ import SHAPES, WeightShape, floor, in_place_task, make_tensors, peak_target, target, work
from registry import Benchmark, Implementation, Task, Tensors
from torch import Tensor

from peft_ext.ops import lora_merge_, lora_unmerge_

UNMERGE = "unmerge"


def merged(t: Tensors) -> Tensor:
    return t["weight"].addmm(t["lora_B"], t["lora_A"], alpha=SCALING)


def build_addmm(shape: WeightShape, t: Tensors) -> Task:
    return in_place_task(UNMERGE, lambda weight: weight.addmm_(t["lora_B"], t["lora_A"], alpha=-SCALING), merged(t))


def build_eager(shape: WeightShape, t: Tensors) -> Task:
    return in_place_task(UNMERGE, lambda weight: weight.sub_(SCALING * (t["lora_B"] @ t["lora_A"])), merged(t))


def build_ours(shape: WeightShape, t: Tensors) -> Task:
    before = t["weight"].clone()
    undo = lora_merge_(before, t["lora_A"], t["lora_B"], SCALING)
    return in_place_task(
        UNMERGE, lambda weight: lora_unmerge_(weight, t["lora_A"], t["lora_B"], *undo, SCALING), before
    )


def build_hf_peft(shape: WeightShape, t: Tensors) -> Task:
    layer = hf_peft_layer(frozen_linear(t | {"weight": t["weight"].clone()}), t["lora_A"], t["lora_B"])
    weight = layer.base_layer.weight.data

    def setup() -> None:
        if not layer.merged:
            weight.copy_(t["weight"])
            layer.merge()

    def results() -> Tensors:
        layer.unmerge()
        return {"weight": weight}

    return Task({UNMERGE: layer.unmerge}, results, setup)


def oracle(shape: WeightShape, t: Tensors) -> Tensors:
    return {"weight": t["weight"]}


BENCHMARK = Benchmark(
    op="lora_unmerge_",
    passes=(UNMERGE,),
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
