"""AdapterHub's folders: adapters, prediction heads, fusions, and setups of several adapters.

An adapter's folder has ``adapter_config.json``, told from Hugging Face PEFT's by ``version: "adapters.…"``, and
``pytorch_adapter.bin`` or ``adapter.safetensors``; a head may lie beside them. A fusion has a folder of its own, and a
setup (``save_adapter_setup``) one for each adapter and one for the fusion, named as they are.

This file knows the format only. What AdapterHub's methods are in this library is decided in
:mod:`peft_ext.tuners.adapterhub`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from peft_ext.serialization import hf_peft
from peft_ext.serialization.atomic import Writer

WRITTEN_VERSION = "adapters.1.3.0"
"""The version whose format is written."""
SETUP_NAME = "adapter_setup.json"
_VERSION = re.compile(r"adapters\.([01])\.(\d+)(\..*)?")


class Files(NamedTuple):
    """The names of the files that one thing is made of."""

    config: str
    pickle: str
    safetensors: str


ADAPTER = Files(hf_peft.CONFIG_NAME, "pytorch_adapter.bin", "adapter.safetensors")
HEAD = Files("head_config.json", "pytorch_model_head.bin", "model_head.safetensors")
FUSION = Files("adapter_fusion_config.json", "pytorch_model_adapter_fusion.bin", "model_adapter_fusion.safetensors")
ALL_NAMES = (*ADAPTER, *HEAD, *FUSION, SETUP_NAME)


class Stored(NamedTuple):
    """What one configuration file and one weights file hold."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


class StoredAdapter(NamedTuple):
    """An adapter, and the prediction head beside it."""

    adapter: Stored
    head: Stored | None = None


class StoredFusion(NamedTuple):
    """A fusion and the adapters that it mixes, by name and in its order."""

    fusion: Stored
    adapters: dict[str, StoredAdapter]


def is_adapterhub(folder: Path) -> bool:
    """Whether a folder is in AdapterHub's format rather than in Hugging Face PEFT's.

    Raises:
        ValueError: if it has an ``adapter_config.json`` that cannot be read.
    """
    if (folder / ADAPTER.config).is_file():
        values = hf_peft.read_json(folder / ADAPTER.config)
        return "peft_type" not in values and "config" in values
    return (folder / SETUP_NAME).is_file() or (folder / FUSION.config).is_file()


def read(folder: Path) -> StoredAdapter | StoredFusion:
    """The adapter, or the setup of fused adapters, that a folder holds.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is damaged, of an unknown version, or there are weights in both formats.
    """
    if (folder / ADAPTER.config).is_file():
        return read_adapter(folder)
    return _read_fusion(folder)


def read_adapter(folder: Path) -> StoredAdapter:
    """The adapter in a folder, with its head; raises what :func:`read` does."""
    head = _read_stored(folder, HEAD) if (folder / HEAD.config).is_file() else None
    return StoredAdapter(_read_stored(folder, ADAPTER), head)


def _read_fusion(folder: Path) -> StoredFusion:
    """A fusion's adapters lie beside it, as ``save_adapter_setup`` and ``save_all_adapters`` leave them."""
    if (folder / SETUP_NAME).is_file():
        folder = folder / _fused_name(folder / SETUP_NAME)
    fusion = _read_stored(folder, FUSION)
    names = fusion.config.get("adapter_names") or str(fusion.config.get("name")).split(",")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{folder / FUSION.config}: adapter_names must be a list of names, got {names!r}")
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{folder / FUSION.config}: adapter_names has {name!r}, which is no adapter's name")
    return StoredFusion(fusion, {name: read_adapter(folder.parent / name) for name in names})


def _fused_name(path: Path) -> str:
    """The folder of the fusion that a setup is."""
    setup = hf_peft.read_json(path).get("adapter_setup")
    setup = setup if isinstance(setup, dict) else {}
    children = setup.get("children")
    children = children if isinstance(children, list) else []
    names = [child["children"][0] for child in children if isinstance(child, dict) and child.get("type") == "single"]
    if setup.get("type") != "Fuse" or not names or len(names) != len(children):
        raise ValueError(f"{path}: only a Fuse of single adapters is supported, got {setup.get('type')!r}")
    name = (setup.get("kwargs") or {}).get("name") or ",".join(map(str, names))
    if Path(name).name != name:
        raise ValueError(f"{path}: {name!r} is no fusion's name")
    return name


def _read_stored(folder: Path, files: Files) -> Stored:
    config = hf_peft.read_json(folder / files.config)
    version = config.get("version")
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise ValueError(
            f"{folder / files.config}: version is {version!r}, which is not supported: must be adapters.0 or adapters.1"
        )
    return Stored(config, _read_weights(folder, files))


def _read_weights(folder: Path, files: Files) -> dict[str, Tensor]:
    safetensors, pickle = folder / files.safetensors, folder / files.pickle
    if safetensors.is_file() and pickle.is_file():
        raise ValueError(f"{str(folder)!r} has both {files.safetensors} and {files.pickle}: remove one of them")
    if safetensors.is_file():
        return hf_peft.read_safetensors(safetensors)
    if pickle.is_file():
        return hf_peft.read_pickle(pickle)
    raise FileNotFoundError(f"no {files.safetensors} or {files.pickle} in {str(folder)!r}")


def version_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Major and minor version of a configuration that has been read."""
    match = _VERSION.fullmatch(config["version"])
    assert match is not None
    return int(match[1]), int(match[2])


def files_of(
    folder: str | os.PathLike[str], stored: StoredAdapter | StoredFusion, safe: bool
) -> dict[Path, Writer | None]:
    """What :func:`peft_ext.serialization.atomic.write_together` writes.

    Args:
        folder: the adapter's folder; for a fusion the setup's.
        stored: what is written.
        safe: write safetensors. AdapterHub reads them only with ``use_safetensors=True``, and ``.bin`` always.
    """
    folder = Path(folder)
    if isinstance(stored, StoredAdapter):
        return _adapter_files(folder, stored, safe)
    children = [{"type": "single", "children": [name]} for name in stored.adapters]
    setup = {"type": "Fuse", "children": children}
    files: dict[Path, Writer | None] = {
        folder / SETUP_NAME: hf_peft.json_writer(
            {"adapter_setup": setup, "head_setup": None, "version": WRITTEN_VERSION}
        )
    }
    for name, adapter in stored.adapters.items():
        files |= _adapter_files(folder / name, adapter, safe)
    return files | _stored_files(folder / ",".join(stored.adapters), FUSION, stored.fusion, safe)


def _adapter_files(folder: Path, stored: StoredAdapter, safe: bool) -> dict[Path, Writer | None]:
    files = _stored_files(folder, ADAPTER, stored.adapter, safe)
    if stored.head is None:
        return files | {folder / name: None for name in HEAD}
    return files | _stored_files(folder, HEAD, stored.head, safe)


def _stored_files(folder: Path, files: Files, stored: Stored, safe: bool) -> dict[Path, Writer | None]:
    config: dict[Path, Writer | None] = {folder / files.config: hf_peft.json_writer(stored.config)}
    return config | hf_peft.weight_files(folder / files.safetensors, folder / files.pickle, stored.tensors, safe)
