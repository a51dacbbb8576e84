"""What a benchmark is, and which there are.

A new op is one file beside this one that defines ``BENCHMARK``, and its name in ``OPS``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from math import inf
from typing import Any, TypeAlias

import torch
from torch import Tensor

OPS = (
    "adapter_fusion",
    "bottleneck_adapter",
    "kron_linear",
    "lora_linear",
    "lora_merge_",
    "lora_unmerge_",
    "merged_lora_linear",
    "multi_lora_linear",
    "prefix_attention",
    "quantized_linear",
)

BENCHMARKS = (*OPS, "e2e_minilm", "e2e_smollm2")
"""Those of ops, and of what is made of them."""

FORWARD = "forward"
TRAINING = "forward+backward"
INFERENCE = "inference"

STEP = "step"
"""A training step of a whole model."""
DECODE = "decode"
"""Tokens generated for a batch."""

GRAPH = "inference graph"
TRAINING_GRAPH = "forward+backward graph"
GRAPHS = {GRAPH: INFERENCE, TRAINING_GRAPH: TRAINING}
"""On a CUDA device: replays of a captured pass, so without what the host takes to start its kernels."""

WITHOUT_GRAD = frozenset({INFERENCE, GRAPH, DECODE})
"""Passes that run under ``no_grad``."""

LAYER_PASSES = (FORWARD, TRAINING, INFERENCE)

FLOAT_TYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Tensors: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem. An op subclasses it; its fields are what reports show."""

    @classmethod
    def header(cls) -> str:
        return ",".join(field.name for field in fields(cls))

    @property
    def label(self) -> str:
        return ",".join(f"{value:g}" for value in astuple(self))

    @property
    def dropout_p(self) -> float:
        return getattr(self, "dropout", 0.0)

    def without_dropout(self) -> Shape:
        changes: dict[str, Any] = {"dropout": 0.0} if self.dropout_p else {}
        return replace(self, **changes)


@dataclass(frozen=True)
class Dtypes:
    """Types of the frozen base (and of activations) and of the adapter."""

    base: torch.dtype
    adapter: torch.dtype

    @classmethod
    def parse(cls, text: str) -> Dtypes:
        """``"bfloat16"``, or ``"bfloat16+float32"`` where the adapter has a type of its own."""
        types = [FLOAT_TYPES.get(name) for name in text.split("+")]
        base, adapter = types[0], types[-1]
        if len(types) > 2 or base is None or adapter is None:
            raise ValueError(f"dtype: got {text!r}, want one of {', '.join(FLOAT_TYPES)}, or BASE+ADAPTER of them")
        return cls(base, adapter)

    def __str__(self) -> str:
        base, adapter = (str(t).removeprefix("torch.") for t in (self.base, self.adapter))
        return base if base == adapter else f"{base}+{adapter}"


@dataclass(frozen=True)
class Task:
    """One implementation on one problem, ready to be called.

    Args:
        passes: what is timed, by name; an implementation may lack some of the yardstick's.
        results: everything that is compared with the oracle, by name.
        setup: runs untimed before every call that is timed or checked (to restore what it changed).
    """

    passes: Mapping[str, Callable[[], object]]
    results: Callable[[], Tensors]
    setup: Callable[[], object] | None = None


@dataclass(frozen=True)
class Work:
    """The least that a pass has to do: each input read and each result written once."""

    bytes: int
    flops: int = 0  # of matrix products


