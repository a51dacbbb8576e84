"""The picture of a run, and of a comparison."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from peft_ext.cli.tasks import Task
from peft_ext.serialization.atomic import write_together

if TYPE_CHECKING:
    from peft_ext.cli.comparison import Row


def plot_run(path: Path, history: list[dict[str, Any]], task: Task, before: dict[str, float]) -> None:
    """Writes a PNG: training and held-out loss beside the held-out metric, over epochs.

    Args:
        path: file to write.
        history: the Trainer's ``state.log_history``.
        task: names the metric.
        before: what was measured before training.
    """
    train = [(entry["epoch"], entry["loss"]) for entry in history if "loss" in entry]
    held_out = [(0.0, before)] + [(e["epoch"], task.metrics(e)) for e in history if "eval_loss" in e]
    epochs = [epoch for epoch, _ in held_out]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, metrics = figure.subplots(1, 2)
    losses.plot(*zip(*train, strict=True), label="training")
    losses.plot(epochs, [measured["loss"] for _, measured in held_out], marker="o", label="held-out")
    losses.set(xlabel="epoch", ylabel="loss")
    losses.legend()
    metrics.plot(epochs, [measured[task.metric] for _, measured in held_out], marker="o", color="tab:green")
    metrics.set(xlabel="epoch", ylabel=f"held-out {task.metric}")
    for axes in (losses, metrics):
        axes.grid(alpha=0.3)
    write_together({path: partial(figure.savefig, format="png", dpi=120)})


def plot_comparison(path: Path, rows: list[Row], metric: str) -> None:
    """Writes a PNG: a bar for each method in a panel for each measure.

    Args:
        path: file to write.
        rows: a method each; the first is the yardstick, drawn through the panel of the metric.
        metric: its name.
    """
    panels = {
        f"held-out {metric}": [row.metric for row in rows],
        "trained parameters": [row.trained_parameters for row in rows],
        "step (ms)": [1e3 * (row.step_seconds or 0.0) for row in rows],
        "memory above the model (MiB)": [row.peak_memory / 2**20 for row in rows],
        "size on disk (KiB)": [row.file_size / 2**10 for row in rows],
    }
    figure = Figure(figsize=(3 * len(panels), 1.2 + 0.35 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    names = [row.method for row in rows]
    all_axes = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, values) in zip(all_axes, panels.items(), strict=True):
        axes.barh(names, values, color="tab:blue")
        axes.set(xlabel=title)
        axes.grid(axis="x", alpha=0.3)
    metrics, parameters, *_, sizes = all_axes
    deviations = [row.deviation or 0.0 for row in rows]
    metrics.errorbar([row.metric for row in rows], names, xerr=deviations, fmt="none", color="k")
    metrics.axvline(rows[0].metric, color="tab:gray", linestyle="--")
    metrics.invert_yaxis()
    for axes in (parameters, sizes):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())  # its labels would overlap
    write_together({path: partial(figure.savefig, format="png", dpi=120)})
