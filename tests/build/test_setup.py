import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peft_ext

ROOT = Path(__file__).parents[2]


def run_setup(**environment):
    command = [sys.executable, "setup.py", "-q", "--version"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_a_cpu_build_can_be_forced_and_the_decision_is_printed():
    result = run_setup(PEFT_EXT_FORCE_CUDA="0")
    decision, *_, version = result.stdout.splitlines()
    assert decision.startswith("peft_ext: building for CPU only (torch.version.cuda=")
    assert version == peft_ext.__version__


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_cuda_build_cannot_be_forced_without_a_cuda_torch():
    result = run_setup(PEFT_EXT_FORCE_CUDA="1")
    assert result.returncode == 1
    assert "PEFT_EXT_FORCE_CUDA=1, but a CUDA build is not possible: torch.version.cuda=None" in result.stderr
