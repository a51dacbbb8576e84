"""Times an op beside its peers: ``python benchmarks/run.py lora_linear --quick``. See README.md here."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from itertools import product
from math import inf
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import (
    CLOCKS,
    CPU,
    WrongResultError,
    bootstrap_medians,
    captured,
    check,
    describe,
    floor_ms,
    interval,
    make_tensors,
    measure_ceilings,
    medians,
    peak_bytes,
    problem_name,
    ratios_by_round,
    spread,
    time_pass,
    verdict,
)
from registry import (
    BENCHMARKS,
    FORWARD,
    GRAPHS,
    OPS,
    WITHOUT_GRAD,
    Benchmark,
    Dtypes,
    Implementation,
    Shape,
    Task,
    load,
)
from report import Report, Row, make_console, print_report, print_summary, write_json, write_plot
from rich.console import Console
from rich.progress import track
from torch import Tensor

from peft_ext._loader import native_devices
from peft_ext._version import __version__


@dataclass(frozen=True)
class Effort:
    """How long to measure each pass, and whether to meter memory."""

    rounds: int
    min_seconds: float
    memory: bool
    most_seconds: float = inf


EFFORTS = {
    "default": Effort(rounds=31, min_seconds=1.0, memory=True),
    "quick": Effort(rounds=9, min_seconds=0.2, memory=True),
    "grid": Effort(rounds=5, min_seconds=0.1, memory=False),
    "cuda": Effort(rounds=15, min_seconds=0.1, memory=True),
    "cuda compiled": Effort(rounds=15, min_seconds=0.1, memory=False),
}
DEFAULT_SETS = {
    ("cpu", False): "default",
    ("cpu", True): "default",
    ("cuda", False): "cuda",
    ("cuda", True): "cuda compiled",
}


@dataclass(frozen=True)
class Problem:
    """What is measured in one go; ``failures``, if there is one, gets what goes wrong, and the run goes on."""

    benchmark: Benchmark
    shape: Shape
    dtypes: Dtypes
    device: torch.device = CPU
    ceilings: Mapping[str, float] | None = None
    failures: list[str] | None = None

    def __str__(self) -> str:
        return problem_name(self.benchmark, self.shape, self.dtypes)


def measure(
    problem: Problem, implementations: Sequence[Implementation], effort: Effort, passes: Sequence[str]
) -> Iterator[Row]:
    """Checks, then times one problem; yields a row for each of its ``passes`` (all if empty) and implementations.

    Raises:
        WrongResultError: before anything is timed.
    """
    benchmark, shape, dtypes, device = problem.benchmark, problem.shape, problem.dtypes, problem.device
    able = [i for i in implementations if i.handles(shape)]
    right = check(benchmark, able, shape, dtypes, device, problem.failures)
    if not {benchmark.yardstick, "ours"} & {i.name for i in able} <= {i.name for i in right}:
        return
    tensors = make_tensors(benchmark, shape, dtypes, device)
    with torch.device(device):
        tasks = {i.name: i.build(shape, tensors) for i in right}
    for pass_name in choose_passes(passes, benchmark, tasks[benchmark.yardstick], device):
        try:
            having = having_pass(tasks, right, pass_name)
            timed = capture(problem, having, pass_name) if pass_name in GRAPHS else having
            yield from measure_pass(problem, timed, effort, pass_name)
        except Exception as error:
            if problem.failures is None:
                raise
            problem.failures.append(describe(error, f"{problem} {pass_name}"))


def choose_passes(asked: Sequence[str], benchmark: Benchmark, yardstick: Task, device: torch.device) -> list[str]:
    """Those asked for that the task has.

    By default all; on a CUDA device graphs of the inference and of the training take the place of the forward alone.
    """
    available = [name for name in benchmark.passes if name in yardstick.passes]
    if device.type == "cuda":
        available += [graph for graph, captured_pass in GRAPHS.items() if captured_pass in available]
        if not asked:
            available = [name for name in available if name != FORWARD]
    return [name for name in available if name in asked or not asked]


def having_pass(
    tasks: Mapping[str, Task], implementations: Sequence[Implementation], pass_name: str
) -> dict[str, Task]:
    """The tasks with that pass; of the graph of a pass, those that have the pass and can be captured."""
    able = {i.name for i in implementations if i.capturable or pass_name not in GRAPHS}
    timed_pass = GRAPHS.get(pass_name, pass_name)
    return {name: task for name, task in tasks.items() if name in able and timed_pass in task.passes}


def capture(problem: Problem, tasks: Mapping[str, Task], graph_pass: str) -> dict[str, Task]:
    found = {}
    for name, task in tasks.items():
        try:
            with torch.set_grad_enabled(graph_pass not in WITHOUT_GRAD):
                found[name] = captured(task, graph_pass)
        except Exception as error:
            if problem.failures is None:
                raise
            problem.failures.append(describe(error, f"{problem}: {name} {graph_pass}"))
    return found


def measure_pass(problem: Problem, tasks: Mapping[str, Task], effort: Effort, pass_name: str) -> Iterator[Row]:
    benchmark, shape, dtypes, device = problem.benchmark, problem.shape, problem.dtypes, problem.device
    metered = effort.memory and pass_name not in GRAPHS
    with torch.set_grad_enabled(pass_name not in WITHOUT_GRAD):
        times = time_pass(tasks, pass_name, effort.rounds, effort.min_seconds, device, most_seconds=effort.most_seconds)
        peaks = {name: peak_bytes(task, pass_name, device) for name, task in tasks.items()} if metered else {}
    by_round = ratios_by_round(times, benchmark.yardstick)
    ratios = dict(zip(tasks, medians(by_round).tolist(), strict=True))
    resampled = dict(zip(tasks, bootstrap_medians(by_round), strict=True))
    counted = GRAPHS.get(pass_name, pass_name)
    target = benchmark.target(shape, counted, ratios) if device.type == "cpu" else None
    work = benchmark.work(shape, dtypes, counted) if benchmark.work else None
    peers = {i.name for i in benchmark.implementations if i.peer and not is_ours(i.name)}
    for name in tasks:
        low, high = interval(resampled[name])
        ours = is_ours(name)
        judged = target is not None and ours
        yield {
            "op": benchmark.op,
            "shape": asdict(shape),
            "label": shape.label,
            "dtype": str(dtypes),
            "device": device.type,
            "threads": torch.get_num_threads(),
            "pass": pass_name,
            "implementation": name,
            "peer": name in peers,
            "ms": statistics.median(times[name]),
            "best_ms": min(times[name]),
            "spread": spread(times[name]),
            "ratio": ratios[name],
            "ratio_low": low,
            "ratio_high": high,
            "rounds": len(times[name]),
            "peak_bytes": peaks.get(name),
            "peak_target": benchmark.peak_target(shape, dtypes, peaks) if ours and peaks else None,
            "floor": benchmark.floor(shape, dtypes, counted),
            "floor_ms": floor_ms(work, dtypes, problem.ceilings) if work and problem.ceilings else None,
            "target": target if judged else None,
            "verdict": verdict(excess(benchmark, shape, pass_name, resampled, name)) if judged else None,
        }


def is_ours(implementation: str) -> bool:
    return implementation.startswith("ours")


def excess(
    benchmark: Benchmark, shape: Shape, pass_name: str, resampled: Mapping[str, Tensor], implementation: str
) -> Tensor:
    """Our ratio over the target, for each resampling, so that the peers' noise counts too."""
    columns = torch.stack(list(resampled.values()), dim=-1).tolist()
    targets = [benchmark.target(shape, pass_name, dict(zip(resampled, column, strict=True))) for column in columns]
    return resampled[implementation] - torch.tensor(targets, dtype=torch.float64)


