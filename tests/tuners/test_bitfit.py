"""BitFit in adapted models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_ext import BitFitConfig, PeftModel, get_peft_model
from peft_ext.tuners.bitfit import BiasLayer

transformers = pytest.importorskip("transformers")

Make = Callable[[str], nn.Module]
Run = Callable[[nn.Module], Tensor]
KINDS = ("bert", "gpt2", "llama", "mlp")


@pytest.fixture
def make(tiny: Make) -> Make:
    """``tiny``, but with biases in the Llama, which has none by default."""

    def build(kind: str) -> nn.Module:
        if kind != "llama":
            return tiny(kind)
        torch.manual_seed(0)
        config = tiny("llama").config
        config.attention_bias = config.mlp_bias = True
        return transformers.LlamaForCausalLM(config).eval()

    return build


def train(model: nn.Module, run: Run, steps: int = 2, lr: float = 0.5) -> set[str]:
    """The names of the parameters that moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        run(model).square().mean().backward()
        optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def own_biases(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "bias" in name}


@pytest.mark.parametrize("kind", KINDS)
def test_trains_saves_and_loads_the_biases_alone(make: Make, run: Run, kind: str, tmp_path: Path) -> None:
    base = make(kind)
    state, expected = copy.deepcopy(base.state_dict()), run(base)
    biases = own_biases(base)
    count = sum(p.numel() for p in biases.values())
    model = get_peft_model(base, BitFitConfig())
    assert torch.equal(run(model), expected)
    assert model.get_nb_trainable_parameters()[0] == count
    moved = train(model, run)
    assert moved <= {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved

    trained = run(model)
    assert not torch.equal(trained, expected)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == {f"base_model.model.{name}" for name in biases}
    loaded = PeftModel.from_pretrained(make(kind), tmp_path)
    assert torch.equal(run(loaded), trained)

    plain = model.unload()
    assert torch.equal(run(plain), expected)
    assert {name: type(m) for name, m in plain.named_modules()} == {n: type(m) for n, m in make(kind).named_modules()}
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_counts_of_bert_base() -> None:
    """0.09 % of BERT-base, as the paper has it; query and intermediate biases, 0.04 %."""
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig())
        total = sum(p.numel() for p in model.parameters())
        every = get_peft_model(model, BitFitConfig(bias_terms=["encoder", "embeddings"]))
        assert every.get_nb_trainable_parameters()[0] == 12 * (768 * 4 + 3072 + 768 + 2 * 768) + 768 == 102_144
        model = transformers.BertModel(transformers.BertConfig())
        half = get_peft_model(model, BitFitConfig(bias_terms=["query", "intermediate"]))
    assert half.get_nb_trainable_parameters()[0] == 12 * (768 + 3072) == 46_080
    assert round(100 * 102_144 / total, 2) == 0.09
    assert round(100 * 46_080 / total, 2) == 0.04


def test_subset_and_head(make: Make, run: Run, tmp_path: Path) -> None:
    config = BitFitConfig(task_type="SEQ_CLS", bias_terms=["query", r"intermediate\.dense"])
    model = get_peft_model(make("bert"), config)
    moved = train(model, run)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == trained
    assert {name.split(".")[-1] for name in trained} == {"bias", "weight"}
    layers = sum("query" in name or "intermediate" in name for name in trained)
    assert (layers, len(trained)) == (4, 6)  # two layers of two biases, and the head's weight and bias
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("bert"), tmp_path)
    assert torch.equal(run(loaded), run(model))


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_switch_at_run_time(make: Make, run: Run, kind: str, tmp_path: Path) -> None:
    base = make(kind)
    plain = run(base)
    model = get_peft_model(base, BitFitConfig())
    train(model, run)
    first = run(model)
    model.add_adapter("other", BitFitConfig())
    assert torch.equal(run(model), first)
    model.set_adapter("other")
    assert torch.equal(run(model), plain), "a new adapter starts from the base's biases"
    train(model, run, steps=3)
    second = run(model)
    assert not torch.equal(second, first)

    model.set_adapter("default")
    assert torch.equal(run(model), first)
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    assert torch.equal(run(model), first)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(kind), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    assert torch.equal(run(loaded), first)
    loaded.set_adapter("other")
    assert torch.equal(run(loaded), second)

    model.delete_adapter("default")
    assert torch.equal(run(model), second)
    with pytest.raises(ValueError, match="cannot be active together"):
        loaded.set_adapter(["default", "other"])
    assert torch.equal(run(loaded), second)


def test_subsets_of_two_adapters_may_differ(make: Make, run: Run) -> None:
    base = make("bert")
    plain = run(base)
    model = get_peft_model(base, BitFitConfig(bias_terms="query"))
    model.add_adapter("other", BitFitConfig(bias_terms=["LayerNorm"]))
    model.set_adapter("other")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("LayerNorm" in name for name in trained)
    train(model, run)
    model.set_adapter("default")
    assert torch.equal(run(model), plain)


def test_merging_keeps_the_biases(make: Make, run: Run) -> None:
    model = get_peft_model(make("bert"), BitFitConfig())
    plain = run(make("bert"))
    train(model, run)
    trained = run(model)
    model.merge_adapter()
    assert torch.equal(run(model), trained)
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    merged = model.merge_and_unload()
    assert torch.equal(run(merged), trained)
    assert merged.state_dict().keys() == make("bert").state_dict().keys()


