from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from peft_ext import ops, reference
from peft_ext._loader import native_devices

BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}
PAIRS = [(ops.lora_merge_, ops.lora_unmerge_), (reference.lora_merge_, reference.lora_unmerge_)]

native = pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")
both = pytest.mark.parametrize(("merge_", "unmerge_"), PAIRS, ids=["op", "reference"])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = BITS[one.dtype]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


@pytest.mark.each_instruction_set
@both
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("layout", ["rows", "transposed", "strided"])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 17, 3), (130, 33, 8)], ids=str)
@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_gives_the_same_bits_back(merge_, unmerge_, device, dtype, size, layout, scale):
    """Also where the update drowns the weight, overflows it, or meets zeros of both signs, infinities and NaN."""
    rows, columns, rank = size
    weight = torch.randn(rows, columns, device=device).to(dtype)
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-7, 1e4, float("inf"), float("-inf"), float("nan")]).to(weight)
    weight.view(-1)[: special.numel()] = special[: weight.numel()]
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    if layout == "strided":
        weight = torch.stack([weight, weight], dim=-1)[..., 0]
    before = weight.clone()
    a, b = torch.randn(rank, columns, device=device), torch.randn(rows, rank, device=device)
    residual, outliers = merge_(weight, a, b, scale)
    unmerge_(weight, a, b, residual, outliers, scale)
    assert same_bits(weight, before)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_bits_come_back(data):
    """Weights of arbitrary bit patterns."""
    dtype = data.draw(st.sampled_from(sorted(BITS, key=str)))
    bits = BITS[dtype]
    info = torch.iinfo(bits)
    values = data.draw(st.lists(st.integers(info.min, info.max), min_size=6, max_size=6))
    weight = torch.tensor(values, dtype=bits).view(dtype).view(2, 3)
    before = weight.clone()
    factors = st.floats(-1e3, 1e3, width=32)
    a = torch.tensor(data.draw(st.lists(factors, min_size=3, max_size=3))).view(1, 3)
    b = torch.tensor(data.draw(st.lists(factors, min_size=2, max_size=2))).view(2, 1)
    residual, outliers = ops.lora_merge_(weight, a, b, 0.3)
    ops.lora_unmerge_(weight, a, b, residual, outliers, 0.3)
    assert same_bits(weight, before)


@both
@pytest.mark.parametrize("merged_layout", ["rows", "transposed"])
@pytest.mark.parametrize("unmerged_layout", ["rows", "transposed", "strided"])
def test_a_copy_with_other_strides(merge_, unmerge_, device, merged_layout, unmerged_layout):
    """As where a merged model is saved and loaded. Compilers may round B A differently along and across memory."""
    layouts = {
        "rows": lambda t: t.clone(memory_format=torch.contiguous_format),
        "transposed": lambda t: t.t().contiguous().t(),
        "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    }
    before = torch.randn(130, 33, device=device)
    before[::3, ::5] *= 1e-4
    weight = layouts[merged_layout](before)
    a, b = torch.randn(4, 33, device=device), torch.randn(130, 4, device=device)
    residual, outliers = merge_(weight, a, b, 10.0)
    assert outliers.numel() > 300
    weight = layouts[unmerged_layout](weight)
    unmerge_(weight, a, b, residual, outliers, 10.0)
    if merged_layout == unmerged_layout:
        assert same_bits(weight, before)
    torch.testing.assert_close(weight, before, rtol=0, atol=4 * torch.finfo().eps * 10 * (b @ a).abs().max().item())


@native
def test_bumps_the_version_in_inference_mode(device):
    """Autograd must notice that a saved weight was unmerged meanwhile."""
    weight, a, b = (torch.randn(*shape, device=device) for shape in ((5, 6), (2, 6), (5, 2)))
    residual, outliers = ops.lora_merge_(weight, a, b)
    x = torch.randn(3, 6, device=device, requires_grad=True)
    y = ops.lora_linear(x, weight, None, a, b)
    with torch.inference_mode():
        ops.lora_unmerge_(weight, a, b, residual, outliers)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@native
def test_inference_tensor_stays_as_it_is_outside_inference_mode(device):
    with torch.inference_mode():
        weight, a, b = (torch.randn(*shape, device=device) for shape in ((5, 6), (2, 6), (5, 2)))
        residual, outliers = ops.lora_merge_(weight, a, b)
        merged = weight.clone()
    with pytest.raises(RuntimeError, match="inference tensor outside"):
        ops.lora_unmerge_(weight, a, b, residual, outliers)
    assert torch.equal(weight, merged)


def test_other_thread_count(device, two_threads):
    weight = torch.randn(300, 70, device=device)
    before = weight.clone()
    a, b = torch.randn(5, 70, device=device), torch.randn(300, 5, device=device)
    residual, outliers = ops.lora_merge_(weight, a, b)
    torch.set_num_threads(1)
    ops.lora_unmerge_(weight, a, b, residual, outliers)
    assert same_bits(weight, before)


def test_few_outliers(device):
    """What makes the residual worth its eight bits: at a usual size of the update, hardly a weight misses them."""
    weight = 0.05 * torch.randn(256, 256, device=device)
    a, b = 0.05 * torch.randn(8, 256, device=device), 0.01 * torch.randn(256, 8, device=device)
    _, outliers = ops.lora_merge_(weight, a, b, 2.0)
    assert outliers.numel() < 0.01 * weight.numel()


@native
def test_opcheck():
    weight, a, b = torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    residual, outliers = ops.lora_merge_(weight, a, b, 0.5)
    opcheck(
        torch.ops.peft_ext.lora_unmerge_,
        (weight, a, b, residual, outliers, 0.5),
        test_utils=("test_schema", "test_faketensor"),
    )


BAD = [
    ({"residual": torch.zeros(4, 4, dtype=torch.int8)}, ValueError, "residual must have weight's shape"),
    ({"residual": torch.zeros(4, 3, dtype=torch.int16)}, TypeError, "residual must be int8"),
    ({"outliers": torch.zeros(1)}, ValueError, "outliers must have the 0 elements"),
    ({"outliers": torch.zeros(0, dtype=torch.float64)}, TypeError, "outliers is"),
    ({"outliers": torch.zeros(0, 1)}, ValueError, "outliers must have 1 dimension"),
    ({"residual": torch.full((4, 3), -128, dtype=torch.int8)}, ValueError, "outliers must have the 12 elements"),
    ({"lora_A": torch.ones(2, 4)}, ValueError, "lora_A must be"),
]


def arguments_with(change):
    arguments = {
        "weight": torch.ones(4, 3),
        "lora_A": torch.ones(2, 3),
        "lora_B": torch.ones(4, 2),
        "residual": torch.zeros(4, 3, dtype=torch.int8),
        "outliers": torch.zeros(0),
    }
    return {**arguments, **change}.values()


@both
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_changes_nothing(merge_, unmerge_, change, error, message):
    weight, *others = arguments_with(change)
    with pytest.raises(error, match=message):
        unmerge_(weight, *others)
    assert torch.equal(weight, torch.ones(4, 3))


@native
@pytest.mark.parametrize(("change", "error", "message"), [bad for bad in BAD if "elements" not in bad[2]])
def test_bad_input_shows_while_tracing(change, error, message):
    with pytest.raises(error, match=message):
        torch.ops.peft_ext.lora_unmerge_(*(tensor.to("meta") for tensor in arguments_with(change)))
