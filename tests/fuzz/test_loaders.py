"""A short run of loaders.py; its own usage has a long one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")


def test_damaged_files_are_errors() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, Path(__file__).with_name("loaders.py"), "-runs=5000", "-max_len=200", "-len_control=0"]
    done = subprocess.run([*command, "-seed=1"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DONE" in done.stderr
