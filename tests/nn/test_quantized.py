"""QuantizedLinear and what it is made by."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_ext import LoRALinear, MergedLoRALinear, QuantizedLinear, dequantize_weight, quantize_weight

DTYPES = ["int8", "int4", "bfloat16"]
# ‖W' - W‖ / ‖W‖ of a normal weight
ERROR = {"int8": 0.012, "int4": 0.1, "bfloat16": 0.003}


def relative_error(got, wanted):
    return (torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted)).item()


@pytest.mark.parametrize(("dtype", "group_size"), [("int8", None), ("int8", 32), ("int4", None), ("int4", 64)])
def test_rounds_to_the_nearest_value(dtype, group_size):
    weight = torch.randn(12, 128)
    values, scale = quantize_weight(weight, dtype, group_size)
    found = dequantize_weight(values, scale)
    groups = scale.shape[1]
    step = scale.abs().repeat_interleave(128 // groups, dim=1)
    # but for what is beyond the last of the sixteen 4-bit values, which is one step short of the first
    assert ((found - weight).abs() <= step * (0.5001 if dtype == "int8" else 1.0001)).all()
    assert relative_error(found, weight) < ERROR[dtype] * (1.3 if group_size == 64 else 1)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_zeros_and_extremes_are_kept(dtype):
    weight = torch.zeros(3, 32)
    weight[1, 5], weight[2, 7] = -3.0, 3.0
    found = dequantize_weight(*quantize_weight(weight, dtype))
    torch.testing.assert_close(found, weight)


def test_all_sixteen_values_round_trip():
    weight = torch.arange(-8.0, 8.0).repeat(4)[None] * 0.5
    assert dequantize_weight(*quantize_weight(weight, "int4")).equal(weight)


def test_half_precisions_and_float64():
    weight = torch.randn(4, 32)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        values, scale = quantize_weight(weight.to(dtype))
        assert scale.dtype == torch.float32
        assert values.equal(quantize_weight(weight.to(dtype).float())[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_layer_computes_what_its_weight_says(dtype, x_dtype):
    linear = nn.Linear(64, 10)
    layer = QuantizedLinear.from_linear(linear, dtype)
    x = torch.randn(3, 64).to(x_dtype)
    got = layer(x)
    assert got.dtype == x_dtype
    wanted = F.linear(x.double(), layer.dequantized(torch.float64), linear.bias.double())
    tolerance = 2e-2 if dtype == "bfloat16" or x_dtype in (torch.bfloat16, torch.float16) else 1e-5
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    assert relative_error(layer.dequantized(), linear.weight.detach()) < ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv1d_is_turned(dtype):
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    conv = Conv1D(10, 64)
    layer = QuantizedLinear.from_linear(conv, dtype)
    assert (layer.in_features, layer.out_features) == (64, 10)
    assert relative_error(layer.dequantized(), conv.weight.detach().t()) < ERROR[dtype]
    fresh = copy.deepcopy(layer)
    fresh.load_state_dict(conv.state_dict())
    assert fresh.dequantized().equal(layer.dequantized())


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dict(dtype, tmp_path):
    save_file, load_file = (getattr(pytest.importorskip("safetensors.torch"), n) for n in ("save_file", "load_file"))
    linear = nn.Linear(64, 10)
    layer = QuantizedLinear.from_linear(linear, dtype)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh = QuantizedLinear(64, 10, dtype=dtype)
    assert fresh(torch.ones(1, 64)).equal(torch.zeros(1, 10))
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 64)
    assert fresh(x).equal(layer(x))
    plain = QuantizedLinear(64, 10, dtype=dtype)
    plain.load_state_dict(linear.state_dict())
    assert plain(x).equal(layer(x))


def test_state_of_another_size_is_refused():
    layer = QuantizedLinear(64, 10)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(nn.Linear(32, 10).state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_leave_the_weight_alone(dtype):
    layer = QuantizedLinear.from_linear(nn.Linear(64, 10), dtype)
    before = layer.dequantized()
    for moved in (layer.half(), layer.double(), layer.to(torch.bfloat16), layer.float()):
        assert moved.dequantized().equal(before)
    assert layer.bias.dtype == torch.float32
    assert layer.half()(torch.ones(1, 64).half()).dtype == torch.float16
    assert layer.to("meta").weight.is_meta


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_and_pickle(dtype):
    layer = QuantizedLinear.from_linear(nn.Linear(64, 10), dtype)
    x = torch.randn(2, 64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other(x).equal(layer(x))
        assert repr(other) == repr(layer)


def test_a_weight_that_is_changed_in_place_counts():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 10, bias=False))
    x = torch.randn(2, 64)
    before = layer(x)
    layer.weight.zero_()
    assert layer(x).equal(torch.zeros_like(before))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles(dtype):
    torch.compiler.reset()  # layers that other tests compiled count as recompilations, which are limited
    layer = LoRALinear(QuantizedLinear.from_linear(nn.Linear(64, 10), dtype), rank=2, init="gaussian")
    x = torch.randn(3, 64)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, dynamic=True)(x), layer(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_around_it(dtype):
    base = QuantizedLinear.from_linear(nn.Linear(64, 12), dtype)
    layer = LoRALinear(base, rank=4, alpha=8.0, init="gaussian")
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(5, 64)
    wanted = base(x) + 2.0 * x @ layer.lora_A.T @ layer.lora_B.T
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-5
    torch.testing.assert_close(layer(x), wanted, rtol=tolerance, atol=tolerance)
    layer(x).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    with pytest.raises(ValueError, match=f"a base weight in {dtype} cannot take an update in"):
        layer.merge()
    fresh = LoRALinear(QuantizedLinear(64, 12, dtype=dtype), rank=4, alpha=8.0)
    fresh.load_state_dict(layer.state_dict())
    assert fresh(x).equal(layer(x))
    fresh.load_state_dict(base.state_dict())  # as a layer's without adapters
    assert fresh(x).equal(layer(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_lora_around_it(dtype):
    base = QuantizedLinear.from_linear(nn.Linear(64, 12), dtype)
    layer = MergedLoRALinear(base, [True, False, True], rank=2, init="gaussian")
    assert (layer.in_features, layer.out_features) == (64, 12)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x)[:, 4:8], base(x)[:, 4:8], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 32, dtype=torch.int8),), TypeError, "weight must be floating point, but is torch.int8"),
        ((torch.ones(32),), ValueError, "weight must have 2 dimensions"),
        ((torch.ones(2, 32), "int3"), ValueError, "dtype must be 'int8' or 'int4', got 'int3'"),
        ((torch.ones(2, 32), "bfloat16"), ValueError, "dtype must be 'int8' or 'int4'"),
        (
            (torch.ones(2, 24), "int4"),
            ValueError,
            "group_size must be a multiple of 32 that divides 24 in_features, got 32",
        ),
        ((torch.ones(2, 64), "int8", 48), ValueError, "divides 64 in_features or all of them, got 48"),
        ((torch.ones(2, 64), "int8", 0), ValueError, "group_size must be"),
        ((torch.tensor([[torch.inf] * 32]),), ValueError, "weight must be finite"),
    ],
)
def test_bad_weights(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize_weight(*arguments)


def test_bad_layers():
    with pytest.raises(ValueError, match="dtype must be one of"):
        QuantizedLinear(32, 4, dtype="nf4")
    with pytest.raises(ValueError, match="group_size is for 'int8' and 'int4'"):
        QuantizedLinear(32, 4, dtype="bfloat16", group_size=32)
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear or a Conv1D, got ReLU"):
        QuantizedLinear.from_linear(nn.ReLU())
