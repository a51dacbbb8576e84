"""What benchmarks of whole models share: the same LoRA in every library, on the same frozen weights.

``e2e_minilm`` and ``e2e_smollm2`` bring a model and its loss.
"""

from __future__ import annotations

import atexit
import copy
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lora_linear import SCALING, EagerLoRA
from model_tasks import FACTOR, Loss, ModelShape, assign, decoding, training
from registry import STEP, Dtypes, Implementation, Task, Tensors
from torch import Tensor, nn
from turns import Worker

RANK = 8
ADAPTERHUB_PYTHON = "PEFT_EXT_ADAPTERHUB_PYTHON"
QUANTIZED = {"ours_bfloat16": "bfloat16", "ours_int8": "int8", "ours_int4": "int4"}
"""Ours on a base in fewer bits."""


@dataclass(frozen=True)
class WholeModel:
    """A real model, frozen.

    Args:
        load: it and its weights in float32, read once.
        loss: of the model, from the problem's tensors.
        task_type: as PEFT calls it.
        targets: names of the layers that get LoRA.
        folder: what :func:`load` reads, for another process.
        prepare: gives a copy of the model what this problem asks for (a classifier, dropout).
    """

    name: str
    load: Callable[[], Any]
    loss: Loss
    task_type: str
    targets: tuple[str, str]
    folder: Callable[[], Path]
    prepare: Callable[[Any, ModelShape, Tensors], None]

    def source(self) -> Any:
        """The model that all share; to read it takes nothing from the random numbers of the problem."""
        with torch.random.fork_rng():
            return self.load()

    def build(self, shape: ModelShape, t: Tensors) -> Any:
        """The frozen model in training mode, its weights shared with every other one of that type."""
        source = converted(self.source, next(v for k, v in t.items() if "lora_A" in k).dtype)
        model = copy.deepcopy(source, {id(p): p for p in source.parameters()})
        self.prepare(model, shape, t)
        return model.requires_grad_(False).train(not shape.adapters)


@cache
def converted(load: Callable[[], Any], dtype: torch.dtype) -> Any:
    model = load().requires_grad_(False)
    return model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)


def factor_tensors(model: Any, targets: Sequence[str], names: Sequence[str], dtypes: Dtypes) -> Tensors:
    """A and B of every targeted layer and adapter; B is not zero, so that every gradient counts."""
    found = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in targets:
            layer = FACTOR.search(f"{path}.lora_A")
            assert layer
            for name in names:
                shapes = {"A": (RANK, module.in_features), "B": (module.out_features, RANK)}
                for which, size in shapes.items():
                    key = f"{layer[1]} {layer[2]} {name} lora_{which}"
                    scale = size[1] ** -0.5 if which == "A" else 0.02
                    found[key] = (torch.randn(size) * scale).to(dtypes.adapter)
    return found


def with_eager(model: Any, targets: Sequence[str], shape: ModelShape, t: Tensors) -> Any:
    """Classes written by hand in place of the targeted layers."""
    for path, module in list(model.named_modules()):
        if path.rpartition(".")[2] in targets:
            layer = FACTOR.search(f"{path}.lora_A")
            assert layer
            factors = [
                [t[f"{layer[1]} {layer[2]} {name} lora_{which}"] for name in shape.names] for which in ("A", "B")
            ]
            if shape.adapters:
                model.set_submodule(path, EagerMixedLoRA(module, factors[0], factors[1], shape.batch))
            else:
                model.set_submodule(path, EagerLoRA(module, factors[0][0], factors[1][0], shape.dropout))
    return model


class EagerMixedLoRA(nn.Module):
    """Each row's own factors gathered from all of them, and batched products."""

    stacked_A: Tensor
    stacked_B: Tensor
    index: Tensor

    def __init__(self, linear: nn.Linear, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], batch: int) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("stacked_A", torch.stack(list(lora_A)))
        self.register_buffer("stacked_B", torch.stack(list(lora_B)))
        self.register_buffer("index", torch.arange(batch) % len(lora_A))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.stacked_A[self.index].mT
        return self.linear(x) + SCALING * (hidden @ self.stacked_B[self.index].mT)


def lora_arguments(whole: WholeModel, shape: ModelShape) -> dict[str, Any]:
    return {
        "task_type": whole.task_type,
        "r": RANK,
        "lora_alpha": SCALING * RANK,
        "lora_dropout": shape.dropout,
        "target_modules": list(whole.targets),
    }


def with_library(library: Any, whole: WholeModel, shape: ModelShape, t: Tensors) -> Any:
    """PEFT's model or ours, which are called alike."""
    config = library.LoraConfig(**lora_arguments(whole, shape))
    first, *others = shape.names
    model = library.get_peft_model(whole.build(shape, t), config, adapter_name=first)
    for name in others:
        model.add_adapter(name, library.LoraConfig(**lora_arguments(whole, shape)))
    return model.train(not shape.adapters)


