"""Where the commands write, and the silence around it."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peft_ext.cli.errors import CliError

TRAIN_EXTRA = ("transformers", "accelerate", "matplotlib")

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)


def print_error(error: CliError) -> None:
    """Shows a mistake on stderr."""
    error_console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)


def print_next(commands: dict[str, str]) -> None:
    """What to type next: a command, and what it is good for."""
    console.print("\n[bold]Next[/]")
    for command, purpose in commands.items():
        console.print(f"  [dim]# {purpose}[/]")
        console.print(f"  [cyan]{escape(command)}[/]", soft_wrap=True)


def key_value_table(title: str, rows: dict[str, str]) -> Table:
    """A table of two columns without a header."""
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, escape(value))
    return table


def require_train_extra() -> None:
    """Raises a CliError if what training needs is not installed."""
    missing = [name for name in TRAIN_EXTRA if find_spec(name) is None]
    if missing:
        raise CliError(f'this command needs {", ".join(missing)}: pip install "peft_ext[train]"')


def quiet_transformers() -> None:
    """Hides what transformers reports on every load (a new head, progress of reading a file)."""
    from transformers.utils import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*(pin_memory|lr_scheduler.step).*")
