from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_ext import Adapter, HoulsbyAdapter, SimpleAdapter, freeze_except
from peft_ext.models import MiniGPT


class ReferenceHoulsby(nn.Module):
    """The reference text's module."""

    def __init__(self, hidden_dim, bottleneck_dim):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim)
        self.down = nn.Linear(hidden_dim, bottleneck_dim)
        self.up = nn.Linear(bottleneck_dim, hidden_dim)

    def forward(self, x):
        return x + self.up(F.relu(self.down(self.norm(x))))


class ReferenceSimple(nn.Module):
    """The reference text's module; without ``residual`` its Adapter."""

    def __init__(self, hidden_dim, bottleneck_dim, residual=True):
        super().__init__()
        self.down_proj = nn.Linear(hidden_dim, bottleneck_dim)
        self.up_proj = nn.Linear(bottleneck_dim, hidden_dim)
        self.residual = residual

    def forward(self, x):
        update = self.up_proj(F.relu(self.down_proj(x)))
        return x + update if self.residual else update


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (SimpleAdapter(16, 4), ReferenceSimple(16, 4)),
        (Adapter(16, 4), ReferenceSimple(16, 4, residual=False)),
        (HoulsbyAdapter(16, 4), ReferenceHoulsby(16, 4)),
    ],
)
def test_loads_the_reference_texts_state_dict_and_computes_the_same(ours, reference):
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 16, requires_grad=True)
    torch.testing.assert_close(ours(x), reference(x))
    grad_y = torch.randn(2, 3, 16)
    got = torch.autograd.grad(ours(x), [x, *ours.parameters()], grad_y)
    wanted = torch.autograd.grad(reference(x), [x, *reference.parameters()], grad_y)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_counts():
    d, k = 768, 64
    for kind in (Adapter, SimpleAdapter):
        assert sum(p.numel() for p in kind(d, k).parameters()) == 2 * d * k + k + d
    assert sum(p.numel() for p in HoulsbyAdapter(d, k, bias=False).parameters()) == 98304 + 2 * d
    assert sum(p.numel() for p in HoulsbyAdapter(d, k).parameters()) == 100_672


@pytest.mark.parametrize("method", ["adapter", "houlsby"])
def test_the_reference_texts_minigpt_trains_its_adapters_only(method):
    model = MiniGPT(
        vocab_size=20, hidden_dim=16, seq_len=8, n_layers=2, n_heads=4, method=method, causal=False, bottleneck_dim=8
    )
    freeze_except(model, r"adapter")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(20, (8, 8))
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "adapter" in name}
    places = {"adapter": 1, "houlsby": 2}[method]
    assert len({name.split(".")[2] for name in moved}) == places


@pytest.mark.parametrize("kind", [Adapter, SimpleAdapter, HoulsbyAdapter])
def test_bad_arguments(kind):
    with pytest.raises(ValueError, match="hidden_dim must be an integer > 0, got 0"):
        kind(0, 4)
    with pytest.raises(ValueError, match="bottleneck_dim must be an integer > 0, got -1"):
        kind(4, -1)
    with pytest.raises(ValueError, match=r"activation must be one of relu.* got 'swish'"):
        kind(4, 2, activation="swish")
