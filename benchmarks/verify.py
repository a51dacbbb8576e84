"""Times this tree's ops against another commit's: ``python benchmarks/verify.py lora_linear --base main``.

Each of the two builds has a process of its own, and they take turns in every round. See README.md here.
"""

from __future__ import annotations

import io
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain, product
from pathlib import Path
from typing import Annotated, TypeAlias, TypedDict

import torch
import typer
from measure import (
    TOLERANCES,
    WrongResultError,
    bootstrap_medians,
    compare,
    interval,
    medians,
    problem_name,
    ratios_by_round,
    time_pass,
)
from registry import OPS, Benchmark, Dtypes, Shape, Task, load
from report import make_console
from rich.console import Console
from rich.progress import track
from rich.table import Table
from run import Effort, check_passes, choose_effort, choose_problems, header, parse_threads, split
from turns import Worker

ROOT = Path(__file__).parents[1]
BUILDS = ROOT / "build/verify"
"""Other commits, by their hash, with their builds. Safe to delete."""

BASE, HERE = "base", "here"
BLOCK_MS = 5.0
"""A turn is at least this long: it begins with caches that the other process has emptied."""

Problem: TypeAlias = tuple[int, tuple[Benchmark, Dtypes, Shape]]
"""Threads, and what is measured."""
Key: TypeAlias = tuple[str, str, str, int, str]
"""Op, sizes, dtype, threads, pass."""

Row = TypedDict(
    "Row",
    {
        "op": str,
        "label": str,
        "dtype": str,
        "threads": int,
        "pass": str,
        "base_ms": float,  # medians over rounds
        "here_ms": float,
        "ratio": float,  # median of the rounds' ratios, this tree over the base
        "ratio_low": float,  # 95% confidence interval of that median
        "ratio_high": float,
        "verdict": str,  # faster, slower, same
    },
)


def resolve(revision: str) -> str:
    """The hash of a commit."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    found = subprocess.run(git, capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"base: got {revision!r}, want a commit of this repository")
    return found.stdout.strip()


def built(commit: str, console: Console) -> Path:
    """The commit's files and its extension, in a folder that later runs find again."""
    python = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
    folder = BUILDS / f"{commit[:12]}-{python}"
    if (folder / "peft_ext/_build.json").exists():  # what a build writes last
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder)
    console.print(f"building {commit[:12]} in {folder}, once", highlight=False)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{commit[:12]} does not build:\n{done.stdout[-2000:]}")
    return folder


def tasks_of(
    workers: Mapping[str, Worker], benchmark: Benchmark, shape: Shape, dtypes: Dtypes, implementation: str
) -> dict[str, Task]:
    """The problem in both processes.

    Raises:
        WrongResultError: where either differs from its oracle, or they from each other: outputs, gradients, with the
            dropout mask of the same seed.
    """
    problem = {
        "op": benchmark.op,
        "sizes": asdict(shape),
        "dtype": str(dtypes),
        "threads": torch.get_num_threads(),
        "implementation": implementation,
    }
    both = {name: worker.build(**problem) for name, worker in workers.items()}
    tolerance = benchmark.rounding * max(TOLERANCES[dtypes.base], TOLERANCES[dtypes.adapter])
    compare(both[HERE][1], both[BASE][1], tolerance, f"{problem_name(benchmark, shape, dtypes)}: against the base")
    return {name: task for name, (task, _) in both.items()}


def measure_once(
    trees: Mapping[str, Path],
    problems: Sequence[Problem],
    implementation: str,
    passes: Sequence[str],
    efforts: Mapping[str, Effort],
) -> Iterator[tuple[Key, dict[str, list[float]]]]:
    """Starts a process for each tree, and yields the times of every problem and pass, round by round."""
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker("verify_worker.py", name, path=[tree])) for name, tree in trees.items()
        }
        for threads, (benchmark, dtypes, size) in problems:
            torch.set_num_threads(threads)
            effort = efforts[benchmark.op]
            tasks = tasks_of(workers, benchmark, size, dtypes, implementation)
            for pass_name in (p for p in tasks[HERE].passes if p in passes or not passes):
                times = time_pass(
                    tasks,
                    pass_name,
                    effort.rounds,
                    effort.min_seconds,
                    block_ms=BLOCK_MS,
                    most_seconds=effort.most_seconds,
                )
                yield (benchmark.op, size.label, str(dtypes), threads, pass_name), times


