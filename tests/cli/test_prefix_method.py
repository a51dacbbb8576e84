"""Prefix tuning and P-tuning v2 from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import Result

Run = Callable[..., Result]
FAST = ("--batch-size", 16, "--max-length", 8)


@pytest.mark.parametrize("method", ["prefix", "ptuning-v2"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_trains_evaluates_and_refuses_to_merge(
    command: Run, kind: str, method: str, csv_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "run"
    task = ("--task", "causal-lm") if kind == "gpt2" else ()
    data = ("--train", csv_file, "--eval", csv_file)
    chosen = ("--method", method, "--num-virtual-tokens", 4, "--epochs", 8)
    result = command("train", request.getfixturevalue(kind), *task, *data, *chosen, *FAST, "-o", out)
    assert result.exit_code == 0, result.output
    assert "peft-ext eval" in result.output
    assert "peft-ext merge" not in result.output
    measured = json.loads((out / "metrics.json").read_text())
    assert measured["after"]["loss"] < measured["before"]["loss"]
    # keys and values of 2 layers of width 32
    saved = load_file(out / "adapter_model.safetensors")
    assert saved["prompt_embeddings"].shape == (4, 2 * 2 * 32)
    assert ("prompt_encoder.gate" in saved) == (method == "ptuning-v2")
    result = command("eval", out, "--data", csv_file)
    assert result.exit_code == 0, result.output
    result = command("merge", out, tmp_path / "merged")
    assert result.exit_code == 2
    assert "cannot merge" in result.output
    assert not (tmp_path / "merged").exists()
