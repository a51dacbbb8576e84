"""How time and memory grow with each size: ``python benchmarks/growth.py --json results/growth.json``.

Every sweep changes one size of one op, and times ours beside its yardstick as ``run.py`` does. A line is fitted to what
counted work says the time is linear in; where the times leave it, something else costs. See README.md here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
import typer
from adapter_fusion import FusionShape
from bottleneck_adapter import BottleneckShape
from kron_linear import KronShape
from lora_linear import LinearShape
from measure import WrongResultError
from multi_lora_linear import MixedShape
from prefix_attention import AttentionShape
from registry import INFERENCE, TRAINING, Dtypes, Shape, load
from report import Report, Row, make_console, unique, write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table
from run import Problem, choose, choose_effort, header, measure, split

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRAIGHT = 0.15
"""Most that a time may be off the line, relative to it."""
WIDE = 4


@dataclass(frozen=True)
class Sweep:
    """One size that grows.

    Args:
        axis: its name.
        sizes: its values; for ``threads`` the shape stays.
        shape: the problem of a size.
        linear_in: what the time is linear in, by the work counted.
    """

    op: str
    axis: str
    sizes: Sequence[int]
    shape: Callable[[int], Shape]
    pass_name: str = TRAINING
    linear_in: Callable[[float], float] = float
    formula: str = "{axis}"

    @property
    def name(self) -> str:
        return f"{self.op} {self.axis}"


def thread_counts() -> list[int]:
    """Powers of two up to the cores, and those."""
    cores = os.cpu_count() or 1
    return sorted({1, *(2**i for i in range(1, cores.bit_length()) if 2**i < cores), cores})


def square(size: float) -> float:
    return size**2


def inverse(size: float) -> float:
    return 1 / size


ROWS = (64, 128, 256, 512, 1024, 2048, 4096)
SWEEPS = (
    Sweep("lora_linear", "M", ROWS, lambda m: LinearShape(m, 768, 768, 8)),
    Sweep("lora_linear", "r", (4, 8, 16, 32, 64, 128), lambda r: LinearShape(512, 768, 768, r)),
    Sweep(
        "lora_linear",
        "hidden",
        (256, 512, 768, 1024, 1536, 2048, 3072),
        lambda k: LinearShape(512, k, k, 8),
        linear_in=square,
        formula="{axis}²",
    ),
    Sweep(
        "lora_linear",
        "threads",
        thread_counts(),
        lambda _: LinearShape(4096, 768, 768, 8),
        linear_in=inverse,
        formula="1/{axis}",
    ),
    Sweep("multi_lora_linear", "n", (1, 2, 4, 8, 16, 32, 64), lambda n: MixedShape(64, 1, 768, 768, n, 8), INFERENCE),
    Sweep("multi_lora_linear", "r", (4, 8, 16, 32, 64), lambda r: MixedShape(32, 16, 768, 768, 8, r)),
    Sweep("prefix_attention", "P", (8, 16, 32, 64, 128, 256, 512), lambda p: AttentionShape(8, 128, 128, p)),
    Sweep("kron_linear", "M", ROWS, lambda m: KronShape(m, 4, 4, 4, 192, 192, 8)),
    Sweep("bottleneck_adapter", "M", ROWS, lambda m: BottleneckShape(m, 768, 64)),
    Sweep("bottleneck_adapter", "k", (16, 32, 64, 128, 256), lambda k: BottleneckShape(512, 768, k)),
    Sweep("adapter_fusion", "N", (2, 4, 8, 16), lambda n: FusionShape(n, 512, 768)),
)


class GrowthRow(Row):
    """A row of a report, with its place in a sweep."""

    sweep: str
    axis: str
    x: int


class Fit(NamedTuple):
    """ms = base + slope · (what the time is linear in); ``off`` is the most that a time leaves it, relative to it."""

    base: float
    slope: float
    off: float


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Least squares of the relative differences, so that small sizes count too."""
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    columns = torch.stack([torch.ones_like(a), a], dim=1) / b[:, None]
    base, slope = torch.linalg.lstsq(columns, torch.ones_like(b)[:, None]).solution[:, 0].tolist()
    return Fit(base, slope, (b / (base + slope * a) - 1).abs().max().item())


def measure_sweep(sweep: Sweep, sizes: Sequence[int], rounds: int | None, seconds: float | None) -> list[GrowthRow]:
    benchmark = load(sweep.op)
    effort = choose_effort(benchmark, "quick", rounds, seconds)
    chosen = choose(benchmark, ["ours"], compiled=False)
    rows: list[GrowthRow] = []
    for size in sizes:
        torch.set_num_threads(size if sweep.axis == "threads" else 1)
        problem = Problem(benchmark, sweep.shape(size), Dtypes.parse("float32"))
        for row in measure(problem, chosen, effort, [sweep.pass_name]):
            rows.append({**row, "sweep": sweep.name, "axis": sweep.axis, "x": size})
    return rows


def sweeps_of(rows: Sequence[Any]) -> list[str]:
    return unique(r["sweep"] for r in rows)


def series(rows: Sequence[Any], sweep: str, key: str, implementation: str = "ours") -> tuple[list[int], list[float]]:
    """Sizes, and what was measured there."""
    chosen = [r for r in rows if r["sweep"] == sweep and r["implementation"] == implementation]
    return [r["x"] for r in chosen], [r[key] for r in chosen]


def yardstick_of(rows: Sequence[Any], sweep: str) -> str:
    return next(r["implementation"] for r in rows if r["sweep"] == sweep)


