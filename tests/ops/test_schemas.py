"""Every op is there in full: kernels, fake, derivative, reference, documented function, test and benchmark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from peft_ext import ops, reference
from peft_ext._loader import native_devices

ROOT = Path(__file__).parents[2]
NAMES = re.findall(r'm\.def\(\s*"([a-z0-9_]+)\(', (ROOT / "csrc" / "library.cpp").read_text())
PUBLIC = [name for name in NAMES if not name.endswith("_backward")]


@pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["CPU", "Autograd", "Meta"])
def test_registrations(name, key):
    assert hasattr(torch.ops.peft_ext, name)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_ext::{name}", key)


@pytest.mark.parametrize("name", PUBLIC)
def test_function_and_reference(name):
    assert getattr(ops, name).__doc__
    assert callable(getattr(reference, name))


@pytest.mark.parametrize("name", PUBLIC)
def test_files_have_the_ops_name(name):
    for path in (
        f"csrc/autograd/{name}.cpp",
        f"csrc/cpu/{name}.cpp",
        f"peft_ext/ops/{name}.py",
        f"peft_ext/reference/{name}.py",
        f"tests/ops/test_{name}.py",
        f"benchmarks/{name}.py",
    ):
        assert (ROOT / path).is_file(), path


def test_schemas_are_found():
    assert "lora_linear" in PUBLIC
    assert "lora_linear_backward" in NAMES
