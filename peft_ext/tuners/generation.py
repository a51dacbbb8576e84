"""What ``generate()`` of transformers hands to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def cache_of(inputs: Mapping[str, Any]) -> Any:
    """The key-value cache among a model's inputs, or None: its name was ``past_key_values`` before transformers 5.24.

    Example:
        >>> cache_of({"input_ids": [[1]], "past_key_values": "a cache"})
        'a cache'
    """
    cache = inputs.get("cache")
    return inputs.get("past_key_values") if cache is None else cache
