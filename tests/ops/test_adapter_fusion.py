from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from peft_ext import ops, reference
from peft_ext._loader import native_devices

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Largest error allowed, relative to the largest element of the float64 result.
TOLERANCE = {F64: 1e-13, F32: 4e-6, BF16: 3e-2, F16: 3e-3}
DTYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
# (rows, adapters, width): odd sizes, every tail of the vector loops, enough rows for many chunks.
SIZES = [(1, 1, 1), (3, 2, 17), (33, 3, 33), (5, 17, 96), (300, 3, 40), (2500, 2, 7)]

native = pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")


@dataclass
class Problem:
    """Arguments of adapter_fusion, and what comes out of it."""

    rows: tuple[int, ...] = (5,)
    adapters: int = 3
    width: int = 16
    dtype: torch.dtype = F32
    query_dtype: torch.dtype | None = None
    row_queries: bool = False
    key: bool = True
    key_width: int | None = None
    scale: float = 0.3
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        def random(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
            return torch.randn(*shape, device=self.device).to(dtype or self.query_dtype or self.dtype)

        key_width = (self.key_width or self.width) if self.key else self.width
        lead = self.rows if self.row_queries else ()
        self.outputs = [random(*self.rows, self.width, dtype=self.dtype) for _ in range(self.adapters)]
        self.query = random(*lead, key_width)
        self.key_weight = random(key_width, self.width) / self.width**0.5 if self.key else None
        self.key_bias = random(key_width) if self.key else None

    def tensors(self) -> dict[str, Tensor]:
        named = {"query": self.query, "key_weight": self.key_weight, "key_bias": self.key_bias}
        named |= {f"output {i}": output for i, output in enumerate(self.outputs)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def call(self, op, tensors):
        outputs = [tensor for name, tensor in tensors.items() if name.startswith("output")]
        return op(tensors["query"], outputs, tensors.get("key_weight"), tensors.get("key_bias"), self.scale)

    def solve(self, op, dtype=None, needs=None, results=("mix", "weights")) -> dict[str, Tensor]:
        """Results and gradients by name, with everything cast to ``dtype`` first."""
        needs = tuple(self.tensors()) if needs is None else needs
        tensors = {
            name: tensor.to(dtype or tensor.dtype).detach().requires_grad_(name in needs)
            for name, tensor in self.tensors().items()
        }
        found = dict(zip(("mix", "weights"), self.call(op, tensors), strict=True))
        generator = torch.Generator().manual_seed(3)
        grads = {
            name: torch.randn(value.shape, generator=generator).to(self.dtype).to(value)
            for name, value in found.items()
        }
        leaves = [tensors[name] for name in needs]
        gradients = (
            torch.autograd.grad([found[name] for name in results], leaves, [grads[name] for name in results])
            if needs
            else []
        )
        return {name: value.detach() for name, value in found.items()} | dict(zip(needs, gradients, strict=True))

    def check(self, **options) -> None:
        """The op against its oracle in float64."""
        got = self.solve(ops.adapter_fusion, **options)
        wanted = self.solve(reference.adapter_fusion, F64, **options)
        tolerance = max(TOLERANCE[self.dtype], TOLERANCE[self.query_dtype or self.dtype])
        assert got.keys() == wanted.keys()
        largest = max((value.abs().max().item() for name, value in wanted.items() if value.numel()), default=1.0)
        for name, value in got.items():
            assert value.shape == wanted[name].shape, name
            if name == "weights":
                assert value.dtype == (F64 if self.dtype == F64 else F32)
            else:
                assert value.dtype == (self.dtype if name == "mix" else self.tensors()[name].dtype), name
            if name == "key_bias":
                assert not value.any(), "the softmax does not see the bias"
            elif value.numel():
                # One adapter: the query's gradient is zero, and only rounding is left of it.
                scale = wanted[name].abs().max().clamp_min(1e-30) if self.adapters > 1 else largest
                error = ((value.double() - wanted[name]).abs().max() / scale).item()
                assert error <= tolerance, f"{name}: error {error:.1e} > {tolerance:.1e}"


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("row_queries", [False, True], ids=["one query", "a query a row"])
@pytest.mark.parametrize("key", [False, True], ids=["folded", "key"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "query_dtype"), DTYPES, ids=str)
def test_matches_float64(device, dtype, query_dtype, size, key, row_queries):
    rows, adapters, width = size
    Problem(
        rows=(rows,),
        adapters=adapters,
        width=width,
        dtype=dtype,
        query_dtype=query_dtype,
        key=key,
        row_queries=row_queries,
        device=device,
    ).check()


@pytest.mark.parametrize("rows", [(), (0,), (4, 0), (2, 3, 4), (1, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("row_queries", [False, True])
def test_leading_dimensions(device, rows, row_queries):
    Problem(rows=rows, row_queries=row_queries, device=device).check()


def test_outputs_without_width(device):
    mix, weights = ops.adapter_fusion(torch.empty(0, device=device), torch.empty(4, 3, 0, device=device))
    assert mix.shape == (3, 0)
    assert torch.equal(weights, torch.full((3, 4), 0.25, device=device))


@pytest.mark.parametrize("row_queries", [False, True])
def test_key_of_another_width(device, row_queries):
    Problem(key_width=5, row_queries=row_queries, device=device).check()


@pytest.mark.parametrize("results", [("mix",), ("weights",)], ids=str)
@pytest.mark.parametrize("row_queries", [False, True])
def test_gradient_of_one_result_alone(device, results, row_queries):
    Problem(row_queries=row_queries, device=device).check(results=results)


@pytest.mark.parametrize("row_queries", [False, True])
def test_non_contiguous_arguments(device, row_queries):
    problem = Problem(rows=(3, 4), row_queries=row_queries, device=device)

    def strided(tensor):
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]

    problem.outputs = [strided(output) for output in problem.outputs]
    problem.query, problem.key_weight = strided(problem.query), strided(problem.key_weight)
    problem.check()


@pytest.mark.parametrize("rows", [(1,), (5,), (3, 4)], ids=str)
def test_expanded_query(device, rows):
    """A query a row that lies once in memory: each row has its own gradient."""
    problem = Problem(rows=rows, key=False, device=device)
    problem.query = problem.query.expand(*rows, problem.width)
    found = []
    for op, dtype in ((ops.adapter_fusion, F32), (reference.adapter_fusion, F64)):
        query = problem.query.to(dtype).requires_grad_()
        mix, weights = op(query, [output.to(dtype) for output in problem.outputs], scale=problem.scale)
        found.append((mix, weights, *torch.autograd.grad(mix.square().sum(), query)))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted.float())


def test_expanded_gradient(device):
    problem = Problem(device=device)
    found = []
    for op in (ops.adapter_fusion, reference.adapter_fusion):
        query = problem.query.clone().requires_grad_()
        op(query, problem.outputs)[0].sum().backward()
        found.append(query.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_stacked_outputs(device, dim):
    """One tensor, whatever its order, gives what the list gives, and its gradient arrives in it."""
    problem = Problem(rows=(4, 6), device=device)
    stacked = torch.stack(problem.outputs, dim=dim).requires_grad_()
    parts = stacked if dim == 0 else stacked.unbind(dim)
    mix, weights = ops.adapter_fusion(problem.query, parts)
    listed, listed_weights = ops.adapter_fusion(problem.query, problem.outputs)
    assert torch.equal(mix, listed)
    assert torch.equal(weights, listed_weights)
    mix.sum().backward()
    assert stacked.grad.shape == stacked.shape


@native
@pytest.mark.parametrize("dim", [0, 1])
def test_outputs_are_not_copied(dim):
    """All that a call allocates is its results: neither stacked outputs nor keys."""
    rows, adapters, width = 64, 8, 256
    stacked = torch.randn(adapters, rows, width).transpose(0, dim).contiguous()
    query = torch.randn(width)
    with torch.profiler.profile(profile_memory=True) as profiler:
        ops.adapter_fusion(query, stacked.unbind(dim))
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiler.key_averages())
    assert 0 < allocated <= 4 * rows * (width + adapters) + 1024


@pytest.mark.parametrize("row_queries", [False, True])
def test_gradcheck(device, row_queries):
    problem = Problem(rows=(40,), width=5, dtype=F64, key_width=4, row_queries=row_queries, device=device)
    names = list(problem.tensors())
    inputs = tuple(tensor.requires_grad_() for tensor in problem.tensors().values())
    assert torch.autograd.gradcheck(
        lambda *tensors: problem.call(ops.adapter_fusion, dict(zip(names, tensors, strict=True))), inputs
    )


@native
def test_double_backward_is_an_explicit_error():
    problem = Problem()
    query = problem.query.requires_grad_()
    mix, _ = problem.call(ops.adapter_fusion, problem.tensors())
    (grad,) = torch.autograd.grad(mix.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        grad.sum().backward()


NAMES = ("query", "key_weight", "key_bias", "output 0", "output 1")


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("needs", [s for n in range(6) for s in itertools.combinations(NAMES, n)], ids=str)
@pytest.mark.parametrize("row_queries", [False, True])
def test_every_subset_of_gradients(device, needs, row_queries):
    problem = Problem(rows=(70,), adapters=2, row_queries=row_queries, device=device)
    everything = problem.solve(ops.adapter_fusion)
    some = problem.solve(ops.adapter_fusion, needs=needs)
    assert set(some) == {"mix", "weights", *needs}
    for name, value in some.items():
        assert torch.equal(value, everything[name]), name


@native
def test_opcheck():
    for options in ({}, {"row_queries": True}, {"key": False}, {"rows": (2, 3)}, {"dtype": BF16, "query_dtype": F32}):
        problem = Problem(**options)
        tensors = [
            t if t is None else t.requires_grad_() for t in (problem.query, problem.key_weight, problem.key_bias)
        ]
        outputs = [output.requires_grad_() for output in problem.outputs]
        opcheck(torch.ops.peft_ext.adapter_fusion, (tensors[0], outputs, *tensors[1:], 0.5))
        detached = [output.detach() for output in outputs]
        mix, weights, folded = torch.ops.peft_ext.adapter_fusion(
            tensors[0].detach(), detached, *(t if t is None else t.detach() for t in tensors[1:]), 0.5
        )
        query = folded if problem.key else tensors[0].detach()
        for needs_query, needs, with_mix in itertools.product([False, True], repeat=3):
            gradients = (mix if with_mix else None, weights)
            opcheck(
                torch.ops.peft_ext.adapter_fusion_backward,
                (*gradients, query, detached, weights, 0.5, needs_query, [needs, False, needs]),
                test_utils=("test_schema", "test_faketensor"),
            )


@native
@pytest.mark.parametrize("row_queries", [False, True])
def test_saves_only_what_is_meant(row_queries):
    """The arguments, the folded query and the weights: neither keys nor stacked outputs."""
    problem = Problem(rows=(20,), row_queries=row_queries)
    for tensor in problem.tensors().values():
        tensor.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        problem.call(ops.adapter_fusion, problem.tensors())
    arguments = {tensor.data_ptr() for tensor in problem.tensors().values()}
    others = [tensor for tensor in saved if tensor.data_ptr() not in arguments]
    assert sorted(t.shape for t in others) == sorted([problem.query.shape, torch.Size((20, 3))])


@pytest.mark.parametrize("rows", [130, 3000])
@pytest.mark.parametrize("row_queries", [False, True])
def test_same_bits_at_any_thread_count(device, rows, row_queries, two_threads):
    problem = Problem(rows=(rows,), width=40, key=False, row_queries=row_queries, device=device)
    two = problem.solve(ops.adapter_fusion)
    torch.set_num_threads(1)
    one = problem.solve(ops.adapter_fusion)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(dtype, device):
    """As matrix products: the mix in the autocast dtype; the weights and the parameters' gradients stay float32."""
    problem = Problem(rows=(40,), device=device)
    with torch.autocast(device.type, dtype=dtype):
        got = problem.solve(ops.adapter_fusion)
    wanted = problem.solve(reference.adapter_fusion, F64)
    assert got["mix"].dtype == dtype
    for name, value in got.items():
        if name != "mix":
            assert value.dtype == F32, name
        if name != "key_bias":
            error = (value.double() - wanted[name]).abs().max() / wanted[name].abs().max()
            assert error < {BF16: 4e-2, F16: 5e-3}[dtype], name


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_of_the_reference_is_the_ops(dtype, same_roundings, device):
    problem = Problem(rows=(40,), key=False, device=device)
    with torch.autocast(device.type, dtype=dtype):
        got, wanted = problem.solve(reference.adapter_fusion), problem.solve(ops.adapter_fusion)
    assert {name: value.dtype for name, value in got.items()} == {name: value.dtype for name, value in wanted.items()}
    same_roundings(got["mix"], wanted["mix"])
    torch.testing.assert_close(got["weights"], wanted["weights"])


def test_autocast_of_the_reference_only_casts(device):
    problem = Problem(rows=(40,), device=device)
    with torch.autocast(device.type, dtype=BF16):
        got = problem.solve(reference.adapter_fusion)
    wanted = problem.solve(reference.adapter_fusion, BF16)
    for name in ("mix", "weights"):
        assert torch.equal(got[name], wanted[name]), name


@native
@pytest.mark.parametrize("row_queries", [False, True])
def test_compile_has_one_graph_for_all_sizes(row_queries):
    torch._dynamo.reset()

    def layer(query, key_weight, key_bias, *outputs):
        mix, weights = ops.adapter_fusion(query, outputs, key_weight, key_bias, 0.5)
        return mix.sin().sum() + weights.square().sum()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 17, 500):
        problem = Problem(rows=(rows,), row_queries=row_queries)
        leaves = [tensor.requires_grad_() for tensor in problem.tensors().values()]
        with torch.compiler.set_stance("default" if rows == 3 else "fail_on_recompile"):
            got = compiled(*leaves)
        wanted = layer(*leaves)
        torch.testing.assert_close(got, wanted)
        for one, other in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves), strict=True):
            torch.testing.assert_close(one, other)


@native
def test_meta_tensors():
    outputs = [torch.empty(2, 3, 8, device="meta") for _ in range(4)]
    mix, weights = ops.adapter_fusion(torch.empty(8, device="meta"), outputs)
    assert (mix.shape, weights.shape) == ((2, 3, 8), (2, 3, 4))


def test_extreme_logits():
    """The largest logit is subtracted first, so that no exponential overflows."""
    outputs = [torch.full((1, 4), value) for value in (1e4, 0.0, -1e4)]
    mix, weights = ops.adapter_fusion(torch.ones(4), outputs)
    assert torch.equal(weights, torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.equal(mix, outputs[0])


def replaced(outputs, index, tensor):
    return [*outputs[:index], tensor, *outputs[index + 1 :]]


FINE = [torch.ones(2, 16) for _ in range(3)]
BAD = {
    "no outputs": ({"outputs": []}, ValueError, "outputs must hold the output of at least one adapter"),
    "unequal width": (
        {"outputs": replaced(FINE, 1, torch.ones(2, 15))},
        ValueError,
        r"outputs must have one shape, but outputs\[0\] has \[2, 16\] and outputs\[1\] \[2, 15\]",
    ),
    "unequal rows": ({"outputs": replaced(FINE, 2, torch.ones(3, 16))}, ValueError, r"outputs\[2\] \[3, 16\]"),
    "unequal dtype": ({"outputs": replaced(FINE, 2, torch.ones(2, 16, dtype=F64))}, TypeError, "must have one dtype"),
    "integers": ({"outputs": [torch.ones(2, 16, dtype=torch.int64)]}, TypeError, "outputs must be float32"),
    "scalars": ({"outputs": [torch.tensor(1.0)]}, ValueError, r"outputs must be \[\.\.\., width\]"),
    "query: width": ({"query": torch.ones(15)}, ValueError, r"query must be \[\.\.\., 16\].*without key_weight"),
    "query: rows": ({"query": torch.ones(3, 16)}, ValueError, "or have the leading sizes of outputs"),
    "query: scalar": ({"query": torch.tensor(1.0)}, ValueError, "query must be"),
    "query: dtype": ({"query": torch.ones(16, dtype=F64)}, TypeError, "query is .*but outputs is"),
    "key: shape": ({"key_weight": torch.ones(15, 16)}, ValueError, r"key_weight must be \[16, 16\]"),
    "key: vector": ({"key_weight": torch.ones(16)}, ValueError, r"key_weight must be \[16, 16\]"),
    "key: dtype": ({"key_weight": torch.ones(16, 16, dtype=F64)}, TypeError, "key_weight is .*but query is"),
    "bias: shape": ({"key_bias": torch.ones(15)}, ValueError, r"key_bias must be \[16\]"),
    "bias: integer": ({"key_bias": torch.ones(16, dtype=torch.int64)}, TypeError, "key_bias is .*but query is"),
    "bias: device": ({"key_bias": torch.ones(16, device="meta")}, ValueError, "key_bias is on meta"),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be finite"),
}


@pytest.mark.parametrize("op", [ops.adapter_fusion, reference.adapter_fusion], ids=["op", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(op, change, error, message):
    with pytest.raises(error, match=message):
        op(**{"query": torch.ones(16), "outputs": FINE, **change})


@native
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_backward_refuses_what_does_not_fit(device):
    op = torch.ops.peft_ext.adapter_fusion_backward
    good = torch.ones(2, 3)
    for grads, weights, needs, error, message in (
        ((torch.ones(2, 15), None), good, [True] * 3, ValueError, "grad_mix must be"),
        ((torch.ones(2, 16, dtype=F64), None), good, [True] * 3, TypeError, "grad_mix must be"),
        ((None, torch.ones(2, 4)), good, [True] * 3, ValueError, "grad_weights must be"),
        ((None, torch.ones(2, 3, dtype=F64)), good, [True] * 3, TypeError, "grad_weights must be"),
        ((torch.ones(2, 16), None), torch.ones(2, 2), [True] * 3, ValueError, r"weights must be \[2, 3\]"),
        ((torch.ones(2, 16), None), torch.ones(0), [True] * 3, ValueError, r"weights must be \[2, 3\]"),
        ((torch.ones(2, 16), None), good.to(BF16), [True] * 3, TypeError, "weights must be"),
        ((torch.ones(2, 16), None), good, [True] * 2, ValueError, "needs_outputs must have 3 elements"),
    ):
        grad_mix, grad_weights = (grad if grad is None else grad.to(device) for grad in grads)
        outputs = [output.to(device) for output in FINE]
        with pytest.raises(error, match=message):
            op(grad_mix, grad_weights, torch.ones(16, device=device), outputs, weights.to(device), 1.0, True, needs)
