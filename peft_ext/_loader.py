"""Loads the compiled extension, or says why there is none.

``_build.json`` is written beside the extension when it is compiled and says what it was compiled against. It is read
first: a library made for another torch fails to load with an unresolved symbol at best, and crashes at worst.

Environment: ``PEFT_EXT_REQUIRE_NATIVE=1`` makes a missing extension an ImportError instead of a warning.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_ext._version import __version__

_BUILD_FILE = Path(__file__).with_name("_build.json")
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
_HINT = f"To rebuild it, in the source tree of peft_ext {__version__}: {_REBUILD}"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _check_built_for(built_for: dict[str, str | None]) -> None:
    """Raises ImportError unless the running torch is of the kind that the extension was compiled against."""
    torch_ok = _minor(str(built_for["torch"])) == _minor(torch.__version__)
    cuda_ok = built_for["cuda"] in (None, torch.version.cuda)
    if not (torch_ok and cuda_ok):
        raise ImportError(
            f"peft_ext was built for torch {built_for['torch']} (CUDA: {built_for['cuda']}), "
            f"but you have torch {torch.__version__} (CUDA: {torch.version.cuda}). {_HINT}"
        )


def _load() -> tuple[frozenset[str], str | None]:
    """Loads ``peft_ext._C``; returns the device types that have kernels and, if none, the reason."""
    if not _BUILD_FILE.exists():
        return frozenset(), "it was not compiled"
    if importlib.util.find_spec("peft_ext._C") is None:
        return frozenset(), f"it was not compiled for Python {platform.python_version()}"
    built_for = json.loads(_BUILD_FILE.read_text())
    _check_built_for(built_for)
    try:
        importlib.import_module("peft_ext._C")
    except ImportError as error:
        raise ImportError(
            f"peft_ext's extension, built for torch {built_for['torch']}, does not load "
            f"with torch {torch.__version__}: {error}. {_HINT}"
        ) from error
    devices = {"cpu", "meta"} | ({"cuda"} if built_for["cuda"] else set())
    return frozenset(devices), None


native_devices, why_not_native = _load()

if why_not_native is not None:
    if os.environ.get("PEFT_EXT_REQUIRE_NATIVE") == "1":
        raise ImportError(f"peft_ext has no native extension: {why_not_native}. {_HINT}")
    _warning = f"peft_ext runs the slower references, without its native extension: {why_not_native}. {_HINT}"
    warnings.warn(_warning, stacklevel=2)
else:
    importlib.import_module("peft_ext._fake")
    importlib.import_module("peft_ext._vmap")


_native_on_cpu, _native_on_cuda = "cpu" in native_devices, "cuda" in native_devices


def is_native(tensor: Tensor) -> bool:
    """Whether there are kernels for the tensor's device: asking for its name would cost as much as a small kernel."""
    if tensor.is_cpu:
        return _native_on_cpu
    if tensor.is_cuda:
        return _native_on_cuda
    return tensor.device.type in native_devices


def describe() -> dict[str, Any]:
    """Versions, and whether and how the extension is in use: what ``peft-ext info`` prints.

    Example:
        >>> sorted(describe())
        ['build', 'native', 'native_devices', 'peft_ext', 'python', 'torch', 'torch_cuda', 'why_not_native']
    """
    native = why_not_native is None
    return {
        "peft_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "native": native,
        "why_not_native": why_not_native,
        "native_devices": sorted(native_devices),
        "build": importlib.import_module("peft_ext._C").build_info() if native else None,
    }
