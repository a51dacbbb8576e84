"""The settings of a run, kept beside its adapter: what ``eval``, ``merge`` and ``--resume`` need to know."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from peft_ext.cli.errors import CliError, explain
from peft_ext.cli.methods import find_method
from peft_ext.serialization.atomic import write_together
from peft_ext.serialization.hf_peft import read_config

RUN_FILE = "run.json"
METRICS_FILE = "metrics.json"
TASK_NAMES = {"SEQ_CLS": "seq-cls", "CAUSAL_LM": "causal-lm"}


@dataclass(frozen=True)
class RunSettings:
    """Everything that shaped the adapter."""

    model: str
    task: str
    labels: list[str]
    text_column: str = "text"
    label_column: str = "label"
    max_length: int = 128
    method: str = "lora"
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 3
    batch_size: int = 32
    lr: float = 1e-3
    seed: int = 0
    bf16: bool = False
    train_rows: int = 0


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    text = json.dumps(values, indent=2) + "\n"
    write_together({path: partial(_write_text, text)})


def write_run(folder: Path, settings: RunSettings) -> None:
    """Notes the settings in the output folder."""
    write_json(folder / RUN_FILE, asdict(settings))


def read_run(folder: Path) -> RunSettings:
    """The settings of the run that wrote ``folder``."""
    path = folder / RUN_FILE
    try:
        return RunSettings(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CliError(f"{path} is damaged: {error}") from error


def describe_adapter(folder: Path, model: str | None) -> RunSettings:
    """Settings of an adapter folder, also of one that another program wrote.

    Args:
        folder: holds ``adapter_config.json`` and, if ``peft-ext train`` wrote it, ``run.json``.
        model: base model to use instead of the recorded one.
    """
    if is_full_model(folder):
        return RunSettings(**(asdict(read_run(folder)) | ({"model": model} if model else {})))
    with explain(f"{folder} is no adapter", (ValueError, OSError)):
        config = read_config(folder)
    base = model or config.get("base_model_name_or_path")
    if base is None:
        raise CliError(f"{folder} does not say what its base model is: pass --model")
    if (folder / RUN_FILE).is_file():
        return RunSettings(**(asdict(read_run(folder)) | {"model": base}))
    task = TASK_NAMES.get(config.get("task_type") or "")
    if task is None:
        raise CliError(f"{folder} has task_type {config.get('task_type')!r}; known are {', '.join(TASK_NAMES)}")
    return RunSettings(model=base, task=task, labels=_labels_of(base) if task == "seq-cls" else [])


def is_full_model(folder: Path) -> bool:
    """Whether ``--method full`` trained what the folder holds: a whole model, not an adapter."""
    return (folder / RUN_FILE).is_file() and find_method(read_run(folder).method).config is None


def check_same_run(folder: Path, settings: RunSettings) -> None:
    """Refuses to resume with settings that would make another adapter; more epochs are fine."""
    old, new = read_run(folder), settings
    changed = [
        f"{f.name} {getattr(old, f.name)!r} -> {getattr(new, f.name)!r}"
        for f in fields(RunSettings)
        if f.name != "epochs" and getattr(old, f.name) != getattr(new, f.name)
    ]
    if changed:
        raise CliError(f"--resume needs the settings of the run in {folder}; changed: {'; '.join(changed)}")


def _labels_of(base: str) -> list[str]:
    from transformers import AutoConfig

    with explain(f"cannot read the configuration of the base model {base!r}", (OSError, ValueError)):
        names = AutoConfig.from_pretrained(base).id2label
    return [names[index] for index in sorted(names)]


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
