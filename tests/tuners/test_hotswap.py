"""Adapters that are exchanged, added and removed while a model serves."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from peft_ext import (
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)
from peft_ext.tuners.calls import Calls

Make = Callable[[str], nn.Module]
Run = Callable[[nn.Module], Tensor]
Snapshot = Callable[[nn.Module], Any]

CONFIGS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 8, "target_modules": ["0", "2"]},
    {"r": 4, "lora_alpha": 3, "target_modules": ["0", "2"], "rank_pattern": {"2": 3}, "alpha_pattern": {"0": 5}},
    {"r": 8, "use_rslora": True, "target_modules": ["2"]},
]
"""Of other ranks, scalings and layers."""


def adapted(tiny: Make, config: dict[str, Any], seed: int = 0, kind: str = "mlp") -> Any:
    model = get_peft_model(tiny(kind), LoraConfig(**config))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def saved(tiny: Make, run: Run, tmp_path: Path) -> list[tuple[Path, Tensor]]:
    """The folders of three adapters, and the model's output with each."""
    found = []
    for number, config in enumerate(CONFIGS):
        model = adapted(tiny, config, seed=number)
        model.save_pretrained(tmp_path / str(number))
        found.append((tmp_path / str(number), run(model).detach()))
    return found


@pytest.mark.parametrize("prepared", [False, True])
def test_the_output_is_the_new_adapters(
    tiny: Make, run: Run, saved: list[tuple[Path, Tensor]], tmp_path: Path, prepared: bool
) -> None:
    model = adapted(tiny, CONFIGS[0])
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        torch.testing.assert_close(run(model), saved[0][1])
    for number in (1, 2, 0, 1):
        folder, expected = saved[number]
        hotswap_adapter(model, folder, "default")
        torch.testing.assert_close(run(model), expected)
        torch.testing.assert_close(model(torch.zeros(2, 8), adapter_names=["default"] * 2), model(torch.zeros(2, 8)))
        model.save_pretrained(tmp_path / "again")  # says what it holds, whatever the ranks have become
        torch.testing.assert_close(run(PeftModel.from_pretrained(tiny("mlp"), tmp_path / "again")), expected)
        model.merge_adapter()
        torch.testing.assert_close(run(model), expected)
        model.unmerge_adapter()


def test_other_kinds_of_layers(tiny: Make, run: Run, tmp_path: Path) -> None:
    config = {"r": 2, "target_modules": ["wte", "c_attn"], "use_dora": False}
    other = adapted(tiny, config | {"r": 4, "lora_alpha": 2}, seed=1, kind="gpt2")
    other.save_pretrained(tmp_path)
    model = adapted(tiny, config, kind="gpt2")
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(run(model), run(other))


def test_convolutions_dora_and_heads(tiny: Make, tmp_path: Path) -> None:
    def make(seed: int) -> Any:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2))
        model = get_peft_model(base, LoraConfig(r=2 + seed, target_modules=["0"], modules_to_save=["2"]))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        return model

    other, model, x = make(1), make(0), torch.randn(2, 3, 5, 5)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(x), other(x))

    dora = {"r": 2, "target_modules": ["0"], "use_dora": True}
    other, model, x = adapted(tiny, dora, 1), adapted(tiny, dora, 0), torch.randn(2, 8)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(x), other(x))


def test_a_compiled_model_keeps_its_graph(tiny: Make, run: Run, saved: list[tuple[Path, Tensor]]) -> None:
    model = adapted(tiny, CONFIGS[0])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    x, index = torch.randn(2, 8), torch.tensor([0, -1])
    frames = []
    for folder, expected in (*saved, *saved):
        hotswap_adapter(compiled, folder, "default")
        torch.testing.assert_close(run(compiled), expected)
        torch.testing.assert_close(compiled(x, adapter_names=index), model(x, adapter_names=index))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


def test_memory_stays_as_it_is(tiny: Make, saved: list[tuple[Path, Tensor]]) -> None:
    model = adapted(tiny, CONFIGS[0])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    x = torch.randn(2, 8)

    def serve() -> int:
        for folder, _ in saved:
            hotswap_adapter(model, folder, "default")
            model.load_adapter(folder, "passing")
            model(x, adapter_names=["passing", "default"])
            removed.append(weakref.ref(model.get_submodule("base_model.model.2").lora_A["passing"].weight))
            model.delete_adapter("passing")
        gc.collect()
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())

    removed: list[Any] = []
    serve()
    before = serve()
    for _ in range(5):
        last = serve()
    assert last == before
    assert not any(reference() is not None for reference in removed)


