"""multi_lora_linear: several adapters in one batch, against Hugging Face PEFT's mixed batch (`adapter_names`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lora_linear import SCALING, build_frozen, frozen_linear, frozen_oracle, layer_task, peak_below
from registry import LAYER_PASSES, TRAINING, Benchmark, Dtypes, Implementation, Shape, Task, Tensors, Work
from torch import Tensor, nn
from torch.nn import functional as F

from peft_ext import ops, reference
from peft_ext.ops._dropout import draw_seed


@dataclass(frozen=True)
class MixedShape(Shape):
    """x [B, T, K], weight [N, K], n adapters of rank r: sequence i uses adapter i modulo n."""

    B: int
    T: int
    K: int
    N: int
    n: int
    r: int
    dropout: float = 0.0

    @property
    def M(self) -> int:
        return self.B * self.T

    @property
    def index(self) -> Tensor:
        return torch.arange(self.B) % self.n


def make_tensors(shape: MixedShape, dtypes: Dtypes) -> Tensors:
    k, n, r = shape.K, shape.N, shape.r
    base = {
        "x": torch.randn(shape.B, shape.T, k),
        "weight": torch.randn(n, k) / k**0.5,
        "bias": torch.randn(n),
        "grad_y": torch.randn(shape.B, shape.T, n),
    }
    adapters = {f"lora_A {i}": torch.randn(r, k) / k**0.5 for i in range(shape.n)}
    adapters |= {f"lora_B {i}": torch.randn(n, r) / r**0.5 for i in range(shape.n)}
    return {name: t.to(dtypes.base) for name, t in base.items()} | {
        name: t.to(dtypes.adapter) for name, t in adapters.items()
    }


def factors(t: Tensors, which: str) -> list[nn.Parameter]:
    """The A or the B of all adapters."""
    return [nn.Parameter(tensor) for name, tensor in t.items() if name.startswith(f"lora_{which}")]


def mixed_task(shape: MixedShape, t: Tensors, layer: Any, lora_A: list[Any], lora_B: list[Any]) -> Task:
    parameters = {f"lora_A {i}": a for i, a in enumerate(lora_A)} | {f"lora_B {i}": b for i, b in enumerate(lora_B)}
    return layer_task(shape, t, layer, **parameters)


def build_eager(shape: MixedShape, t: Tensors) -> Task:
    """The factors stacked, each sequence's own gathered, and batched products: for adapters of one rank."""
    linear, lora_A, lora_B, index = frozen_linear(t), factors(t, "A"), factors(t, "B"), shape.index

    def layer(x: Tensor) -> Tensor:
        dropped = F.dropout(x, shape.dropout).to(lora_A[0].dtype)
        hidden = dropped @ torch.stack(list(lora_A))[index].mT
        return linear(x) + (SCALING * (hidden @ torch.stack(list(lora_B))[index].mT)).to(x.dtype)

    return mixed_task(shape, t, layer, lora_A, lora_B)


def build_hf_peft(shape: MixedShape, t: Tensors) -> Task:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=shape.r,
        lora_alpha=SCALING * shape.r,
        lora_dropout=shape.dropout,
        target_modules=["0"],
        init_lora_weights=False,
    )
    model: Any = get_peft_model(nn.Sequential(frozen_linear(t)), config, adapter_name="0")
    for i in range(1, shape.n):
        model.add_adapter(str(i), config)
    peft_layer = model.base_model.model[0].train()
    lora_A, lora_B = factors(t, "A"), factors(t, "B")
    for i, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        peft_layer.lora_A[str(i)].weight, peft_layer.lora_B[str(i)].weight = a, b
    names = [str(i) for i in shape.index.tolist()]

    def layer(x: Tensor) -> Tensor:
        return peft_layer(x, adapter_names=names)

    return mixed_task(shape, t, layer, lora_A, lora_B)


def build_ours(shape: MixedShape, t: Tensors) -> Task:
    lora_A, lora_B = factors(t, "A"), factors(t, "B")
    scalings, index = torch.full((shape.n,), float(SCALING)), shape.index
    dropout_p = [shape.dropout] * shape.n if shape.dropout else None

    def layer(x: Tensor) -> Tensor:
        return ops.multi_lora_linear(x, t["weight"], t["bias"], lora_A, lora_B, scalings, index, dropout_p=dropout_p)

    return mixed_task(shape, t, layer, lora_A, lora_B)


