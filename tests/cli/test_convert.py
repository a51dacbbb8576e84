"""``peft-ext convert`` between the three formats; outputs are compared, in Hugging Face PEFT where it is the target."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import Result

import peft_ext

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

DATA = Path(__file__).parent.parent / "serialization" / "data" / "adapterhub"
CLASSES = {"bert": "BertForSequenceClassification", "gpt2": "GPT2LMHeadModel"}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
Run = Callable[..., Result]
_OUTSIDE = ["attention.output.dense", "pooler.dense", "classifier"]
"""Linear layers of BERT for which AdapterHub has no LoRA."""
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@cache
def _read(name: str) -> Any:
    return getattr(transformers, CLASSES[name]).from_pretrained(DATA / "bases" / name, attn_implementation="eager")


def _base(case: str) -> Any:
    return copy.deepcopy(_read(case.partition("-")[0]))


@torch.no_grad()
def _output(model: Any) -> Tensor:
    ids = torch.randint(2, 30, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    return model.eval()(input_ids=ids, attention_mask=mask).logits


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _randomise(model: Any) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    "case",
    ["bert-lora", "bert-lora-everywhere", "bert-prefix_tuning", "bert-prefix_tuning_flat", "gpt2-lora-everywhere"],
)
def test_peft_computes_what_adapterhub_did(command: Run, case: str, tmp_path: Path) -> None:
    before = _files(DATA / case)
    result = command("convert", DATA / case, tmp_path / "out", "--to", "peft")
    assert result.exit_code == 0, result.output
    assert "maps" in result.output
    wanted = load_file(DATA / "outputs.safetensors")[case]
    ours = peft_ext.PeftModel.from_pretrained(_base(case), tmp_path / "out")
    torch.testing.assert_close(_output(ours), wanted, **CLOSE)
    theirs = peft.PeftModel.from_pretrained(_base(case), tmp_path / "out")
    if "prefix" in case:  # with this transformers it runs no prefix on BERT any more, but it reads one
        prompt = load_file(tmp_path / "out" / "adapter_model.safetensors")["prompt_embeddings"]
        assert torch.equal(theirs.prompt_encoder["default"].embedding.weight, prompt)
    else:
        torch.testing.assert_close(_output(theirs), wanted, **CLOSE)
    assert before == _files(DATA / case)


@pytest.mark.parametrize(
    "case", ["bert-seq_bn-options", "bert-compacter++", "bert-prompt_tuning", "bert-fusion", "gpt2-prefix_tuning"]
)
def test_our_format_takes_what_peft_lacks(command: Run, case: str, tmp_path: Path) -> None:
    result = command("convert", DATA / case, tmp_path / "out", "--to", "peft")
    assert result.exit_code == 2
    assert "cannot map" in result.output
    assert not (tmp_path / "out").exists()
    result = command("convert", DATA / case, tmp_path / "out", "--to", "peft_ext")
    assert result.exit_code == 0, result.output
    model = peft_ext.PeftModel.from_pretrained(_base(case), tmp_path / "out")
    torch.testing.assert_close(_output(model), load_file(DATA / "outputs.safetensors")[case], **CLOSE)


@pytest.mark.parametrize(
    ("case", "config", "options"),
    [
        ("bert", peft.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=7, target_modules=["query", "key"]), []),
        (
            "bert",
            peft.LoraConfig(r=3, target_modules="all-linear", exclude_modules=_OUTSIDE),
            [],
        ),
        ("gpt2", peft.LoraConfig(task_type="CAUSAL_LM", r=3), ["--safetensors", "--name", "greeting"]),
    ],
)
def test_adapterhubs_format_has_what_peft_trained(
    command: Run, case: str, config: Any, options: list[str], tmp_path: Path
) -> None:
    model = peft.get_peft_model(_base(case), copy.deepcopy(config))
    _randomise(model)
    model.save_pretrained(tmp_path / "peft")
    base = ["--base", DATA / "bases" / case]
    result = command("convert", tmp_path / "peft", tmp_path / "hub", "--to", "adapterhub", *base, *options)
    assert result.exit_code == 0, result.output
    ours = peft_ext.PeftModel.from_pretrained(_base(case), tmp_path / "hub")
    torch.testing.assert_close(_output(ours), _output(model), **CLOSE)
    values = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    assert values["name"] == ("greeting" if options else "hub")
    assert values["model_type"] == case
    assert (tmp_path / "hub" / "adapter.safetensors").is_file() == bool(options)


def test_a_head_belongs_to_the_tasks_class_whatever_the_base_was_pretrained_as(command: Run, tmp_path: Path) -> None:
    model = peft.get_peft_model(_base("bert"), peft.LoraConfig(task_type="SEQ_CLS"))
    model.peft_config["default"].base_model_name_or_path = "owner/bert"
    model.save_pretrained(tmp_path / "peft")
    values = json.loads((DATA / "bases" / "bert" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"architectures": ["BertForMaskedLM"]}))
    options = ["--to", "adapterhub", "--base", tmp_path / "config.json"]
    result = command("convert", tmp_path / "peft", tmp_path / "hub", *options)
    assert "modules_to_save: classifier → head of BertForSequenceClassification" in result.output
    head = json.loads((tmp_path / "hub" / "head_config.json").read_text())
    assert (head["model_class"], head["model_name"]) == ("BertForSequenceClassification", "owner/bert")


def test_what_adapterhub_lacks_is_named_and_nothing_is_written(command: Run, tmp_path: Path) -> None:
    model = peft_ext.get_peft_model(_base("bert"), peft_ext.HoulsbyConfig())
    model.save_pretrained(tmp_path / "houlsby")
    result = command("convert", tmp_path / "houlsby", tmp_path / "hub", "--to", "adapterhub")
    assert result.exit_code == 2
    assert "cannot map" in result.output and "LayerNorm" in result.output
    assert not (tmp_path / "hub").exists()


def test_without_the_head(command: Run, tmp_path: Path) -> None:
    result = command("convert", DATA / "bert-seq_bn", tmp_path / "out", "--to", "peft_ext", "--drop-head")
    assert result.exit_code == 0, result.output
    assert not any("classifier" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    trained = peft_ext.get_peft_model(_base("bert"), peft_ext.LoraConfig(task_type="SEQ_CLS"))
    trained.save_pretrained(tmp_path / "lora")
    result = command("convert", tmp_path / "lora", tmp_path / "hub", "--to", "adapterhub", "--drop-head")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "hub" / "head_config.json").exists()


def test_a_head_of_adapterhubs_own_kind(command: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "bert-seq_bn", tmp_path / "flex")
    path = folder / "head_config.json"
    flexible = {"config": {"head_type": "classification"}, "name": "task"}
    path.write_text(json.dumps(json.loads(path.read_text()) | flexible))
    result = command("convert", folder, tmp_path / "out", "--to", "peft_ext")
    assert result.exit_code == 2
    assert "prediction head 'task' (classification)" in " ".join(result.output.split())
    assert command("convert", folder, tmp_path / "out", "--to", "peft_ext", "--drop-head").exit_code == 0


def test_prefixes_need_the_base_models_configuration(command: Run, tmp_path: Path) -> None:
    config = peft_ext.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    model = peft_ext.get_peft_model(_base("bert"), config)
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(tmp_path / "prefix")
    result = command("convert", tmp_path / "prefix", tmp_path / "hub", "--to", "adapterhub")
    assert result.exit_code == 2
    assert "--base" in result.output
    base = DATA / "bases" / "bert" / "config.json"
    result = command("convert", tmp_path / "prefix", tmp_path / "hub", "--to", "adapterhub", "--base", base)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("nothing", [], "no adapter folder"),
        (".", [], "no adapter_config.json"),
        (DATA / "bert-seq_bn", ["--base", "nowhere"], "no config.json"),
        (DATA / "bert-seq_bn", ["--name", "a.b"], "has a dot"),
        (DATA / "bert-seq_bn", ["--name", "train"], "reserved"),
        (DATA / "bert-seq_bn", ["--base", DATA / "bert-seq_bn" / "adapter_config.json"], "has no num_hidden_layers"),
    ],
)
def test_mistakes(
    command: Run, source: Any, options: list[Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command("convert", source, tmp_path / "out", "--to", "adapterhub", *options)
    assert result.exit_code == 2
    assert reason in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_not_written_to(command: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    result = command("convert", DATA / "bert-seq_bn", tmp_path, "--to", "peft_ext")
    assert result.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t, key: t.pop(key), "the weights miss lora_B.weight in layer 1"),
        (
            lambda t, key: t.update({key: torch.ones(3)}),
            "lora_B.weight in layer 1, attention.self.value has shape (3,)",
        ),
        (
            lambda t, key: t.update({key.replace("lora_B", "lora_C"): t[key].clone()}),
            "value.lora_C.weight): AdapterHub has no place",
        ),
        (lambda t, key: t[key].fill_(float("nan")), "1 of the weights have values that are not finite, such as"),
        (lambda t, key: t.clear(), "do not tell its base model"),
    ],
)
def test_damaged_weights(
    command: Run, change: Callable[[dict[str, Tensor], str], Any], reason: str, tmp_path: Path
) -> None:
    peft_ext.get_peft_model(_base("bert"), peft_ext.LoraConfig(r=2)).save_pretrained(tmp_path / "lora")
    for path in (tmp_path / "lora").glob("adapter_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, "base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.weight")
    save_file(tensors, path)
    before = _files(tmp_path)
    result = command("convert", tmp_path / "lora", tmp_path / "hub", "--to", "adapterhub")
    assert result.exit_code == 2
    assert reason in " ".join(result.output.split())
    assert before == _files(tmp_path)
