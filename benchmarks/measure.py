"""Checks results, times passes side by side, and meters memory, on the CPU or a CUDA device."""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from math import ceil, inf
from pathlib import Path
from typing import Any, TypeAlias

import torch
from registry import GRAPHS, Benchmark, Dtypes, Implementation, Shape, Task, Tensors, Work
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler announces itself at every start

# Largest difference from the float64 oracle, relative to the largest element of that tensor.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SEED = 0
# A timed block is at least this long, so that the clock's own cost vanishes; on a device, also the first call's start.
BLOCK_MS = {"cpu": 0.2, "cuda": 1.0}
WARM_UP_MS = 5.0
# Shorter calls get an untimed one before each block: the implementation before may have emptied the
# caches, and refilling them would be counted here.
REFILL_BELOW_MS = 5.0
FEWEST_ROUNDS = 5
RESAMPLES = 200
CPU = torch.device("cpu")

Clock: TypeAlias = Callable[[Callable[[], object], int], float]
"""Milliseconds that so many calls take."""


class Elsewhere:
    """A pass that another process runs, and times itself: see ``turns.py``."""

    def milliseconds(self, calls: int) -> float:
        raise NotImplementedError

    def peak_bytes(self) -> int:
        raise NotImplementedError


class WrongResultError(Exception):
    """An implementation disagrees with the oracle, so its time means nothing."""


def check(
    benchmark: Benchmark,
    implementations: Sequence[Implementation],
    shape: Shape,
    dtypes: Dtypes,
    device: torch.device = CPU,
    failures: list[str] | None = None,
) -> list[Implementation]:
    """Those implementations whose outputs and gradients match the oracle.

    Dropout: all are compared with it off, and those that share the oracle's masks with it on too.

    Raises:
        WrongResultError: at the first that does not match, unless there is a list of ``failures`` to add it to.
    """
    tensors = make_tensors(benchmark, shape, dtypes, device)
    exact = {name: t.double() for name, t in tensors.items()}
    expected: dict[Any, Tensors] = {}
    right = []
    for implementation in implementations:
        try:
            with torch.device(device):
                check_one(benchmark, implementation, shape, dtypes, tensors, exact, expected)
        except Exception as error:
            if failures is None:
                raise
            failures.append(describe(error, f"{problem_name(benchmark, shape, dtypes)}: {implementation.name}"))
        else:
            right.append(implementation)
    return right


def problem_name(benchmark: Benchmark, shape: Shape, dtypes: Dtypes) -> str:
    return f"{benchmark.op} {shape.header()}={shape.label} {dtypes}"


def describe(error: Exception, where: str) -> str:
    """In one line."""
    if isinstance(error, WrongResultError):
        return str(error)
    return f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def check_one(
    benchmark: Benchmark,
    implementation: Implementation,
    shape: Shape,
    dtypes: Dtypes,
    tensors: Tensors,
    exact: Tensors,
    expected: dict[Any, Tensors],
) -> None:
    """Compares with the oracle's results, which it adds to ``expected`` where they are not there yet."""
    tolerance = benchmark.rounding * max(TOLERANCES[dtypes.base], TOLERANCES[dtypes.adapter])
    for case in {shape.without_dropout(), shape} if implementation.oracle_dropout else {shape.without_dropout()}:
        key = implementation.oracle, case
        if key not in expected:
            torch.manual_seed(SEED)
            expected[key] = implementation.oracle(case, exact)
        task = implementation.build(case, tensors)
        if task.setup:
            task.setup()
        torch.manual_seed(SEED)
        where = f"{problem_name(benchmark, case, dtypes)}: {implementation.name}"
        compare(task.results(), expected[key], tolerance, where)


