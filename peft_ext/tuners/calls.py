"""Threads that call a model, and threads that change its adapters meanwhile."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager


class _Own(threading.local):
    def __init__(self) -> None:
        self.names: list[str] = []


class Calls:
    """Which adapters are in use: a change of one waits for the calls that use it, and holds up new ones.

    Calls with other adapters go on meanwhile. Adding an adapter needs no waiting, as nobody can name it before it is
    complete. A call inside of a call waits only for changes that have begun, as one that waits itself may be waiting
    for the outer call. Copies and pickles of a model begin without calls.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._changes = threading.RLock()
        self._users: Counter[str] = Counter()
        self._changing: Counter[str] = Counter()  # those that a change waits for included
        self._begun: Counter[str] = Counter()
        self._changer: int | None = None
        self._own = _Own()

    def __deepcopy__(self, memo: object) -> Calls:
        return Calls()

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()

    @contextmanager
    def using(self, names: Callable[[], Collection[str]]) -> Iterator[None]:
        """While this lasts, nobody changes the adapters of these names, but this thread itself.

        Args:
            names: gives the names; called again after each wait, as other adapters may be active then.
        """
        own = self._own.names
        used: list[str] = []

        def are_free() -> bool:
            used[:] = names()
            return self._may_use((name for name in used if name not in own), nested=bool(own))

        with self._condition:
            self._condition.wait_for(are_free)
            self._users.update(used)
        own.extend(used)
        try:
            yield
        finally:
            del own[len(own) - len(used) :]
            with self._condition:
                self._users -= Counter(used)  # forgets names that nobody uses
                self._condition.notify_all()

    def _may_use(self, names: Iterable[str], nested: bool) -> bool:
        changing = self._begun if nested else self._changing
        return self._changer == threading.get_ident() or not any(changing[name] for name in names)

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
        begun: Counter[str] = Counter()
        try:
            with self._condition:
                self._changing.update(names)
                self._condition.wait_for(lambda: all(self._users[name] <= own.count(name) for name in names))
                begun.update(names)
                self._begun += begun
            yield
        finally:
            with self._condition:
                self._changing -= Counter(names)
                self._begun -= begun
                self._changer = outer
                self._condition.notify_all()
            self._changes.release()
