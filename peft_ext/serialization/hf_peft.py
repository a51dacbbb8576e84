"""Hugging Face PEFT's adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

This file knows the format only. Which tensor belongs to which parameter is decided in
:mod:`peft_ext.tuners.state_dict`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_ext.serialization.atomic import Writer, settle

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


def find_folder(name_or_path: str | os.PathLike[str], subfolder: str | None = None, **hub_kwargs: Any) -> Path:
    """The local folder that holds an adapter; downloads it if the name is the hub's and no folder's.

    Args:
        name_or_path: a folder, or ``"owner/name"`` on the Hugging Face hub.
        subfolder: folder in it that holds the adapter.
        **hub_kwargs: passed to ``huggingface_hub.snapshot_download``.

    Raises:
        FileNotFoundError: if there is no such folder, nor such a repository on the hub.
        OSError: if a write was cut off there and cannot be undone.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
            raise FileNotFoundError(f"no adapter folder at {str(name_or_path)!r}")
        folder = _download(str(name_or_path), subfolder, **hub_kwargs)
    folder = folder / subfolder if subfolder else folder
    settle(folder)
    return folder


def _download(name: str, subfolder: str | None, **hub_kwargs: Any) -> Path:
    from peft_ext.serialization.adapterhub import ALL_NAMES  # which builds on this module

    prefix = f"{subfolder}/" if subfolder else ""
    files = [prefix + file for file in (CONFIG_NAME, SAFETENSORS_NAME, PICKLE_NAME, *ALL_NAMES)]
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=files, **hub_kwargs))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no adapter folder at {name!r}, and the hub gave none of this name: {error}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of ``adapter_config.json``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no JSON object, is AdapterHub's file of the same name, or has no ``peft_type``.
    """
    path = folder / CONFIG_NAME
    values = read_json(path)
    if "peft_type" not in values:
        if str(values.get("version", "")).startswith("adapters."):
            raise ValueError(
                f"{path} is in AdapterHub's format ({values['version']!r}), not Hugging Face PEFT's: "
                "PeftModel.from_pretrained loads it, peft-ext convert converts it"
            )
        raise ValueError(f"{path} is no PEFT configuration: it has no 'peft_type'")
    return values


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, on the CPU, keyed as in the file.

    Raises:
        FileNotFoundError: if there is no weights file.
        ValueError: if it is truncated, damaged, or (``.bin``) holds anything but tensors.
    """
    if (folder / SAFETENSORS_NAME).is_file():
        return read_safetensors(folder / SAFETENSORS_NAME)
    if (folder / PICKLE_NAME).is_file():
        return read_pickle(folder / PICKLE_NAME)
    raise FileNotFoundError(f"no {SAFETENSORS_NAME} or {PICKLE_NAME} in {str(folder)!r}")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {str(path.parent)!r}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file; a ValueError if it is truncated or damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors in a ``.bin`` file, read without executing code; a ValueError if it is damaged or holds more."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle makes torch stumble over is of any kind: KeyError, TypeError, …
        raise ValueError(f"{path} is damaged, or holds more than tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(_is_named_tensor(*item) for item in tensors.items()):
        raise ValueError(f"{path} must hold a dict of tensors by name, dense and with values")
    return tensors


def _is_named_tensor(name: Any, tensor: Any) -> bool:
    dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
    return isinstance(name, str) and dense


def config_files(folder: str | os.PathLike[str], config: Mapping[str, Any]) -> dict[Path, Writer | None]:
    """What :func:`peft_ext.serialization.atomic.write_together` writes for a configuration."""
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    return {Path(folder) / CONFIG_NAME: json_writer(values)}


def json_writer(values: Mapping[str, Any]) -> Writer:
    """Writes a JSON object, as both formats' libraries do."""
    return partial(_write_text, json.dumps(values, indent=2, sort_keys=True))


def adapter_files(
    folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor], safe: bool = True
) -> dict[Path, Writer | None]:
    """What ``write_together`` writes for an adapter: the configuration first, then the weights.

    Weights in the other of the two formats are removed, or a reader could take them for these.
    """
    folder = Path(folder)
    return config_files(folder, config) | weight_files(folder / SAFETENSORS_NAME, folder / PICKLE_NAME, tensors, safe)


def weight_files(
    safetensors: Path, pickle_file: Path, tensors: Mapping[str, Tensor], safe: bool
) -> dict[Path, Writer | None]:
    """What ``write_together`` writes for tensors: one of the two files, while the other is removed."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _unshared(tensors).items()}
    if safe:
        return {safetensors: partial(_write_safetensors, weights), pickle_file: None}
    return {pickle_file: partial(_write_pickle, weights), safetensors: None}


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _write_safetensors(weights: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:  # which is how a full disk shows
        raise OSError(str(error)) from error


def _write_pickle(weights: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch would write its name, which is a temporary one, into the file
        torch.save(weights, file)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors that share memory with an earlier one, which safetensors refuses."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result
