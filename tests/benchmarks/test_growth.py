"""How cost grows: the fit, and a report of tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import growth
import pytest
from command import runner

run = runner(growth.main)


@pytest.mark.parametrize("sweep", growth.SWEEPS, ids=lambda sweep: sweep.name)
def test_every_sweep_grows_what_it_names(sweep: growth.Sweep) -> None:
    first, last = (sweep.shape(size) for size in (sweep.sizes[0], sweep.sizes[-1]))
    assert list(sweep.sizes) == sorted(set(sweep.sizes))
    assert (first == last) == (sweep.axis == "threads")
    if sweep.axis not in ("threads", "hidden"):
        assert getattr(last, sweep.axis) == sweep.sizes[-1]


def test_fit() -> None:
    found = growth.fit([1, 2, 4, 8], [3.0, 5.0, 9.0, 17.0])
    assert found == pytest.approx((1.0, 2.0, 0.0), abs=1e-9)
    assert growth.fit([1, 2, 4, 8], [3.0, 5.0, 9.0, 34.0]).off > growth.STRAIGHT
    rows = [{"sweep": "lora_linear M", "implementation": "ours", "x": x, "ms": x, "peak_bytes": x} for x in (64, 128)]
    assert growth.summary(rows, "lora_linear M")[-1] == "two points"
    assert growth.inverse(4) == 0.25 and growth.square(4) == 16


def test_report(tmp_path: Path) -> None:
    path, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    code, output = run(
        *("lora_linear M", "--sizes", "1,2,4", "--rounds", "2", "--seconds", "0", "--json", path, "--plot", plot)
    )
    assert code == 0, output
    assert "lora_linear M 1 to 4" in output
    rows = json.loads(path.read_text())["rows"]
    assert [(row["x"], row["implementation"]) for row in rows] == [
        (x, i) for x in (1, 2, 4) for i in ("frozen", "ours")
    ]
    assert all(row["sweep"] == "lora_linear M" and row["shape"]["M"] == row["x"] for row in rows)
    assert growth.floors(rows, "lora_linear M")[1][0] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no such sweep"], "sweep: got 'no such sweep'"),
        (["--sizes", "1,2"], "sizes: those of your own"),
        (["lora_linear M", "--sizes", "1,x"], "sizes: got '1,x'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    code, output = run(*arguments)
    assert code == 2 and message in output
