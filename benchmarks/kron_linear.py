"""kron_linear: the materialised product of AdapterHub's PHM layer, Hugging Face PEFT's LoKr layer, and ours."""

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

from peft_ext import ops, reference

GRID_MULTIPLY_ADDS = 2**32  # most that the materialised product may have, to keep the grid to minutes


@dataclass(frozen=True)
class KronShape(Shape):
    """x [M, a_in b_in], A [n, a_in, a_out], B [n, b_in, b_out] of rank r (0: dense)."""

    M: int
    n: int
    a_in: int
    a_out: int
    b_in: int
    b_out: int
    r: int

    @property
    def width(self) -> tuple[int, int]:
        return self.a_in * self.b_in, self.a_out * self.b_out


def make_tensors(shape: KronShape, dtypes: Dtypes) -> Tensors:
    inputs, outputs = shape.width
    tensors = {
        "x": torch.randn(shape.M, inputs).to(dtypes.base),
        "grad_y": torch.randn(shape.M, outputs).to(dtypes.base),
        "A": torch.randn(shape.n, shape.a_in, shape.a_out).to(dtypes.adapter),
        "B": torch.randn(shape.n, shape.b_in, shape.r or shape.b_out).to(dtypes.adapter),
        "bias": torch.randn(outputs).to(dtypes.adapter),
    }
    if shape.r:
        tensors["t"] = torch.randn(shape.n, shape.r, shape.b_out).to(dtypes.adapter)
    return tensors


Layer = Callable[..., Tensor]


def task(t: Tensors, layer: Layer) -> Task:
    names = [name for name in t if name not in ("x", "grad_y")]
    parameters: dict[str, Tensor] = {name: nn.Parameter(t[name]) for name in names}

    def call(x: Tensor) -> Tensor:
        return layer(x, parameters["A"], parameters["B"], parameters.get("t"), parameters["bias"])

    return training_task(call, parameters, t["x"], t["grad_y"], dropout=False)


def materialised(x: Tensor, A: Tensor, B: Tensor, t: Tensor | None, bias: Tensor) -> Tensor:
    """As AdapterHub's PHM layer: the Kronecker product of every term, their sum, then one product with x."""
    right = B if t is None else torch.bmm(B, t)
    terms = torch.einsum("bac,bkp->bakcp", A, right).reshape(len(A), A.size(1) * right.size(1), -1)
    return torch.matmul(x, terms.sum(0)) + bias


def lokr_names(t: Tensors) -> dict[str, str]:
    """LoKr's names of our factors, each the transpose of ours: w1 = Aᵀ; w2 = Bᵀ, or w2_a w2_b = tᵀ sᵀ."""
    return {"lokr_w1": "A"} | ({"lokr_w2_a": "t", "lokr_w2_b": "B"} if "t" in t else {"lokr_w2": "B"})


def lokr_task(t: Tensors, make_layer: Callable[[list[dict[str, Tensor]]], Callable[[Tensor, Tensor], Tensor]]) -> Task:
    """Of the layer(x, bias) that ``make_layer`` makes of the terms' factors in LoKr's layout."""
    # cloned: torch.kron fails where a factor of one column keeps the stride that it had as a row
    terms: list[dict[str, Tensor]] = [
        {
            lokr_name: nn.Parameter(t[name][i].T.clone(memory_format=torch.contiguous_format))
            for lokr_name, name in lokr_names(t).items()
        }
        for i in range(len(t["A"]))
    ]
    layer, bias = make_layer(terms), nn.Parameter(t["bias"])
    parameters = {f"{name}.{i}": factor for i, term in enumerate(terms) for name, factor in term.items()}
    return training_task(lambda x: layer(x, bias), parameters | {"bias": bias}, t["x"], t["grad_y"], dropout=False)


def hf_peft_layer(inputs: int, outputs: int, term: Mapping[str, Tensor]) -> Any:
    """The layer that PEFT itself puts into a model, with these factors; its base is never applied."""
    from peft import LoKrConfig, get_peft_model

    base = nn.Linear(inputs, outputs, device="meta")
    base.weight = nn.Parameter(torch.empty(()).expand(outputs, inputs), requires_grad=False)
    rank = len(term["lokr_w2_b"]) if "lokr_w2_b" in term else max(inputs, outputs)
    model: Any = get_peft_model(nn.Sequential(base), LoKrConfig(r=rank, alpha=rank, target_modules=["0"]))
    layer = model.base_model.model[0]
    for name, factor in term.items():
        getattr(layer, name)["default"] = factor
    return layer


