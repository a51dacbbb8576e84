"""The command line: ``peft-ext demo | train | eval | compare | merge | convert | info``, one file each."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from peft_ext.cli import compare, convert, demo, info, merge, train
from peft_ext.cli import eval as evaluation
from peft_ext.cli.console import print_error
from peft_ext.cli.errors import CliError


class _Commands(TyperGroup):
    """Shows a :class:`CliError` as its message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CliError as error:
            print_error(error)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="""Fine-tune transformers models with small adapters, on native ops.

    Start with [cyan]peft-ext demo[/]: it needs no data and no download.
    """,
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("eval")(evaluation.evaluate)
app.command("compare")(compare.compare)
app.command("merge")(merge.merge)
app.command("convert")(convert.convert)
app.command("info")(info.info)


def main() -> None:
    """Runs the command line: the entry point of ``peft-ext``."""
    app()
