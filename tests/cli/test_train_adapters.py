"""``peft-ext train`` with bottleneck adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from peft_ext.tuners import PeftConfig


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
def test_it_learns_and_can_be_evaluated(
    command: Callable[..., Result], bert: Path, csv_file: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "run"
    result = command(
        "train", bert, "--train", csv_file, "--eval", csv_file, "--epochs", 30, "--lr", 2e-2, "--batch-size", 16,
        "--max-length", 8, "--method", method, "--reduction-factor", 4, "-o", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    measured = json.loads((out / "metrics.json").read_text())
    assert measured["before"]["accuracy"] < 0.6 < 0.9 < measured["after"]["accuracy"]
    config = PeftConfig.from_pretrained(out)
    assert config.peft_type == method.upper()
    assert config.reduction_factor == 4
    assert command("eval", out, "--data", csv_file).exit_code == 0
