"""How far results and gradients are from those in float64, by op and type: docs/exactness.md.

Usage: python benchmarks/errors.py    prints the document's table
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from measure import CPU, SEED, make_tensors
from registry import OPS, Benchmark, Dtypes, Shape, Tensors, load

IMPLEMENTATIONS = ("ours", "eager")
TYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass
class Errors:
    """The largest differences from float64, as parts of the largest element of their tensor."""

    results: float | None = None
    gradients: float | None = None

    def add(self, name: str, found: torch.Tensor, exact: torch.Tensor) -> None:
        error = ((found.double() - exact).abs().max() / exact.abs().max()).item()
        if "grad" in name:
            self.gradients = max(self.gradients or 0.0, error)
        else:
            self.results = max(self.results or 0.0, error)


def measured(benchmark: Benchmark, dtypes: Dtypes, names: Sequence[str] = IMPLEMENTATIONS) -> dict[str, Errors]:
    """Of each implementation, over the op's quick shapes without dropout."""
    errors = {name: Errors() for name in names}
    for shape in benchmark.shapes["quick"]:
        plain = shape.without_dropout()
        tensors = make_tensors(benchmark, plain, dtypes, CPU)
        exact = {name: tensor.double() for name, tensor in tensors.items()}
        for name, found, oracle in _results(benchmark, names, plain, tensors, exact):
            for key, want in oracle.items():
                errors[name].add(key, found[key], want.double())
    return errors


def _results(
    benchmark: Benchmark, names: Sequence[str], shape: Shape, tensors: Tensors, exact: Tensors
) -> Iterator[tuple[str, Tensors, Tensors]]:
    for implementation in benchmark.implementations:
        if implementation.name in names:
            torch.manual_seed(SEED)
            yield (
                implementation.name,
                implementation.build(shape, tensors).results(),
                implementation.oracle(shape, exact),
            )


def rows() -> Iterator[tuple[str, str, dict[str, Errors]]]:
    """Op, type and errors."""
    for op in OPS:
        benchmark = load(op)
        for name in TYPES:
            try:
                yield op, name, measured(benchmark, Dtypes.parse(name))
            except TypeError:  # the scales of a quantized weight are float32
                continue


def table() -> str:
    """In Markdown."""
    lines = ["| op | type | results: ours | by the formula | gradients: ours | by the formula |", "| --- " * 6 + "|"]
    for op, name, errors in rows():
        ours, eager = errors["ours"], errors["eager"]
        cells = [ours.results, eager.results, ours.gradients, eager.gradients]
        lines.append(f"| {op} | {name} | {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _cell(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}" if error else "0"


if __name__ == "__main__":
    print(table())