def header(device: torch.device, ceilings: Mapping[int, Mapping[str, float]] | None = None) -> dict[str, Any]:
    """Where, when and with what."""
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "peft": package_version("peft"),
        "peft_ext": __version__,
        "native": device.type in native_devices,
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for count, rates in (ceilings or {}).items():
        where = f" ({count} threads)" if len(ceilings or {}) > 1 else ""
        found |= {f"copy TB/s{where}": round(rates["copy"] / 1e12, 3)}
        found |= {f"{name} TFLOP/s{where}": round(rate / 1e12, 2) for name, rate in rates.items() if name != "copy"}
    return found


def commit() -> str | None:
    """Of this source tree, with a mark if it was changed since."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def parse_shape(benchmark: Benchmark, text: str) -> Shape:
    """``"512,768,768,8,0.1"`` in the order of the shape's fields."""
    try:
        values = [float(v) if "." in v else int(v) for v in text.split(",")]
        return benchmark.shape_type(*values)
    except (TypeError, ValueError):
        raise ValueError(f"shape: got {text!r}, want numbers for {benchmark.shape_type.header()}") from None


def parse_threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"threads: got {text!r}, want a count of at least 1")
    return int(text)


def choose(benchmark: Benchmark, names: Sequence[str], compiled: bool) -> list[Implementation]:
    """Those asked for, or the default ones, the yardstick always."""
    known = [i.name for i in benchmark.implementations]
    for name in names:
        if name not in known:
            raise ValueError(f"implementations: got {name!r}, want some of {', '.join(known)}")
    wanted = {i.name for i in benchmark.implementations if (i.name in names if names else i.default)}
    wanted |= {benchmark.yardstick} | {name for name in known if compiled and name.endswith("compiled")}
    return [i for i in benchmark.implementations if i.name in wanted]


