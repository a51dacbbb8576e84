"""``peft-ext merge``: turn a base model and an adapter into a plain transformers model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.table import Table

from peft_ext.cli.console import console, key_value_table, print_next, quiet_transformers, require_train_extra
from peft_ext.cli.errors import CliError, explain
from peft_ext.cli.run_file import describe_adapter, is_full_model
from peft_ext.tuners.merge_report import MergeReport, call_with, output_errors, output_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLE = (
    "A short sentence.",
    "The second one is somewhat longer, and has a clause of its own.",
    "Nobody expected the third, which is why it was kept.",
)
TOLERANCE = 1e-3


def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    out: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    model: Annotated[str | None, typer.Option(help="Base model, if not the recorded one.")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="How far outputs may move, by the largest one; nothing is written else.")
    ] = TOLERANCE,
) -> None:
    """Turn a base model and an adapter into a plain transformers model.

    The result needs neither peft_ext nor the base model. The command prints which weights changed, and
    by how much. It reads the new folder back, and compares its outputs with those of base and
    adapter: only rounding should be left.

    [dim]Examples:[/]

      [cyan]peft-ext merge runs/reviews reviews-model[/]

      [cyan]peft-ext merge runs/reviews reviews-model --model ./bert[/]
    """
    require_train_extra()
    from peft_ext.cli.base_model import load_tokenizer, resolve_source
    from peft_ext.cli.tasks import find_task
    from peft_ext.cli.training import load_trained

    quiet_transformers()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CliError(f"{out} exists and is not an empty folder: choose another one")
    if is_full_model(adapter):
        raise CliError(f"{adapter} was trained in full: it is a plain transformers model already")
    settings = describe_adapter(adapter, model and resolve_source(model))
    task = find_task(settings.task)(settings.labels)
    tokenizer = load_tokenizer(str(adapter) if (adapter / "tokenizer_config.json").is_file() else settings.model)
    peft_model: Any = load_trained(settings, task, tokenizer, adapter).eval()
    inputs = tokenizer(list(SAMPLE), return_tensors="pt", padding=True)
    unmerged = _outputs(peft_model, inputs)
    with explain(f"cannot merge {adapter}"):
        report = peft_model.merge_report()
        merged = peft_model.merge_and_unload()
    console.print(change_table(report))

    def check(folder: Path) -> tuple[float, float]:
        errors = output_errors(_outputs(task.auto_class.from_pretrained(folder).eval(), inputs), unmerged)
        if not errors[1] <= tolerance:
            raise CliError(
                f"the merged model's outputs are up to {errors[0]:.3g} away from those of base and adapter, "
                f"{errors[1]:.2%} of the largest: nothing is written (weights that layers share can be the cause; "
                f"--tolerance is {tolerance:g})"
            )
        return errors

    error, relative = save_model(merged, tokenizer, out, check)
    rows = {
        "weights changed": f"{sum(weight.change != 0 for weight in report.weights)}, by at most {report.change:.3g}",
        "outputs": f"within {error:.3g} of the unmerged model's, {relative:.2g} of the largest",
        "model": str(out),
    }
    console.print(key_value_table("Merged", rows))
    loader = task.auto_class.__name__
    print_next({f"from transformers import {loader}; {loader}.from_pretrained({str(out)!r})": "load it in Python"})


def change_table(report: MergeReport) -> Table:
    """The weights that merging changes most."""
    heading, *changes, whole = report.rows()
    table = Table(title="Largest changes", title_justify="left", title_style="bold")
    for index, column in enumerate(heading):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    for change in changes:
        table.add_row(*change)
    table.add_section()
    table.add_row(*whole)
    return table


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    check: Callable[[Path], tuple[float, float]],
) -> tuple[float, float]:
    """Writes model and tokenizer beside ``out``, checks what was written, then renames: ``out`` is whole or not there.

    Returns:
        What ``check`` does, which is called with the folder.
    """
    out = out.resolve()  # a folder can be put in the place of an empty one, but not of a link to one
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with explain(f"cannot write {out}", (OSError,)):
            model.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            staged.chmod(0o755)
        result = check(staged)
        with explain(f"cannot write {out}", (OSError,)):
            os.replace(staged, out)
        return result
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@torch.no_grad()
def _outputs(model: torch.nn.Module, inputs: Any) -> list[torch.Tensor]:
    return output_tensors(call_with(model, inputs))
