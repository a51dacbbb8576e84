"""AdapterFusion over adapters that were trained before, in transformers' models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_ext import (
    AdapterFusionConfig,
    HoulsbyConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PfeifferConfig,
    fusion_weights,
    get_peft_model,
)

transformers = pytest.importorskip("transformers")

Make = Callable[[str], nn.Module]
Run = Callable[[nn.Module], Tensor]
KINDS = ["bert", "gpt2", "llama"]
WIDTHS = {"a": 4, "b": 2}


def houlsby(width: int, **options: Any) -> HoulsbyConfig:
    return HoulsbyConfig(bottleneck_dim=width, train_layer_norms=False, **options)


def pfeiffer(width: int, **options: Any) -> PfeifferConfig:
    return PfeifferConfig(bottleneck_dim=width, **options)


@pytest.fixture(params=[houlsby, pfeiffer])
def member(request: pytest.FixtureRequest) -> Callable[..., PeftConfig]:
    return request.param


def save_members(base: nn.Module, member: Callable[..., PeftConfig], folder: Path, **options: Any) -> list[str]:
    """Adapters of unequal bottleneck width whose values show in the output."""
    for name, width in WIDTHS.items():
        model = get_peft_model(base, member(width, **options))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".adapter." in key:
                    parameter.normal_(std=0.5)
        model.save_pretrained(folder / name)
        base = model.unload()
    return [str(folder / name) for name in WIDTHS]


@pytest.fixture
def members(tiny: Make, member: Callable[..., PeftConfig], tmp_path: Path) -> Callable[[str], list[str]]:
    return lambda kind: save_members(tiny(kind), member, tmp_path / "members")


def train(model: nn.Module, run: Run, steps: int = 3) -> set[str]:
    """The names of the parameters that moved, bit by bit."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (run(model) - 1).square().mean().backward()
        optimizer.step()
    model.eval()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("kind", KINDS)
def test_train_save_load(tiny, run, members, kind, tmp_path):
    base = tiny(kind)
    plain = run(base)
    head = ["classifier"] if kind == "bert" else ["lm_head"]
    model = get_peft_model(base, AdapterFusionConfig(adapters=members(kind), modules_to_save=head))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".adapter.default.fusion." in name or ".modules_to_save." in name for name in trained)
    # the key's bias moves all logits alike: its gradient is exactly zero
    assert train(model, run) == {name for name in trained if not name.endswith("fusion.key.bias")}
    wanted = run(model)
    model.save_pretrained(tmp_path / "fused")
    shutil.rmtree(tmp_path / "members")  # the saved folder is all that is needed
    assert torch.equal(run(PeftModel.from_pretrained(tiny(kind), tmp_path / "fused")), wanted)
    further = PeftModel.from_pretrained(tiny(kind), tmp_path / "fused", is_trainable=True)
    assert {name for name, p in further.named_parameters() if p.requires_grad} == trained
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    unloaded = model.unload()
    assert torch.equal(run(unloaded), plain)
    assert dict(unloaded.named_parameters()).keys() == dict(tiny(kind).named_parameters()).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_with_an_identity_value_is_that_adapter(tiny, run, members, kind):
    folder = members(kind)[0]
    alone = run(PeftModel.from_pretrained(tiny(kind), folder))
    fused = get_peft_model(tiny(kind), AdapterFusionConfig(adapters=[folder])).eval()
    for name, parameter in fused.named_parameters():
        if name.endswith("fusion.value.weight"):
            nn.init.eye_(parameter)
    torch.testing.assert_close(run(fused), alone)
    assert not torch.allclose(alone, run(tiny(kind)))


def mix(fused: Any, x: Tensor) -> Tensor:
    """V Σ wᵢ fᵢ(x) in plain PyTorch."""
    outputs = torch.stack([a.up_proj(act(a)(a.down_proj(x))) for a in fused.adapters], dim=-2)
    query, keys = fused.fusion.query(x), fused.fusion.key(outputs)
    weights = (keys @ query.unsqueeze(-1)).softmax(dim=-2)
    return fused.fusion.value((weights * outputs).sum(dim=-2))


def act(adapter: Any) -> Callable[[Tensor], Tensor]:
    return {"gelu": nn.functional.gelu, "relu": nn.functional.relu}[adapter.activation]