@dataclass(frozen=True)
class Implementation:
    """A way to compute the op.

    Args:
        name: as reports show it.
        build: makes the task; the tensors it gets are shared by all implementations.
        oracle: the right results, from float64 tensors.
        oracle_dropout: whether it draws the oracle's dropout mask under the same manual seed, and so
            can be checked with dropout on.
        requires: package without which the implementation is left out.
        environment: variable that names an interpreter, without which it is left out.
        handles: whether it computes problems of that shape.
        default: False for what runs only on request.
        peer: whether it computes what ours does, as the frozen layer does not.
        capturable: whether a CUDA graph can be captured of its passes: no copy from the host.
    """

    name: str
    build: Callable[[Any, Tensors], Task]
    oracle: Callable[[Any, Tensors], Tensors]
    oracle_dropout: bool = False
    requires: str | None = None
    environment: str | None = None
    handles: Callable[[Any], bool] = lambda shape: True
    default: bool = True
    peer: bool = True
    capturable: bool = True

    @property
    def missing(self) -> str | None:
        """What it would need to run."""
        if self.requires and importlib.util.find_spec(self.requires) is None:
            return f"the package {self.requires}"
        if self.environment and not os.environ.get(self.environment):
            return f"an interpreter in {self.environment}"
        return None


@dataclass(frozen=True)
class Benchmark:
    """Everything ``run.py`` needs to know about an op.

    Args:
        op: its name.
        passes: what its tasks can be timed at, in the order of reports.
        shape_type: the subclass of Shape that ``--shape`` builds.
        shapes: by set: "default", "quick" and, if there are such, "grid" and those of a CUDA device: "cuda",
            "cuda float32" and, for ``--compile``, "cuda compiled".
        make_tensors: the problem's tensors from the global generator; float64 ones must do.
        implementations: the first is the yardstick that ratios refer to; one is called "ours", and
            others of ours begin with that.
        floor: the lowest ratio that counted FLOPs or bytes allow, for (shape, dtypes, pass).
        target: the ratio that ours has to reach, from (shape, pass, ratios by implementation); None where
            the implementations that it refers to did not run.
        peak_target: likewise of peak memory, from (shape, dtypes, bytes by implementation).
        work: what ours has to do at least, from (shape, dtypes, pass).
        most_seconds: of a pass, where the usual rounds would take too long.
        rounding: how many times the differences of one layer are allowed: errors add up over a whole model.
    """

    op: str
    passes: Sequence[str]
    shape_type: type[Shape]
    shapes: Mapping[str, Sequence[Shape]]
    make_tensors: Callable[[Any, Dtypes], Tensors]
    implementations: Sequence[Implementation]
    floor: Callable[[Any, Dtypes, str], float]
    target: Callable[[Any, str, Mapping[str, float]], float | None]
    peak_target: Callable[[Any, Dtypes, Mapping[str, int]], int | None]
    work: Callable[[Any, Dtypes, str], Work] | None = None
    rounding: float = 1.0
    most_seconds: float = inf

    @property
    def yardstick(self) -> str:
        return self.implementations[0].name


def load(op: str) -> Benchmark:
    if op not in BENCHMARKS:
        raise ValueError(f"op: got {op!r}, want one of {', '.join(BENCHMARKS)}")
    return importlib.import_module(op).BENCHMARK


def training_task(
    layer: Callable[[Tensor], Tensor], parameters: Mapping[str, Tensor], x: Tensor, grad_y: Tensor, *, dropout: bool
) -> Task:
    """Task of a differentiable layer.

    Its passes: forward with its graph; forward + backward to x and ``parameters``; and inference,
    left out where there is ``dropout``, which inference has none of.
    """
    x = x.detach().requires_grad_()
    leaves = [x, *parameters.values()]

    def forward() -> Tensor:
        return layer(x)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), leaves, grad_y)

    def results() -> Tensors:
        y = layer(x)
        gradients = torch.autograd.grad(y, leaves, grad_y)
        names = [f"gradient of {name}" for name in ["x", *parameters]]
        found = {"y": y.detach(), **dict(zip(names, gradients, strict=True))}
        if not dropout:
            with torch.no_grad():
                found["y in inference"] = layer(x)
        return found

    passes: dict[str, Callable[[], object]] = {FORWARD: forward, TRAINING: forward_backward}
    if not dropout:
        passes[INFERENCE] = forward
    return Task(passes, results)
