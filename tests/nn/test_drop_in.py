"""A whole training run with our modules in place of the classes that people write by hand: the same curve."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_ext.nn import LoRALinear, SimpleAdapter

STEPS = 200


class EagerLoRA(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        linear.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)


class EagerAdapter(nn.Module):
    def __init__(self, features: int, bottleneck: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, bottleneck), nn.Linear(bottleneck, features)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.relu(self.down(x)))


def curve(
    make: Callable[[nn.Linear], nn.Module], start: dict[str, Tensor] | None
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of a run, and the trainable values that it began with, or was to begin with."""
    torch.manual_seed(0)
    layer = make(nn.Linear(32, 32))
    model = nn.Sequential(nn.Linear(16, 32).requires_grad_(False), layer, nn.Tanh(), nn.Linear(32, 4))
    if start is not None:
        model.load_state_dict(start)
    began = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.Generator().manual_seed(1)
    inputs, teacher = torch.randn(256, 16, generator=random), torch.randn(16, 4, generator=random)
    labels = (inputs @ teacher).argmax(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        rows = slice(step % 4 * 64, step % 4 * 64 + 64)
        loss = F.cross_entropy(model(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, began


@pytest.mark.parametrize(
    ("eager", "ours"),
    [
        (lambda linear: EagerLoRA(linear, 4, 8.0), lambda linear: LoRALinear(linear, 4, 8.0)),
        (lambda linear: EagerAdapter(32, 8), lambda linear: SimpleAdapter(32, 8)),
    ],
    ids=["LoRALinear", "SimpleAdapter"],
)
def test_loss_curves_lie_on_top_of_each_other(eager, ours):
    losses, start = curve(eager, None)
    renamed = dict(zip(curve(ours, None)[1], start.values(), strict=True))
    found, began = curve(ours, renamed)
    for name, value in began.items():
        assert torch.equal(value, renamed[name]), name
    assert losses[-1] < 0.3 * losses[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-5, atol=1e-5)
