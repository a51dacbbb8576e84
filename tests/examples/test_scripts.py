"""Every script in examples/ runs as it is, and prints what it promises. The server has tests of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PRINTED = {
    "lora_linear": r"step 100: loss 0\.0\d",
    "bert_classifier": r"equal after loading: True",
    "accelerate_peft": r"4 layers on lora_linear, 0 left\nsame outputs: True",
}


def test_every_script_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PRINTED, "serve_adapters"}


@pytest.mark.parametrize("name", PRINTED)
def test_script(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTED[name], done.stdout), done.stdout
