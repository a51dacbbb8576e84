"""LoKr against its formula and against Hugging Face PEFT: shapes, values, checkpoints both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peft_ext
from peft_ext import LoKrConfig, PeftModel, get_peft_model
from peft_ext.tuners.lokr import LoKrLayer

LINEAR = {
    "default": {"r": 2},
    "both": {"r": 1, "decompose_both": True},
    "whole": {"r": 64},
    "factor": {"r": 1, "decompose_factor": 8},
    "patterns": {"r": 2, "rank_pattern": {"0": 1}, "alpha_pattern": {"2": 3.0}},
    "random": {"r": 2, "init_weights": False},
    "lycoris": {"r": 2, "init_weights": "lycoris"},
}
CONV = {
    "default": {"r": 2},
    "effective": {"r": 1, "use_effective_conv2d": True},
    "whole": {"r": 64},
    "both": {"r": 1, "decompose_both": True},
}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 12))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 1, groups=2))


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lokr" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


CASES = [(mlp, (3, 5, 24), options) for options in LINEAR.values()] + [
    (cnn, (2, 8, 7, 7), options) for options in CONV.values()
]


@pytest.mark.parametrize(("make", "shape", "options"), CASES, ids=[*LINEAR, *(f"conv {name}" for name in CONV)])
def test_checkpoints_go_both_ways_with_peft(make: Any, shape: Any, options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    x = torch.randn(shape)
    options = {"target_modules": ["0", "2"], "alpha": 3, **options}
    theirs = peft.get_peft_model(make(), peft.LoKrConfig(**options)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(make(), tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-5, atol=2e-5)
    assert isinstance(ours.peft_config["default"], LoKrConfig)

    ours = get_peft_model(make(), LoKrConfig(**options)).eval()
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(x), ours(x), rtol=2e-5, atol=2e-5)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


@pytest.mark.parametrize("init", [True, False, "lycoris"])
def test_initial_values_are_those_of_peft(init: bool | str) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 1, "target_modules": ["0"], "init_weights": init, "decompose_both": True}
    theirs = peft.get_peft_model(mlp(), peft.LoKrConfig(**options))
    ours = get_peft_model(mlp(), LoKrConfig(**options))
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if "lokr" in name:
            assert parameter.any() == theirs_by_name[name].any(), name
    assert torch.equal(ours(torch.ones(1, 24)), mlp()(torch.ones(1, 24))) == bool(init)


def test_the_fields_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    theirs, ours = peft.LoKrConfig().to_dict(), LoKrConfig().to_dict()
    ignored = {"peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
    for name in theirs.keys() - ignored:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("kind", ["bert", "llama", "sequential"])
def test_train_save_load(tiny: Any, run: Any, kind: str, tmp_path: Path) -> None:
    targets = {"target_modules": ["0", "2"]} if kind == "sequential" else {}
    model = get_peft_model(tiny(kind), LoKrConfig(r=2, **targets))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = run(model).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        assert parameter.requires_grad == ("lokr" in name)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(tiny(kind), tmp_path)), run(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("make", "shape", "options"), CASES, ids=[*LINEAR, *(f"conv {name}" for name in CONV)])
def test_merge_and_unmerge(make: Any, shape: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = get_peft_model(make().to(dtype), LoKrConfig(**{"target_modules": ["0", "2"], **options})).eval()
    randomize(model)
    x, base = torch.randn(shape, dtype=dtype), copy.deepcopy(model.get_base_model()[0].weight)
    wanted = model(x)
    # the merged weights are rounded once more, and the sums over inputs are in another order
    close = {"rtol": 0, "atol": 16 * torch.finfo(dtype).eps * wanted.abs().max().item()}
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), wanted, **close)
    model.unmerge_adapter()
    assert torch.equal(model.get_base_model()[0].weight, base)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LoKrLayer) for module in merged.modules())
    torch.testing.assert_close(merged(x), wanted, **close)


def test_several_adapters() -> None:
    model, x = get_peft_model(mlp(), LoKrConfig(r=2, target_modules=["0"])), torch.randn(3, 24)
    plain = model(x)
    model.add_adapter("other", LoKrConfig(r=1, target_modules=["0"], init_weights=False))
    assert torch.equal(model(x), plain)
    model.set_adapter("other")
    assert not torch.equal(model(x), plain)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    model.delete_adapter("other")
    assert torch.equal(model(x), plain)
    assert torch.equal(model.unload()(x), mlp()(x))


@pytest.mark.parametrize(("make", "shape"), [(mlp, (3, 24)), (cnn, (2, 8, 7, 7))])
def test_rank_dropout_drops_whole_outputs(make: Any, shape: Any) -> None:
    config = LoKrConfig(r=2, target_modules=["0"], rank_dropout=0.5, init_weights=False)
    model, x = get_peft_model(make(), config).train(), torch.randn(shape)
    layer = model.get_base_model()[0]
    change = layer(x) - layer.base_layer(x)
    full = model.eval().get_base_model()[0](x) - layer.base_layer(x)
    dims = [d for d in range(full.dim()) if d != (1 if full.dim() == 4 else full.dim() - 1)]
    dropped = (change == 0).all(dim=dims)
    assert 0 < dropped.sum() < dropped.numel()
    kept = ~dropped if full.dim() == 2 else (~dropped)[:, None, None]
    torch.testing.assert_close(change, full * kept, rtol=1e-4, atol=1e-5)


def test_module_dropout_leaves_calls_out() -> None:
    config = LoKrConfig(r=2, target_modules=["0"], module_dropout=0.5, init_weights=False)
    model, x = get_peft_model(mlp(), config).train(), torch.randn(3, 24)
    layer = model.get_base_model()[0]
    plain = layer.base_layer(x)
    left_out = sum(torch.equal(layer(x), plain) for _ in range(100))
    assert 20 < left_out < 80
    model.eval()
    assert not torch.equal(layer(x), plain)


def test_half_precision_base() -> None:
    model = get_peft_model(mlp().bfloat16(), LoKrConfig(r=2, target_modules=["0"]))
    assert model(torch.randn(3, 24).bfloat16()).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "must be an integer > 0"),
        ({"rank_pattern": {"0": -1}}, "must be an integer > 0"),
        ({"alpha": float("nan")}, "must be a finite number"),
        ({"rank_dropout": 1.0}, r"rank_dropout must be in \[0, 1\)"),
        ({"module_dropout": -0.1}, r"module_dropout must be in \[0, 1\)"),
        ({"decompose_factor": 0}, "decompose_factor, if it is not -1, must be an integer > 0, got 0"),
        ({"decompose_factor": 2.5}, "must be an integer > 0, got 2.5"),
        ({"init_weights": "gaussian"}, "init_weights must be"),
    ],
)
def test_bad_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoKrConfig(**options)


def test_a_layer_of_another_kind_changes_nothing(snapshot: Any, same: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4))
    before = snapshot(model)
    with pytest.raises(ValueError, match="'1' is a Embedding, which LoKr does not support"):
        peft_ext.get_peft_model(model, LoKrConfig(target_modules=["0", "1"]))
    assert same(model, before)
