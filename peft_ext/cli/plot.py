"""The picture of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from peft_ext.cli.tasks import Task
from peft_ext.serialization.atomic import write_together


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
