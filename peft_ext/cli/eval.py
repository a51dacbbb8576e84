"""``peft-ext eval``: measure a saved adapter on a CSV or JSONL file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from peft_ext.cli.console import console, key_value_table, quiet_transformers, require_train_extra
from peft_ext.cli.data import Example, read_examples, sample
from peft_ext.cli.errors import CliError
from peft_ext.cli.run_file import describe_adapter

if TYPE_CHECKING:
    import numpy as np

MAX_CLASSES_SHOWN = 12


def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    data: Annotated[Path, typer.Option("--data", help="CSV or JSONL file.")],
    model: Annotated[str | None, typer.Option(help="Base model, if not the recorded one.")] = None,
    text_column: Annotated[str | None, typer.Option(help="By default that of the training.")] = None,
    label_column: Annotated[str | None, typer.Option(help="By default that of the training.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Write text, label, prediction and probability of each row (JSONL).")
    ] = None,
) -> None:
    """Measure a saved adapter on a CSV or JSONL file.

    Prints loss and accuracy with the confusion counts (or the perplexity of a language model).

    [dim]Examples:[/]

      [cyan]peft-ext eval runs/reviews --data test.csv[/]

      [cyan]peft-ext eval runs/reviews --data test.csv --predictions out.jsonl[/]

      [cyan]peft-ext eval runs/reviews --data test.csv --model ./bert[/]
    """
    require_train_extra()
    from peft_ext.cli.base_model import load_tokenizer, resolve_source
    from peft_ext.cli.tasks import find_task
    from peft_ext.cli.training import load_trained, measure

    quiet_transformers()
    settings = describe_adapter(adapter, model and resolve_source(model))
    task = find_task(settings.task)(settings.labels)
    if predictions is not None and not task.classifies:
        raise CliError("--predictions is for classifiers; this adapter is a language model's")
    labelled = label_column or settings.label_column if task.classifies else None
    examples = sample(read_examples(data, text_column or settings.text_column, labelled), limit, settings.seed)
    tokenizer = load_tokenizer(str(adapter) if (adapter / "tokenizer_config.json").is_file() else settings.model)
    rows = task.encode(examples, tokenizer, settings.max_length)
    trained = load_trained(settings, task, tokenizer, adapter)
    metrics, logits = measure(trained, task, tokenizer, rows)
    shown = {name: f"{value:.4f}" for name, value in metrics.items()}
    console.print(key_value_table(str(adapter), {"rows": str(len(rows)), **shown}))
    if not task.classifies:
        return
    truth = [row["labels"] for row in rows]
    console.print(confusion_table(task.labels, truth, logits.argmax(-1).tolist()))
    if predictions is not None:
        write_predictions(predictions, examples, task.labels, logits)
        console.print(f"predictions: {predictions}", soft_wrap=True)


def confusion_table(labels: Sequence[str], truth: Sequence[int], predicted: Sequence[int]) -> Table:
    """Counts of each true class (rows) by predicted class (columns); the first classes if there are many."""
    table = Table(title="true class by predicted class", title_justify="left", title_style="bold")
    shown = range(min(len(labels), MAX_CLASSES_SHOWN))
    table.add_column("", no_wrap=True)
    for column in shown:
        table.add_column(labels[column], justify="right", overflow="fold")
    pairs = list(zip(truth, predicted, strict=True))
    for row in shown:
        table.add_row(labels[row], *(str(pairs.count((row, column))) for column in shown))
    return table


def write_predictions(path: Path, examples: Sequence[Example], labels: Sequence[str], logits: np.ndarray) -> None:
    """One JSON object a row, with the probability that the model gives to its prediction."""
    import torch

    probability, index = torch.from_numpy(logits).double().softmax(-1).max(-1)
    with path.open("w", encoding="utf-8") as file:
        for example, p, i in zip(examples, probability.tolist(), index.tolist(), strict=True):
            row = {**example._asdict(), "prediction": labels[i], "probability": round(p, 6)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
