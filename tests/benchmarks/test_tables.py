"""The tables of the documents: they are those of the JSON files, and what is stale is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tables
import typer
from typer.testing import CliRunner

app = typer.Typer()
app.command()(tables.main)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


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


def test_a_report_of_whole_models(root: Path) -> None:
    shutil.copy(root / "results/training_step.json", root / "results/e2e_minilm.json")
    lines = tables.TABLES["e2e_minilm"]()
    assert "| batch, length, dropout, model_dropout | pass | frozen ms | hf_peft | ours | peak MiB |" in lines
    assert any("**1.024 / 1.035**" in line and "hf_peft 168" in line for line in lines)
