from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import peft_ext.nn.lora as lora_module
from peft_ext.nn import LoRA_MHA, LoRALinear, MergedLoRALinear, SelfAttention

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Conv1D(nn.Module):
    """GPT-2's layout: weight [in, out], attribute nf."""

    def __init__(self, nf: int, nx: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(0.3 * torch.randn(nx, nf, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(nf, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def plain(base: torch.dtype | None = None, **options) -> LoRALinear:
    return LoRALinear(nn.Linear(10, 12, dtype=base), **({"rank": 3, "alpha": 6.0} | options))


def plain_conv1d(base: torch.dtype | None = None, **options) -> LoRALinear:
    return LoRALinear(Conv1D(12, 10, dtype=base), **({"rank": 3, "alpha": 6.0} | options))


def merged(base: torch.dtype | None = None, **options) -> MergedLoRALinear:
    linear = nn.Linear(10, 12, dtype=base)
    return MergedLoRALinear(linear, [True, False, True], **({"rank": 3, "alpha": 6.0} | options))


def merged_conv1d(base: torch.dtype | None = None, **options) -> MergedLoRALinear:
    linear = Conv1D(12, 10, dtype=base)
    return MergedLoRALinear(linear, [False, True, True], **({"rank": 3, "alpha": 6.0} | options))


every_layer = pytest.mark.parametrize("make", [plain, plain_conv1d, merged, merged_conv1d])


def randomized(layer: nn.Module) -> nn.Module:
    """Factors far from zero, so that nothing passes for want of an update."""
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    return layer


def base_weight(layer: nn.Module) -> Tensor:
    """W, float64 [out, in]."""
    weight = layer.linear.weight.detach().double()
    return weight.T if isinstance(layer.linear, Conv1D) else weight


def update(layer: nn.Module, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """s B A, [out, in], with zero rows for the slices without an update."""
    enabled = layer.enable_lora if isinstance(layer, MergedLoRALinear) else [True]
    parts = zip(lora_A.chunk(sum(enabled)), lora_B.chunk(sum(enabled)), strict=True)
    products = (b @ a for a, b in parts)
    zeros = lora_A.new_zeros(layer.out_features // len(enabled), layer.in_features)
    return layer.scale * torch.cat([next(products) if on else zeros for on in enabled])


def formula(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer in float64 from its definition."""
    weight = base_weight(layer) + update(layer, layer.lora_A.detach().double(), layer.lora_B.detach().double())
    bias = 0.0 if layer.bias is None else layer.bias.detach().double()
    return x.double() @ weight.T + bias


def unmerged(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer)
    layer.unmerge()
    return layer


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(BITS[tensor.dtype])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(bits(actual), bits(expected))


def assert_near(actual: Tensor, expected: Tensor, units: float = 4.0) -> None:
    """Within ``units`` of the dtype's spacing at the largest expected value: products sum up to it."""
    assert actual.shape == expected.shape
    largest = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    bound = units * torch.finfo(actual.dtype).eps * largest
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=bound)


# --- forward and backward


@every_layer
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_the_formula(make, dtype, device):
    layer = randomized(make().to(device, dtype))
    x = torch.randn(4, 5, 10, device=device, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_near(y, formula(layer, x))


@every_layer
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_formula(make, dtype, device):
    layer = randomized(make().to(device, dtype))
    layer.bias.requires_grad_(True)
    x = torch.randn(4, 5, 10, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(4, 5, 12, device=device, dtype=dtype)
    layer(x).backward(dy)

    exact = [t.detach().double().requires_grad_() for t in (x, layer.bias, layer.lora_A, layer.lora_B)]
    exact_x, exact_bias, exact_a, exact_b = exact
    y = exact_x @ (base_weight(layer) + update(layer, exact_a, exact_b)).T + exact_bias
    y.backward(dy.double())

    assert layer.linear.weight.grad is None
    for actual, expected in zip((x, layer.bias, layer.lora_A, layer.lora_B), exact, strict=True):
        assert actual.grad.dtype == dtype
        assert_near(actual.grad, expected.grad, units=8)


@every_layer
@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
)
def test_adapters_of_another_dtype(make, base, adapter):
    layer = randomized(make(base, adapter_dtype=adapter))
    assert layer.lora_A.dtype == layer.lora_B.dtype == adapter
    x = torch.randn(7, 10, dtype=base)
    y = layer(x)
    assert y.dtype == base
    assert_near(y, formula(layer, x))
    y.sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == adapter


@every_layer
@pytest.mark.parametrize("shape", [(10,), (1, 10), (2, 3, 4, 10), (0, 10), (3, 0, 10)])
def test_any_number_of_dimensions(make, shape):
    layer = randomized(make())
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 12)
    assert_near(y, formula(layer, x.detach()), units=8)
    y.sum().backward()
    assert x.grad.shape == shape
    assert layer.lora_A.grad.isfinite().all()


@every_layer
def test_non_contiguous_input(make):
    layer = randomized(make())
    for x in (torch.randn(10, 6).T, torch.randn(6, 20)[:, ::2], torch.randn(1, 10).expand(6, 10)):
        assert not x.is_contiguous()
        assert_near(layer(x), formula(layer, x), units=8)


def test_linear_without_bias():
    layer = randomized(LoRALinear(nn.Linear(10, 12, bias=False), rank=3))
    x = torch.randn(7, 10)
    assert layer.bias is None
    assert_near(layer(x), formula(layer, x))


def test_conv1d_of_transformers():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D as TransformersConv1D

    conv1d = TransformersConv1D(12, 10)
    layer = randomized(LoRALinear(conv1d, rank=3))
    x = torch.randn(7, 10)
    expected = conv1d(x) + layer.scale * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)


def test_equals_loralibs_merged_linear():
    # loralib's way: one grouped 1-D convolution of A by B, its rows scattered over the enabled slices.
    layer = randomized(merged())
    delta = F.conv1d(layer.lora_A[None], layer.lora_B[:, :, None], groups=2)[0]
    padded = torch.zeros(3, 4, 10).index_copy(0, torch.tensor([0, 2]), delta.view(2, 4, 10)).view(12, 10)
    x = torch.randn(7, 10)
    expected = F.linear(x, layer.weight + layer.scale * padded, layer.bias)
    torch.testing.assert_close(layer(x), expected)


@every_layer
def test_autocast(make):
    layer = randomized(make())
    x = torch.randn(7, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    # Input, weights and factors are rounded too: some units for each of the two products.
    assert_near(y, formula(layer, x), units=16)
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


@every_layer
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles_without_a_graph_break_for_any_batch(make, dropout):
    layer = randomized(make(dropout=dropout))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 10, requires_grad=True)
        y = compiled(x)
        assert y.shape == (rows, 12)
        y.sum().backward()
        assert x.grad.shape == x.shape
    layer.eval()
    assert_near(compiled(x.detach()), formula(layer, x.detach()), units=8)


# --- construction


def test_default_init_begins_as_the_base():
    linear = nn.Linear(64, 48)
    layer = LoRALinear(linear, rank=8)
    x = torch.randn(5, 64)
    assert torch.count_nonzero(layer.lora_B) == 0
    torch.testing.assert_close(layer(x), linear(x))
    # kaiming_uniform_(a=sqrt 5) is uniform within 1/sqrt(in_features).
    assert 0.9 / 8 < layer.lora_A.abs().max() <= 1 / 8


def test_gaussian_init():
    layer = LoRALinear(nn.Linear(400, 500), rank=50, init="gaussian")
    for factor in (layer.lora_A, layer.lora_B):
        # The standard error of a deviation of 0.01 from 20,000 values is 5e-5.
        assert factor.std().item() == pytest.approx(0.01, abs=3e-4)


def test_scale():
    assert plain(rank=4, alpha=8).scale == 2.0
    assert plain(rank=4, alpha=8, rslora=True).scale == 4.0
    assert merged(rank=4, alpha=8, rslora=True).scale == 4.0
    assert (plain().rank, plain().alpha) == (3, 6.0)
    assert (LoRALinear(nn.Linear(8, 8)).rank, LoRALinear(nn.Linear(8, 8)).alpha) == (4, 1.0)


def test_wraps_the_layer_and_stands_in_for_it():
    linear = nn.Linear(10, 12)
    layer = LoRALinear(linear)
    assert layer.linear is linear
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (10, 12)
    assert (plain_conv1d().in_features, plain_conv1d().out_features) == (10, 12)


@every_layer
def test_the_base_is_frozen(make):
    layer = make()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_parameter_shapes():
    assert {name: tuple(p.shape) for name, p in merged().named_parameters()} == {
        "lora_A": (6, 10),
        "lora_B": (8, 3),
        "linear.weight": (12, 10),
        "linear.bias": (12,),
    }
    assert {name: tuple(p.shape) for name, p in plain_conv1d().named_parameters()} == {
        "lora_A": (3, 10),
        "lora_B": (12, 3),
        "linear.weight": (10, 12),
        "linear.bias": (12,),
    }


def test_adapters_are_made_where_the_weight_is():
    layer = LoRALinear(nn.Linear(8, 8, device="meta", dtype=torch.bfloat16))
    assert layer.lora_A.device.type == layer.lora_B.device.type == "meta"
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16


def test_repr_tells_the_settings():
    assert repr(merged(dropout=0.1)) == (
        "MergedLoRALinear(\n"
        "  enable_lora=[True, False, True], rank=3, alpha=6.0, dropout=0.1, merged=False\n"
        "  (linear): Linear(in_features=10, out_features=12, bias=True)\n"
        ")"
    )


# --- dropout


def test_dropout_drops_the_updates_input_in_training_only():
    p, size = 0.25, 32
    layer = LoRALinear(nn.Linear(size, size, bias=False), rank=size, alpha=size, dropout=p)
    with torch.no_grad():
        layer.weight.zero_()
        nn.init.eye_(layer.lora_A)
        nn.init.eye_(layer.lora_B)
    x = torch.ones(1000, size)

    y = layer(x)
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))
    deviation = math.sqrt(p * (1 - p) / y.numel())
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=5 * deviation)

    assert torch.equal(layer.eval()(x), x)


@every_layer
def test_dropout_follows_torchs_seed(make):
    layer = randomized(make(dropout=0.5))
    x = torch.randn(9, 10)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    again = layer(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@every_layer
def test_checkpointing_recomputes_with_the_same_dropout(make):
    layer = randomized(make(dropout=0.5))
    x = torch.randn(9, 10)

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        # Squared, so that the gradient depends on the forward's own mask.
        return list(torch.autograd.grad(run(leaf).square().sum(), [leaf, layer.lora_A, layer.lora_B]))

    checkpointed = gradients(lambda leaf: checkpoint(layer, leaf, use_reentrant=False))
    for actual, expected in zip(checkpointed, gradients(layer), strict=True):
        assert torch.equal(actual, expected)


# --- merging


@every_layer
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_adds_the_update_and_unmerge_restores_the_bits(make, dtype, device):
    layer = randomized(make().to(device, dtype))
    with torch.no_grad():
        layer.weight.flatten()[:3] = torch.tensor([0.0, 1e-6, -300.0], dtype=dtype)
    before, expected = layer.weight.clone(), formula(layer, torch.eye(10, device=device))
    x = torch.eye(10, device=device, dtype=dtype)

    layer.merge()
    assert layer.merged
    assert_near(layer(x), expected)
    layer.unmerge()
    assert not layer.merged
    assert_same_bits(layer.weight, before)


def test_unmerge_is_exact_at_another_number_of_threads(two_threads):
    layer = randomized(LoRALinear(nn.Linear(512, 256), rank=8))
    before = layer.weight.clone()
    layer.merge()
    torch.set_num_threads(1)
    layer.unmerge()
    assert_same_bits(layer.weight, before)


def test_merging_leaves_the_other_slices_alone():
    layer = randomized(merged())
    before = layer.weight.clone()
    layer.merge()
    assert_same_bits(layer.weight[4:8], before[4:8])
    assert not torch.any(layer.weight[:4] == before[:4])
    assert not torch.any(layer.weight[8:] == before[8:])


@every_layer
def test_factors_may_change_while_merged(make):
    layer = randomized(make(dropout=0.5))
    before = layer.weight.clone()
    x = torch.randn(7, 10)
    layer.merge()
    y = layer(x)
    randomized(layer)
    layer.scale = 0.1
    assert torch.equal(layer(x), y)
    layer.unmerge()
    assert_same_bits(layer.weight, before)
    assert_near(layer.eval()(x), formula(layer, x), units=8)


@every_layer
def test_merging_twice_is_merging_once(make):
    layer = randomized(make())
    before = layer.weight.clone()
    layer.unmerge()
    assert_same_bits(layer.weight, before)
    layer.merge()
    once = layer.weight.clone()
    layer.merge()
    assert_same_bits(layer.weight, once)
    layer.unmerge()
    assert_same_bits(layer.weight, before)


@every_layer
def test_changing_mode_does_not_merge(make):
    layer = make()
    assert not layer.eval().merged
    layer.merge()
    assert layer.train().merged


@every_layer
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_layer_may_change_dtype(make, dtype):
    layer = randomized(make())
    moved_base = layer.weight.detach().to(dtype)
    layer.merge()
    layer.to(dtype)
    assert layer.merged
    x = torch.randn(7, 10, dtype=dtype)
    assert_near(layer(x), formula(unmerged(layer), x))
    layer.unmerge()
    assert_same_bits(layer.weight, moved_base)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@every_layer
def test_a_merged_layer_may_change_device(make):
    layer = randomized(make())
    before = layer.weight.clone()
    layer.merge()
    layer.cuda()
    assert layer.merged
    layer.unmerge()
    assert_same_bits(layer.weight.cpu(), before)


@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_a_merged_layer_is_merged_and_independent(make, copied):
    layer = randomized(make())
    before = layer.weight.clone()
    layer.merge()
    twin = copied(layer)
    assert twin.merged
    assert_same_bits(twin.weight, layer.weight)
    twin.unmerge()
    assert layer.merged
    assert_same_bits(twin.weight, before)
    layer.unmerge()
    assert_same_bits(layer.weight, before)


def test_a_merge_that_fails_half_way_changes_nothing(monkeypatch):
    layer = randomized(merged())
    before = layer.weight.clone()
    calls = []

    def second_fails(weight: Tensor, *factors: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(weight)
        if len(calls) == 2:
            raise MemoryError
        return merge(weight, *factors)

    merge = lora_module.lora_merge_
    monkeypatch.setattr(lora_module, "lora_merge_", second_fails)
    with pytest.raises(MemoryError):
        layer.merge()
    assert not layer.merged
    assert_same_bits(layer.weight, before)


# --- saving and loading


@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(make, copied):
    layer = randomized(make(dropout=0.5)).eval()
    twin = copied(layer)
    x = torch.randn(7, 10)
    assert torch.equal(twin(x), layer(x))
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
    randomized(twin)
    assert not torch.equal(twin(x), layer(x))


@every_layer
def test_state_dict_round_trip(make):
    layer, other = nn.Sequential(randomized(make())), nn.Sequential(randomized(make()))
    assert set(layer.state_dict()) == {"0.linear.weight", "0.linear.bias", "0.lora_A", "0.lora_B"}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(7, 10)
    assert torch.equal(other(x), layer(x))


@every_layer
def test_a_merged_layer_saves_its_base_as_it_was(make):
    model = nn.Sequential(randomized(make()))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model[0].merge()
    saved = model.state_dict()
    assert list(saved) == list(expected)
    for name, value in saved.items():
        assert_same_bits(value, expected[name])
    assert model[0].merged
    model[0].unmerge()
    assert_same_bits(model[0].weight, expected["0.linear.weight"])


@every_layer
def test_loading_into_a_merged_layer_unmerges_it(make):
    model, other = nn.Sequential(randomized(make())), nn.Sequential(randomized(make()))
    before = model[0].weight.clone()
    model[0].merge()
    model.load_state_dict({"0.lora_A": other[0].lora_A, "0.lora_B": other[0].lora_B}, strict=False)
    assert not model[0].merged
    assert_same_bits(model[0].weight, before)
    model[0].merge()
    model.load_state_dict(other.state_dict())
    x = torch.randn(7, 10)
    assert torch.equal(model(x), other(x))


@every_layer
@pytest.mark.parametrize("assign", [False, True])
def test_loads_the_state_of_the_plain_layer_it_wraps(make, assign):
    base, model = nn.Sequential(make().linear), nn.Sequential(randomized(make()))
    factors = [model[0].lora_A.clone(), model[0].lora_B.clone()]
    state = base.state_dict()
    keys = list(state)
    model.load_state_dict(state, assign=assign)
    assert list(state) == keys
    assert torch.equal(model[0].weight, base[0].weight)
    assert torch.equal(model[0].bias, base[0].bias)
    assert torch.equal(model[0].lora_A, factors[0])
    assert torch.equal(model[0].lora_B, factors[1])
    assert not model[0].weight.requires_grad


def test_strict_loading_still_names_wrong_keys():
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"lora_B\""):
        plain().load_state_dict({name: value for name, value in plain().state_dict().items() if name != "lora_B"})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"gain\""):
        plain().load_state_dict(nn.Linear(10, 12).state_dict() | {"gain": torch.ones(1)})


# --- bad input


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def integer_linear() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return linear


def float8_linear() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    return linear


@pytest.mark.parametrize("make", [LoRALinear, MergedLoRALinear])
@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (nn.Conv2d(3, 3, 1), "linear must be an nn.Linear or a Conv1D .*, got Conv2d"),
        (nn.ReLU(), "linear must be an nn.Linear or a Conv1D .*, got ReLU"),
        ("linear", "linear must be an nn.Linear or a Conv1D .*, got str"),
        (plain(), "linear must be an nn.Linear or a Conv1D .*, got LoRALinear"),
        (Scaled(4, 4), "linear is a Scaled, an nn.Linear with a forward of its own"),
        (nn.LazyLinear(4), "linear is a LazyLinear without a weight yet"),
        (nn.MultiheadAttention(4, 2).out_proj, "out_proj of an nn.MultiheadAttention"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "linear.weight must be a Parameter"),
        (integer_linear(), r"linear.weight must be torch.float32 or .*, got torch.int8"),
        (float8_linear(), r"linear.weight must be torch.float32 or .*, got torch.float8_e4m3fn"),
    ],
)
def test_rejects_what_is_no_linear_layer(make, linear, message):
    with pytest.raises(TypeError, match=message):
        make(linear)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be a positive integer, got 0"),
        ({"rank": -2}, ValueError, "rank must be a positive integer, got -2"),
        ({"rank": 2.0}, ValueError, "rank must be a positive integer, got 2.0"),
        ({"rank": True}, ValueError, "rank must be a positive integer, got True"),
        ({"rank": math.nan}, ValueError, "rank must be a positive integer, got nan"),
        ({"alpha": math.inf}, ValueError, "alpha must be a finite number, got inf"),
        ({"alpha": math.nan}, ValueError, "alpha must be a finite number, got nan"),
        ({"alpha": "16"}, ValueError, "alpha must be a finite number, got '16'"),
        ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0.1"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": math.nan}, ValueError, r"dropout must be in \[0, 1\), got nan"),
        ({"dropout": None}, ValueError, r"dropout must be in \[0, 1\), got None"),
        ({"init": "zeros"}, ValueError, "init must be 'default' or 'gaussian', got 'zeros'"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype must be torch.float32 or .*, got torch.int8"),
        ({"adapter_dtype": torch.float64}, TypeError, "adapter_dtype must be .* for a torch.float32 weight"),
    ],
)
@pytest.mark.parametrize("make", [LoRALinear, MergedLoRALinear])
def test_a_bad_argument_leaves_the_layer_as_it_was(make, options, error, message):
    linear = nn.Linear(12, 12)
    with pytest.raises(error, match=message):
        make(linear, **options)
    assert linear.weight.requires_grad
    assert linear.bias.requires_grad


