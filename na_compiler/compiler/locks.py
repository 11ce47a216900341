"""Locks: `KeyLocks` for each of many things within this process, `hold_file` among processes."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Hashable, Iterator
from pathlib import Path

from filelock import FileLock

__all__ = ["KeyLocks", "hold_file"]


@contextlib.contextmanager
def hold_file(lock: Path, seconds: float) -> Iterator[None]:
    """Hold a lock among processes for a block, where the file system has any: else two may do the same at once.

    Raises
    ------
    TimeoutError
        If another process has it for so many seconds.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(NotImplementedError):
            stack.enter_context(FileLock(lock, timeout=seconds))
        yield


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
