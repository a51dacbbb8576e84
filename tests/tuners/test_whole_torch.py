"""Adapted models in the rest of torch: export, ahead-of-time compilation, switching under compile, workers, threads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_ext import LoraConfig, get_peft_model
from peft_ext._loader import native_devices

native = pytest.mark.skipif("cpu" not in native_devices, reason="there is no native build")


def model_with(*adapters: str, seed: int = 0) -> Any:
    """Two linear layers with random adapters of different values, the first of them active."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    first, *others = adapters
    config = LoraConfig(target_modules=["0", "2"], r=4, init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    return model.eval()


def forms(model: Any) -> dict[str, nn.Module]:
    return {"adapted": model, "merged": model_with(*model.peft_config).merge_and_unload()}


@native
@pytest.mark.parametrize("form", ["adapted", "merged"])
def test_export(form: str, tmp_path: Path) -> None:
    """For any batch; a merged model's program has none of our ops, so that it loads without this library."""
    model = forms(model_with("a"))[form]
    batch = {0: torch.export.Dim("batch", min=2)}
    shapes = ((batch,),) if form == "adapted" else (batch,)  # whose forward takes whatever the base's does
    program = torch.export.export(model, (torch.randn(3, 16),), dynamic_shapes=shapes)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("peft_ext.lora_linear" in name for name in names) == (form == "adapted")
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(7, 16)
    torch.testing.assert_close(loaded(x), model(x))


@native
@pytest.mark.slow
@pytest.mark.parametrize("form", ["adapted", "merged"])
def test_compiled_ahead_of_time(form: str, tmp_path: Path) -> None:
    model = forms(model_with("a"))[form]
    x = torch.randn(3, 16)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x))


def test_switching_among_seen_adapters_compiles_nothing() -> None:
    model, graphs = model_with("a", "b"), []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    x = torch.randn(3, 16)
    for number, name in enumerate(["a", "b", "a", "b", "a"]):
        model.set_adapter(name)
        torch.testing.assert_close(compiled(x), model(x))
        assert len(graphs) == min(number + 1, 2)


def test_activation_offloading() -> None:
    model, x = model_with("a").train(), torch.randn(5, 16)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    with torch.autograd.graph.save_on_cpu():
        loss = model(x).square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), expected, rtol=0, atol=0)


def test_threads_share_a_model() -> None:
    model = model_with("a")
    inputs = [torch.randn(rows, 16) for rows in (1, 3, 17, 64)] * 4
    with torch.inference_mode():
        expected = [model(x) for x in inputs]
    found: list[Tensor | None] = [None] * len(inputs)

    def work(first: int) -> None:
        with torch.inference_mode():
            for _ in range(20):
                for i in range(first, len(inputs), 4):
                    found[i] = model(inputs[i])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(found, expected, strict=True):
        assert got is not None
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_workers(start: str, two_threads: None) -> None:
    """Also after the parent has used its own threads, which a forked process does not have."""
    model = model_with("a").requires_grad_(False)  # what a worker sends has no history
    inputs = [torch.randn(5, 16) for _ in range(8)]
    expected = [model(x) for x in inputs]
    model(torch.randn(4096, 16))
    loader = DataLoader(
        inputs, batch_size=None, collate_fn=model, num_workers=2, multiprocessing_context=start, timeout=120
    )
    torch.testing.assert_close(list(loader), expected, rtol=0, atol=0)
