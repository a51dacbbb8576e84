"""``peft-ext compare``: what it runs, measures, writes, and takes up again."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from peft_ext.cli import compare
from peft_ext.cli.comparison import Row, cells, markdown, summarize
from peft_ext.cli.errors import CliError
from peft_ext.cli.measures import PeakMemory, StepTimes
from peft_ext.cli.methods import METHODS
from peft_ext.cli.plot import plot_comparison
from peft_ext.cli.run_file import RunSettings

Run = Callable[..., Result]
FAST = ("--batch-size", 16, "--max-length", 8, "--limit", 32)


class Here:
    """Stands in for a process pool: runs in this process, but passes everything through pickle."""

    def __init__(self, **_: Any) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(pickle.loads(pickle.dumps(function))(*pickle.loads(pickle.dumps(arguments))))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "ProcessPoolExecutor", Here)


@pytest.fixture
def arguments(bert: Path, csv_file: Path, tmp_path: Path) -> tuple[object, ...]:
    return (bert, "--train", csv_file, "--eval", csv_file, "-o", tmp_path / "out", *FAST)


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text())


@pytest.mark.slow
def test_runs_in_processes_of_their_own(command: Run, arguments: tuple[object, ...], tmp_path: Path) -> None:
    # a peak of this process, which must not be taken for the new one's
    torch.ones(1 << 29, dtype=torch.uint8)
    result = command("compare", *arguments, "--methods", "lora", "--epochs", 1)
    assert result.exit_code == 0, result.output
    (row,) = written(tmp_path / "out")["rows"]
    assert row["step_seconds"] > 0
    assert row["peak_memory"] > 0


def test_table_plot_and_adapters(command: Run, in_process: None, arguments: tuple[object, ...], tmp_path: Path) -> None:
    chosen = ("--methods", "lora,head,full", "--seeds", "0,1", "--epochs", 1)
    result = command("compare", *arguments, *chosen)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    results = written(out)
    head, lora, full = results["rows"]
    assert [row["method"] for row in results["rows"]] == ["head", "lora", "full"]
    assert head["trained_parameters"] == (32 * 32 + 32) + (32 * 2 + 2)
    assert lora["trained_parameters"] == head["trained_parameters"] + 2 * 2 * 2 * 8 * 32
    assert head["file_size"] < lora["file_size"] < full["file_size"]
    assert [row["lr"] for row in results["rows"]] == [METHODS[name].lr for name in ("head", "lora", "full")]
    assert results["about"]["seeds"] == [0, 1]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "| lora | " in (out / "compare.md").read_text()
    per_seed = [json.loads((out / "lora" / f"seed-{seed}" / "metrics.json").read_text()) for seed in (0, 1)]
    assert lora["metric"] == pytest.approx(sum(measured["after"]["accuracy"] for measured in per_seed) / 2)
    assert command("eval", out / "full" / "seed-0", "--data", arguments[2]).exit_code == 0
    result = command("merge", out / "full" / "seed-0", tmp_path / "merged")
    assert result.exit_code == 2
    assert "plain transformers model already" in result.output


def test_a_run_equals_that_of_train(
    command: Run, in_process: None, arguments: tuple[object, ...], bert: Path, csv_file: Path, tmp_path: Path
) -> None:
    assert command("compare", *arguments, "--methods", "lora", "--epochs", 1, "--seeds", 3).exit_code == 0
    out = tmp_path / "train"
    result = command(
        "train", bert, "--train", csv_file, "--eval", csv_file, "-o", out, *FAST, "--epochs", 1, "--seed", 3
    )
    assert result.exit_code == 0, result.output
    for name in ("adapter_model.safetensors", "run.json"):
        assert (out / name).read_bytes() == (tmp_path / "out" / "lora" / "seed-3" / name).read_bytes()


def test_goes_on_where_it_was_interrupted(
    command: Run,
    in_process: None,
    arguments: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft_ext.cli.progress import RichProgress

    chosen = ("--methods", "head,lora", "--epochs", 2)
    assert command("compare", *arguments, "--methods", "head", "--epochs", 2).exit_code == 0
    head = tmp_path / "out" / "head" / "seed-0" / "metrics.json"
    before = head.stat()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RichProgress, "on_save", interrupt)
        result = command("compare", *arguments, *chosen)
    assert result.exit_code == 130
    assert "goes on" in result.output
    resumed: list[str | None] = []
    train = compare.run
    monkeypatch.setattr(compare, "run", lambda *args: resumed.append(args[-1]) or train(*args))
    result = command("compare", *arguments, *chosen)
    assert result.exit_code == 0, result.output
    assert "has its results already" in result.output
    assert os.stat(head).st_mtime_ns == before.st_mtime_ns
    (checkpoint,) = resumed
    assert checkpoint is not None and checkpoint.endswith("checkpoint-2")


def test_begins_again_without_a_whole_checkpoint(
    command: Run, in_process: None, arguments: tuple[object, ...], tmp_path: Path
) -> None:
    chosen = ("--methods", "head", "--epochs", 1)
    assert command("compare", *arguments, *chosen).exit_code == 0
    folder = tmp_path / "out" / "head" / "seed-0"
    (folder / "metrics.json").unlink()
    (checkpoint,) = (folder / "checkpoints").iterdir()
    (checkpoint / "trainer_state.json").unlink()
    result = command("compare", *arguments, *chosen)
    assert result.exit_code == 0, result.output
    assert "from the beginning" in result.output


def test_other_settings_are_refused(
    command: Run, in_process: None, arguments: tuple[object, ...], tmp_path: Path
) -> None:
    assert command("compare", *arguments, "--methods", "head", "--epochs", 1).exit_code == 0
    before = (tmp_path / "out" / "compare.json").read_bytes()
    result = command("compare", *arguments, "--methods", "lora,head", "--epochs", 2)
    assert result.exit_code == 2
    assert "run of other settings" in result.output
    assert not (tmp_path / "out" / "lora").exists(), "it ran before it looked"
    assert (tmp_path / "out" / "compare.json").read_bytes() == before


def test_one_method_fails_and_the_others_are_shown(
    command: Run,
    in_process: None,
    arguments: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("no place for it")

    monkeypatch.setitem(METHODS, "lora", type(METHODS["lora"])(refuse, lr=1e-3))
    result = command("compare", *arguments, "--methods", "lora,head", "--epochs", 1)
    assert result.exit_code == 2
    assert "no place for it" in result.output
    assert [row["method"] for row in written(tmp_path / "out")["rows"]] == ["head"]


ARGUMENT_ERRORS = {
    ("--methods", "head,lroa"): "unknown method 'lroa'",
    ("--methods", ","): "--methods names none",
    ("--seeds", "0,x"): "whole numbers",
    ("--seeds", "-1"): "whole numbers",
}


@pytest.mark.parametrize(("wrong", "message"), ARGUMENT_ERRORS.items(), ids=ARGUMENT_ERRORS.values())
def test_argument_errors(
    command: Run, arguments: tuple[object, ...], tmp_path: Path, wrong: tuple[str, str], message: str
) -> None:
    result = command("compare", *arguments, *wrong)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_by_default_all_adapters_and_the_head_first() -> None:
    chosen = compare.choose_methods(None)
    assert chosen[0] == "head"
    assert set(chosen) == METHODS.keys() - {"full"}


def test_process_that_dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def die(*_: Any) -> None:
        raise compare.BrokenProcessPool

    monkeypatch.setattr(compare, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(Here, "submit", die)
    with pytest.raises(CliError, match="want of memory"):
        compare.run_apart(RunSettings("m", "seq-cls", []), [], [], tmp_path)


def test_step_time_is_the_median_without_what_lies_between() -> None:
    ticks = iter([0.0, 1.0, 50.0, 52.0, 90.0, 99.0])
    steps = StepTimes(clock=lambda: next(ticks))
    assert steps.median is None
    for _ in range(3):
        steps.on_step_begin()
        steps.on_step_end()
    assert steps.seconds == [1.0, 2.0, 9.0]
    assert steps.median == 2.0


@pytest.mark.skipif(torch.accelerator.is_available(), reason="measures memory of the CPU")
def test_memory_counts_from_the_loaded_model() -> None:
    memory = PeakMemory(torch.nn.Linear(4, 4))
    before = memory.above()
    size = 1 << 28
    torch.ones(size, dtype=torch.uint8)
    # the process may have been larger once, in an earlier test
    assert 0 <= before <= memory.above() <= before + size + (1 << 26)


def measured(accuracy: float, step: float | None) -> dict[str, Any]:
    return {
        "after": {"accuracy": accuracy},
        "step_seconds": step,
        "peak_memory": 3 << 20,
        "trained_parameters": 1234,
        "file_size": 2048,
    }


def test_means_over_seeds_and_missing_step_times(tmp_path: Path) -> None:
    lora = RunSettings("m", "seq-cls", [], method="lora", lr=2e-3)
    head = RunSettings("m", "seq-cls", [], method="head", lr=1e-3)
    results = [(head, measured(0.5, None)), (lora, measured(0.6, 0.1)), (lora, measured(0.8, 0.3))]
    table = summarize(results, "accuracy")
    assert table[0] == Row("head", 1e-3, 0.5, None, 1234, None, 3 << 20, 2048)
    assert cells(table[0]) == ["head", "1,234", "0.500", "-", "3", "2", "0.001"]
    assert cells(table[1]) == ["lora", "1,234", "0.700 ± 0.141", "200", "3", "2", "0.002"]
    plot_comparison(tmp_path / "plot.png", table, "accuracy")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    about = {
        "model": "models/bert", "train_rows": 9, "held_out_rows": 4, "epochs": 1, "batch_size": 2, "max_length": 8,
        "seeds": [0, 1], "versions": {"torch": "2"}, "machine": "m", "date": "d",
    }  # fmt: skip
    lines = markdown(table, "accuracy", about).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[3].count("|")
    assert lines[-1] == "bert: 9 training rows, 4 held out, 1 epochs, batch 2, length 8, seeds 0, 1; torch 2; m; d."