def compare(actual: Tensors, expected: Tensors, tolerance: float, where: str) -> None:
    if actual.keys() != expected.keys():
        raise WrongResultError(f"{where} gives {sorted(actual)}, want {sorted(expected)}")
    for name, want in expected.items():
        got = actual[name].double()
        if got.shape != want.shape:
            raise WrongResultError(f"{where}: {name} has shape {list(got.shape)}, want {list(want.shape)}")
        error = ((got - want).abs().max() / want.abs().max()).item()
        if not error <= tolerance:  # a NaN is wrong too
            raise WrongResultError(f"{where}: {name} is off by {error:.1e} of its largest value (limit {tolerance:g})")


def make_tensors(benchmark: Benchmark, shape: Shape, dtypes: Dtypes, device: torch.device = CPU) -> Tensors:
    torch.manual_seed(SEED)
    with torch.device(device):
        return benchmark.make_tensors(shape, dtypes)


def captured(task: Task, graph_pass: str) -> Task:
    """A task whose one pass replays a CUDA graph of that pass of ``task``."""
    call = task.passes[GRAPHS[graph_pass]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result  # kept, as the graph writes to it

    return Task({graph_pass: replay}, task.results)


def time_pass(
    tasks: Mapping[str, Task],
    pass_name: str,
    rounds: int,
    min_seconds: float,
    device: torch.device = CPU,
    block_ms: float | None = None,
    most_seconds: float = inf,
) -> dict[str, list[float]]:
    """Milliseconds per call, one figure a round, of every task.

    In a round every task runs one block of calls, in an order drawn anew. Rounds go on until there
    are ``rounds`` of them, or ``FEWEST_ROUNDS`` after ``most_seconds``, and for ``min_seconds`` at least.
    A block has enough calls for ``block_ms``.
    """
    time_calls = CLOCKS[device.type]
    calls, refills = {}, {}
    for name, task in tasks.items():
        milliseconds = warm_up(task, pass_name, time_calls)
        calls[name] = ceil((block_ms or BLOCK_MS[device.type]) / milliseconds)
        refills[name] = milliseconds < REFILL_BELOW_MS
    times: dict[str, list[float]] = {name: [] for name in tasks}
    order = list(tasks)
    shuffle = random.Random(SEED).shuffle
    with no_garbage_collection():
        start = time.perf_counter()
        for done in count():
            seconds = time.perf_counter() - start
            enough = done >= rounds or (done >= FEWEST_ROUNDS and seconds >= most_seconds)
            if enough and seconds >= min_seconds:
                break
            shuffle(order)
            for name in order:
                if refills[name]:
                    time_block(tasks[name], pass_name, 1, time_calls)
                times[name].append(time_block(tasks[name], pass_name, calls[name], time_calls))
    return times


def warm_up(task: Task, pass_name: str, time_calls: Clock) -> float:
    """Milliseconds of the fastest call but the first, which may set things up."""
    time_block(task, pass_name, 1, time_calls)
    end = time.perf_counter() + WARM_UP_MS / 1e3
    fastest = time_block(task, pass_name, 1, time_calls)
    while time.perf_counter() < end:
        fastest = min(fastest, time_block(task, pass_name, 1, time_calls))
    return fastest


def time_block(task: Task, pass_name: str, calls: int, time_calls: Clock) -> float:
    """Mean milliseconds of ``calls`` calls in a row, their setup left out."""
    call, setup = task.passes[pass_name], task.setup
    if setup is None:
        return time_calls(call, calls) / calls
    total = 0.0
    for _ in range(calls):
        setup()
        total += time_calls(call, 1)
    return total / calls


def time_on_host(call: Callable[[], object], calls: int) -> float:
    if isinstance(call, Elsewhere):
        return call.milliseconds(calls)
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - start) / 1e6