BAD_FILES: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["4"]}, "unexpected keys"),
    ({"target_modules": ["0"], "use_dora": True}, "use_dora is False in the model and True in the new one"),
    ({"target_modules": ["0"], "lora_dropout": 0.5}, "lora_dropout"),
]


@pytest.mark.parametrize(("config", "message"), BAD_FILES)
def test_a_bad_adapter_changes_nothing(
    tiny: Make, snapshot: Snapshot, same: Callable[..., bool], tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    model = adapted(tiny, CONFIGS[0])
    before = snapshot(model)
    adapted(tiny, config, 1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, tmp_path, "default")
    assert same(model, before)


def test_bad_calls(tiny: Make, snapshot: Snapshot, same: Callable[..., bool], tmp_path: Path) -> None:
    model = adapted(tiny, CONFIGS[0])
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    before = snapshot(model)
    with pytest.raises(ValueError, match="there is no adapter 'x'"):
        hotswap_adapter(model, tmp_path, "x")
    for tenth in range(10):
        weights.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(ValueError, match="truncated or damaged"):
            hotswap_adapter(model, tmp_path, "default")
    weights.write_bytes(whole)
    with pytest.raises(TypeError, match="must be a PeftModel, got Linear"):
        hotswap_adapter(nn.Linear(2, 2), tmp_path, "default")
    with pytest.raises(ValueError, match="target_rank is 1, but adapter 'default' has rank 2"):
        prepare_model_for_compiled_hotswap(model, target_rank=1)
    with pytest.raises(ValueError, match="before the model is compiled"):
        prepare_model_for_compiled_hotswap(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    assert same(model, before)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged: unmerge it"):
        hotswap_adapter(model, tmp_path, "default")
    lokr = get_peft_model(tiny("mlp"), LoKrConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="peft_type LORA"):
        hotswap_adapter(lokr, tmp_path, "default")
    with pytest.raises(ValueError, match="no LoRA layer"):
        prepare_model_for_compiled_hotswap(lokr, target_rank=4)


def test_hugging_face_pefts_files(tiny: Make, run: Run, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny("mlp"), peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    model = adapted(tiny, CONFIGS[0])
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(run(model), run(theirs.eval()))


THREADS, ROUNDS = 8, 12


def in_threads(work: list[Callable[[], None]]) -> None:
    """Runs all of them at once, and raises what any of them raises."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a deadlock"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("kind", ["mlp", "bert"])
def test_every_call_sees_whole_adapters(tiny: Make, tmp_path: Path, kind: str) -> None:
    """Threads call with their own mixes while another one adds, deletes and exchanges adapters."""
    config = {"r": 2, "target_modules": ["0", "2"] if kind == "mlp" else ["query", "value"]}
    swapped = []
    x = torch.randn(4, 8) if kind == "mlp" else torch.randint(50, (4, 5))

    def output(model: Any, names: Any) -> Tensor:
        with torch.no_grad():
            found = model(x, adapter_names=names)
        return getattr(found, "logits", found)

    for number in range(2):
        other = adapted(tiny, config, number, kind)
        other.save_pretrained(tmp_path / str(number))
        swapped.append(output(other, ["default"] * 4))
    model = adapted(tiny, config, 2, kind)
    model.load_adapter(tmp_path / "0", "swapped")
    model.load_adapter(tmp_path / "1", "steady")
    base, own = output(model, ["__base__"] * 4), output(model, ["default"] * 4)
    done = threading.Event()

    def call(shift: int) -> Callable[[], None]:
        names = ["default", "swapped", "__base__", "steady"]
        names = names[shift % 4 :] + names[: shift % 4]
        given = names if shift < THREADS // 2 else model.adapter_indices(names)

        def work() -> None:
            while not done.is_set():
                found = output(model, given)
                for row, name in enumerate(names):
                    wanted = {"default": [own], "__base__": [base], "steady": [swapped[1]], "swapped": swapped}[name]
                    assert any(torch.allclose(found[row], w[row], atol=1e-5) for w in wanted), (name, row)

        return work

    def change() -> None:
        try:
            for number in range(ROUNDS):
                hotswap_adapter(model, tmp_path / str(number % 2), "swapped")
                model.load_adapter(tmp_path / "0", f"new{number}")
                torch.testing.assert_close(output(model, [f"new{number}"] * 4), swapped[0])
                model.delete_adapter(f"new{number}")
        finally:
            done.set()

    in_threads([*(call(number) for number in range(THREADS)), change])


def test_threads_with_prefixes(tiny: Make) -> None:
    """Attention modules are not changed for a call."""
    model = get_peft_model(tiny("llama"), PrefixTuningConfig(num_virtual_tokens=2), "a")
    model.add_adapter("b", PrefixTuningConfig(num_virtual_tokens=3))
    model.eval()
    ids = torch.randint(50, (2, 4))
    mixes = [["a", "b"], ["b", "__base__"], ["__base__", "__base__"], ["b", "a"]]
    expected = [model(input_ids=ids, adapter_names=names).logits.detach() for names in mixes]

    def call(number: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(10):
                found = model(input_ids=ids, adapter_names=mixes[number % 4]).logits
                torch.testing.assert_close(found, expected[number % 4])

        return work

    in_threads([call(number) for number in range(THREADS)])


def use(calls: Calls, *names: str) -> Any:
    return calls.using(lambda: names)


def test_a_change_waits_for_the_calls_that_use_the_adapter_only() -> None:
    calls, order = Calls(), []

    def change(name: str) -> Callable[[], None]:
        def work() -> None:
            with calls.changing([name]):
                order.append(name)

        return work

    with use(calls, "a"):
        in_threads([change("b")])
        waiting = threading.Thread(target=change("a"))
        waiting.start()
        time.sleep(0.05)
        assert order == ["b"]
        with use(calls, "a"):  # this thread has it already
            assert order == ["b"]
        with pytest.raises(RuntimeError, match="inside of a call"), calls.changing(["c"]):
            pass
    waiting.join(timeout=10)
    assert order == ["b", "a"]
    with calls.changing(["a"]), use(calls, "a"), calls.changing(["a"]):
        pass


def test_a_call_inside_of_a_call_does_not_wait_for_a_change_that_waits_for_the_outer_one() -> None:
    calls, order = Calls(), []

    def change() -> None:
        with calls.changing(["a", "b"]):
            order.append("change")

    def call() -> None:
        with use(calls, "a"):
            changer.start()
            time.sleep(0.05)
            with use(calls, "b"):
                order.append("inner")

    changer = threading.Thread(target=change, daemon=True)
    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    caller.join(timeout=10)
    assert not caller.is_alive(), "a deadlock"
    changer.join(timeout=10)
    assert order == ["inner", "change"]


def test_a_call_that_waited_uses_the_adapters_that_are_active_then() -> None:
    calls, active, order = Calls(), ["a"], []

    def call() -> None:
        with calls.using(lambda: list(active)):
            called.set()
            assert finish.wait(10)
            order.append("call")

    def change_b() -> None:
        with calls.changing(["b"]):
            order.append("change of b")

    called, finish = threading.Event(), threading.Event()
    caller, changer = threading.Thread(target=call), threading.Thread(target=change_b)
    with calls.changing(["a", "b"]):
        caller.start()
        time.sleep(0.05)
        active[:] = ["b"]
    assert called.wait(10)
    changer.start()
    time.sleep(0.05)
    finish.set()
    caller.join(timeout=10)
    changer.join(timeout=10)
    assert order == ["call", "change of b"]


def test_saving_holds_up_a_swap(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, order = adapted(tiny, CONFIGS[1]), []
    model.save_pretrained(tmp_path)
    swapper = threading.Thread(target=lambda: (hotswap_adapter(model, tmp_path, "default"), order.append("swap")))

    def write(files: object) -> None:
        swapper.start()
        time.sleep(0.05)
        order.append("save")

    monkeypatch.setattr("peft_ext.tuners.model.write_together", write)
    model.save_pretrained(tmp_path)
    swapper.join(timeout=10)
    assert order == ["save", "swap"]


def test_names_that_are_no_adapters_leave_nothing_behind(tiny: Make) -> None:
    model = get_peft_model(tiny("mlp"), LoraConfig(r=2, target_modules=["0"]))
    for number in range(3):
        with pytest.raises(ValueError, match="but the model has"):
            model(torch.randn(1, 8), adapter_names=[f"unknown{number}"])
    assert not model.base_model.calls._users


def test_values_survive_a_swap_of_the_same(tiny: Make, tmp_path: Path) -> None:
    model = adapted(tiny, CONFIGS[1])
    model.save_pretrained(tmp_path)
    before = get_peft_model_state_dict(model)
    before = {key: value.clone() for key, value in before.items()}
    config = model.peft_config["default"].to_dict()
    hotswap_adapter(model, tmp_path, "default")
    assert all(torch.equal(value, before[key]) for key, value in get_peft_model_state_dict(model).items())
    assert model.peft_config["default"].r in (3, 4)
    assert model.peft_config["default"].to_dict().keys() == config.keys()
