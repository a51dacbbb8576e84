"""adapter_fusion: the eager modules that people write (one learned query; AdapterHub's formula), and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from registry import (
    FORWARD,
    INFERENCE,
    LAYER_PASSES,
    TRAINING,
    Benchmark,
    Dtypes,
    Implementation,
    Shape,
    Task,
    Tensors,
    Work,
)
from torch import Tensor, nn

from peft_ext.nn import AdapterFusion, AttentionFusion

SPEED_UP = 2.0  # what ours has to reach against the eager module


@dataclass(frozen=True)
class FusionShape(Shape):
    """N outputs [M, D]; paper: 0 for one learned query, 1 for a query a row and a value projection."""

    N: int
    M: int
    D: int
    paper: int = 0


class EagerFusion(nn.Module):
    """One learned query: the outputs are stacked, and all of them projected."""

    def __init__(self, hidden_dim: int, num_adapters: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(hidden_dim))
        self.key_proj = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(outputs), dim=1)
        keys = self.key_proj(stacked)
        scores = self.query.view(1, 1, -1) @ keys.transpose(-2, -1) / keys.size(-1) ** 0.5
        return (scores.softmax(dim=-1) @ stacked).sum(dim=1)


class EagerAttentionFusion(nn.Module):
    """The paper's form as AdapterHub computes it: keys and values of all outputs."""

    def __init__(self, hidden_dim: int, num_adapters: int) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_dim, hidden_dim)
        self.key = nn.Linear(hidden_dim, hidden_dim)
        self.value = nn.Linear(hidden_dim, hidden_dim, bias=False)

    def forward(self, x: Tensor, outputs: Sequence[Tensor], residual: Tensor) -> Tensor:
        stacked = torch.stack(list(outputs), dim=1)
        keys, values = self.key(stacked), self.value(stacked)
        scores = (self.query(x).unsqueeze(1) @ keys.transpose(-2, -1)).squeeze(1)
        return residual + (scores.softmax(dim=-1).unsqueeze(1) @ values).squeeze(1)


def make_tensors(shape: FusionShape, dtypes: Dtypes) -> Tensors:
    """The parameters by the modules' names, the adapters' outputs, x and y's gradient."""
    n, m, d = shape.N, shape.M, shape.D
    linear = torch.randn(d, d) / d**0.5
    if shape.paper:
        tensors = {"query.weight": torch.randn(d, d) / d, "query.bias": torch.randn(d) / d**0.5}
        tensors |= {"key.weight": linear, "key.bias": torch.randn(d)}
        tensors |= {"value.weight": torch.eye(d) + 1e-3 * torch.randn(d, d)}
    else:
        tensors = {"query": torch.randn(d), "key_proj.weight": linear, "key_proj.bias": torch.randn(d)}
    tensors |= {"x": torch.randn(m, d), "grad_y": torch.randn(m, d)}
    tensors |= {f"output {i}": torch.randn(m, d) for i in range(n)}
    return {name: tensor.to(dtypes.base) for name, tensor in tensors.items()}


def fusion_task(
    shape: FusionShape, t: Tensors, kinds: Sequence[Callable[[int, int], nn.Module]], compiled: bool = False
) -> Task:
    """Passes of the module of the shape's form; the adapters' outputs are constants, as frozen adapters' are."""
    module = kinds[shape.paper](shape.D, shape.N).to(t["x"].dtype)
    parameters = dict(module.named_parameters())
    module.load_state_dict({name: t[name] for name in parameters})
    # the gradient of the key's bias is zero, and rounding in the eager formula
    trained = {name: p for name, p in parameters.items() if name not in ("key_proj.bias", "key.bias")}
    outputs = [tensor for name, tensor in t.items() if name.startswith("output")]
    arguments = (t["x"], outputs, t["x"]) if shape.paper else (outputs,)
    layer = torch.compile(module, fullgraph=True) if compiled else module

    def forward() -> Tensor:
        return layer(*arguments)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(*arguments), list(trained.values()), t["grad_y"])

    def inference() -> Tensor:
        with torch.no_grad():
            return layer(*arguments)

    def results() -> Tensors:
        gradients = dict(zip([f"gradient of {name}" for name in trained], forward_backward(), strict=True))
        return {"y": forward().detach(), "y in inference": inference(), **gradients}

    return Task({FORWARD: forward, TRAINING: forward_backward, INFERENCE: inference}, results)


