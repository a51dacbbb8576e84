"""What is measured of a whole model, whichever library put LoRA into it: a training step, or a few tokens.

AdapterHub's process reads this too, and has no peft_ext.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from registry import DECODE, STEP, Shape, Task, Tensors
from torch import Tensor, nn
from torch.nn import functional as F

HEAD = "head"
NEW_TOKENS = 16

# A layer's factor, in the names of PEFT, ours, AdapterHub and the eager classes.
FACTOR = re.compile(r"layers?\.(\d+)\.(?:.*\.)?(query|value|q_proj|v_proj)\.(?:loras\.(\w+)\.)?lora_([AB])(?:\.(\w+))?")
CLASSIFIER = re.compile(r"classifier\.(?!original_module).*?(weight|bias)$")


@dataclass(frozen=True)
class ModelShape(Shape):
    """Inputs [batch, length]; dropout of LoRA's input, and of the model itself.

    With ``adapters`` there is no training: ``NEW_TOKENS`` tokens for each row, which uses the adapter of its own number
    modulo ``adapters``, after ``length`` tokens in the cache.
    """

    batch: int
    length: int
    dropout: float = 0.0
    model_dropout: float = 0.0
    adapters: int = 0

    def without_dropout(self) -> ModelShape:
        return replace(self, dropout=0.0, model_dropout=0.0)

    @property
    def names(self) -> list[str]:
        return [f"a{i}" for i in range(self.adapters)] or ["default"]


Loss: TypeAlias = Callable[[nn.Module, Tensors], Tensor]


def key_of(parameter: str) -> str | None:
    """A parameter's name in the problem's tensors; None for what is frozen."""
    if factor := FACTOR.search(parameter):
        layer, target, adapterhub, which, name = factor.groups()
        return f"{layer} {target} {adapterhub or name or 'default'} lora_{which}"
    head = CLASSIFIER.search(parameter)
    return f"{HEAD} {head[1]}" if head else None


def assign(model: nn.Module, t: Tensors) -> dict[str, nn.Parameter]:
    """Gives the trained parameters the problem's values, and returns them by the problem's names.

    Raises:
        ValueError: where the model has not just those.
    """
    trained: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        key = key_of(name)
        parameter.requires_grad_(key is not None)
        if key is not None:
            trained[key] = parameter
            parameter.data = t[key].detach().clone()
    wanted = {key for key in t if "lora_" in key or key.startswith(HEAD)}
    if trained.keys() != wanted:
        raise ValueError(f"trained parameters: got {sorted(trained)}, want {sorted(wanted)}")
    return trained


def training(loss_of: Loss, model: Any, trained: Mapping[str, nn.Parameter], t: Tensors) -> Task:
    """Forward, loss, backward and AdamW; its results are those before the first step."""
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()

    def results() -> Tensors:
        loss = loss_of(model, t)
        gradients = torch.autograd.grad(loss, list(trained.values()))
        return {"loss": loss.detach(), **dict(zip(trained, gradients, strict=True))}

    return Task({STEP: step}, results)


def decoding(model: Any, t: Tensors, arguments: Mapping[str, Any]) -> Task:
    """Tokens that are given, for each row, by ``generate``, with a cache that is put back before every call."""
    first = t["past"].size(-2)
    cache = past(t)

    def restore() -> None:
        nonlocal cache
        cache = past(t)

    def the_given(ids: Tensor, scores: Tensor) -> Tensor:
        chosen = t["ids"][:, ids.size(1), None].long()
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    def decode() -> Tensor:
        found = model.generate(
            input_ids=t["ids"][:, : first + 1].long(),
            past_key_values=cache,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            logits_processor=[the_given],
            output_logits=True,
            return_dict_in_generate=True,
            **arguments,
        )
        return torch.stack(found.logits)

    def results() -> Tensors:
        restore()
        return {"logits": decode()}

    return Task({DECODE: decode}, results, setup=restore)


def past(t: Tensors) -> Any:
    from transformers import DynamicCache

    found = DynamicCache()
    for layer, (keys, values) in enumerate(t["past"]):
        found.update(keys, values, layer)
    return found


def prepare_classifier(model: Any, shape: ModelShape, t: Tensors) -> None:
    """A new classifier, and the dropout asked for."""
    classes, features = t[f"{HEAD} weight"].shape
    model.classifier = nn.Linear(features, classes, dtype=t[f"{HEAD} weight"].dtype)
    with torch.no_grad():
        model.classifier.weight.copy_(t[f"{HEAD} weight"])
        model.classifier.bias.copy_(t[f"{HEAD} bias"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = shape.model_dropout
        elif hasattr(module, "dropout_prob"):  # what attention reads
            module.dropout_prob = shape.model_dropout


def classification_loss(model: nn.Module, t: Tensors) -> Tensor:
    return F.cross_entropy(model(inputs_embeds=t["embeds"]).logits, t["labels"].long())


def prepare_nothing(model: Any, shape: ModelShape, t: Tensors) -> None:
    """A language model has no new head, and this one no dropout."""


def language_loss(model: nn.Module, t: Tensors) -> Tensor:
    inputs = {"inputs_embeds": t["embeds"]} if "embeds" in t else {"input_ids": t["ids"].long()}
    logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), t["ids"][:, 1:].flatten().long())
