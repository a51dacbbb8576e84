"""``peft-ext convert``: an adapter from one checkpoint format into another."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from peft_ext.cli.console import console, print_next
from peft_ext.cli.errors import CliError, explain
from peft_ext.serialization.atomic import write_together
from peft_ext.tuners.adapterhub.layouts import Report
from peft_ext.tuners.conversion import base_of
from peft_ext.tuners.conversion import convert as convert_adapter

_ERRORS = (OSError, ValueError, TypeError)


class Format(str, Enum):
    """Where to."""

    PEFT = "peft"
    ADAPTERHUB = "adapterhub"
    PEFT_EXT = "peft_ext"


_LOADERS = {
    Format.PEFT: "import peft; peft.PeftModel.from_pretrained(base, {path!r})",
    Format.ADAPTERHUB: "import adapters; adapters.init(base); base.load_adapter({path!r}, set_active=True)",
    Format.PEFT_EXT: "import peft_ext; peft_ext.PeftModel.from_pretrained(base, {path!r})",
}
_SETUP_LOADER = "import adapters; adapters.init(base); base.load_adapter_setup({path!r}, set_active=True)"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the adapter; only read.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New folder for the converted one.")],
    to: Annotated[Format, typer.Option("--to", help="peft_ext: PEFT's layout, with the methods that it lacks.")],
    base: Annotated[Path | None, typer.Option(help="Base model's folder, or its config.json.")] = None,
    name: Annotated[str | None, typer.Option(help="Adapter's name in AdapterHub; DST's by default.")] = None,
    drop_head: Annotated[bool, typer.Option("--drop-head", help="Leave the head, and modules_to_save, out.")] = False,
    safetensors: Annotated[
        bool, typer.Option("--safetensors", help="For AdapterHub too, instead of .bin: needs use_safetensors=True.")
    ] = False,
) -> None:
    """Convert an adapter between Hugging Face PEFT, AdapterHub, and peft_ext.

    Reads either format. Prints what went over, and what is lost in training only. If anything that outputs depend on
    has no counterpart, nothing is written, and the exit status is 2. The base model's weights are not needed; of a
    prefix or a prompt for AdapterHub its configuration is (--base).

    [dim]Examples:[/]

      [cyan]peft-ext convert ./sst2-adapter ./sst2 --to peft_ext[/]

      [cyan]peft-ext convert runs/reviews reviews-hub --to adapterhub --base ./roberta[/]
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CliError(f"{destination} exists and is not an empty folder: choose another one")
    report = Report()
    with explain(f"cannot convert {source}", _ERRORS):
        model = base_of(base)
        if base is not None and model is None:
            raise ValueError(f"--base {str(base)!r} has no config.json")
        chosen = name or re.sub(r"\W", "_", destination.resolve().name) or "default"
        try:
            files = convert_adapter(
                source,
                destination,
                to.value,
                base=model,
                name=chosen,
                keep_head=not drop_head,
                safe=safetensors or None,
                report=report,
            )
        finally:
            _show(report, source)
        write_together(files)
    is_setup = any(path.name == "adapter_setup.json" for path in files)
    loader = _SETUP_LOADER if is_setup else _LOADERS[to]
    print_next({loader.format(path=str(destination)): "load it in Python"})


def _show(report: Report, source: Path) -> None:
    if not (report.mapped or report.notes or report.problems):
        return
    table = Table(title=str(source), title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for what, as_what in report.mapped:
        table.add_row("maps", escape(f"{what} → {as_what}"))
    for note in report.notes:
        table.add_row("note", escape(note))
    for problem in report.problems:
        table.add_row("[red]cannot map[/]", escape(problem))
    console.print(table)
