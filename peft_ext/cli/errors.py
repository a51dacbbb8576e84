"""What the user did wrong, told in a line or two instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CliError(Exception):
    """A mistake that the user can mend; the message says how. The command exits with status 2."""


@contextmanager
def explain(what: str, kinds: tuple[type[Exception], ...] = (ValueError, TypeError)) -> Iterator[None]:
    """Turns the library's own errors about its arguments into a :class:`CliError`."""
    try:
        yield
    except kinds as error:
        raise CliError(f"{what}: {error}") from error
