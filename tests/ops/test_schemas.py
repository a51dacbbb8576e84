"""Every op is there in full: kernels, fake, derivative, reference, documented function, test and benchmark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from peft_ext import ops, reference
from peft_ext._loader import native_devices
from peft_ext.distributed import sharding

ROOT = Path(__file__).parents[2]
NAMES = re.findall(r'm\.def\(\s*"([a-z0-9_]+)\(', (ROOT / "csrc" / "library.cpp").read_text())
PUBLIC = [name for name in NAMES if not name.endswith("_backward")]


@pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["CPU", "Autograd", "AutocastCPU", "AutocastCUDA", "Meta"])
def test_registrations(name, key):
    assert hasattr(torch.ops.peft_ext, name)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_ext::{name}", key)


@pytest.mark.skipif("cuda" not in native_devices, reason="this build has no CUDA kernels")
@pytest.mark.parametrize("name", NAMES)
def test_cuda_registrations(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_ext::{name}", "CUDA")


@pytest.mark.parametrize("name", PUBLIC)
def test_function_and_reference(name):
    assert getattr(ops, name).__doc__
    assert callable(getattr(reference, name))


@pytest.mark.parametrize("name", PUBLIC)
def test_files_have_the_ops_name(name):
    for path in (
        f"csrc/autograd/{name}.cpp",
        f"csrc/cpu/{name}.cpp",
        f"csrc/cuda/{name}.cu",
        f"peft_ext/ops/{name}.py",
        f"peft_ext/reference/{name}.py",
        f"tests/ops/test_{name}.py",
        f"benchmarks/{name}.py",
    ):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("name", PUBLIC)
def test_runs_in_each_instruction_set(name):
    assert "@pytest.mark.each_instruction_set\n" in (ROOT / f"tests/ops/test_{name}.py").read_text()


JUNK = {
    "Tensor": torch.ones(1),
    "Optional[Tensor]": None,
    "List[Tensor]": [torch.ones(1)],
    "bool": True,
    "float": 1.0,
    "List[float]": [],
    "str": "",
}


@pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_an_explicit_error(name):
    """There is no derivative for it, and none is not zero. Whatever else is wrong with the arguments comes later."""
    op = getattr(torch.ops.peft_ext, name).default
    arguments = op._schema.arguments
    junk = [[True] * (a.N or 1) if str(a.type) == "List[bool]" else JUNK[str(a.type)] for a in arguments]
    for i, argument in enumerate(arguments):
        if "Tensor" not in str(argument.type) or argument.name in ("seed", "residual", "index"):
            continue

        def call(tensor, i=i):
            return op(*junk[:i], [tensor] if isinstance(junk[i], list) else tensor, *junk[i + 1 :])

        with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"):
            torch.func.jvp(call, (torch.ones(1),), (torch.ones(1),))


@pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")
def test_every_op_with_a_derivative_has_layouts_and_a_batching_rule():
    differentiable = {name for name in NAMES if name not in ("lora_merge_", "lora_unmerge_")}
    assert sharding.RULES.keys() == differentiable
    for name in differentiable:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_ext::{name}", "FuncTorchBatched")


def test_schemas_are_found():
    assert "lora_linear" in PUBLIC
    assert "lora_linear_backward" in NAMES
