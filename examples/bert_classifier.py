"""LoRA in a transformers model: inject, train a step, save, load. Needs ``peft_ext[train]``."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification

from peft_ext import LoraConfig, PeftModel, TaskType, get_peft_model

config = BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
base = BertForSequenceClassification(config)
weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}

lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, modules_to_save=["pooler"])
model = get_peft_model(base, lora)
model.print_trainable_parameters()

tokens, labels = torch.randint(100, (8, 12)), torch.randint(2, (8,))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
for _ in range(20):
    loss = model(input_ids=tokens, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss after 20 steps: {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    fresh = BertForSequenceClassification(config)
    fresh.load_state_dict(weights)
    reloaded = PeftModel.from_pretrained(fresh, folder)
with torch.no_grad():
    print("equal after loading:", torch.equal(model.eval()(tokens).logits, reloaded(tokens).logits))
