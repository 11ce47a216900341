"""Temporary folders beside what they become, and what is left of those whose process was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["clear_leftovers", "in_use", "temporary_folder"]

# Seconds. A process marks its folder a moment after it has made it; those of an older version do not.
_AGE = 3600.0


@contextlib.contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a folder within another for a block, marked as in use by a lock on it, which ends with the process."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name:
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):  # Not all file systems have locks.
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Path(name)
        finally:
            os.close(descriptor)


def in_use(folder: Path) -> bool:
    """Return whether a process holds the lock on a folder; true where there is no telling."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def clear_leftovers(parent: Path, prefix: str) -> None:
    """Delete what processes that were killed left of `temporary_folder`: what is old, and in use by nobody."""
    with contextlib.suppress(OSError):
        for path in parent.iterdir():
            if path.name.startswith(prefix) and time.time() - path.lstat().st_mtime > _AGE and not in_use(path):
                shutil.rmtree(path, ignore_errors=True)
