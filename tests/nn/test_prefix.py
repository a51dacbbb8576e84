from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_ext import MHAWithPrefix, PrefixTuning, freeze_except
from peft_ext.models import MiniGPT
from peft_ext.nn import SelfAttention


def reference_attention(layer: MHAWithPrefix, x: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
    """As the reference text writes it: the prefix repeated over the batch and concatenated, then softmax."""
    batch, length, width = x.shape

    def heads(projection):
        return projection(x).view(batch, length, layer.num_heads, layer.head_dim).transpose(1, 2)

    prefix_k, prefix_v = (t.transpose(1, 2) for t in layer.prefix.get_prefix(batch))
    k, v = torch.cat([prefix_k, heads(layer.k_proj)], 2), torch.cat([prefix_v, heads(layer.v_proj)], 2)
    scores = heads(layer.q_proj) @ k.transpose(-2, -1) / layer.head_dim**0.5
    if visible is not None:
        scores[..., -length:] = scores[..., -length:].masked_fill(~visible, float("-inf"))
    out = scores.softmax(-1) @ v
    return layer.out_proj(out.transpose(1, 2).reshape(batch, length, width))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prefix_len", [0, 1, 20])
def test_equals_concatenation_and_softmax(prefix_len, masked, causal):
    layer = MHAWithPrefix(24, 3, prefix_len=prefix_len, causal=causal)
    x = torch.randn(2, 7, 24)
    mask = torch.rand(2, 1, 7, 7) > 0.3 if masked else torch.ones(7, 7, dtype=torch.bool)
    mask = mask | torch.eye(7, dtype=torch.bool)
    visible = mask & torch.ones(7, 7, dtype=torch.bool).tril() if causal else mask
    torch.testing.assert_close(layer(x, mask if masked else None), reference_attention(layer, x, visible))


def test_the_reference_texts_classes():
    prefix = PrefixTuning(prefix_len=10, num_heads=12, head_dim=64)
    assert prefix.prefix_key.shape == prefix.prefix_value.shape == (1, 10, 12, 64)
    key, value = prefix.get_prefix(batch_size=4)
    assert key.shape == value.shape == (4, 10, 12, 64)
    assert key.data_ptr() == prefix.prefix_key.data_ptr()
    # about 200,000 trainable parameters, as the text has it, are 11 virtual tokens of a model like BERT base
    assert 12 * sum(p.numel() for p in PrefixTuning(11, 12, 64).parameters()) == 202_752


def test_the_reference_texts_training():
    model = MHAWithPrefix(embed_dim=16, num_heads=2, prefix_len=4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "prefix" in name
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x, target = torch.randn(4, 6, 16), torch.randn(4, 6, 16)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("prefix" not in name), name


def test_prefixes_by_task():
    model = MHAWithPrefix(16, 2, prefix_len=4)
    x = torch.randn(2, 5, 16)
    first = model(x)
    model.add_prefix("summarization")
    model.add_prefix("question_answering", PrefixTuning(9, 2, 8))
    outputs = {}
    for task in ("summarization", "question_answering"):
        model.set_task(task)
        outputs[task] = model(x)
        assert not torch.equal(outputs[task], first)
    model.set_task("default")
    assert torch.equal(model(x), first)
    with pytest.raises(ValueError, match="there is a prefix 'default' already"):
        model.add_prefix("default")
    with pytest.raises(ValueError, match="must have 2 heads of 8 features, got 4 of 4"):
        model.add_prefix("sentiment", PrefixTuning(4, 4, 4))
    with pytest.raises(ValueError, match="there is no prefix 'sentiment'"):
        model.set_task("sentiment")
    assert model.task == "default"
    assert len(model.prefixes) == 3


def test_state_of_plain_attention_loads():
    plain = SelfAttention(16, 2)
    missing, unexpected = MHAWithPrefix(16, 2, prefix_len=0).load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["prefixes.default.prefix_key", "prefixes.default.prefix_value"]
    assert not unexpected


@pytest.mark.parametrize("sizes", [(-1, 2, 4), (3, 0, 4), (3, 2, 0)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="prefix_len must be at least 0"):
        PrefixTuning(*sizes)


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="num_heads must be positive and divide"):
        MHAWithPrefix(16, 3, prefix_len=4)


def test_minigpt_trains_prefixes_only():
    model = MiniGPT(30, 16, 8, n_layers=2, n_heads=2, method="prefix", prefix_len=3)
    assert freeze_except(model, "prefix")[0] == 2 * 2 * 3 * 16
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    tokens = torch.randint(30, (4, 8))
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("prefix" not in name), name
