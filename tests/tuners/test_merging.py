"""Merging against float64: one rounding, the same bits back, and a refusal before anything is touched."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_ext import BitFitConfig, LoKrConfig, LoraConfig, LoRALinear, MergedLoRALinear, PeftConfig, get_peft_model
from peft_ext.tuners.layer import TunerLayer

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def conv1d() -> nn.Module:
    return pytest.importorskip("transformers").pytorch_utils.Conv1D(24, 32)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(32, 24),
    "conv1d": conv1d,
    "embedding": lambda: nn.Embedding(40, 24),
    "conv2d": lambda: nn.Conv2d(8, 12, 3),
    "channels last": lambda: nn.Conv2d(8, 12, 3).to(memory_format=torch.channels_last),
}
LORA = {name: (name, LoraConfig(r=4, lora_alpha=3, init_lora_weights=False)) for name in MODULES}
DORA = {
    f"dora {name}": (name, LoraConfig(r=4, use_dora=True, init_lora_weights=False)) for name in ("linear", "conv1d")
}
LOKR = {
    "lokr": ("linear", LoKrConfig(r=2, init_weights=False)),
    "lokr both": ("linear", LoKrConfig(r=1, decompose_both=True, init_weights=False)),
    "lokr conv2d": ("conv2d", LoKrConfig(r=1, alpha=3, use_effective_conv2d=True, init_weights=False)),
}
CASES = {**LORA, **DORA, **LOKR}
cases = pytest.mark.parametrize("case", CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def adapt(
    case: str, dtype: torch.dtype, device: torch.device, names: str = "a", autocast_adapter_dtype: bool = True
) -> tuple[nn.Module, Any]:
    """A model of one layer, with random adapters of these names, and the layer."""
    kind, config = CASES[case]
    config = copy.deepcopy(config)
    config.target_modules = {"0"}
    base = nn.Sequential(MODULES[kind]().to(device=device, dtype=dtype))
    model = get_peft_model(base, config, names[0], autocast_adapter_dtype)
    for name in names[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "lokr_" in name:
                parameter.copy_(
                    torch.randn_like(parameter).abs() if "magnitude" in name else torch.randn_like(parameter)
                )
    return model, model.get_base_model()[0]


def part(layer: Any, kind: str, name: str) -> Tensor:
    holder = getattr(layer, kind)[name]
    return getattr(holder, "weight", holder).detach().double()


def exact(layer: Any, name: str, weight: Tensor) -> Tensor:
    """The formula of the papers in float64, written out for each kind of layer."""
    weight = weight.detach().double()
    if hasattr(layer, "lokr_w1"):
        return weight + layer.scaling[name] * lokr_delta(layer, name).reshape(weight.shape)
    if isinstance(layer.base_layer, nn.Embedding):
        delta = (part(layer, "lora_embedding_B", name) @ part(layer, "lora_embedding_A", name)).T
    elif isinstance(layer.base_layer, nn.Conv2d):
        delta = torch.einsum("orxy,rikl->oikl", part(layer, "lora_B", name), part(layer, "lora_A", name))
    else:
        delta = part(layer, "lora_B", name) @ part(layer, "lora_A", name)
        delta = delta.T if layer.fan_in_fan_out else delta
    merged = weight + layer.scaling[name] * delta
    if layer.use_dora[name]:
        inputs = 0 if layer.fan_in_fan_out else 1
        magnitude = part(layer, "lora_magnitude_vector", name).unsqueeze(inputs)
        merged = merged * magnitude / merged.norm(dim=inputs, keepdim=True)
    return merged


def lokr_delta(layer: Any, name: str) -> Tensor:
    have = {kind for kind in layer.part_names if name in getattr(layer, kind)}
    w1 = (
        part(layer, "lokr_w1", name)
        if "lokr_w1" in have
        else part(layer, "lokr_w1_a", name) @ part(layer, "lokr_w1_b", name)
    )
    if "lokr_w2" in have:
        w2 = part(layer, "lokr_w2", name)
    elif "lokr_t2" in have:
        t2, a, b = (part(layer, f"lokr_{kind}", name) for kind in ("t2", "w2_a", "w2_b"))
        w2 = torch.einsum("ijkl,io,jc->ockl", t2, a, b)
    else:
        w2 = part(layer, "lokr_w2_a", name) @ part(layer, "lokr_w2_b", name)
    return torch.kron(w1, w2.flatten(1)) if w2.dim() > 2 else torch.kron(w1, w2)


def same_bits(one: Tensor, other: Tensor) -> bool:
    bits = BITS[one.dtype]
    return torch.equal(one.detach().contiguous().view(bits), other.detach().contiguous().view(bits))


def check_rounded_once(found: Tensor, wanted: Tensor) -> None:
    """``found`` is the float64 ``wanted`` rounded once, but for the error of a sum in float32."""
    dtype = found.dtype
    accumulated = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * wanted.abs().max()
    rounding = torch.finfo(dtype).eps / 2 * wanted.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((found.double() - wanted).abs() <= rounding + accumulated).all()
    if dtype in (torch.bfloat16, torch.float16):
        assert (found == wanted.to(dtype)).double().mean() > 0.99


@cases
@dtypes
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_one_rounding(case: str, dtype: torch.dtype, autocast_adapter_dtype: bool, device: torch.device) -> None:
    model, layer = adapt(case, dtype, device, autocast_adapter_dtype=autocast_adapter_dtype)
    before, wanted = layer.weight.detach().clone(), exact(layer, "a", layer.weight)
    model.merge_adapter()
    check_rounded_once(layer.weight, wanted)
    model.unmerge_adapter()
    assert same_bits(layer.weight, before)
    model.merge_adapter(safe_merge=False)
    check_rounded_once(model.merge_and_unload()[0].weight, wanted)


@cases
def test_autocast_lowers_no_precision(case: str, device: torch.device) -> None:
    model, layer = adapt(case, torch.float32, device)
    wanted = exact(layer, "a", layer.weight)
    with torch.autocast(device.type, torch.bfloat16):
        model.merge_adapter()
    check_rounded_once(layer.weight, wanted)


@pytest.mark.parametrize("case", [*LORA, *LOKR])
@dtypes
def test_adapters_merged_together_are_rounded_together(case: str, dtype: torch.dtype, device: torch.device) -> None:
    model, layer = adapt(case, dtype, device, "abc")
    before = layer.weight.detach().clone()
    wanted = before.double()
    for name in "abc":
        wanted = exact(layer, name, wanted)
    model.merge_adapter(["a", "b", "c"])
    check_rounded_once(layer.weight, wanted)
    model.unmerge_adapter()
    assert same_bits(layer.weight, before)


@cases
@dtypes
def test_the_same_bits_in_any_order(case: str, dtype: torch.dtype, device: torch.device) -> None:
    model, layer = adapt(case, dtype, device, "abc"[: 1 if case in DORA else 3])
    names = list(model.peft_config)
    for order in itertools.permutations(names):
        steps = [layer.weight.detach().clone()]
        for name in order:
            model.merge_adapter([name])
            steps.append(layer.weight.detach().clone())
            assert not same_bits(steps[-1], steps[-2])
        assert layer.merged_adapters == list(order)
        with torch.no_grad():  # what is trained meanwhile must not matter
            for name, parameter in layer.named_parameters():
                if "base_layer" not in name:
                    parameter.neg_()
        for keep in reversed(range(len(names))):
            layer.unmerge(keep=keep)
            assert same_bits(layer.weight, steps[keep])


def test_merged_together_come_out_together(device: torch.device) -> None:
    model, layer = adapt("linear", torch.bfloat16, device, "abc")
    model.merge_adapter(["c"])
    first = layer.weight.detach().clone()
    model.merge_adapter(["c", "a", "b"])
    assert layer.merged_adapters == ["c", "a", "b"]
    layer.unmerge(keep=2)
    assert layer.merged_adapters == ["c"]
    assert same_bits(layer.weight, first)


@cases
@pytest.mark.parametrize("moved", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_merged_model_can_be_moved(case: str, moved: torch.dtype, device: torch.device) -> None:
    model, layer = adapt(case, torch.float32, device)
    plain = layer.weight.detach().to(moved)
    wanted = exact(layer, "a", plain if "dora" not in case else layer.weight)
    model.merge_adapter()
    model.to(moved)
    assert layer.weight.dtype == moved
    assert model.merged_adapters == ["a"]
    difference = (layer.weight.double() - wanted).abs().max()
    assert difference <= 2 * max(torch.finfo(moved).eps, torch.finfo(torch.float32).eps * 8) * wanted.abs().max()
    model.unmerge_adapter()
    assert same_bits(layer.weight, plain)


@dtypes
@pytest.mark.parametrize("enable_lora", [None, [True, False, True]])
def test_modules_round_once_too(dtype: torch.dtype, enable_lora: list[bool] | None, device: torch.device) -> None:
    linear = nn.Linear(32, 24, device=device, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    layer: LoRALinear | MergedLoRALinear
    if enable_lora is None:
        layer = LoRALinear(linear, 4, 3.0, init="gaussian", adapter_dtype=wide)
    else:
        layer = MergedLoRALinear(linear, enable_lora, 4, 3.0, init="gaussian", adapter_dtype=wide)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    before, wanted = layer.weight.detach().clone(), layer.weight.detach().to(torch.float64, copy=True)
    enabled = enable_lora or [True]
    groups = sum(enabled)
    factors = zip(
        layer.lora_A.detach().double().chunk(groups), layer.lora_B.detach().double().chunk(groups), strict=True
    )
    for rows, has_update in zip(wanted.chunk(len(enabled)), enabled, strict=True):
        if has_update:
            a, b = next(factors)
            rows += layer.scale * b @ a
    layer.merge()
    check_rounded_once(layer.weight, wanted)
    layer.unmerge()
    assert same_bits(layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_modules_refuse_what_is_not_finite(dtype: torch.dtype, value: float) -> None:
    layer = MergedLoRALinear(nn.Linear(4, 6).to(dtype), [True, False, True], 2, 10.0, adapter_dtype=torch.float32)
    with torch.no_grad():
        layer.lora_A.fill_(2)
        layer.lora_B[-1] = value
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="merging would make weights that are not finite"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.weight, before)
    layer.merge(safe_merge=False)
    assert not layer.weight.isfinite().all()
    layer.unmerge()
    assert torch.equal(layer.weight, before)


# --- refusals ------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))


REFUSED: dict[str, tuple[PeftConfig, str]] = {
    "lora": (LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False), "1.lora_B.default.weight"),
    "dora": (
        LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False, use_dora=True),
        "1.lora_magnitude_vector.default.weight",
    ),
    "lokr": (LoKrConfig(r=2, target_modules=["0", "1"], init_weights=False), "1.lokr_w1.default"),
    "bitfit": (BitFitConfig(), "1.biases.default.bias"),
    "modules_to_save": (
        LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, modules_to_save=["1"]),
        "1.modules_to_save.default.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite_is_refused_before_anything_is_touched(
    case: str, value: float, snapshot: Any, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, parameter = REFUSED[case]
    model = get_peft_model(mlp(), config)
    with torch.no_grad():
        model.get_base_model().get_parameter(parameter).view(-1)[0] = value
    model.set_adapter("default", inference_mode=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    touched: list[nn.Module] = []
    for kind in {type(slot) for _, slot in model.slots() if isinstance(slot, TunerLayer)}:
        monkeypatch.setattr(kind, "merge", lambda layer, *_, **__: touched.append(layer))
    for call in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(["default"])):
        with pytest.raises(
            ValueError, match=r"merging adapter 'default' would make weights that are not finite, in '1\."
        ):
            call()
    assert not touched
    assert not model.merged_adapters
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(same_bits(after[name], value) for name, value in before.items())


def test_a_sum_that_overflows_is_refused(device: torch.device) -> None:
    model, layer = adapt("linear", torch.float16, device)
    with torch.no_grad():
        layer.lora_A["a"].weight.fill_(200)
        layer.lora_B["a"].weight.fill_(200)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=r"not finite, in '0\.weight': only safe_merge=False merges it"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="not finite, in 'weight'"):
        layer.merge()
    assert same_bits(layer.weight, before)
    model.merge_adapter(safe_merge=False)
    assert layer.weight.isinf().all()
    model.unmerge_adapter()
    assert same_bits(layer.weight, before)


def test_adapters_that_cannot_be_active_together_cannot_be_merged_together() -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_dora=True)
    model = get_peft_model(mlp(), config, "a")
    model.add_adapter("b", config)
    weight = model.get_base_model()[0].weight
    before = weight.clone()
    with pytest.raises(ValueError, match=r"adapters \['a', 'b'\] cannot be active together: DoRA"):
        model.merge_adapter(["a", "b"])
    assert torch.equal(weight, before)
    model.merge_adapter(["b"])
    merged = weight.clone()
    with pytest.raises(ValueError, match=r"adapters \['b', 'a'\] cannot be active together"):
        model.merge_adapter(["a"])
    assert torch.equal(weight, merged)

    heads = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    model = get_peft_model(mlp(), heads, "a")
    model.add_adapter("b", heads)
    with pytest.raises(ValueError, match="each has its own copy of one module"):
        model.merge_and_unload(adapter_names=["a", "b"])
    assert not model.merged_adapters


def test_a_merge_that_breaks_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    before = [layer.weight.clone() for layer in model.get_base_model()]
    kind = type(model.get_base_model()[0])
    add, calls = kind._add, []

    def fail_second(layer: Any, names: list[str]) -> Any:
        calls.append(layer)
        if len(calls) == 2:
            raise MemoryError
        return add(layer, names)

    monkeypatch.setattr(kind, "_add", fail_second)
    with pytest.raises(MemoryError):
        model.merge_adapter()
    assert not model.merged_adapters
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model.get_base_model(), before, strict=True))
