"""A few steps of LoRA on a small Llama, alone and by several processes: torchrun starts it.

Every process takes its share of the same batches, so that losses and gradients, averaged, are those of one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from process import process_group
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from peft_ext import LoraConfig, get_peft_model
from peft_ext.distributed import ColwiseParallel, RowwiseParallel

STEPS, BATCH, LENGTH, RANK = 3, 8, 16, 4


TARGETS = ("q_proj", "v_proj", "down_proj")


def model_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    )


def base_model() -> LlamaForCausalLM:
    """The same in every process."""
    torch.manual_seed(0)
    return LlamaForCausalLM(model_config())


def adapted_model() -> Any:
    """The same in every process."""
    model = get_peft_model(base_model(), LoraConfig(r=RANK, lora_alpha=8, target_modules=list(TARGETS)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def batches() -> Tensor:
    return torch.randint(64, (STEPS, BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def full(tensor: Tensor) -> Tensor:
    """A copy of the whole of it: a sharded one is gathered, by all processes together."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("module."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


class Traffic(TorchDispatchMode):
    """Counts the elements that each collective takes from a process, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            # all-gathers and reduce-scatters take the result first
            tensors = args[1] if name.startswith(("_allgather", "_reduce_scatter")) else args[0]
            count = sum(tensor.numel() for tensor in ([tensors] if isinstance(tensors, Tensor) else tensors))
            self.sent[name] = self.sent.get(name, 0) + count
        return func(*args, **(kwargs or {}))


def alone(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: Any, mesh: DeviceMesh | None = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: Any, mesh: DeviceMesh | None = None) -> nn.Module:
    """Every process has the whole batch and a part of every layer."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan = {name: ColwiseParallel() for name in columns} | {
        name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    for layer in model.get_base_model().model.layers:
        parallelize_module(layer, mesh, plan)
    return model


def fsdp_tensor_parallel(model: Any) -> nn.Module:
    """Pairs of processes divide every layer, and FSDP2 shards these parts among the pairs, each with its share."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    return fsdp(tensor_parallel(model, mesh["tensor"]), mesh["data"])


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "alone": alone,
    "ddp": ddp,
    "fsdp": fsdp,
    "tensor_parallel": tensor_parallel,
    "fsdp_tensor_parallel": fsdp_tensor_parallel,
}


def share(way: str, batch: Tensor) -> Tensor:
    """The rows of a batch that are this process's."""
    rank, size = dist.get_rank(), dist.get_world_size()
    replicas = {"ddp": size, "fsdp": size, "fsdp_tensor_parallel": size // 2}.get(way, 1)
    return batch.chunk(replicas)[rank * replicas // size]


def train(way: str) -> dict[str, Any]:
    """The averaged losses, the gradients of the first step, the adapters after the last, the elements sent a step."""
    model = WAYS[way](adapted_model())
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    losses, gradients = [], {}
    for step, batch in enumerate(batches()):
        ids = share(way, batch)
        with Traffic() as traffic:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        if step == 0:
            gradients = {name: full(parameter.grad) for name, parameter in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        dist.all_reduce(loss)
        losses.append(loss / dist.get_world_size())
    return {
        "losses": torch.stack(losses),
        "gradients": gradients,
        "adapters": {name: full(parameter) for name, parameter in parameters.items()},
        "sent": traffic.sent,
        "held": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    with process_group():
        results = {way: train(way) for way in WAYS}
        if dist.get_rank() == 0:
            torch.save(results, given.output)


if __name__ == "__main__":
    main()
