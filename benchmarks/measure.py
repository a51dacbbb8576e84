"""Checks results, times passes side by side, and meters memory."""

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
from math import ceil
from pathlib import Path

import torch
from registry import Benchmark, Dtypes, Implementation, Shape, Task, Tensors
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler announces itself at every start

# Largest difference from the float64 oracle, relative to the largest element of that tensor.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SEED = 0
BLOCK_MS = 0.2  # a timed block is at least this long, so that the clock's own cost vanishes
WARM_UP_MS = 5.0
# Shorter calls get an untimed one before each block: the implementation before may have emptied the
# caches, and refilling them would be counted here.
REFILL_BELOW_MS = 5.0
RESAMPLES = 200


class WrongResultError(Exception):
    """An implementation disagrees with the oracle, so its time means nothing."""


def check(benchmark: Benchmark, implementations: Sequence[Implementation], shape: Shape, dtypes: Dtypes) -> None:
    """Raises WrongResultError unless outputs and gradients of every implementation match the oracle.

    Dropout: all are compared with it off, and those that share the oracle's masks with it on too.
    """
    tensors = make_tensors(benchmark, shape, dtypes)
    exact = {name: t.double() for name, t in tensors.items()}
    tolerance = benchmark.rounding * max(TOLERANCES[dtypes.base], TOLERANCES[dtypes.adapter])
    expected = {}
    for implementation in implementations:
        for case in {shape.without_dropout(), shape} if implementation.oracle_dropout else {shape.without_dropout()}:
            key = implementation.oracle, case
            if key not in expected:
                torch.manual_seed(SEED)
                expected[key] = implementation.oracle(case, exact)
            task = implementation.build(case, tensors)
            if task.setup:
                task.setup()
            torch.manual_seed(SEED)
            where = f"{benchmark.op} {shape.header()}={case.label} {dtypes}: {implementation.name}"
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


def make_tensors(benchmark: Benchmark, shape: Shape, dtypes: Dtypes) -> Tensors:
    torch.manual_seed(SEED)
    return benchmark.make_tensors(shape, dtypes)


def time_pass(tasks: Mapping[str, Task], pass_name: str, rounds: int, min_seconds: float) -> dict[str, list[float]]:
    """Milliseconds per call, one figure a round, of every task.

    In a round every task runs one block of calls, in an order drawn anew. Rounds go on until there
    are ``rounds`` of them and ``min_seconds`` have passed.
    """
    calls, refills = {}, {}
    for name, task in tasks.items():
        milliseconds = warm_up(task, pass_name)
        calls[name] = ceil(BLOCK_MS / milliseconds)
        refills[name] = milliseconds < REFILL_BELOW_MS
    times: dict[str, list[float]] = {name: [] for name in tasks}
    order = list(tasks)
    shuffle = random.Random(SEED).shuffle
    end = time.perf_counter() + min_seconds
    with no_garbage_collection():
        while len(times[order[0]]) < rounds or time.perf_counter() < end:
            shuffle(order)
            for name in order:
                if refills[name]:
                    time_block(tasks[name], pass_name, 1)
                times[name].append(time_block(tasks[name], pass_name, calls[name]))
    return times


def warm_up(task: Task, pass_name: str) -> float:
    """Milliseconds of the fastest call but the first, which may set things up."""
    time_block(task, pass_name, 1)
    end = time.perf_counter() + WARM_UP_MS / 1e3
    fastest = time_block(task, pass_name, 1)
    while time.perf_counter() < end:
        fastest = min(fastest, time_block(task, pass_name, 1))
    return fastest


def time_block(task: Task, pass_name: str, calls: int) -> float:
    """Mean milliseconds of ``calls`` calls in a row, their setup left out."""
    call, setup = task.passes[pass_name], task.setup
    if setup is None:
        return time_calls(call, calls) / calls
    total = 0.0
    for _ in range(calls):
        setup()
        total += time_calls(call, 1)
    return total / calls


def time_calls(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - start) / 1e6


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


def peak_bytes(task: Task, pass_name: str) -> int:
    """Most bytes that a call held at once, of what it allocated itself on the CPU, its result included.

    Torch's CPU allocator reports every allocation to the profiler, those inside native ops too.
    Not seen: buffers that do not come from it (std::vector, MKL's and oneDNN's own), and those that
    OpenMP workers allocate.
    """
    if task.setup:
        task.setup()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = task.passes[pass_name]()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = peak = 0
    for event in events:
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0:
            held += event["args"]["Bytes"]
            peak = max(peak, held)
    return peak
