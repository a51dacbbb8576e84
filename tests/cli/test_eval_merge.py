"""``peft-ext eval`` and ``merge`` on an adapter that ``train`` wrote, and on one of Hugging Face PEFT's."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner, Result

from peft_ext import LoraConfig, get_peft_model
from peft_ext.cli import app
from peft_ext.tuners import PeftModel

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, bert: Path, csv_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    arguments = ["train", bert, "--train", csv_file, "--eval", csv_file, "--epochs", 4, "--lr", 1e-2, "-o", folder]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return folder


def test_eval_measures_what_training_did(command: Run, adapter: Path, csv_file: Path) -> None:
    result = command("eval", adapter, "--data", csv_file)
    assert result.exit_code == 0, result.output
    trained = json.loads((adapter / "metrics.json").read_text())["after"]
    assert f"{trained['accuracy']:.4f}" in result.output
    assert f"{trained['loss']:.4f}" in result.output


def test_confusion_counts_and_predictions(command: Run, adapter: Path, csv_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    result = command("eval", adapter, "--data", csv_file, "--predictions", path)
    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(written) == 64
    assert all(0.5 <= row["probability"] <= 1 for row in written)
    for label in ("neg", "pos"):
        counts = [
            sum((row["label"], row["prediction"]) == (label, other) for row in written) for other in ("neg", "pos")
        ]
        assert re.search(rf"{label}\W+{counts[0]}\W+{counts[1]}\W", result.output)


def test_eval_works_without_the_training_folder_of_the_base(
    command: Run, adapter: Path, bert: Path, csv_file: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(bert, tmp_path / "elsewhere")
    result = command("eval", adapter, "--data", csv_file, "--model", moved, "--limit", 8)
    assert result.exit_code == 0, result.output


def test_merged_model_is_plain_and_equal(command: Run, adapter: Path, bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    result = command("merge", adapter, out)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"], "temporary files are left"
    merged = AutoModelForSequenceClassification.from_pretrained(out).eval()
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    peft_model = PeftModel.from_pretrained(base, adapter)
    inputs = AutoTokenizer.from_pretrained(out)("the film was very good", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, peft_model(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert merged.config.id2label == {0: "neg", 1: "pos"}
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_merging_bitfit_counts_the_biases(command: Run, bert: Path, csv_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = command("train", bert, "--train", csv_file, "--method", "bitfit", "--epochs", 1, "-o", out)
    assert result.exit_code == 0, result.output
    assert "peft-ext merge" in result.output
    result = command("merge", out, tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert re.search(r"weights changed\W+[1-9]\d+, by at most 0\.\d*[1-9]", result.output), result.output


def test_merging_shows_the_largest_changes(command: Run, adapter: Path, tmp_path: Path) -> None:
    result = command("merge", adapter, tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert "Largest changes" in result.output
    assert re.search(r"all \d+", result.output)
    assert re.search(r"outputs\W+within (0|\d\S*e-0[5-9]) of", result.output), result.output
    assert "inf" not in result.output.partition("Next")[0]


def tied_adapter(gpt2: Path, folder: Path) -> Path:
    """An adapter of the input embeddings, whose weight is the output layer's too."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["wte"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="share their weight|embedding layers"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(gpt2), config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*share their weight")
def test_a_merged_model_that_computes_something_else_is_not_written(command: Run, gpt2: Path, tmp_path: Path) -> None:
    adapter = tied_adapter(gpt2, tmp_path / "adapter")
    result = command("merge", adapter, tmp_path / "merged")
    assert result.exit_code == 2, result.output
    assert "outputs are up to" in result.output
    assert "--tolerance is 0.001" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    result = command("merge", adapter, tmp_path / "merged", "--tolerance", 100)
    assert result.exit_code == 0, result.output


def test_a_nan_is_not_merged(command: Run, adapter: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(adapter, tmp_path / "broken", ignore=shutil.ignore_patterns("checkpoints"))
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors[next(iter(tensors))][0] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    result = command("merge", broken, tmp_path / "merged")
    assert result.exit_code == 2
    assert "not finite" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_merge_refuses_a_folder_with_files(command: Run, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = command("merge", adapter, tmp_path)
    assert result.exit_code == 2
    assert "not an empty folder" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_merge_into_a_link_to_an_empty_folder(command: Run, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    result = command("merge", adapter, tmp_path / "link")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "link").is_symlink()
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "empty").config.id2label == {
        0: "neg",
        1: "pos",
    }


def test_a_failed_merge_leaves_nothing(
    command: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    result = command("merge", adapter, tmp_path / "merged")
    assert result.exit_code == 2
    assert "disk full" in result.output
    assert list(tmp_path.iterdir()) == []


def test_adapter_of_hugging_face_peft(command: Run, bert: Path, csv_file: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForSequenceClassification.from_pretrained(bert)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    data = tmp_path / "rows.csv"
    data.write_text("text,label\nthe film is good,LABEL_1\nthe film is bad,LABEL_0\n")
    for result in (
        command("eval", tmp_path / "theirs", "--data", data),
        command("merge", tmp_path / "theirs", tmp_path / "merged"),
    ):
        assert result.exit_code == 0, result.output


def test_errors(command: Run, adapter: Path, bert: Path, csv_file: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(adapter, tmp_path / "broken", ignore=shutil.ignore_patterns("checkpoints"))
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    unknown = tmp_path / "unknown.csv"
    unknown.write_text("text,label\nthe film is good,great\n")
    for arguments, message in {
        (tmp_path / "none", "--data", csv_file): "is no adapter",
        (bert, "--data", csv_file): "is no adapter",
        (broken, "--data", csv_file): "truncated or damaged",
        (adapter, "--data", unknown): "['great']",
        (adapter, "--data", csv_file, "--model", tmp_path / "gone"): "does not exist",
        (adapter, "--data", csv_file, "--text-column", "body"): "no column 'body'",
    }.items():
        result = command("eval", *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert "Traceback" not in result.output
