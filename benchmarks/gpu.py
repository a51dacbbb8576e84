"""The ops on a CUDA device beside their peers, the frozen layer and counted floors: one interleaved run, one table."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ext import ops

ROUNDS, BURST = 30, 5
Call = Callable[[], object]
BF16 = torch.bfloat16


def randn(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0, grad: bool = False) -> Tensor:
    return (scale * torch.randn(*shape, device="cuda")).to(dtype).requires_grad_(grad)


def measure(calls: dict[str, Call]) -> dict[str, float]:
    """Median milliseconds of each call; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(BURST):
                call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / BURST)
    return {name: statistics.median(values) for name, values in times.items()}


def check(ours: Tensor, peer: Tensor, tolerance: float = 3e-2) -> None:
    error = (ours.double() - peer.double()).abs().max() / peer.double().abs().max()
    if not error < tolerance:
        raise SystemExit(f"ours and the peer differ by {error:.2e}")


def graphed(call: Call) -> Call:
    """Replays of a captured graph: without what the host takes to start the kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def backward(call: Callable[[], Tensor], leaves: list[Tensor]) -> Call:
    grad = torch.randn_like(call())
    return lambda: torch.autograd.grad(call(), leaves, grad)


def with_graphs(calls: dict[str, Call]) -> dict[str, Call]:
    return calls | {f"{name} graph": graphed(call) for name, call in calls.items()}


def lora(m: int, k: int, n: int, r: int, p: float, dtype: torch.dtype = BF16) -> dict[str, dict[str, Call]]:
    x, w = randn(m, k, dtype=dtype, grad=True), randn(n, k, dtype=dtype, scale=k**-0.5)
    a, b = randn(r, k, dtype=dtype, scale=k**-0.5, grad=True), randn(n, r, dtype=dtype, grad=True)

    def peer() -> Tensor:
        return F.linear(x, w) + F.linear(F.linear(F.dropout(x, p), a), b) * 0.5

    def ours() -> Tensor:
        return ops.lora_linear(x, w, None, a, b, 0.5, dropout_p=p)

    if p == 0:
        check(ours(), peer())
    frozen = lambda: F.linear(x, w)  # noqa: E731
    leaves = [x, a, b]
    with torch.no_grad():
        forward = with_graphs({"frozen": frozen, "peer": peer, "ours": ours}) if p == 0 else {
            "frozen": frozen, "peer": peer, "ours": ours}
    return {
        "forward": forward,
        "forward+backward": {
            "frozen": backward(frozen, [x]), "peer": backward(peer, leaves), "ours": backward(ours, leaves)
        },
    }


def multi(m: int, k: int, n: int, r: int, adapters: int, dtype: torch.dtype = BF16) -> dict[str, dict[str, Call]]:
    x, w = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, scale=k**-0.5)
    a = [randn(r, k, dtype=dtype, scale=k**-0.5) for _ in range(adapters)]
    b = [randn(n, r, dtype=dtype) for _ in range(adapters)]
    scalings = torch.full((adapters,), 0.5, dtype=torch.float64, device="cuda")
    index = torch.arange(m, device="cuda") * adapters // m

    rows = [(index == i).nonzero().flatten() for i in range(adapters)]

    def peer() -> Tensor:
        y = F.linear(x, w)
        for i, some in enumerate(rows):
            y[some] += F.linear(F.linear(x[some], a[i]), b[i]) * 0.5
        return y

    def ours() -> Tensor:
        return ops.multi_lora_linear(x, w, None, a, b, scalings, index)

    with torch.no_grad():
        check(ours(), peer())
        return {"forward": with_graphs({"frozen": lambda: F.linear(x, w), "peer": peer, "ours": ours})}


def kron(m: int, n: int, a: int, b_in: int, b_out: int, r: int, dtype: torch.dtype = BF16) -> dict[str, dict[str, Call]]:
    x = randn(m, a * b_in, dtype=dtype, grad=True)
    A, s, t = randn(n, a, a, dtype=dtype, grad=True), randn(n, b_in, r, dtype=dtype, grad=True), randn(n, r, b_out, dtype=dtype, grad=True)

    def peer() -> Tensor:
        return x @ torch.einsum("npq,nuv->puqv", A, s @ t).reshape(a * b_in, a * b_out)

    def ours() -> Tensor:
        return ops.kron_linear(x, A, s, t, None, 1.0)

    check(ours(), peer(), 6e-2)
    leaves = [x, A, s, t]
    with torch.no_grad():
        forward = with_graphs({"peer": peer, "ours": ours})
    return {"forward": forward, "forward+backward": {"peer": backward(peer, leaves), "ours": backward(ours, leaves)}}


def prefix(b: int, h: int, t: int, s: int, p: int, d: int, causal: bool, dtype: torch.dtype = BF16) -> dict[str, dict[str, Call]]:
    q, k, v = randn(b, h, t, d, dtype=dtype, grad=True), randn(b, h, s, d, dtype=dtype, grad=True), randn(b, h, s, d, dtype=dtype, grad=True)
    pk, pv = randn(p, h, d, dtype=dtype, grad=True), randn(p, h, d, dtype=dtype, grad=True)
    mask = None
    if causal:
        mask = torch.cat([torch.ones(t, p), torch.ones(t, s).tril(s - t)], 1).bool().cuda()

    def peer() -> Tensor:
        keys = torch.cat([pk.transpose(0, 1).expand(b, -1, -1, -1), k], 2)
        values = torch.cat([pv.transpose(0, 1).expand(b, -1, -1, -1), v], 2)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

    def ours() -> Tensor:
        return ops.prefix_attention(q, k, v, pk, pv, is_causal=causal)

    check(ours(), peer())
    leaves = [q, k, v, pk, pv]
    with torch.no_grad():
        forward = with_graphs({"peer": peer, "ours": ours})
    return {"forward": forward, "forward+backward": {"peer": backward(peer, leaves), "ours": backward(ours, leaves)}}


def bottleneck(m: int, d: int, k: int, dtype: torch.dtype = BF16) -> dict[str, dict[str, Call]]:
    x, down, up = randn(m, d, dtype=dtype, grad=True), randn(k, d, dtype=dtype, scale=d**-0.5, grad=True), randn(d, k, dtype=dtype, scale=k**-0.5, grad=True)
    db, ub = randn(k, dtype=dtype, grad=True), randn(d, dtype=dtype, grad=True)

    def peer() -> Tensor:
        return x + F.linear(F.relu(F.linear(x, down, db)), up, ub)

    def ours() -> Tensor:
        return ops.bottleneck_adapter(x, down, db, up, ub)

    check(ours(), peer())
    leaves = [x, down, db, up, ub]
    with torch.no_grad():
        forward = with_graphs({"peer": peer, "ours": ours})
    return {"forward": forward, "forward+backward": {"peer": backward(peer, leaves), "ours": backward(ours, leaves)}}


def fusion(m: int, d: int, n: int, dtype: torch.dtype = BF16) -> dict[str, dict[str, Call]]:
    outputs = [randn(m, d, dtype=dtype, grad=True) for _ in range(n)]
    query = randn(m, d, dtype=dtype, grad=True)

    def peer() -> Tensor:
        stacked = torch.stack(outputs, 1)
        weights = (stacked * query[:, None]).sum(-1).mul(0.05).softmax(-1)
        return (weights[..., None] * stacked).sum(1)

    def ours() -> Tensor:
        return ops.adapter_fusion(query, outputs, None, None, 0.05)[0]

    check(ours(), peer())
    leaves = [query, *outputs]
    with torch.no_grad():
        forward = with_graphs({"peer": peer, "ours": ours})
    return {"forward": forward, "forward+backward": {"peer": backward(peer, leaves), "ours": backward(ours, leaves)}}


CASES: dict[str, Callable[[], dict[str, dict[str, Call]]]] = {
    "lora 4096,4096,4096,16": lambda: lora(4096, 4096, 4096, 16, 0.0),
    "lora 4096,4096,4096,16,0.05": lambda: lora(4096, 4096, 4096, 16, 0.05),
    "lora 512,768,768,8": lambda: lora(512, 768, 768, 8, 0.0),
    "lora 1,4096,4096,16": lambda: lora(1, 4096, 4096, 16, 0.0),
    "multi 64x4096,4096,16 64 adapters": lambda: multi(64, 4096, 4096, 16, 64),
    "multi 4096x4096,4096,16 64 adapters": lambda: multi(4096, 4096, 4096, 16, 64),
    "kron 4096,4096 n8 r8": lambda: kron(4096, 8, 8, 512, 512, 8),
    "kron 4096,768->24 n4 r1": lambda: kron(4096, 4, 4, 192, 6, 1),
    "prefix decode B64 H12 P100 S16": lambda: prefix(64, 12, 1, 16, 100, 64, False),
    "prefix decode B64 H12 P100 S512": lambda: prefix(64, 12, 1, 512, 100, 64, False),
    "prefix B8 H12 T1024 P100": lambda: prefix(8, 12, 1024, 1024, 100, 64, False),
    "prefix B8 H12 T1024 P100 causal": lambda: prefix(8, 12, 1024, 1024, 100, 64, True),
    "bottleneck 32,768,64": lambda: bottleneck(32, 768, 64),
    "bottleneck 4096,768,64": lambda: bottleneck(4096, 768, 64),
    "fusion 4096,768 N3": lambda: fusion(4096, 768, 3),
    "fusion 4096,768 N8": lambda: fusion(4096, 768, 8),
}


def main() -> None:
    torch.manual_seed(0)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, case in CASES.items():
        try:
            passes = case()
            results[name] = {}
            for which, calls in passes.items():
                with torch.set_grad_enabled(which != "forward"):
                    times = measure(calls)
                results[name][which] = times
                print(f"{name:38s} {which:17s}", *(f"{key} {1e3 * value:8.1f}" for key, value in times.items()), flush=True)
        except Exception as error:  # noqa: BLE001 - one case that fails must not hide the others
            print(name, "failed:", repr(error)[:300], flush=True)
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    a, b = randn(8192, 8192), randn(8192, 8192)
    ceilings = measure({"copy": lambda: target.copy_(source), "gemm": lambda: a @ b})
    print(f"copy {2**31 / ceilings['copy'] / 1e9:.2f} TB/s, bf16 GEMM {2 * 8192**3 / ceilings['gemm'] / 1e9:.0f} TFLOP/s")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "ms": results, "ceilings": ceilings}, indent=1))


if __name__ == "__main__":
    main()
