"""docs/exactness.md: its table has every op and type, and the ops are as exact as it says."""

from __future__ import annotations

import re
from pathlib import Path

import errors
import pytest
from registry import OPS, Dtypes, load

DOCUMENT = (Path(__file__).parents[2] / "docs" / "exactness.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\w+) \| (\w+) \| (\S*) ?\| (\S*) ?\| (\S*) ?\| (\S*) ?\|$", DOCUMENT, re.MULTILINE)


def test_table_is_complete() -> None:
    found = {(op, name) for op, name, *_ in ROWS}
    types = {op: set(errors.TYPES) - ({"float64"} if op == "quantized_linear" else set()) for op in OPS}
    assert found == {(op, name) for op in OPS for name in types[op]}


@pytest.mark.parametrize("op", OPS)
def test_errors_are_those_of_the_table(op: str) -> None:
    """Other processors sum in another order: up to three times as much."""
    for row_op, name, results, _, gradients, _ in ROWS:
        if row_op != op or name == "float64":
            continue
        ours = errors.measured(load(op), Dtypes.parse(name), ["ours"])["ours"]
        for found, stated in ((ours.results, results), (ours.gradients, gradients)):
            assert (found is None) == (stated == "")
            if found is not None:
                assert found <= 3 * float(stated), (name, found, stated)
