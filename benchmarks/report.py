"""What a run found: JSON, terminal tables and a bar chart, all from the same rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = TypedDict(
    "Row",
    {
        "op": str,
        "shape": dict[str, float],
        "label": str,  # the shape's sizes joined by commas
        "dtype": str,
        "device": str,
        "threads": int,
        "pass": str,
        "implementation": str,
        "peer": bool,  # whether it computes what ours does, and is not ours
        "ms": float,  # median per call
        "best_ms": float,  # of the fastest round: what to look at while others use the machine
        "spread": float,  # interquartile range of ms, relative to ms
        "ratio": float,  # median of the rounds' ratios to the yardstick
        "ratio_low": float,  # 95% confidence interval of that median
        "ratio_high": float,
        "rounds": int,
        "peak_bytes": "int | None",  # most held at once, of what the call allocated
        "peak_target": "int | None",  # most that is good enough; of ours only
        "floor": float,  # lowest ratio that counted FLOPs or bytes allow
        "floor_ms": "float | None",  # what the counted bytes or FLOPs of ours take at the measured rates
        "target": "float | None",  # highest ratio that is good enough; of ours only
        "verdict": "str | None",  # met, missed, or unclear where noise could turn it
    },
)


class Report(TypedDict):
    """``header`` says where, when and with what the rows were measured, ``failures`` what was wrong and left out."""

    header: dict[str, Any]
    rows: list[Row]
    failures: list[str]


def make_console() -> Console:
    """Wide where there is no terminal, so that tables do not wrap in a file."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def write_json(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def print_report(report: Report, console: Console) -> None:
    """One table for each op, thread count, dtype and pass, then how many targets were met."""
    print_header(report, console)
    rows = report["rows"]
    for panel in unique(map(panel_of, rows)):
        console.print(table([r for r in rows if panel_of(r) == panel], panel))
    for outcome in ("met", "unclear", "missed"):
        console.print(f"time target {outcome}: {sum(r['verdict'] == outcome for r in rows)}", highlight=False)
    for r in rows:
        if r["verdict"] == "missed":
            console.print(f"  {where(r)}: {r['ratio']:.3f}, target {r['target']:.3f}", highlight=False)
        if r["peak_target"] is not None and (r["peak_bytes"] or 0) > r["peak_target"]:
            used, limit = memory_text(r["peak_bytes"]), memory_text(r["peak_target"])
            console.print(f"  {where(r)}: peak of {used} MiB, target {limit} MiB", highlight=False)


def print_header(report: Report, console: Console) -> None:
    console.print(" · ".join(f"{key} {value}" for key, value in report["header"].items()), highlight=False)
    for failure in report["failures"]:
        console.print(f"left out: {failure}", style="red", highlight=False)


def panel_of(row: Row) -> str:
    return f"{row['op']} {row['pass']}, {row['dtype']}, {row['threads']} thread(s)"


def print_summary(report: Report, console: Console) -> None:
    """One line for each problem and pass: the yardstick's time, then ratios of medians."""
    result = Table(box=None, pad_edge=False)
    for column in ("op", "sizes", "dtype", "pass", "yardstick"):
        result.add_column(column)
    for column in ("us", "ours", "floor"):
        result.add_column(column, justify="right")
    result.add_column("peers (times ours)")
    for key in unique((r["op"], r["label"], r["dtype"], r["pass"], r["threads"]) for r in report["rows"]):
        rows = [r for r in report["rows"] if (r["op"], r["label"], r["dtype"], r["pass"], r["threads"]) == key]
        result.add_row(*key[:4], *summary_cells(rows))
    console.print(result, highlight=False)
    print_header(report, console)


def summary_cells(rows: Sequence[Row]) -> list[str]:
    """Yardstick, its microseconds, the ratios to it of ours and the floor, those of the peers and over ours."""
    yardstick = rows[0]
    ours = next((r for r in rows if r["implementation"] == "ours"), None)
    floor = yardstick["floor"] if yardstick["floor_ms"] is None else yardstick["floor_ms"] / yardstick["ms"]
    peers = [
        f"{r['implementation']} {r['ratio']:.2f}" + (f" ({r['ratio'] / ours['ratio']:.2f})" if ours else "")
        for r in rows
        if r["peer"]
    ]
    return [
        yardstick["implementation"],
        f"{1e3 * yardstick['ms']:.1f}",
        f"{ours['ratio']:.3f}" if ours else "-",
        f"{floor:.3f}",
        ", ".join(peers),
    ]


def where(row: Row) -> str:
    return f"{row['label']} {row['pass']}, {row['dtype']}, {row['threads']} thread(s)"


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
            *(ratio_text(by_name[name], yardstick) for name in names[1:]),
            "" if target is None else f"{target:.2f}",
            outcome,
            ", ".join(memory_text(by_name[name]["peak_bytes"]) for name in names),
        )
    return result


def ratio_text(row: Row, yardstick: Row) -> str:
    """Median ratio, half its interval, and the ratio of the fastest rounds."""
    half = (row["ratio_high"] - row["ratio_low"]) / 2
    return f"{row['ratio']:.3f} ±{half:.2f} [{row['best_ms'] / yardstick['best_ms']:.2f}]"


def memory_text(peak_bytes: int | None) -> str:
    return "-" if peak_bytes is None else f"{peak_bytes / 2**20:.2f}"


def write_plot(report: Report, path: Path, made_of: str = "") -> None:
    """Bars of the ratio to the yardstick, one panel for each op, thread count, dtype and pass.

    The file says what it is ``made_of``.
    """
    from matplotlib.figure import Figure

    rows = report["rows"]
    panels = unique(map(panel_of, rows))
    shapes = len(unique(r["label"] for r in rows))
    width = min(max(7.0, 1.9 * shapes), 60.0)
    figure = Figure(figsize=(width, 3.5 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False).flat, panels, strict=True):
        draw(axes, [r for r in rows if panel_of(r) == panel])
        axes.set_title(panel, loc="left")
    figure.savefig(path, dpi=120, metadata={"Source": made_of})


def draw(axes: Axes, rows: Sequence[Row]) -> None:
    labels = unique(r["label"] for r in rows)
    yardstick, *names = unique(r["implementation"] for r in rows)
    bar_width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        bars = [r for r in rows if r["implementation"] == name]
        axes.bar(
            [labels.index(r["label"]) + (i - (len(names) - 1) / 2) * bar_width for r in bars],
            [r["ratio"] for r in bars],
            bar_width,
            yerr=[[r["ratio"] - r["ratio_low"] for r in bars], [r["ratio_high"] - r["ratio"] for r in bars]],
            label=name,
        )
    floors = {labels.index(r["label"]): r["floor"] for r in rows}
    axes.hlines(list(floors.values()), [x - 0.45 for x in floors], [x + 0.45 for x in floors], "black", label="floor")
    axes.set_xticks(range(len(labels)), labels, rotation=90 if len(labels) > 12 else 0)
    axes.set_xlabel(",".join(rows[0]["shape"]))
    axes.set_ylim(0.8, 1.15 * max(r["ratio"] for r in rows))  # error bars of a noisy run may leave it
    axes.set_ylabel(f"time / {yardstick}")
    axes.legend(ncols=len(names) + 1, fontsize="small")


def unique(items: Iterable[Any]) -> list[Any]:
    """Without repeats, in order of first appearance."""
    return list(dict.fromkeys(items))
