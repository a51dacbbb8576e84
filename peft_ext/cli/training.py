"""Trains and measures adapters with ``transformers.Trainer``."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments

from peft_ext.cli.base_model import load_base, load_tokenizer
from peft_ext.cli.console import console
from peft_ext.cli.data import Example
from peft_ext.cli.errors import CliError, explain
from peft_ext.cli.measures import PeakMemory, StepTimes
from peft_ext.cli.methods import MethodOptions, find_method
from peft_ext.cli.plot import plot_run
from peft_ext.cli.progress import RichProgress
from peft_ext.cli.run_file import METRICS_FILE, RunSettings, write_json
from peft_ext.cli.tasks import Encoded, Task
from peft_ext.nn import trainable_parameters
from peft_ext.tuners import PeftModel, get_peft_model
from peft_ext.tuners.trainer import Trainer, find_checkpoint

CHECKPOINTS = "checkpoints"
PLOT_FILE = "training.png"
LOGS_PER_EPOCH = 10

Model = PeftModel | PreTrainedModel
"""What is trained: an adapted model, or the whole of a plain one."""


@dataclass(frozen=True)
class RunResult:
    """What a run made and measured."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    trained: int
    total: int
    before: dict[str, float]
    after: dict[str, float]
    seconds: float


def checkpoint_to_resume(folder: Path) -> str:
    """The newest checkpoint of an interrupted run."""
    found = find_checkpoint(folder / CHECKPOINTS)
    if found is None:
        raise CliError(f"{folder} has no checkpoint to resume from: run it again with --overwrite")
    return str(found)


def train_adapter(
    settings: RunSettings,
    task: Task,
    train: list[Example],
    evaluation: list[Example],
    folder: Path,
    checkpoint: str | None = None,
) -> RunResult:
    """Trains an adapter and writes it, its tokenizer, metrics and a plot into ``folder``."""
    tokenizer = load_tokenizer(settings.model)
    base = load_base(task, settings.model, tokenizer, settings.seed)
    memory, steps = PeakMemory(base), StepTimes()
    model = adapt(base, settings, task)
    trainer = Trainer(
        model=model,
        args=_training_arguments(settings, task, folder, len(train)),
        train_dataset=task.encode(train, tokenizer, settings.max_length),
        eval_dataset=task.encode(evaluation, tokenizer, settings.max_length),
        data_collator=task.collator(tokenizer),
        compute_metrics=task.compute_metrics,
        callbacks=[steps],
    )
    _show_progress(trainer, task)
    before = task.metrics(trainer.evaluate())
    start = perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = perf_counter() - start
    history = trainer.state.log_history
    after = task.metrics(next(entry for entry in reversed(history) if "eval_loss" in entry))
    if not math.isfinite(after["loss"]):
        raise CliError(f"training diverged: the held-out loss is {after['loss']}; lower --lr from {settings.lr:g}")
    trained, total = trainable_parameters(model)
    peak_memory = memory.above()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plot_run(folder / PLOT_FILE, history, task, before)
    measured = {
        "before": before,
        "after": after,
        "trained_parameters": trained,
        "all_parameters": total,
        "seconds": round(seconds, 2),
        "step_seconds": steps.median,
        "peak_memory": peak_memory,
        "file_size": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "history": history,
    }
    # last, so that a folder with this file holds a whole run
    write_json(folder / METRICS_FILE, measured)
    return RunResult(model, tokenizer, trained, total, before, after, seconds)


def adapt(base: PreTrainedModel, settings: RunSettings, task: Task) -> Model:
    """The base model with a fresh adapter; as it is if the whole of it is trained."""
    make_config = find_method(settings.method).config
    if make_config is None:
        return base
    with explain(f"cannot add the {settings.method} adapter"):
        return get_peft_model(base, make_config(base, MethodOptions(**settings.options), task.task_type))


def load_trained(settings: RunSettings, task: Task, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Model:
    """A fresh base model with the adapter that ``folder`` holds, or the whole model that it holds."""
    if find_method(settings.method).config is None:
        return load_base(task, str(folder), tokenizer, settings.seed)
    base = load_base(task, settings.model, tokenizer, settings.seed)
    with explain(f"cannot load the adapter in {folder} into {settings.model}", (ValueError, TypeError, OSError)):
        return PeftModel.from_pretrained(base, folder)


def measure(
    model: nn.Module, task: Task, tokenizer: PreTrainedTokenizerBase, rows: Encoded
) -> tuple[dict[str, float], np.ndarray]:
    """Loss and metric over ``rows``, and the logits of each (none for a language model: they are many)."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(output_dir=scratch, per_device_eval_batch_size=32, **_plain_arguments(task))
        trainer = Trainer(
            model=model,
            args=arguments,
            data_collator=task.collator(tokenizer),
            compute_metrics=task.compute_metrics,
        )
        _show_progress(trainer, task)
        output = trainer.predict(cast("Dataset[Any]", rows), metric_key_prefix="eval")
    return task.metrics(output.metrics or {}), cast("np.ndarray", output.predictions)


def _training_arguments(settings: RunSettings, task: Task, folder: Path, rows: int) -> TrainingArguments:
    steps = math.ceil(rows / settings.batch_size)
    return TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        warmup_steps=steps * settings.epochs // 20,
        bf16=settings.bf16,
        seed=settings.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=max(steps // LOGS_PER_EPOCH, 1),
        **_plain_arguments(task),
    )


def _plain_arguments(task: Task) -> dict[str, Any]:
    return {
        "report_to": "none",
        "disable_tqdm": True,
        "prediction_loss_only": not task.classifies,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }


def _show_progress(trainer: Trainer, task: Task) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RichProgress(console, task.metric))