@pytest.mark.parametrize("names", [["other"], []], ids=str)
def test_merging_takes_the_named_adapters_alone(make: Make, run: Run, names: list[str]) -> None:
    """Others, though they are active and have biases where these have none, leave the model."""
    plain = make("bert")
    model = get_peft_model(make("bert"), BitFitConfig())
    model.add_adapter("other", BitFitConfig(bias_terms="query"))
    train(model, run)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".biases.other." in name:
                parameter.add_(1)
    if names:
        for name, parameter in plain.named_parameters():
            if "query.bias" in name:
                parameter.data += 1
    assert torch.equal(run(model.merge_and_unload(adapter_names=names)), run(plain))


def test_a_merge_that_is_not_finite_is_refused_whole(make: Make, run: Run) -> None:
    model = get_peft_model(make("mlp"), BitFitConfig())
    with torch.no_grad():
        model.get_base_model()[4].biases["default"]["bias"][0] = torch.nan
    with pytest.raises(ValueError, match="would make weights that are not finite"):
        model.merge_adapter(safe_merge=True)
    assert not model.merged_adapters


def test_modules_that_read_biases_without_calling() -> None:
    """nn.MultiheadAttention's own bias, and its inner projection's, which it never calls."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    plain = model(x)
    peft = get_peft_model(model, BitFitConfig())
    peft.add_adapter("other", BitFitConfig())
    moved = train(peft, lambda m: m(x))
    assert any("in_proj_bias" in name for name in moved)
    assert any("out_proj" in name for name in moved)
    trained = peft(x)
    peft.set_adapter("other")
    torch.testing.assert_close(peft(x), plain)
    peft.set_adapter("default")
    assert torch.equal(peft(x), trained)
    torch.testing.assert_close(peft.unload()(x), plain)


def test_a_shared_bias_stays_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    peft = get_peft_model(model, BitFitConfig())
    assert peft.get_nb_trainable_parameters()[0] == 4
    assert model[0].base_layer.bias is model[1].base_layer.bias


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_independent(make: Make, run: Run, copy_of: Callable[[Any], Any]) -> None:
    model = get_peft_model(make("mlp"), BitFitConfig())
    twin = copy_of(model)
    before = run(model)
    train(twin, run)
    assert not torch.equal(run(twin), before)
    assert torch.equal(run(model), before)


def test_moves_between_dtypes_keep_the_biases_in_place(make: Make, run: Run) -> None:
    model = get_peft_model(make("mlp"), BitFitConfig()).double()
    layer = model.get_base_model()[0]
    assert layer.base_layer.bias is layer.biases["default"]["bias"]
    assert layer.bias.dtype == torch.float64


def test_half_precision_biases_keep_their_type(make: Make, run: Run) -> None:
    model = get_peft_model(make("bert").bfloat16(), BitFitConfig())
    assert run(model).dtype == torch.bfloat16
    train(model, run)


def test_gradient_checkpointing(make: Make, run: Run) -> None:
    base = make("bert")
    model = get_peft_model(base, BitFitConfig()).train()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            base.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        run(model).sum().backward()
        grads.append([model.get_parameter(name).grad.clone() for name in names if "pooler" not in name])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


BAD = {
    "no match": ({"bias_terms": ["nope"]}, r"bias_terms \['nope'\] matches none of \d+ biases: bert\.embeddings"),
    "no expression": ({"bias_terms": "["}, "is not a regular expression"),
    "no list": ({"bias_terms": 3}, "bias_terms must be a list of str"),
    "no names": ({"modules_to_save": "classifier"}, "modules_to_save must be a list of str"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_configurations_change_nothing(
    make: Make, snapshot: Any, same: Any, options: dict[str, Any], message: str
) -> None:
    model = make("bert")
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        get_peft_model(model, BitFitConfig(**options))
    assert same(model, before)


def test_a_model_without_biases(tiny: Make, snapshot: Any, same: Any) -> None:
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="this LlamaForCausalLM has no parameter whose name contains 'bias'"):
        get_peft_model(model, BitFitConfig())
    assert same(model, before)


def test_a_model_that_is_one_module() -> None:
    with pytest.raises(ValueError, match="the bias 'bias' belongs to the model itself"):
        get_peft_model(nn.Linear(4, 4), BitFitConfig())


def test_a_checkpoint_that_does_not_fit_leaves_the_model(make: Make, snapshot: Any, same: Any, tmp_path: Path) -> None:
    get_peft_model(make("bert"), BitFitConfig(bias_terms="query")).save_pretrained(tmp_path)
    model = make("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"missing keys: base_model\.model\.bert"):
        PeftModel.from_pretrained(model, tmp_path, config=BitFitConfig())
    assert same(model, before)


def test_base_modules_are_wrapped_once(make: Make) -> None:
    model = get_peft_model(make("mlp"), BitFitConfig())
    model.add_adapter("other", BitFitConfig())
    assert not any(isinstance(m.base_layer, BiasLayer) for m in model.modules() if isinstance(m, BiasLayer))
