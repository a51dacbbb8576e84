from __future__ import annotations

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
    opcheck(torch.ops.peft_ext.lora_merge_, (weight, a, b, 0.5), test_utils=("test_schema", "test_faketensor"))


@native
def test_bumps_the_version(device):
    """Autograd must notice that a saved weight was merged meanwhile."""
    weight, a, b = random_layer(5, 6, 2, torch.float32, device)
    x = torch.randn(3, 6, device=device, requires_grad=True)
    y = ops.lora_linear(x, weight, None, a, b)
    ops.lora_merge_(weight, a, b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@both
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(4, 3), torch.ones(2, 4), torch.ones(4, 2)), ValueError, r"lora_A must be \[2, 3\]"),
        ((torch.ones(4, 3), torch.ones(2, 3), torch.ones(5, 2)), ValueError, r"lora_B must be \[4, (rank|2)\]"),
        ((torch.ones(4), torch.ones(2, 3), torch.ones(4, 2)), ValueError, "weight must have 2 dimensions"),
        ((torch.ones(4, 3).int(), torch.ones(2, 3), torch.ones(4, 2)), TypeError, "weight must be float32"),
        ((torch.ones(4, 3), torch.ones(2, 3).half(), torch.ones(4, 2)), TypeError, "both must have one dtype"),
        ((torch.ones(4, 3), torch.ones(2, 3), torch.ones(4, 2), float("nan")), ValueError, "scaling must be finite"),
        ((torch.ones(1, 3).expand(4, 3), torch.ones(2, 3), torch.ones(4, 2)), ValueError, "shares memory"),
        ((torch.ones(4, 3).requires_grad_(), torch.ones(2, 3), torch.ones(4, 2)), ValueError, "weight requires grad"),
    ],
)
def test_bad_input_changes_nothing(op, arguments, error, message):
    before = arguments[0].clone()
    with pytest.raises(error, match=message):
        op(*arguments)
    assert torch.equal(arguments[0], before)
