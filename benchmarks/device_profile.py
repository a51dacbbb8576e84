"""Which kernels of a GPU an op's passes take their time in: ``python benchmarks/device_profile.py lora_linear``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import typer
from measure import make_tensors
from registry import FORWARD, OPS, WITHOUT_GRAD, Benchmark, load
from report import make_console
from rich.table import Table
from run import choose, header, parse_device, problems_of, split
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

WARM_UP, CALLS = 3, 10
LEAST_US = 0.5
"""Of a call: kernels below are only in the sum."""


def kernels(call: Callable[[], object]) -> list[FunctionEventAvg]:
    """What the device did in ``CALLS`` calls, by kernel, the longest first."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    return sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)


def tables(benchmark: Benchmark, names: list[str], dtype: str, passes: list[str]) -> Iterator[Table]:
    """One for each problem, implementation and pass; by default all passes but the forward in training."""
    device = torch.device("cuda")
    for dtypes, shape in problems_of(benchmark, "cuda", [], dtype):
        tensors = make_tensors(benchmark, shape, dtypes, device)
        for implementation in choose(benchmark, names, compiled=False):
            if implementation.missing or not implementation.handles(shape):
                continue
            with torch.device(device):
                task = implementation.build(shape, tensors)
            for name in passes or [one for one in task.passes if one != FORWARD]:
                if name not in task.passes or task.setup:
                    continue
                with torch.set_grad_enabled(name not in WITHOUT_GRAD):
                    events = kernels(task.passes[name])
                yield table(f"{benchmark.op} {shape.label} {dtypes} {name}: {implementation.name}", events)


def table(title: str, events: list[FunctionEventAvg]) -> Table:
    total = sum(event.device_time_total for event in events) / CALLS
    result = Table(title=f"{title}, {total:.1f} us", title_justify="left")
    for column in ("us", "launches", "kernel"):
        result.add_column(column, justify="left" if column == "kernel" else "right")
    for event in events:
        if event.device_time_total / CALLS >= LEAST_US:
            launches = f"{event.count / CALLS:g}"
            result.add_row(f"{event.device_time_total / CALLS:.1f}", launches, event.key)
    return result


def main(
    op: Annotated[list[str] | None, typer.Argument(help=f"Some of {', '.join(OPS)}; all by default.")] = None,
    implementations: Annotated[str, typer.Option(help="Comma-separated; the yardstick is always there.")] = "ours",
    dtype: Annotated[str, typer.Option(help="As of run.py.")] = "",
    passes: Annotated[str, typer.Option(help="Comma-separated; all but the forward in training by default.")] = "",
) -> None:
    """Microseconds of each kernel in one call, at the sizes that run.py has for a GPU; of merging there is none."""
    console = make_console()
    try:
        device = parse_device("cuda")
        benchmarks = [load(name) for name in op or OPS]
        console.print(" · ".join(f"{name} {value}" for name, value in header(device).items()), highlight=False)
        for benchmark in benchmarks:
            for found in tables(benchmark, split(implementations), dtype, split(passes)):
                console.print(found, markup=False, highlight=False)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    typer.run(main)
