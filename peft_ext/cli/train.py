"""``peft-ext train``: fine-tune a transformers model on a CSV or JSONL file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_ext.cli.console import console, key_value_table, print_next, quiet_transformers, require_train_extra
from peft_ext.cli.data import Example, hold_out, read_examples, sample
from peft_ext.cli.errors import CliError
from peft_ext.cli.methods import METHODS, choose_options, find_method, option_help
from peft_ext.cli.run_file import RUN_FILE, RunSettings, check_same_run, write_run

if TYPE_CHECKING:
    from peft_ext.cli.tasks import Task
    from peft_ext.cli.training import RunResult

DATA = "Data"
ADAPTER = "Adapter"
TRAINING = "Training"


def train(
    model: Annotated[str, typer.Argument(help="Folder of a transformers model, or its name on the hub.")],
    train_file: Annotated[Path, typer.Option("--train", help="CSV or JSONL file.", rich_help_panel=DATA)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter, metrics and plot.")],
    eval_file: Annotated[
        Path | None, typer.Option("--eval", help="Held-out rows; else part of --train.", rich_help_panel=DATA)
    ] = None,
    eval_fraction: Annotated[
        float,
        typer.Option(min=0.01, max=0.9, help="Part of --train to hold out, without --eval.", rich_help_panel=DATA),
    ] = 0.2,
    task: Annotated[str, typer.Option(help="seq-cls or causal-lm.", rich_help_panel=DATA)] = "seq-cls",
    text_column: Annotated[str, typer.Option(help="Column of the text.", rich_help_panel=DATA)] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the label.", rich_help_panel=DATA)] = "label",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Train on at most so many rows, drawn by --seed.", rich_help_panel=DATA)
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens of a text; the rest is cut off.", rich_help_panel=DATA)
    ] = 128,
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(METHODS)}.", rich_help_panel=ADAPTER)] = "lora",
    rank: Annotated[
        int | None, typer.Option(min=1, help=option_help("rank", "Rank of the update."), rich_help_panel=ADAPTER)
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help=option_help("alpha", "The update is scaled by alpha / rank."), rich_help_panel=ADAPTER),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help=option_help("dropout", "On the adapter's input."), rich_help_panel=ADAPTER),
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            help=option_help(
                "target_modules",
                "Names with commas between, or all-linear; by default the usual ones of the model's type.",
            ),
            rich_help_panel=ADAPTER,
        ),
    ] = None,
    rslora: Annotated[
        bool | None,
        typer.Option(
            "--rslora", help=option_help("rslora", "Scale by alpha / sqrt(rank) instead."), rich_help_panel=ADAPTER
        ),
    ] = None,
    reduction_factor: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=option_help("reduction_factor", "The bottleneck is the model's width divided by this."),
            rich_help_panel=ADAPTER,
        ),
    ] = None,
    num_virtual_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=option_help("num_virtual_tokens", "Length of the trained prefix or prompt."),
            rich_help_panel=ADAPTER,
        ),
    ] = None,
    side_layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=option_help("side_layers", "How many of the model's first layers the side network has."),
            rich_help_panel=ADAPTER,
        ),
    ] = None,
    modules_to_save: Annotated[
        str | None,
        typer.Option(
            help="Modules to train in full, with commas between; by default the head and the pooler.",
            rich_help_panel=ADAPTER,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, rich_help_panel=TRAINING)] = 3,
    batch_size: Annotated[int, typer.Option(min=1, rich_help_panel=TRAINING)] = 32,
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="By default one that suits the method.", rich_help_panel=TRAINING)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=TRAINING)] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision (bfloat16).", rich_help_panel=TRAINING)] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last finished epoch.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --output.")] = False,
) -> None:
    """Fine-tune a transformers model on a CSV or JSONL file.

    Writes the adapter (Hugging Face PEFT's format), metrics.json and training.png.

    [dim]Examples:[/]

      [cyan]peft-ext train bert-base-uncased --train reviews.csv -o runs/reviews[/]

      [cyan]peft-ext train ./gpt2 --task causal-lm --train notes.jsonl --lr 5e-4 -o runs/notes[/]

      [cyan]peft-ext train ./bert --train a.csv --eval b.csv --rank 16 --epochs 5 -o runs/a --resume[/]
    """
    chosen = {
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "target_modules": target_modules,
        "rslora": rslora,
        "reduction_factor": reduction_factor,
        "num_virtual_tokens": num_virtual_tokens,
        "side_layers": side_layers,
        "modules_to_save": modules_to_save,
    }
    require_train_extra()
    from peft_ext.cli.base_model import resolve_source
    from peft_ext.cli.tasks import find_task, task_for
    from peft_ext.cli.training import checkpoint_to_resume

    quiet_transformers()
    labelled = label_column if find_task(task).classifies else None
    rows = read_examples(train_file, text_column, labelled)
    if eval_file is None:
        rows, held_out = hold_out(sample(rows, None, seed), eval_fraction)
    else:
        held_out = read_examples(eval_file, text_column, labelled)
    rows = sample(rows, limit, seed)
    learning_task = task_for(task, rows)
    settings = RunSettings(
        model=resolve_source(model),
        task=task,
        labels=learning_task.labels,
        text_column=text_column,
        label_column=label_column,
        max_length=max_length,
        method=method,
        options=choose_options(method, chosen),
        epochs=epochs,
        batch_size=batch_size,
        lr=find_method(method).lr if lr is None else lr,
        seed=seed,
        bf16=bf16,
        train_rows=len(rows),
    )
    prepare_output(output, settings, resume, overwrite)
    checkpoint = checkpoint_to_resume(output) if resume else None
    try:
        result = run(settings, learning_task, rows, held_out, output, checkpoint)
    except KeyboardInterrupt:
        console.print("\nStopped. The same command with --resume goes on from the last finished epoch.")
        raise typer.Exit(130) from None
    show_result(result, learning_task, output)
    data = f" --data {eval_file}" if eval_file is not None else " --data FILE"
    steps = {f"peft-ext eval {output}{data}": "measure it on other data"}
    if find_method(method).merges:
        steps[f"peft-ext merge {output} {output}-model"] = "make it a plain transformers model"
    print_next(steps)


def prepare_output(folder: Path, settings: RunSettings, resume: bool, overwrite: bool) -> None:
    """Makes the output folder; refuses to mix two runs, or to delete what is not one."""
    if resume and overwrite:
        raise CliError("--resume and --overwrite exclude each other")
    if folder.exists() and not folder.is_dir():
        raise CliError(f"--output {folder} is a file")
    is_run = (folder / RUN_FILE).is_file()
    if resume:
        if not is_run:
            raise CliError(f"--resume: {folder} holds no run of peft-ext train")
        check_same_run(folder, settings)
    elif folder.is_dir() and any(folder.iterdir()):
        if not is_run:
            raise CliError(f"--output {folder} is not empty and holds no run of peft-ext train: choose another folder")
        if not overwrite:
            raise CliError(
                f"--output {folder} holds an earlier run: choose another folder, "
                "or go on with it (peft-ext train ... --resume) or replace it (peft-ext train ... --overwrite)"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_run(folder, settings)


def run(
    settings: RunSettings,
    task: Task,
    rows: list[Example],
    held_out: list[Example],
    folder: Path,
    checkpoint: str | None = None,
) -> RunResult:
    """Says what is about to happen, then trains."""
    from peft_ext.cli.training import train_adapter

    console.print(
        f"[bold]{settings.method}[/] on {settings.model}\n"
        f"  {len(rows)} training rows, {len(held_out)} held out, {settings.epochs} epochs, "
        f"batch {settings.batch_size}, learning rate {settings.lr:g}",
        soft_wrap=True,
    )
    return train_adapter(settings, task, rows, held_out, folder, checkpoint)


def show_result(result: RunResult, task: Task, folder: Path) -> None:
    """The summary that ends a run."""
    from peft_ext.cli.training import PLOT_FILE

    share = 100 * result.trained / result.total
    rows = {
        "trained": f"{result.trained:,} of {result.total:,} parameters ({share:.2f} %)",
        f"held-out {task.metric}": f"{result.before[task.metric]:.3f} before, {result.after[task.metric]:.3f} after",
        "held-out loss": f"{result.before['loss']:.3f} before, {result.after['loss']:.3f} after",
        "time": f"{result.seconds:.0f} s of training",
        "adapter": str(folder),
        "plot": str(folder / PLOT_FILE),
    }
    console.print(key_value_table("Result", rows))
