"""``peft-ext compare``: every method on one task and one base model."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from peft_ext.cli.comparison import Row, cells, describe, headings, markdown, summarize
from peft_ext.cli.console import console, print_next, quiet_transformers, require_train_extra
from peft_ext.cli.data import Example, read_examples, sample
from peft_ext.cli.errors import CliError
from peft_ext.cli.methods import METHODS, choose_options, find_method
from peft_ext.cli.run_file import METRICS_FILE, RUN_FILE, RunSettings, read_run, write_json
from peft_ext.cli.train import prepare_output, run

JSON_FILE = "compare.json"
MARKDOWN_FILE = "compare.md"
PLOT_FILE = "compare.png"
FIRST = "head"
"""The yardstick, which is shown first."""


def compare(
    model: Annotated[str, typer.Argument(help="Folder of a transformers model, or its name on the hub.")],
    train_file: Annotated[Path, typer.Option("--train", help="CSV or JSONL file.")],
    eval_file: Annotated[Path, typer.Option("--eval", help="Held-out rows.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for table, plot and every adapter.")],
    methods: Annotated[
        str | None,
        typer.Option(help=f"With commas between, of: {', '.join(METHODS)}. By default all but full."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="With commas between; results are averaged.")] = "0",
    task: Annotated[str, typer.Option(help="seq-cls or causal-lm.")] = "seq-cls",
    text_column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the label.")] = "label",
    limit: Annotated[int | None, typer.Option(min=1, help="Train on at most so many rows, drawn by seed.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a text; the rest is cut off.")] = 128,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    lr: Annotated[float | None, typer.Option(min=0.0, help="By default one that suits each method.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision (bfloat16).")] = False,
) -> None:
    """Compare the methods on one task and one base model.

    Each method trains exactly as by [cyan]peft-ext train --method[/], with its default options, one
    after the other, each in a process of its own. Writes compare.md (a table to paste), compare.png
    and compare.json; each adapter is in OUTPUT/METHOD/seed-SEED.

    Step: the median time of a training step, without evaluation. Peak: how far the process's peak of
    memory (on an accelerator: its allocations) rose above the loaded base model. Size: the weights on
    disk.

    Interrupted, the same command goes on: finished methods are not run again, the one that was
    running resumes from its last finished epoch. More methods or seeds can be added later.

    [dim]Examples:[/]

      [cyan]peft-ext compare bert-base-uncased --train a.csv --eval b.csv -o runs/all[/]

      [cyan]peft-ext compare ./bert --train a.csv --eval b.csv --methods head,lora,full --seeds 0,1,2 -o runs/three[/]
    """
    chosen, seed_list = choose_methods(methods), parse_seeds(seeds)
    require_train_extra()
    from peft_ext.cli.base_model import resolve_source
    from peft_ext.cli.tasks import find_task, task_for

    quiet_transformers()
    labelled = label_column if find_task(task).classifies else None
    rows, held_out = (read_examples(path, text_column, labelled) for path in (train_file, eval_file))
    learning_task = task_for(task, rows)
    runs = [
        RunSettings(
            model=resolve_source(model),
            task=task,
            labels=learning_task.labels,
            text_column=text_column,
            label_column=label_column,
            max_length=max_length,
            method=method,
            options=choose_options(method, {}),
            epochs=epochs,
            batch_size=batch_size,
            lr=find_method(method).lr if lr is None else lr,
            seed=seed,
            bf16=bf16,
            train_rows=len(sample(rows, limit, seed)),
        )
        for method in chosen
        for seed in seed_list
    ]
    table = compare_runs(runs, rows, held_out, output, learning_task.metric)
    last = table[-1].method
    folder = output / last / f"seed-{seed_list[0]}"
    print_next({f"peft-ext eval {folder} --data {eval_file}": f"measure {last}, or any other of them, again"})


def choose_methods(names: str | None) -> list[str]:
    """The methods that ``--methods`` names, the yardstick first; by default all that train an adapter."""
    if names is None:
        chosen = [name for name, method in METHODS.items() if method.config is not None]
    else:
        chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not chosen:
        raise CliError(f"--methods names none: choose from {', '.join(METHODS)}")
    for name in chosen:
        find_method(name)
    return sorted(chosen, key=lambda name: name != FIRST)


def parse_seeds(text: str) -> list[int]:
    """The seeds that ``--seeds`` lists, each once."""
    try:
        seeds = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0:
        raise CliError(f"--seeds must be whole numbers from 0 with commas between, such as 0,1,2; got {text!r}")
    return seeds


def compare_runs(
    runs: list[RunSettings], rows: list[Example], held_out: list[Example], output: Path, metric: str
) -> list[Row]:
    """Runs what has no results yet, then writes and shows the table.

    Raises:
        CliError: if the folder has results of other settings, before anything runs; after the table
            if methods failed.
    """
    folders = [output / settings.method / f"seed-{settings.seed}" for settings in runs]
    for settings, folder in zip(runs, folders, strict=True):
        check_settings(folder, settings)
    failures: dict[str, str] = {}
    for number, (settings, folder) in enumerate(zip(runs, folders, strict=True), start=1):
        console.print(f"\n[dim]{number}/{len(runs)}[/] [bold]{settings.method}[/], seed {settings.seed}")
        if is_finished(folder):
            console.print("  has its results already")
            continue
        try:
            run_apart(settings, sample(rows, settings.train_rows, settings.seed), held_out, folder)
        except CliError as error:
            failures[settings.method] = str(error)
            console.print(f"  [bold red]failed:[/] {escape(str(error))}", soft_wrap=True)
    finished = [(settings, folder) for settings, folder in zip(runs, folders, strict=True) if is_finished(folder)]
    table = summarize([(settings, read_metrics(folder)) for settings, folder in finished], metric)
    if table:
        write_results(output, runs, table, metric, len(held_out))
    if failures:
        raise CliError(f"no results of {'; '.join(f'{method}: {why}' for method, why in failures.items())}")
    return table


def check_settings(folder: Path, settings: RunSettings) -> None:
    """Refuses results of other settings: they would not be comparable."""
    if (folder / RUN_FILE).is_file() and read_run(folder) != settings:
        raise CliError(f"{folder} has a run of other settings: choose another --output, or delete that folder")


def is_finished(folder: Path) -> bool:
    """Whether training there came to its end: metrics are written last."""
    return (folder / METRICS_FILE).is_file()


def read_metrics(folder: Path) -> dict[str, Any]:
    """What training measured."""
    return json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))


def run_apart(settings: RunSettings, rows: list[Example], held_out: list[Example], folder: Path) -> None:
    """Trains in a new process: its peak of memory is that of this run alone.

    Raises:
        CliError: if it fails, in whatever way.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        try:
            pool.submit(run_or_resume, settings, rows, held_out, folder).result()
        except BrokenProcessPool as error:
            raise CliError("the process died, perhaps for want of memory") from error
        except KeyboardInterrupt:
            console.print("\nStopped. The same command goes on from the last finished epoch.")
            raise typer.Exit(130) from None
        except Exception as error:
            raise CliError(f"{type(error).__name__}: {error}") from error