@pytest.mark.parametrize(
    ("enable_lora", "error", "message"),
    [
        ([False, False, False], ValueError, r"at least one slice, got \[False, False, False\]"),
        ([], ValueError, r"at least one slice, got \[\]"),
        ([True] * 5, ValueError, "enable_lora names 5 slices, which do not divide out_features = 12"),
        ([1, 0, 1], TypeError, r"enable_lora must be a sequence of bools, got \[1, 0, 1\]"),
        ("qv", TypeError, "enable_lora must be a sequence of bools, got 'qv'"),
        (True, TypeError, "enable_lora must be a sequence of bools, got True"),
    ],
)
def test_bad_slices(enable_lora, error, message):
    linear = nn.Linear(12, 12)
    with pytest.raises(error, match=message):
        MergedLoRALinear(linear, enable_lora)
    assert linear.weight.requires_grad


def test_a_rank_above_the_largest_that_helps_warns():
    with pytest.warns(UserWarning, match=r"rank 11 is above 10 = min\(in_features, out_features\)") as caught:
        layer = LoRALinear(nn.Linear(10, 12), rank=11)
    assert caught[0].filename == __file__
    x = torch.randn(2, 10)
    assert_near(randomized(layer)(x), formula(layer, x), units=8)
    with pytest.warns(UserWarning, match="rank 5 is above 4"):
        MergedLoRALinear(nn.Linear(10, 12), rank=5)


