"""Writes the tables of README.md and docs/, and the plots, from results/*.json: ``python benchmarks/tables.py``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; TABLES says how each is made.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import growth
import time_to
import typer
from registry import FORWARD, GRAPH, INFERENCE, TRAINING, TRAINING_GRAPH
from report import Report, Row, unique, write_plot
from rich.console import Console

from peft_ext.cli import comparison

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
DOCUMENTS = ("README.md", "docs/benchmarks.md")
PLOTS: dict[str, Callable[[Report, Path, str], None]] = {
    "lora_linear": write_plot,
    "e2e_minilm": write_plot,
    "e2e_smollm2": write_plot,
    "growth": growth.write_plot,
}
"""Reports that have a plot beside them, once they are there."""

REGION = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
Lines = list[str]


class Figures:
    """The rows of a report, by what was measured."""

    def __init__(self, name: str) -> None:
        self.report: Report = json.loads((RESULTS / f"{name}.json").read_text())
        self.rows = {(r["label"], r["pass"], r["implementation"], r["threads"]): r for r in self.report["rows"]}
        self.threads: list[int] = unique(r["threads"] for r in self.report["rows"])

    def all(self, label: str, pass_name: str, implementation: str) -> list[Row]:
        """One row for each thread count."""
        return [self.rows[label, pass_name, implementation, count] for count in self.threads]

    def has(self, label: str, pass_name: str, implementation: str) -> bool:
        return (label, pass_name, implementation, self.threads[0]) in self.rows

    def ratio(self, label: str, pass_name: str, implementation: str, digits: int = 2) -> str:
        return " / ".join(f"{r['ratio']:.{digits}f}" for r in self.all(label, pass_name, implementation))

    def times_ours(self, label: str, pass_name: str, peer: str) -> str:
        pairs = zip(self.all(label, pass_name, peer), self.all(label, pass_name, "ours"), strict=True)
        return " / ".join(f"{theirs['ratio'] / ours['ratio']:.1f}" for theirs, ours in pairs)

    def peak(self, label: str, pass_name: str, implementation: str, digits: int = 2) -> str:
        """MiB, with one thread."""
        held = self.rows[label, pass_name, implementation, self.threads[0]]["peak_bytes"]
        return "-" if held is None else f"{held / 2**20:.{digits}f}"

    def floor(self, label: str, pass_name: str) -> str:
        return f"{next(r for r in self.report['rows'] if (r['label'], r['pass']) == (label, pass_name))['floor']:.2f}"

    @property
    def origin(self) -> str:
        return origin(self.report["header"])


def origin(header: Mapping[str, Any]) -> str:
    """When, where and with what."""
    cores = f", {header['cores']} cores" if "cores" in header else ""
    versions = ", ".join(f"{name} {header[name]}" for name in ("torch", "peft", "transformers") if header.get(name))
    return f"{header['date'][:10]}, {header['cpu']} ({header['isa']}{cores}), {versions}, commit {header['commit']}"


def measured(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str = "---") -> Lines:
    cells = [columns, ["---" if i == 0 else align for i in range(len(columns))], *rows]
    return ["", *(f"| {' | '.join(row)} |" for row in cells), ""]


def spaced(label: str) -> str:
    return label.replace(",", ", ")


def lora_linear_short() -> Lines:
    figures = Figures("lora_linear")
    labels = ("1,768,768,8,0", "512,768,768,8,0.1", "4096,768,768,8,0", "256,4096,4096,16,0.05")
    rows = [
        [
            spaced(label),
            figures.ratio(label, TRAINING, "hf_peft"),
            f"**{figures.ratio(label, TRAINING, 'ours')}**",
            figures.floor(label, TRAINING),
            f"{figures.peak(label, TRAINING, 'hf_peft')} → {figures.peak(label, TRAINING, 'ours')}",
        ]
        for label in labels
    ]
    columns = ["rows, in, out, rank, dropout", "HF PEFT", "**peft_ext**", "counted floor", "peak MiB: HF PEFT → ours"]
    return [*markdown(columns, rows), f"{figures.origin}."]


def lora_linear() -> Lines:
    figures = Figures("lora_linear")
    rows = [
        [
            spaced(label),
            name,
            figures.ratio(label, name, "eager"),
            figures.ratio(label, name, "hf_peft"),
            f"**{figures.ratio(label, name, 'ours')}**",
            figures.floor(label, name),
            f"{figures.peak(label, name, 'hf_peft')} → {figures.peak(label, name, 'ours')}",
        ]
        for label in unique(r["label"] for r in figures.report["rows"])
        for name in (FORWARD, TRAINING)
    ]
    columns = ["M, K, N, r, dropout", "pass", "eager formula", "HF PEFT", "**peft_ext**", "counted floor"]
    return [*markdown([*columns, "peak MiB: HF PEFT → ours"], rows), f"{figures.origin}."]


OTHER_OPS = (
    ("kron_linear", "eager", "512,4,4,4,192,6,1", "768 → 24, n=4, rank 1, M=512"),
    ("kron_linear", "eager", "512,4,4,4,6,192,1", "24 → 768, n=4, rank 1, M=512"),
    ("kron_linear", "eager", "512,4,4,4,192,192,8", "768 → 768, n=4, rank 8, M=512"),
    ("kron_linear", "eager", "512,8,8,8,512,512,8", "4096 → 4096, n=8, rank 8, M=512"),
    ("prefix_attention", "concat", "64,1,16,100,0", "decode, B=64, S=16, P=100"),
    ("prefix_attention", "concat", "64,1,64,100,0", "decode, B=64, S=64, P=100"),
    ("prefix_attention", "concat", "8,16,16,200,0", "B=8, T=16, P=200"),
    ("prefix_attention", "concat", "2,1024,1024,100,0", "B=2, T=1024, P=100"),
    ("prefix_attention", "concat", "2,1024,1024,100,1", "the same, causal"),
    ("prefix_attention", "concat", "32,128,128,30,0", "B=32, T=128, P=30"),
    ("prefix_attention", "concat", "8,512,512,30,0", "B=8, T=512, P=30"),
    ("bottleneck_adapter", "eager", "32,768,64", "768/64, M=32"),
    ("bottleneck_adapter", "eager", "512,768,64", "768/64, M=512"),
    ("bottleneck_adapter", "eager", "4096,768,64", "768/64, M=4096"),
    ("adapter_fusion", "eager", "3,512,768,0", "N=3, M=512, D=768, one query"),
    ("adapter_fusion", "eager", "8,512,768,0", "N=8, M=512, D=768, one query"),
    ("adapter_fusion", "eager", "16,512,768,0", "N=16, M=512, D=768, one query"),
    ("adapter_fusion", "eager", "3,512,768,1", "N=3, M=512, D=768, paper"),
    ("adapter_fusion", "eager", "8,512,768,1", "N=8, M=512, D=768, paper"),
    ("adapter_fusion", "eager", "16,512,768,1", "N=16, M=512, D=768, paper"),
)
"""Op, peer, sizes, and what they are called."""


def other_ops() -> Lines:
    reports = {op: Figures(op) for op in unique(op for op, *_ in OTHER_OPS)}
    rows = []
    for op, peer, label, case in OTHER_OPS:
        figures = reports[op]
        peaks = f"{figures.peak(label, TRAINING, peer)} → {figures.peak(label, TRAINING, 'ours')}"
        gains = [figures.times_ours(label, name, peer) for name in (FORWARD, TRAINING)]
        rows.append([f"`{op}`", case, *gains, peaks])
    origins = [
        f"{', '.join(f'`{op}`' for op, figures in reports.items() if figures.origin == origin)}: {origin}"
        for origin in unique(figures.origin for figures in reports.values())
    ]
    return [*markdown(["op", "case", FORWARD, TRAINING, "peak: peer → ours"], rows), f"{'; '.join(origins)}."]


MIXED = (
    ("32,1,768,768,1,8,0", INFERENCE),
    ("32,1,768,768,32,8,0", INFERENCE),
    ("64,1,768,768,1,8,0", INFERENCE),
    ("64,1,768,768,32,8,0", INFERENCE),
    ("64,1,768,768,64,8,0", INFERENCE),
    ("64,1,768,768,64,8,0", TRAINING),
    ("32,1,4096,4096,32,8,0", INFERENCE),
    ("32,1,4096,4096,32,8,0", TRAINING),
    ("32,48,768,768,32,8,0", INFERENCE),
    ("32,48,768,768,32,8,0", TRAINING),
)


def multi_lora_linear() -> Lines:
    figures = Figures("multi_lora_linear")
    rows = []
    for label, name in MIXED:
        batch, tokens, *sizes = label.split(",")
        case = f"{batch} × {tokens}, {', '.join(sizes[:3])}"  # noqa: RUF001
        peer, ours = (figures.ratio(label, name, i) for i in ("hf_peft", "ours"))
        rows.append([case, name, peer, f"**{ours}**"])
    columns = ["rows × tokens, in, out, adapters", "pass", "HF PEFT", "**peft_ext**"]  # noqa: RUF001
    return [*markdown(columns, rows), f"{figures.origin}."]


def quantized_linear() -> Lines:
    if not measured("quantized_linear"):
        return not_measured("quantized_linear")
    figures = Figures("quantized_linear")
    rows = []
    for label in unique(row["label"] for row in figures.report["rows"]):
        m, k, n, bits, rank = label.split(",")
        case = f"{m}, {k}, {n}, int{bits}" + (f", LoRA of rank {rank}" if rank != "0" else "")
        for name in (INFERENCE, TRAINING):
            torchs = figures.ratio(label, name, "torch") if figures.has(label, name, "torch") else "-"
            eager, ours = (figures.ratio(label, name, i) for i in ("eager", "ours"))
            rows.append([case, name, eager, torchs, f"**{ours}**"])
    columns = ["M, K, N, base", "pass", "dequantized first", "torch's int8", "**peft_ext**"]
    return [*markdown(columns, rows), f"{figures.origin}."]


def not_measured(name: str) -> Lines:
    return ["", f"Not measured yet: `benchmarks/regenerate.sh DATA {name}`.", ""]


def picture(name: str) -> Lines:
    return ["", f"![{name}](../benchmarks/results/{name}.png)", ""]


def how_cost_grows() -> Lines:
    """The line that fits each sweep of ``growth.py``."""
    if not measured("growth"):
        return not_measured("growth")
    figures = Figures("growth")
    rows = figures.report["rows"]
    columns = [column or "verdict" for column in growth.COLUMNS]
    lines = markdown(columns, [growth.summary(rows, name) for name in growth.sweeps_of(rows)])
    return [*lines, f"{figures.origin}.", *picture("growth")]


def whole_model(name: str) -> Lines:
    """All implementations of a report side by side: ratios to the yardstick, then the most that each held."""
    if not measured(name):
        return not_measured(name)
    figures = Figures(name)
    yardstick, *others = unique(r["implementation"] for r in figures.report["rows"])
    rows = [
        [
            spaced(label),
            pass_name,
            " / ".join(f"{r['ms']:.0f}" for r in figures.all(label, pass_name, yardstick)),
            *(cell(figures, label, pass_name, i) for i in others),
            ", ".join(
                f"{i} {figures.peak(label, pass_name, i, 0)}"
                for i in (yardstick, *others)
                if figures.has(label, pass_name, i)
            ),
        ]
        for label, pass_name in unique((r["label"], r["pass"]) for r in figures.report["rows"])
    ]
    sizes = ", ".join(figures.report["rows"][0]["shape"])
    threads = " / ".join(map(str, figures.threads))
    halves = [(r["ratio_high"] - r["ratio_low"]) / 2 for r in figures.report["rows"] if r["implementation"] in others]
    certainty = f"half a 95% interval of them {statistics.median(halves):.2f}, at most {max(halves):.2f}"
    return [
        *markdown([sizes, "pass", f"{yardstick} ms", *others, "peak MiB"], rows),
        f"Ratios to {yardstick}, {threads} thread(s), {certainty}; {figures.origin}.",
        *picture(name),
    ]


def time_to_target(name: str) -> Lines:
    if not measured(name):
        return not_measured(name)
    report = json.loads((RESULTS / f"{name}.json").read_text())
    header = report["header"]
    rows = time_to.summary(report["runs"], header["metric"], header["target"])
    about = f"{header['model']} to {header['metric']} {header['target']:g}, {header['threads']} thread(s)"
    return [*markdown(time_to.COLUMNS, rows), f"{about}; {origin(header)}."]


def cell(figures: Figures, label: str, pass_name: str, implementation: str) -> str:
    if not figures.has(label, pass_name, implementation):
        return "-"
    text = figures.ratio(label, pass_name, implementation, digits=3)
    return f"**{text}**" if implementation.startswith("ours") else text


def cuda() -> Lines:
    """Microseconds of each op on a GPU: its floor, the fastest peer and ours."""
    if not measured("cuda"):
        return ["", "Not measured yet: `benchmarks/gpu.sh`.", ""]
    report: Report = json.loads((RESULTS / "cuda.json").read_text())
    passes = (INFERENCE, GRAPH, TRAINING, TRAINING_GRAPH)
    problems = unique((r["op"], r["label"], r["dtype"]) for r in report["rows"])
    rows = []
    for problem in problems:
        found = [r for r in report["rows"] if (r["op"], r["label"], r["dtype"]) == problem]
        names = passes if any(r["pass"] == TRAINING for r in found) else unique(r["pass"] for r in found)
        cells = [on_device([r for r in found if r["pass"] == name]) for name in names]
        cells += [""] * (len(passes) - len(cells))
        floors = [r["floor_ms"] for r in found if r["pass"] in (GRAPH, *names[:1]) and r["floor_ms"]]
        op, label, dtype = problem
        rows.append([f"`{op}` {spaced(label)}", dtype, f"{1e3 * floors[-1]:.0f}" if floors else "", *cells])
    columns = ["op and sizes", "dtype", "floor of the inference", *passes]
    header = report["header"]
    rates = ", ".join(f"{name} {header[name]:g}" for name in header if name.endswith(("TB/s", "TFLOP/s")))
    versions = f"torch {header['torch']}, CUDA {header['cuda']}, peft {header['peft']}"
    about = f"{header['date'][:10]}, {header['gpu']}, {versions}, commit {header['commit']}; {rates}."
    return [*markdown(columns, rows), about]


def on_device(rows: Sequence[Row]) -> str:
    """The yardstick if it is no peer, the fastest peer, and ours."""
    if not rows:
        return ""
    times = {r["implementation"]: 1e3 * r["ms"] for r in rows}
    peers = {r["implementation"]: times[r["implementation"]] for r in rows if r["peer"]}
    parts = [f"{name} {time:.0f}" for name, time in times.items() if name not in (*peers, "ours")]
    if peers:
        best = min(peers, key=peers.__getitem__)
        parts.append(f"{best} {peers[best]:.0f}")
    return f"{', '.join(parts)} → **{times['ours']:.0f}**"


def bfloat16() -> Lines:
    """Each op in bfloat16 on the CPU, as ratios to its yardstick: the fastest peer and ours."""
    if not measured("bfloat16"):
        return not_measured("bfloat16")
    report: Report = json.loads((RESULTS / "bfloat16.json").read_text())
    threads = unique(row["threads"] for row in report["rows"])
    rows = []
    for op, label in unique((row["op"], row["label"]) for row in report["rows"]):
        found = [row for row in report["rows"] if (row["op"], row["label"]) == (op, label)]
        yardstick = next(row["implementation"] for row in found if row["ratio"] == 1)
        cells = [
            beside_fastest([row for row in found if (row["pass"], row["threads"]) == (name, count)])
            for count in threads
            for name in (INFERENCE, TRAINING)
        ]
        rows.append([f"`{op}` {spaced(label)}", yardstick, *cells])
    columns = [f"{name}, {count} thread(s)" for count in threads for name in (INFERENCE, TRAINING)]
    return [*markdown(["op and sizes", "1 is", *columns], rows), f"{origin(report['header'])}."]


def beside_fastest(rows: Sequence[Row]) -> str:
    """Ratios of the fastest peer and of ours."""
    peers = [row for row in rows if row["peer"]]
    ours = [row for row in rows if row["implementation"] == "ours"]
    if not (peers and ours):
        return ""
    best = min(peers, key=lambda row: float(row["ratio"]))
    return f"{best['implementation']} {best['ratio']:.2f} → **{ours[0]['ratio']:.2f}**"


def compare() -> Lines:
    """The table of ``peft-ext compare``, from the file that it writes."""
    report = json.loads((RESULTS / "compare.json").read_text())
    rows = [comparison.Row(**row) for row in report["rows"]]
    return ["", *comparison.markdown(rows, report["metric"], report["about"]).splitlines()]


TABLES: dict[str, Callable[[], Lines]] = {
    "compare": compare,
    "lora_linear": lora_linear,
    "lora_linear_short": lora_linear_short,
    "other_ops": other_ops,
    "multi_lora_linear": multi_lora_linear,
    "quantized_linear": quantized_linear,
    "e2e_minilm": partial(whole_model, "e2e_minilm"),
    "e2e_smollm2": partial(whole_model, "e2e_smollm2"),
    "time_to_minilm": partial(time_to_target, "time_to_minilm"),
    "time_to_smollm2": partial(time_to_target, "time_to_smollm2"),
    "bfloat16": bfloat16,
    "growth": how_cost_grows,
    "cuda": cuda,
}


def filled(text: str) -> str:
    """The document with every region made anew.

    Raises:
        ValueError: where a region has no such table or no end.
    """
    starts, regions = text.count("<!-- table:"), list(REGION.finditer(text))
    if len(regions) != starts or any("<!-- table:" in r.group(0)[5:] for r in regions):
        raise ValueError(f"{starts} tables begin, but {len(regions)} end: want <!-- end --> after each")
    for region in regions:
        if region[2] not in TABLES:
            raise ValueError(f"table: got {region[2]!r}, want one of {', '.join(TABLES)}")
    return REGION.sub(lambda r: r[1] + "\n".join(TABLES[r[2]]()).strip("\n") + "\n" + r[3], text)


def digest(path: Path) -> str:
    return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def stale_plots() -> list[tuple[Path, Path]]:
    """JSON and PNG, where the plot was not made of that file: it names the file's hash."""
    sources = [RESULTS / f"{name}.json" for name in PLOTS if measured(name)]
    pairs = [(source, source.with_suffix(".png")) for source in sources]
    return [(json_, png) for json_, png in pairs if not png.exists() or digest(json_).encode() not in png.read_bytes()]


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit status 1 where something is stale.")
    ] = False,
) -> None:
    """Writes the tables of README.md and docs/, and the plots, from benchmarks/results/*.json."""
    console = Console()
    changed: list[Any] = []
    for document in (ROOT / name for name in DOCUMENTS):
        old = document.read_text()
        try:
            new = filled(old)
        except (ValueError, KeyError) as error:
            raise typer.BadParameter(f"{document.name}: {error}") from None
        if new != old:
            changed.append(document)
            if not check:
                document.write_text(new)
    for source, plot in stale_plots():
        changed.append(plot)
        if not check:
            PLOTS[source.stem](json.loads(source.read_text()), plot, digest(source))
    for path in changed:
        console.print(f"{path.relative_to(ROOT)}: {'stale' if check else 'written'}", highlight=False)
    if check and changed:
        console.print("python benchmarks/tables.py writes them anew", highlight=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
