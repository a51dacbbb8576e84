"""Checkpoint formats, one file each, and atomic writing."""
