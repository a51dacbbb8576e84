from __future__ import annotations

import itertools

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from peft_ext import ops, reference
from peft_ext._loader import native_devices

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16), (F64, F32)]
# Largest error allowed, relative to the largest element of the float64 result.
TOLERANCE = {F64: 1e-13, F32: 5e-6, BF16: 2e-2, F16: 2e-3}
TORCHS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
ACTIVATIONS = tuple(TORCHS)
# rows, features, bottleneck: odd sizes, every tile and tail, several blocks and chunks.
SIZES = [(1, 7, 3), (3, 17, 5), (33, 40, 16), (70, 96, 64), (320, 160, 40), (600, 33, 7), (1100, 24, 3)]
NAMES = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")

native = pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")


def make(size=(5, 16, 4), dtype=F32, adapter_dtype=None, norm="none", bias=True, rows=None, device="cpu"):
    m, d, k = size
    shapes = {
        "x": (*((m,) if rows is None else rows), d),
        "down_weight": (k, d),
        "down_bias": (k,) if bias else None,
        "up_weight": (d, k),
        "up_bias": (d,) if bias else None,
        "norm_weight": None if norm == "none" else (d,),
        "norm_bias": None if norm == "none" else (d,),
    }
    return {
        name: None
        if shape is None
        else torch.randn(shape, device=device).to(dtype if name == "x" else adapter_dtype or dtype)
        for name, shape in shapes.items()
    }


def solve(op, tensors, dtype=None, needs=NAMES, grad_y=None, **options):
    """Output and gradients by name, optionally with everything cast to ``dtype`` first."""
    needs = [name for name in needs if tensors[name] is not None]
    cast = {
        name: None if t is None else t.to(dtype or t.dtype).detach().requires_grad_(name in needs)
        for name, t in tensors.items()
    }
    y = op(*cast.values(), **options)
    if grad_y is None:
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad(y, [cast[n] for n in needs], grad_y.to(tensors["x"].dtype).to(y)) if needs else []
    return {"y": y.detach(), **dict(zip(needs, grads, strict=True))}


def check(tensors, **options):
    """The op against its oracle in float64."""
    got = solve(ops.bottleneck_adapter, tensors, **options)
    wanted = solve(reference.bottleneck_adapter, tensors, F64, **options)
    tolerance = max(TOLERANCE[tensors["x"].dtype], TOLERANCE[tensors["down_weight"].dtype])
    for name, value in got.items():
        like = tensors["x" if name == "y" else name]
        assert value.dtype == like.dtype, name
        assert value.shape == like.shape, name
        if value.numel():
            error = ((value.double() - wanted[name]).abs().max() / wanted[name].abs().max().clamp_min(1e-3)).item()
            assert error <= tolerance, f"{name}: error {error:.1e} > {tolerance:.1e}"


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", ["none", "pre", "post"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)
def test_matches_float64(dtype, adapter_dtype, activation, norm, residual, device):
    tensors = make((33, 40, 16), dtype, adapter_dtype, norm, device=device)
    check(tensors, activation=activation, norm=norm, residual=residual, scaling=0.7)


