"""Prompts from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import Result

from peft_ext.tuners import PeftConfig, PromptTuningConfig

Run = Callable[..., Result]
FAST = ("--batch-size", 16, "--max-length", 8)


@pytest.mark.parametrize("method", ["prompt", "ptuning"])
def test_trains_evaluates_and_refuses_to_merge(
    command: Run, bert: Path, csv_file: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "run"
    data = ("--train", csv_file, "--eval", csv_file)
    chosen = ("--method", method, "--num-virtual-tokens", 4, "--epochs", 12, "--lr", 1e-2)
    result = command("train", bert, *data, *chosen, *FAST, "-o", out)
    assert result.exit_code == 0, result.output
    measured = json.loads((out / "metrics.json").read_text())
    assert measured["after"]["loss"] < measured["before"]["loss"]
    assert load_file(out / "adapter_model.safetensors")["prompt_embeddings"].shape == (4, 32)
    result = command("eval", out, "--data", csv_file)
    assert result.exit_code == 0, result.output
    assert f"{measured['after']['loss']:.4f}" in result.output
    result = command("merge", out, tmp_path / "merged")
    assert result.exit_code == 2
    assert "cannot merge" in result.output
    assert not (tmp_path / "merged").exists()


def test_language_model(command: Run, gpt2: Path, csv_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    task = ("--task", "causal-lm", "--method", "prompt", "--num-virtual-tokens", 4, "--epochs", 1)
    result = command("train", gpt2, "--train", csv_file, *task, *FAST, "-o", out)
    assert result.exit_code == 0, result.output
    config = PeftConfig.from_pretrained(out)
    assert isinstance(config, PromptTuningConfig)
    assert (config.num_virtual_tokens, config.token_dim, config.num_layers) == (4, 32, 2)
