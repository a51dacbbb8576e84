from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from peft_ext import ops, reference
from peft_ext._loader import native_devices

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Largest error allowed, relative to the largest element of the float64 result.
TOLERANCE = {F64: 1e-13, F32: 2e-6, BF16: 2e-2, F16: 2e-3}
DTYPES = [
    (F32, F32),
    (F64, F64),
    (BF16, BF16),
    (F16, F16),
    (BF16, F32),
    (F16, F32),
    (F32, BF16),
    (F32, F16),
    (F64, F32),
]
# (rows, in_features, out_features, ranks): odd sizes, the few-rows and the packed kernels and their tails, many
# adapters of one row each, and adapters of so many rows that their gradients are summed over several chunks.
SIZES = [
    (1, 1, 1, (1,)),
    (3, 17, 33, (3, 1)),
    (17, 33, 17, (4, 8, 17)),
    (33, 40, 90, (8,) * 33),
    (60, 100, 48, (5, 16)),
    (300, 48, 36, (4, 8)),
    (70, 768, 130, (33, 2, 8)),
]

native = pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")
both = pytest.mark.parametrize("op", [ops.multi_lora_linear, reference.multi_lora_linear], ids=["op", "reference"])


@dataclass
class Problem:
    """Arguments of multi_lora_linear, and what comes out of it; by default a random adapter, or none, for each row."""

    rows: tuple[int, ...] = (9,)
    in_features: int = 16
    out_features: int = 12
    ranks: tuple[int, ...] = (4, 2, 3)
    dtype: torch.dtype = F32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    transposed: bool = False
    dropout_p: Sequence[float] = ()
    index: Tensor | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        def random(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, device=self.device).to(dtype)

        adapter_dtype = self.adapter_dtype or self.dtype
        n, k = self.out_features, self.in_features
        self.tensors = {"x": random(*self.rows, k), "weight": random(k, n).t() if self.transposed else random(n, k)}
        if self.bias:
            self.tensors["bias"] = random(n)
        self.tensors |= {f"lora_A {i}": random(rank, k, dtype=adapter_dtype) for i, rank in enumerate(self.ranks)}
        self.tensors |= {f"lora_B {i}": random(n, rank, dtype=adapter_dtype) for i, rank in enumerate(self.ranks)}
        self.scalings = 0.5 + torch.rand(len(self.ranks), device=self.device)
        if self.index is None:
            self.index = torch.randint(-1, len(self.ranks), self.rows, device=self.device)
        self.seed = torch.tensor([0x123456789ABCDEF], device=self.device) if self.dropout_p else None

    @property
    def leaves(self) -> tuple[str, ...]:
        return tuple(name for name in self.tensors if name != "weight")

    def call(self, op: Callable[..., Tensor], **changed: Tensor) -> Tensor:
        t = {**self.tensors, **changed}
        a, b = ([t[f"lora_{which} {i}"] for i in range(len(self.ranks))] for which in "AB")
        options = {"dropout_p": list(self.dropout_p), "seed": self.seed}
        return op(t["x"], t["weight"], t.get("bias"), a, b, self.scalings, self.index, **options)

    def solve(
        self, op: Callable[..., Tensor], dtype: torch.dtype | None = None, needs: tuple[str, ...] | None = None
    ) -> dict[str, Tensor]:
        """Output and gradients by name, optionally with everything cast to ``dtype`` first."""
        needs = self.leaves if needs is None else needs
        tensors = {
            name: tensor.to(dtype or tensor.dtype).detach().requires_grad_(name in needs)
            for name, tensor in self.tensors.items()
        }
        y = self.call(op, **tensors)
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(self.dtype).to(y)
        grads = torch.autograd.grad(y, [tensors[n] for n in needs], grad_y) if needs else []
        return {"y": y.detach(), **dict(zip(needs, grads, strict=True))}

    def check(self) -> None:
        """The op against its oracle in float64."""
        got, wanted = self.solve(ops.multi_lora_linear), self.solve(reference.multi_lora_linear, F64)
        tolerance = max(TOLERANCE[self.dtype], TOLERANCE[self.adapter_dtype or self.dtype])
        assert got.keys() == wanted.keys()
        for name, value in got.items():
            assert value.dtype == self.tensors["x" if name == "y" else name].dtype, name
            assert value.shape == wanted[name].shape, name
            if value.numel():
                scale = wanted[name].abs().max().clamp_min(1e-30)
                error = ((value.double() - wanted[name]).abs().max() / scale).item()
                assert error <= tolerance, f"{name}: error {error:.1e} > {tolerance:.1e}"


