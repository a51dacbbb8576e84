"""What is learnt: how a base model is loaded for it, how text becomes input, what is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peft_ext.cli.data import Example, label_names
from peft_ext.cli.errors import CliError
from peft_ext.tuners import TaskType

Encoded = list[dict[str, Any]]


class Task(ABC):
    """What training and evaluation need to know.

    Args:
        labels: names of the classes, in the order of the model's outputs; none for a language model.
    """

    task_type: ClassVar[TaskType]
    auto_class: ClassVar[Any]
    metric: ClassVar[str]
    classifies: ClassVar[bool]

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self.labels = list(labels)

    @abstractmethod
    def load_base(self, source: str) -> PreTrainedModel:
        """The pretrained model, in float32, with this task's head."""

    @abstractmethod
    def encode(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
        """The model's inputs, a dictionary for each text."""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Makes a padded batch of encoded rows."""

    @abstractmethod
    def metrics(self, measured: dict[str, float]) -> dict[str, float]:
        """Loss and :attr:`metric` from what the Trainer measured."""

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """What the Trainer shall measure beside the loss."""
        return {}


class SequenceClassification(Task):
    """One label for each text."""

    task_type = TaskType.SEQ_CLS
    auto_class = AutoModelForSequenceClassification
    metric = "accuracy"
    classifies = True

    def load_base(self, source: str) -> PreTrainedModel:
        return self.auto_class.from_pretrained(
            source,
            id2label=dict(enumerate(self.labels)),
            label2id={label: index for index, label in enumerate(self.labels)},
            # a checkpoint may bring a head for other classes: ours is trained anyway
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )

    def encode(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
        index_of = {label: index for index, label in enumerate(self.labels)}
        unknown = sorted({str(example.label) for example in examples} - index_of.keys())
        if unknown:
            raise CliError(f"the data has labels that were not trained, {unknown}: the model knows {self.labels}")
        tokens = tokenizer([example.text for example in examples], truncation=True, max_length=max_length)
        return [
            {name: values[row] for name, values in tokens.items()} | {"labels": index_of[str(example.label)]}
            for row, example in enumerate(examples)
        ]

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(tokenizer)

    def metrics(self, measured: dict[str, float]) -> dict[str, float]:
        return {"loss": measured["eval_loss"], "accuracy": measured["eval_accuracy"]}

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        predicted = np.argmax(prediction.predictions, axis=-1)
        return {"accuracy": float(np.mean(predicted == prediction.label_ids))}


class CausalLanguageModeling(Task):
    """The next token of each text."""

    task_type = TaskType.CAUSAL_LM
    auto_class = AutoModelForCausalLM
    metric = "perplexity"
    classifies = False

    def load_base(self, source: str) -> PreTrainedModel:
        return self.auto_class.from_pretrained(source, dtype=torch.float32)

    def encode(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
        tokens = tokenizer([example.text for example in examples], truncation=True, max_length=max_length)
        rows = [{"input_ids": ids} for ids in tokens["input_ids"] if len(ids) > 1]
        if not rows:
            raise CliError("no text has two tokens or more: there is no next token to learn")
        return rows

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForLanguageModeling:
        return DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def metrics(self, measured: dict[str, float]) -> dict[str, float]:
        return {"loss": measured["eval_loss"], "perplexity": float(np.exp(measured["eval_loss"]))}


TASKS: dict[str, type[Task]] = {"seq-cls": SequenceClassification, "causal-lm": CausalLanguageModeling}


def find_task(name: str) -> type[Task]:
    """The task that ``--task`` names."""
    if name not in TASKS:
        raise CliError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    return TASKS[name]


def task_for(name: str, examples: Sequence[Example]) -> Task:
    """The task, with the labels that the training rows have."""
    task = find_task(name)
    return task(label_names(examples)) if task.classifies else task()
