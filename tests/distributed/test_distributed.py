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


scale, _, script = (loaded(path) for path in (ROOT / "benchmarks" / "scale.py", HERE / "process.py", HERE / "train.py"))


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


@pytest.mark.parametrize("processes", [2, 4])
def test_training(processes, tmp_path):
    """Losses and gradients are those of one process; sent is what docs/scale.md counts, of gradients the adapters'."""
    torchrun(processes, "train.py", tmp_path / "results.pt")
    results = torch.load(tmp_path / "results.pt")
    alone = results.pop("alone")
    assert alone["losses"][-1] < alone["losses"][0]
    for several in results.values():
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(several["losses"], alone["losses"], **close)
        torch.testing.assert_close(several["gradients"], alone["gradients"], **close)

    model = scale.Model.of("small", script.model_config())
    replicated, sharded = (
        scale.Plan(model, processes, 1, shard, tokens=0, rank=script.RANK, targets=script.TARGETS)
        for shard in (False, True)
    )
    ddp, fsdp = results["ddp"], results["fsdp"]
    assert ddp["sent"]["allreduce_"] == replicated.adapters
    assert ddp["held"] == replicated.held()
    assert fsdp["sent"]["_reduce_scatter_base_"] == sharded.adapters
    assert fsdp["sent"]["_allgather_base_"] * processes == sharded.gathered()
    assert fsdp["held"] == sharded.held()


@pytest.fixture(scope="module")
def saved_by_four(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    torchrun(4, "save.py", "save", folder, "fsdp")
    return folder


@pytest.mark.parametrize(
    ("processes", "ways"), [(1, ["alone"]), (2, ["fsdp", "tensor_parallel"]), (4, ["fsdp_tensor_parallel"])]
)
def test_another_number_of_processes_loads(processes, ways, saved_by_four):
    torchrun(processes, "save.py", "load", saved_by_four, *ways)


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