@pytest.fixture
def multi_problem(device: torch.device) -> Callable[..., Problem]:
    def make(**options: object) -> Problem:
        return Problem(device=device, **options)

    return make


def spread(index: Tensor, rows: int) -> Tensor:
    return index.repeat_interleave(rows)


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[:3]}x{len(size[3])}")
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)
def test_matches_float64(multi_problem, dtype, adapter_dtype, size, dropped):
    rows, in_features, out_features, ranks = size
    multi_problem(
        rows=(rows,),
        in_features=in_features,
        out_features=out_features,
        ranks=ranks,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        dropout_p=[(0.3, 0.0, 0.6)[i % 3] for i in range(len(ranks))] if dropped else (),
    ).check()


INDICES = {
    "runs": [0, 0, 0, 2, 2, 1, 1, 1, 1],
    "alternating": [0, 1, 0, 1, 0, 1, 0, 1, 0],
    "one adapter": [1] * 9,
    "none": [-1] * 9,
    "one row": [-1] * 4 + [2] + [-1] * 4,
    "each another": [2, -1, 0, -1, 1, -1, -1, -1, -1],
}


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("repeats", [1, 20])
@pytest.mark.parametrize("dropout_p", [(), (0.5, 0.0, 0.2)])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_index_patterns(multi_problem, device, index, dropout_p, repeats):
    rows = 9 * repeats
    multi_problem(rows=(rows,), index=spread(torch.tensor(index, device=device), repeats), dropout_p=dropout_p).check()


@pytest.mark.parametrize("dropout_p", [(), (0.5, 0.0, 0.2)])
@pytest.mark.parametrize(
    ("rows", "index_shape"),
    [
        ((), ()),
        ((5,), ()),
        ((0,), (0,)),
        ((4, 0), (4,)),
        ((4, 0), (4, 0)),
        ((0, 4), ()),
        ((3, 17), (3,)),
        ((3, 17), (3, 17)),
        ((2, 3, 4), (2,)),
        ((2, 3, 4), (2, 3)),
        ((1, 1, 1, 5), (1, 1, 1, 5)),
    ],
    ids=str,
)
def test_leading_dimensions(multi_problem, device, rows, index_shape, dropout_p):
    index = torch.randint(-1, 3, index_shape, device=device)
    multi_problem(rows=rows, index=index, dropout_p=dropout_p).check()


@pytest.mark.parametrize("rows", [5, 300])
def test_no_adapters(multi_problem, rows):
    """Empty lists are a frozen layer."""
    problem = multi_problem(rows=(rows,), ranks=())
    problem.check()
    frozen = torch.nn.functional.linear(*(problem.tensors[name] for name in ("x", "weight", "bias")))
    assert torch.equal(problem.call(ops.multi_lora_linear), frozen)


@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("dropout_p", [(), (0.5, 0.0, 0.2)])
def test_no_input_features(multi_problem, rows, dropout_p):
    multi_problem(rows=(rows,), in_features=0, dropout_p=dropout_p).check()


@pytest.mark.parametrize("rows", [1, 3, 7, 40])
@pytest.mark.parametrize("ranks", [(8,), (64, 5)])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_one_rounding(multi_problem, dtype, ranks, rows, same_roundings):
    """The branch is added in one go, however many ranks it has."""
    problem = multi_problem(rows=(rows,), out_features=203, ranks=ranks, dtype=dtype, adapter_dtype=F32)
    same_roundings(problem.call(ops.multi_lora_linear), problem.call(reference.multi_lora_linear))


