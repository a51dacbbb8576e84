"""Converting a checkpoint between formats, without the base model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_ext.serialization import adapterhub, hf_peft
from peft_ext.serialization.atomic import Writer
from peft_ext.tuners.adapterhub.layouts import BaseModel, Report
from peft_ext.tuners.adapterhub.reading import from_adapterhub
from peft_ext.tuners.adapterhub.writing import to_adapterhub
from peft_ext.tuners.config import PeftConfig, PeftType
from peft_ext.tuners.prefix_tuning import PrefixTuningConfig
from peft_ext.tuners.prompt_learning import PromptLearningConfig, has_closed_tokens

FORMATS = ("peft", "adapterhub", "peft_ext")
_PEFTS = (PeftType.LORA, PeftType.LOKR, PeftType.PREFIX_TUNING, PeftType.PROMPT_TUNING, PeftType.P_TUNING)
_MODEL_CONFIG = "config.json"


def convert(
    source: Path,
    destination: Path,
    to: str,
    *,
    base: BaseModel | None = None,
    name: str = "default",
    keep_head: bool = True,
    safe: bool | None = None,
    report: Report | None = None,
) -> dict[Path, Writer | None]:
    """What ``write_together`` writes for the same adapter in another format. Writes nothing itself.

    Args:
        source: folder of an adapter, in either format, or of an AdapterHub setup of fused adapters.
        destination: folder that is written.
        to: "peft": Hugging Face PEFT's format, and its methods only; "adapterhub"; "peft_ext": the same layout as
            PEFT's, with the methods and fields that PEFT lacks.
        base: the base model; by default it is read from the folder that the adapter names, or off the tensors' keys.
        name: of the adapter in AdapterHub's format.
        keep_head: whether a prediction head, or modules trained in full, go with it.
        safe: write safetensors; see :meth:`PeftModel.save_pretrained`.
        report: filled with what went over, and what could not.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError, TypeError: if its files are damaged or unknown, or it has no counterpart.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
    report = Report() if report is None else report
    values, tensors = _read(source, keep_head, base, report)
    infinite = [key for key, tensor in tensors.items() if not tensor.double().isfinite().all()]
    if infinite:
        raise ValueError(f"{len(infinite)} of the weights have values that are not finite, such as {infinite[0]}")
    if to == "adapterhub":
        known = base or base_of(values.get("base_model_name_or_path"))
        stored = to_adapterhub(values, tensors, name, known, report)
        return adapterhub.files_of(destination, stored, bool(safe))
    config = PeftConfig.from_dict(values)
    if not report.mapped:
        report.mapped.append((PeftType(config.peft_type).value, PeftType(config.peft_type).value))
    if to == "peft":
        report.problems += _unknown_to_peft(config, tensors)
        report.check()
    return hf_peft.adapter_files(destination, config.to_dict(), tensors, safe is None or safe)


def base_of(folder: str | Path | None) -> BaseModel | None:
    """The base model whose ``config.json`` is in a folder, or is the file given; None if there is none.

    Raises:
        ValueError: if that is damaged, or of an architecture that is not known.
    """
    if not folder:
        return None
    path = Path(folder) / _MODEL_CONFIG if Path(folder).is_dir() else Path(folder)
    return BaseModel.of_config(hf_peft.read_json(path), str(folder)) if path.is_file() else None


def _read(
    source: Path, keep_head: bool, base: BaseModel | None, report: Report
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not source.is_dir():
        raise FileNotFoundError(f"no adapter folder at {str(source)!r}")
    if adapterhub.is_adapterhub(source):
        stored = adapterhub.read(source)
        num_layers = base.num_layers if base is not None else None
        return from_adapterhub(stored if keep_head else _without_head(stored), report, num_layers)
    values, tensors = hf_peft.read_config(source), hf_peft.read_weights(source)
    return (values, tensors) if keep_head else _without_saved_modules(values, tensors)


def _without_head(
    stored: adapterhub.StoredAdapter | adapterhub.StoredFusion,
) -> adapterhub.StoredAdapter | adapterhub.StoredFusion:
    if isinstance(stored, adapterhub.StoredAdapter):
        return stored._replace(head=None)
    return stored._replace(adapters={name: one._replace(head=None) for name, one in stored.adapters.items()})


def _without_saved_modules(
    values: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    prefix = PeftConfig.from_dict(values).checkpoint_prefix
    named = tuple(values.get("modules_to_save") or ())

    def is_saved(key: str) -> bool:
        modules = key.removeprefix(prefix).split(".")[:-1]
        return key.startswith(prefix) and any(module.endswith(named) for module in modules)

    kept = {key: tensor for key, tensor in tensors.items() if not (named and is_saved(key))}
    return values | {"modules_to_save": None, "task_type": None}, kept


def _unknown_to_peft(config: PeftConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Why Hugging Face PEFT cannot express the adapter."""
    if config.peft_type not in _PEFTS:
        known = ", ".join(kind.value for kind in _PEFTS)
        kind = PeftType(config.peft_type).value
        return [f"peft_type {kind} is none of Hugging Face PEFT's ({known}): write it with --to peft_ext"]
    problems = []
    if isinstance(config, PrefixTuningConfig) and not config.shift_positions:
        problems.append("a prefix that leaves a decoder's text at position 0: Hugging Face PEFT moves it on")
    if isinstance(config, PromptLearningConfig) and has_closed_tokens(config, tensors["prompt_embeddings"]):
        problems.append("gated: Hugging Face PEFT cannot leave out the tokens whose gate is closed")
    return problems
