from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_ext import SideNetwork
from peft_ext.nn import SideMLP, first_layers


def test_mixes_by_alpha():
    base, side, x = nn.Linear(8, 4), nn.Linear(8, 4), torch.randn(3, 8)
    model = SideNetwork(base, side)
    torch.testing.assert_close(model(x), (base(x) + side(x)) / 2)
    with torch.no_grad():
        model.a.fill_(2.0)
    alpha = torch.sigmoid(torch.tensor(2.0))
    torch.testing.assert_close(model(x), alpha * base(x) + (1 - alpha) * side(x))


def test_the_base_runs_without_gradients():
    seen = []
    base = nn.Linear(8, 4)
    base.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    model = SideNetwork(base, SideMLP(8, 2, 4))
    y = model(torch.randn(3, 8, requires_grad=True))
    assert seen == [False]
    y.sum().backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert model.a.grad is not None


def test_training_moves_all_but_the_base():
    model = SideNetwork(nn.Linear(8, 4), SideMLP(8, 16, 4))
    x, target = torch.randn(32, 8), torch.randn(32, 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("base.")}


def test_tuples_keep_what_is_no_hidden_state():
    class Two(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x):
            return x + self.value, "cache"

    mixed, rest = SideNetwork(Two(1.0), Two(3.0))(torch.zeros(2))
    assert torch.equal(mixed, torch.full((2,), 2.0))
    assert rest == "cache"


def test_first_layers_are_copies():
    backbone = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    side = first_layers(backbone, 2)
    assert len(side) == 2
    assert torch.equal(side[0].weight, backbone[0].weight)
    assert side[0].weight is not backbone[0].weight


@pytest.mark.parametrize("count", [0, 4])
def test_layers_that_are_not_there(count):
    with pytest.raises(ValueError, match=f"num_layers must be between 1 and the backbone's 3, got {count}"):
        first_layers(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), count)
    with pytest.raises(ValueError, match="a Linear has no list of layers"):
        first_layers(nn.Linear(4, 4), 1)


def test_outputs_of_different_shapes():
    with pytest.raises(ValueError, match=r"the side network gives \[2, 3\], but the base \[2, 4\]"):
        SideNetwork(nn.Linear(8, 4), nn.Linear(8, 3))(torch.zeros(2, 8))


class Gives(nn.Module):
    """Gives its output in the chosen form."""

    def __init__(self, form):
        super().__init__()
        self.layer, self.form = nn.Linear(8, 4), form

    def forward(self, x):
        return self.form(self.layer(x))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda y: {"features": y}, "the base gives features, none of which can be mixed"),
        (lambda y: (None, "cache"), "no tensor at the same place"),
    ],
)
def test_outputs_without_anything_to_mix(base, message):
    with pytest.raises(ValueError, match=message):
        SideNetwork(Gives(base), Gives(lambda y: y))(torch.zeros(2, 8))
