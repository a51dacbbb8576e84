"""What the tests of acceleration share: pairs of the same model, one accelerated and one not."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_ext

Pair = tuple[nn.Module, nn.Module]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


class OpCalls(TorchDispatchMode):
    """Counts the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "peft_ext":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def op_calls() -> type[OpCalls]:
    return OpCalls


@pytest.fixture
def pair() -> Callable[[nn.Module], Pair]:
    """A model of Hugging Face PEFT's and an accelerated deep copy of it."""

    def make(model: nn.Module) -> Pair:
        ours = copy.deepcopy(model)
        peft_ext.accelerate(ours)
        return model, ours

    return make


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """That two models give the same output, and the same gradients to everything that trains."""

    def outputs_and_gradients(model: nn.Module, inputs: tuple[Tensor, ...], seed: int | None) -> list[Tensor]:
        inputs = tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs)
        trained = [p for p in model.parameters() if p.requires_grad] + [t for t in inputs if t.requires_grad]
        if seed is not None:
            torch.manual_seed(seed)
        output = model(*inputs)
        output = output if isinstance(output, Tensor) else output[0]
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        gradients = torch.autograd.grad((output * weights).sum(), trained, allow_unused=True)
        assert all(g is None or g.dtype == t.dtype for g, t in zip(gradients, trained, strict=True))
        return [output.detach(), *(g for g in gradients if g is not None)]

    def check(
        theirs: nn.Module,
        ours: nn.Module,
        *inputs: Tensor,
        seed: int | None = None,
        coarsest: torch.dtype = torch.float64,
    ) -> None:
        want, got = outputs_and_gradients(theirs, inputs, seed), outputs_and_gradients(ours, inputs, seed)
        assert len(want) == len(got) > 1
        for expected, actual in zip(want, got, strict=True):
            assert actual.dtype == expected.dtype
            tolerance = max(TOLERANCE[want[0].dtype], TOLERANCE[coarsest])
            limit = tolerance * max(expected.abs().max().item(), 1e-3)
            assert (actual - expected).abs().max().item() <= limit

    return check
