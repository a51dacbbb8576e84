"""``peft-ext merge``: turn a base model and an adapter into a plain transformers model."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from peft_ext.cli.console import console, key_value_table, print_next, quiet_transformers, require_train_extra
from peft_ext.cli.errors import CliError, explain
from peft_ext.cli.run_file import describe_adapter, is_full_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peft_ext.tuners import PeftModel

SAMPLE = (
    "A short sentence.",
    "The second one is somewhat longer, and has a clause of its own.",
    "Nobody expected the third, which is why it was kept.",
)


def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    out: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    model: Annotated[str | None, typer.Option(help="Base model, if not the recorded one.")] = None,
) -> None:
    """Turn a base model and an adapter into a plain transformers model.

    The result needs neither peft_ext nor the base model. The command prints how far the outputs of
    the merged model are from those of base and adapter; only rounding should be left.

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
    peft_model = load_trained(settings, task, tokenizer, adapter).eval()
    unmerged = _sample_logits(peft_model, tokenizer)
    with peft_model.disable_adapter():  # BitFit's biases are in place of the base model's otherwise
        base_weights = _adapted_weights(peft_model)
    with explain(f"cannot merge {adapter}"):
        merged = peft_model.merge_and_unload()
    changes = {name: (merged.get_parameter(name) - weight).abs().max().item() for name, weight in base_weights.items()}
    difference = (_sample_logits(merged, tokenizer) - unmerged).abs().max().item()
    save_model(merged, tokenizer, out)
    rows = {
        "weights changed": f"{sum(map(bool, changes.values()))}, by at most {max(changes.values(), default=0.0):.3g}",
        "outputs": f"within {difference:.3g} of the unmerged model's",
        "model": str(out),
    }
    console.print(key_value_table("Merged", rows))
    loader = task.auto_class.__name__
    print_next({f"from transformers import {loader}; {loader}.from_pretrained({str(out)!r})": "load it in Python"})


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Writes model and tokenizer beside ``out``, then renames: ``out`` is whole or not there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with explain(f"cannot write {out}", (OSError,)):
            model.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            staged.chmod(0o755)
            os.replace(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _adapted_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """Copies of the base weights that merging changes, under the names that the plain model has."""
    marker = ".base_layer."
    named = model.get_base_model().named_parameters()
    return {name.replace(marker, "."): weight.detach().clone() for name, weight in named if marker in name}


@torch.no_grad()
def _sample_logits(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    inputs = tokenizer(list(SAMPLE), return_tensors="pt", padding=True)
    real = inputs["attention_mask"].bool()
    logits: torch.Tensor = model(**inputs).logits
    return logits[real] if logits.dim() == 3 else logits
