"""The results of a comparison, and how they are shown."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from peft_ext.cli.run_file import RunSettings


@dataclass(frozen=True)
class Row:
    """A method's results: means over the seeds, in seconds and bytes; None where nothing was measured."""

    method: str
    lr: float
    metric: float
    deviation: float | None
    trained_parameters: int
    step_seconds: float | None
    peak_memory: float
    file_size: int


def summarize(results: list[tuple[RunSettings, dict[str, Any]]], metric: str) -> list[Row]:
    """One row a method: means over its seeds."""
    by_method: dict[str, list[tuple[RunSettings, dict[str, Any]]]] = {}
    for settings, measured in results:
        by_method.setdefault(settings.method, []).append((settings, measured))
    return [_row(method, entries, metric) for method, entries in by_method.items()]


def _row(method: str, entries: list[tuple[RunSettings, dict[str, Any]]], metric: str) -> Row:
    measured = [result for _, result in entries]
    values = [result["after"][metric] for result in measured]
    steps = [result["step_seconds"] for result in measured if result["step_seconds"] is not None]
    return Row(
        method=method,
        lr=entries[0][0].lr,
        metric=fmean(values),
        deviation=stdev(values) if len(values) > 1 else None,
        trained_parameters=measured[0]["trained_parameters"],
        step_seconds=fmean(steps) if steps else None,
        peak_memory=fmean(result["peak_memory"] for result in measured),
        file_size=measured[0]["file_size"],
    )


def describe(runs: list[RunSettings], held_out: int) -> dict[str, Any]:
    """What the figures depend on beside the methods."""
    first = runs[0]
    return {
        "model": first.model,
        "task": first.task,
        "train_rows": first.train_rows,
        "held_out_rows": held_out,
        "epochs": first.epochs,
        "batch_size": first.batch_size,
        "max_length": first.max_length,
        "bf16": first.bf16,
        "seeds": sorted({settings.seed for settings in runs}),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "date": date.today().isoformat(),
    }


def headings(metric: str) -> list[str]:
    """The columns of the table."""
    return ["method", "trained", metric, "step ms", "peak MiB", "size KiB", "lr"]


def cells(row: Row) -> list[str]:
    """A row as text, in the units of :func:`headings`."""
    deviation = "" if row.deviation is None else f" ± {row.deviation:.3f}"
    return [
        row.method,
        f"{row.trained_parameters:,}",
        f"{row.metric:.3f}{deviation}",
        "-" if row.step_seconds is None else f"{1e3 * row.step_seconds:.0f}",
        f"{row.peak_memory / 2**20:.0f}",
        f"{row.file_size / 2**10:,.0f}",
        f"{row.lr:g}",
    ]


def markdown(table: list[Row], metric: str, about: dict[str, Any]) -> str:
    """A table to paste, and a line of what it depends on."""
    lines = [headings(metric), ["---"] + ["---:"] * (len(headings(metric)) - 1), *map(cells, table)]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    seeds = ", ".join(map(str, about["seeds"]))
    caption = (
        f"{Path(about['model']).name}: {about['train_rows']} training rows, {about['held_out_rows']} held out, "
        f"{about['epochs']} epochs, batch {about['batch_size']}, length {about['max_length']}, seeds {seeds}; "
        f"{versions}; {about['machine']}; {about['date']}."
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{caption}\n"
