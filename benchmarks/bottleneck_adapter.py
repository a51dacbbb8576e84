"""bottleneck_adapter: the module that tutorials have, torch.compile of it, and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

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

from peft_ext import reference
from peft_ext.nn import SimpleAdapter

PARAMETERS = ("down_weight", "down_bias", "up_weight", "up_bias")


@dataclass(frozen=True)
class BottleneckShape(Shape):
    """x [M, d], bottleneck k."""

    M: int
    d: int
    k: int


class EagerAdapter(nn.Module):
    """The module as tutorials have it."""

    def __init__(self, hidden_dim: int, bottleneck_dim: int) -> None:
        super().__init__()
        self.down_proj = nn.Linear(hidden_dim, bottleneck_dim)
        self.relu = nn.ReLU()
        self.up_proj = nn.Linear(bottleneck_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up_proj(self.relu(self.down_proj(x)))


def make_tensors(shape: BottleneckShape, dtypes: Dtypes) -> Tensors:
    m, d, k = shape.M, shape.d, shape.k
    stream = {"x": torch.randn(m, d), "grad_y": torch.randn(m, d)}
    adapter = {
        "down_weight": torch.randn(k, d) / d**0.5,
        "down_bias": torch.randn(k),
        "up_weight": torch.randn(d, k) / k**0.5,
        "up_bias": torch.randn(d),
    }
    return {name: t.to(dtypes.base) for name, t in stream.items()} | {
        name: t.to(dtypes.adapter) for name, t in adapter.items()
    }


def layer_task(t: Tensors, layer: Callable[[Tensor], Tensor], parameters: Mapping[str, Tensor]) -> Task:
    return training_task(layer, parameters, t["x"], t["grad_y"], dropout=False)


def with_parameters(module: nn.Module, t: Tensors) -> dict[str, Tensor]:
    """Gives the module the problem's own tensors, and returns them by name."""
    parameters = {name: nn.Parameter(t[name]) for name in PARAMETERS}
    for name, parameter in parameters.items():
        layer, _, kind = name.partition("_")
        setattr(getattr(module, f"{layer}_proj"), kind, parameter)
    return dict(parameters)


def build_eager(shape: BottleneckShape, t: Tensors) -> Task:
    module = EagerAdapter(shape.d, shape.k)
    return layer_task(t, module, with_parameters(module, t))


def build_compiled(shape: BottleneckShape, t: Tensors) -> Task:
    torch.compiler.reset()  # else shapes compiled before count as recompilations, which are limited
    module = EagerAdapter(shape.d, shape.k)
    parameters = with_parameters(module, t)
    return layer_task(t, torch.compile(module), parameters)


def build_ours(shape: BottleneckShape, t: Tensors) -> Task:
    module = SimpleAdapter(shape.d, shape.k)
    return layer_task(t, module, with_parameters(module, t))


def oracle(shape: BottleneckShape, t: Tensors) -> Tensors:
    parameters: dict[str, Tensor] = {name: nn.Parameter(t[name]) for name in PARAMETERS}

    def layer(x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = parameters.values()
        return reference.bottleneck_adapter(x, down, down_bias, up, up_bias)

    return layer_task(t, layer, parameters).results()


def floor(shape: BottleneckShape, dtypes: Dtypes, pass_name: str) -> float:
    """Eager has every product that is needed: the FLOPs are the same, and what can be saved is traffic and calls."""
    return 1.0


def work(shape: BottleneckShape, dtypes: Dtypes, pass_name: str) -> Work:
    """x in and y out, both weights and biases; the backward has their gradients, and reads x once more."""
    m, d, k = shape.M, shape.d, shape.k
    rows, weights = m * d * dtypes.base.itemsize, (2 * d * k + d + k) * dtypes.adapter.itemsize
    forward = Work(2 * rows + weights, 4 * m * d * k)
    return Work(5 * rows + 3 * weights, 3 * forward.flops) if pass_name == TRAINING else forward


def target(shape: BottleneckShape, pass_name: str, ratios: Mapping[str, float]) -> float | None:
    """1.3 times as fast as eager forwards, 1.2 times with the backward."""
    return 1 / (1.2 if pass_name == TRAINING else 1.3)


def peak_target(shape: BottleneckShape, dtypes: Dtypes, peaks: Mapping[str, int]) -> int | None:
    """No more than eager."""
    return peaks.get("eager")


BENCHMARK = Benchmark(
    op="bottleneck_adapter",
    passes=LAYER_PASSES,
    shape_type=BottleneckShape,
    shapes={
        "default": tuple(BottleneckShape(m, 768, 64) for m in (32, 512, 4096)),
        "quick": (BottleneckShape(32, 768, 64), BottleneckShape(512, 768, 64)),
        "cuda": tuple(BottleneckShape(m, 768, 64) for m in (32, 512, 4096)),
        "cuda compiled": (BottleneckShape(4096, 768, 64),),
        "grid": tuple(
            BottleneckShape(m, d, k)
            for m, d, k in product((1, 8, 32, 128, 512, 2048), (64, 256, 768, 1024, 4096), (8, 48, 64, 256))
            if k < d
        ),
    },
    make_tensors=make_tensors,
    implementations=(
        Implementation("eager", build_eager, oracle),
        Implementation("ours", build_ours, oracle),
        Implementation("compiled", build_compiled, oracle, default=False, capturable=False),
    ),
    floor=floor,
    target=target,
    peak_target=peak_target,
    work=work,
)
