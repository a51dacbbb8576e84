"""Several processes compute what one does. The processes run the scripts beside this file, under torchrun."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from peft_ext import PeftModel, get_peft_model_state_dict

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def loaded(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


scale, script = loaded(ROOT / "benchmarks" / "scale.py"), loaded(HERE / "train.py")


def torchrun(processes: int, script: str, *arguments: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [*command, HERE / script, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.mark.parametrize("processes", [2, 4])
def test_every_op_in_every_layout(processes):
    torchrun(processes, "layouts.py")


def train(way: str, processes: int, folder: Path) -> dict[str, Any]:
    output = folder / f"{way}_{processes}.pt"
    torchrun(processes, "train.py", way, output)
    results: dict[str, Any] = torch.load(output)
    return results


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict[str, Any]:
    return train("alone", 1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("way", ["ddp", "fsdp", "tensor_parallel"])
def test_training(way, processes, one_process, tmp_path):
    """Losses and gradients are those of one process; sent is what docs/scale.md counts, of gradients the adapters'."""
    several = train(way, processes, tmp_path)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(several["losses"], one_process["losses"], **close)
    torch.testing.assert_close(several["gradients"], one_process["gradients"], **close)
    assert one_process["losses"][-1] < one_process["losses"][0]

    model = scale.Model.of("small", script.model_config())
    plan = scale.Plan(model, processes, 1, way == "fsdp", tokens=0, rank=script.RANK, targets=script.TARGETS)
    sent = several["sent"]
    if way == "ddp":
        assert sent["allreduce_"] == plan.adapters
    elif way == "fsdp":
        assert sent["_reduce_scatter_base_"] == plan.adapters
        assert sent["_allgather_base_"] * processes == plan.gathered()
    if way != "tensor_parallel":
        assert several["held"] == plan.held()


@pytest.fixture(scope="module")
def saved_by_four(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    torchrun(4, "save.py", "save", "fsdp", folder)
    return folder


@pytest.mark.parametrize(("way", "processes"), [("alone", 1), ("fsdp", 2), ("tensor_parallel", 2)])
def test_another_number_of_processes_loads(way, processes, saved_by_four):
    torchrun(processes, "save.py", "load", way, saved_by_four)


def test_adapter_of_four_processes_is_a_plain_one(saved_by_four):
    found = get_peft_model_state_dict(PeftModel.from_pretrained(script.base_model(), saved_by_four / "adapter"))
    torch.testing.assert_close(found, get_peft_model_state_dict(script.adapted_model()), rtol=0, atol=0)
    keys = FileSystemReader(saved_by_four / "shards").read_metadata().state_dict_metadata.keys()
    assert keys == found.keys()


def test_trainer(tmp_path):
    """The trained adapter is that of one process, and its checkpoint holds the adapter alone."""
    adapters = {}
    for processes in (1, 2):
        torchrun(processes, "trainer.py", tmp_path / f"{processes}.pt", tmp_path / f"run_{processes}")
        adapters[processes] = torch.load(tmp_path / f"{processes}.pt")
    torch.testing.assert_close(adapters[2], adapters[1], rtol=1e-5, atol=1e-5)
    before = script.trained(script.adapted_model())
    assert all(not torch.equal(adapters[1][name], value) for name, value in before.items())
    weights = {path.name for path in (tmp_path / "run_2").rglob("*.safetensors")}
    assert weights == {"adapter_model.safetensors"}


def test_document_has_the_counted_table():
    document = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert scale.table() in document
