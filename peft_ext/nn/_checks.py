"""Argument checks that modules and configurations share."""

from __future__ import annotations

import math
from collections.abc import Mapping


def check_sizes(sizes: Mapping[str, object]) -> None:
    """Raises a ValueError that names the first of ``sizes`` that is not an integer above 0."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
            raise ValueError(f"{name} must be an integer > 0, got {size!r}")


def check_not_negative(values: Mapping[str, object]) -> None:
    """Raises a ValueError that names the first of ``values`` that is not a finite number of 0 or more."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
