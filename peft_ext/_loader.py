"""Loads the compiled extension."""

native_devices: frozenset[str] = frozenset()