def fuse(base: nn.Module, folders: list[str]) -> PeftModel:
    """With weights that are not near equal."""
    model = get_peft_model(base, AdapterFusionConfig(adapters=folders)).eval()
    for name, parameter in model.named_parameters():
        if ".fusion." in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def test_definition_after_houlsby(tiny, tmp_path):
    model = fuse(tiny("bert"), save_members(tiny("bert"), houlsby, tmp_path))
    output = model.get_base_model().bert.encoder.layer[1].output
    hidden, residual = torch.randn(2, 3, 32), torch.randn(2, 3, 16)
    h = output.dense(hidden)
    expected = output.LayerNorm(h + mix(output.dropout.adapter["default"], h) + residual)
    torch.testing.assert_close(output(hidden, residual), expected)


def test_definition_around_the_norm_of_pfeiffer(tiny, tmp_path):
    model = fuse(tiny("bert"), save_members(tiny("bert"), pfeiffer, tmp_path))
    output = model.get_base_model().bert.encoder.layer[1].output
    hidden, residual = torch.randn(2, 3, 32), torch.randn(2, 3, 16)
    norm, fused = output.LayerNorm.base_layer, output.LayerNorm.adapter["default"]
    s = output.dense(hidden) + residual
    torch.testing.assert_close(output(hidden, residual), norm(s + mix(fused, norm(s))))


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(tiny, run, members, dtype, autocast_adapter_dtype):
    config = AdapterFusionConfig(adapters=members("llama"))
    wanted = run(get_peft_model(tiny("llama"), config, autocast_adapter_dtype=False).eval())
    model = get_peft_model(tiny("llama").to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype).eval()
    trained = torch.float32 if autocast_adapter_dtype else dtype
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {trained}
    got = run(model)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, atol=0.2, rtol=0.1)
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_inspectable(tiny, run, members, kind):
    model = fuse(tiny(kind), members(kind))
    with fusion_weights(model) as weights:
        run(model)
    assert weights
    for name, (calls,) in weights.items():
        assert name.endswith(".adapter.default.fusion")
        assert calls.shape == (2, 5, 2)
        torch.testing.assert_close(calls.sum(-1), torch.ones(2, 5))


def test_several_fusions(tiny, run, members, tmp_path):
    folders = members("bert")
    model = fuse(tiny("bert"), folders)
    first = run(model)
    model.add_adapter("other", AdapterFusionConfig(adapters=folders[::-1] + folders[:1]))
    assert torch.equal(run(model), first)
    model.set_adapter("other")
    moved = train(model, run)
    assert moved
    assert all(".adapter.other.fusion." in name for name in moved)
    second = run(model)
    model.save_pretrained(tmp_path / "fused")
    model.set_adapter("default")
    assert torch.equal(run(model), first)
    model.delete_adapter("default")
    assert torch.equal(run(model), second)
    loaded = PeftModel.from_pretrained(tiny("bert"), tmp_path / "fused")
    loaded.load_adapter(tmp_path / "fused" / "other", "other")
    loaded.set_adapter("other")
    assert torch.equal(run(loaded), second)


def test_a_loaded_configuration_starts_a_new_fusion_of_the_same_adapters(tiny, run, members, tmp_path):
    model = get_peft_model(tiny("bert"), AdapterFusionConfig(adapters=members("bert"))).eval()
    model.save_pretrained(tmp_path / "fused")
    config = PeftConfig.from_pretrained(tmp_path / "fused")
    config.inference_mode = False
    again = get_peft_model(tiny("bert"), config).eval()
    values = {name: p for name, p in model.named_parameters() if ".adapters." in name}
    assert values
    assert all(torch.equal(p, values[name]) for name, p in again.named_parameters() if name in values)


def test_regularisation_is_part_of_the_models_own_loss_in_training(tiny, members):
    model = fuse(tiny("bert"), members("bert"))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = {"input_ids": torch.randint(50, (2, 5)), "labels": torch.tensor([0, 1])}
    plain = model(**batch).loss
    term = model.fusion_regularisation()
    values = [p for name, p in model.named_parameters() if name.endswith("fusion.value.weight")]
    torch.testing.assert_close(term, sum(0.01 * (torch.eye(16) - value).square().sum() for value in values))
    assert term > 0.1
    torch.testing.assert_close(model.train()(**batch).loss, plain + term)
    with model.disable_adapter():
        assert model.fusion_regularisation() == 0


def test_trainer(tiny, run, tmp_path):
    pytest.importorskip("accelerate")
    from peft_ext.tuners.trainer import Trainer

    folders = save_members(tiny("bert"), pfeiffer, tmp_path, task_type="SEQ_CLS")
    model = get_peft_model(tiny("bert"), AdapterFusionConfig(adapters=folders, task_type="SEQ_CLS"))
    ids = torch.randint(1, 50, (16, 6))
    rows = [{"input_ids": row, "labels": int(row[0] > 25)} for row in ids]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(".fusion." in name or "classifier.modules_to_save" in name for name in moved)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny("bert"), tmp_path / "saved")
    assert torch.equal(run(loaded), run(model.eval()))


