from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_ext import freeze_except
from peft_ext.models import GPTBlock, MiniGPT

SIZE = {"vocab_size": 20, "hidden_dim": 16, "seq_len": 8, "n_layers": 2, "n_heads": 4}


def train(model: nn.Module, lr: float) -> list[float]:
    """The losses of a few steps on random tokens."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    tokens = torch.randint(20, (16, 8))
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_takes_its_sizes_by_position_or_name():
    by_position, by_name = MiniGPT(20, 16, 8, 2, 4, lora_rank=2), MiniGPT(**SIZE, lora_rank=2)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (by_position, by_name)]
    assert shapes[0] == shapes[1]


def test_parameter_names():
    names = {name for name, _ in MiniGPT(**SIZE, method="lora").named_parameters()}
    block = {name.removeprefix("blocks.1.") for name in names if name.startswith("blocks.1.")}
    assert {name for name in names if not name.startswith("blocks.")} == {
        "embed.weight",
        "pos_embed",
        "ln_f.weight",
        "ln_f.bias",
        "head.weight",
        "head.bias",
    }
    adapted = {f"attn.{p}_proj.{name}" for p in "qv" for name in ("lora_A", "lora_B", "linear.weight", "linear.bias")}
    plain = {
        f"{layer}.{name}"
        for layer in ("attn.k_proj", "attn.out_proj", "ln1", "ffn.0", "ffn.2", "ln2")
        for name in ("weight", "bias")
    }
    assert block == adapted | plain


@pytest.mark.parametrize("method", ["none", "lora"])
def test_forward_is_the_definition(method, device):
    model = MiniGPT(**SIZE, method=method).to(device)
    tokens = torch.randint(20, (3, 5), device=device)
    x = model.embed.weight[tokens] + model.pos_embed[0, :5]
    for block in model.blocks:
        x = block.ln1(x + block.attn(x, is_causal=True))
        x = block.ln2(x + block.ffn[2](block.ffn[0](x).clamp(min=0)))
    logits = model(tokens)
    assert logits.shape == (3, 5, 20)
    torch.testing.assert_close(logits, model.head(model.ln_f(x)))


@pytest.mark.parametrize(("causal", "past_changes"), [(True, False), (False, True)])
def test_causal_is_blind_to_later_tokens(causal, past_changes):
    model = MiniGPT(**SIZE, causal=causal)
    tokens = torch.randint(20, (1, 8))
    other = tokens.clone()
    other[0, -1] = (tokens[0, -1] + 1) % 20
    same = torch.allclose(model(tokens)[:, :-1], model(other)[:, :-1])
    assert same is not past_changes


@pytest.mark.parametrize(("method", "lora"), [("none", 0), ("lora", 2 * 2 * 2 * 3 * 16)])
def test_parameter_count(method, lora):
    options = {"lora_rank": 3} if method == "lora" else {}
    model = MiniGPT(**SIZE, method=method, **options)
    h, ffn = 16, 4 * 16
    block = 4 * (h * h + h) + (h * ffn + ffn) + (ffn * h + h) + 2 * 2 * h
    base = 20 * h + 8 * h + 2 * block + 2 * h + (20 * h + 20)
    assert sum(p.numel() for p in model.parameters()) == base + lora


def test_adapting_a_pretrained_model():
    pretrained, model = MiniGPT(**SIZE, method="none"), MiniGPT(**SIZE, method="lora")
    state = pretrained.state_dict()
    model.load_state_dict(state)
    for name, value in model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, state[name.replace(".linear.", ".")])
    tokens = torch.randint(20, (2, 8))
    torch.testing.assert_close(model(tokens), pretrained(tokens))


def test_lora_training_moves_the_factors_only_and_lowers_the_loss():
    model = MiniGPT(**SIZE, method="lora", lora_rank=4, alpha=8.0)
    freeze_except(model, r"lora_[AB]$")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = train(model, lr=1e-2)
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"blocks.{i}.attn.{p}_proj.lora_{f}" for i in range(2) for p in "qv" for f in "AB"}


@pytest.mark.parametrize("build", [lambda method: MiniGPT(**SIZE, method=method), lambda m: GPTBlock(16, 4, method=m)])
def test_an_unknown_method_is_an_error(build):
    with pytest.raises(ValueError, match=r"method must be one of \[.*'lora'.*\], got 'lorax'"):
        build("lorax")


def test_an_option_of_another_method_is_an_error():
    with pytest.raises(TypeError, match="lora_rank"):
        MiniGPT(**SIZE, method="none", lora_rank=4)


def test_a_sequence_that_is_too_long_is_an_error():
    with pytest.raises(ValueError, match="length of at most seq_len = 8, got 9"):
        MiniGPT(**SIZE)(torch.zeros(1, 9, dtype=torch.long))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads must be positive and divide embed_dim = 16, got 3"):
        GPTBlock(16, 3)


def test_methods_share_everything_but_attention():
    none, lora = GPTBlock(16, 4, method="none"), GPTBlock(16, 4, method="lora")
    assert isinstance(lora.attn, type(none.attn))
    assert [type(m) for m in none.children()][1:] == [type(m) for m in lora.children()][1:]
    assert isinstance(none.attn.q_proj, nn.Linear)


def test_prompt_training_moves_the_prompt_only_and_lowers_the_loss():
    model = MiniGPT(**SIZE, method="prompt", prompt_len=3)
    pretrained = {name: value for name, value in model.state_dict().items() if name != "prompt"}
    assert pretrained.keys() == MiniGPT(**SIZE, method="none").state_dict().keys()
    assert freeze_except(model, r"^prompt$")[0] == 3 * 16
    optimizer = torch.optim.Adam([model.prompt], lr=1e-1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.randint(20, (16, 8))
    losses = []
    for _ in range(20):
        logits = model(tokens[:, :-1])
        assert logits.shape == (16, 7, 20)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"prompt"}


def test_fusion_training_moves_the_fusions_only_and_lowers_the_loss():
    model = MiniGPT(**SIZE, method="fusion", bottleneck_dim=4, num_adapters=2)
    freeze_except(model, r"\.fusion\.")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = train(model, lr=3e-2)
    assert losses[-1] < losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    # the keys' bias moves all logits alike: its gradient is zero
    assert moved == {f"blocks.{i}.adapter2.fusion.{name}" for i in range(2) for name in ("query", "key_proj.weight")}
