"""Argument checks that modules and configurations share."""

from __future__ import annotations

from collections.abc import Mapping


def check_sizes(sizes: Mapping[str, object]) -> None:
    """Raises a ValueError that names the first of ``sizes`` that is not an integer above 0."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
            raise ValueError(f"{name} must be an integer > 0, got {size!r}")