def time_on_device(call: Callable[[], object], calls: int) -> float:
    """Between events before and after, so the device's time or the host's, whichever takes longer."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


CLOCKS: dict[str, Clock] = {"cpu": time_on_host, "cuda": time_on_device}


def measure_ceilings(device: torch.device, threads: int) -> dict[str, float]:
    """What these threads reach: bytes a second of a large copy, read and written; FLOPs a second of large products."""
    torch.set_num_threads(threads)
    size, edge = (2**29, 8192) if device.type == "cuda" else (2**25, 512)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    tasks = {"copy": Task({"call": lambda: target.copy_(source)}, dict)}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
        tasks[str(dtype).removeprefix("torch.")] = Task({"call": partial(torch.mm, a, b)}, dict)
    times = time_pass(tasks, "call", rounds=9, min_seconds=0.0, device=device)
    work = {name: 2 * size if name == "copy" else 2 * edge**3 for name in tasks}
    return {name: work[name] / (statistics.median(times[name]) / 1e3) for name in tasks}


def floor_ms(work: Work, dtypes: Dtypes, ceilings: Mapping[str, float]) -> float:
    """Milliseconds that the larger of the two, bytes or FLOPs, takes at the measured rates."""
    product = ceilings["float32" if dtypes.base in (torch.float32, torch.float64) else "bfloat16"]
    return 1e3 * max(work.bytes / ceilings["copy"], work.flops / product)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def ratios_by_round(times: Mapping[str, Sequence[float]], yardstick: str) -> Tensor:
    """[implementations, rounds]: each time divided by the yardstick's of the same round.

    Both sides of a round ran within milliseconds, so a clock that drifts between rounds cancels: that
    is why reports take the median of these, and not the ratio of two medians.
    """
    all_times = torch.tensor(list(times.values()), dtype=torch.float64)
    return all_times / torch.tensor(times[yardstick], dtype=torch.float64)


def medians(values: Tensor) -> Tensor:
    return values.quantile(0.5, dim=-1)


def bootstrap_medians(values: Tensor) -> Tensor:
    """[implementations, RESAMPLES]: medians over rounds drawn anew with replacement, the same rounds for all."""
    rounds = values.size(-1)
    generator = torch.Generator().manual_seed(SEED)
    draws = torch.randint(rounds, (RESAMPLES, rounds), generator=generator)
    return torch.stack([medians(v[draws]) for v in values])


def interval(resampled: Tensor) -> tuple[float, float]:
    """The middle 95%."""
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return low, high


def verdict(excess: Tensor) -> str:
    """On resampled (ratio - target): "met" or "missed" where noise does not change the answer, else "unclear"."""
    low, high = interval(excess)
    if high <= 0:
        return "met"
    return "missed" if low > 0 else "unclear"


def spread(times: Sequence[float]) -> float:
    """Interquartile range relative to the median."""
    if len(times) < 2:
        return 0.0
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / median


def peak_bytes(task: Task, pass_name: str, device: torch.device = CPU) -> int:
    """Most bytes that a call held at once, of what it allocated itself on the device, its result included."""
    call = task.passes[pass_name]
    if isinstance(call, Elsewhere):
        return call.peak_bytes()
    if task.setup:
        task.setup()
    return (peak_on_device if device.type == "cuda" else peak_on_host)(call)


def peak_on_device(call: Callable[[], object]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def peak_on_host(call: Callable[[], object]) -> int:
    """By what is reported of each allocation; what the call frees without having allocated it does not count."""
    held: dict[int, int] = {}
    total = peak = 0
    for address, size in allocations(call):
        total += size if size > 0 else -held.pop(address, 0)
        peak = max(peak, total)
        if size > 0:
            held[address] = size
    return peak


def allocations(call: Callable[[], object]) -> list[tuple[int, int]]:
    """Address and size of every block that is allocated, and size below 0 of every one that is freed.

    Torch's CPU allocator reports every allocation to the profiler, those inside native ops too.
    Not seen: buffers that do not come from it (std::vector, MKL's and oneDNN's own), and those that
    OpenMP workers allocate.
    """
    with no_garbage_collection(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = [event["args"] for event in events if event.get("name") == "[memory]"]
    return [(one["Addr"], one["Bytes"]) for one in found if one["Device Type"] == 0]
