"""Profiles of what ops do on a device."""

from __future__ import annotations

from types import SimpleNamespace

import device_profile
import pytest
import torch
from command import runner
from rich.console import Console

run = runner(device_profile.main)
on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.gpu
@on_device
def test_kernels_of_an_op() -> None:
    code, output = run("quantized_linear", "--passes", "inference")
    assert code == 0, output
    assert "quantized_linear 1,4096,4096,8,0 bfloat16 inference: ours" in output
    assert "inference: frozen" in output and "multiply" in output


def test_a_table_is_of_one_call() -> None:
    events = [
        SimpleNamespace(key=name, count=20, device_time_total=us) for name, us in (("gemm", 123.0), ("fill", 4.0))
    ]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(device_profile.table("lora_linear", events))
    lines = captured.get().splitlines()
    assert lines[0].strip() == "lora_linear, 12.7 us"
    assert any(line.split()[1:6:2] == ["12.3", "2", "gemm"] for line in lines)
    assert not any("fill" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device() -> None:
    code, output = run("lora_linear")
    assert code == 2 and "there is no CUDA device" in output


@pytest.mark.gpu
@on_device
def test_an_op_that_there_is_none_of() -> None:
    code, output = run("lora")
    assert code == 2 and "op: got 'lora'" in output
