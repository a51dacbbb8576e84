from __future__ import annotations

import itertools

import pytest
import torch
from torch.library import opcheck

from peft_ext import ops, reference
from peft_ext._loader import native_devices
from peft_ext.reference.dropout import dropout_mask, dropout_scale

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
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
# Odd sizes; every tile of the few-rows and the packed kernels and their tails; enough rows to merge; many blocks;
# on CUDA several turns of each loop of tiles.
SIZES = [
    (1, 1, 1, 1),
    (3, 17, 33, 3),
    (7, 40, 90, 12),
    (15, 40, 56, 14),
    (33, 64, 96, 8),
    (2, 100, 48, 17),
    (300, 48, 36, 4),
    (70, 768, 130, 33),
    (1100, 40, 72, 9),
    (290, 1104, 136, 40),
]
GRADIENTS = ("x", "bias", "lora_A", "lora_B")

native = pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("enable_lora", [None, [True, False, True]], ids=["lora_linear", "merged_lora_linear"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)
def test_matches_float64(lora_problem, dtype, adapter_dtype, size, dropout_p, enable_lora):
    rows, in_features, out_features, rank = size
    lora_problem(
        rows=(rows,),
        in_features=in_features,
        out_features=3 * out_features if enable_lora else out_features,
        rank=rank,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        dropout_p=dropout_p,
        enable_lora=enable_lora,
    ).check()


@pytest.mark.parametrize("rows", [(), (0,), (4, 0), (2, 3, 4), (1, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_leading_dimensions(lora_problem, rows, dropout_p):
    lora_problem(rows=rows, dropout_p=dropout_p).check()


@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_no_input_features(lora_problem, rows, dropout_p):
    """Also where the gradients are summed over several chunks of rows."""
    lora_problem(rows=(rows,), in_features=0, dropout_p=dropout_p).check()


@pytest.mark.parametrize("rows", [1, 3, 7, 40, 200])
@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_one_rounding(lora_problem, dtype, rank, rows, same_roundings):
    """The branch is added in one go, however many ranks it has."""
    problem = lora_problem(rows=(rows,), out_features=203, rank=rank, dtype=dtype, adapter_dtype=F32)
    same_roundings(problem.call(problem.op), problem.call(problem.oracle))


@pytest.mark.parametrize("size", [(5, 40, 33, 3), (128, 768, 96, 8), (333, 100, 65, 9)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_float32_factors_of_a_half_precision_base(lora_problem, dtype, dropout_p, size):
    """Their gradients are as exact as float32, since x and grad_y are given: also where they are cut into bfloat16."""
    rows, in_features, out_features, rank = size
    problem = lora_problem(
        rows=(rows,),
        in_features=in_features,
        out_features=out_features,
        rank=rank,
        dtype=dtype,
        adapter_dtype=F32,
        dropout_p=dropout_p,
    )
    got, wanted = problem.solve(problem.op), problem.solve(problem.oracle, F64)
    for name in ("lora_A", "lora_B"):
        assert (got[name] - wanted[name]).abs().max() <= 2e-6 * wanted[name].abs().max(), name


@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_transposed_weight(lora_problem, rows, bias, dropout_p):
    lora_problem(rows=(rows,), transposed=True, bias=bias, dropout_p=dropout_p).check()


@pytest.mark.parametrize("rows", [5, 300])
def test_non_contiguous_arguments(lora_problem, rows):
    problem = lora_problem(rows=(rows,))
    for name, tensor in problem.tensors.items():
        strided = torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
        assert not strided.is_contiguous()
        problem.tensors[name] = strided
    problem.check()


def test_expanded_gradient(lora_problem):
    """sum() hands back a gradient whose strides are all zero."""
    problem = lora_problem()
    x = problem.tensors["x"].requires_grad_()
    problem.call(problem.op).sum().backward()
    x_oracle = x.detach().clone().requires_grad_()
    problem.call(problem.oracle, x=x_oracle).sum().backward()
    torch.testing.assert_close(x.grad, x_oracle.grad)


@pytest.mark.parametrize("rows", [6, 40])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradcheck(lora_problem, rows, dropout_p):
    problem = lora_problem(rows=(rows,), in_features=5, out_features=4, rank=2, dtype=F64, dropout_p=dropout_p)
    inputs = tuple(problem.tensors[name].requires_grad_() for name in GRADIENTS)
    assert torch.autograd.gradcheck(
        lambda x, bias, a, b: problem.call(problem.op, x=x, bias=bias, lora_A=a, lora_B=b), inputs
    )


@native
def test_double_backward_is_an_explicit_error(lora_problem):
    problem = lora_problem()
    x = problem.tensors["x"].requires_grad_()
    (grad,) = torch.autograd.grad(problem.call(problem.op).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        grad.sum().backward()


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("needs", [s for n in range(5) for s in itertools.combinations(GRADIENTS, n)], ids=str)
@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_every_subset_of_gradients(lora_problem, needs, rows, dropout_p):
    problem = lora_problem(rows=(rows,), dropout_p=dropout_p)
    everything, some = problem.solve(problem.op), problem.solve(problem.op, needs=needs)
    assert set(some) == {"y", *needs}
    for name, value in some.items():
        assert torch.equal(value, everything[name]), name


@native
def test_opcheck(lora_problem):
    for options in ({}, {"dropout_p": 0.5}, {"bias": False}, {"rows": (2, 3)}, {"dtype": BF16, "adapter_dtype": F32}):
        problem = lora_problem(**options)
        tensors = [t if t is None else t.requires_grad_(n != "weight") for n, t in problem.tensors.items()]
        opcheck(torch.ops.peft_ext.lora_linear, (*tensors, 0.5, problem.dropout_p, problem.seed))
        x, weight, _, a, b = (t if t is None else t.detach() for t in tensors)
        grad_y = torch.randn(*x.shape[:-1], weight.size(0)).to(x)
        for needs in itertools.product([False, True], repeat=4):
            opcheck(
                torch.ops.peft_ext.lora_linear_backward,
                (grad_y, x, weight, a, b, 0.5, problem.dropout_p, problem.seed, needs),
                test_utils=("test_schema", "test_faketensor"),
            )


@native
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_saves_only_its_arguments(lora_problem, dropout_p):
    """No mask, no dropped, widened or copied x: what is kept for the backward is what came in."""
    problem = lora_problem(dtype=BF16, adapter_dtype=F32, dropout_p=dropout_p)
    for name, tensor in problem.tensors.items():
        tensor.requires_grad_(name != "weight")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        problem.call(problem.op)
    arguments = [problem.tensors[n] for n in ("x", "weight", "lora_A", "lora_B")]
    arguments += [] if problem.seed is None else [problem.seed]
    assert sorted(saved) == sorted(t.data_ptr() for t in arguments)


@pytest.mark.each_instruction_set
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 33), (40, 128), (3, 4096)])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("seed", [0, -1, 0x123456789ABCDEF])
def test_dropout_mask_is_philox(device, rows, columns, dtype, seed):
    """With W = 0 and A = B = 1 the op shows its mask, and its gradient the same one."""
    p, key = 0.3, torch.tensor([seed], device=device)
    x = torch.ones(rows, columns, dtype=dtype, device=device).requires_grad_()
    eye, zero = (
        torch.eye(columns, device=device, dtype=dtype),
        torch.zeros(columns, columns, device=device, dtype=dtype),
    )
    y = ops.lora_linear(x, zero, None, eye, eye, 1.0, dropout_p=p, seed=key)
    (grad,) = torch.autograd.grad(y.sum(), x)
    wanted = dropout_mask(rows, columns, p, key) * dropout_scale(p)
    torch.testing.assert_close(y, wanted.to(dtype))
    torch.testing.assert_close(grad, wanted.to(dtype))


def test_philox_known_answers():
    """The vectors of Random123, the authors' own implementation (philox4x32 7)."""
    words = reference.dropout._philox(*[[torch.tensor(v) for v in part] for part in ([0] * 4, [0] * 2)])
    assert [int(w) for w in words] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    full = 0xFFFFFFFF
    words = reference.dropout._philox(*[[torch.tensor(v) for v in part] for part in ([full] * 4, [full] * 2)])
    assert [int(w) for w in words] == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


def test_dropout_probability_and_independence():
    p, rows, columns = 0.1, 2000, 768
    masks = [~dropout_mask(rows, columns, p, torch.tensor([seed])) for seed in (1, 2)]
    sigma = (p * (1 - p) / (rows * columns)) ** 0.5
    for mask in masks:
        assert abs(mask.double().mean() - p) < 5 * sigma
        assert (mask.double().mean(0) - p).abs().max() < 6 * (p * (1 - p) / rows) ** 0.5
    assert abs((masks[0] & masks[1]).double().mean() - p * p) < 5 * sigma


@pytest.mark.parametrize("p", [0.0, 1e-9, 1.0])
def test_dropout_extremes(lora_problem, p):
    problem = lora_problem(dropout_p=p)
    problem.check()
    scale = 0.0 if p == 1.0 else 1.0  # nothing of the branch is left, or all of it
    without = lora_problem(rows=(5,))
    without.tensors = {**problem.tensors, "lora_B": scale * problem.tensors["lora_B"]}
    torch.testing.assert_close(problem.call(problem.op), without.call(without.op))


def test_seed_follows_the_generator(lora_problem):
    problem = lora_problem(rows=(64,))
    problem.dropout_p = 0.5

    def draw():
        return problem.call(problem.op)

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("rows", [130, 1000])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_same_bits_at_any_thread_count(lora_problem, rows, dropout_p, two_threads):
    """The branch's own work does not depend on threads; sizes keep at::'s GEMM from splitting its sums."""
    problem = lora_problem(rows=(rows,), in_features=40, out_features=24, dropout_p=dropout_p)
    two = problem.solve(problem.op, needs=("lora_A", "lora_B"))
    torch.set_num_threads(1)
    one = problem.solve(problem.op, needs=("lora_A", "lora_B"))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(lora_problem, dtype):
    """As F.linear: the base in the autocast dtype; the adapters and their gradients stay float32."""
    problem = lora_problem(rows=(40,), bias=True)
    with torch.autocast(problem.tensors["x"].device.type, dtype=dtype):
        got = problem.solve(problem.op)
    wanted = problem.solve(problem.oracle, F64)
    assert got["y"].dtype == dtype
    for name in GRADIENTS:
        assert got[name].dtype == F32
    for name, value in got.items():
        error = (value.double() - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error < {BF16: 3e-2, F16: 4e-3}[dtype], name


@pytest.mark.parametrize("enable_lora", [None, [True, False, True]], ids=["lora_linear", "merged_lora_linear"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_of_the_reference_is_the_ops(lora_problem, dtype, enable_lora, same_roundings):
    problem = lora_problem(rows=(40,), enable_lora=enable_lora)
    with torch.autocast(problem.tensors["x"].device.type, dtype=dtype):
        got, wanted = problem.solve(problem.oracle), problem.solve(problem.op)
    assert {name: value.dtype for name, value in got.items()} == {name: value.dtype for name, value in wanted.items()}
    same_roundings(got["y"], wanted["y"])


@native
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compile_has_one_graph_for_all_sizes(lora_problem, dropout_p):
    torch._dynamo.reset()

    def layer(x, weight, bias, a, b, seed):
        return ops.lora_linear(x, weight, bias, a, b, 0.5, dropout_p=dropout_p, seed=seed).sin()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 17, 500):
        problem = lora_problem(rows=(rows,), dropout_p=dropout_p)
        tensors = [t.requires_grad_(n != "weight") for n, t in problem.tensors.items()]
        leaves = [t for t in tensors if t.requires_grad]
        with torch.compiler.set_stance("default" if rows == 3 else "fail_on_recompile"):
            got = compiled(*tensors, problem.seed)
        wanted = layer(*tensors, problem.seed)
        torch.testing.assert_close(got, wanted)
        for one, other in zip(
            torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(one, other)


@native
@pytest.mark.slow
def test_compile_with_inductor(lora_problem):
    problem = lora_problem(rows=(7,))

    def layer(*tensors):
        return ops.lora_linear(*tensors, 0.5).relu()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*problem.tensors.values()), layer(*problem.tensors.values()))


@native
def test_meta_tensors():
    x, weight, a, b = (torch.empty(s, device="meta") for s in ((2, 3, 8), (6, 8), (2, 8), (6, 2)))
    assert ops.lora_linear(x, weight, None, a, b).shape == (2, 3, 6)


BAD = {
    "x: width": ({"x": torch.ones(2, 5)}, ValueError, r"x must be \[\.\.\., 16\]"),
    "x: scalar": ({"x": torch.tensor(1.0)}, ValueError, "x must be"),
    "x: dtype": ({"x": torch.ones(2, 16, dtype=BF16)}, TypeError, "x is .*weight is"),
    "x: integer": ({"x": torch.ones(2, 16, dtype=torch.int64)}, TypeError, "x is"),
    "x: device": ({"x": torch.ones(2, 16, device="meta")}, (ValueError, RuntimeError), "meta"),
    "weight: vector": ({"weight": torch.ones(16)}, ValueError, "weight must have 2 dimensions"),
    "weight: integer": ({"weight": torch.ones(12, 16, dtype=torch.int8)}, TypeError, "weight must be float32"),
    "weight: grad": ({"weight": torch.ones(12, 16).requires_grad_()}, ValueError, "weight requires grad"),
    "bias: shape": ({"bias": torch.ones(3)}, ValueError, r"bias must be \[12\]"),
    "bias: dtype": ({"bias": torch.ones(12, dtype=F64)}, TypeError, "bias is"),
    "A: shape": ({"lora_A": torch.ones(4, 15)}, ValueError, r"lora_A must be \[4, 16\]"),
    "A: rank": ({"lora_A": torch.ones(3, 16)}, ValueError, r"lora_A must be \[4, 16\]"),
    "A: dtype": ({"lora_A": torch.ones(4, 16, dtype=BF16)}, TypeError, "both must have one dtype"),
    "A: integer": ({"lora_A": torch.ones(4, 16, dtype=torch.int32)}, TypeError, "lora_A must be float32"),
    "B: shape": ({"lora_B": torch.ones(11, 4)}, ValueError, r"lora_B must be \[12, rank\]|lora_B must be \[12, 4\]"),
    "rank 0": ({"lora_A": torch.ones(0, 16), "lora_B": torch.ones(12, 0)}, ValueError, "rank > 0"),
    "float64 adapters": (
        {"lora_A": torch.ones(4, 16, dtype=F64), "lora_B": torch.ones(12, 4, dtype=F64)},
        TypeError,
        "lora_A is .*only a float64 weight",
    ),
}


@pytest.mark.parametrize("op", [ops.lora_linear, reference.lora_linear], ids=["op", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_tensors(op, change, error, message):
    tensors = {
        "x": torch.ones(2, 16),
        "weight": torch.ones(12, 16),
        "bias": torch.ones(12),
        "lora_A": torch.ones(4, 16),
        "lora_B": torch.ones(12, 4),
    }
    with pytest.raises(error, match=message):
        op(*{**tensors, **change}.values())


@pytest.mark.parametrize("op", [ops.lora_linear, reference.lora_linear], ids=["op", "reference"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scaling": float("nan")}, ValueError, "scaling must be finite"),
        ({"scaling": float("inf")}, ValueError, "scaling must be finite"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\]"),
        ({"dropout_p": 1.5, "seed": torch.tensor([1])}, ValueError, r"dropout_p must be in \[0, 1\]"),
        ({"dropout_p": float("nan")}, ValueError, r"dropout_p must be in \[0, 1\]"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, ValueError, "seed must have 1 element"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1.0])}, TypeError, "seed must be int64"),
    ],
    ids=str,
)
def test_bad_options(op, options, error, message):
    with pytest.raises(error, match=message):
        op(torch.ones(2, 16), torch.ones(12, 16), None, torch.ones(4, 16), torch.ones(12, 4), **options)


@native
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("flags", [[], [[True, False, True]]], ids=["lora_linear", "merged_lora_linear"])
def test_backward_refuses_what_does_not_fit(device, flags):
    good = {"grad_y": torch.ones(5, 12), "x": torch.ones(5, 16), "weight": torch.ones(12, 16)}
    good |= {"lora_A": torch.ones(8, 16), "lora_B": torch.ones(8, 4)} if flags else {}
    good |= {} if flags else {"lora_A": torch.ones(4, 16), "lora_B": torch.ones(12, 4)}
    name = "merged_lora_linear_backward" if flags else "lora_linear_backward"
    for changed, bad, error in (
        ("grad_y", torch.ones(5, 11), ValueError),
        ("grad_y", torch.ones(5, 12, dtype=F64), TypeError),
        ("x", torch.ones(5, 15), ValueError),
        ("lora_A", torch.ones(3, 16), ValueError),
    ):
        tensors = [tensor.to(device) for tensor in {**good, changed: bad}.values()]
        with pytest.raises(error, match=f"{changed} must be"):
            getattr(torch.ops.peft_ext, name)(*tensors, *flags, 1.0, 0.0, None, [True] * 4)
