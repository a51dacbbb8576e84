"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

_CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")],
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs on a CUDA device")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", _CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Runs the test with two intra-op threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny() -> Callable[[str], nn.Module]:
    """Small models of random weights in eval mode, by name."""
    transformers = pytest.importorskip("transformers")

    def make(kind: str) -> nn.Module:
        torch.manual_seed(0)
        if kind == "bert":
            config = transformers.BertConfig(
                vocab_size=50,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                initializer_range=0.3,
            )
            return transformers.BertForSequenceClassification(config).eval()
        if kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
            )
            return transformers.GPT2LMHeadModel(config).eval()
        if kind == "llama":
            config = transformers.LlamaConfig(
                vocab_size=50,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
            return transformers.LlamaForCausalLM(config).eval()
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()

    return make


@pytest.fixture
def greedy() -> Callable[[nn.Module, Tensor, int], Tensor]:
    """What ``generate()`` should give, from the logits of the whole text at every step.

    For Hugging Face PEFT, whose own ``generate()`` loses or repeats a prompt from transformers 5.24 on.
    """

    def step(model: nn.Module, text: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
            text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
        return text

    return step


@pytest.fixture
def run() -> Callable[[nn.Module], Tensor]:
    """A model's output on fixed input."""

    def call(model: nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if hasattr(model, "config"):
            return model(input_ids=torch.randint(50, (2, 5), generator=generator)).logits
        return model(torch.randn(2, 8, generator=generator))

    return call


Snapshot = tuple[list[tuple[str, type]], dict[str, tuple[bool, Tensor]]]


@pytest.fixture
def snapshot() -> Callable[[nn.Module], Snapshot]:
    """What a failing call must leave: the modules, and every parameter's flag and bits."""

    def take(model: nn.Module) -> Snapshot:
        modules = [(name, type(module)) for name, module in model.named_modules()]
        parameters = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
        return modules, parameters

    return take


@pytest.fixture
def same(snapshot: Callable[[nn.Module], Snapshot]) -> Callable[[nn.Module, Snapshot], bool]:
    """Whether a model is as it was when the snapshot was taken."""

    def compare(model: nn.Module, before: Snapshot) -> bool:
        modules, parameters = snapshot(model)
        return (
            modules == before[0]
            and parameters.keys() == before[1].keys()
            and all(
                flag == before[1][name][0] and torch.equal(value, before[1][name][1])
                for name, (flag, value) in parameters.items()
            )
        )

    return compare
