from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.library import opcheck

from peft_ext import ops, reference
from peft_ext._loader import native_devices

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}

native = pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")
both = pytest.mark.parametrize("op", [ops.lora_merge_, reference.lora_merge_], ids=["op", "reference"])


def random_layer(rows, columns, rank, dtype, device, layout="rows"):
    weight = torch.randn(rows, columns, device=device).to(dtype)
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    if layout == "strided":
        weight = torch.stack([weight, weight], dim=-1)[..., 0]
    return weight, torch.randn(rank, columns, device=device).to(dtype), torch.randn(rows, rank, device=device).to(dtype)


@pytest.mark.each_instruction_set
@both
@pytest.mark.parametrize("layout", ["rows", "transposed", "strided"])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 17, 3), (65, 33, 8), (200, 130, 17)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_rounding(op, device, dtype, size, layout):
    """The merged weight is within one rounding of W + s B A in float64 (and of float32 sums, where those count)."""
    weight, a, b = random_layer(*size, dtype, device, layout)
    wanted = weight.double() + 0.5 * (b.double() @ a.double())
    residual, outliers = op(weight, a, b, 0.5)
    assert residual.dtype == torch.int8
    assert residual.shape == weight.shape
    assert outliers.dtype == dtype
    accumulated = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * size[2] * 20
    half_ulp = torch.finfo(dtype).eps * 0.5 * wanted.abs() * 1.01
    assert ((weight.double() - wanted).abs() <= half_ulp + accumulated).all()


@both
@pytest.mark.parametrize("layout", ["rows", "transposed", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outliers_are_in_row_major_order(op, device, dtype, layout):
    """Whatever the weight's strides, so that they fit a copy of it too."""
    weight, a, b = random_layer(130, 33, 4, dtype, device, layout)
    weight[::3, ::5] *= 1e-4
    before = weight.clone()
    residual, outliers = op(weight, a, b, 10.0)
    assert outliers.numel() > 300
    assert torch.equal(outliers, before[residual == -128])


@both
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty(op, shape):
    weight = torch.empty(shape)
    residual, outliers = op(weight, torch.ones(2, shape[1]), torch.ones(shape[0], 2))
    assert residual.shape == shape
    assert outliers.numel() == 0


def test_mixed_dtypes(device):
    """float32 factors on a bfloat16 weight count in full."""
    weight, a, b = random_layer(30, 20, 4, torch.float32, device)
    low = weight.bfloat16()
    wanted = (low.float() + b @ a).bfloat16()
    ops.lora_merge_(low, a, b)
    torch.testing.assert_close(low, wanted, rtol=0.01, atol=0.01)


@native
def test_opcheck():
    weight, a, b = random_layer(5, 6, 2, torch.float32, "cpu")
    every_other = torch.randn(12, 10).t()[::2, ::2]
    for kind in (weight, weight.t().contiguous().t(), torch.stack([weight, weight], dim=-1)[..., 0], every_other):
        rows, columns = kind.shape
        opcheck(
            torch.ops.peft_ext.lora_merge_,
            (kind, a[:, :columns], b[:rows], 0.5),
            test_utils=("test_schema", "test_faketensor"),
        )


@native
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_bumps_the_version(device, mode):
    """Autograd must notice that a saved weight was merged meanwhile."""
    weight, a, b = random_layer(5, 6, 2, torch.float32, device)
    x = torch.randn(3, 6, device=device, requires_grad=True)
    y = ops.lora_linear(x, weight, None, a, b)
    with mode():
        ops.lora_merge_(weight, a, b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@native
def test_inference_tensor_stays_as_it_is_outside_inference_mode(device):
    with torch.inference_mode():
        weight, a, b = random_layer(5, 6, 2, torch.float32, device)
        before = weight.clone()
    with pytest.raises(RuntimeError, match="inference tensor outside"):
        ops.lora_merge_(weight, a, b)
    assert torch.equal(weight, before)
    with torch.inference_mode():
        ops.lora_merge_(weight, a, b)
    assert not torch.equal(weight, before)


BAD = [
    ((torch.ones(4, 3), torch.ones(2, 4), torch.ones(4, 2)), ValueError, r"lora_A must be \[2, 3\]"),
    ((torch.ones(4, 3), torch.ones(2, 3), torch.ones(5, 2)), ValueError, r"lora_B must be \[4, (rank|2)\]"),
    ((torch.ones(4), torch.ones(2, 3), torch.ones(4, 2)), ValueError, "weight must have 2 dimensions"),
    ((torch.ones(4, 3).int(), torch.ones(2, 3), torch.ones(4, 2)), TypeError, "weight must be float32"),
    ((torch.ones(4, 3), torch.ones(2, 3).half(), torch.ones(4, 2)), TypeError, "both must have one dtype"),
    ((torch.ones(4, 3), torch.ones(2, 3), torch.ones(4, 2), float("nan")), ValueError, "scaling must be finite"),
    ((torch.ones(1, 3).expand(4, 3), torch.ones(2, 3), torch.ones(4, 2)), ValueError, "shares memory"),
    ((torch.ones(4, 3).requires_grad_(), torch.ones(2, 3), torch.ones(4, 2)), ValueError, "weight requires grad"),
]


@both
@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input_changes_nothing(op, arguments, error, message):
    before = arguments[0].clone()
    with pytest.raises(error, match=message):
        op(*arguments)
    assert torch.equal(arguments[0], before)


@native
@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input_shows_while_tracing(arguments, error, message):
    fakes = [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta").requires_grad_(a.requires_grad)
        if isinstance(a, torch.Tensor)
        else a
        for a in arguments
    ]
    with pytest.raises(error, match=message):
        torch.ops.peft_ext.lora_merge_(*fakes)