def run_or_resume(settings: RunSettings, rows: list[Example], held_out: list[Example], folder: Path) -> None:
    """What ``peft-ext train`` does, with ``--resume`` if an earlier run left a checkpoint."""
    from peft_ext.cli.tasks import find_task
    from peft_ext.cli.training import checkpoint_to_resume

    quiet_transformers()
    checkpoint = None
    if (folder / RUN_FILE).is_file():
        try:
            checkpoint = checkpoint_to_resume(folder)
        except CliError:
            console.print("  stopped before its first epoch: from the beginning")
    started = (folder / RUN_FILE).is_file()
    prepare_output(folder, settings, resume=checkpoint is not None, overwrite=started and checkpoint is None)
    run(settings, find_task(settings.task)(settings.labels), rows, held_out, folder, checkpoint)


def write_results(output: Path, runs: list[RunSettings], table: list[Row], metric: str, held_out: int) -> None:
    """Writes compare.json, compare.md and compare.png, and shows the table."""
    from peft_ext.cli.plot import plot_comparison

    about = describe(runs, held_out)
    write_json(output / JSON_FILE, {"about": about, "metric": metric, "rows": [vars(row) for row in table]})
    (output / MARKDOWN_FILE).write_text(markdown(table, metric, about), encoding="utf-8")
    plot_comparison(output / PLOT_FILE, table, metric)
    shown = Table(title="Comparison", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for heading in headings(metric):
        shown.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in table:
        shown.add_row(*cells(row))
    console.print(shown)
    console.print(f"{output / MARKDOWN_FILE}, {output / PLOT_FILE}, {output / JSON_FILE}", soft_wrap=True)
