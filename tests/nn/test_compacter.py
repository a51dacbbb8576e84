from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_ext import CompacterAdapter, EfficientCompacterAdapter, freeze_except
from peft_ext.models import MiniGPT
from peft_ext.nn.compacter import PHMLinear


def dense(layer: PHMLinear, rule: Tensor) -> Tensor:
    return sum(torch.kron(rule[i], layer.W_left[i] @ layer.W_right[i]) for i in range(len(rule)))


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"phm_dim": 2, "num_kron_terms": 5}, {"residual": False}])
def test_equals_dense_kron(options):
    adapter = CompacterAdapter(16, 8, phm_init_range=1.0, dtype=torch.float64, **options)
    nn.init.normal_(adapter.down.b)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    hidden = F.gelu(x @ dense(adapter.down, adapter.phm_rule) + adapter.down.b, approximate="tanh")
    wanted = hidden @ dense(adapter.up, adapter.phm_rule) + adapter.up.b + (x if adapter.residual else 0)
    torch.testing.assert_close(adapter(x), wanted, rtol=1e-12, atol=1e-12)


def test_initial_values():
    adapter = CompacterAdapter(768, 24, 1)
    assert adapter.phm_rule.std().item() == pytest.approx(1e-4, rel=0.5)
    bound = 2**0.5 * (6 / (192 + 1)) ** 0.5  # xavier with gain √2, term by term
    assert 0.9 * bound < adapter.down.W_left.abs().max() <= bound
    assert not adapter.down.b.any() and not adapter.up.b.any()
    x = torch.randn(4, 768)
    torch.testing.assert_close(adapter(x), x, atol=1e-4, rtol=0)


def test_one_rule_for_many_adapters():
    first = CompacterAdapter(16, 8)
    second = CompacterAdapter(32, 4, phm_rule=first.phm_rule)
    assert second.shares_phm_rule and not first.shares_phm_rule
    both = nn.ModuleList([first, second])
    assert sum(p is first.phm_rule for p in both.parameters()) == 1
    (first(torch.randn(3, 16)).sum() + second(torch.randn(3, 32)).sum()).backward()
    total = first.phm_rule.grad.clone()
    for adapter, width in ((first, 16), (second, 32)):
        assert adapter(torch.randn(3, width)).shape == (3, width)
    assert total.abs().sum() > 0
    copied = copy.deepcopy(both)
    assert copied[0].phm_rule is copied[1].phm_rule


def test_reference_text():
    """Constructed and trained as there: d_model 768, bottleneck 64, rank 8, with a residual connection."""
    assert EfficientCompacterAdapter is CompacterAdapter
    adapter = EfficientCompacterAdapter(d_model=768, bottleneck_dim=64, rank=8, phm_init_range=1e-2)
    houlsby = 2 * 768 * 64
    assert sum(p.numel() for p in adapter.parameters()) < houlsby / 5
    frozen = nn.Linear(768, 768).requires_grad_(False)
    before = frozen.weight.clone()
    x, target = torch.randn(32, 768), torch.randn(32, 768)
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(adapter(frozen(x)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(frozen.weight, before)


def test_minigpt():
    size = {"vocab_size": 30, "hidden_dim": 16, "seq_len": 8, "n_layers": 2, "n_heads": 2}
    model = MiniGPT(**size, method="compacter", bottleneck_dim=4, phm_init_range=0.1)
    trainable, _ = freeze_except(model, r"adapter[12]\.")
    one = 2 * (4 * 4 + 4 * 1) + 4 + 16
    assert trainable == 2 * (64 + 2 * one)  # each block has one A
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(30, (4, 8))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((10, 4), {}, "phm_dim=4 must divide d_model=10 and bottleneck_dim=4; the nearest that does: 2"),
        ((16, 6), {}, "bottleneck_dim=6; the nearest that does: 2"),
        ((16, 8, 0), {}, "rank must be an integer > 0"),
        ((16, 8), {"num_kron_terms": 0}, "num_kron_terms must be an integer > 0"),
        ((16, 8.0), {}, "bottleneck_dim must be an integer > 0, got 8.0"),
        ((16, 8), {"activation": "swoosh"}, "activation must be one of"),
        ((16, 8), {"phm_rule": nn.Parameter(torch.ones(2, 4, 4))}, r"phm_rule must be \[4, 4, 4\]"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        CompacterAdapter(*arguments, **options)
