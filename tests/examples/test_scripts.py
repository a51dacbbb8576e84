"""Every script in examples/ runs as it is, and prints what it promises. The server has tests of its own."""

from __future__ import annotations

import re
import runpy
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
def test_script(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(PRINTED[name], capsys.readouterr().out)
