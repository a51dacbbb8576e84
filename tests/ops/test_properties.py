"""Arguments drawn at random, right ones and wrong ones: an op takes what its definition takes, and gives the same.

Where one argument is spoiled both refuse, or neither does. PEFT_EXT_EXAMPLES is how many problems each op gets.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_ext import ops, quantize_weight, reference
from peft_ext._loader import native_devices

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Largest error allowed, relative to the largest element of the float64 result or, below that, to 1.
TOLERANCE = {F64: 1e-11, F32: 1e-4, BF16: 4e-2, F16: 8e-3}
REFUSALS = (ValueError, TypeError)

Arguments = dict[str, Any]
EXAMPLES = int(os.environ.get("PEFT_EXT_EXAMPLES", "30"))
drawn = settings(
    derandomize=EXAMPLES <= 30,  # the same ones each time, where nobody looks for new ones
    phases=[Phase.generate],
    deadline=None,
    database=None,
    max_examples=EXAMPLES,
    suppress_health_check=list(HealthCheck),
)
lengths = st.sampled_from([1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 64, 70])
counts = st.sampled_from([0, 1, 2, 3, 7, 16, 33, 64, 65, 130, 300])
scales = st.sampled_from([1.0, 0.5, -0.3, 0.0])


class Problem:
    """Draws the arguments of one call."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32), label="seed"))

    def one_of(self, *options: Any) -> Any:
        return self.data.draw(st.sampled_from(options))

    def length(self) -> int:
        return self.data.draw(lengths)

    def leading(self) -> list[int]:
        """Sizes before the last one: a row, rows, or a batch of them."""
        count = self.data.draw(counts)
        return self.one_of([], [count], [count], [2, count], [1, count, 2])

    def values(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Normal values in one of the layouts that users have."""
        layout = self.one_of("rows", "rows", "rows", "transposed", "gaps", "every second", "offset", "expanded")
        random = lambda *sizes: torch.randn(*sizes, generator=self.generator).to(dtype)  # noqa: E731
        if layout == "transposed" and len(shape) > 1:
            return random(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
        if layout == "gaps" and shape:
            return random(*shape[:-1], shape[-1] + 3)[..., : shape[-1]]
        if layout == "every second" and shape:
            return random(*shape[:-1], 2 * shape[-1])[..., ::2]
        if layout == "offset":
            return random(math.prod(shape) + 1)[1:].view(shape)
        if layout == "expanded" and len(shape) > 1:
            return random(1, *shape[1:]).expand(shape)
        return random(*shape)

    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the input and of an adapter."""
        dtype = self.one_of(F32, F64, BF16, F16)
        return dtype, self.one_of(dtype, dtype, F32)

    def maybe(self, *shape: int, dtype: torch.dtype) -> Tensor | None:
        return self.values(*shape, dtype=dtype) if self.one_of(True, False) else None

    def dropout(self) -> Arguments:
        p = self.one_of(0.0, 0.0, 0.3, 1.0)
        return {"dropout_p": p, "seed": torch.tensor([self.data.draw(st.integers(-(2**63), 2**63 - 1))]) if p else None}

    def base(self, inputs: int, outputs: int, dtype: torch.dtype) -> Arguments:
        """x, a frozen weight, as it is or quantized, and its bias."""
        weight, scale = self.values(outputs, inputs, dtype=dtype), None
        if self.one_of(False, False, True):
            weight, scale = quantize_weight(weight, self.one_of("int8", "int4") if inputs % 32 == 0 else "int8")
        x = self.values(*self.leading(), inputs, dtype=dtype)
        return {"x": x, "weight": weight, "bias": self.maybe(outputs, dtype=dtype), "weight_scale": scale}


def lora_linear(draw: Problem) -> Arguments:
    dtype, factors = draw.dtypes()
    inputs, outputs, rank = draw.length(), draw.length(), draw.length()
    lora_A, lora_B = draw.values(rank, inputs, dtype=factors), draw.values(outputs, rank, dtype=factors)
    base = draw.base(inputs, outputs, dtype)
    return {**base, "lora_A": lora_A, "lora_B": lora_B, "scaling": draw.one_of(1.0, -0.3), **draw.dropout()}


def merged_lora_linear(draw: Problem) -> Arguments:
    dtype, factors = draw.dtypes()
    inputs, width, rank = draw.length(), draw.length(), draw.length()
    flags = draw.one_of([True], [True, False, True], [False, True])
    lora_A = draw.values(sum(flags) * rank, inputs, dtype=factors)
    lora_B = draw.values(sum(flags) * width, rank, dtype=factors)
    base = draw.base(inputs, len(flags) * width, dtype)
    return {**base, "lora_A": lora_A, "lora_B": lora_B, "enable_lora": flags, "scaling": 0.5, **draw.dropout()}


def multi_lora_linear(draw: Problem) -> Arguments:
    dtype, factors = draw.dtypes()
    inputs, outputs, ranks = draw.length(), draw.length(), draw.data.draw(st.lists(lengths, max_size=4))
    base, dropout = draw.base(inputs, outputs, dtype), draw.dropout()
    leading = base["x"].shape[:-1]
    rows = leading[: draw.one_of(len(leading), max(len(leading) - 1, 0))]
    return {
        **base,
        "lora_A": [draw.values(rank, inputs, dtype=factors) for rank in ranks],
        "lora_B": [draw.values(outputs, rank, dtype=factors) for rank in ranks],
        "scalings": torch.randn(len(ranks), generator=draw.generator),
        "index": torch.randint(-1, len(ranks), rows, generator=draw.generator),
        "dropout_p": [dropout["dropout_p"]] * len(ranks) if dropout["seed"] is not None else [],
        "seed": dropout["seed"],
    }


def kron_linear(draw: Problem) -> Arguments:
    dtype, factors = draw.dtypes()
    terms, a_in, a_out, b_in, b_out = draw.one_of(1, 2, 4), *(draw.one_of(1, 2, 3, 8, 17, 33) for _ in range(4))
    rank = draw.one_of(0, 0, 1, 2, 8)
    return {
        "x": draw.values(*draw.leading(), a_in * b_in, dtype=dtype),
        "A": draw.values(terms, a_in, a_out, dtype=factors),
        "B": draw.values(terms, b_in, rank or b_out, dtype=factors) / b_in,
        "t": draw.values(terms, rank, b_out, dtype=factors) if rank else None,
        "bias": draw.maybe(a_out * b_out, dtype=factors),
        "scaling": draw.data.draw(scales),
    }


def prefix_attention(draw: Problem) -> Arguments:
    dtype, prefix_dtype = draw.dtypes()
    prefix_dtype = F32 if dtype in (BF16, F16) and prefix_dtype == F32 else dtype
    batch, kv_heads, group = draw.one_of(0, 1, 2, 5), draw.one_of(1, 2, 3), draw.one_of(1, 1, 2, 4)
    queries, keys, prefix = (draw.data.draw(counts) for _ in range(3))
    heads, dim = kv_heads * group, draw.length()
    mask = draw.one_of(None, None, "bool", "float")
    shape = draw.one_of((batch, 1, queries, keys), (1, heads, queries, keys), (queries, keys), (batch, 1, 1, keys))
    attn_mask = None if mask is None else draw.values(*shape, dtype=dtype)
    return {
        "q": draw.values(batch, heads, queries, dim, dtype=dtype),
        "k": draw.values(batch, kv_heads, keys, dim, dtype=dtype),
        "v": draw.values(batch, kv_heads, keys, dim, dtype=dtype),
        "prefix_key": draw.values(prefix, kv_heads, dim, dtype=prefix_dtype),
        "prefix_value": draw.values(prefix, kv_heads, dim, dtype=prefix_dtype),
        "attn_mask": attn_mask if mask != "bool" else attn_mask > -0.5,
        "is_causal": draw.one_of(True, False),
        "scale": draw.one_of(0.2, -0.1),  # a softmax of one element leaves nothing of its gradient but rounding
        **draw.dropout(),
    }


def bottleneck_adapter(draw: Problem) -> Arguments:
    dtype, factors = draw.dtypes()
    features, width, norm = draw.length(), draw.length(), draw.one_of("none", "none", "pre", "post")
    return {
        "x": draw.values(*draw.leading(), features, dtype=dtype),
        "down_weight": draw.values(width, features, dtype=factors),
        "down_bias": draw.maybe(width, dtype=factors),
        "up_weight": draw.values(features, width, dtype=factors) / width,
        "up_bias": draw.maybe(features, dtype=factors),
        "norm_weight": None if norm == "none" else draw.values(features, dtype=factors),
        "norm_bias": None if norm == "none" else draw.values(features, dtype=factors),
        "activation": draw.one_of("gelu", "gelu_new", "silu", "tanh"),  # relu has a step: rounding chooses its side
        "norm": norm,
        "residual": draw.one_of(True, False),
        "scaling": draw.data.draw(scales),
        "eps": 1e-2,  # of one feature nothing but this is left
    }


def adapter_fusion(draw: Problem) -> Arguments:
    dtype, query_dtype = draw.dtypes()
    query_dtype = F32 if dtype in (BF16, F16) and query_dtype == F32 else dtype
    width, adapters, leading, projected = (
        draw.length(),
        draw.one_of(1, 2, 3, 9),
        draw.leading(),
        draw.one_of(True, False),
    )
    key_width = draw.length() if projected else width
    return {
        "query": draw.values(*draw.one_of([], leading), key_width, dtype=query_dtype),
        "outputs": [draw.values(*leading, width, dtype=dtype) for _ in range(adapters)],
        "key_weight": draw.values(key_width, width, dtype=query_dtype) / width if projected else None,
        "key_bias": draw.values(key_width, dtype=query_dtype) if projected and draw.one_of(True, False) else None,
        "scale": draw.one_of(1.0, 0.2),
    }


def quantized_linear(draw: Problem) -> Arguments:
    inputs, outputs = draw.length(), draw.length()
    dtype = draw.one_of(F32, F64, BF16, F16)
    weight, scale = quantize_weight(draw.values(outputs, inputs, dtype=F32), "int4" if inputs % 32 == 0 else "int8")
    x, bias = draw.values(*draw.leading(), inputs, dtype=dtype), draw.maybe(outputs, dtype=dtype)
    return {"x": x, "weight": weight, "weight_scale": scale, "bias": bias}


PROBLEMS: dict[str, Callable[[Problem], Arguments]] = {
    problem.__name__: problem
    for problem in (
        lora_linear,
        merged_lora_linear,
        multi_lora_linear,
        kron_linear,
        prefix_attention,
        bottleneck_adapter,
        adapter_fusion,
        quantized_linear,
    )
}
IN_PLACE = {"lora_merge_", "lora_unmerge_"}  # drawn beside their other tests
CONSTANT = {"weight", "weight_scale", "scalings", "attn_mask"}  # floating point, without a gradient


def mapped(arguments: Arguments, change: Callable[[str, Tensor], Tensor]) -> Arguments:
    def of(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [of(name, item) for item in value]
        return change(name, value) if isinstance(value, Tensor) else value

    return {name: of(name, value) for name, value in arguments.items()}


def tensors_of(arguments: Arguments) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    mapped(arguments, lambda name, tensor: found.append((name, tensor)) or tensor)
    return found


def solve(op: Callable[..., Any], arguments: Arguments, dtype: torch.dtype | None) -> list[Tensor]:
    """Results, and gradients by all that has one, optionally in another dtype throughout."""

    def prepare(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        wanted = F32 if name == "weight_scale" else dtype or tensor.dtype
        return tensor.detach().to(wanted).requires_grad_(name not in CONSTANT)

    given = mapped(arguments, prepare)
    results = op(**given)
    results = list(results) if isinstance(results, tuple) else [results]
    seeds = torch.Generator().manual_seed(1)
    grads = [torch.randn(r.shape, generator=seeds).to(BF16).to(r) for r in results]
    leaves = [tensor for _, tensor in tensors_of(given) if tensor.requires_grad]
    got = torch.autograd.grad(results, leaves, grads, allow_unused=True)
    kept = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, got, strict=True)]
    return [result.detach() for result in results] + kept


def outcome(op: Callable[..., Any], arguments: Arguments) -> Any:
    try:
        return op(**arguments)
    except REFUSALS as error:
        return type(error)


def test_every_op_is_drawn():
    assert set(ops.__all__) == PROBLEMS.keys() | IN_PLACE


@pytest.mark.parametrize("name", PROBLEMS)
@drawn
@given(data=st.data())
def test_right_arguments(name, data):
    arguments = PROBLEMS[name](Problem(data))
    got = solve(getattr(ops, name), arguments, None)
    wanted = solve(getattr(reference, name), arguments, F64)
    loosest = max(TOLERANCE[t.dtype] for _, t in tensors_of(arguments) if t.is_floating_point())
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        if one.numel():
            error = (one.double() - other).abs().max() / other.abs().max().clamp_min(1)
            assert error <= loosest, f"error {error:.1e} > {loosest:.1e}"  # fails for NaN too


def spoil(draw: Problem, arguments: Arguments) -> None:
    """Changes one argument to what is mostly wrong."""
    name = draw.one_of(*arguments)
    value = arguments[name]
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        arguments[name] = draw.one_of(value[:-1], [*value, value[0]], [spoiled(draw, value[0]), *value[1:]])
    elif isinstance(value, Tensor):
        arguments[name] = spoiled(draw, value)
    elif isinstance(value, float):
        arguments[name] = draw.one_of(math.nan, math.inf, -1.0, 1e300)
    elif isinstance(value, str):
        arguments[name] = "none such"
    elif value is None:
        arguments[name] = draw.one_of(torch.ones(1), torch.ones(3, 3), torch.ones(2, dtype=torch.int64))


def spoiled(draw: Problem, tensor: Tensor) -> Tensor:
    changes = [
        lambda: tensor.to(draw.one_of(torch.int32, torch.bool, F16, F64, torch.complex64)),
        lambda: torch.stack([tensor, tensor]),
        lambda: tensor.flatten()[: tensor.numel() // 2],
        lambda: tensor.new_zeros(0),
        lambda: tensor.new_zeros(()),
        lambda: tensor.to("meta"),
        lambda: torch.cat([tensor, tensor], -1) if tensor.dim() else tensor,
        lambda: tensor[..., :-1] if tensor.dim() else tensor,
        lambda: tensor[:-1] if tensor.dim() else tensor,
        lambda: tensor.transpose(0, -1) if tensor.dim() else tensor,
    ]
    return draw.one_of(*changes)()


@pytest.mark.parametrize("name", PROBLEMS)
@drawn
@given(data=st.data())
def test_wrong_arguments(name, data):
    draw = Problem(data)
    arguments = PROBLEMS[name](draw)
    spoil(draw, arguments)
    got, wanted = outcome(getattr(ops, name), arguments), outcome(getattr(reference, name), arguments)
    assert isinstance(got, type) == isinstance(wanted, type), f"op: {got}, definition: {wanted}"


class Backward(TorchDispatchMode):
    """Keeps the call of an op's own backward."""

    def __init__(self) -> None:
        super().__init__()
        self.op: Any = None
        self.arguments: Arguments = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "peft_ext" and func._opname.endswith("_backward"):
            names = [argument.name for argument in func._schema.arguments]
            self.op, self.arguments = func, dict(zip(names, args, strict=False)) | (kwargs or {})
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")
@pytest.mark.parametrize("name", PROBLEMS)
@drawn
@given(data=st.data())
def test_wrong_arguments_of_the_backward(name, data):
    """Its caller is the derivative, but an op is open to all: what it cannot take it refuses, and reads no further."""
    draw = Problem(data)
    with Backward() as backward:
        solve(getattr(ops, name), PROBLEMS[name](draw), None)
    spoil(draw, backward.arguments)
    outcome(backward.op, backward.arguments)
