"""Threads that call a model, and threads that change its adapters meanwhile."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager


class _Own(threading.local):
    def __init__(self) -> None:
        self.names: list[str] = []


class Calls:
    """Which adapters are in use: a change of one waits for the calls that use it, and holds up new ones.

    Calls with other adapters go on meanwhile. Adding an adapter needs no waiting, as nobody can name it before it is
    complete. Copies and pickles of a model begin without calls.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._changes = threading.RLock()
        self._users: Counter[str] = Counter()
        self._changing: Counter[str] = Counter()
        self._changer: int | None = None
        self._own = _Own()

    def __deepcopy__(self, memo: object) -> Calls:
        return Calls()

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()

    @contextmanager
    def using(self, names: Collection[str]) -> Iterator[None]:
        """While this lasts, nobody changes the adapters of these names, but this thread itself."""
        own = self._own.names
        awaited = [name for name in names if name not in own]
        with self._condition:
            self._condition.wait_for(lambda: self._may_use(awaited))
            self._users.update(names)
        own.extend(names)
        try:
            yield
        finally:
            del own[len(own) - len(names) :]
            with self._condition:
                self._users.subtract(names)
                self._condition.notify_all()

    def _may_use(self, names: Collection[str]) -> bool:
        return self._changer == threading.get_ident() or not any(self._changing[name] for name in names)

    @contextmanager
    def changing(self, names: Collection[str] = ()) -> Iterator[None]:
        """While this lasts, no other thread calls the adapters of these names, nor changes any adapter.

        Raises:
            RuntimeError: inside of a call, if another thread is changing adapters: they would wait for each other.
        """
        own = self._own.names
        if not self._changes.acquire(blocking=not own):
            raise RuntimeError("adapters cannot be changed inside of a call while another thread changes them")
        outer, self._changer = self._changer, threading.get_ident()
        try:
            with self._condition:
                self._changing.update(names)
                self._condition.wait_for(lambda: all(self._users[name] <= own.count(name) for name in names))
            yield
        finally:
            with self._condition:
                self._changing -= Counter(names)
                self._users += Counter()  # forgets names that nobody uses
                self._changer = outer
                self._condition.notify_all()
            self._changes.release()
