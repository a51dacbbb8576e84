"""What happens when the machine fails: killed processes, a full disk, a folder that cannot be written."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_ext import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

HERE = Path(__file__).parent


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, HERE / "killed_training.py", tmp_path, "50"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] >= 50
    assert counts["runs"] >= 1

    def result(run: str) -> tuple[list[float], bytes]:
        folder = tmp_path / run
        return json.loads((folder / "losses.json").read_text()), (
            folder / "adapter" / "adapter_model.safetensors"
        ).read_bytes()

    whole = result("whole")
    assert len(set(whole[0])) == len(whole[0])
    assert all(
        tensor.any() for tensor in load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors").values()
    )
    for run in range(counts["runs"]):
        assert result(f"run_{run}") == whole


def adapted(seed: int) -> Any:
    torch.manual_seed(seed)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), LoraConfig(target_modules=["0"], r=16))
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_()
    return model


def loaded(folder: Path) -> dict[str, Tensor]:
    return get_peft_model_state_dict(PeftModel.from_pretrained(nn.Sequential(nn.Linear(64, 64)), folder))


def in_child(action: Callable[[], None]) -> None:
    """Runs ``action``, which may change the process, in another one."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("safe", [True, False])
def test_full_disk_leaves_the_last_adapter(tmp_path: Path, safe: bool) -> None:
    """A limit on the size of files is what a process meets as a full disk."""
    first, second = adapted(1), adapted(2)
    first.save_pretrained(tmp_path, safe_serialization=safe)
    expected = get_peft_model_state_dict(first)

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(OSError, match="adapter_model"):
            second.save_pretrained(tmp_path, safe_serialization=safe)

    in_child(save)
    torch.testing.assert_close(loaded(tmp_path), expected, rtol=0, atol=0)
    assert len(list(tmp_path.iterdir())) == 2


def test_folder_that_cannot_be_written() -> None:
    with pytest.raises(OSError, match="/proc/adapter"):
        adapted(1).save_pretrained("/proc/adapter")


def test_killed_while_saving(tmp_path: Path) -> None:
    """At any moment: what is loaded then is the adapter of before or after, never a mixture."""
    first, second = adapted(1), adapted(2)
    before, after = get_peft_model_state_dict(first), get_peft_model_state_dict(second)
    chance, found = random.Random(0), []
    for _ in range(60):
        first.save_pretrained(tmp_path)
        child = os.fork()
        if child == 0:
            second.save_pretrained(tmp_path)
            os._exit(0)
        time.sleep(chance.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        values = loaded(tmp_path)
        found.append(all(torch.equal(values[key], after[key]) for key in after))
        torch.testing.assert_close(values, after if found[-1] else before, rtol=0, atol=0)
    assert False in found


@pytest.mark.parametrize("keep", [0, 7, 100, 3000])
def test_torn_file_is_an_error_that_names_it(tmp_path: Path, keep: int) -> None:
    adapted(1).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        loaded(tmp_path)
