"""The build backend: setuptools, building against the torch of the environment that runs pip.

pip builds in an isolated environment. It is run by the installing environment's interpreter with that environment's
site-packages taken off ``sys.path``, so torch is still there to be found. Listing torch in ``build-system.requires``
would install a second one, of another version perhaps, to build against.
"""

from __future__ import annotations

import importlib.util
import site
import sys
from importlib.machinery import PathFinder
from typing import Any

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# What to build against where there is no torch. A range would fetch the newest release.
DEFAULT_TORCH = "torch==2.13.0"


def expose_torch() -> bool:
    """Makes the installing environment's torch importable, after all else; False if it has none."""
    if importlib.util.find_spec("torch") is not None:
        return True
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    for folder in folders:
        if PathFinder.find_spec("torch", [folder]) is not None:
            sys.path.append(folder)
            return True
    return False


HAS_TORCH = expose_torch()


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What pip has to install into the build environment beside ``build-system.requires``."""
    return [] if HAS_TORCH else [DEFAULT_TORCH]


get_requires_for_build_editable = get_requires_for_build_wheel
get_requires_for_build_sdist = get_requires_for_build_wheel
