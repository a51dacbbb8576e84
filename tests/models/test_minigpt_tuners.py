"""The methods that need no module in a block, on the reference GPT."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from peft_ext import BitFitConfig, PeftConfig, SideTuningConfig, get_peft_model
from peft_ext.models import MiniGPT

SIZE = {"vocab_size": 100, "hidden_dim": 32, "seq_len": 16, "n_layers": 2, "n_heads": 4}
# per block: 4 attention biases, 2 of the FFN (4 times as wide inside), 2 layer norms; ln_f, head
BIASES = 2 * (4 * 32 + 5 * 32 + 2 * 32) + 32 + 100
# the first block: attention, FFN and layer norms, with their biases; a
BLOCK = 4 * (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32) + 4 * 32 + 1


@pytest.mark.parametrize(
    ("config", "count", "trained"),
    [
        (BitFitConfig(), BIASES, ".bias"),
        (SideTuningConfig(backbone="blocks", num_layers=1), BLOCK, ".blocks."),
    ],
    ids=["bitfit", "side"],
)
def test_trains_what_it_says_and_learns(config: PeftConfig, count: int, trained: str) -> None:
    base = MiniGPT(**SIZE, method="none")
    model = get_peft_model(base, config)
    assert model.get_nb_trainable_parameters()[0] == count
    tokens = torch.randint(100, (32, 16))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(p.requires_grad for name, p in model.named_parameters() if name in moved)
    assert any(trained in name for name in moved)