def summarize(key: Key, starts: Sequence[Mapping[str, Sequence[float]]]) -> Row:
    """One row of all starts.

    Where a process puts its memory moves its times by some percent for as long as it lives. So the interval is of the
    resampled medians of all starts together: it is wide where they disagree, and a verdict needs them to agree.
    """
    ratios = [ratios_by_round(times, BASE)[list(times).index(HERE)][None] for times in starts]
    low, high = interval(torch.cat([bootstrap_medians(r)[0] for r in ratios]))
    op, label, dtype, threads, pass_name = key
    return {
        "op": op,
        "label": label,
        "dtype": dtype,
        "threads": threads,
        "pass": pass_name,
        "base_ms": statistics.median(chain.from_iterable(times[BASE] for times in starts)),
        "here_ms": statistics.median(chain.from_iterable(times[HERE] for times in starts)),
        "ratio": statistics.median(medians(r).item() for r in ratios),
        "ratio_low": low,
        "ratio_high": high,
        "verdict": "faster" if high < 1 else "slower" if low > 1 else "same",
    }


def table(rows: Sequence[Row], limit: float) -> Table:
    result = Table(title="this tree's time over the base's", title_justify="left")
    for column in ("op", "sizes", "dtype", "threads", "pass"):
        result.add_column(column)
    for column in ("base ms", "here ms", "ratio", "95%", ""):
        result.add_column(column, justify="right")
    colors = {"faster": "green", "slower": "yellow", "same": ""}
    for r in rows:
        result.add_row(
            *(str(r[key]) for key in ("op", "label", "dtype", "threads", "pass")),
            f"{r['base_ms']:.3f}",
            f"{r['here_ms']:.3f}",
            f"{r['ratio']:.3f}",
            f"{r['ratio_low']:.3f}-{r['ratio_high']:.3f}",
            f"{r['verdict']}{', beyond the limit' if too_slow(r, limit) else ''}",
            style="red" if too_slow(r, limit) else colors[r["verdict"]],
        )
    return result


def too_slow(row: Row, limit: float) -> bool:
    """Whether it is slower by more than ``limit``, and noise does not change the answer."""
    return row["ratio_low"] > 1 + limit


def main(
    base: Annotated[str, typer.Option(help="The commit to compare with.")],
    op: Annotated[list[str] | None, typer.Argument(help=f"Some of {', '.join(OPS)}; all by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes, few rounds.")] = False,
    shape: Annotated[list[str] | None, typer.Option(help="Sizes of your own, such as 512,768,768,8,0.1.")] = None,
    filter_: Annotated[str, typer.Option("--filter", help="Only shapes that this regular expression matches.")] = "",
    passes: Annotated[str, typer.Option(help="Comma-separated; all by default.")] = "",
    implementation: Annotated[str, typer.Option(help="What is timed in both; the yardstick shows the noise.")] = "ours",
    dtype: Annotated[str, typer.Option(help="Comma-separated; BASE+ADAPTER where they differ.")] = "",
    threads: Annotated[str, typer.Option(help="Comma-separated thread counts.")] = "1",
    starts: Annotated[int, typer.Option(min=1, help="How often both processes start anew.")] = 3,
    rounds: Annotated[int | None, typer.Option(min=2, help="At least so many rounds a pass and start.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="At least so long a pass and start.")] = None,
    limit: Annotated[float, typer.Option(min=0.0, help="Slowdown that is let pass.")] = 0.03,
    base_tree: Annotated[
        Path | None, typer.Option(help="A folder that has --base built already, instead of building it.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write header and rows here.")] = None,
) -> None:
    """Times this tree against the commit BASE, op by op, after checking that both compute the same.

    Exit status 1: something is slower than --limit allows, or results differ (then there are no figures).
    """
    size_set = "quick" if quick else "default"
    console = make_console()
    try:
        commit = resolve(base)
        benchmarks = [load(name) for name in op or OPS]
        for benchmark in benchmarks:
            check_passes(benchmark, split(passes))
            known = [i.name for i in benchmark.implementations]
            if implementation not in known:
                raise ValueError(f"implementation: got {implementation!r}, want one of {', '.join(known)}")
        counts = [parse_threads(count) for count in split(threads)]
        problems = list(product(counts, choose_problems(benchmarks, size_set, shape or [], dtype, filter_)))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None

    trees = {BASE: base_tree or built(commit, console), HERE: ROOT}
    efforts = {b.op: choose_effort(b, size_set, rounds, seconds) for b in benchmarks}
    found: dict[Key, list[dict[str, list[float]]]] = {}
    try:
        for _ in track(range(starts), "measuring", console=console):
            for key, times in measure_once(trees, problems, implementation, split(passes), efforts):
                found.setdefault(key, []).append(times)
    except WrongResultError as error:
        console.print(f"results differ, no figures: {error}", style="red", highlight=False)
        raise typer.Exit(1) from None
    rows = [summarize(key, times) for key, times in found.items()]
    console.print(table(rows, limit))
    report = {"header": header(torch.device("cpu")) | {"base": commit, "limit": limit}, "rows": rows}
    if json_path:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    slow = sum(too_slow(row, limit) for row in rows)
    console.print(f"{slow} of {len(rows)} slower by more than {limit:.0%}", highlight=False)
    if slow:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
