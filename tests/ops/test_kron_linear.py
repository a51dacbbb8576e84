from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from peft_ext import ops, reference
from peft_ext._loader import native_devices

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Largest error allowed, relative to the largest element of the float64 result.
TOLERANCE = {F64: 1e-13, F32: 3e-6, BF16: 2e-2, F16: 2e-3}
NAMES = ("x", "A", "B", "t", "bias")
DTYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16), (F64, F32)]

# n, a_in, a_out, b_in, b_out, rank (0: B is dense)
FACTORS = {
    "one": (1, 1, 1, 1, 1, 0),
    "one, rank 1": (1, 1, 1, 1, 1, 1),
    "compacter down": (4, 4, 4, 96, 6, 1),
    "compacter up": (4, 4, 4, 6, 96, 1),
    "compacter rank 3": (4, 4, 4, 33, 17, 3),
    "compacter rank 8": (4, 4, 4, 64, 48, 8),
    "lokr": (1, 12, 10, 17, 33, 8),
    "b first": (1, 8, 6, 33, 1, 0),
    "a first": (1, 6, 8, 1, 33, 0),
    "a first, two terms": (2, 3, 5, 4, 40, 0),
    "product": (4, 4, 4, 33, 17, 0),
    "product from s t": (3, 2, 3, 5, 7, 9),
}

LARGE = {
    "factors": (4, 4, 4, 256, 256, 8),
    "b first": (1, 16, 16, 128, 64, 0),
    "a first": (1, 16, 16, 64, 128, 0),
}

native = pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")


@dataclass
class KronProblem:
    factors: tuple[int, int, int, int, int, int] = (4, 4, 4, 6, 5, 1)
    rows: tuple[int, ...] = (5,)
    dtype: torch.dtype = F32
    factor_dtype: torch.dtype | None = None
    bias: bool = True
    scaling: float = 0.5
    device: torch.device | str = "cpu"
    tensors: dict[str, Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        n, a_in, a_out, b_in, b_out, rank = self.factors
        dtype = self.factor_dtype or self.dtype

        def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, device=self.device).to(dtype)

        self.tensors = {
            "x": random(*self.rows, a_in * b_in, dtype=self.dtype),
            "A": random(n, a_in, a_out),
            "B": random(n, b_in, rank or b_out),
            "t": random(n, rank, b_out) if rank else None,
            "bias": random(a_out * b_out) if self.bias else None,
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in NAMES if self.tensors[name] is not None)

    def solve(self, op, dtype=None, needs=None):
        """Output and gradients by name, optionally with everything cast to ``dtype`` first."""
        needs = self.names if needs is None else needs
        tensors = {
            name: tensor if tensor is None else tensor.to(dtype or tensor.dtype).detach().requires_grad_(name in needs)
            for name, tensor in self.tensors.items()
        }
        y = op(*tensors.values(), self.scaling)
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(self.dtype).to(y)
        grads = torch.autograd.grad(y, [tensors[n] for n in needs], grad_y) if needs else []
        return {"y": y.detach(), **dict(zip(needs, grads, strict=True))}

    def check(self) -> None:
        got, wanted = self.solve(ops.kron_linear), self.solve(reference.kron_linear, F64)
        tolerance = max(TOLERANCE[self.dtype], TOLERANCE[self.factor_dtype or self.dtype])
        assert got.keys() == wanted.keys()
        for name, value in got.items():
            assert value.dtype == self.tensors["x" if name == "y" else name].dtype, name
            assert value.shape == wanted[name].shape, name
            if value.numel():
                scale = wanted[name].abs().max().clamp_min(1.0)  # a lone sum may cancel: its terms are about 1
                error = ((value.double() - wanted[name]).abs().max() / scale).item()
                assert error <= tolerance, f"{name}: error {error:.1e} > {tolerance:.1e}"


@pytest.fixture
def problem(device):
    return lambda **options: KronProblem(device=device, **options)


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("rows", [1, 3, 17, 33, 300])
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES, ids=str)
def test_matches_float64(problem, dtype, factor_dtype, factors, rows):
    problem(factors=factors, rows=(rows,), dtype=dtype, factor_dtype=factor_dtype).check()