@pytest.mark.parametrize("rows", [9, 300])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout_p", [(), (0.5, 0.0, 0.2)])
def test_transposed_weight(multi_problem, rows, bias, dropout_p):
    multi_problem(rows=(rows,), transposed=True, bias=bias, dropout_p=dropout_p).check()


@pytest.mark.parametrize("rows", [9, 300])
@pytest.mark.parametrize("adapter_dtype", [F32, BF16])
def test_non_contiguous_arguments(multi_problem, rows, adapter_dtype):
    problem = multi_problem(rows=(rows,), adapter_dtype=adapter_dtype)

    def strided(tensor: Tensor, filler: float) -> Tensor:
        result = torch.stack([tensor, torch.full_like(tensor, filler)], dim=-1)[..., 0]
        assert not result.is_contiguous()
        return result

    problem.tensors = {name: strided(tensor, torch.nan) for name, tensor in problem.tensors.items()}
    problem.scalings, problem.index = strided(problem.scalings, torch.nan), strided(problem.index, 99)
    problem.check()


def test_expanded_gradient(multi_problem):
    """sum() hands back a gradient whose strides are all zero."""
    problem = multi_problem()
    x = problem.tensors["x"].requires_grad_()
    problem.call(ops.multi_lora_linear).sum().backward()
    x_oracle = x.detach().clone().requires_grad_()
    problem.call(reference.multi_lora_linear, x=x_oracle).sum().backward()
    torch.testing.assert_close(x.grad, x_oracle.grad)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_scalings_of_any_float_type(multi_problem, dtype):
    problem = multi_problem()
    problem.scalings = torch.tensor([0.5, 2.0, 1.25], dtype=dtype, device=problem.index.device)
    problem.check()


@pytest.mark.parametrize("rows", [3, 7, 40, 300])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_adapter_is_lora_linear(multi_problem, device, dtype, dropout_p, rows):
    """The same mask under the same seed, and the same bits but where lora_linear takes the rows by other products."""
    index = torch.zeros(rows, dtype=torch.int64, device=device)
    problem = multi_problem(rows=(rows,), ranks=(5,), dtype=dtype, index=index, dropout_p=[dropout_p])
    seed = torch.tensor([0x123456789ABCDEF], device=device)

    def one(x, weight, bias, lora_A, lora_B, scalings, index, dropout_p, seed=seed):
        return ops.lora_linear(x, weight, bias, *lora_A, *lora_B, scalings.item(), dropout_p=dropout_p[0], seed=seed)

    got, wanted = problem.solve(ops.multi_lora_linear), problem.solve(one)
    for name, value in wanted.items():
        if rows < (256 if dtype == BF16 else 8):
            assert torch.equal(got[name], value), name
        elif dtype == BF16:
            assert (got[name] - value).abs().max() <= torch.finfo(BF16).eps * value.abs().max(), name
        else:
            torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [9, 300])
def test_adapters_do_not_see_each_other(multi_problem, device, rows):
    """NaN in one adapter, or in its rows, stays there, backward too."""
    index = torch.arange(rows, device=device) % 3
    problem = multi_problem(rows=(rows,), index=index)
    clean = problem.solve(ops.multi_lora_linear)
    for name in ("x", "lora_A 1", "lora_B 1"):
        spoilt = multi_problem(rows=(rows,), index=index)
        spoilt.scalings = problem.scalings
        spoilt.tensors = {**problem.tensors, name: problem.tensors[name].clone()}
        spoilt.tensors[name][index == 1 if name == "x" else ...] = torch.nan
        got = spoilt.solve(ops.multi_lora_linear)
        assert got["y"][index == 1].isnan().any()
        for result in ("y", "x"):
            torch.testing.assert_close(got[result][index != 1], clean[result][index != 1])
        for result in ("lora_A 0", "lora_B 0", "lora_A 2", "lora_B 2"):
            assert torch.equal(got[result], clean[result]), result