def build_hf_peft(shape: KronShape, t: Tensors) -> Task:
    """x Wᵀ + b where W is the weight that PEFT's layer makes in every call; with n terms, the sum of n layers'."""

    def make_layer(terms: list[dict[str, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
        layers = [hf_peft_layer(*shape.width, term) for term in terms]

        def layer(x: Tensor, bias: Tensor) -> Tensor:
            first, *others = (layer.get_delta_weight("default") for layer in layers)
            return nn.functional.linear(x, sum(others, start=first), bias)

        return layer

    return lokr_task(t, make_layer)


def lokr_oracle(shape: KronShape, t: Tensors) -> Tensors:
    def make_layer(terms: list[dict[str, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
        factors = {
            name: torch.stack([term[lokr_name].T for term in terms]) for lokr_name, name in lokr_names(t).items()
        }
        return lambda x, bias: reference.kron_linear(x, factors["A"], factors["B"], factors.get("t"), bias)

    return lokr_task(t, make_layer).results()


def build_compiled(shape: KronShape, t: Tensors) -> Task:
    torch.compiler.reset()
    return task(t, torch.compile(materialised))


def oracle(shape: KronShape, t: Tensors) -> Tensors:
    return task(t, reference.kron_linear).results()


def orders(shape: KronShape) -> list[int]:
    """Multiply-adds of the orders: the wide factor first or last, the product formed, and through the rank."""
    inputs, outputs = shape.width
    m, n, r = shape.M, shape.n, shape.r
    mix = n * shape.a_in * shape.a_out
    form = n * shape.b_in * r * shape.b_out
    found = [
        form + m * (inputs * n * shape.b_out + mix * shape.b_out),
        form + m * (mix * shape.b_in + outputs * n * shape.b_in),
        form + n * inputs * outputs + m * inputs * outputs,
    ]
    if r:
        found.append(m * (n * r * (inputs + outputs) + mix * r))
    return found


def floor(shape: KronShape, dtypes: Dtypes, pass_name: str) -> float:
    """Multiply-adds of the cheapest order, over those of forming and applying the product; likewise backward."""
    return min(orders(shape)) / orders(shape)[2]


def work(shape: KronShape, dtypes: Dtypes, pass_name: str) -> Work:
    """Rows in and out, the factors, and the cheapest order; the backward has their gradients, and reads x once more."""
    inputs, outputs = shape.width
    right = shape.b_in * shape.r + shape.r * shape.b_out if shape.r else shape.b_in * shape.b_out
    factors = shape.n * (shape.a_in * shape.a_out + right) * dtypes.adapter.itemsize
    rows = shape.M * (inputs + outputs) * dtypes.base.itemsize
    forward = Work(rows + factors, 2 * min(orders(shape)))
    if pass_name != TRAINING:
        return forward
    return Work(2 * forward.bytes + factors + shape.M * inputs * dtypes.base.itemsize, 3 * forward.flops)


def target(shape: KronShape, pass_name: str, ratios: Mapping[str, float]) -> float | None:
    """A half at Compacter's widths, an eighth at 768 with rank 8, a twentieth at 4096; never slower anywhere."""
    if not shape.r or shape.n == 1:
        return 1.0
    return {768 + 24: 1 / 2, 2 * 768: 1 / 8, 2 * 4096: 1 / 20}.get(sum(shape.width), 1.0)


def peak_target(shape: KronShape, dtypes: Dtypes, peaks: Mapping[str, int]) -> int | None:
    """No more than the materialised product."""
    return peaks.get("eager")


COMPACTER = ((4, 4, 4, 192, 6, 1), (4, 4, 4, 6, 192, 1), (4, 4, 4, 192, 192, 8), (8, 8, 8, 512, 512, 8))
LOKR = ((1, 24, 24, 32, 32, 8), (1, 24, 24, 32, 32, 0), (1, 16, 16, 48, 48, 8), (1, 16, 16, 48, 48, 0))
REFERENCE_TEXT = ((1, 8, 64, 96, 1, 0), (1, 64, 8, 1, 96, 0))
DENSE = ((4, 4, 4, 192, 6, 0), (4, 4, 4, 6, 192, 0))

DEFAULT = tuple(KronShape(512, *factors) for factors in COMPACTER + LOKR + REFERENCE_TEXT + DENSE)
GRID = tuple(
    KronShape(m, *factors)
    for m, factors in product((1, 8, 32, 128, 512, 2048, 4096), COMPACTER + LOKR + REFERENCE_TEXT + DENSE)
    if m * factors[1] * factors[2] * factors[3] * factors[4] <= GRID_MULTIPLY_ADDS
)

BENCHMARK = Benchmark(
    op="kron_linear",
    passes=LAYER_PASSES,
    shape_type=KronShape,
    shapes={
        "default": DEFAULT,
        "quick": DEFAULT[:2],
        "grid": GRID,
        "cuda": (KronShape(4096, *COMPACTER[3]), KronShape(4096, *COMPACTER[0])),
        "cuda compiled": (KronShape(4096, *COMPACTER[0]),),
    },
    make_tensors=make_tensors,
    implementations=(
        Implementation("eager", lambda shape, t: task(t, materialised), oracle),
        Implementation("hf_peft", build_hf_peft, lokr_oracle, requires="peft"),
        Implementation("ours", lambda shape, t: task(t, ops.kron_linear), oracle),
        Implementation("compiled", build_compiled, oracle, default=False, capturable=False),
    ),
    floor=floor,
    target=target,
    peak_target=peak_target,
    work=work,
)