@pytest.mark.parametrize("factors", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize(("dtype", "factor_dtype"), [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)], ids=str)
def test_sizes_at_which_every_device_goes_by_factors(problem, dtype, factor_dtype, factors):
    problem(factors=factors, rows=(300,), dtype=dtype, factor_dtype=factor_dtype).check()


@pytest.mark.parametrize("factors", ["compacter down", "compacter up", "b first"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_one_rounding_with_a_float32_bias(problem, dtype, factors, same_roundings):
    tensors = problem(factors=FACTORS[factors], rows=(40,), dtype=dtype, factor_dtype=F32).tensors
    same_roundings(ops.kron_linear(*tensors.values()), reference.kron_linear(*tensors.values()))


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_equals_torch_kron(factors, device):
    problem = KronProblem(factors=factors, dtype=F64, device=device)
    x, A, B, t, bias = problem.tensors.values()
    dense = B if t is None else B @ t
    product = sum(torch.kron(A[i], dense[i]) for i in range(len(A)))
    torch.testing.assert_close(ops.kron_linear(x, A, B, t, bias, 0.5), 0.5 * x @ product + bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factors", ["compacter rank 3", "b first", "a first", "product"])
@pytest.mark.parametrize("rows", [(), (0,), (4, 0), (2, 3, 4), (1, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_leading_dimensions(problem, rows, factors, bias):
    problem(rows=rows, factors=FACTORS[factors], bias=bias).check()


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("rows", [5, 90])
def test_non_contiguous_arguments(problem, rows, factors):
    strided = problem(rows=(rows,), factors=factors)
    for name, tensor in strided.tensors.items():
        if tensor is not None:
            strided.tensors[name] = torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
    strided.check()


@pytest.mark.parametrize("factors", ["compacter rank 3", "compacter down", "b first", "a first", "product"])
def test_rows_with_gaps_and_transposed_factors(problem, factors):
    strided = problem(rows=(40,), factors=FACTORS[factors])
    for name, tensor in strided.tensors.items():
        if name == "x":
            strided.tensors[name] = torch.cat([tensor, tensor], dim=1)[:, : tensor.size(1)]
        elif name != "bias" and tensor is not None:
            strided.tensors[name] = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    strided.check()


def test_expanded_gradient(problem):
    """sum() hands back a gradient whose strides are all zero."""
    tensors = problem().tensors
    x = tensors["x"].requires_grad_()
    ops.kron_linear(*tensors.values()).sum().backward()
    other = x.detach().clone().requires_grad_()
    reference.kron_linear(*{**tensors, "x": other}.values()).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_shared_factor_gets_the_sum_over_its_users(problem):
    first, second = (problem(factors=f, dtype=F64) for f in ((4, 4, 4, 6, 3, 1), (4, 4, 4, 3, 6, 1)))
    A = first.tensors["A"].requires_grad_()
    second.tensors["A"] = A

    def total(op):
        hidden = op(*first.tensors.values())
        return op(*{**second.tensors, "x": hidden}.values()).square().sum()

    (got,), (wanted,) = (torch.autograd.grad(total(op), A) for op in (ops.kron_linear, reference.kron_linear))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("factors", [(2, 2, 3, 4, 2, 1), (1, 3, 2, 4, 1, 0), (1, 2, 3, 1, 4, 0), (3, 2, 2, 3, 2, 0)])
def test_gradcheck(problem, factors):
    small = problem(factors=factors, rows=(7,), dtype=F64)
    tensors = [tensor for tensor in small.tensors.values() if tensor is not None]

    def call(x, A, B, *rest):
        return ops.kron_linear(x, A, B, *([None] if len(rest) == 1 else []), *rest, 0.5)

    assert torch.autograd.gradcheck(call, tuple(tensor.requires_grad_() for tensor in tensors))


@native
def test_double_backward_is_an_explicit_error(problem):
    tensors = problem().tensors
    x = tensors["x"].requires_grad_()
    (grad,) = torch.autograd.grad(ops.kron_linear(*tensors.values()).sum(), x, create_graph=True)
    grad.sum()  # does not depend on x
    A = tensors["A"].requires_grad_()
    (grad,) = torch.autograd.grad(ops.kron_linear(*tensors.values()).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        torch.autograd.grad(grad.sum(), A)


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("factors", ["compacter rank 3", "b first", "a first", "product", "product from s t"])
@pytest.mark.parametrize("rows", [5, 300])
def test_every_subset_of_gradients(problem, factors, rows):
    case = problem(factors=FACTORS[factors], rows=(rows,))
    everything = case.solve(ops.kron_linear)
    for count in range(len(case.names) + 1):
        for needs in itertools.combinations(case.names, count):
            some = case.solve(ops.kron_linear, needs=needs)
            assert set(some) == {"y", *needs}
            for name, value in some.items():
                assert torch.equal(value, everything[name]), (name, needs)


@native
def test_opcheck(problem):
    for options in ({}, {"bias": False}, {"factors": FACTORS["b first"]}, {"rows": (2, 3)}, {"dtype": BF16}):
        case = problem(**options)
        tensors = [t if t is None else t.requires_grad_() for t in case.tensors.values()]
        opcheck(torch.ops.peft_ext.kron_linear, (*tensors, 0.5))
        x, A, B, t, _ = (t if t is None else t.detach() for t in tensors)
        grad_y = torch.randn_like(ops.kron_linear(x, A, B, t))
        for needs in itertools.product([False, True], repeat=5):
            if needs[3] and t is None:
                continue
            opcheck(
                torch.ops.peft_ext.kron_linear_backward,
                (grad_y, x, A, B, t, 0.5, needs),
                test_utils=("test_schema", "test_faketensor"),
            )


@native
@pytest.mark.parametrize("factors", ["compacter rank 3", "product"])
def test_saves_only_its_arguments(problem, factors):
    """No hidden product, no Kronecker product: what is kept for the backward is what came in."""
    tensors = problem(factors=FACTORS[factors], dtype=BF16, factor_dtype=F32).tensors
    saved = []
    for tensor in tensors.values():
        if tensor is not None:
            tensor.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ops.kron_linear(*tensors.values())
    arguments = [tensors[name] for name in ("x", "A", "B", "t") if tensors[name] is not None]
    assert sorted(saved) == sorted(t.data_ptr() for t in arguments)


@pytest.mark.parametrize("rows", [130, 1000])
@pytest.mark.parametrize("factors", ["compacter down", "compacter rank 8", "lokr"])
def test_same_bits_at_any_thread_count(problem, rows, factors, two_threads):
    case = problem(factors=FACTORS[factors], rows=(rows,))
    two = case.solve(ops.kron_linear)
    torch.set_num_threads(1)
    one = case.solve(ops.kron_linear)
    for name in ("y", "x", "A", "B", "t"):
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("rows", [130, 1000])
def test_product_has_the_same_bits_at_any_thread_count(problem, rows, two_threads):
    case = problem(factors=FACTORS["product"], rows=(rows,), dtype=BF16)
    two = case.solve(ops.kron_linear)
    torch.set_num_threads(1)
    one = case.solve(ops.kron_linear)
    for name in ("y", "x"):
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(problem, dtype):
    """x in the autocast dtype; the factors and their gradients stay float32."""
    case = problem(rows=(40,))
    with torch.autocast(case.tensors["x"].device.type, dtype=dtype):
        got = case.solve(ops.kron_linear)
    wanted = case.solve(reference.kron_linear, F64)
    assert got["y"].dtype == dtype
    for name, value in got.items():
        assert name == "y" or value.dtype == F32
        error = (value.double() - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error < {BF16: 3e-2, F16: 4e-3}[dtype], name


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("factors", ["compacter rank 3", "product"])
def test_autocast_of_the_reference_is_the_ops(problem, dtype, factors, same_roundings):
    case = problem(factors=FACTORS[factors], rows=(40,))
    with torch.autocast(case.tensors["x"].device.type, dtype=dtype):
        got, wanted = case.solve(reference.kron_linear), case.solve(ops.kron_linear)
    assert {name: value.dtype for name, value in got.items()} == {name: value.dtype for name, value in wanted.items()}
    same_roundings(got["y"], wanted["y"])


@native
@pytest.mark.parametrize("factors", ["compacter rank 3", "a first"])
def test_compile_has_one_graph_for_all_sizes(problem, factors):
    torch._dynamo.reset()

    def layer(*tensors):
        return ops.kron_linear(*tensors, 0.5).sin()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (7, 19, 500):
        tensors = problem(factors=FACTORS[factors], rows=(rows,)).tensors.values()
        leaves = [t.requires_grad_() for t in tensors if t is not None]
        with torch.compiler.set_stance("default" if rows == 7 else "fail_on_recompile"):
            got = compiled(*tensors)
        wanted = layer(*tensors)
        torch.testing.assert_close(got, wanted)
        for one, other in zip(
            torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(one, other)


@native
def test_meta_tensors():
    x, A, B, t = (torch.empty(s, device="meta") for s in ((2, 3, 8), (4, 4, 4), (4, 2, 1), (4, 1, 5)))
    assert ops.kron_linear(x, A, B, t).shape == (2, 3, 20)


BAD = {
    "x: width": ({"x": torch.ones(2, 5)}, ValueError, r"x must be \[\.\.\., 8\]"),
    "x: scalar": ({"x": torch.tensor(1.0)}, ValueError, "x must be"),
    "x: integer": ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x must be float32"),
    "A: matrix": ({"A": torch.ones(4, 4)}, ValueError, "A must have 3 dimensions"),
    "A: empty": ({"A": torch.ones(2, 4, 0)}, ValueError, "A must have 3 dimensions, none of them empty"),
    "A: integer": ({"A": torch.ones(2, 4, 3, dtype=torch.int32)}, TypeError, "A must be float32"),
    "A: float64": (
        {n: torch.ones(s, dtype=F64) for n, s in (("A", (2, 4, 3)), ("B", (2, 2, 1)), ("t", (2, 1, 5)))},
        TypeError,
        "A is .*only a float64 x",
    ),
    "B: terms": ({"B": torch.ones(3, 2, 1)}, ValueError, "B must have the 2 terms of A"),
    "B: dtype": ({"B": torch.ones(2, 2, 1, dtype=BF16)}, TypeError, "B is .*must have one dtype"),
    "t: rank": ({"t": torch.ones(2, 2, 5)}, ValueError, r"t must be \[2, 1, b_out\]"),
    "bias: shape": ({"bias": torch.ones(3)}, ValueError, r"bias must be \[15\]"),
    "bias: dtype": ({"bias": torch.ones(15, dtype=F64)}, TypeError, "bias is"),
    "device": ({"x": torch.ones(2, 8, device="meta")}, (ValueError, RuntimeError), "meta"),
    "scaling": ({"scaling": float("nan")}, ValueError, "scaling must be finite"),
}


@pytest.mark.parametrize("op", [ops.kron_linear, reference.kron_linear], ids=["op", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(op, change, error, message):
    arguments = {
        "x": torch.ones(2, 8),
        "A": torch.ones(2, 4, 3),
        "B": torch.ones(2, 2, 1),
        "t": torch.ones(2, 1, 5),
        "bias": torch.ones(15),
        "scaling": 1.0,
    }
    if change.get("A") is not None and change["A"].dtype == F64:
        arguments["bias"] = None
    with pytest.raises(error, match=message):
        op(**{**arguments, **change})


@native
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_backward_refuses_what_does_not_fit(device):
    x, A, B, t, _ = KronProblem(device=device).tensors.values()
    call = torch.ops.peft_ext.kron_linear_backward
    for grad, error in ((torch.ones(5, 11), ValueError), (torch.ones(5, 20, dtype=F64), TypeError)):
        with pytest.raises(error, match="grad_y"):
            call(grad.to(device), x, A, B, t, 1.0, [True] * 5)
    with pytest.raises(ValueError, match="gradient of t"):
        call(torch.ones(5, 4, device=device), x, A, B, None, 1.0, [True] * 5)
