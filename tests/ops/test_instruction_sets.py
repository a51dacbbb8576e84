"""Every kernel of every op in each instruction set that the processor has: the marked tests once more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_ext._loader import native_devices

SETS = ["default", "avx2", "avx512"]
best = torch.backends.cpu.get_cpu_capability().lower()
supported = SETS[: SETS.index(best) + 1] if best in SETS else ["default"]


@pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")
@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_instruction_set(name: str, tmp_path: Path) -> None:
    if name not in supported:
        pytest.skip(f"this processor has no {name}")
    folder = Path(__file__).parent
    choice = ["-m", "each_instruction_set", "-k", "not cuda"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *choice, str(folder)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1", "PEFT_EXT_REQUIRE_NATIVE": "1"},
        cwd=tmp_path,  # the installed package, not the folder of sources without a build
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-4000:]
