"""Memory and traffic of LoRA training on several GPUs, counted from a model's configuration: docs/scale.md.

Usage: python benchmarks/scale.py    prints the document's table
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Model:
    """What of a Llama's configuration sizes depend on."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @classmethod
    def of(cls, name: str, config: Any) -> Model:
        """From a ``transformers.LlamaConfig``."""
        return cls(
            name,
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.vocab_size,
            config.tie_word_embeddings,
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linear layers."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_parameters(self) -> int:
        return sum(i * o for i, o in self.linears.values()) + 2 * self.hidden

    @property
    def other_parameters(self) -> int:
        """Embeddings, head and the last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.other_parameters

    def adapter_parameters(self, rank: int, targets: tuple[str, ...]) -> int:
        return self.layers * sum(rank * sum(self.linears[target]) for target in targets)


@dataclass(frozen=True)
class Plan:
    """How a model is trained: ``data`` times ``tensor`` GPUs, base in bfloat16, adapters in float32 with AdamW.

    Args:
        shard: whether FSDP2 shards base and adapters over the ``data`` processes; else each has all (DDP).
        tokens: of one process's batch, or of one tensor-parallel group's.
    """

    model: Model
    data: int
    tensor: int
    shard: bool
    tokens: int
    rank: int = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    base_bytes: int = 2
    adapter_bytes: int = 4

    @property
    def name(self) -> str:
        ways = ["FSDP2" if self.shard else "DDP"] if self.data > 1 else []
        return " x ".join([f"{way} {self.data}" for way in ways] + [f"TP {self.tensor}"] * (self.tensor > 1))

    @property
    def adapters(self) -> int:
        return self.model.adapter_parameters(self.rank, self.targets)

    @property
    def shards(self) -> int:
        return self.tensor * (self.data if self.shard else 1)

    def held(self) -> float:
        """Elements of base and adapters that a process holds between steps, without what tensor parallelism repeats."""
        return (self.model.parameters + self.adapters) / self.shards

    def gathered(self) -> int:
        """Elements that FSDP2 gathers in a step: layers with adapters twice; embeddings and head, the root's, once."""
        layers = self.model.layers * self.model.layer_parameters + self.adapters
        return 2 * layers + self.model.other_parameters

    def base_memory(self) -> float:
        """Bytes of the base on one GPU; FSDP2's with embeddings, head, the layer at work and the next gathered."""
        gathered = 2 * self.model.layer_parameters + self.model.other_parameters if self.shard else 0
        return self.base_bytes * (self.model.parameters / self.shards + gathered / self.tensor)

    def adapter_memory(self) -> float:
        """Parameters, gradients and AdamW's two moments. Under TP a layer's other factor is everywhere: at most."""
        return 4 * self.adapter_bytes * self.adapters / (self.data if self.shard else 1)

    def activation_memory(self) -> float:
        """With gradient checkpointing: each layer's input, and one layer's inside at a time, in bfloat16."""
        kv = self.model.linears["k_proj"][1]
        inside = (4 * self.model.hidden + 2 * kv + 3 * self.model.intermediate) / self.tensor + 4 * self.model.hidden
        return 2 * self.tokens * (self.model.layers * self.model.hidden + inside)

    def logits_memory(self) -> float:
        """In float32, and their gradient."""
        return 8 * self.tokens * self.model.vocabulary / self.tensor

    def memory(self) -> float:
        return self.base_memory() + self.adapter_memory() + self.activation_memory() + self.logits_memory()

    def gradient_traffic(self) -> float:
        """Bytes that a GPU sends in a step for the adapters' gradients: an all-reduce, or FSDP2's reduce-scatter."""
        passes = 1 if self.shard else 2
        return passes * self.adapter_bytes * self.adapters * (self.data - 1) / self.data

    def gather_traffic(self) -> float:
        """For FSDP2's all-gathers."""
        if not self.shard:
            return 0.0
        base = (self.gathered() - 2 * self.adapters) / self.tensor
        return (self.base_bytes * base + self.adapter_bytes * 2 * self.adapters) * (self.data - 1) / self.data

    def activation_traffic(self) -> float:
        """For tensor parallelism: a layer's two all-reduces forward, again for checkpointing, and backward."""
        if self.tensor == 1:
            return 0.0
        reduced = 2 * (self.tensor - 1) / self.tensor * 2 * self.tokens * self.model.hidden
        return 6 * self.model.layers * reduced

    def traffic(self) -> float:
        return self.gradient_traffic() + self.gather_traffic() + self.activation_traffic()


LLAMA_8B = Model("8 B", 4096, 14336, 32, 32, 8, 128256)
LLAMA_70B = Model("70 B", 8192, 28672, 80, 64, 8, 128256)
TOKENS = 4096


def plans() -> Iterator[Plan]:
    """The document's."""
    for data in (8, 16, 32, 64):
        yield Plan(LLAMA_8B, data, 1, shard=False, tokens=TOKENS)
        yield Plan(LLAMA_8B, data, 1, shard=True, tokens=TOKENS)
    for gpus in (8, 16, 32, 64):
        yield Plan(LLAMA_70B, gpus, 1, shard=True, tokens=TOKENS)
        yield Plan(LLAMA_70B, gpus // 8, 8, shard=gpus > 8, tokens=TOKENS)


def table() -> str:
    """In Markdown."""
    head = "| base | GPUs | layout | base | adapters | activations | logits | all, GiB | sent a step, GiB |"
    rows = [head, "| --- " * 9 + "|"]
    for plan in plans():
        parts = [plan.base_memory(), plan.adapter_memory(), plan.activation_memory(), plan.logits_memory()]
        cells = [f"{part / GIB:.2f}" for part in (*parts, plan.memory(), plan.traffic())]
        rows.append(f"| {plan.model.name} | {plan.data * plan.tensor} | {plan.name} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
