from __future__ import annotations

import itertools

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from peft_ext import ops, reference
from peft_ext._loader import native_devices

native = pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")
FLAGS = [list(flags) for flags in itertools.product([False, True], repeat=3) if any(flags)]

# Values against float64 for every dtype and size: tests/ops/test_lora_linear.py, test_matches_float64.


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("flags", [*FLAGS, [True], [False, True], [True, False, True, True]], ids=str)
@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_every_choice_of_slices(lora_problem, flags, rows, transposed, dropout_p):
    lora_problem(
        rows=(rows,), enable_lora=flags, out_features=12, transposed=transposed, dropout_p=dropout_p, rank=3
    ).check()


def test_equals_separate_layers(device):
    """One merged projection against three lora_linear, each on its slice."""
    x, weight, bias = (torch.randn(*s, device=device) for s in ((2, 7, 16), (36, 16), (36,)))
    a, b = torch.randn(2 * 4, 16, device=device), torch.randn(2 * 12, 4, device=device)
    got = ops.merged_lora_linear(x, weight, bias, a, b, [True, False, True], 0.7)
    query = ops.lora_linear(x, weight[:12], bias[:12], a[:4], b[:12], 0.7)
    key = F.linear(x, weight[12:24], bias[12:24])
    value = ops.lora_linear(x, weight[24:], bias[24:], a[4:], b[12:], 0.7)
    torch.testing.assert_close(got, torch.cat([query, key, value], dim=-1))


def test_equals_loralib_formula(device):
    """loralib: the update is a grouped convolution of B over A, its rows scattered to the enabled slices."""
    flags, rank = [True, False, True], 4
    x, weight = torch.randn(5, 16, device=device), torch.randn(36, 16, device=device)
    a, b = torch.randn(2 * rank, 16, device=device), torch.randn(24, rank, device=device)
    delta = F.conv1d(a.unsqueeze(0), b.unsqueeze(-1), groups=2).squeeze(0)
    update = torch.zeros(36, 16, device=device)
    update[torch.tensor(flags).repeat_interleave(12)] = delta
    got = ops.merged_lora_linear(x, weight, None, a, b, flags, 0.5)
    torch.testing.assert_close(got, x @ (weight + 0.5 * update).T)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradcheck(lora_problem, dropout_p):
    problem = lora_problem(
        in_features=5,
        out_features=6,
        rank=2,
        dtype=torch.float64,
        enable_lora=[True, False, True],
        dropout_p=dropout_p,
    )
    names = ("x", "bias", "lora_A", "lora_B")
    inputs = tuple(problem.tensors[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(
        lambda *values: problem.call(problem.op, **dict(zip(names, values, strict=True))), inputs
    )


@native
def test_opcheck(lora_problem):
    flags = [True, False, True]
    for options in ({}, {"dropout_p": 0.5}, {"bias": False}):
        problem = lora_problem(enable_lora=flags, **options)
        tensors = [t if t is None else t.requires_grad_(n != "weight") for n, t in problem.tensors.items()]
        opcheck(torch.ops.peft_ext.merged_lora_linear, (*tensors, flags, 0.5, problem.dropout_p, problem.seed))
        x, weight, _, a, b = (t if t is None else t.detach() for t in tensors)
        opcheck(
            torch.ops.peft_ext.merged_lora_linear_backward,
            (
                torch.randn(5, 12, device=x.device),
                x,
                weight,
                a,
                b,
                flags,
                0.5,
                problem.dropout_p,
                problem.seed,
                [True] * 4,
            ),
            test_utils=("test_schema", "test_faketensor"),
        )


@native
def test_autocast_and_compile(lora_problem):
    problem = lora_problem(enable_lora=[True, False, True])
    eager = problem.call(problem.op)
    compiled = torch.compile(problem.op, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(problem.call(compiled), eager)
    with torch.autocast(problem.tensors["x"].device.type, dtype=torch.bfloat16):
        low = problem.call(problem.op)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), eager, rtol=0.05, atol=0.1)


@native
def test_double_backward_is_an_explicit_error(lora_problem):
    problem = lora_problem(enable_lora=[True, True])
    x = problem.tensors["x"].requires_grad_()
    (grad,) = torch.autograd.grad(problem.call(problem.op).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("op", [ops.merged_lora_linear, reference.merged_lora_linear], ids=["op", "reference"])
@pytest.mark.parametrize(
    ("flags", "rows_A", "rows_B", "message"),
    [
        ([False, False], 2, 4, "enable_lora must enable a slice"),
        ([], 2, 4, "enable_lora must enable a slice"),
        ([True] * 5, 10, 12, "5 slices, which do not divide weight's 12 outputs"),
        ([True, True], 2, 12, r"lora_A must be \[4, 8\]"),
        ([True, False], 2, 12, r"lora_B must be \[6, (rank|2)\]"),
    ],
)
def test_bad_slices(op, flags, rows_A, rows_B, message):
    with pytest.raises(ValueError, match=message):
        op(torch.ones(3, 8), torch.ones(12, 8), None, torch.ones(rows_A, 8), torch.ones(rows_B, 2), flags)
