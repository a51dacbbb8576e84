"""Times an op beside its peers: ``python benchmarks/run.py lora_linear --quick``. See README.md here."""

from __future__ import annotations

import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import (
    WrongResultError,
    bootstrap_medians,
    check,
    interval,
    make_tensors,
    medians,
    peak_bytes,
    ratios_by_round,
    spread,
    time_pass,
    verdict,
)
from registry import BENCHMARKS, INFERENCE, Benchmark, Dtypes, Implementation, Shape, Task, load
from report import Report, Row, print_report, write_json, write_plot
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


EFFORTS = {
    "default": Effort(rounds=31, min_seconds=1.0, memory=True),
    "quick": Effort(rounds=9, min_seconds=0.2, memory=True),
    "grid": Effort(rounds=5, min_seconds=0.1, memory=False),
}


def measure(
    benchmark: Benchmark,
    implementations: Sequence[Implementation],
    shape: Shape,
    dtypes: Dtypes,
    effort: Effort,
    passes: Sequence[str],
) -> Iterator[Row]:
    """Checks, then times one problem; yields a row for each of its ``passes`` and implementations.

    Raises:
        WrongResultError: before anything is timed.
    """
    check(benchmark, implementations, shape, dtypes)
    tensors = make_tensors(benchmark, shape, dtypes)
    tasks = {i.name: i.build(shape, tensors) for i in implementations}
    for pass_name in passes:
        if pass_name in tasks[benchmark.yardstick].passes:
            yield from measure_pass(benchmark, tasks, shape, dtypes, effort, pass_name)


def measure_pass(
    benchmark: Benchmark, tasks: Mapping[str, Task], shape: Shape, dtypes: Dtypes, effort: Effort, pass_name: str
) -> Iterator[Row]:
    with torch.set_grad_enabled(pass_name != INFERENCE):
        times = time_pass(tasks, pass_name, effort.rounds, effort.min_seconds)
        peaks = {name: peak_bytes(task, pass_name) for name, task in tasks.items()} if effort.memory else {}
    by_round = ratios_by_round(times, benchmark.yardstick)
    ratios = dict(zip(tasks, medians(by_round).tolist(), strict=True))
    resampled = dict(zip(tasks, bootstrap_medians(by_round), strict=True))
    target = benchmark.target(shape, pass_name, ratios)
    for name in tasks:
        low, high = interval(resampled[name])
        judged = target is not None and name == "ours"
        yield {
            "op": benchmark.op,
            "shape": asdict(shape),
            "label": shape.label,
            "dtype": str(dtypes),
            "threads": torch.get_num_threads(),
            "pass": pass_name,
            "implementation": name,
            "ms": statistics.median(times[name]),
            "best_ms": min(times[name]),
            "spread": spread(times[name]),
            "ratio": ratios[name],
            "ratio_low": low,
            "ratio_high": high,
            "rounds": len(times[name]),
            "peak_bytes": peaks.get(name),
            "peak_target": benchmark.peak_target(shape, dtypes, peaks) if name == "ours" else None,
            "floor": benchmark.floor(shape, dtypes, pass_name),
            "target": target if judged else None,
            "verdict": verdict(excess(benchmark, shape, pass_name, resampled)) if judged else None,
        }


def excess(benchmark: Benchmark, shape: Shape, pass_name: str, resampled: Mapping[str, Tensor]) -> Tensor:
    """Our ratio over the target, for each resampling, so that the peers' noise counts too."""
    columns = torch.stack(list(resampled.values()), dim=-1).tolist()
    targets = [benchmark.target(shape, pass_name, dict(zip(resampled, column, strict=True))) for column in columns]
    return resampled["ours"] - torch.tensor(targets, dtype=torch.float64)


