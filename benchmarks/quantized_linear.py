"""quantized_linear: the frozen float layer, the weight dequantized in every call, torch's int8 kernel, and ours.

All compute with the weight that the quantized values stand for, so that their results can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from lora_linear import SCALING, frozen_linear, layer_task
from registry import INFERENCE, LAYER_PASSES, TRAINING, Benchmark, Dtypes, Implementation, Shape, Task, Tensors, Work
from torch import Tensor, nn
from torch.nn import functional as F

from peft_ext import dequantize_weight, quantize_weight, reference
from peft_ext.nn import LoRALinear, QuantizedLinear

FEW_ROWS = 16
SMALLER_THAN_FROZEN = 1 / 1.8
"""What a decoding step on int8 may take of the float layer's time."""


@dataclass(frozen=True)
class QuantizedShape(Shape):
    """x [M, K], weight [N, K] of values of so many bits, LoRA of rank r around it (0: none)."""

    M: int
    K: int
    N: int
    bits: int
    r: int = 0


def make_tensors(shape: QuantizedShape, dtypes: Dtypes) -> Tensors:
    m, k, n, r = shape.M, shape.K, shape.N, shape.r
    values, scale = quantize_weight(torch.randn(n, k) / k**0.5, f"int{shape.bits}")
    base = {"x": torch.randn(m, k), "weight": dequantize_weight(values, scale), "bias": torch.randn(n)}
    adapter = {"lora_A": torch.randn(r, k) / k**0.5, "lora_B": torch.randn(n, r)} if r else {}
    floats = {name: t.to(dtypes.base) for name, t in (base | {"grad_y": torch.randn(m, n)}).items()}
    return floats | {name: t.to(dtypes.adapter) for name, t in adapter.items()} | {"values": values, "scale": scale}


def factors(shape: QuantizedShape, t: Tensors) -> dict[str, Tensor]:
    return {name: nn.Parameter(t[name]) for name in ("lora_A", "lora_B")} if shape.r else {}


def build_frozen(shape: QuantizedShape, t: Tensors) -> Task:
    return layer_task(shape, t, frozen_linear(t))


def build_eager(shape: QuantizedShape, t: Tensors) -> Task:
    parameters = factors(shape, t)

    def layer(x: Tensor) -> Tensor:
        y = F.linear(x, dequantize_weight(t["values"], t["scale"], x.dtype), t["bias"])
        return y + SCALING * ((x @ parameters["lora_A"].T) @ parameters["lora_B"].T) if parameters else y

    return layer_task(shape, t, layer, **parameters)


def build_torch(shape: QuantizedShape, t: Tensors) -> Task:
    scale = t["scale"].squeeze(1).to(t["x"].dtype)

    def call() -> Tensor:
        with torch.no_grad():
            return torch._weight_int8pack_mm(t["x"], t["values"], scale) + t["bias"]

    return Task({INFERENCE: call}, lambda: {"y": call()})


def build_ours(shape: QuantizedShape, t: Tensors) -> Task:
    base = QuantizedLinear(shape.K, shape.N, dtype=f"int{shape.bits}", device="meta")
    base.weight = nn.Parameter(t["values"], requires_grad=False)
    base.weight_scale = nn.Parameter(t["scale"], requires_grad=False)
    base.bias = nn.Parameter(t["bias"], requires_grad=False)
    if not shape.r:
        return layer_task(shape, t, base)
    layer = LoRALinear(base, shape.r, SCALING * shape.r, adapter_dtype=t["lora_A"].dtype)
    layer.lora_A, layer.lora_B = nn.Parameter(t["lora_A"]), nn.Parameter(t["lora_B"])
    return layer_task(shape, t, layer, lora_A=layer.lora_A, lora_B=layer.lora_B)


def frozen_oracle(shape: QuantizedShape, t: Tensors) -> Tensors:
    return layer_task(shape, t, lambda x: F.linear(x, t["weight"], t["bias"])).results()


def oracle(shape: QuantizedShape, t: Tensors) -> Tensors:
    if not shape.r:
        return frozen_oracle(shape, t)
    parameters = factors(shape, t)

    def layer(x: Tensor) -> Tensor:
        return reference.lora_linear(x, t["weight"], t["bias"], parameters["lora_A"], parameters["lora_B"], SCALING)

    return layer_task(shape, t, layer, **parameters).results()


def inference_oracle(shape: QuantizedShape, t: Tensors) -> Tensors:
    return {"y": F.linear(t["x"], t["weight"], t["bias"])}


def floor(shape: QuantizedShape, dtypes: Dtypes, pass_name: str) -> float:
    """Bytes of the weight where there is one row, which is all that time goes into; else the products, the same."""
    return shape.bits / (8 * dtypes.base.itemsize) if shape.M == 1 else 1.0


def work(shape: QuantizedShape, dtypes: Dtypes, pass_name: str) -> Work:
    """Values, rows in and out, and the products; the backward reads the values again, and the gradient."""
    m, k, n, r = shape.M, shape.K, shape.N, shape.r
    rows = (m * k + n + m * n) * dtypes.base.itemsize
    forward = k * n * shape.bits // 8 + rows + r * (k + n) * dtypes.adapter.itemsize
    products = 2 * m * (k * n + r * (k + n))
    if pass_name != TRAINING:
        return Work(forward, products)
    return Work(2 * forward + m * k * dtypes.base.itemsize, 2 * products + 2 * m * r * (k + n))


def target(shape: QuantizedShape, pass_name: str, ratios: Mapping[str, float]) -> float | None:
    """Decoding on int8 1.8 times as fast as on floats; never slower than dequantizing first, or torch's kernel."""
    limits = [ratios[name] for name in ("eager", "torch") if name in ratios]
    if shape.M <= FEW_ROWS and shape.bits == 8 and shape.r == 0 and pass_name == INFERENCE:
        limits.append(SMALLER_THAN_FROZEN)
    return min(limits, default=None)


def peak_target(shape: QuantizedShape, dtypes: Dtypes, peaks: Mapping[str, int]) -> int | None:
    """No whole weight in floats."""
    return peaks.get("eager")


DEFAULT = (
    *(QuantizedShape(m, 4096, 4096, 8) for m in (1, 4, 16, 512)),
    *(QuantizedShape(m, 4096, 4096, 4) for m in (1, 4, 16, 512)),
    QuantizedShape(1, 4096, 4096, 8, 16),
    QuantizedShape(512, 4096, 4096, 4, 16),
    QuantizedShape(1, 576, 1536, 8),
)

BENCHMARK = Benchmark(
    op="quantized_linear",
    passes=LAYER_PASSES,
    shape_type=QuantizedShape,
    shapes={
        "default": DEFAULT,
        "quick": (QuantizedShape(1, 768, 768, 8), QuantizedShape(64, 768, 768, 4, 8)),
        "cuda": DEFAULT[:3],
    },
    make_tensors=make_tensors,
    implementations=(
        Implementation("frozen", build_frozen, frozen_oracle, peer=False),
        Implementation("eager", build_eager, oracle),
        Implementation(
            "torch",
            build_torch,
            inference_oracle,
            handles=lambda shape: shape.bits == 8 and shape.r == 0 and shape.M <= FEW_ROWS,
        ),
        Implementation("ours", build_ours, oracle),
    ),
    floor=floor,
    target=target,
    peak_target=peak_target,
    work=work,
)
