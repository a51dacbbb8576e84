"""Runs a benchmark program as its users do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import typer
from typer.testing import CliRunner

Run: TypeAlias = Callable[..., tuple[int, str]]


def runner(main: Callable[..., None], *always: str) -> Run:
    """What gives the exit status and the output, in one line, of ``main`` with the arguments."""
    app = typer.Typer()
    app.command()(main)

    def run(*arguments: str | Path) -> tuple[int, str]:
        result = CliRunner().invoke(app, [*map(str, arguments), *always])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.output.replace("│", " ").split())

    return run
