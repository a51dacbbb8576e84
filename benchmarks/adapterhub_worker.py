"""AdapterHub's side of the benchmarks of whole models: its LoRA, in an interpreter that has ``adapters``.

Has no peft_ext: that interpreter's transformers is older.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found]
import torch
import transformers
from model_tasks import (
    ModelShape,
    assign,
    classification_loss,
    language_loss,
    prepare_classifier,
    prepare_nothing,
    training,
)
from registry import Task, Tensors
from turns import serve

MODELS: dict[str, tuple[Any, ...]] = {
    "minilm": (transformers.BertForSequenceClassification, prepare_classifier, classification_loss),
    "smollm2": (transformers.LlamaForCausalLM, prepare_nothing, language_loss),
}


def build(problem: dict[str, Any]) -> tuple[Task, Tensors]:
    """Of ``model``, ``folder``, ``shape``, ``tensors`` (a file), ``rank``, ``alpha`` and ``threads``."""
    torch.set_num_threads(problem["threads"])
    shape, t = ModelShape(**problem["shape"]), torch.load(problem["tensors"], weights_only=True)
    kind, prepare, loss = MODELS[problem["model"]]
    model = kind.from_pretrained(Path(problem["folder"]), dtype=torch.float32)
    prepare(model, shape, t)
    adapters.init(model)
    config = adapters.LoRAConfig(
        r=problem["rank"], alpha=problem["alpha"], dropout=shape.dropout, attn_matrices=["q", "v"]
    )
    (name,) = shape.names
    model.add_adapter(name, config=config)
    model.set_active_adapters(name)
    task = training(loss, model.train(), assign(model, t), t)
    return task, task.results()


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)  # set_active_adapters warns of its own reset
    serve(build)
