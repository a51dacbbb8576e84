"""What the ops promise of a CUDA device: graphs, the current stream, a host that waits for nothing, equal bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from peft_ext import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

Leaves = list[Tensor]
Op = Callable[..., Tensor]
BF16, F32 = torch.bfloat16, torch.float32
DEVICE = "cuda"


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def new_seed() -> Tensor:
    return torch.tensor([7], device=DEVICE)


def lora_linear(dtype: torch.dtype, rows: int, dropout_p: float) -> tuple[Op, Leaves]:
    weight, seed = randn(96, 64, dtype=dtype), new_seed() if dropout_p else None
    leaves = [randn(*shape, dtype=dtype) for shape in ((rows, 64), (96,), (16, 64), (96, 16))]
    return lambda x, b, A, B: ops.lora_linear(x, weight, b, A, B, 0.5, dropout_p=dropout_p, seed=seed), leaves


def merged_lora_linear(dtype: torch.dtype, rows: int, dropout_p: float) -> tuple[Op, Leaves]:
    weight, seed, enabled = randn(96, 64, dtype=dtype), new_seed() if dropout_p else None, [True, False, True]
    leaves = [randn(*shape, dtype=dtype) for shape in ((rows, 64), (96,), (16, 64), (64, 8))]
    return (
        lambda x, b, A, B: ops.merged_lora_linear(x, weight, b, A, B, enabled, 0.5, dropout_p=dropout_p, seed=seed),
        leaves,
    )


def multi_lora_linear(dtype: torch.dtype, rows: int, dropout_p: float) -> tuple[Op, Leaves]:
    weight, scalings = randn(96, 64, dtype=dtype), torch.tensor([0.5, 2.0], device=DEVICE)
    index = torch.arange(rows, device=DEVICE) % 3 - 1
    rates, seed = ([dropout_p, 0.5], new_seed()) if dropout_p else (None, None)
    leaves = [randn(*shape, dtype=dtype) for shape in ((rows, 64), (8, 64), (4, 64), (96, 8), (96, 4))]

    def op(x: Tensor, A: Tensor, A2: Tensor, B: Tensor, B2: Tensor) -> Tensor:
        return ops.multi_lora_linear(x, weight, None, [A, A2], [B, B2], scalings, index, dropout_p=rates, seed=seed)

    return op, leaves


def kron_linear(dtype: torch.dtype, rows: int, dropout_p: float) -> tuple[Op, Leaves]:
    return ops.kron_linear, [randn(*shape, dtype=dtype) for shape in ((rows, 64), (4, 4, 4), (4, 16, 24))]


def bottleneck_adapter(dtype: torch.dtype, rows: int, dropout_p: float) -> tuple[Op, Leaves]:
    leaves = [randn(*shape, dtype=dtype) for shape in ((rows, 64), (8, 64), (8,), (64, 8), (64,))]
    return lambda x, D, b, U, c: ops.bottleneck_adapter(x, D, b, U, c, activation="gelu"), leaves


def adapter_fusion(dtype: torch.dtype, rows: int, dropout_p: float) -> tuple[Op, Leaves]:
    leaves = [randn(*shape, dtype=dtype) for shape in ((rows, 64), (rows, 64), (rows, 64), (64, 64))]
    return lambda q, z, z2, key: ops.adapter_fusion(q, [z, z2], key, None)[0], leaves


def prefix_attention(dtype: torch.dtype, rows: int, dropout_p: float) -> tuple[Op, Leaves]:
    seed = new_seed() if dropout_p else None
    leaves = [randn(*shape, dtype=dtype) for shape in (*[(2, 3, rows, 16)] * 3, (5, 3, 16), (5, 3, 16))]
    return lambda *tensors: ops.prefix_attention(*tensors, dropout_p=dropout_p, seed=seed), leaves


def quantized_linear(dtype: torch.dtype, rows: int, dropout_p: float) -> tuple[Op, Leaves]:
    weight = torch.randint(-127, 128, (96, 64), dtype=torch.int8, device=DEVICE)
    scale = torch.rand(96, 2, device=DEVICE) / 64
    return lambda x: ops.quantized_linear(x, weight, scale), [randn(rows, 64, dtype=dtype)]


WITH_DROPOUT = (lora_linear, merged_lora_linear, multi_lora_linear, prefix_attention)
CASES = [
    pytest.param(make, dtype, rows, dropout_p, id=f"{make.__name__}-{dtype}-{rows}-{dropout_p}")
    for make in (*WITH_DROPOUT, kron_linear, bottleneck_adapter, adapter_fusion, quantized_linear)
    for dtype in (BF16, F32)
    for rows in (3, 300)
    for dropout_p in ((0.0, 0.25) if make in WITH_DROPOUT else (0.0,))
]


def solve(op: Op, leaves: Leaves) -> list[Tensor]:
    """The result and all gradients."""
    inputs = [leaf.detach().requires_grad_() for leaf in leaves]
    y = op(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """The backward of flash attention adds in an order of its own unless it is told not to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("make", "dtype", "rows", "dropout_p"), CASES)
def test_same_bits_every_time(make, dtype, rows, dropout_p):
    op, leaves = make(dtype, rows, dropout_p)
    first = solve(op, leaves)
    for _ in range(3):
        assert all(map(torch.equal, solve(op, leaves), first))


@pytest.mark.parametrize(("make", "dtype", "rows", "dropout_p"), CASES)
def test_the_host_waits_for_nothing(make, dtype, rows, dropout_p):
    op, leaves = make(dtype, rows, dropout_p)
    solve(op, leaves)  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        solve(op, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("make", "dtype", "rows", "dropout_p"), CASES)
def test_runs_on_the_current_stream(make, dtype, rows, dropout_p):
    """The inputs arrive late, on a stream that no other waits for."""
    op, leaves = make(dtype, rows, dropout_p)
    wanted = solve(op, leaves)
    late = [torch.full_like(leaf, torch.nan) for leaf in leaves]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        for target, source in zip(late, leaves, strict=True):
            target.copy_(source)
        got = solve(op, late)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize(("make", "dtype", "rows", "dropout_p"), CASES)
def test_a_graph_replays_forward_and_backward(make, dtype, rows, dropout_p):
    op, leaves = make(dtype, rows, dropout_p)
    held = [leaf.clone() for leaf in leaves]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        solve(op, held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = solve(op, held)
    for scale in (1.0, -0.5):
        fresh = [scale * leaf for leaf in leaves]
        for target, source in zip(held, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        assert all(map(torch.equal, results, solve(op, fresh)))


@pytest.mark.parametrize("rows", [3, 300])
def test_a_graph_draws_the_mask_of_the_seed_that_it_finds(rows):
    x, weight, A, B = (randn(*shape, dtype=BF16) for shape in ((rows, 64), (96, 64), (16, 64), (96, 16)))
    seed = new_seed()

    def call() -> Tensor:
        return ops.lora_linear(x, weight, None, A, B, dropout_p=0.5, seed=seed)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    drawn = []
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        drawn.append(y.clone())
        assert torch.equal(y, call())
    assert not torch.equal(*drawn)
