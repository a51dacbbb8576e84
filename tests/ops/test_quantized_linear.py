"""quantized_linear, and the LoRA ops on a quantized weight."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from peft_ext import dequantize_weight, ops, quantize_weight, reference
from peft_ext._loader import native_devices

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Largest error allowed, relative to the largest element of the float64 result.
TOLERANCE = {F64: 1e-13, F32: 3e-6, BF16: 2e-2, F16: 2e-3}
# Every path: rows that widen in registers, a panel of them in each of its tiles, and the product of panels.
ROWS = [1, 2, 3, 4, 5, 7, 17, 32, 33, 100]
FORMATS = {"int8": ("int8", None), "int8 in groups": ("int8", 32), "int4": ("int4", 32), "int4 in 64": ("int4", 64)}

native = pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")


@dataclass
class Problem:
    rows: tuple[int, ...] = (5,)
    in_features: int = 64
    out_features: int = 13
    dtype: torch.dtype = F32
    kept: str = "int8"
    bias: bool = True
    device: torch.device | str = "cpu"
    x: Tensor = field(init=False)
    b: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        weight = torch.randn(self.out_features, self.in_features, device=self.device)
        self.weight, self.scale = quantize_weight(weight, *FORMATS[self.kept])
        self.x = torch.randn(*self.rows, self.in_features, device=self.device).to(self.dtype)
        self.b = torch.randn(self.out_features, device=self.device).to(self.dtype) if self.bias else None

    def solve(self, op, dtype=None, needs=("x", "bias")):
        """Output and gradients by name, optionally with what is floating cast to ``dtype`` first."""
        x = self.x.to(dtype or self.dtype).detach().requires_grad_("x" in needs)
        bias = None if self.b is None else self.b.to(dtype or self.dtype).detach().requires_grad_("bias" in needs)
        y = op(x, self.weight, self.scale, bias)
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(self.dtype).to(y)
        leaves = {name: leaf for name, leaf in (("x", x), ("bias", bias)) if leaf is not None and name in needs}
        grads = torch.autograd.grad(y, list(leaves.values()), grad_y) if leaves else []
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    def check(self) -> None:
        got, wanted = self.solve(ops.quantized_linear), self.solve(reference.quantized_linear, F64)
        assert got.keys() == wanted.keys()
        for name, value in got.items():
            assert value.dtype == self.dtype, name
            assert value.shape == wanted[name].shape, name
            if value.numel():
                error = ((value.double() - wanted[name]).abs().max() / wanted[name].abs().max().clamp_min(1.0)).item()
                assert error <= TOLERANCE[self.dtype], f"{name}: error {error:.1e}"


@pytest.fixture
def problem(device):
    return lambda **options: Problem(device=device, **options)


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kept", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_float64(problem, dtype, kept, rows):
    problem(rows=(rows,), dtype=dtype, kept=kept).check()


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("rows", [1, 3, 5, 33])
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (3, 17), (17, 3), (33, 33), (530, 7), (16, 1)])
def test_odd_sizes(problem, in_features, out_features, rows):
    problem(rows=(rows,), in_features=in_features, out_features=out_features).check()


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("kept", FORMATS)
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_several_chunks_and_panels(problem, kept, rows):
    problem(rows=(rows,), in_features=2048 + 64, out_features=600, kept=kept).check()


@pytest.mark.parametrize("rows", [(), (0,), (4, 0), (2, 3, 4), (1, 1, 1, 50)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kept", ["int8", "int4"])
def test_leading_dimensions(problem, rows, bias, kept):
    problem(rows=rows, bias=bias, kept=kept).check()


@pytest.mark.parametrize("rows", [1, 40])
def test_without_inputs_or_outputs(device, rows):
    x, scale = torch.ones(rows, 0, device=device), torch.zeros(3, 1, device=device)
    weight = torch.zeros(3, 0, dtype=torch.int8, device=device)
    assert ops.quantized_linear(x, weight, scale).equal(torch.zeros(rows, 3, device=device))
    bias = torch.tensor([1.0, 2.0, 3.0], device=device)
    assert ops.quantized_linear(x, weight, scale, bias).equal(bias.expand(rows, 3))
    none = torch.zeros(0, 32, dtype=torch.int8, device=device)
    leaf = torch.ones(rows, 32, device=device, requires_grad=True)
    y = ops.quantized_linear(leaf, none, torch.zeros(0, 1, device=device))
    assert y.shape == (rows, 0)
    assert torch.autograd.grad(y, leaf, torch.zeros_like(y))[0].equal(torch.zeros_like(leaf))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("kept", ["int8", "int4"])
def test_non_contiguous_arguments(problem, rows, kept):
    strided = problem(rows=(rows,), kept=kept)
    strided.x = torch.stack([strided.x, torch.full_like(strided.x, torch.nan)], dim=-1)[..., 0]
    strided.weight = strided.weight.t().contiguous().t()
    strided.scale = torch.stack([strided.scale, torch.full_like(strided.scale, torch.nan)], dim=-1)[..., 0]
    strided.check()


@pytest.mark.parametrize("kept", ["int8", "int4"])
def test_dequantize_is_what_it_multiplies_with(problem, kept):
    p = problem(rows=(1,), kept=kept)
    eye = torch.eye(64, dtype=F64, device=p.x.device)
    assert ops.quantized_linear(eye, p.weight, p.scale).t().equal(dequantize_weight(p.weight, p.scale, F64))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)), ids=str)
def test_every_subset_of_gradients(problem, needs):
    names = [name for name, needed in zip(("x", "bias"), needs, strict=True) if needed]
    p = problem(rows=(40,))
    got, wanted = p.solve(ops.quantized_linear, needs=names), p.solve(reference.quantized_linear, needs=names)
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", ["int8", "int4"])
def test_gradcheck_to_second_order(problem, kept):
    p = problem(rows=(3,), dtype=F64, kept=kept)
    x, bias = p.x.requires_grad_(), p.b.requires_grad_()
    call = lambda x, bias: ops.quantized_linear(x, p.weight, p.scale, bias)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, bias))
    assert torch.autograd.gradgradcheck(call, (x, bias))


@native
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("kept", ["int8", "int4"])
def test_opcheck(problem, rows, kept):
    p = problem(rows=(rows,), kept=kept)
    op = torch.ops.peft_ext.quantized_linear.default
    opcheck(op, (p.x.requires_grad_(), p.weight, p.scale, p.b.requires_grad_()))
    grad_y = torch.randn(rows, p.out_features, device=p.x.device)
    opcheck(torch.ops.peft_ext.quantized_linear_backward.default, (grad_y, p.weight, p.scale))


@pytest.mark.parametrize("kept", ["int8", "int4"])
def test_compiles_for_any_number_of_rows(problem, kept):
    p = problem(kept=kept)
    compiled = torch.compile(ops.quantized_linear, fullgraph=True, dynamic=True)
    for rows in (2, 5, 40):
        x = torch.randn(rows, 64, device=p.x.device, requires_grad=True)
        torch.testing.assert_close(compiled(x, p.weight, p.scale, p.b), ops.quantized_linear(x, p.weight, p.scale, p.b))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_of_the_input(problem, dtype, rows):
    p = problem(rows=(rows,))
    with torch.autocast(p.x.device.type, dtype=dtype):
        got = ops.quantized_linear(p.x, p.weight, p.scale, p.b)
    assert got.dtype == dtype
    assert got.equal(ops.quantized_linear(p.x.to(dtype), p.weight, p.scale, p.b.to(dtype)))


@native
@pytest.mark.parametrize("kept", FORMATS)
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_thread_count_changes_nothing(kept, rows, two_threads):
    p = Problem(rows=(rows,), in_features=512, out_features=300, kept=kept)
    two = p.solve(ops.quantized_linear)
    torch.set_num_threads(1)
    one = p.solve(ops.quantized_linear)
    assert two["y"].equal(one["y"])


# --- the LoRA ops on a quantized weight ---


def lora_linear(rank=3):
    A, B = torch.randn(rank, 64), torch.randn(12, rank)
    return (lambda op, x, w, b, A, B, **k: op(x, w, b, A, B, 0.5, **k)), "lora_linear", [A, B]


def merged_lora_linear():
    A, B = torch.randn(4, 64), torch.randn(8, 2)
    flags = [True, False, True]
    return (lambda op, x, w, b, A, B, **k: op(x, w, b, A, B, flags, 0.5, **k)), "merged_lora_linear", [A, B]


def multi_lora_linear():
    factors = [torch.randn(2, 64), torch.randn(3, 64), torch.randn(12, 2), torch.randn(12, 3)]

    def call(op, x, w, b, *f, **k):
        index = torch.arange(len(x), device=x.device) % 3 - 1
        return op(x, w, b, f[:2], f[2:], torch.tensor([0.5, 2.0], device=x.device), index, **k)

    return call, "multi_lora_linear", factors


LORA = [lora_linear, merged_lora_linear, multi_lora_linear]


@pytest.mark.parametrize("make", LORA)
@pytest.mark.parametrize("kept", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3, 40, 700])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_lora_on_a_quantized_weight(device, make, kept, rows, dtype):
    call, name, factors = make()
    factors = [factor.to(device) for factor in factors]
    p = Problem(rows=(rows,), out_features=12, dtype=dtype, kept=kept, device=device)
    grad_y = torch.randn(rows, 12, device=device).to(dtype)

    def solve(op, weight, base, factor, **options):
        leaves = [t.detach().requires_grad_() for t in (p.x.to(base), p.b.to(base), *(f.to(factor) for f in factors))]
        x, bias, *changed = leaves
        y = call(op, x, weight, bias, *changed, **options)
        return [y, *torch.autograd.grad(y, leaves, grad_y.to(base))]

    adapter = F64 if dtype == F64 else F32
    got = solve(getattr(ops, name), p.weight, dtype, adapter, weight_scale=p.scale)
    wanted = solve(getattr(reference, name), dequantize_weight(p.weight, p.scale, F64), F64, F64)
    for value, exact in zip(got, wanted, strict=True):
        error = (value.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)
        assert error <= TOLERANCE[dtype], error


@native
@pytest.mark.parametrize("make", LORA)
def test_lora_opcheck(device, make):
    call, name, factors = make()
    p = Problem(rows=(6,), out_features=12, kept="int4", device=device)
    arguments = call(lambda *a, **k: (a, k), p.x.requires_grad_(), p.weight, p.b, *(f.to(device) for f in factors))
    (positional, _), packet = arguments, getattr(torch.ops.peft_ext, name).default
    opcheck(packet, tuple(list(a) if isinstance(a, tuple) else a for a in positional), {"weight_scale": p.scale})


@pytest.mark.parametrize("make", LORA)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_lora_autocast_of_the_input(device, make, dtype):
    call, name, factors = make()
    op, factors = getattr(ops, name), [f.to(device) for f in factors]
    p = Problem(rows=(40,), out_features=12, device=device)
    with torch.autocast(p.x.device.type, dtype=dtype):
        got = call(op, p.x, p.weight, p.b, *factors, weight_scale=p.scale)
    assert got.equal(call(op, p.x.to(dtype), p.weight, p.b.to(dtype), *factors, weight_scale=p.scale))


# --- bad arguments ---

BAD = {
    "weight of floats": (TypeError, "weight must be int8, or uint8 for 4-bit values", {"weight": torch.ones(4, 32)}),
    "weight of three dimensions": (
        ValueError,
        r"weight must have 2 dimensions, but has shape \[4, 32, 1\]",
        {"weight": torch.ones(4, 32, 1, dtype=torch.int8)},
    ),
    "packed weight": (
        ValueError,
        r"multiple of 16 bytes a row, but has shape \[4, 12\]",
        {"weight": torch.ones(4, 12, dtype=torch.uint8), "x": torch.ones(2, 24)},
    ),
    "scale dtype": (TypeError, "weight_scale must be float32", {"scale": torch.ones(4, 1).half()}),
    "scale shape": (ValueError, r"weight_scale must be \[4, groups\]", {"scale": torch.ones(3, 1)}),
    "no groups": (ValueError, "groups > 0", {"scale": torch.ones(4, 0)}),
    "groups": (
        ValueError,
        "weight_scale has 2 groups, which do not cut weight's 32 columns",
        {"scale": torch.ones(4, 2)},
    ),
    "x dtype": (TypeError, "x must be float32", {"x": torch.ones(2, 32, dtype=torch.int32)}),
    "x shape": (ValueError, r"x must be \[..., 32\].*but has shape \[2, 31\]", {"x": torch.ones(2, 31)}),
    "bias shape": (ValueError, r"bias must be \[4\]", {"bias": torch.ones(5)}),
    "bias dtype": (TypeError, "bias is .*, but x is", {"bias": torch.ones(4).double()}),
    "trained scale": (ValueError, "weight_scale requires grad", {"scale": torch.ones(4, 1, requires_grad=True)}),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("op", [ops.quantized_linear, reference.quantized_linear], ids=["op", "reference"])
def test_bad_arguments(op, bad):
    error, message, change = BAD[bad]
    good = {
        "x": torch.ones(2, 32),
        "weight": torch.ones(4, 32, dtype=torch.int8),
        "scale": torch.ones(4, 1),
        "bias": torch.ones(4),
    }
    with pytest.raises(error, match=message):
        op(*(good | change).values())


def test_bad_arguments_of_lora():
    x, weight, scale = torch.ones(2, 32), torch.ones(4, 32, dtype=torch.int8), torch.ones(4, 1)
    A, B = torch.ones(2, 32), torch.ones(4, 2)
    with pytest.raises(TypeError, match="weight must be float32"):
        ops.lora_linear(x, weight, None, A, B)
    with pytest.raises(ValueError, match=r"lora_A must be \[2, 32\]"):
        ops.lora_linear(x, weight, None, A[:, :16], B, weight_scale=scale)
    with pytest.raises(TypeError, match="lora_A is float64, which only a float64 x takes"):
        ops.lora_linear(x, weight, None, A.double(), B.double(), weight_scale=scale)
    with pytest.raises(ValueError, match="weight_scale requires grad"):
        ops.lora_linear(x, weight, None, A, B, weight_scale=scale.requires_grad_())


def test_backward_checks_its_arguments():
    weight, scale = torch.ones(4, 32, dtype=torch.int8), torch.ones(4, 1)
    if "cpu" in native_devices:
        with pytest.raises(ValueError, match=r"grad_y must be \[..., 4\]"):
            torch.ops.peft_ext.quantized_linear_backward(torch.ones(2, 5), weight, scale)


def test_equals_a_plain_layer_of_the_dequantized_weight(problem):
    p = problem(rows=(100,))
    plain = F.linear(p.x, dequantize_weight(p.weight, p.scale), p.b)
    torch.testing.assert_close(ops.quantized_linear(p.x, p.weight, p.scale, p.b), plain, rtol=1e-5, atol=1e-5)