def available(implementations: Sequence[Implementation], console: Console) -> list[Implementation]:
    """Those that can run; says what the others need."""
    for one in implementations:
        if one.missing:
            console.print(f"{one.name} is left out: it needs {one.missing}", highlight=False)
    return [one for one in implementations if not one.missing]


def choose_effort(benchmark: Benchmark, size_set: str, rounds: int | None, seconds: float | None) -> Effort:
    """What was asked for, else the set's, within the time that the benchmark gives to a pass."""
    effort = EFFORTS[size_set]
    return replace(
        effort,
        rounds=rounds or effort.rounds,
        most_seconds=inf if rounds else benchmark.most_seconds,
        min_seconds=effort.min_seconds if seconds is None else seconds,
    )


def check_passes(benchmark: Benchmark, names: Sequence[str]) -> None:
    known = [*benchmark.passes, *GRAPHS]
    for name in names:
        if name not in known:
            raise ValueError(f"passes: got {name!r}, want some of {', '.join(known)}")


def parse_device(name: str) -> torch.device:
    if name not in CLOCKS:
        raise ValueError(f"device: got {name!r}, want one of {', '.join(CLOCKS)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but there is no CUDA device")
    return torch.device(name)


def problems_of(benchmark: Benchmark, size_set: str, shapes: Sequence[str], dtypes: str) -> list[tuple[Dtypes, Shape]]:
    """Types and sizes: those asked for, or those of the set."""
    asked = [Dtypes.parse(name) for name in split(dtypes)]
    types = asked or [Dtypes.parse("bfloat16" if size_set.startswith("cuda") else "float32")]
    sizes = [parse_shape(benchmark, text) for text in shapes] or list(benchmark.shapes.get(size_set, ()))
    problems = list(product(types, sizes))
    if size_set == "cuda" and not asked and not shapes:
        problems += [(Dtypes.parse("float32"), size) for size in benchmark.shapes.get("cuda float32", ())]
    return problems


