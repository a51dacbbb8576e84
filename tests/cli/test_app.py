"""Help, ``info``, and that nothing heavy is imported too early."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import peft_ext
from peft_ext.cli import console, info
from peft_ext.cli.errors import CliError

Run = Callable[..., Result]


@pytest.mark.parametrize("name", ["demo", "train", "eval", "compare", "merge", "info"])
def test_help_shows_examples(command: Run, name: str) -> None:
    result = command(name, "--help")
    assert result.exit_code == 0
    assert result.output.count(f"peft-ext {name}") >= 1
    assert "Examples" in result.output


def test_info(command: Run) -> None:
    result = command("info")
    assert result.exit_code == 0
    for fact in (peft_ext.__version__, "torch", "native ops", "threads"):
        assert fact in result.output


def test_info_shows_the_build(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    build = {"torch": "2.13.0", "compiler": "GCC 12", "cuda": None, "openmp": True}
    facts = peft_ext._loader.describe() | {
        "native": True,
        "native_devices": ["cpu", "meta"],
        "build": build | {"isa_built": ["default", "avx2"], "isa_in_use": "avx512", "amx": True},
    }
    monkeypatch.setattr(info, "describe", lambda: facts)
    output = command("info").output
    assert "cpu, meta" in output
    assert "default, avx2; in use: avx512 with AMX" in output


def test_info_and_help_need_no_train_extra(tmp_path: Path) -> None:
    code = (
        "import sys; from peft_ext.cli import app, info; info.info();"
        "heavy = {'transformers', 'accelerate', 'matplotlib', 'peft'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    # the peft_ext that is tested, whatever the current folder
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, cwd=tmp_path, env=environment
    )


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "TRAIN_EXTRA", ("torch", "no_such_package"))
    with pytest.raises(CliError, match=r'needs no_such_package: pip install "peft_ext\[train\]"'):
        console.require_train_extra()
