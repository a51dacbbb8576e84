"""Writes files so that a reader, or a crash, never meets half of them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

Writer = Callable[[Path], None]
"""Writes one file's content to the path it is given."""


def write_together(files: Mapping[Path, Writer | None]) -> None:
    """Writes all files, or none and leaves those that were there.

    Two files cannot be renamed in one step, and a file must never be seen beside a partner of
    another generation. So, once all new content lies on disk under temporary names:

    1. the old files are set aside in the order of ``files``,
    2. the new ones take their names in the opposite order.

    Put the file first without which the others are not read, such as a configuration: it is the
    first to go and the last to come, so what a crash leaves between is no checkpoint at all, and
    never an old configuration with new weights. An exception at any step undoes the steps before.

    Args:
        files: a writer by path; folders are created. None stands for a file that must be gone.

    Raises:
        OSError, and what a writer raises: with everything as it was.
    """
    token = secrets.token_hex(4)
    with ExitStack() as undo:
        staged = {}
        for path, write in files.items():
            _make_folder(path.parent, undo)
            if write is not None:
                staged[path] = path.with_name(f".{path.name}.{token}.new")
                undo.callback(staged[path].unlink, missing_ok=True)
                write(staged[path])
                _flush(staged[path])
        aside = {}
        for path in filter(Path.exists, files):
            aside[path] = path.with_name(f".{path.name}.{token}.old")
            os.replace(path, aside[path])
            undo.callback(os.replace, aside[path], path)
        for path in reversed(staged):
            os.replace(staged[path], path)
            undo.callback(path.unlink)
        for folder in {path.parent for path in files}:
            _flush(folder)
        undo.pop_all()
    for old in aside.values():
        old.unlink()


def _make_folder(folder: Path, undo: ExitStack) -> None:
    """Creates ``folder`` and its missing parents, each to be removed again on failure."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir()
        undo.callback(parent.rmdir)


def _flush(path: Path) -> None:
    """Forces a file's content, or a folder's entries, to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders, and writes their entries through
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
