"""Each layer against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_ext import LoraConfig, get_peft_model
from peft_ext.tuners.lora_layers import LoraLayer

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def adapt(module: nn.Module, *names: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> nn.Module:
    """A model of one adapted module, with adapters of these names, all of them active."""
    names = names or ("default",)
    config = LoraConfig(target_modules=["0"], init_lora_weights=False, **{"r": 2, **arguments})
    model = get_peft_model(nn.Sequential(module.to(dtype)), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.set_adapter(list(names))
    return model


def layer_of(model: nn.Module) -> LoraLayer:
    layer = model.get_base_model()[0]
    assert isinstance(layer, LoraLayer)
    return layer


def delta(layer: LoraLayer, name: str = "default") -> Tensor:
    return layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: torch.dtype) -> None:
    model = adapt(nn.Linear(6, 4), dtype=dtype, lora_alpha=3)
    layer, x = layer_of(model), torch.randn(3, 6, dtype=dtype)
    assert layer.scaling["default"] == 1.5
    assert layer.lora_A["default"].weight.dtype == (dtype if dtype == torch.float64 else torch.float32)
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.linear(x, layer.weight, layer.bias).to(wide) + x.to(wide) @ delta(layer).T
    torch.testing.assert_close(model(x), expected.to(dtype))


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    assert layer_of(adapt(nn.Linear(6, 4), r=4, lora_alpha=3, use_rslora=True)).scaling["default"] == 1.5


def test_a_half_precision_adapter_is_kept_on_request() -> None:
    config = LoraConfig(target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4).half()), config, autocast_adapter_dtype=False)
    assert layer_of(model).lora_A["default"].weight.dtype == torch.float16


@pytest.mark.parametrize("bias", [True, False])
def test_several_adapters_add_up(bias: bool) -> None:
    model = adapt(nn.Linear(6, 4, bias=bias), "a", "b", "c")
    layer, x = layer_of(model), torch.randn(3, 6)
    expected = layer.base_layer(x) + sum(x @ delta(layer, name).T for name in "abc")
    torch.testing.assert_close(model(x), expected)
    model.set_adapter(["a", "c"])
    torch.testing.assert_close(model(x), layer.base_layer(x) + x @ (delta(layer, "a") + delta(layer, "c")).T)


def test_several_adapters_with_dropout_drop_apart() -> None:
    model = adapt(nn.Linear(6, 4), "a", "b", lora_dropout=0.5).train()
    layer, x = layer_of(model), torch.randn(3, 6)
    torch.manual_seed(3)
    masks = [F.dropout(torch.ones_like(x), 0.5) for _ in "ab"]
    expected = layer.base_layer(x) + sum(
        (x * mask) @ delta(layer, name).T for name, mask in zip("ab", masks, strict=True)
    )
    torch.manual_seed(3)
    torch.testing.assert_close(model(x), expected)


def test_dropout_is_for_training_only() -> None:
    model, x = adapt(nn.Linear(64, 4), lora_dropout=0.5), torch.randn(3, 64)
    layer = layer_of(model)
    model.eval()
    torch.testing.assert_close(model(x), layer.base_layer(x) + x @ delta(layer).T)
    model.train()
    assert not torch.equal(model(x), model(x))
    outputs = torch.stack([model(x) for _ in range(2000)])
    torch.testing.assert_close(outputs.mean(0), model.eval()(x), rtol=0, atol=0.2)


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_linear_subclass_of_its_own_is_called() -> None:
    model, x = adapt(Doubling(6, 4)), torch.randn(3, 6)
    layer = layer_of(model)
    torch.testing.assert_close(model(x), 2 * F.linear(x, layer.weight, layer.bias) + x @ delta(layer).T)


@pytest.mark.parametrize("use_dora", [False, True])
def test_hooks_of_the_base_layer_run(use_dora: bool) -> None:
    model, x = adapt(nn.Linear(6, 4), use_dora=use_dora), torch.randn(3, 6)
    layer, expected = layer_of(model), model(x)
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(seen, [F.linear(x, layer.weight, layer.bias)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_dora(dtype: torch.dtype, bias: bool) -> None:
    model, x = adapt(nn.Linear(6, 4, bias=bias), dtype=dtype, use_dora=True), torch.randn(3, 6, dtype=dtype)
    layer = layer_of(model)
    magnitude = layer.lora_magnitude_vector["default"].weight
    directed = layer.weight + delta(layer)
    torch.testing.assert_close(magnitude, directed.norm(dim=1).to(magnitude.dtype))  # starts as plain LoRA
    with torch.no_grad():
        magnitude.uniform_(0.5, 2)
    expected = x.to(directed.dtype) @ (directed * (magnitude / directed.norm(dim=1))[:, None]).T
    if bias:
        expected = expected + layer.bias
    assert model(x).dtype == dtype
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}  # it rounds before it scales
    torch.testing.assert_close(model(x), expected.to(dtype), **tolerance)


def test_dora_drops_only_what_the_adapter_changes() -> None:
    model, x = adapt(nn.Linear(6, 4), use_dora=True, lora_dropout=0.5).train(), torch.randn(3, 6)
    layer = layer_of(model)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.uniform_(0.5, 2)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    directed = layer.weight + delta(layer)
    scaled = directed * (layer.lora_magnitude_vector["default"].weight / directed.norm(dim=1))[:, None]
    expected = layer.base_layer(x) + dropped @ (scaled - layer.weight).T
    torch.manual_seed(3)
    torch.testing.assert_close(model(x), expected)


def test_embedding() -> None:
    model, x = adapt(nn.Embedding(7, 4, padding_idx=0)), torch.tensor([[1, 6], [0, 2]])
    layer = layer_of(model)
    table = (
        layer.weight
        + layer.scaling["default"] * (layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]).T
    )
    torch.testing.assert_close(model(x), table[x])


def test_an_embedding_that_scales_what_it_looks_up() -> None:
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.embed_scale

    model, x = adapt(Scaled(7, 4)), torch.tensor([[1, 6]])
    layer = layer_of(model)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer(x), expected)


@pytest.mark.parametrize(
    "arguments", [{"kernel_size": 1}, {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2}]
)
def test_conv2d(arguments: dict[str, Any]) -> None:
    model, x = adapt(nn.Conv2d(3, 5, **arguments)), torch.randn(2, 3, 9, 9)
    layer = layer_of(model)
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    kernel = layer.weight + layer.scaling["default"] * torch.einsum("orxy,rikl->oikl", up, down)
    options = {name: value for name, value in arguments.items() if name != "kernel_size"}
    torch.testing.assert_close(model(x), F.conv2d(x, kernel, layer.bias, **options), rtol=1e-4, atol=1e-5)


MERGED = [
    (lambda: nn.Linear(6, 4), {}),
    (lambda: nn.Linear(6, 4), {"use_dora": True}),
    (lambda: nn.Embedding(7, 4), {}),
    (lambda: nn.Conv2d(3, 5, 3), {}),
    (lambda: nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last), {}),
]


@pytest.mark.parametrize(("make", "arguments"), MERGED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_is_exact_both_ways(make: Any, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    model = adapt(make(), dtype=dtype, **arguments).eval()
    layer = layer_of(model)
    x = torch.randint(7, (2, 3)) if isinstance(layer.base_layer, nn.Embedding) else None
    if x is None:
        x = torch.randn(2, 6, dtype=dtype) if layer.weight.dim() == 2 else torch.randn(2, 3, 5, 5, dtype=dtype)
    before, expected = layer.weight.clone(), model(x)
    model.merge_adapter()
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype in (torch.float32, torch.float64) else {"rtol": 5e-2, "atol": 5e-2}
    )
    torch.testing.assert_close(model(x), expected, **tolerance)
    assert not torch.equal(layer.weight, before)
    with torch.no_grad():  # what is trained meanwhile must not matter
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before)


def test_merged_adapters_come_out_in_the_opposite_order() -> None:
    model = adapt(nn.Linear(6, 4), "a", "b", dtype=torch.bfloat16)
    layer = layer_of(model)
    before = layer.weight.clone()
    model.merge_adapter(["b"])
    first = layer.weight.clone()
    model.merge_adapter(["b", "a"])
    assert layer.merged_adapters == ["b", "a"]
    layer.unmerge(keep=1)
    assert torch.equal(layer.weight, first)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_grouped_conv2d_cannot_be_merged() -> None:
    model = adapt(nn.Conv2d(4, 4, 3, groups=2))
    before = layer_of(model).weight.clone()
    with pytest.raises(ValueError, match=r"groups > 1 .* cannot be merged"):
        model.merge_adapter()
    assert torch.equal(layer_of(model).weight, before)


def test_scales() -> None:
    layer = layer_of(adapt(nn.Linear(6, 4), r=2, lora_alpha=4))
    layer.scale_layer(3)
    assert layer.scaling["default"] == 6
    layer.unscale_layer(2)
    assert layer.scaling["default"] == 3
    layer.unscale_layer()
    assert layer.scaling["default"] == 2
    layer.set_scale("default", 0.5)
    assert layer.scaling["default"] == 1


# --- initial values ------------------------------------------------------------------------------


def fresh(module: nn.Module, init: bool | str, **arguments: Any) -> tuple[nn.Module, LoraLayer]:
    config = LoraConfig(target_modules=["0"], init_lora_weights=init, **{"r": 4, "lora_alpha": 6, **arguments})
    model = get_peft_model(nn.Sequential(module), config)
    return model, layer_of(model)


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "pissa_niter_8", "olora", "orthogonal"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_new_adapter_changes_nothing(init: bool | str, use_dora: bool) -> None:
    base = nn.Linear(12, 10)
    before, x = base.weight.detach().clone(), torch.randn(3, 12)
    expected = base(x).detach()
    model, layer = fresh(base, init, use_dora=use_dora)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    changed = isinstance(init, str) and init.startswith(("pissa", "olora"))
    assert torch.equal(layer.weight, before) != changed
    torch.testing.assert_close(layer.weight + delta(layer), before, rtol=1e-4, atol=1e-5)
    assert layer.lora_A["default"].weight.any(dim=1).all()


def test_initial_distributions() -> None:
    torch.manual_seed(0)
    _, layer = fresh(nn.Linear(4096, 8), True)
    A = layer.lora_A["default"].weight
    bound = 1 / math.sqrt(4096)
    assert 0.98 * bound < A.abs().max() <= bound
    _, layer = fresh(nn.Linear(4096, 8), "gaussian")
    assert layer.lora_A["default"].weight.std().item() == pytest.approx(1 / 4, rel=0.05)
    _, layer = fresh(nn.Embedding(50, 64), True)
    assert not layer.lora_embedding_A["default"].any()
    assert layer.lora_embedding_B["default"].std().item() == pytest.approx(1, rel=0.2)
    _, layer = fresh(nn.Linear(8, 8), False)
    assert delta(layer).abs().max() > 0


def test_pissa_takes_the_principal_part() -> None:
    base = nn.Linear(12, 10)
    singular = torch.linalg.svdvals(base.weight.detach())
    _, layer = fresh(base, "pissa")
    torch.testing.assert_close(torch.linalg.svdvals(delta(layer).detach())[:4], singular[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight.detach())[:6], singular[4:], rtol=1e-4, atol=1e-5)