@pytest.mark.parametrize("norm", ["none", "pre", "post"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_sizes(dtype, size, norm):
    check(make(size, dtype, F32, norm), activation="gelu", norm=norm)


@pytest.mark.parametrize("rows", [(), (0,), (4, 0), (2, 3, 4), (1, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("norm", ["none", "pre", "post"])
def test_leading_dimensions(rows, norm):
    check(make(rows=rows, norm=norm), norm=norm)


def test_without_biases():
    check(make(bias=False))
    check(make(bias=False, norm="pre"), norm="pre")


def test_activations_are_torchs():
    """Over the whole range, infinities and NaN too, through D = U = 1."""
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, 1e-6, -1e-6, 1e30, -1e30, torch.nan])])[:, None]
    one = torch.ones(1, 1)
    for activation in ACTIVATIONS:
        y = ops.bottleneck_adapter(x, one, None, one, None, activation=activation, residual=False)
        wanted = TORCHS[activation](x.double())
        torch.testing.assert_close(y.double(), wanted, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("norm", ["none", "pre", "post"])
def test_non_contiguous_arguments(norm):
    tensors = {
        name: None if t is None else torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0]
        for name, t in make((70, 16, 4), norm=norm).items()
    }
    assert not tensors["x"].is_contiguous()
    check(tensors, norm=norm)


def test_expanded_gradient():
    """sum() hands back a gradient whose strides are all zero."""
    check(make(), grad_y=torch.ones(()).expand(5, 16))


@pytest.mark.parametrize("norm", ["none", "pre", "post"])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_gradcheck(activation, norm):
    tensors = make((6, 5, 3), F64, norm=norm)
    inputs = tuple(t if t is None else t.requires_grad_() for t in tensors.values())
    assert torch.autograd.gradcheck(
        lambda *args: ops.bottleneck_adapter(*args, activation=activation, norm=norm, scaling=0.5), inputs
    )


@native
def test_double_backward_is_an_explicit_error():
    tensors = make()
    x = tensors["x"].requires_grad_()
    (grad,) = torch.autograd.grad(ops.bottleneck_adapter(*tensors.values()).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        grad.sum().backward()


@pytest.mark.each_instruction_set
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_every_subset_of_gradients(norm):
    tensors = make((40, 16, 4), norm=norm)
    everything = solve(ops.bottleneck_adapter, tensors, norm=norm)
    for needs in (s for n in range(8) for s in itertools.combinations(NAMES, n)):
        some = solve(ops.bottleneck_adapter, tensors, needs=needs, norm=norm)
        assert set(some) == {"y", *needs}
        for name, value in some.items():
            assert torch.equal(value, everything[name]), (needs, name)


@native
@pytest.mark.parametrize("norm", ["none", "pre", "post"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"rows": (2, 3)}, {"dtype": BF16, "adapter_dtype": F32}])
def test_opcheck(options, norm):
    tensors = make(norm=norm, **options)
    given = [t if t is None else t.requires_grad_() for t in tensors.values()]
    settings = ("gelu", norm, True, 0.5, 1e-5)
    opcheck(torch.ops.peft_ext.bottleneck_adapter, (*given, *settings))
    plain = [t if t is None else t.detach() for t in given]
    _, hidden = torch.ops.peft_ext.bottleneck_adapter(*plain, *settings, True)
    for flags in ([True] * 7, [False, True] * 3 + [False], [True] + [False] * 6):
        needs = [flag and t is not None for flag, t in zip(flags, plain, strict=True)]
        opcheck(
            torch.ops.peft_ext.bottleneck_adapter_backward,
            (torch.randn_like(plain[0]), plain[0], hidden, *plain[1:], *settings, needs),
            test_utils=("test_schema", "test_faketensor"),
        )


@native
@pytest.mark.parametrize("norm", ["none", "pre", "post"])
def test_saves_only_its_arguments_and_hidden_rows(norm):
    tensors = {n: t if t is None else t.requires_grad_() for n, t in make(norm=norm).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.bottleneck_adapter(*tensors.values(), norm=norm)
    *arguments, hidden = saved
    assert {t.data_ptr() for t in arguments} == {t.data_ptr() for t in tensors.values() if t is not None}
    assert hidden.shape == (5, 4)
    _, nothing = torch.ops.peft_ext.bottleneck_adapter(
        *(t if t is None else t.detach() for t in tensors.values()), norm=norm
    )
    assert nothing.numel() == 0


@pytest.mark.parametrize("rows", [33, 600, 1500])
@pytest.mark.parametrize("norm", ["none", "pre", "post"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_same_bits_at_any_thread_count(rows, norm, dtype, two_threads):
    tensors = make((rows, 40, 8), dtype=dtype, norm=norm)
    two = solve(ops.bottleneck_adapter, tensors, norm=norm)
    torch.set_num_threads(1)
    one = solve(ops.bottleneck_adapter, tensors, norm=norm)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_autocast_leaves_it_alone(dtype):
    tensors = make(dtype=dtype, adapter_dtype=F32)
    wanted = solve(ops.bottleneck_adapter, tensors)
    with torch.autocast("cpu", dtype=BF16):
        got = solve(ops.bottleneck_adapter, tensors)
    for name, value in got.items():
        assert torch.equal(value, wanted[name]), name


@native
@pytest.mark.parametrize("norm", ["none", "pre"])
def test_compile_without_graph_breaks_for_any_batch(norm):
    def layer(*tensors):
        return ops.bottleneck_adapter(*tensors, norm=norm).sin()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 17, 500):
        tensors = make((rows, 16, 4), norm=norm)
        leaves = [t.requires_grad_() for t in tensors.values() if t is not None]
        with torch.compiler.set_stance("default" if rows == 3 else "fail_on_recompile"):
            got = compiled(*tensors.values())
        wanted = layer(*tensors.values())
        torch.testing.assert_close(got, wanted)
        for one, other in zip(
            torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(one, other)


@native
def test_meta_tensors():
    assert ops.bottleneck_adapter(*make(rows=(2, 3), device="meta").values()).shape == (2, 3, 16)


BAD = {
    "x: width": ({"x": torch.ones(2, 5)}, {}, ValueError, r"x must be \[\.\.\., 16\]"),
    "x: scalar": ({"x": torch.tensor(1.0)}, {}, ValueError, "x must be"),
    "x: integer": ({"x": torch.ones(2, 16, dtype=torch.int64)}, {}, TypeError, "x must be float32"),
    "down: vector": ({"down_weight": torch.ones(16)}, {}, ValueError, r"down_weight must be \[bottleneck, features\]"),
    "down: integer": ({"down_weight": torch.ones(4, 16, dtype=torch.int8)}, {}, TypeError, "down_weight must be float"),
    "down: float64": ({"down_weight": torch.ones(4, 16, dtype=F64)}, {}, TypeError, "only a float64 x takes"),
    "up: shape": ({"up_weight": torch.ones(4, 16)}, {}, ValueError, r"up_weight must be \[16, 4\]"),
    "up: dtype": ({"up_weight": torch.ones(16, 4, dtype=BF16)}, {}, TypeError, "up_weight is .*down_weight is"),
    "down_bias: shape": ({"down_bias": torch.ones(3)}, {}, ValueError, r"down_bias must be \[4\]"),
    "up_bias: shape": ({"up_bias": torch.ones(3)}, {}, ValueError, r"up_bias must be \[16\]"),
    "norm without weight": ({}, {"norm": "pre"}, ValueError, "norm_weight and norm_bias must be given"),
    "weight without norm": (
        {"norm_weight": torch.ones(16), "norm_bias": torch.ones(16)},
        {},
        ValueError,
        "norm_weight and norm_bias must be given .* but norm is 'none'",
    ),
    "activation": ({}, {"activation": "swish"}, ValueError, "activation must be one of relu.* but is 'swish'"),
    "norm": ({}, {"norm": "both"}, ValueError, "norm must be one of none.* but is 'both'"),
    "scaling": ({}, {"scaling": float("nan")}, ValueError, "scaling must be finite"),
    "eps": ({}, {"eps": -1.0}, ValueError, "eps must be finite and >= 0"),
}


@pytest.mark.parametrize("op", [ops.bottleneck_adapter, reference.bottleneck_adapter], ids=["op", "reference"])
@pytest.mark.parametrize(("change", "options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(op, change, options, error, message):
    with pytest.raises(error, match=message):
        op(*{**make(), **change}.values(), **options)


@native
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_backward_refuses_what_does_not_fit(device):
    x, *adapter = (None if t is None else t.to(device) for t in make().values())
    good = {"grad_y": torch.ones(5, 16), "hidden": torch.ones(5, 4)}
    for name, bad, error in (
        ("grad_y", torch.ones(5, 15), ValueError),
        ("grad_y", torch.ones(5, 16, dtype=BF16), TypeError),
        ("hidden", torch.ones(5, 3), ValueError),
        ("hidden", torch.ones(0), ValueError),
        ("hidden", torch.ones(5, 4, dtype=BF16), TypeError),
    ):
        grad_y, hidden = (tensor.to(device) for tensor in {**good, name: bad}.values())
        with pytest.raises(error, match=f"{name} must be"):
            torch.ops.peft_ext.bottleneck_adapter_backward(
                grad_y, x, hidden, *adapter, "relu", "none", True, 1.0, 1e-5, [True] * 5 + [False] * 2
            )
