"""Writes files so that a reader, or a crash, never meets half of them."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Writer = Callable[[Path], None]
"""Writes one file's content to the path it is given."""

_LEFT_OVER = re.compile(r"\.(?P<name>.+)\.(?P<token>[0-9a-f]{8})\.(?P<kind>new|old)")
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def write_together(files: Mapping[Path, Writer | None]) -> None:
    """Writes all files, or none and leaves those that were there.

    Two files cannot be renamed in one step, and a file must never be seen beside a partner of
    another generation. So, once all new content lies on disk under temporary names:

    1. the old files are set aside in the order of ``files``,
    2. the new ones take their names in the opposite order.

    Put the file first without which the others are not read, such as a configuration: it is the
    first to go and the last to come, so what a crash leaves between is never an old configuration with
    new weights. :func:`settle`, which whoever reads or writes the folder next calls, then puts the
    old files back. An exception at any step undoes the steps before.

    Of several processes or threads that write into a folder, one does at a time.

    Args:
        files: a writer by path; folders are created. None stands for a file that must be gone.

    Raises:
        OSError, and what a writer raises: with everything as it was.
    """
    folders = {path.parent for path in files}
    with _made_and_locked(folders):
        for folder in folders:
            _settle(folder)
        _write(files)


def _write(files: Mapping[Path, Writer | None]) -> None:
    token = secrets.token_hex(4)
    with ExitStack() as undo:
        staged = {}
        for path, write in files.items():
            if write is not None:
                staged[path] = path.with_name(f".{path.name}.{token}.new")
                undo.callback(staged[path].unlink, missing_ok=True)
                _stage(path, write, staged[path])
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


def _stage(path: Path, write: Writer, staged: Path) -> None:
    try:
        write(staged)
        _flush(staged)
    except OSError as error:
        message = f"{path} cannot be written, and what was there is as before: {error.strerror or error}"
        raise (OSError(message) if error.errno is None else OSError(error.errno, message)) from error


def settle(folder: Path) -> None:
    """Ends what a crash cut off in ``folder``: all its files are then of one write. Waits for a writer at work.

    Raises:
        OSError: if that cannot be done, and the folder cannot be read without.
    """
    left = _left_over(folder)
    if not left:
        return
    try:
        with _locked([folder]) as alone:
            if alone:
                _settle(folder)
    except OSError as error:
        if any(kind == "old" for _, _, kind in left.values()):
            raise OSError(
                f"{folder} holds files of a write that was cut off, and they cannot be put back ({error}): copy it to "
                "where it can be written"
            ) from error


def _settle(folder: Path) -> None:
    """The last file to get its name decides: before, the old files come back; after, they are of no use."""
    left = _left_over(folder)
    pending = {token for _, token, kind in left.values() if kind == "new"}
    # olds first: as long as a new one is there, another attempt does the same
    for path, (name, token, kind) in sorted(left.items(), key=lambda item: item[1][2], reverse=True):
        if kind == "old" and token in pending:
            os.replace(path, folder / name)
        else:
            path.unlink()


def _left_over(folder: Path) -> dict[Path, tuple[str, str, str]]:
    """Temporary files: name, token and kind of each."""
    if not folder.is_dir():
        return {}
    matches = {path: _LEFT_OVER.fullmatch(path.name) for path in folder.iterdir()}
    return {path: (match["name"], match["token"], match["kind"]) for path, match in matches.items() if match}


@contextmanager
def _locked(folders: Iterable[Path]) -> Iterator[bool]:
    """While no other process or thread writes into the folders; False where the file system has no locks.

    Raises:
        FileNotFoundError: if a folder is not there, or not any more once it is its turn.
    """
    with ExitStack() as stack:
        alone = fcntl is not None
        for folder in sorted(set(folders)) if alone else ():
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)  # which unlocks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                alone = False
            if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield alone


@contextmanager
def _made_and_locked(folders: Iterable[Path]) -> Iterator[None]:
    """As `_locked`; the folders are created first and, on failure, removed again before another writer's turn."""
    with ExitStack() as locks, ExitStack() as made:
        while True:
            for folder in folders:
                _make_folder(folder, made)
            try:
                locks.enter_context(_locked(folders))
                break
            except FileNotFoundError:
                pass  # A writer that failed has removed what it had made, while this one waited.
        yield
        made.pop_all()


def _make_folder(folder: Path, undo: ExitStack) -> None:
    """Creates ``folder`` and its missing parents, each to be removed again on failure unless it has come into use."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    for parent in reversed(missing):
        try:
            parent.mkdir()
        except FileExistsError:
            if not parent.is_dir():
                raise
            continue  # another process was faster, so it is not ours to remove
        undo.callback(_remove_empty, parent)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _flush(path: Path) -> None:
    """Forces a file's content, or a folder's entries, to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders, and writes their entries through
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
