"""``peft-ext info``: versions, and whether and how the native ops are in use."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from peft_ext._loader import describe
from peft_ext.cli.console import console, key_value_table

OPTIONAL = ("transformers", "accelerate", "peft")


def info() -> None:
    """Show versions, and whether and how the native ops are in use.

    [dim]Examples:[/]

      [cyan]peft-ext info[/]

      [cyan]python -m peft_ext info[/]
    """
    facts = describe()
    rows = {
        "peft_ext": facts["peft_ext"],
        "Python": facts["python"],
        "torch": f"{facts['torch']} (CUDA: {_cuda(facts['torch_cuda'])})",
        **{name: _installed(name) for name in OPTIONAL},
        "native ops": ", ".join(facts["native_devices"]) if facts["native"] else f"no: {facts['why_not_native']}",
        **_build_rows(facts["build"]),
        "threads": str(torch.get_num_threads()),
    }
    console.print(key_value_table("peft_ext", rows))


def _cuda(version_of_torch: str | None) -> str:
    if version_of_torch is None:
        return "no"
    return f"{version_of_torch}, {torch.cuda.device_count()} devices"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _build_rows(build: dict[str, Any] | None) -> dict[str, str]:
    if build is None:
        return {}
    in_use = build["isa_in_use"] + (" with AMX" if build["amx"] else "")
    return {
        "compiled": f"for torch {build['torch']} by {build['compiler']}, CUDA: {build['cuda'] or 'no'}",
        "instruction sets": f"{', '.join(build['isa_built'])}; in use: {in_use}",
        "OpenMP": "yes" if build["openmp"] else "no",
    }
