"""LoRA layers in a model of your own: train, count, merge."""

import torch
from torch import nn

from peft_ext import LoRALinear, print_trainable_parameters

torch.manual_seed(0)
teacher = nn.Linear(32, 32)
pretrained = nn.Linear(32, 32)
pretrained.load_state_dict(teacher.state_dict())
with torch.no_grad():  # the task differs from pretraining by a matrix of rank 2
    teacher.weight += 0.3 * torch.randn(32, 2) @ torch.randn(2, 32)

layer = LoRALinear(pretrained, rank=2, alpha=4.0)
print_trainable_parameters(layer)
optimizer = torch.optim.Adam((p for p in layer.parameters() if p.requires_grad), lr=1e-2)
for step in range(101):
    x = torch.randn(64, 32)
    loss = nn.functional.mse_loss(layer(x), teacher(x))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.4f}")
