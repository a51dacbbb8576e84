from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_ext import AdapterFusion, AttentionFusion
from peft_ext.nn import fusion_weights


class Bottleneck(nn.Module):
    """The reference text's single adapter: no residual."""

    def __init__(self, hidden_dim: int, bottleneck_dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_dim, bottleneck_dim)
        self.up = nn.Linear(bottleneck_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(x)))


def text_formula(fusion: AdapterFusion, outputs: list[Tensor]) -> Tensor:
    """The reference text's forward, operation by operation."""
    stacked = torch.stack(outputs, dim=1)
    keys = fusion.key_proj(stacked)
    scores = fusion.query.view(1, 1, -1) @ keys.transpose(-2, -1) / keys.size(-1) ** 0.5
    return (F.softmax(scores, dim=-1) @ stacked).sum(dim=1)


def paper_formula(fusion: AttentionFusion, x: Tensor, outputs: list[Tensor], residual: Tensor) -> Tensor:
    stacked = torch.stack(outputs, dim=-2)
    scores = (fusion.query(x).unsqueeze(-2) * fusion.key(stacked)).sum(-1)
    return residual + (scores.softmax(-1).unsqueeze(-1) * fusion.value(stacked)).sum(-2)


def test_equals_the_texts_formula():
    fusion = AdapterFusion(24, num_adapters=5).double()
    outputs = [torch.randn(7, 24, dtype=torch.float64) for _ in range(5)]
    torch.testing.assert_close(fusion(outputs), text_formula(fusion, outputs))
    trained = [fusion.query, fusion.key_proj.weight]
    ours = torch.autograd.grad(fusion(outputs).square().sum(), trained)
    theirs = torch.autograd.grad(text_formula(fusion, outputs).square().sum(), trained)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)], ids=str)
def test_equals_the_papers_formula(shape):
    fusion = AttentionFusion(24, num_adapters=4).double()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, residual = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    outputs = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    wanted = paper_formula(fusion, x, outputs, residual)
    torch.testing.assert_close(fusion(x, outputs, residual), wanted)
    torch.testing.assert_close(fusion(x, outputs), wanted - residual)
    trained = [p for name, p in fusion.named_parameters() if name != "key.bias"]
    ours = torch.autograd.grad(fusion(x, outputs, residual).square().sum(), trained)
    torch.testing.assert_close(ours, torch.autograd.grad(wanted.square().sum(), trained))


@pytest.mark.parametrize("make", [AdapterFusion, AttentionFusion])
def test_every_parameter_gets_a_gradient(make):
    """The key's bias too, a zero: distributed training waits for the gradient of each parameter."""
    fusion = make(8, 2)
    outputs = [torch.randn(3, 8) for _ in range(2)]
    (fusion(outputs) if make is AdapterFusion else fusion(torch.randn(3, 8), outputs)).sum().backward()
    assert all(parameter.grad is not None for parameter in fusion.parameters())
    assert not (fusion.key_proj if make is AdapterFusion else fusion.key).bias.grad.any()


def test_parameters_of_the_text():
    fusion = AdapterFusion(64, num_adapters=3)
    assert {name: p.shape for name, p in fusion.named_parameters()} == {
        "query": (64,),
        "key_proj.weight": (64, 64),
        "key_proj.bias": (64,),
    }


def test_attention_fusion_starts_near_the_mean():
    fusion = AttentionFusion(16, num_adapters=2)
    assert torch.equal(fusion.value.weight.diagonal(), torch.ones(16))
    assert torch.equal(fusion.value.weight[0, 1:], torch.full((15,), 1e-6))
    outputs = [torch.randn(5, 16) for _ in range(2)]
    torch.testing.assert_close(fusion(torch.zeros(5, 16), outputs), (outputs[0] + outputs[1]) / 2, atol=1e-4, rtol=0)


