"""Loading base models and their tokenizers."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from peft_ext.cli.errors import CliError, explain
from peft_ext.cli.tasks import Task

LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError)


def resolve_source(source: str) -> str:
    """An absolute path for a folder, so that the adapter finds its base from anywhere; or a hub name."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CliError(f"model folder {path} has no config.json: it is not a transformers model")
        return str(path.resolve())
    if path.is_absolute() or source.startswith((".", "~")):
        raise CliError(f"model folder {path} does not exist")
    return source


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer, able to pad."""
    with explain(f"cannot load a tokenizer from {source!r}", LOAD_ERRORS):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(task: Task, source: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The base model with a head for ``task``; ``seed`` decides the head's initial values."""
    set_seed(seed)
    with explain(f"cannot load model {source!r} (a folder, or a name on the hub)", LOAD_ERRORS):
        model = task.load_base(source)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model
