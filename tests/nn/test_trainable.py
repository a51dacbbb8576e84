from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_ext.nn import LoRALinear, freeze_except, print_trainable_parameters, trainable_parameters


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}


def trained(model: nn.Module) -> set[str]:
    return {name for name, trains in flags(model).items() if trains}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.embed.weight


def test_counts_elements_once_for_a_shared_parameter():
    model = Tied()
    assert trainable_parameters(model) == (50, 50)
    model.embed.weight.requires_grad_(False)
    assert trainable_parameters(model) == (10, 50)


def test_prints_one_line(capsys):
    model = nn.Sequential(nn.Linear(100, 30), nn.Linear(30, 1))
    model[0].requires_grad_(False)
    print_trainable_parameters(model)
    assert capsys.readouterr().out == "trainable params: 31 || all params: 3,061 || trainable%: 1.0127\n"


def test_prints_a_model_without_parameters(capsys):
    print_trainable_parameters(nn.ReLU())
    assert capsys.readouterr().out == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"


def test_the_line_is_that_of_hugging_face_peft(capsys):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(64, 32)), peft.LoraConfig(r=2, target_modules=["0"]))
    theirs.print_trainable_parameters()
    expected = capsys.readouterr().out
    print_trainable_parameters(theirs)
    assert capsys.readouterr().out == expected


def test_freezes_and_thaws():
    model = nn.Sequential(LoRALinear(nn.Linear(6, 4), rank=2), nn.Linear(4, 3))
    assert freeze_except(model, r"lora_[AB]$") == (20, 63)
    assert trained(model) == {"0.lora_A", "0.lora_B"}
    assert freeze_except(model, "bias") == (7, 63)
    assert trained(model) == {"0.linear.bias", "1.bias"}
    assert freeze_except(model, (r"^1\.", "lora_A")) == (27, 63)
    assert trained(model) == {"0.lora_A", "1.weight", "1.bias"}


def test_a_shared_parameter_trains_under_any_of_its_names():
    model = Tied()
    assert freeze_except(model, r"^head\.weight$") == (40, 50)
    assert trained(model) == {"embed.weight", "head.weight"}


def test_a_name_with_a_capital_does_not_train_as_in_the_naive_loop():
    model = nn.ModuleDict({"SelfAttention": nn.Linear(4, 4), "lora_q": LoRALinear(nn.Linear(4, 4), rank=1)})
    naive = {name for name in flags(model) if "lora" in name.lower() or "A" in name or "B" in name}
    assert {"SelfAttention.weight", "lora_q.linear.weight"} < naive
    freeze_except(model, r"lora_[AB]$")
    assert trained(model) == {"lora_q.lora_A", "lora_q.lora_B"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("lora_C", r"'lora_C' matches no parameter of the model, which has: 0\.lora_[AB], 0\.lora_[AB]$"),
        (["lora_A", "wieght"], r"'wieght' matches no parameter of the model, which has: [01]\.(linear\.)?weight"),
        ("xyzzy", r"'xyzzy' matches no parameter of the model, which has: 0\.lora_A, "),
        ("lora_[", "'lora_\\[' is not a regular expression: "),
        ([], "pattern must hold at least one"),
    ],
)
def test_a_bad_pattern_changes_nothing(pattern, message):
    model = nn.Sequential(LoRALinear(nn.Linear(6, 4), rank=2), nn.Linear(4, 3))
    before = flags(model)
    with pytest.raises(ValueError, match=message):
        freeze_except(model, pattern)
    assert flags(model) == before


def test_a_model_without_parameters_is_an_error():
    with pytest.raises(ValueError, match="which has: none"):
        freeze_except(nn.ReLU(), "weight")


def test_an_integer_parameter_cannot_train():
    model = nn.Linear(3, 2)
    model.register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    before = flags(model)
    with pytest.raises(TypeError, match=r"matches codes, which cannot train: it is torch\.int8"):
        freeze_except(model, "")
    assert flags(model) == before
