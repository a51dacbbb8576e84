"""Every op in the autograd graph: what csrc/autograd/node.h does for all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd

from peft_ext import ops
from peft_ext._loader import native_devices

from .test_schemas import PUBLIC

pytestmark = pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")

NO_DERIVATIVE = {"lora_merge_", "lora_unmerge_"}
NAMES = sorted(set(PUBLIC) - NO_DERIVATIVE)

Case = tuple[Callable[..., "Tensor | tuple[Tensor, ...]"], tuple[Tensor, ...]]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def lora_linear() -> Case:
    weight = random(6, 8)
    tensors = (random(5, 8), random(6), random(2, 8), random(6, 2))
    return lambda x, bias, a, b: ops.lora_linear(x, weight, bias, a, b, 0.5), tensors


def merged_lora_linear() -> Case:
    weight = random(6, 8)
    tensors = (random(5, 8), random(6), random(4, 8), random(4, 2))
    return lambda x, bias, a, b: ops.merged_lora_linear(x, weight, bias, a, b, [True, False, True], 0.5), tensors


def multi_lora_linear() -> Case:
    weight, scalings, index = random(6, 8), torch.tensor([0.5, 2.0]), torch.tensor([0, 1, -1, 0, 1])

    def call(x: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
        return ops.multi_lora_linear(x, weight, bias, factors[:2], factors[2:], scalings, index)

    return call, (random(5, 8), random(6), random(2, 8), random(3, 8), random(6, 2), random(6, 3))


def kron_linear() -> Case:
    tensors = (random(5, 6), random(2, 3, 2), random(2, 2, 3), random(6))
    return lambda x, a, b, bias: ops.kron_linear(x, a, b, bias=bias, scaling=0.5), tensors


def bottleneck_adapter() -> Case:
    tensors = (random(5, 8), random(3, 8), random(3), random(8, 3), random(8), random(8), random(8))
    return lambda *all: ops.bottleneck_adapter(*all, activation="gelu", norm="pre"), tensors


def adapter_fusion() -> Case:
    tensors = (random(5, 8), random(8, 8), random(8), random(5, 8), random(5, 8))
    return lambda query, key, bias, *outputs: ops.adapter_fusion(query, outputs, key, bias), tensors


def prefix_attention() -> Case:
    tensors = (*(random(1, 2, 5, 4) for _ in "qkv"), *(random(3, 2, 4) for _ in "kv"))
    return lambda *all: ops.prefix_attention(*all, is_causal=True), tensors


def quantized_linear() -> Case:
    weight, scale = torch.randint(-127, 128, (6, 8), dtype=torch.int8), torch.rand(6, 1)
    return lambda x, bias: ops.quantized_linear(x, weight, scale, bias), (random(5, 8), random(6))


@pytest.fixture(params=NAMES)
def case(request, device) -> Case:
    with torch.device(device):
        call, tensors = globals()[request.param]()
    return call, tuple(tensor.requires_grad_() for tensor in tensors)


# The gradients of quantized_linear take nothing of its inputs.
saves_inputs = pytest.mark.parametrize("case", [name for name in NAMES if name != "quantized_linear"], indirect=True)


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def loss(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    results = (result,) if isinstance(result, Tensor) else result
    return sum((tensor.square().sum() for tensor in results), torch.tensor(0.0))


def test_name_in_the_graph(case):
    call, tensors = case
    assert first(call(*tensors)).grad_fn.name().endswith("Backward")


def test_compiled_autograd(case):
    """The backward of an eager forward as one graph, used again for other values and compiled anew for other needs."""
    call, tensors = case
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    for needs_first in (True, True, False):
        inputs = [tensor.detach().normal_().requires_grad_(needs_first or i > 0) for i, tensor in enumerate(tensors)]
        expected = torch.autograd.grad(loss(call(*inputs)), [t for t in inputs if t.requires_grad], allow_unused=True)
        value = loss(call(*inputs))
        with compiled_autograd._enable(torch.compile(backend=compiler, fullgraph=True)):
            value.backward()
        torch.testing.assert_close([t.grad for t in inputs if t.requires_grad], list(expected))
    assert len(graphs) == 2


def test_functional_gradient(case):
    """torch.func.grad, which torch.autograd.Function in C++ does not allow."""
    call, tensors = case
    detached = [tensor.detach() for tensor in tensors]
    found = torch.func.grad(lambda *inputs: loss(call(*inputs)), argnums=tuple(range(len(tensors))))(*detached)
    torch.testing.assert_close(found, torch.autograd.grad(loss(call(*tensors)), tensors))


@pytest.mark.parametrize("batched", ["first", "all"])
def test_per_sample_gradients(case, batched):
    """vmap over grad: each sample's gradient is that of the sample alone."""
    call, tensors = case
    samples = 3
    many = [tensor.detach().repeat(samples, *[1] * tensor.dim()) for tensor in tensors]
    for tensor in many:
        tensor.add_(torch.randn_like(tensor), alpha=0.1)
    in_dims = tuple(0 if batched == "all" or i == 0 else None for i in range(len(tensors)))
    inputs = [tensor if dim == 0 else tensor[0] for tensor, dim in zip(many, in_dims, strict=True)]
    grad = torch.func.grad(lambda *some: loss(call(*some)), argnums=tuple(range(len(tensors))))
    found = torch.vmap(grad, in_dims=in_dims)(*inputs)
    for i in range(samples):
        alone = grad(*(tensor[i] if dim == 0 else tensor for tensor, dim in zip(inputs, in_dims, strict=True)))
        torch.testing.assert_close([part[i] for part in found], list(alone))


def test_vmap_over_nothing_is_an_error(case):
    call, tensors = case
    nothing = tensors[0].detach()[None][:0]
    with pytest.raises(ValueError, match="dimension of size 0"):
        torch.vmap(lambda first_one: call(first_one, *tensors[1:]))(nothing)


def test_no_gradient_arrives(case):
    class Ends(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    call, tensors = case
    grads = torch.autograd.grad(Ends.apply(first(call(*tensors))).sum(), tensors, allow_unused=True)
    assert grads == (None,) * len(tensors)


def test_saved_tensors_can_be_packed(case):
    """As activation offloading does."""
    call, tensors = case
    expected = torch.autograd.grad(loss(call(*tensors)), tensors)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(call(*tensors))
    assert packed
    torch.testing.assert_close(torch.autograd.grad(value, tensors), expected, rtol=0, atol=0)


def test_backward_twice(case):
    call, tensors = case
    y = first(call(*tensors)).sum()
    expected = torch.autograd.grad(y, tensors, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, tensors), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y, tensors)


@saves_inputs
def test_saved_tensor_was_changed(case):
    call, tensors = case
    y = first(call(*tensors)).sum()
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@saves_inputs
def test_graph_is_freed(case):
    """Results that are saved refer to no node: it would own itself."""
    call, tensors = case
    x = tensors[0].clone()
    alive = weakref.ref(x)
    y = call(x, *tensors[1:])
    del x
    assert alive() is not None
    del y
    assert alive() is None
