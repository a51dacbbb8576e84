"""Autocast around a backward, or around an op that it leaves alone: the products inside keep their types."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peft_ext import ops

Leaves = list[Tensor]
Op = Callable[..., Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def lora_linear() -> tuple[Op, Leaves]:
    weight = torch.randn(96, 64)
    return lambda x, b, A, B: ops.lora_linear(x, weight, b, A, B), [
        randn(40, 64),
        randn(96),
        randn(4, 64),
        randn(96, 4),
    ]


def multi_lora_linear() -> tuple[Op, Leaves]:
    weight, scalings, index = torch.randn(96, 64), torch.ones(1), torch.zeros(40, dtype=torch.long)
    return (
        lambda x, b, A, B: ops.multi_lora_linear(x, weight, b, [A], [B], scalings, index),
        [randn(40, 64), randn(96), randn(4, 64), randn(96, 4)],
    )


def kron_linear() -> tuple[Op, Leaves]:
    return ops.kron_linear, [randn(40, 64), randn(4, 4, 4), randn(4, 16, 24)]


def bottleneck_adapter() -> tuple[Op, Leaves]:
    return (
        lambda x, D, U, w, v: ops.bottleneck_adapter(x, D, None, U, None, w, v, norm="pre"),
        [randn(40, 64), randn(8, 64), randn(64, 8), randn(64), randn(64)],
    )


def adapter_fusion() -> tuple[Op, Leaves]:
    leaves = [randn(40, 64), randn(64, 64), randn(40, 64), randn(40, 64)]
    return lambda q, K, *z: ops.adapter_fusion(q, list(z), K)[0], leaves


def prefix_attention() -> tuple[Op, Leaves]:
    return ops.prefix_attention, [*(randn(2, 2, 6, 8) for _ in range(3)), randn(3, 2, 8), randn(3, 2, 8)]


@pytest.mark.parametrize(
    "make", [lora_linear, multi_lora_linear, kron_linear, bottleneck_adapter, adapter_fusion, prefix_attention]
)
def test_a_backward_inside_of_autocast(make: Callable[[], tuple[Op, Leaves]]) -> None:
    op, leaves = make()
    wanted = torch.autograd.grad(op(*leaves).sum(), leaves)
    loss = op(*leaves).sum()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, leaves)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("norm", ["none", "pre", "post"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_bottleneck_adapter_is_left_alone(norm: str, bias: bool) -> None:
    x, down, up = torch.randn(40, 64), torch.randn(8, 64), torch.randn(64, 8)
    biases = (torch.randn(8), torch.randn(64)) if bias else (None, None)
    norms = (None, None) if norm == "none" else (torch.randn(64), torch.randn(64))
    wanted = ops.bottleneck_adapter(x, down, biases[0], up, biases[1], *norms, norm=norm)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.bottleneck_adapter(x, down, biases[0], up, biases[1], *norms, norm=norm)
    assert torch.equal(got, wanted)
