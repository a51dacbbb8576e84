"""training_step: a whole training step of MiniLM with LoRA, Hugging Face PEFT's and the same model accelerated.

The yardstick, which is the floor too, is the frozen model and its backward to the input embeddings. The step of the
others is forward, loss, backward and AdamW on LoRA of query and value (r = 8) and on the classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from registry import Benchmark, Dtypes, Implementation, Shape, Task, Tensors
from torch import Tensor, nn
from torch.nn import functional as F

import peft_ext
from peft_ext.cli.demo import MODEL_PACKAGE, find_model

STEP = "step"
FEATURES = 384


@dataclass(frozen=True)
class StepShape(Shape):
    """Inputs [batch, length]; dropout of LoRA's input, and of the model itself."""

    batch: int
    length: int
    dropout: float = 0.0
    model_dropout: float = 0.0


def make_tensors(shape: StepShape, dtypes: Dtypes) -> Tensors:
    return {
        "embeds": torch.randn(shape.batch, shape.length, FEATURES, dtype=dtypes.base),
        "labels": torch.arange(shape.batch) % 2,
    }


def minilm(shape: StepShape, t: Tensors) -> Any:
    """The frozen model with a new classifier, in training mode."""
    import transformers

    p = shape.model_dropout
    transformers.utils.logging.set_verbosity_error()  # the classifier is new
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        find_model(), hidden_dropout_prob=p, attention_probs_dropout_prob=p, dtype="float32"
    )
    return model.to(t["embeds"].dtype).requires_grad_(False).train()


def with_lora(shape: StepShape, t: Tensors) -> Any:
    """Hugging Face PEFT's model; its B is not zero, so that every gradient counts."""
    import peft

    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=8, target_modules=["query", "value"], lora_dropout=shape.dropout, init_lora_weights=False
    )
    return peft.get_peft_model(minilm(shape, t), config).train()


def loss_of(model: nn.Module, embeds: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs_embeds=embeds).logits, labels)


def build_frozen(shape: StepShape, t: Tensors) -> Task:
    model = minilm(shape, t)
    embeds, labels = t["embeds"].detach().requires_grad_(), t["labels"].long()

    def step() -> Tensor:
        return torch.autograd.grad(loss_of(model, embeds, labels), embeds)[0]

    return Task({STEP: step}, lambda: {"gradient of embeds": step()} if not shape.model_dropout else {})


def training_step(shape: StepShape, model: nn.Module, t: Tensors) -> Task:
    embeds, labels = t["embeds"], t["labels"].long()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, embeds, labels).backward()
        optimizer.step()

    def results() -> Tensors:
        if shape.model_dropout:
            return {}
        loss = loss_of(model, embeds, labels)
        return {
            "loss": loss.detach(),
            **dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True)),
        }

    return Task({STEP: step}, results)


def build_hf_peft(shape: StepShape, t: Tensors) -> Task:
    return training_step(shape, with_lora(shape, t), t)


def build_ours(shape: StepShape, t: Tensors) -> Task:
    model = with_lora(shape, t)
    peft_ext.accelerate(model)
    return training_step(shape, model, t)


def frozen_oracle(shape: StepShape, t: Tensors) -> Tensors:
    return build_frozen(shape, t).results()


def lora_oracle(shape: StepShape, t: Tensors) -> Tensors:
    return build_hf_peft(shape, t).results()


def floor(shape: StepShape, dtypes: Dtypes, pass_name: str) -> float:
    """The yardstick's own: the frozen model, forward and backward."""
    return 1.0


def target(shape: StepShape, pass_name: str, ratios: Mapping[str, float]) -> float | None:
    """Measurably faster than PEFT."""
    return ratios.get("hf_peft")


def peak_target(shape: StepShape, dtypes: Dtypes, peaks: Mapping[str, int]) -> int | None:
    """Not above PEFT's."""
    return peaks.get("hf_peft")


SHAPE = StepShape(32, 48)
DEFAULT = (SHAPE, replace(SHAPE, dropout=0.1), replace(SHAPE, dropout=0.1, model_dropout=0.1))

BENCHMARK = Benchmark(
    op="training_step",
    passes=(STEP,),
    shape_type=StepShape,
    shapes={"default": DEFAULT, "quick": DEFAULT[:2]},
    make_tensors=make_tensors,
    implementations=(
        Implementation("frozen", build_frozen, frozen_oracle, requires=MODEL_PACKAGE),
        Implementation("hf_peft", build_hf_peft, lora_oracle, requires="peft"),
        Implementation("ours", build_ours, lora_oracle, requires="peft"),
    ),
    floor=floor,
    target=target,
    peak_target=peak_target,
    rounding=50.0,  # a whole model amplifies what one layer rounds, more in some draws than in others
)