def make(how: str, whole: WholeModel, shape: ModelShape, t: Tensors) -> Any:
    """The model with LoRA, by the implementation's name."""
    import peft_ext

    if how == "eager":
        return with_eager(whole.build(shape, t), whole.targets, shape, t)
    if how in ("ours", "ours_compiled"):
        return with_library(peft_ext, whole, shape, t)
    if how in QUANTIZED:
        model = with_library(peft_ext, whole, shape, t)
        peft_ext.quantize_base(model, QUANTIZED[how])
        return model
    import peft

    model = with_library(peft, whole, shape, t)
    if how == "ours_accelerated":
        peft_ext.accelerate(model)
    return model


def build(how: str, whole: WholeModel, shape: ModelShape, t: Tensors) -> Task:
    model = make(how, whole, shape, t)
    if shape.adapters:
        if how != "eager":
            assign(model, t)
        mixed = (
            {} if how == "eager" else {"adapter_names": [shape.names[i % shape.adapters] for i in range(shape.batch)]}
        )
        return decoding(model, t, mixed)
    trained = assign(model, t)
    return training(whole.loss, as_called(how, model), trained, t)


def as_called(how: str, model: Any) -> Any:
    """Under torch.compile, where the implementation's name says so; it compiles at the first call."""
    if not how.endswith("compiled"):
        return model
    torch.compiler.reset()
    return torch.compile(model)


def frozen(whole: WholeModel, shape: ModelShape, t: Tensors) -> Task:
    """The model alone. Its step is the forward and the backward to the input embeddings."""
    model = whole.build(shape, t)
    if shape.adapters:
        return decoding(model, t, {})
    embeds = embeddings(model, t).requires_grad_()

    def step() -> Tensor:
        return torch.autograd.grad(whole.loss(model, t | {"embeds": embeds}), embeds)[0]

    return Task({STEP: step}, lambda: {"gradient of embeds": step()})


def embeddings(model: Any, t: Tensors) -> Tensor:
    return (t["embeds"] if "embeds" in t else model.get_input_embeddings()(t["ids"].long())).detach()


@cache
def adapterhub_worker() -> Worker:
    """The process that has AdapterHub: it needs an older transformers."""
    worker = Worker("adapterhub_worker.py", "adapterhub", os.environ[ADAPTERHUB_PYTHON])
    atexit.register(worker.close)
    return worker


def build_adapterhub(whole: WholeModel, shape: ModelShape, t: Tensors) -> Task:
    with tempfile.TemporaryDirectory() as folder:
        tensors = Path(folder) / "tensors.pt"
        torch.save(t, tensors)
        task, _ = adapterhub_worker().build(
            model=whole.name,
            folder=str(whole.folder()),
            shape=asdict(shape),
            tensors=str(tensors),
            rank=RANK,
            alpha=SCALING * RANK,
            threads=torch.get_num_threads(),
        )
    return task


def oracle(make_task: Callable[[ModelShape, Tensors], Task], shape: ModelShape, t: Tensors) -> Tensors:
    return make_task(shape, t).results()


def is_training(shape: ModelShape) -> bool:
    return not shape.adapters


def implementations(whole: WholeModel, package: str) -> tuple[Implementation, ...]:
    """The frozen model, the peers and ours. The oracle is the formula in float64."""
    lora_oracle = partial(oracle, partial(build, "eager", whole))

    def one(name: str, **options: Any) -> Implementation:
        return Implementation(name, partial(build, name, whole), lora_oracle, **options)

    alone = partial(frozen, whole)
    hub = partial(build_adapterhub, whole)
    return (
        Implementation("frozen", alone, partial(oracle, alone), requires=package, peer=False),
        one("eager"),
        one("hf_peft", requires="peft"),
        one("compiled", requires="peft", handles=is_training, default=False),
        # With the transformers that it needs, its Llama does not see the cache: the argument has got another name.
        Implementation("adapterhub", hub, lora_oracle, environment=ADAPTERHUB_PYTHON, handles=is_training),
        one("ours"),
        one("ours_accelerated", requires="peft", peer=False),
        one("ours_compiled", handles=is_training, default=False, peer=False),
    )


def floor(shape: ModelShape, dtypes: Dtypes, pass_name: str) -> float:
    """The yardstick's own: the frozen model, forward and, in training, backward."""
    return 1.0


def target(shape: ModelShape, pass_name: str, ratios: Mapping[str, float]) -> float | None:
    """Faster than every peer; in training also within 1.06 of the frozen model."""
    peers = [ratios[name] for name in ("eager", "hf_peft", "compiled", "adapterhub") if name in ratios]
    return min([*peers, *([] if shape.adapters else [1.06])], default=None)


def peak_target(shape: ModelShape, dtypes: Dtypes, peaks: Mapping[str, int]) -> int | None:
    """Not above PEFT's."""
    return peaks.get("hf_peft")
