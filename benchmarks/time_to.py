"""How long training takes to reach an accuracy or a loss on real data: ``python benchmarks/time_to.py minilm --help``.

All libraries train in one process, from the same start on the same batches: in every step each takes its turn, in an
order drawn anew, so a clock that drifts hits all alike. Only steps are timed, not evaluations.
"""

from __future__ import annotations

import csv
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import e2e_minilm
import e2e_smollm2
import torch
import typer
from measure import SEED, no_garbage_collection
from model_tasks import HEAD, ModelShape, assign
from registry import Dtypes, Tensors
from report import make_console
from rich.progress import track
from rich.table import Table
from run import header, parse_threads, split
from torch.nn import functional as F
from whole_model import QUANTIZED, WholeModel, as_called, make

LIBRARIES = ("eager", "hf_peft", "ours", "ours_accelerated")
COMPILED = ("compiled", "ours_compiled")
"""On request; the first step takes as long as torch.compile does, and counts."""
ON_REQUEST = (*COMPILED, *QUANTIZED)
LOSS_TOLERANCE = 1e-4
"""By how much of it the losses of the first step may differ; on a base in fewer bits by its error."""
Batch: TypeAlias = Mapping[str, Any]
Point: TypeAlias = dict[str, float]
"""An evaluation: steps and seconds before it, loss, accuracy."""


@dataclass(frozen=True)
class Goal:
    """What a model is trained to.

    Args:
        whole: the model.
        metric: what is evaluated: ``accuracy``, which grows, or ``loss``, which falls.
        target: where training stops by default.
        read: tokens of the rows of a file, with labels.
        batch, length, learning_rate: defaults.
    """

    whole: WholeModel
    metric: str
    target: float
    read: Callable[[Path, int], list[Batch]]
    batch: int
    length: int
    learning_rate: float


def read_sentences(path: Path, length: int) -> list[Batch]:
    """Rows of a CSV file with the columns ``text`` and ``label``, in the order of the labels' names."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = sorted({row["label"] for row in rows})
    if len(labels) != e2e_minilm.CLASSES:
        raise ValueError(f"{path}: got {len(labels)} labels, want {e2e_minilm.CLASSES}")
    tokens = tokenizer(e2e_minilm.WHOLE)(
        [row["text"] for row in rows], truncation=True, max_length=length, padding="max_length", return_tensors="pt"
    )
    targets = [labels.index(row["label"]) for row in rows]
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(label)}
        for ids, mask, label in zip(tokens["input_ids"], tokens["attention_mask"], targets, strict=True)
    ]


def read_text(path: Path, length: int) -> list[Batch]:
    """Pieces of ``length`` tokens, one after the other."""
    ids = tokenizer(e2e_smollm2.WHOLE)(path.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    return [{"input_ids": piece, "labels": piece} for piece in ids[: len(ids) // length * length].view(-1, length)]


def tokenizer(whole: WholeModel) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(whole.folder())


GOALS = {
    "minilm": Goal(e2e_minilm.WHOLE, "accuracy", 0.78, read_sentences, batch=32, length=48, learning_rate=2e-3),
    "smollm2": Goal(e2e_smollm2.WHOLE, "loss", 4.35, read_text, batch=4, length=128, learning_rate=1e-3),
}


@dataclass
class Run:
    """One library's training."""

    model: Any
    optimizer: torch.optim.Optimizer
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)

    def step(self, batch: Batch) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.seconds += time.perf_counter() - start
        return loss.item()


def prepare(goal: Goal, library: str, learning_rate: float) -> Run:
    """The model as LoRA begins: B = 0, no dropout; all libraries get the same values."""
    t = start_values(goal.whole)
    model = make(library, goal.whole, ModelShape(goal.batch, goal.length), t)
    trained = assign(model, t)
    return Run(as_called(library, model), torch.optim.AdamW(trained.values(), lr=learning_rate))


def start_values(whole: WholeModel) -> Tensors:
    benchmark = {"minilm": e2e_minilm, "smollm2": e2e_smollm2}[whole.name]
    torch.manual_seed(SEED)
    t = benchmark.make_tensors(ModelShape(1, 1), Dtypes.parse("float32"))
    return {
        key: torch.zeros_like(tensor) if key.endswith("lora_B") else tensor
        for key, tensor in t.items()
        if "lora_" in key or key.startswith(HEAD)
    }


def stack(rows: Sequence[Batch]) -> Batch:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def batches(rows: Sequence[Batch], size: int) -> Iterator[Batch]:
    """For ever, in an order drawn anew in each epoch."""
    order, shuffle = list(range(len(rows))), random.Random(SEED).shuffle
    while True:
        shuffle(order)
        for start in range(0, len(order) - size + 1, size):
            yield stack([rows[i] for i in order[start : start + size]])


@torch.no_grad()
def evaluate(model: Any, rows: Sequence[Batch], size: int) -> dict[str, float]:
    """Mean loss, and the share of right labels (of next tokens, where there are such)."""
    losses, right, count = 0.0, 0, 0
    model.eval()
    for start in range(0, len(rows), size):
        batch = stack(rows[start : start + size])
        found = model(**batch)
        logits, labels = found.logits, batch["labels"]
        if logits.dim() == 3:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        losses += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum())
        count += labels.numel()
    model.train()
    return {"loss": losses / count, "accuracy": right / count}


