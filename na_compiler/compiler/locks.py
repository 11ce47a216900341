"""`KeyLocks`: a lock for each of many things."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Hashable, Iterator

__all__ = ["KeyLocks"]


class KeyLocks:
    """A lock for each key, for as long as somebody has it or waits for it."""

    def __init__(self) -> None:
        self.reset()
        _ALL.add(self)

    def reset(self) -> None:
        """Free all, in a forked child, where the threads that held them are not."""
        self._guard = threading.Lock()
        self._locks: dict[Hashable, tuple[threading.RLock, int]] = {}

    @contextlib.contextmanager
    def hold(self, key: Hashable) -> Iterator[None]:
        """Hold the lock of a key within a block. A thread may hold it twice."""
        with self._guard:
            lock, count = self._locks.get(key, (threading.RLock(), 0))
            self._locks[key] = lock, count + 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, count = self._locks[key]
                if count == 1:
                    del self._locks[key]
                else:
                    self._locks[key] = lock, count - 1


_ALL: weakref.WeakSet[KeyLocks] = weakref.WeakSet()


def _after_fork() -> None:
    for locks in _ALL:
        locks.reset()


os.register_at_fork(after_in_child=_after_fork)