def choose_problems(
    benchmarks: Sequence[Benchmark], size_set: str, shapes: Sequence[str], dtypes: str, pattern: str
) -> list[tuple[Benchmark, Dtypes, Shape]]:
    """What is measured of all benchmarks: what was asked for, where the sizes match the pattern."""
    if shapes and len(benchmarks) > 1:
        raise ValueError("shape: sizes of your own are those of one op, so name one")
    found = [
        (benchmark, types, size)
        for benchmark in benchmarks
        for types, size in problems_of(benchmark, size_set, shapes, dtypes)
        if re.search(pattern, size.label)
    ]
    if not found:
        raise ValueError(f"filter: no shape of the {size_set} set matches {pattern!r}")
    return found


def split(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def main(
    op: Annotated[
        list[str] | None, typer.Argument(help=f"Some of {', '.join(BENCHMARKS)}; all ops by default.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes, few rounds.")] = False,
    grid: Annotated[bool, typer.Option("--grid", help="The sweep over sizes, if the op has one.")] = False,
    shape: Annotated[list[str] | None, typer.Option(help="Sizes of your own, such as 512,768,768,8,0.1.")] = None,
    filter_: Annotated[str, typer.Option("--filter", help="Only shapes that this regular expression matches.")] = "",
    passes: Annotated[str, typer.Option(help="Comma-separated; all by default.")] = "",
    implementations: Annotated[str, typer.Option(help="Comma-separated; the yardstick is always there.")] = "",
    compiled: Annotated[bool, typer.Option("--compile", help="Also what torch.compile makes of it.")] = False,
    dtype: Annotated[str, typer.Option(help="Comma-separated; BASE+ADAPTER where they differ.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda, which has sizes of its own.")] = "cpu",
    threads: Annotated[str, typer.Option(help="Comma-separated thread counts.")] = "1",
    rounds: Annotated[int | None, typer.Option(min=2, help="At least so many rounds a pass.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="At least so long a pass.")] = None,
    summary: Annotated[bool, typer.Option("--summary", help="One table of all, with ceilings; so on cuda.")] = False,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Leave out what is wrong, and go on.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write header and rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart (PNG) here.")] = None,
) -> None:
    """Times each OP beside its peers in one process, after checking that all of them compute the same."""
    try:
        place = parse_device(device)
        size_set = "quick" if quick else "grid" if grid else DEFAULT_SETS[device, compiled]
        benchmarks = [load(name) for name in op or OPS]
        chosen = {b.op: choose(b, split(implementations), compiled) for b in benchmarks}
        for benchmark in benchmarks:
            check_passes(benchmark, split(passes))
        counts = [parse_threads(count) for count in split(threads)]
        problems = choose_problems(benchmarks, size_set, shape or [], dtype, filter_)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None

    console = make_console()
    chosen = {op: available(implementations, console) for op, implementations in chosen.items()}
    efforts = {b.op: choose_effort(b, size_set, rounds, seconds) for b in benchmarks}
    summary = summary or place.type == "cuda"
    ceilings = {count: measure_ceilings(place, count) for count in counts} if summary else {}
    failures: list[str] = []
    report = Report(header=header(place, ceilings), rows=[], failures=failures)
    try:
        for count, (benchmark, dtypes, size) in track(list(product(counts, problems)), "measuring", console=console):
            torch.set_num_threads(count)
            problem = Problem(benchmark, size, dtypes, place, ceilings.get(count), failures if keep_going else None)
            report["rows"] += measure(problem, chosen[benchmark.op], efforts[benchmark.op], split(passes))
    except WrongResultError as error:
        console.print(f"wrong result, no figures: {error}", style="red", highlight=False)
        raise typer.Exit(1) from None
    if not report["rows"] and not failures:
        raise typer.BadParameter(f"none of these shapes has a pass of {passes} (inference has no dropout)")
    if json_path:
        write_json(report, json_path)
    (print_summary if summary else print_report)(report, console)
    if plot:
        write_plot(report, plot)
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