@pytest.mark.parametrize("rows", [9, 40])
@pytest.mark.parametrize("dropout_p", [(), (0.5, 0.0, 0.2)])
def test_gradcheck(multi_problem, rows, dropout_p):
    problem = multi_problem(
        rows=(rows,), in_features=5, out_features=4, ranks=(2, 1, 3), dtype=F64, dropout_p=dropout_p
    )
    inputs = tuple(problem.tensors[name].requires_grad_() for name in problem.leaves)
    assert torch.autograd.gradcheck(
        lambda *tensors: problem.call(ops.multi_lora_linear, **dict(zip(problem.leaves, tensors, strict=True))), inputs
    )


@native
@pytest.mark.parametrize("leaf", ["x", "lora_A 1", "lora_B 2"])
def test_double_backward_is_an_explicit_error(multi_problem, leaf):
    problem = multi_problem()
    leaf = problem.tensors[leaf].requires_grad_()
    x = problem.tensors["x"].requires_grad_()
    (grad,) = torch.autograd.grad(problem.call(ops.multi_lora_linear).square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        torch.autograd.grad(grad.sum(), x)


SUBSETS = [s for n in range(5) for s in itertools.combinations(("x", "bias", "lora_A 0", "lora_B 2"), n)]
SUBSETS += [("lora_A 0", "lora_A 1", "lora_A 2"), ("lora_B 1", "lora_B 2"), ("x", "lora_A 1", "lora_B 1", "lora_B 0")]


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("needs", SUBSETS, ids=str)
@pytest.mark.parametrize("rows", [9, 300])
@pytest.mark.parametrize("dropout_p", [(), (0.5, 0.0, 0.2)])
def test_every_subset_of_gradients(multi_problem, needs, rows, dropout_p):
    problem = multi_problem(rows=(rows,), dropout_p=dropout_p)
    everything, some = problem.solve(ops.multi_lora_linear), problem.solve(ops.multi_lora_linear, needs=needs)
    assert set(some) == {"y", *needs}
    for name, value in some.items():
        assert torch.equal(value, everything[name]), name


def test_an_adapter_without_rows_gets_zeros(multi_problem, device):
    problem = multi_problem(index=torch.tensor([0, 0, 0, -1, -1, 2, 2, 0, 2], device=device))
    for op in (ops.multi_lora_linear, reference.multi_lora_linear):
        grads = problem.solve(op)
        for name in ("lora_A 1", "lora_B 1"):
            assert torch.equal(grads[name], torch.zeros_like(problem.tensors[name]))


@native
def test_opcheck(multi_problem, device):
    for options in (
        {},
        {"dropout_p": (0.5, 0.0, 0.2)},
        {"bias": False, "ranks": ()},
        {"rows": (2, 3), "index": torch.tensor([1, 0], device=device)},
        {"dtype": BF16, "adapter_dtype": F32},
    ):
        problem = multi_problem(**options)
        for name in problem.leaves:
            problem.tensors[name].requires_grad_()
        tail = (problem.scalings, problem.index, list(problem.dropout_p), problem.seed)

        def opcheck_call(x, weight, bias, a, b, *rest, tail=tail, **keywords):
            opcheck(torch.ops.peft_ext.multi_lora_linear, (x, weight, bias, a, b, *tail))

        problem.call(opcheck_call)
        t = {name: tensor.detach() for name, tensor in problem.tensors.items()}
        n = len(problem.ranks)
        a, b = ([t[f"lora_{which} {i}"] for i in range(n)] for which in "AB")
        grad_y = torch.randn(*problem.rows, problem.out_features, device=device).to(problem.dtype)
        for needs_x, needs_bias, first, others in itertools.product([False, True], repeat=4):
            needs_A, needs_B = [first, *[others] * 2][:n], [others, *[first] * 2][:n]
            opcheck(
                torch.ops.peft_ext.multi_lora_linear_backward,
                (grad_y, t["x"], t["weight"], a, b, *tail, needs_x, needs_bias, needs_A, needs_B),
                test_utils=("test_schema", "test_faketensor"),
            )


@native
@pytest.mark.parametrize("dropout_p", [(), (0.5, 0.0, 0.2)])
def test_saves_only_its_arguments(multi_problem, dropout_p):
    """No mask, no gathered, widened or copied x: what is kept for the backward is what came in."""
    problem = multi_problem(dtype=BF16, adapter_dtype=F32, dropout_p=dropout_p)
    for name in problem.leaves:
        problem.tensors[name].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        problem.call(ops.multi_lora_linear)
    arguments = [tensor for name, tensor in problem.tensors.items() if name != "bias"]
    arguments += [problem.scalings, problem.index] + ([] if problem.seed is None else [problem.seed])
    assert sorted(saved) == sorted(t.data_ptr() for t in arguments)


def test_seed_follows_the_generator(multi_problem):
    problem = multi_problem(rows=(64,), dropout_p=(0.5, 0.5, 0.5))
    problem.seed = None

    def draw():
        return problem.call(ops.multi_lora_linear)

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("rows", [40, 1000])
@pytest.mark.parametrize("dropout_p", [(), (0.3, 0.0, 0.5)])
def test_same_bits_at_any_thread_count(multi_problem, rows, dropout_p, two_threads):
    """The branches' own work does not depend on threads; sizes keep at::'s GEMM from splitting its sums."""
    problem = multi_problem(rows=(rows,), in_features=40, out_features=24, dropout_p=dropout_p)
    two = problem.solve(ops.multi_lora_linear)
    torch.set_num_threads(1)
    for name, value in problem.solve(ops.multi_lora_linear).items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(multi_problem, dtype):
    """As F.linear: the base in the autocast dtype; the adapters and their gradients stay float32."""
    problem = multi_problem(rows=(40,))
    with torch.autocast(problem.index.device.type, dtype=dtype):
        got = problem.solve(ops.multi_lora_linear)
    wanted = problem.solve(reference.multi_lora_linear, F64)
    assert got["y"].dtype == dtype
    for name in problem.leaves:
        assert got[name].dtype == F32
    for name, value in got.items():
        error = (value.double() - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error < {BF16: 3e-2, F16: 4e-3}[dtype], name


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_of_the_reference_is_the_ops(multi_problem, dtype, same_roundings):
    problem = multi_problem(rows=(40,))
    with torch.autocast(problem.index.device.type, dtype=dtype):
        got, wanted = problem.solve(reference.multi_lora_linear), problem.solve(ops.multi_lora_linear)
    assert {name: value.dtype for name, value in got.items()} == {name: value.dtype for name, value in wanted.items()}
    same_roundings(got["y"], wanted["y"])


@native
@pytest.mark.parametrize("dropout_p", [(), (0.5, 0.0, 0.2)])
def test_compile_has_one_graph_for_all_sizes_and_mixes(multi_problem, dropout_p):
    """Neither the rows, nor which adapters they use, nor the scalings are compiled in."""
    torch._dynamo.reset()

    def layer(x, weight, bias, a, b, scalings, index, seed):
        return ops.multi_lora_linear(x, weight, bias, a, b, scalings, index, dropout_p=list(dropout_p), seed=seed).sin()

    def call(function, problem):
        def passed(*arguments, dropout_p, seed):
            return function(*arguments, seed)

        return problem.solve(passed)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 17, 500):  # not 3: a size that equals the number of adapters would be taken for it
        problem = multi_problem(rows=(rows,), dropout_p=dropout_p)
        with torch.compiler.set_stance("default" if rows == 5 else "fail_on_recompile"):
            got = call(compiled, problem)
            for name, value in call(layer, problem).items():
                torch.testing.assert_close(got[name], value)


@native
@pytest.mark.slow
def test_compile_with_inductor(multi_problem):
    problem = multi_problem(rows=(7,))

    def layer(*arguments, **options):
        return ops.multi_lora_linear(*arguments, **options).relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    torch.testing.assert_close(problem.call(compiled), problem.call(layer))


@native
def test_meta_tensors():
    x, weight, a, b = (torch.empty(s, device="meta") for s in ((2, 3, 8), (6, 8), (2, 8), (6, 2)))
    scalings, index = torch.empty(2, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    assert ops.multi_lora_linear(x, weight, None, [a, a], [b, b], scalings, index).shape == (2, 3, 6)


def arguments() -> dict[str, object]:
    return {
        "x": torch.ones(2, 3, 16),
        "weight": torch.ones(12, 16),
        "bias": torch.ones(12),
        "lora_A": [torch.ones(4, 16), torch.ones(2, 16)],
        "lora_B": [torch.ones(12, 4), torch.ones(12, 2)],
        "scalings": torch.ones(2),
        "index": torch.tensor([0, -1]),
    }


A, B = torch.ones(4, 16), torch.ones(12, 4)
BAD = {
    "x: width": ({"x": torch.ones(2, 5)}, ValueError, r"x must be \[\.\.\., 16\]"),
    "x: scalar": ({"x": torch.tensor(1.0)}, ValueError, "x must be"),
    "x: dtype": ({"x": torch.ones(2, 16, dtype=BF16)}, TypeError, "x is .*weight is"),
    "weight: vector": ({"weight": torch.ones(16)}, ValueError, "weight must have 2 dimensions"),
    "weight: integer": ({"weight": torch.ones(12, 16, dtype=torch.int8)}, TypeError, "weight must be float32"),
    "weight: grad": ({"weight": torch.ones(12, 16).requires_grad_()}, ValueError, "weight requires grad"),
    "bias: shape": ({"bias": torch.ones(3)}, ValueError, r"bias must be \[12\]"),
    "bias: dtype": ({"bias": torch.ones(12, dtype=F64)}, TypeError, "bias is"),
    "A: shape": ({"lora_A": [A, torch.ones(2, 15)]}, ValueError, r"lora_A\[1\] must be \[2, 16\]"),
    "A: rank": ({"lora_A": [A, torch.ones(3, 16)]}, ValueError, r"lora_A\[1\] must be \[2, 16\]"),
    "A: vector": ({"lora_A": [torch.ones(16), A]}, ValueError, r"lora_A\[0\] must have 2 dimensions"),
    "A: dtype": ({"lora_A": [A, torch.ones(2, 16, dtype=BF16)]}, TypeError, r"lora_A\[1\] is .*both must have one"),
    "A: integer": ({"lora_A": [A.int(), A]}, TypeError, r"lora_A\[0\] must be float32"),
    "A: fewer": ({"lora_A": [A]}, ValueError, "lora_B must have 1 tensors, as lora_A has, but has 2"),
    "B: shape": (
        {"lora_B": [torch.ones(11, 4), torch.ones(12, 2)]},
        ValueError,
        r"lora_B\[0\] must be \[12, (rank|4)\]",
    ),
    "dtypes": ({"lora_A": [A, A.half()], "lora_B": [B, B.half()]}, TypeError, r"one dtype, but lora_A\[0\] is"),
    "rank 0": ({"lora_A": [A, A[:0]], "lora_B": [B, B[:, :0]]}, ValueError, r"lora_B\[1\].*rank > 0"),
    "float64 adapters": (
        {"lora_A": [A.double()] * 2, "lora_B": [B.double()] * 2},
        TypeError,
        r"lora_A\[0\] is .*only a float64 weight",
    ),
    "scalings: shape": ({"scalings": torch.ones(3)}, ValueError, r"scalings must be \[2\] for 2 adapters"),
    "scalings: matrix": ({"scalings": torch.ones(2, 1)}, ValueError, r"scalings must be \[2\]"),
    "scalings: integer": ({"scalings": torch.ones(2, dtype=torch.int64)}, TypeError, "scalings must be float32"),
    "scalings: grad": ({"scalings": torch.ones(2).requires_grad_()}, ValueError, "scalings requires grad"),
    "scalings: NaN": ({"scalings": torch.tensor([1.0, torch.nan])}, ValueError, "scalings must be finite"),
    "scalings: infinite": ({"scalings": torch.tensor([torch.inf, 1.0])}, ValueError, "scalings must be finite"),
    "index: dtype": ({"index": torch.zeros(2, dtype=torch.int32)}, TypeError, "index must be int64"),
    "index: length": ({"index": torch.tensor([0, 0, 0])}, ValueError, r"index must have leading sizes of x.*\[3\]"),
    "index: too deep": ({"index": torch.zeros(2, 3, 16, dtype=torch.int64)}, ValueError, "index must have leading"),
    "index: too high": ({"index": torch.tensor([0, 2])}, ValueError, r"index must be in \[-1, 2\) .*holds 2"),
    "index: too low": ({"index": torch.tensor([0, -2])}, ValueError, r"index must be in \[-1, 2\) .*holds -2"),
    "index: no adapters": (
        {"lora_A": [], "lora_B": [], "scalings": torch.ones(0)},
        ValueError,
        r"index must be in \[-1, 0\) for 0 adapters, but holds 0",
    ),
    "dropout: count": ({"dropout_p": [0.5]}, ValueError, "dropout_p must be empty or have 2 values, but has 1"),
    "dropout: range": ({"dropout_p": [0.5, -0.1]}, ValueError, r"dropout_p must be in \[0, 1\], but is -0.1"),
    "dropout: NaN": ({"dropout_p": [0.0, float("nan")]}, ValueError, r"dropout_p must be in \[0, 1\]"),
    "seed: two": ({"dropout_p": [0.5, 0.0], "seed": torch.tensor([1, 2])}, ValueError, "seed must have 1 element"),
    "seed: float": ({"dropout_p": [0.0, 0.5], "seed": torch.tensor([1.0])}, TypeError, "seed must be int64"),
}


@both
@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(op, change, error, message):
    seed = {"seed": torch.tensor([1])} if "dropout_p" in change else {}
    with pytest.raises(error, match=message):
        op(**{**arguments(), **seed, **change})


@native
@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_the_fake_finds_the_same(change, error, message):
    """All but what is in values, which tracing does not have."""

    def on_meta(value):
        if isinstance(value, Tensor):
            return value.to("meta")
        return [on_meta(v) for v in value] if isinstance(value, list) else value

    seed = {"seed": torch.tensor([1])} if "dropout_p" in change else {}
    call = {name: on_meta(value) for name, value in {**arguments(), **seed, **change}.items()}
    if "holds" in message or "finite" in message:
        assert ops.multi_lora_linear(**call).shape == (2, 3, 12)
        return
    with pytest.raises(error, match=message):
        ops.multi_lora_linear(**call)


@native
def test_devices_must_agree():
    for name in ("x", "weight", "bias", "scalings", "index"):
        with pytest.raises((ValueError, RuntimeError), match="meta"):
            ops.multi_lora_linear(**{**arguments(), name: arguments()[name].to("meta")})


@native
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_backward_refuses_what_does_not_fit(device):
    good = {"grad_y": torch.ones(2, 3, 12), **arguments(), "needs_A": [True] * 2, "needs_B": [True] * 2}
    for changed, bad, error in (
        ("grad_y", torch.ones(2, 3, 11), ValueError),
        ("grad_y", torch.ones(2, 3, 12, dtype=F64), TypeError),
        ("x", torch.ones(2, 3, 15), ValueError),
        ("scalings", torch.ones(3), ValueError),
        ("needs_A", [True], ValueError),
        ("needs_B", [True] * 3, ValueError),
    ):
        call = {
            name: [v.to(device) if isinstance(v, Tensor) else v for v in value]
            if isinstance(value, list)
            else value.to(device)
            for name, value in {**good, changed: bad}.items()
            if name != "bias"
        }
        with pytest.raises(error, match=f"{changed} must"):
            torch.ops.peft_ext.multi_lora_linear_backward(
                **call, dropout_p=[], seed=None, needs_x=True, needs_bias=True
            )
