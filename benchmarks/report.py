"""What a run found: JSON, terminal tables and a bar chart, all from the same rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Console
from rich.table import Table

Row = TypedDict(
    "Row",
    {
        "op": str,
        "shape": dict[str, float],
        "label": str,  # the shape's sizes joined by commas
        "dtype": str,
        "threads": int,
        "pass": str,
        "implementation": str,
        "ms": float,  # median per call
        "spread": float,  # interquartile range of ms, relative to ms
        "ratio": float,  # median of the rounds' ratios to the yardstick
        "ratio_low": float,  # 95% confidence interval of that median
        "ratio_high": float,
        "rounds": int,
        "peak_bytes": "int | None",
        "floor": float,  # lowest ratio that counted FLOPs or bytes allow
        "target": "float | None",  # highest ratio that is good enough; of ours only
        "verdict": "str | None",  # met, missed, or unclear where noise could turn it
    },
)


class Report(TypedDict):
    """``header`` says where, when and with what the rows were measured."""

    header: dict[str, Any]
    rows: list[Row]


def write_json(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def print_report(report: Report, console: Console) -> None:
    """One table for each thread count, dtype and pass, then how many targets were met."""
    console.print(" · ".join(f"{key} {value}" for key, value in report["header"].items()), highlight=False)
    rows = report["rows"]
    for threads, dtype, pass_name in unique((r["threads"], r["dtype"], r["pass"]) for r in rows):
        chosen = [r for r in rows if (r["threads"], r["dtype"], r["pass"]) == (threads, dtype, pass_name)]
        console.print(table(chosen, f"{chosen[0]['op']} {pass_name}, {dtype}, {threads} thread(s)"))
    for outcome in ("met", "unclear", "missed"):
        chosen = [r for r in rows if r["verdict"] == outcome]
        console.print(f"target {outcome}: {len(chosen)}", highlight=False)
    for r in chosen:
        where = f"{r['label']} {r['pass']}, {r['dtype']}, {r['threads']} thread(s)"
        console.print(f"  {where}: {r['ratio']:.3f}, target {r['target']:.3f}", highlight=False)


def table(rows: Sequence[Row], title: str) -> Table:
    names = unique(r["implementation"] for r in rows)
    result = Table(title=title, title_justify="left")
    result.add_column(",".join(rows[0]["shape"]))
    for column in [f"{names[0]} ms", "floor", *names[1:], "target", "", f"peak MiB: {', '.join(names)}"]:
        result.add_column(column, justify="right")
    for label in unique(r["label"] for r in rows):
        by_name = {r["implementation"]: r for r in rows if r["label"] == label}
        yardstick = by_name[names[0]]
        target, outcome = next(((r["target"], r["verdict"]) for r in by_name.values() if r["verdict"]), (None, None))
        result.add_row(
            label,
            f"{yardstick['ms']:.3f} ±{yardstick['spread'] / 2:.0%}",
            f"{yardstick['floor']:.2f}",
            *(ratio_text(by_name[name]) for name in names[1:]),
            "" if target is None else f"{target:.2f}",
            outcome,
            ", ".join(memory_text(by_name[name]["peak_bytes"]) for name in names),
        )
    return result


def ratio_text(row: Row) -> str:
    return f"{row['ratio']:.3f} ±{(row['ratio_high'] - row['ratio_low']) / 2:.3f}"


def memory_text(peak_bytes: int | None) -> str:
    return "-" if peak_bytes is None else f"{peak_bytes / 2**20:.2f}"


def write_plot(report: Report, path: Path) -> None:
    """Bars of the ratio to the yardstick, one panel for each thread count, dtype and pass."""
    from matplotlib.figure import Figure

    rows = report["rows"]
    panels = unique((r["threads"], r["dtype"], r["pass"]) for r in rows)
    names = unique(r["implementation"] for r in rows)[1:]
    labels = unique(r["label"] for r in rows)
    figure = Figure(figsize=(max(6.0, 1.6 * len(labels)), 3.2 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        chosen = [r for r in rows if (r["threads"], r["dtype"], r["pass"]) == panel]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            bars = [r for r in chosen if r["implementation"] == name]
            axes.bar(
                [labels.index(r["label"]) + (i - (len(names) - 1) / 2) * width for r in bars],
                [r["ratio"] for r in bars],
                width,
                yerr=[[r["ratio"] - r["ratio_low"] for r in bars], [r["ratio_high"] - r["ratio"] for r in bars]],
                label=name,
            )
        floors = {labels.index(r["label"]): r["floor"] for r in chosen}
        ends = [x - 0.45 for x in floors], [x + 0.45 for x in floors]
        axes.hlines(list(floors.values()), *ends, "black", label="floor")
        axes.set_xticks(range(len(labels)), labels)
        axes.set_ylim(bottom=0.8)
        axes.set_ylabel("time / frozen layer")
        axes.set_title(f"{chosen[0]['op']} {panel[2]}, {panel[1]}, {panel[0]} thread(s)", loc="left")
        axes.legend(ncols=len(names) + 1, fontsize="small")
    axes.set_xlabel(",".join(rows[0]["shape"]))
    figure.savefig(path, dpi=120)


def unique(items: Iterable[Any]) -> list[Any]:
    """Without repeats, in order of first appearance."""
    return list(dict.fromkeys(items))
