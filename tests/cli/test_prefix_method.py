"""Prefix tuning from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import Result

Run = Callable[..., Result]
FAST = ("--batch-size", 16, "--max-length", 8)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_trains_evaluates_and_refuses_to_merge(
    command: Run, kind: str, csv_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "run"
    task = ("--task", "causal-lm") if kind == "gpt2" else ()
    data = ("--train", csv_file, "--eval", csv_file)
    chosen = ("--method", "prefix", "--num-virtual-tokens", 4, "--epochs", 8)
    result = command("train", request.getfixturevalue(kind), *task, *data, *chosen, *FAST, "-o", out)
    assert result.exit_code == 0, result.output
    measured = json.loads((out / "metrics.json").read_text())
    assert measured["after"]["loss"] < measured["before"]["loss"]
    # keys and values of 2 layers of width 32
    assert load_file(out / "adapter_model.safetensors")["prompt_embeddings"].shape == (4, 2 * 2 * 32)
    result = command("eval", out, "--data", csv_file)
    assert result.exit_code == 0, result.output
    result = command("merge", out, tmp_path / "merged")
    assert result.exit_code == 2
    assert "cannot merge" in result.output
    assert not (tmp_path / "merged").exists()
