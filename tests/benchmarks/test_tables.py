"""The tables of the documents: they are those of the JSON files, and what is stale is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tables
from command import runner

run = runner(tables.main)


def test_documents_and_plots_are_not_stale() -> None:
    code, output = run("--check")
    assert code == 0, output


def test_every_table_is_shown() -> None:
    text = "".join((tables.ROOT / name).read_text() for name in tables.DOCUMENTS)
    assert set(tables.TABLES) == {match[2] for match in tables.REGION.finditer(text)}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of documents and results."""
    for name in tables.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tables.ROOT / name, tmp_path / name)
    shutil.copytree(tables.RESULTS, tmp_path / "results")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    return tmp_path


def test_new_figures_are_stale_until_they_are_written(root: Path) -> None:
    path = root / "results/lora_linear.json"
    path.chmod(0o644)
    report = json.loads(path.read_text())
    for row in report["rows"]:
        if row["implementation"] == "ours":
            row["ratio"] = row["ratio_low"] = row["ratio_high"] = 12.25
    report["header"]["date"] = "2031-02-03T00:00:00+00:00"
    path.write_text(json.dumps(report))
    code, output = run("--check")
    assert code == 1
    for name in ("README.md: stale", "docs/benchmarks.md: stale", "results/lora_linear.png: stale"):
        assert name in output
    assert run()[0] == 0
    text = (root / "README.md").read_text()
    assert "| **12.25 / 12.25** |" in text
    assert "2031-02-03, " in text
    assert run("--check") == (0, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: theirs -->\n<!-- end -->", "table: got 'theirs'"),
        ("<!-- table: compare -->\n", "1 tables begin, but 0 end"),
        ("<!-- table: compare -->\n<!-- table: lora_linear -->\n<!-- end -->", "2 tables begin, but 1 end"),
    ],
)
def test_a_region_that_is_no_table(root: Path, text: str, message: str) -> None:
    (root / "README.md").write_text(text)
    code, output = run()
    assert code == 2 and message in output


def test_a_report_of_whole_models() -> None:
    lines = tables.TABLES["e2e_minilm"]()
    assert lines[1].startswith("| batch, length, dropout, model_dropout, adapters | pass | frozen ms |")
    assert lines[-2] == "![e2e_minilm](../benchmarks/results/e2e_minilm.png)"


def test_what_is_not_measured_yet_says_how(root: Path) -> None:
    for name in ("e2e_minilm", "growth", "time_to_minilm"):
        (root / f"results/{name}.json").unlink(missing_ok=True)
        assert f"`benchmarks/regenerate.sh DATA {name}`" in "".join(tables.TABLES[name]())


def test_time_to_a_target(root: Path) -> None:
    curve = [{"steps": s, "seconds": s / 4, "loss": 1.0, "accuracy": s / 100} for s in (10, 80)]
    about = {"model": "minilm", "metric": "accuracy", "target": 0.75, "threads": 1}
    header = json.loads((root / "results/lora_linear.json").read_text())["header"] | about
    (root / "results/time_to_minilm.json").write_text(
        json.dumps({"header": header, "runs": {"ours": curve, "hf_peft": curve[:1]}})
    )
    lines = tables.TABLES["time_to_minilm"]()
    assert "| ours | 80 | 20.0 | 250 | 0.800 |" in lines
    assert "| hf_peft | - | not reached | 250 | 0.100 |" in lines
    assert lines[-1].startswith("minilm to accuracy 0.75, 1 thread(s); ")
