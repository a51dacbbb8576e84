"""``peft-ext train``: what it writes, that it learns, resumes, and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import Result

from peft_ext.cli.methods import option_help
from peft_ext.cli.progress import RichProgress
from peft_ext.tuners import LoraConfig, PeftConfig

Run = Callable[..., Result]
FAST = ("--lr", 2e-2, "--batch-size", 16, "--max-length", 8)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_train_learns_and_writes_adapter_metrics_and_plot(command: Run, bert: Path, csv_file: Path, out: Path) -> None:
    result = command("train", bert, "--train", csv_file, "--eval", csv_file, "--epochs", 15, *FAST, "-o", out)
    assert result.exit_code == 0, result.output
    measured = metrics_of(out)
    assert measured["before"]["accuracy"] < 0.6 < 0.9 < measured["after"]["accuracy"]
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert f"peft-ext eval {out}" in result.output
    # 2 layers x (query, value) x (A, B) x rank 8 x width 32, the pooler, the head
    assert measured["trained_parameters"] == 2 * 2 * 2 * 8 * 32 + (32 * 32 + 32) + (32 * 2 + 2)
    config = PeftConfig.from_pretrained(out)
    assert isinstance(config, LoraConfig)
    assert config.target_modules == {"query", "value"}
    assert config.base_model_name_or_path == str(bert.resolve())


def test_options_reach_the_configuration(command: Run, bert: Path, csv_file: Path, out: Path) -> None:
    chosen = ("--rank", 4, "--alpha", 2, "--dropout", 0.25, "--rslora", "--target-modules", "key, dense")
    result = command(
        "train", bert, "--train", csv_file, "--limit", 16, "--epochs", 1, *FAST, *chosen,
        "--modules-to-save", "classifier", "-o", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = PeftConfig.from_pretrained(out)
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 2, 0.25, True)
    assert config.target_modules == {"key", "dense"}
    assert not any("pooler" in name for name in load_file(out / "adapter_model.safetensors") if "modules" in name)


def test_the_head_alone(command: Run, bert: Path, csv_file: Path, out: Path) -> None:
    result = command(
        "train", bert, "--train", csv_file, "--eval", csv_file, "--method", "head", "--epochs", 1, *FAST, "-o", out
    )
    assert result.exit_code == 0, result.output
    measured = metrics_of(out)
    assert measured["trained_parameters"] == (32 * 32 + 32) + (32 * 2 + 2)
    assert all(".classifier." in name or ".pooler." in name for name in load_file(out / "adapter_model.safetensors"))
    result = command("eval", out, "--data", csv_file)
    assert result.exit_code == 0, result.output
    assert f"{measured['after']['loss']:.4f}" in result.output


@pytest.mark.parametrize(
    ("method", "count"),
    [
        # 2 layers x (4 attention, 2 FFN, 2 LayerNorm) biases of width 32, the embeddings' LayerNorm, pooler, head
        ("bitfit", (2 * 8 + 1) * 32 + (32 * 32 + 32) + (32 * 2 + 2)),
        # 1 layer of 6 linear layers and 2 LayerNorms, the embeddings' LayerNorm, the side's pooler, a, the head
        ("side", 6 * (32 * 32 + 32) + 3 * 2 * 32 + (32 * 32 + 32) + 1 + (32 * 2 + 2)),
    ],
)
def test_methods_without_adapters(command: Run, bert: Path, csv_file: Path, out: Path, method: str, count: int) -> None:
    options = ("--side-layers", 1) if method == "side" else ()
    result = command(
        "train", bert, "--train", csv_file, "--eval", csv_file, "--method", method, *options, "--epochs", 4,
        *FAST, "-o", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    measured = metrics_of(out)
    assert measured["after"]["loss"] < measured["before"]["loss"]  # biases of random layers get no further
    assert measured["trained_parameters"] == count
    result = command("eval", out, "--data", csv_file)
    assert result.exit_code == 0, result.output


def test_a_model_without_a_head(command: Run, gpt2: Path, csv_file: Path, out: Path) -> None:
    result = command("train", gpt2, "--task", "causal-lm", "--train", csv_file, "--method", "head", "-o", out)
    assert result.exit_code == 2
    assert "no head to train alone" in result.output


def test_help_names_the_methods_that_take_an_option() -> None:
    assert option_help("rank", "Rank.").startswith("Rank. For: lora 8")
    assert option_help("rslora", "Scale.").startswith("Scale. For: lora")


@pytest.mark.parametrize("method", ["lokr", "compacter", "compacter++"])
def test_kronecker_methods_learn(command: Run, bert: Path, csv_file: Path, out: Path, method: str) -> None:
    options = () if method == "lokr" else ("--reduction-factor", 8)
    result = command(
        "train", bert, "--method", method, *options, "--train", csv_file, "--eval", csv_file, "--epochs", 15,
        "--lr", 1e-2, "--batch-size", 8, "--max-length", 8, "-o", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    measured = metrics_of(out)
    assert measured["after"]["loss"] < measured["before"]["loss"] - 1e-3
    kind = {"lokr": "LOKR", "compacter": "COMPACTER", "compacter++": "COMPACTER_PLUS_PLUS"}[method]
    assert PeftConfig.from_pretrained(out).peft_type == kind


def test_jsonl_with_other_columns_and_a_held_out_part(command: Run, bert: Path, jsonl_file: Path, out: Path) -> None:
    columns = ("--text-column", "review", "--label-column", "stars")
    result = command(
        "train", bert, "--train", jsonl_file, *columns, "--eval-fraction", 0.25, "--epochs", 1, *FAST, "-o", out
    )
    assert result.exit_code == 0, result.output
    assert "48 training rows, 16 held out" in result.output


def test_causal_language_model(command: Run, gpt2: Path, csv_file: Path, out: Path) -> None:
    result = command("train", gpt2, "--task", "causal-lm", "--train", csv_file, "--epochs", 8, *FAST, "-o", out)
    assert result.exit_code == 0, result.output
    measured = metrics_of(out)
    assert measured["after"]["perplexity"] < 0.5 * measured["before"]["perplexity"]
    result = command("eval", out, "--data", csv_file)
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.output


def test_mixed_precision(command: Run, bert: Path, csv_file: Path, out: Path) -> None:
    result = command("train", bert, "--train", csv_file, "--epochs", 1, "--bf16", *FAST, "-o", out)
    assert result.exit_code == 0, result.output


def test_resuming_an_interrupted_run_gives_the_uninterrupted_adapter(
    command: Run, bert: Path, csv_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(folder: Path) -> tuple[object, ...]:
        return ("train", bert, "--train", csv_file, "--epochs", 3, *FAST, "-o", folder)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert command(*arguments(whole)).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(RichProgress, "on_save", interrupt)
        result = command(*arguments(stopped))
    assert result.exit_code == 130
    assert "--resume" in result.output
    (checkpoint,) = (stopped / "checkpoints").iterdir()
    assert not (checkpoint / "model.safetensors").exists(), "a checkpoint holds a copy of the base model"
    assert not (stopped / "adapter_model.safetensors").exists()

    result = command(*arguments(stopped), "--resume")
    assert result.exit_code == 0, result.output
    expected, got = (load_file(folder / "adapter_model.safetensors") for folder in (whole, stopped))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].equal(tensor), name


def test_resume_refuses_other_settings(command: Run, bert: Path, csv_file: Path, out: Path) -> None:
    arguments = ("train", bert, "--train", csv_file, "--epochs", 1, *FAST, "-o", out)
    assert command(*arguments).exit_code == 0
    result = command(*arguments, "--resume", "--seed", 1, "--dropout", 0.1)
    assert result.exit_code == 2
    assert "seed 0 -> 1" in result.output
    assert "'dropout': 0.1" in result.output


def test_an_earlier_run_is_kept_unless_told(command: Run, bert: Path, csv_file: Path, out: Path) -> None:
    arguments = ("train", bert, "--train", csv_file, "--epochs", 1, *FAST, "-o", out)
    assert command(*arguments).exit_code == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    result = command(*arguments, "--seed", 1)
    assert result.exit_code == 2
    assert "--overwrite" in result.output
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert command(*arguments, "--seed", 1, "--overwrite").exit_code == 0
    assert (out / "adapter_model.safetensors").read_bytes() != before


def test_overwrite_spares_a_folder_that_is_no_run(command: Run, bert: Path, csv_file: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    result = command("train", bert, "--train", csv_file, "-o", out, "--overwrite")
    assert result.exit_code == 2
    assert (out / "thesis.txt").exists()


CSV_ERRORS = {
    "text,label\n": "has no rows",
    "": "has no rows",
    "sentence,label\ngood,pos\nbad,neg\n": "no column 'text' (found: sentence, label)",
    "text,label\ngood,pos\n,neg\n": "line 3: column 'text' is empty",
    "text,label\ngood,pos\nbad\n": "line 3: column 'label' is empty",
    "text,label\ngood,pos\nfine,pos\nlovely,pos\n": "only one label, ['pos']",
    "text,label\ngood,pos\n": "one row cannot be split",
}


@pytest.mark.parametrize(("content", "message"), CSV_ERRORS.items(), ids=CSV_ERRORS.values())
def test_csv_errors(command: Run, bert: Path, tmp_path: Path, out: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    assert_refused(command("train", bert, "--train", path, "-o", out), message, out)


JSONL_ERRORS = {
    '{"text": "good", "label": "pos"}\n{"text": ': "line 2: not JSON",
    "[1, 2]\n": "line 1: expected an object, got list",
    '{"text": "good"}\n': "line 1: no column 'label'",
}


@pytest.mark.parametrize(("content", "message"), JSONL_ERRORS.items(), ids=JSONL_ERRORS.values())
def test_jsonl_errors(command: Run, bert: Path, tmp_path: Path, out: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert_refused(command("train", bert, "--train", path, "-o", out), message, out)


def test_file_errors(command: Run, bert: Path, csv_file: Path, tmp_path: Path, out: Path) -> None:
    latin, other = tmp_path / "latin.csv", tmp_path / "rows.xlsx"
    latin.write_bytes("text,label\ncafé,pos\n".encode("latin-1"))
    shutil.copy(csv_file, other)
    for path, message in {
        tmp_path / "none.csv": "does not exist",
        latin: "is not UTF-8",
        other: "neither .csv nor .jsonl",
    }.items():
        assert_refused(command("train", bert, "--train", path, "-o", out), message, out)


ARGUMENT_ERRORS = {
    ("--method", "lroa"): "unknown method 'lroa': choose from head, full",
    ("--method", "head", "--rank", "4"): "method 'head' has no option --rank: it takes --modules-to-save",
    ("--method", "full", "--modules-to-save", "pooler"): "has no option --modules-to-save: it takes none",
    ("--method", "lora", "--num-virtual-tokens", "4"): "method 'lora' has no option --num-virtual-tokens",
    ("--task", "summary"): "unknown task 'summary': choose from seq-cls, causal-lm",
    ("--resume",): "holds no run",
    ("--resume", "--overwrite"): "exclude each other",
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENT_ERRORS.items(), ids=ARGUMENT_ERRORS.values())
def test_argument_errors(
    command: Run, bert: Path, csv_file: Path, out: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert_refused(command("train", bert, "--train", csv_file, "-o", out, *arguments), message, out)


def test_model_errors(command: Run, csv_file: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    for model, message in {
        tmp_path / "nowhere": "does not exist",
        tmp_path / "empty": "has no config.json",
    }.items():
        assert_refused(command("train", model, "--train", csv_file, "-o", out), message, out)


def test_target_that_matches_nothing(command: Run, bert: Path, csv_file: Path, out: Path) -> None:
    result = command("train", bert, "--train", csv_file, "-o", out, "--target-modules", "qery")
    assert result.exit_code == 2
    assert "query" in result.output


def test_label_that_only_the_held_out_rows_have(
    command: Run, bert: Path, csv_file: Path, tmp_path: Path, out: Path
) -> None:
    path = tmp_path / "eval.csv"
    path.write_text("text,label\nthe film is good,mixed\n")
    result = command("train", bert, "--train", csv_file, "--eval", path, "-o", out)
    assert result.exit_code == 2
    assert "['mixed']" in result.output


def assert_refused(result: Result, message: str, out: Path) -> None:
    """Exit status 2, one line that says what is wrong, and nothing written."""
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not out.exists()