def train(
    goal: Goal,
    runs: Mapping[str, Run],
    rows: Sequence[Batch],
    held_out: Sequence[Batch],
    every: int,
    steps: int,
    target: float,
) -> Iterator[int]:
    """Until every library has reached the target, or so many steps; yields after each.

    Raises:
        ValueError: where the losses of the first step differ, so that times would not compare.
    """
    supply, order = batches(rows, goal.batch), list(runs)
    shuffle = random.Random(SEED).shuffle
    for step in range(1, steps + 1):
        batch = next(supply)
        shuffle(order)
        with no_garbage_collection():
            losses = {name: runs[name].step(batch) for name in order}
        same = [loss for name, loss in losses.items() if name not in QUANTIZED]
        if step == 1 and same and max(same) - min(same) > LOSS_TOLERANCE * max(same):
            raise ValueError(f"the first losses differ: {losses}")
        if step % every == 0 or step == steps:
            for run in runs.values():
                found = evaluate(run.model, held_out, goal.batch)
                run.curve.append({"steps": step, "seconds": run.seconds, **found})
        yield step
        if all(reached_at(run.curve, goal.metric, target) for run in runs.values()):
            return


def reached_at(curve: Sequence[Point], metric: str, target: float) -> Point | None:
    """The first evaluation that is good enough: accuracy grows, a loss falls."""
    sign = 1 if metric == "accuracy" else -1
    return next((point for point in curve if sign * point[metric] >= sign * target), None)


COLUMNS = ("library", "steps", "seconds", "ms a step", "last value")


def summary(curves: Mapping[str, Sequence[Point]], metric: str, target: float) -> list[list[str]]:
    """Cells of each library in the order of COLUMNS."""
    rows = []
    for name, curve in curves.items():
        point, last = reached_at(curve, metric, target), curve[-1]
        reached = [f"{point['steps']:.0f}", f"{point['seconds']:.1f}"] if point else ["-", "not reached"]
        rows.append([name, *reached, f"{1e3 * last['seconds'] / last['steps']:.0f}", f"{last[metric]:.3f}"])
    return rows


def table(goal: Goal, curves: Mapping[str, Sequence[Point]], target: float) -> Table:
    result = Table(title=f"{goal.whole.name}: {goal.metric} {target:g}", title_justify="left")
    for column in COLUMNS:
        result.add_column(column, justify="left" if column == "library" else "right")
    for cells in summary(curves, goal.metric, target):
        result.add_row(*cells)
    return result


def main(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(GOALS)}.")],
    train_file: Annotated[
        Path, typer.Option("--train", exists=True, help="CSV of text and label; for smollm2 plain text.")
    ],
    eval_file: Annotated[
        Path | None, typer.Option("--eval", exists=True, help="Held out; by default the last rows of --train.")
    ] = None,
    target: Annotated[float | None, typer.Option(help="Accuracy (minilm) or loss (smollm2) to reach.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Four steps, wherever they lead.")] = False,
    libraries: Annotated[str, typer.Option(help=f"Comma-separated; also {', '.join(ON_REQUEST)}.")] = ",".join(
        LIBRARIES
    ),
    steps: Annotated[int, typer.Option(min=1, help="At most so many.")] = 200,
    every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 5,
    eval_rows: Annotated[int, typer.Option(min=1, help="At most so many held-out rows.")] = 320,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    threads: Annotated[str, typer.Option(help="A thread count.")] = "1",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write header and curves here.")] = None,
) -> None:
    """Trains LoRA in every library at once until a target is reached on held-out data, and reports the time of each."""
    names = split(libraries)
    if quick:
        steps, every, eval_rows = 4, 2, 32
    try:
        if model not in GOALS:
            raise ValueError(f"model: got {model!r}, want one of {', '.join(GOALS)}")
        for name in names:
            if name not in LIBRARIES + ON_REQUEST:
                raise ValueError(f"libraries: got {name!r}, want some of {', '.join(LIBRARIES + ON_REQUEST)}")
        torch.set_num_threads(parse_threads(threads))
        goal = GOALS[model]
        rows = goal.read(train_file, goal.length)
        held_out = goal.read(eval_file, goal.length)[:eval_rows] if eval_file else rows[-eval_rows:]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    rows = rows if eval_file else rows[:-eval_rows]
    if len(rows) < goal.batch:
        raise typer.BadParameter(f"train: got {len(rows)} rows to train on, want at least a batch of {goal.batch}")
    wanted = goal.target if target is None else target
    console = make_console()
    runs = {name: prepare(goal, name, learning_rate or goal.learning_rate) for name in names}
    for _ in track(train(goal, runs, rows, held_out, every, steps, wanted), "training", total=steps, console=console):
        pass
    curves = {name: run.curve for name, run in runs.items()}
    console.print(table(goal, curves, wanted))
    if json_path:
        about = {"model": model, "metric": goal.metric, "target": wanted, "threads": torch.get_num_threads()}
        report = {"header": header(torch.device("cpu")) | about, "runs": curves}
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