def test_gradient_checkpointing(tiny, run, members):
    folders, gradients = members("llama"), []
    for checkpointing in (False, True):
        base = tiny("llama")
        if checkpointing:
            base.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model = get_peft_model(base, AdapterFusionConfig(adapters=folders)).train()
        run(model).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_a_plain_model(tmp_path):
    base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    folders = save_members(base, pfeiffer, tmp_path, target_modules=["0"])
    model = get_peft_model(base, AdapterFusionConfig(adapters=folders, modules_to_save=["2"]))
    x = torch.randn(3, 8)
    fused, h = base[0].adapter["default"], base[0].base_layer.forward(x)
    torch.testing.assert_close(model(x), base[2](torch.relu(h + mix(fused, h))))


def fails(base: nn.Module, folders: list[str], same: Any, snapshot: Any, error: type, message: str, **options: Any):
    before = snapshot(base)
    with pytest.raises(error, match=message):
        get_peft_model(base, AdapterFusionConfig(adapters=folders, **options))
    assert same(base, before)


def test_adapters_that_do_not_fit_together(tiny, same, snapshot, tmp_path):
    folders = save_members(tiny("bert"), pfeiffer, tmp_path)
    others = save_members(tiny("bert"), houlsby, tmp_path / "houlsby")
    one_layer = save_members(tiny("bert"), pfeiffer, tmp_path / "layer", layers_to_transform=[1])
    norms = get_peft_model(tiny("bert"), HoulsbyConfig())
    norms.save_pretrained(tmp_path / "norms")
    lora = get_peft_model(tiny("bert"), LoraConfig())
    lora.save_pretrained(tmp_path / "lora")
    base = tiny("bert")
    for second, message in (
        (others[0], "adapters must be of one kind.* PFEIFFER.* HOULSBY"),
        (one_layer[0], r"not in the same places: only one of them has an adapter at .*layer\.0\.output"),
        (str(tmp_path / "norms"), "has trained the model's layer norms"),
        (str(tmp_path / "lora"), "is of peft_type 'LORA', but only HOULSBY and PFEIFFER can be fused"),
    ):
        fails(base, [folders[0], second], same, snapshot, ValueError, message)
    fails(base, [folders[0], str(tmp_path / "c")], same, snapshot, FileNotFoundError, "no adapter folder at .*c'")
    fails(base, folders, same, snapshot, ValueError, "'bert.encoder', but the adapter", modules_to_save=["encoder"])


def test_adapters_that_do_not_fit_the_model(tiny, same, snapshot, tmp_path):
    folders = save_members(tiny("bert"), pfeiffer, tmp_path)
    fails(tiny("gpt2"), folders, same, snapshot, ValueError, "matches no module")
    wider = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    )
    message = r"/b' does not fit the model: .*down_proj.weight has shape \(2, 16\) instead of \(2, 24\)"
    fails(wider, folders[1:], same, snapshot, ValueError, message)
    file = Path(folders[0]) / "adapter_model.safetensors"
    tensors = load_file(file)
    missing = sorted(tensors)[0]
    save_file({key: tensor for key, tensor in tensors.items() if key != missing}, file)
    fails(tiny("bert"), folders, same, snapshot, ValueError, f"/a' does not fit the model: missing keys: {missing}")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"adapters": []}, ValueError, "adapters must name at least one trained adapter"),
        ({}, TypeError, "adapters must be a list of folders, got None"),
        ({"adapters": "a"}, TypeError, "adapters must be a list of folders, got 'a'"),
        ({"adapters": ["a"], "regularisation": -1}, ValueError, "regularisation must be a finite number >= 0"),
        ({"adapters": ["a"], "modules_to_save": "head"}, TypeError, "modules_to_save must be a list"),
        ({"adapters": ["a"], "modules_to_save": [3]}, TypeError, r"modules_to_save must be a list of str, got \[3\]"),
    ],
)
def test_bad_configurations(options, error, message):
    with pytest.raises(error, match=message):
        AdapterFusionConfig(**options)


def test_the_file(tiny, members, tmp_path):
    folders = members("bert")
    get_peft_model(tiny("bert"), AdapterFusionConfig(adapters=folders)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "ADAPTER_FUSION"
    assert values["adapters"] == folders
    assert [config["bottleneck_dim"] for config in values["adapter_configs"]] == list(WIDTHS.values())