def build_eager(shape: FusionShape, t: Tensors) -> Task:
    return fusion_task(shape, t, (EagerFusion, EagerAttentionFusion))


def build_compiled(shape: FusionShape, t: Tensors) -> Task:
    torch._dynamo.reset()
    return fusion_task(shape, t, (EagerFusion, EagerAttentionFusion), compiled=True)


def build_ours(shape: FusionShape, t: Tensors) -> Task:
    return fusion_task(shape, t, (AdapterFusion, AttentionFusion))


def oracle(shape: FusionShape, t: Tensors) -> Tensors:
    return build_eager(shape, t).results()


def floor(shape: FusionShape, dtypes: Dtypes, pass_name: str) -> float:
    """Multiply-adds, the projections folded: to the eager module's, which projects all N outputs."""
    n, m, d = shape.N, shape.M, shape.D
    mix = 2 * n * m * d
    rows = m if shape.paper else 1
    # forward: query, folded key and value, or the folded key. backward: their weights' gradients, and those that
    # value and key pass on; the adapters' outputs are constants, which neither needs a gradient of
    ours_forward, ours_backward = (3, 5) if shape.paper else (1, 2)
    eager_forward = eager_backward = 1 + 2 * n if shape.paper else n
    ours, eager = ours_forward * rows * d * d + mix, eager_forward * m * d * d + mix
    if pass_name == TRAINING:
        ours, eager = ours + ours_backward * rows * d * d + mix, eager + eager_backward * m * d * d + mix
    return ours / eager


def work(shape: FusionShape, dtypes: Dtypes, pass_name: str) -> Work:
    """All outputs in, the mix out; with the paper's form also x, the residual and the products of floor."""
    n, m, d = shape.N, shape.M, shape.D
    rows, weights, products = n + 1, 1, 0
    if shape.paper:
        rows, weights, products = n + 3, 3, 3
    if pass_name == TRAINING:
        rows, weights, products = 2 * rows, 3 * weights, products + 5 * shape.paper
    return Work((rows * m * d + weights * d * d) * dtypes.base.itemsize, 2 * products * m * d * d)


def target(shape: FusionShape, pass_name: str, ratios: Mapping[str, float]) -> float | None:
    return 1 / SPEED_UP


def peak_target(shape: FusionShape, dtypes: Dtypes, peaks: Mapping[str, int]) -> int | None:
    """Less than the eager module."""
    return peaks["eager"]


DEFAULT = (*(FusionShape(n, m, d, paper) for paper, (m, d), n in product((0, 1), ((512, 768), (32, 64)), (3, 8, 16))),)
SHAPES = {
    "default": DEFAULT,
    "quick": (FusionShape(3, 512, 768), FusionShape(3, 32, 64)),
    "cuda": (FusionShape(3, 4096, 768), FusionShape(8, 4096, 768), FusionShape(8, 4096, 768, 1)),
    "cuda float32": (FusionShape(8, 4096, 768),),
    "cuda compiled": (FusionShape(8, 4096, 768),),
    "grid": tuple(
        FusionShape(n, m, d, paper)
        for paper, n, m, d in product((0, 1), (1, 2, 3, 8, 16), (1, 32, 512), (16, 64, 256, 768))
    ),
}

BENCHMARK = Benchmark(
    op="adapter_fusion",
    passes=LAYER_PASSES,
    shape_type=FusionShape,
    shapes=SHAPES,
    make_tensors=make_tensors,
    implementations=(
        Implementation("eager", build_eager, oracle),
        Implementation("compiled", build_compiled, oracle, default=False, capturable=False),
        Implementation("ours", build_ours, oracle),
    ),
    floor=floor,
    target=target,
    peak_target=peak_target,
    work=work,
)