def header() -> dict[str, Any]:
    """Where, when and with what."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "peft": package_version("peft"),
        "peft_ext": __version__,
        "native": "cpu" in native_devices,
    }


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
    """Those asked for, or the default ones, that can run; the yardstick always."""
    known = [i.name for i in benchmark.implementations]
    for name in names:
        if name not in known:
            raise ValueError(f"implementations: got {name!r}, want some of {', '.join(known)}")
    wanted = {i.name for i in benchmark.implementations if (i.name in names if names else i.default)}
    wanted |= {benchmark.yardstick} | ({"compiled"} if compiled else set())
    return [i for i in benchmark.implementations if i.name in wanted and i.is_available()]


def choose_effort(size_set: str, rounds: int | None, seconds: float | None) -> Effort:
    effort = EFFORTS[size_set]
    return replace(
        effort,
        rounds=effort.rounds if rounds is None else rounds,
        min_seconds=effort.min_seconds if seconds is None else seconds,
    )


def choose_passes(benchmark: Benchmark, names: Sequence[str]) -> list[str]:
    """Those asked for, or all."""
    for name in names:
        if name not in benchmark.passes:
            raise ValueError(f"passes: got {name!r}, want some of {', '.join(benchmark.passes)}")
    return [name for name in benchmark.passes if name in names or not names]


def split(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def main(
    op: Annotated[str, typer.Argument(help=f"One of {', '.join(BENCHMARKS)}.")],
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes, few rounds.")] = False,
    grid: Annotated[bool, typer.Option("--grid", help="The sweep over sizes, if the op has one.")] = False,
    shape: Annotated[list[str] | None, typer.Option(help="Sizes of your own, such as 512,768,768,8,0.1.")] = None,
    filter_: Annotated[str, typer.Option("--filter", help="Only shapes that this regular expression matches.")] = "",
    passes: Annotated[str, typer.Option(help="Comma-separated; all by default.")] = "",
    implementations: Annotated[str, typer.Option(help="Comma-separated; the yardstick is always there.")] = "",
    compiled: Annotated[bool, typer.Option("--compile", help="Also torch.compile of the formula.")] = False,
    dtype: Annotated[str, typer.Option(help="Comma-separated; BASE+ADAPTER where they differ.")] = "float32",
    threads: Annotated[str, typer.Option(help="Comma-separated thread counts.")] = "1",
    rounds: Annotated[int | None, typer.Option(min=2, help="At least so many rounds a pass.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="At least so long a pass.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write header and rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart (PNG) here.")] = None,
) -> None:
    """Times OP beside its peers in one process, after checking that all of them compute the same."""
    size_set = "quick" if quick else "grid" if grid else "default"
    effort = choose_effort(size_set, rounds, seconds)
    try:
        benchmark = load(op)
        shapes = [parse_shape(benchmark, s) for s in shape or []] or list(benchmark.shapes.get(size_set, ()))
        shapes = [s for s in shapes if re.search(filter_, s.label)]
        chosen = choose(benchmark, split(implementations), compiled)
        chosen_passes = choose_passes(benchmark, split(passes))
        counts = [parse_threads(count) for count in split(threads)]
        types = [Dtypes.parse(name) for name in split(dtype)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not shapes:
        raise typer.BadParameter(f"no shape of the {size_set} set matches {filter_!r}")

    console = Console() if sys.stdout.isatty() else Console(width=160)
    report = Report(header=header(), rows=[])
    try:
        for count, dtypes, problem in track(list(product(counts, types, shapes)), op, console=console):
            torch.set_num_threads(count)
            report["rows"] += measure(benchmark, chosen, problem, dtypes, effort, chosen_passes)
    except WrongResultError as error:
        console.print(f"wrong result, no figures: {error}", style="red", highlight=False)
        raise typer.Exit(1) from None
    if not report["rows"]:
        raise typer.BadParameter(f"none of these shapes has a pass of {passes} (inference has no dropout)")
    print_report(report, console)
    if json_path:
        write_json(report, json_path)
    if plot:
        write_plot(report, plot)


if __name__ == "__main__":
    typer.run(main)