# --- inside other modules


def test_in_a_transformer_encoder_layer_evaluation_has_the_update():
    # In evaluation that layer reads linear1.weight and linear2.weight itself, unless told not to.
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    block.linear1 = randomized(LoRALinear(block.linear1))
    block.linear2 = randomized(LoRALinear(block.linear2))
    x = torch.randn(2, 5, 8)
    expected = block.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(block.eval()(x), expected)


def softmax_attention(layer: SelfAttention, x: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Attention head by head; ``hidden`` is bool, True where a position may not be seen."""
    q_heads, k_heads, v_heads = (
        proj(x).chunk(layer.num_heads, -1) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    heads = []
    for q, k, v in zip(q_heads, k_heads, v_heads, strict=True):
        scores = q @ k.transpose(-2, -1) / math.sqrt(layer.head_dim)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        heads.append(scores.softmax(-1) @ v)
    return layer.out_proj(torch.cat(heads, -1))


@pytest.fixture
def attention() -> LoRA_MHA:
    layer = LoRA_MHA(8, 2, lora_rank=2)
    randomized(layer.q_proj)
    randomized(layer.v_proj)
    return layer.double()


def test_attention_is_the_softmax_formula(attention):
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(x), softmax_attention(attention, x))


def test_causal_attention(attention):
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = softmax_attention(attention, x, future)
    torch.testing.assert_close(attention(x, is_causal=True), expected)
    attention.causal = True
    torch.testing.assert_close(attention(x), expected)
    torch.testing.assert_close(attention(x, is_causal=False), softmax_attention(attention, x))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("floating", [False, True])
def test_attention_mask(attention, causal, floating):
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])[:, None, :]
    hidden = padding | torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else padding
    mask = ~padding[:, None]
    if floating:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(attention(x, mask, is_causal=causal), softmax_attention(attention, x, hidden))


def test_attention_has_lora_on_query_and_value():
    layer = LoRA_MHA(8, 2, lora_rank=3, alpha=6.0, lora_dropout=0.1, dtype=torch.bfloat16)
    assert {name for name, _ in layer.named_parameters() if "lora" in name} == {
        "q_proj.lora_A",
        "q_proj.lora_B",
        "v_proj.lora_A",
        "v_proj.lora_B",
    }
    assert (layer.q_proj.rank, layer.v_proj.scale, layer.q_proj.dropout) == (3, 2.0, 0.1)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("num_heads", [0, -1, 3])
def test_heads_must_divide_the_width(num_heads):
    with pytest.raises(ValueError, match=f"num_heads must be positive and divide embed_dim = 8, got {num_heads}"):
        LoRA_MHA(8, num_heads)


class Doubled(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


@every_layer
def test_parametrized_parameters(make):
    """They are attributes, but not in a module's dictionary of parameters."""
    layer = randomized(make())
    x = torch.randn(3, 10)
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        doubled.lora_A.mul_(2)
        doubled.linear.weight.mul_(2)
    parametrize.register_parametrization(layer, "lora_A", Doubled())
    parametrize.register_parametrization(layer.linear, "weight", Doubled())
    torch.testing.assert_close(layer(x), doubled(x))


@every_layer
def test_hooks_of_the_layer_are_called(make):
    layer, calls = make(), []
    x = torch.randn(3, 10)
    layer(x)
    handle = layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    copy.deepcopy(layer)(x)
    pickle.loads(pickle.dumps(make()))(x)
    layer(x)
    assert calls == ["before", "before"]
    handle.remove()
    layer(x)
    assert len(calls) == 2
    assert len(layer._forward_pre_hooks) == 1
    assert not layer._forward_pre_hooks
