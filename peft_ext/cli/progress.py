"""A progress bar for ``transformers.Trainer``, and a line for every epoch."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RichProgress(TrainerCallback):
    """Shows steps and loss while training, rows while evaluating, and the metric after each epoch."""

    def __init__(self, console: Console, metric: str) -> None:
        self.console = console
        self.metric = metric
        self.loss = "-"
        self.bar = self._new_bar()
        self.training: TaskID | None = None
        self.evaluating: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.start()
        self.training = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.training is not None
        self.bar.update(self.training, completed=state.global_step, note=f"loss {self.loss}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.loss = f"{float(logs['loss']):.3f}"

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.evaluating is None:
            self.bar.start()
            self.evaluating = self.bar.add_task("evaluating", total=len(eval_dataloader), note="")
        self.bar.advance(self.evaluating)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._end_evaluation()
        if self.training is not None and metrics is not None:
            measured = {name.removeprefix("eval_"): value for name, value in metrics.items()}
            shown = [f"{name} {measured[name]:.3f}" for name in ("loss", self.metric) if name in measured]
            self.console.print(f"  epoch {state.epoch:.0f}/{args.num_train_epochs:.0f}: held-out {', '.join(shown)}")

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        self._end_evaluation()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar away; a later run starts a new one."""
        self.bar.stop()
        self.bar = self._new_bar()
        self.training = self.evaluating = None

    def _end_evaluation(self) -> None:
        if self.evaluating is not None:
            self.bar.remove_task(self.evaluating)
            self.evaluating = None
        if self.training is None:
            self.close()

    def _new_bar(self) -> Progress:
        return Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
