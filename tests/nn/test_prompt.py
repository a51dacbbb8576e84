from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_ext import PromptTuningClassifier, freeze_except, trainable_parameters
from peft_ext.nn import PromptEncoder


def test_the_classifier_is_the_definition():
    model = PromptTuningClassifier(vocab_size=20, embed_dim=8, prompt_len=3, num_classes=2)
    tokens = torch.randint(20, (4, 5))
    rows = torch.cat([model.prompt.expand(4, 3, 8), model.embedding_model.weight[tokens]], dim=1)
    torch.testing.assert_close(model(tokens), model.classifier(rows.mean(1)))


@pytest.mark.parametrize("embedding_model", [None, nn.Embedding(100, 16)])
def test_training_moves_prompt_and_classifier_only_and_lowers_the_loss(embedding_model):
    model = PromptTuningClassifier(100, 16, prompt_len=4, num_classes=2, embedding_model=embedding_model)
    assert trainable_parameters(model) == (4 * 16 + 16 * 2 + 2, 100 * 16 + 4 * 16 + 16 * 2 + 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(100, (32, 8))
    labels = (tokens[:, 0] > 50).long()
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"prompt", "classifier.weight", "classifier.bias"}


def test_the_prompt_alone_can_be_trained():
    model = PromptTuningClassifier(10, 4, 3, 2)
    assert freeze_except(model, "^prompt$")[0] == 12


def test_an_empty_prompt_is_the_frozen_model():
    model = PromptTuningClassifier(10, 4, 0, 2)
    tokens = torch.randint(10, (2, 3))
    torch.testing.assert_close(model(tokens), model.classifier(model.embedding_model(tokens).mean(1)))


def test_a_negative_length_is_an_error():
    with pytest.raises(ValueError, match="prompt_len must be >= 0, got -1"):
        PromptTuningClassifier(10, 4, -1, 2)


def test_the_mlp_encoder_is_the_definition():
    encoder = PromptEncoder(3, 8, hidden_size=5)
    first, second, third = encoder.mlp_head[0], encoder.mlp_head[2], encoder.mlp_head[4]
    expected = third(second(first(encoder.embedding.weight).relu()).relu())
    torch.testing.assert_close(encoder(), expected)


def test_the_lstm_encoder_reads_in_both_directions():
    encoder = PromptEncoder(3, 8, hidden_size=5, encoder_type="LSTM")
    before = encoder()
    with torch.no_grad():
        encoder.embedding.weight[1] += 1
    assert (encoder() != before).any(1).all()


def test_a_gate_scales_its_token_and_closes_at_zero():
    encoder = PromptEncoder(3, 8, hidden_size=5, gated=True)
    plain = encoder()
    with torch.no_grad():
        encoder.gate.copy_(torch.tensor([1.0, 0.5, -1.0]))
    torch.testing.assert_close(encoder(), plain * torch.tensor([[1.0], [0.5], [0.0]]))
    encoder().sum().backward()
    assert encoder.gate.grad.ne(0).tolist() == [True, True, False]


def test_an_unknown_encoder_is_an_error():
    with pytest.raises(ValueError, match=r"encoder_type must be one of \('MLP', 'LSTM'\), got 'GRU'"):
        PromptEncoder(3, 8, 5, "GRU")
