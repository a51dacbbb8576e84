"""The benchmark harness on toy shapes: what it reports, what it refuses, what its meters see."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bottleneck_adapter
import lora_linear
import merged_lora_linear
import pytest
import torch
from command import runner
from lora_linear import LinearShape, lora_oracle
from measure import (
    FEWEST_ROUNDS,
    RESAMPLES,
    bootstrap_medians,
    floor_ms,
    medians,
    peak_bytes,
    ratios_by_round,
    time_pass,
    verdict,
)
from registry import (
    FORWARD,
    GRAPH,
    GRAPHS,
    INFERENCE,
    OPS,
    TRAINING,
    TRAINING_GRAPH,
    Dtypes,
    Implementation,
    Task,
    Tensors,
    Work,
    load,
)
from report import Row
from run import having_pass, main

from peft_ext import ops

TOY_SHAPES = {
    "adapter_fusion": "3,5,8,1",
    "kron_linear": "3,4,4,4,2,3,1",
    "lora_linear": "3,8,6,2,0.25",
    "merged_lora_linear": "3,8,6,2,0.25",
    "multi_lora_linear": "3,2,8,6,2,2,0.25",
    "lora_merge_": "6,8,2",
    "lora_unmerge_": "6,8,2",
    "bottleneck_adapter": "3,8,2",
    "prefix_attention": "2,3,3,2,1",
    "quantized_linear": "3,32,6,4,2",
}
TOY = LinearShape(3, 8, 6, 2)
TOY_LABEL = "3,8,6,2"
run = runner(main, "--rounds", "2", "--seconds", "0")


def test_every_public_op_has_a_benchmark() -> None:
    assert set(OPS) == set(ops.__all__)


@pytest.mark.parametrize("op", OPS)
def test_report(op: str, tmp_path: Path) -> None:
    json_path, plot = tmp_path / "report.json", tmp_path / "report.png"
    code, output = run(
        op, "--shape", TOY_SHAPES[op], "--implementations", "eager,ours", "--json", json_path, "--plot", plot
    )
    assert code == 0, output
    report = json.loads(json_path.read_text())
    assert report["header"].keys() == {"date", "commit", "cpu", "cores", "isa", "torch", "peft", "peft_ext", "native"}
    yardstick = load(op).yardstick
    for row in report["rows"]:
        assert row.keys() == Row.__annotations__.keys()
        assert (row["op"], row["label"], row["dtype"], row["threads"]) == (op, TOY_SHAPES[op], "float32", 1)
        assert row["ms"] > 0 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["rounds"] == 2 and row["peak_bytes"] >= 0
        assert (row["verdict"] is not None) == (row["implementation"] == "ours")
        assert row["implementation"] != yardstick or row["ratio"] == 1
    seen = {(row["pass"], row["implementation"]) for row in report["rows"]}
    passes = {pass_name for pass_name, _ in seen}
    assert len(seen) == len(report["rows"])
    assert seen == {(p, i) for p in passes for i in (yardstick, "eager", "ours")}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_summary_of_several_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, shape in ((lora_linear, TOY), (bottleneck_adapter, bottleneck_adapter.BottleneckShape(3, 8, 2))):
        monkeypatch.setattr(module, "BENCHMARK", replace(module.BENCHMARK, shapes={"quick": (shape,)}))
    path = tmp_path / "report.json"
    code, output = run(
        "lora_linear", "bottleneck_adapter", "--quick", "--summary", "--implementations", "eager,ours", "--json", path
    )
    assert code == 0, output
    assert f"lora_linear {TOY_LABEL},0 float32 inference frozen" in output
    assert "bottleneck_adapter 3,8,2 float32 inference eager" in output
    report = json.loads(path.read_text())
    assert report["header"]["copy TB/s"] > 0 and report["failures"] == []
    assert {row["op"] for row in report["rows"]} == {"lora_linear", "bottleneck_adapter"}
    assert all(row["floor_ms"] > 0 for row in report["rows"])
    assert {row["implementation"] for row in report["rows"] if row["peer"]} == {"eager"}


@pytest.mark.parametrize("op", OPS)
def test_sizes_of_a_device_count_their_work(op: str) -> None:
    benchmark = load(op)
    ceilings = {"copy": 1e12, "bfloat16": 1e15, "float32": 1e13}
    assert benchmark.shapes["cuda"]
    for name, dtype in (("cuda", "bfloat16"), ("cuda float32", "float32"), ("cuda compiled", "bfloat16")):
        for shape in benchmark.shapes.get(name, ()):
            times = [
                floor_ms(benchmark.work(shape, Dtypes.parse(dtype), p), Dtypes.parse(dtype), ceilings)
                for p in benchmark.passes
            ]
            assert min(times) > 0 and max(times) < 1e3
            if TRAINING in benchmark.passes:
                assert times[benchmark.passes.index(TRAINING)] >= 2 * times[0]


def test_floor_is_the_slower_of_bytes_and_products() -> None:
    ceilings = {"copy": 1e9, "bfloat16": 1e12, "float32": 1e11}
    float32, bfloat16 = Dtypes.parse("float32"), Dtypes.parse("bfloat16")
    assert floor_ms(Work(10**9, 10**11), bfloat16, ceilings) == pytest.approx(1e3)
    assert floor_ms(Work(10**8, 10**11), bfloat16, ceilings) == pytest.approx(1e2)
    assert floor_ms(Work(10**8, 10**11), float32, ceilings) == pytest.approx(1e3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_report_of_a_device(op: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    code, output = run(
        op, "--device", "cuda", "--shape", TOY_SHAPES[op].removesuffix(",0.25"), "--dtype", "float32", "--json", path
    )
    assert code == 0, output
    report = json.loads(path.read_text())
    assert report["header"]["gpu"] and report["header"]["cuda"] and report["header"]["native"]
    rows = [row for row in report["rows"] if row["implementation"] == "ours"]
    benchmark = load(op)
    expected = {p for p in benchmark.passes if p != FORWARD} | {g for g, p in GRAPHS.items() if p in benchmark.passes}
    assert {row["pass"] for row in rows} == expected
    for row in rows:
        assert (row["device"], row["dtype"]) == ("cuda", "float32")
        assert row["ms"] > 0 and (row["pass"] in GRAPHS or row["peak_bytes"] > 0 or "lora" in op)


def test_passes_of_a_layer(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    run("lora_linear", "--shape", TOY_LABEL, "--shape", "3,8,6,2,0.5", "--implementations", "ours", "--json", path)
    passes = {(row["label"], row["pass"]) for row in json.loads(path.read_text())["rows"]}
    assert passes == {
        *((f"{TOY_LABEL},0", name) for name in ("forward", "forward+backward", "inference")),
        *(("3,8,6,2,0.5", name) for name in ("forward", "forward+backward")),
    }


def test_peft_layer_is_checked_and_drops_in_training() -> None:
    pytest.importorskip("peft")
    code, output = run("lora_linear", "--shape", "3,8,6,2,0.5", "--implementations", "hf_peft")
    assert code == 0, output
    shape = replace(TOY, dropout=0.5)
    torch.manual_seed(0)
    task = lora_linear.build_hf_peft(shape, lora_linear.make_tensors(shape, Dtypes.parse("float32")))
    assert not torch.equal(task.results()["y"], task.results()["y"])


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16", "bfloat16+float32"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    code, output = run(
        "lora_linear", "--shape", TOY_LABEL, "--dtype", dtype, "--implementations", "eager,ours", "--json", path
    )
    assert code == 0, output
    assert {row["dtype"] for row in json.loads(path.read_text())["rows"]} == {dtype}


def with_wrong(results: Callable[[Tensors], Tensors]) -> Implementation:
    """Our layer with ``results`` in place of its own."""

    def build(shape: LinearShape, t: Tensors) -> Task:
        right = lora_linear.build_ours(shape, t)
        return Task(right.passes, lambda: results(right.results()))

    return Implementation("wrong", build, lora_oracle)


WRONG: dict[str, Callable[[Tensors], Tensors]] = {
    "y is off": lambda r: r | {"y": r["y"] * 1.001},
    "gradient of lora_B is off": lambda r: r | {"gradient of lora_B": r["gradient of lora_B"].flip(0)},
    "y is off by nan": lambda r: r | {"y": r["y"] / 0 * 0},
    "y has shape": lambda r: r | {"y": r["y"][:1]},
    "y in inference is off": lambda r: r | {"y in inference": r["y in inference"] + 1},
    "gives ['gradient of lora_A', 'gradient of lora_B', 'y', 'y in inference'], want": lambda r: {
        name: t for name, t in r.items() if name != "gradient of x"
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_results_are_refused(message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = lora_linear.BENCHMARK
    wrong = replace(right, implementations=(*right.implementations, with_wrong(WRONG[message])))
    monkeypatch.setattr(lora_linear, "BENCHMARK", wrong)
    path = tmp_path / "report.json"
    code, output = run("lora_linear", "--shape", TOY_LABEL, "--implementations", "eager,wrong", "--json", path)
    assert code == 1
    assert f"lora_linear M,K,N,r,dropout={TOY_LABEL},0 float32: wrong" in output
    assert message in output
    assert not path.exists()


def broken(shape: LinearShape, t: Tensors) -> Task:
    raise RuntimeError("no such kernel")


def test_what_is_wrong_is_left_out_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = lora_linear.BENCHMARK
    others = (with_wrong(WRONG["y is off"]), Implementation("broken", broken, lora_oracle))
    monkeypatch.setattr(lora_linear, "BENCHMARK", replace(right, implementations=(*right.implementations, *others)))
    path = tmp_path / "report.json"
    asked = ("lora_linear", "--shape", TOY_LABEL, "--implementations", "ours,wrong,broken", "--json", path)
    with pytest.raises(RuntimeError, match="no such kernel"):
        run(*asked[:4], "broken", *asked[5:])
    code, output = run(*asked, "--keep-going")
    assert code == 1
    report = json.loads(path.read_text())
    assert {row["implementation"] for row in report["rows"]} == {"frozen", "ours"}
    wrong, error = report["failures"]
    assert wrong in output and "wrong: y is off" in wrong
    assert error == f"lora_linear M,K,N,r,dropout={TOY_LABEL},0 float32: broken: RuntimeError: no such kernel"


def test_a_wrong_yardstick_leaves_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(with_wrong(WRONG["y is off"]), name="frozen")
    ours = lora_linear.BENCHMARK.implementations[3]
    monkeypatch.setattr(lora_linear, "BENCHMARK", replace(lora_linear.BENCHMARK, implementations=(wrong, ours)))
    path = tmp_path / "report.json"
    code, _ = run("lora_linear", "--shape", TOY_LABEL, "--keep-going", "--json", path)
    report = json.loads(path.read_text())
    assert (code, report["rows"], len(report["failures"])) == (1, [], 1)


def test_wrong_dropout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(shape: LinearShape, t: Tensors) -> Task:
        return lora_linear.build_eager(shape, t)  # drops by nn.Dropout's mask, not by the oracle's

    wrong = Implementation("wrong", build, lora_oracle, oracle_dropout=True)
    monkeypatch.setattr(lora_linear, "BENCHMARK", replace(lora_linear.BENCHMARK, implementations=(wrong,)))
    assert run("lora_linear", "--shape", TOY_LABEL)[0] == 0
    code, output = run("lora_linear", "--shape", "3,8,6,2,0.5")
    assert code == 1 and "wrong: y is off" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_op"], "op: got 'no_such_op'"),
        (["lora_linear", "--shape", "3,8"], "want numbers for M,K,N,r,dropout"),
        (["lora_linear", "--dtype", "int64"], "dtype: got 'int64'"),
        (["lora_linear", "--implementations", "theirs"], "implementations: got 'theirs'"),
        (["lora_linear", "--passes", "backward"], "passes: got 'backward'"),
        (["lora_linear", "--threads", "0"], "threads: got '0'"),
        (["lora_linear", "--filter", "no such shape"], "no shape"),
        (["lora_merge_", "--grid"], "no shape"),
        (["lora_linear", "kron_linear", "--shape", "1,2,3,4"], "shape: sizes of your own"),
        (["lora_linear", "--device", "abacus"], "device: got 'abacus'"),
        pytest.param(
            ["lora_linear", "--device", "cuda"],
            "there is no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert message in " ".join(output.replace("│", " ").split())


def test_peak_bytes_sees_inside_native_ops() -> None:
    a, b, c = torch.randn(10, 200), torch.randn(200, 30), torch.randn(30, 400)
    product = 10 * 30 * 4  # (a b) is the cheaper order; multi_dot holds it beside the result
    task = Task({"call": lambda: torch.linalg.multi_dot([a, b, c])}, dict)
    assert peak_bytes(task, "call") == product + 10 * 400 * 4


def test_peak_bytes_does_not_count_what_the_call_before_left() -> None:
    kept: list[torch.Tensor] = []

    def call() -> None:
        kept.clear()
        kept.append(torch.empty(1000, dtype=torch.uint8))

    task = Task({"call": call}, dict)
    assert [peak_bytes(task, "call") for _ in range(3)] == [1000] * 3


def test_peak_bytes_is_of_one_moment_and_leaves_setup_out() -> None:
    def call() -> None:
        for size in (100, 300, 200):
            torch.empty(size, dtype=torch.uint8)

    task = Task({"call": call}, dict, setup=lambda: torch.empty(1000, dtype=torch.uint8))
    assert peak_bytes(task, "call") == 300


def test_every_timed_call_has_its_setup() -> None:
    events: list[str] = []
    task = Task({"call": lambda: events.append("call")}, dict, setup=lambda: events.append("setup"))
    times = time_pass({"a": task, "b": task}, "call", rounds=3, min_seconds=0)
    assert [len(t) for t in times.values()] == [3, 3]
    assert events == ["setup", "call"] * (len(events) // 2)


def test_rounds_end_early_when_a_pass_takes_too_long() -> None:
    times = time_pass({"a": Task({"call": list}, dict)}, "call", rounds=31, min_seconds=0, most_seconds=0)
    assert len(times["a"]) == FEWEST_ROUNDS


def test_a_pass_takes_the_seconds_that_were_asked_for() -> None:
    start = time.perf_counter()
    time_pass({"a": Task({"call": list}, dict)}, "call", rounds=1, min_seconds=0.5, block_ms=0.1, most_seconds=0)
    assert time.perf_counter() - start >= 0.5


def test_a_graph_is_captured_only_of_a_pass_that_is_there() -> None:
    def implementation(name: str, capturable: bool = True) -> Implementation:
        return Implementation(name, lambda shape, tensors: tasks[name], dict, capturable=capturable)

    both = {INFERENCE: list, TRAINING: list}
    tasks = {"ours": Task(both, dict), "copies": Task(both, dict), "no_backward": Task({INFERENCE: list}, dict)}
    implementations = [implementation("ours"), implementation("copies", False), implementation("no_backward")]
    for pass_name, names in {
        INFERENCE: ["ours", "copies", "no_backward"],
        TRAINING: ["ours", "copies"],
        GRAPH: ["ours", "no_backward"],
        TRAINING_GRAPH: ["ours"],
    }.items():
        assert list(having_pass(tasks, implementations, pass_name)) == names


def test_drift_between_rounds_cancels() -> None:
    clock = [1.0, 2.0, 4.0, 8.0]
    by_round = ratios_by_round({"frozen": clock, "ours": [1.25 * c for c in clock]}, "frozen")
    assert medians(by_round).tolist() == [1.0, 1.25]
    assert torch.equal(bootstrap_medians(by_round)[1], torch.full((RESAMPLES,), 1.25, dtype=torch.float64))


@pytest.mark.parametrize(
    ("excess", "expected"), [((-0.2, -0.1), "met"), ((0.1, 0.2), "missed"), ((-0.1, 0.1), "unclear")]
)
def test_verdict(excess: tuple[float, float], expected: str) -> None:
    assert verdict(torch.linspace(*excess, 100, dtype=torch.float64)) == expected


def test_floor_is_of_the_cheaper_order() -> None:
    float32 = Dtypes.parse("float32")

    def floors(shape: LinearShape) -> list[float]:
        return [round(lora_linear.floor(shape, float32, p), 3) for p in ("forward", TRAINING)]

    # The branch apart: r (K + N) / K N of the frozen layer forward, three of them on two backward.
    assert floors(LinearShape(16, 768, 768, 8)) == [1.021, 1.031]
    # W + s B A first: r / M forward; dropout rules that out.
    assert floors(LinearShape(4096, 768, 768, 64)) == [1.016, 1.174]
    assert floors(LinearShape(4096, 768, 768, 64, 0.1)) == [1.167, 1.25]


def test_peak_targets() -> None:
    float32, peaks = Dtypes.parse("float32"), {"hf_peft": 1000}
    assert lora_linear.peak_target(TOY, float32, peaks) == 1000
    assert lora_linear.peak_target(replace(TOY, dropout=0.1), float32, peaks) == 1000 - 3 * 8 * 4
    assert lora_linear.peak_target(TOY, float32, {}) is None


def test_targets() -> None:
    ratios = {"eager": 1.3, "hf_peft": 1.4}
    assert lora_linear.target(TOY, TRAINING, ratios) == pytest.approx(1.2)
    assert lora_linear.target(replace(TOY, dropout=0.1), TRAINING, ratios) == pytest.approx(1.1)
    assert lora_linear.target(TOY, TRAINING, {"eager": 1.1, "hf_peft": 1.4}) == pytest.approx(1.1)
    assert lora_linear.target(TOY, TRAINING, {}) is None
    merged = merged_lora_linear.MergedShape(3, 8, 6, 2)
    assert merged_lora_linear.target(merged, TRAINING, {"loralib": 3.0}) == pytest.approx(2.0)
    bottleneck = bottleneck_adapter.BottleneckShape(3, 8, 2)
    assert bottleneck_adapter.target(bottleneck, FORWARD, {}) == pytest.approx(1 / 1.3)
    assert bottleneck_adapter.target(bottleneck, TRAINING, {}) == pytest.approx(1 / 1.2)
