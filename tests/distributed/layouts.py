"""Every op on DTensors in every layout, against the same op in one process: as torchrun starts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from process import process_group
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import peft_ext.distributed  # noqa: F401 (registers the layouts)
from peft_ext import ops

EVERYWHERE = Replicate()


torch.manual_seed(0)  # the same tensors in every process


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def lora(**named: Tensor) -> Tensor:
    return ops.lora_linear(scaling=0.5, **named)


LORA = {
    "x": random(5, 4, 8),
    "weight": random(6, 8),
    "bias": random(6),
    "lora_A": random(3, 8),
    "lora_B": random(6, 3),
}
QUANTIZED = {
    "x": random(5, 4, 8),
    "weight": torch.randint(-127, 128, (6, 8), dtype=torch.int8),
    "weight_scale": torch.rand(6, 1),
    "bias": random(6),
}
FUSION = {"query": random(5, 8), "key": random(8, 8), "key_bias": random(8), "one": random(5, 8), "two": random(5, 8)}


def fusion(query: Tensor, key: Tensor, key_bias: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, ...]:
    return ops.adapter_fusion(query, [one, two], key, key_bias)


def multi_lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    scalings, index = torch.tensor([0.5, 2.0]), torch.tensor([0, 1, -1, 0, 1])
    return ops.multi_lora_linear(x, weight, None, [a, b], [c, d], scalings, index)


def attention(**named: Tensor) -> Tensor:
    return ops.prefix_attention(**named, is_causal=True)


ATTENTION = {
    "q": random(4, 8, 5, 4),
    "k": random(4, 4, 5, 4),
    "v": random(4, 4, 5, 4),
    "prefix_key": random(3, 4, 4),
    "prefix_value": random(3, 4, 4),
}
BY_HEAD = dict.fromkeys(ATTENTION, Shard(1))
BY_SAMPLE = {"x": Shard(0)}
CASES: dict[str, tuple[Callable[..., Any], Mapping[str, Tensor], Mapping[str, Placement]]] = {
    "lora everywhere": (lora, LORA, {}),
    "lora by sample": (lora, LORA, BY_SAMPLE),
    "lora by token": (lora, LORA, {"x": Shard(1)}),
    "lora by column": (lora, LORA, {"weight": Shard(0), "bias": Shard(0), "lora_B": Shard(0)}),
    "lora by column, from samples": (lora, LORA, {"x": Shard(0), "weight": Shard(0), "bias": Shard(0)}),
    "lora by row": (lora, LORA, {"x": Shard(2), "weight": Shard(1), "lora_A": Shard(1)}),
    "lora by row, from everywhere": (lora, LORA, {"weight": Shard(1)}),
    "lora of an int8 base, by column": (
        lora,
        QUANTIZED | {name: LORA[name] for name in ("lora_A", "lora_B")},
        {"weight": Shard(0), "weight_scale": Shard(0), "bias": Shard(0)},
    ),
    "int8 by sample": (ops.quantized_linear, QUANTIZED, BY_SAMPLE),
    "int8 by column": (
        ops.quantized_linear,
        QUANTIZED,
        {"weight": Shard(0), "weight_scale": Shard(0), "bias": Shard(0)},
    ),
    "merged lora by sample": (
        lambda **named: ops.merged_lora_linear(**named, enable_lora=[True, False, True], scaling=0.5),
        {**LORA, "lora_A": random(4, 8), "lora_B": random(4, 2)},
        BY_SAMPLE,
    ),
    "mixed batch by sample": (
        multi_lora,
        {
            "x": random(5, 8),
            "weight": random(6, 8),
            "a": random(2, 8),
            "b": random(3, 8),
            "c": random(6, 2),
            "d": random(6, 3),
        },
        BY_SAMPLE,
    ),
    "kron by sample": (
        ops.kron_linear,
        {"x": random(5, 6), "A": random(2, 3, 2), "B": random(2, 2, 3), "bias": random(6)},
        BY_SAMPLE,
    ),
    "bottleneck by sample": (
        lambda **named: ops.bottleneck_adapter(**named, activation="gelu", norm="pre"),
        {
            "x": random(5, 8),
            "down_weight": random(3, 8),
            "down_bias": random(3),
            "up_weight": random(8, 3),
            "up_bias": random(8),
            "norm_weight": random(8),
            "norm_bias": random(8),
        },
        BY_SAMPLE,
    ),
    "fusion by sample": (fusion, FUSION, {"query": Shard(0), "one": Shard(0), "two": Shard(0)}),
    "fusion of one query": (fusion, {**FUSION, "query": random(8)}, {"one": Shard(0), "two": Shard(0)}),
    "attention by sample": (attention, ATTENTION, dict.fromkeys("qkv", Shard(0))),
    "attention by head": (attention, ATTENTION, BY_HEAD),
    "attention by head, grouped too few": (
        attention,
        {**ATTENTION, "k": random(4, 1, 5, 4), "v": random(4, 1, 5, 4)}
        | {name: random(3, 1, 4) for name in ("prefix_key", "prefix_value")},
        {"q": Shard(1)},
    ),
}


FROZEN = {"weight", "weight_scale"}


def results_of(call: Callable[..., Any], tensors: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The results, and the gradients of their squares' sum, by name."""
    results = call(**tensors)
    results = list(results) if isinstance(results, tuple) else [results]
    squares = [result.square().sum() for result in results]
    loss = sum(square.full_tensor() if isinstance(square, DTensor) else square for square in squares)
    trained = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    assert isinstance(loss, Tensor)
    return results, dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def check(name: str, mesh: DeviceMesh) -> None:
    call, tensors, placements = CASES[name]
    whole = {key: tensor.clone().requires_grad_(key not in FROZEN) for key, tensor in tensors.items()}
    sharded = {
        key: distribute_tensor(tensor, mesh, [placements.get(key, EVERYWHERE)]).requires_grad_(key not in FROZEN)
        for key, tensor in tensors.items()
    }
    results, gradients = results_of(call, sharded)
    expected_results, expected_gradients = results_of(call, whole)
    pairs = [*zip(results, expected_results, strict=True)]
    pairs += [(gradients[key], gradient) for key, gradient in expected_gradients.items()]
    for found, expected in pairs:
        assert isinstance(found, DTensor), name
        torch.testing.assert_close(found.full_tensor(), expected, msg=lambda text: f"{name}: {text}")
    for key, gradient in gradients.items() if name.startswith("lora") else ():
        assert key == "x" or gradient.placements == sharded[key].placements, (name, key, gradient.placements)
    if "by column" in name:
        assert results[0].placements == (Shard(results[0].dim() - 1),), results[0].placements
    elif "by row" in name:
        assert results[0].placements == (Partial(),), results[0].placements
    elif "by sample" in name:
        assert results[0].placements == (Shard(0),), results[0].placements


def check_errors(mesh: DeviceMesh) -> None:
    """Each names the argument, and says what it got and what it wants."""
    tensors = {key: distribute_tensor(tensor, mesh, [EVERYWHERE]) for key, tensor in LORA.items()}
    wrong: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (NotImplementedError, "dropout_p=0.5, want 0", lambda: ops.lora_linear(**tensors, dropout_p=0.5)),
        (TypeError, "weight of lora_linear must be a DTensor", lambda: lora(**{**tensors, "weight": LORA["weight"]})),
        (
            ValueError,
            "must be sharded in dimension 0",
            lambda: ops.quantized_linear(
                tensors["x"],
                distribute_tensor(QUANTIZED["weight"], mesh, [Shard(1)]),
                distribute_tensor(QUANTIZED["weight_scale"], mesh, [EVERYWHERE]),
            ),
        ),
    ]
    for kind, message, call in wrong:
        try:
            call()
        except kind as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)


def main() -> None:
    with process_group():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for name in CASES:
            check(name, mesh)
        check_errors(mesh)


if __name__ == "__main__":
    main()
