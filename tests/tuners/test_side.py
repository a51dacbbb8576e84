"""Side networks in adapted models."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_ext import LoraConfig, PeftModel, SideTuningConfig, get_peft_model
from peft_ext.tuners import SIDE_NETWORKS

transformers = pytest.importorskip("transformers")

Make = Callable[[str], nn.Module]
Run = Callable[[nn.Module], Tensor]
KINDS = ("bert", "gpt2", "llama", "plain")
HEADS = {"bert": ["classifier"], "gpt2": None, "llama": None, "plain": ["head"]}


@pytest.fixture
def make(tiny: Make) -> Make:
    def build(kind: str) -> nn.Module:
        if kind != "plain":
            return tiny(kind)
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        return nn.Sequential(OrderedDict(body=body, head=nn.Linear(8, 4))).eval()

    return build


def config(kind: str, **options: Any) -> SideTuningConfig:
    chosen = {"num_layers": 1, "modules_to_save": HEADS[kind]}
    return SideTuningConfig(**(chosen | ({"backbone": "body"} if kind == "plain" else {}) | options))


def train(model: nn.Module, run: Run, steps: int = 3) -> set[str]:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        run(model).square().mean().backward()
        optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("side", ["layers", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_trains_saves_and_loads(make: Make, run: Run, kind: str, side: str, tmp_path: Path) -> None:
    base = make(kind)
    plain, state = run(base), copy.deepcopy(base.state_dict())
    model = get_peft_model(base, config(kind, side=side))
    moved = train(model, run)
    assert moved
    assert all(".side_networks.default." in n or ".a.default" in n or ".modules_to_save." in n for n in moved)
    assert any(n.endswith(".a.default") for n in moved)
    trained = run(model)
    assert not torch.equal(trained, plain)
    with model.disable_adapter():
        assert torch.equal(run(model), plain)

    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("embeddings." in key and "LayerNorm" not in key for key in saved)
    assert not any(part in key for key in saved for part in ("wte", "wpe", "embed_tokens"))
    loaded = PeftModel.from_pretrained(make(kind), tmp_path)
    assert torch.equal(run(loaded), trained)

    unloaded = model.unload()
    assert torch.equal(run(unloaded), plain)
    assert unloaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in unloaded.state_dict().items())


@pytest.mark.parametrize("kind", ["bert", "plain"])
def test_several_adapters(make: Make, run: Run, kind: str, tmp_path: Path) -> None:
    model = get_peft_model(make(kind), config(kind))
    train(model, run)
    first = run(model)
    model.add_adapter("other", config(kind, side="mlp"))
    assert torch.equal(run(model), first)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".other" in name)
    model.set_adapter("other")
    train(model, run)
    second = run(model)
    model.set_adapter("default")
    assert torch.equal(run(model), first)
    with pytest.raises(ValueError, match="cannot be active together"):
        model.set_adapter(["default", "other"])
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    assert torch.equal(run(model), second)
    loaded = PeftModel.from_pretrained(make(kind), tmp_path / "other")
    assert torch.equal(run(loaded), second)


def test_the_side_network_is_the_first_layers(make: Make) -> None:
    base = make("bert")
    layer = sum(p.numel() for p in base.bert.encoder.layer[0].parameters())
    model = get_peft_model(base, config("bert", modules_to_save=None))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    of_layers = sum(p.numel() for n, p in model.named_parameters() if n in trained and ".encoder.layer." in n)
    assert of_layers == layer
    assert not any("word_embeddings" in name for name in trained)
    assert base.bert.base_layer.config.num_hidden_layers == 2
    assert base.bert.side_networks["default"].config.num_hidden_layers == 1


def test_starts_as_the_mean_of_both(make: Make, run: Run) -> None:
    base = make("plain")
    x = torch.randn(3, 8)
    body, head = base[0], base[1]
    expected = head((body(x) + body[0](x)) / 2)
    model = get_peft_model(base, config("plain"))
    torch.testing.assert_close(model(x), expected)


def test_a_network_of_ones_own(make: Make, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(SIDE_NETWORKS, "mine", lambda backbone, config: nn.Linear(8, 8, bias=False))
    model = get_peft_model(make("plain"), config("plain", side="mine"))
    train(model, run)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(make("plain"), tmp_path)), run(model))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generates_without_a_cache(make: Make, kind: str) -> None:
    model = get_peft_model(make(kind), config(kind)).eval()
    tokens = torch.randint(50, (1, 4))
    text = model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    for step in range(4, text.size(1)):
        assert text[0, step] == model(input_ids=text[:, :step]).logits[0, -1].argmax()
    with pytest.raises(ValueError, match="a side network keeps no cache"):
        model.generate(input_ids=tokens, max_new_tokens=3, use_cache=True, pad_token_id=0)


def test_gradient_checkpointing(make: Make, run: Run) -> None:
    model = get_peft_model(make("bert"), config("bert")).train()
    model.get_base_model().config.hidden_dropout_prob = 0.0
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        run(model).sum().backward()
        grads.append([model.get_parameter(name).grad for name in names])
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_merging_is_refused(make: Make, run: Run) -> None:
    model = get_peft_model(make("bert"), config("bert"))
    with pytest.raises(ValueError, match="a side network cannot be merged"):
        model.merge_and_unload()


BAD = {
    "side": ({"side": "nope"}, r"side must be one of \['layers', 'mlp'\], got 'nope'"),
    "too many layers": ({"num_layers": 3}, "num_layers must be between 1 and the backbone's 2, got 3"),
    "no layers": ({"num_layers": 0}, "num_layers must be an integer > 0"),
    "backbone": ({"backbone": "nope"}, r"backbone 'nope' is no module of the model, which has: \['bert'"),
    "saved inside": ({"modules_to_save": ["pooler"]}, "names 'bert.pooler', but the adapter is at 'bert'"),
    "names": ({"modules_to_save": "classifier"}, "modules_to_save must be a list"),
    "numbers": ({"modules_to_save": [1]}, "modules_to_save must be a list"),
    "backbone type": ({"backbone": 3}, "backbone must be a module's name or None, got 3"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_configurations_change_nothing(
    make: Make, snapshot: Any, same: Any, options: dict[str, Any], message: str
) -> None:
    model = make("bert")
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        get_peft_model(model, config("bert", **options))
    assert same(model, before)


def test_a_plain_model_names_its_backbone(make: Make) -> None:
    with pytest.raises(
        ValueError, match=r"backbone must be given for this model \(Sequential\): one of \['body', 'head'\]"
    ):
        get_peft_model(make("plain"), SideTuningConfig())


def test_other_methods_stay_out(make: Make) -> None:
    model = get_peft_model(make("bert"), config("bert"))
    with pytest.raises(ValueError, match="cannot be in one model"):
        model.add_adapter("lora", LoraConfig())


def test_a_network_without_what_the_head_reads(make: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A side network that the head cannot see would train nothing."""

    class Hidden(nn.Module):
        def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
            return torch.zeros(*input_ids.shape, 16)

    monkeypatch.setitem(SIDE_NETWORKS, "hidden", lambda backbone, config: Hidden())
    model = get_peft_model(make("bert"), config("bert", side="hidden"))
    with pytest.raises(ValueError, match="the side network gives no pooler_output"):
        run(model)


def test_tuples(make: Make) -> None:
    model = get_peft_model(make("bert"), config("bert", side="mlp"))
    tokens = torch.randint(50, (2, 5))
    backbone = model.get_base_model().bert
    named, plain = backbone(input_ids=tokens), backbone(input_ids=tokens, return_dict=False)
    assert torch.equal(named.last_hidden_state, plain[0])
    assert torch.equal(named.pooler_output, plain[1])
