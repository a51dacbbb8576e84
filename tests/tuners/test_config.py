from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_ext import LoraConfig, PeftConfig, TaskType


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"r": 0}, ValueError, "rank 'r' must be an integer > 0, got 0"),
        ({"r": 1.5}, ValueError, "rank 'r' must be an integer > 0, got 1.5"),
        ({"r": True}, ValueError, "rank 'r' must be an integer > 0, got True"),
        ({"rank_pattern": {"q": -1}}, ValueError, "rank 'q' must be an integer > 0, got -1"),
        ({"lora_alpha": float("nan")}, ValueError, "alpha 'lora_alpha' must be a finite number, got nan"),
        ({"alpha_pattern": {"q": "1"}}, ValueError, "alpha 'q' must be a finite number, got '1'"),
        ({"lora_dropout": 1.1}, ValueError, r"lora_dropout must be in \[0, 1\], got 1.1"),
        ({"bias": "some"}, ValueError, "bias must be one of .*, got 'some'"),
        ({"init_lora_weights": "zeros"}, ValueError, "init_lora_weights='zeros' is not supported"),
        ({"task_type": "TASK"}, ValueError, "task_type is 'TASK', which is not supported"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save must be a list of str, got 'head'"),
        ({"target_modules": 5}, TypeError, "target_modules must be a list of str, got 5"),
        ({"exclude_modules": [1]}, TypeError, r"exclude_modules must be a list of str, got \[1\]"),
        ({"target_modules": ["q"], "layers_to_transform": "1"}, TypeError, "layers_to_transform must be a list of int"),
        ({"rank_pattern": [1]}, TypeError, r"rank_pattern must be a dict, got \[1\]"),
        ({"lora_dropout": "0.1"}, ValueError, r"lora_dropout must be in \[0, 1\], got '0.1'"),
        ({"layers_pattern": "layers"}, ValueError, "layers_pattern needs layers_to_transform"),
        ({"target_modules": ".*", "layers_to_transform": 1}, ValueError, "need target_modules to be a list"),
        ({"use_qalora": True}, ValueError, "use_qalora=True is not supported"),
        ({"trainable_token_indices": [1]}, ValueError, r"trainable_token_indices=\[1\] is not supported"),
    ],
)
def test_values_out_of_range_are_named(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        LoraConfig(**arguments)


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    config = LoraConfig(
        r=3,
        lora_alpha=1.5,
        target_modules=["b", "a"],
        modules_to_save=["head"],
        rank_pattern={"a": 2},
        task_type="SEQ_CLS",
        init_lora_weights="gaussian",
        loftq_config={"bits": 4},
    )
    config.save_pretrained(tmp_path / "new" / "folder")
    for cls in (PeftConfig, LoraConfig):
        assert cls.from_pretrained(tmp_path / "new", subfolder="folder") == config
    assert config.task_type is TaskType.SEQ_CLS


def test_unknown_fields_survive() -> None:
    values = {**LoraConfig(r=2).to_dict(), "new": 1, "unset": None}
    with pytest.warns(UserWarning, match=r"\['new'\]"):
        config = PeftConfig.from_dict(values)
    assert config.to_dict() == values


def test_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"version": "adapters.1.3.0", "config": {}}')
    with pytest.raises(ValueError, match=r"AdapterHub's format .'adapters.1.3.0'., .*: PeftModel.from_pretrained"):
        PeftConfig.from_pretrained(tmp_path)


def test_of_another_method() -> None:
    with pytest.raises(ValueError, match="peft_type is None, which is not supported: must be one of 'LORA'"):
        PeftConfig.from_dict({})


def test_names_of_the_hub_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LoraConfig(r=5).save_pretrained(tmp_path / "sub")
    asked = []

    def download(name: str, **kwargs: Any) -> str:
        asked.append((name, kwargs))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    config = PeftConfig.from_pretrained("owner/name", subfolder="sub", revision="v1")
    assert isinstance(config, LoraConfig) and config.r == 5
    files = [f"sub/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")]
    assert asked == [("owner/name", {"allow_patterns": asked[0][1]["allow_patterns"], "revision": "v1"})]
    assert {*files, "sub/pytorch_adapter.bin", "sub/adapter.safetensors"} <= set(asked[0][1]["allow_patterns"])

    def fail(name: str, **kwargs: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        FileNotFoundError, match=r"no adapter folder at 'owner/name', and the hub gave none .*: offline"
    ):
        PeftConfig.from_pretrained("owner/name")
    with pytest.raises(FileNotFoundError, match="no adapter folder at '/no/such/folder'"):
        PeftConfig.from_pretrained("/no/such/folder")
