"""A model of Hugging Face PEFT's on our ops, by one line: the objects, parameters and files stay PEFT's.

Needs ``peft`` and ``peft_ext[train]``.
"""

import tempfile

import peft
import torch
from transformers import BertConfig, BertForSequenceClassification

import peft_ext

torch.manual_seed(0)
config = BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, init_lora_weights=False)
model = peft.get_peft_model(BertForSequenceClassification(config), lora).eval()
tokens, labels = torch.randint(100, (8, 12)), torch.randint(2, (8,))
before = model(tokens).logits

report = peft_ext.accelerate(model)  # the line
print(report)
print("same outputs:", torch.allclose(model(tokens).logits, before, atol=1e-5))

optimizer = torch.optim.AdamW((p for p in model.train().parameters() if p.requires_grad), lr=1e-3)
for _ in range(20):
    loss = model(input_ids=tokens, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss after 20 steps: {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # PEFT's own files
    model.eval()
    trained = model(tokens).logits

peft_ext.restore(model)  # PEFT's own forward again
print("same outputs without us:", torch.allclose(model(tokens).logits, trained, atol=1e-5))