def oracle(shape: MixedShape, t: Tensors) -> Tensors:
    lora_A, lora_B = factors(t, "A"), factors(t, "B")
    scalings, index = torch.full((shape.n,), float(SCALING)), shape.index
    dropout_p = [shape.dropout] * shape.n if shape.dropout else []
    seed = draw_seed(t["x"]) if shape.dropout else None

    def layer(x: Tensor) -> Tensor:
        return reference.multi_lora_linear(x, t["weight"], t["bias"], lora_A, lora_B, scalings, index, dropout_p, seed)

    return mixed_task(shape, t, layer, lora_A, lora_B).results()


def floor(shape: MixedShape, dtypes: Dtypes, pass_name: str) -> float:
    """FLOPs, as for lora_linear: each row passes one branch, however many adapters there are.

    With a row or two of each adapter, reading the factors takes longer than these: n r (K + N) elements, which no row
    shares with another.
    """
    frozen, skinny = shape.M * shape.K * shape.N, shape.M * shape.r * (shape.K + shape.N)
    return 1 + 3 * skinny / (2 * frozen) if pass_name == TRAINING else 1 + skinny / frozen


def work(shape: MixedShape, dtypes: Dtypes, pass_name: str) -> Work:
    """As lora_linear's, with the factors of the adapters that rows use."""
    k, n = shape.K, shape.N
    factors_read = min(shape.n, shape.B) * shape.r * (k + n) * dtypes.adapter.itemsize
    forward = (shape.M * (k + n) + k * n + n) * dtypes.base.itemsize + factors_read
    products = 2 * shape.M * k * n * floor(shape, dtypes, pass_name)
    if pass_name != TRAINING:
        return Work(forward, int(products))
    return Work(2 * forward + shape.M * k * dtypes.base.itemsize, int(2 * products))


def target(shape: MixedShape, pass_name: str, ratios: Mapping[str, float]) -> float | None:
    """Serving: 1.35 of the frozen layer, 1.15 from 4096 features on. Training: half of PEFT's overhead.

    Neither slower than PEFT's mixed batch or the stacked formula.
    """
    limits = [ratios[name] for name in ("eager", "hf_peft") if name in ratios]
    if pass_name == TRAINING and "hf_peft" in ratios:
        limits.append(1 + 0.5 * (ratios["hf_peft"] - 1))
    if pass_name != TRAINING and shape.T == 1:
        limits.append(1.35 if shape.K < 4096 else 1.15)
    return min(limits, default=None)


def peak_target(shape: MixedShape, dtypes: Dtypes, peaks: Mapping[str, int]) -> int | None:
    """No more than PEFT, and with dropout a copy of x less."""
    return peak_below(peaks.get("hf_peft"), shape, dtypes)


DEFAULT = (
    *(MixedShape(32, 1, 768, 768, n, 8) for n in (1, 8, 32)),
    *(MixedShape(64, 1, 768, 768, n, 8) for n in (1, 8, 32, 64)),
    *(MixedShape(32, 1, 4096, 4096, n, 8) for n in (1, 32)),
    *(MixedShape(32, 48, 768, 768, n, 8) for n in (1, 8, 32)),
    MixedShape(32, 48, 768, 768, 8, 8, 0.1),
)

BENCHMARK = Benchmark(
    op="multi_lora_linear",
    passes=LAYER_PASSES,
    shape_type=MixedShape,
    shapes={
        "default": DEFAULT,
        "quick": (DEFAULT[2], DEFAULT[-3]),
        "cuda": (MixedShape(64, 1, 4096, 4096, 64, 16), MixedShape(32, 1, 768, 768, 32, 8)),
    },
    make_tensors=make_tensors,
    implementations=(
        Implementation("frozen", build_frozen, frozen_oracle, peer=False),
        Implementation("eager", build_eager, oracle),
        Implementation("hf_peft", build_hf_peft, oracle, requires="peft", capturable=False),  # copies names
        Implementation("ours", build_ours, oracle, oracle_dropout=True),
    ),
    floor=floor,
    target=target,
    peak_target=peak_target,
    work=work,
)