def floors(rows: Sequence[Any], sweep: str) -> tuple[list[int], list[float]]:
    """The counted work, in milliseconds at the rate of the yardstick: not a limit where ours does the same faster."""
    chosen = [r for r in rows if r["sweep"] == sweep and r["implementation"] == yardstick_of(rows, sweep)]
    return [r["x"] for r in chosen], [r["floor"] * r["ms"] for r in chosen]


def sweep_of(name: str) -> Sweep:
    return next(sweep for sweep in SWEEPS if sweep.name == name)


COLUMNS = ("sweep", "sizes", "time is linear in", "ms", "memory, MiB", "most off the line", "")


def summary(rows: Sequence[Any], name: str) -> list[str]:
    """Cells of a sweep in the order of COLUMNS; through two points there is always a line."""
    sweep = sweep_of(name)
    sizes, times = series(rows, name, "ms")
    found = fit([sweep.linear_in(x) for x in sizes], times)
    cells = [name, f"{sizes[0]} to {sizes[-1]}", sweep.formula.format(axis=sweep.axis)]
    cells += [f"{found.base:.3g} + {found.slope:.3g} · {cells[-1]}", memory(rows, name)]
    if len(sizes) < 3:
        return [*cells, "-", "two points"]
    return [*cells, f"{found.off:.0%}", "straight" if found.off <= STRAIGHT else "bent"]


def memory(rows: Sequence[Any], name: str) -> str:
    """Of the first and the last size."""
    held = [b for b in series(rows, name, "peak_bytes")[1] if b is not None]
    return f"{held[0] / 2**20:.2f} to {held[-1] / 2**20:.2f}" if held else "-"


def print_growth(rows: Sequence[Any], console: Console) -> None:
    table = Table(title="ours, float32, 1 thread where threads do not grow", title_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for name in sweeps_of(rows):
        table.add_row(*summary(rows, name))
    console.print(table, highlight=False)


def write_plot(report: Report, path: Path, made_of: str = "") -> None:
    """Time above, memory below; a column for each sweep, so many beside each other."""
    from matplotlib.figure import Figure

    rows: Sequence[Any] = report["rows"]
    names = sweeps_of(rows)
    figure = Figure(figsize=(3.0 * WIDE, 4.4 * -(-len(names) // WIDE)), layout="constrained")
    bands = figure.subfigures(-(-len(names) // WIDE), 1, squeeze=False).flat
    for start, band in zip(range(0, len(names), WIDE), bands, strict=True):
        axes = band.subplots(2, WIDE)
        for column, name in enumerate(names[start : start + WIDE]):
            draw_time(axes[0, column], rows, name)
            draw_memory(axes[1, column], rows, name)
        for unused in axes[:, len(names) - start :].flat:
            unused.set_axis_off()
    figure.savefig(path, dpi=70, metadata={"Source": made_of})


def draw_time(axes: Axes, rows: Sequence[Any], name: str) -> None:
    sweep, yardstick = sweep_of(name), yardstick_of(rows, name)
    sizes, times = series(rows, name, "ms")
    found = fit([sweep.linear_in(x) for x in sizes], times)
    axes.plot(sizes, times, "o", label="ours")
    axes.plot(sizes, [found.base + found.slope * sweep.linear_in(x) for x in sizes], "-", color="C0", label="line")
    if yardstick != "ours":
        axes.plot(*series(rows, name, "ms", yardstick), "x", color="C1", label=yardstick)
    axes.plot(*floors(rows, name), "--", color="black", label="counted, at its rate")
    axes.set_title(f"{name} {sweep.pass_name}", fontsize="small")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="x-small")


def draw_memory(axes: Axes, rows: Sequence[Any], name: str) -> None:
    for implementation in unique(r["implementation"] for r in rows if r["sweep"] == name):
        sizes, held = series(rows, name, "peak_bytes", implementation)
        color = "C0" if implementation == "ours" else "C1"  # as above
        axes.plot(sizes, [(b or 0) / 2**20 for b in held], ".-", color=color, label=implementation)
    axes.set_xlabel(sweep_of(name).axis)
    axes.set_ylabel("peak MiB")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="x-small")


def main(
    sweeps: Annotated[list[str] | None, typer.Argument(help="Such as 'lora_linear M'; all by default.")] = None,
    sizes: Annotated[str, typer.Option(help="Comma-separated sizes of your own, for one sweep.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="The smallest three sizes of each.")] = False,
    rounds: Annotated[int | None, typer.Option(min=2, help="At least so many rounds a size.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="At least so long a size.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write header and rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the curves (PNG) here.")] = None,
) -> None:
    """Times ours and its yardstick while one size grows, and fits a line to what counted work says."""
    names = [sweep.name for sweep in SWEEPS]
    for name in sweeps or []:
        if name not in names:
            raise typer.BadParameter(f"sweep: got {name!r}, want some of {', '.join(names)}")
    if sizes and len(sweeps or names) > 1:
        raise typer.BadParameter("sizes: those of your own are for one sweep, so name one")
    try:
        own = [int(size) for size in split(sizes)]
    except ValueError:
        raise typer.BadParameter(f"sizes: got {sizes!r}, want whole numbers") from None
    console = make_console()
    rows: list[Any] = []
    try:
        for sweep in track([s for s in SWEEPS if s.name in (sweeps or names)], "measuring", console=console):
            rows += measure_sweep(sweep, own or sweep.sizes[: 3 if quick else None], rounds, seconds)
    except WrongResultError as error:
        console.print(f"wrong result, no figures: {error}", style="red", highlight=False)
        raise typer.Exit(1) from None
    report = Report(header=header(torch.device("cpu")), rows=rows, failures=[])
    print_growth(rows, console)
    if json_path:
        write_json(report, json_path)
    if plot:
        write_plot(report, plot)


if __name__ == "__main__":
    typer.run(main)