def test_regularisation():
    fusion = AttentionFusion(4, num_adapters=2)
    with torch.no_grad():
        fusion.value.weight.copy_(torch.eye(4))
        fusion.value.weight[1, 2] = 3.0
    torch.testing.assert_close(fusion.regularisation(), torch.tensor(0.01 * 9))
    torch.testing.assert_close(fusion.regularisation(strength=1.0), torch.tensor(9.0))


def test_the_texts_training_loop():
    hidden_dim, bottleneck_dim, batch_size = 64, 16, 32
    adapters = [Bottleneck(hidden_dim, bottleneck_dim).requires_grad_(False) for _ in range(3)]
    fusion = AdapterFusion(hidden_dim, num_adapters=3)
    x, true_target = torch.randn(batch_size, hidden_dim), torch.randn(batch_size, hidden_dim)
    frozen = [p.clone() for adapter in adapters for p in adapter.parameters()]
    before = {name: p.detach().clone() for name, p in fusion.named_parameters()}
    optimizer = torch.optim.Adam(fusion.parameters(), lr=1e-3)
    losses = []
    for _ in range(100):
        with torch.no_grad():
            adapter_outputs = [adapter(x) for adapter in adapters]
        loss = F.mse_loss(fusion(adapter_outputs), true_target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(later <= earlier for earlier, later in zip(losses[::20], losses[20::20], strict=False))
    moved = {name for name, p in fusion.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"query", "key_proj.weight"}  # a bias of all keys alike does nothing, and stays
    after = [p for adapter in adapters for p in adapter.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(frozen, after, strict=True))


def test_learns_which_adapter_is_right():
    fusion = AdapterFusion(8, num_adapters=3)
    outputs = [torch.randn(64, 8) + shift for shift in (-1.0, 0.0, 1.0)]
    optimizer = torch.optim.Adam(fusion.parameters(), lr=5e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.mse_loss(fusion(outputs), outputs[2]).backward()
        optimizer.step()
    _, weights = fusion(outputs, return_weights=True)
    assert weights.mean(0)[2] > 0.8


def test_a_stacked_tensor_does_for_a_list():
    fusion = AdapterFusion(8, num_adapters=3)
    stacked = torch.randn(3, 4, 5, 8)
    assert torch.equal(fusion(stacked), fusion(list(stacked)))


def test_weights_are_collected():
    model = nn.ModuleDict({"a": AdapterFusion(8, 2), "b": AttentionFusion(8, 2)})
    outputs = [torch.randn(3, 8) for _ in range(2)]
    with fusion_weights(model) as weights:
        for _ in range(2):
            _, expected = model["a"](outputs, return_weights=True)
        model["b"](torch.randn(3, 8), outputs)
    model["a"](outputs)
    assert [len(weights[name]) for name in ("a", "b")] == [2, 1]
    assert torch.equal(weights["a"][0], expected)
    assert not weights["a"][0].requires_grad


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "adapter_outputs must hold num_adapters = 2 outputs, got 0"),
        ([torch.ones(3, 8)], "got 1"),
        ([torch.ones(3, 8), torch.ones(3, 7)], r"outputs\[1\] \[3, 7\]"),
        ([torch.ones(3, 7), torch.ones(3, 7)], r"key_weight must be \[8, 7\]"),
    ],
    ids=["none", "too few", "unequal width", "another width"],
)
def test_bad_outputs(outputs, message):
    with pytest.raises(ValueError, match=message):
        AdapterFusion(8, num_adapters=2)(outputs)
    with pytest.raises(ValueError, match=message):
        AttentionFusion(8, num_adapters=2)(torch.ones(3, 8), outputs)


@pytest.mark.parametrize("sizes", [(0, 2), (8, 0)], ids=str)
def test_bad_sizes(sizes):
    for make in (AdapterFusion, AttentionFusion):
        with pytest.raises(ValueError, match="must be an integer > 0, got 0"):
            make(*sizes)
