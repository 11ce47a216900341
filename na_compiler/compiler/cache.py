"""The on-disk cache: one folder an entry, with a library and a manifest that says what it is and hashes it.

An entry is written beside its place and renamed into it, so it is whole or not there. One process compiles a key
while others wait for it. An entry that does not pass its own manifest is compiled again, with a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from na_compiler.compiler.locks import hold_file
from na_compiler.runtime import manifest
from na_compiler.runtime.folders import cache_folder
from na_compiler.runtime.kernel import KernelInfo
from na_compiler.runtime.temporary import clear_leftovers, temporary_folder

__all__ = ["Entry", "clear", "entries", "find", "make", "read_entry", "write_entry"]

_LOG = logging.getLogger("na_compiler")
_MANIFEST = "kernel.json"
_FORMAT = 5
# A lock is held while one kernel compiles: seconds. This is for a machine that crawls.
_LOCK_SECONDS = 600.0
# Seconds. It is locked again by whoever compiles that kernel, whether there is a file or not.
_OLD_LOCK = 86400.0
_DEFAULT_LIMIT = 1 << 30
# Of temporary folders.
_PREFIX = ".building-"


@dataclass(frozen=True)
class Entry:
    """A library on disk that passed its manifest.

    Parameters
    ----------
    key
        From `KernelSpec.key`.
    info
        What the library computes.
    library
        Where it is.
    used
        When it was used last, in seconds since the epoch.
    config
        The choices that it was compiled with, for people to read.
    reason
        Why no faster family of kernels was chosen, in a sentence; ``None`` where it is the fastest.
    """

    key: str
    info: KernelInfo
    library: Path
    used: float
    config: str
    reason: str | None

    @property
    def bytes(self) -> int:
        """Size of the library."""
        return self.library.stat().st_size


class DamagedEntryError(Exception):
    """An entry that does not pass its manifest."""


def find(key: str) -> Entry:
    """Return the entry of a key, remembering that it was used; raises as `read_entry`."""
    return _used(read_entry(_folder() / key, key))


def make(key: str, describe: Callable[[], Mapping[str, Any]], build: Callable[[Path], None]) -> Entry:
    """Build the entry of a key, unless another process does: then wait for that, and return its entry.

    Parameters
    ----------
    key
        From `KernelSpec.key`.
    describe
        Returns what the manifest says of the library: see `KernelSpec.describe`. Called if it is built.
    build
        Writes the library to a path.

    Raises
    ------
    OSError
        If the cache cannot be written.
    """
    folder = _folder() / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    locks = cache_folder() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = locks / f"{key}.lock"
    # Without locks two processes may compile the same, which harms nobody.
    with hold_file(lock, _LOCK_SECONDS):
        try:
            return _used(read_entry(folder, key))
        except FileNotFoundError:
            pass
        except DamagedEntryError as error:
            _LOG.warning("compiling %s again: %s", key, error)
            _remove(folder)
        entry = write_entry(folder, key, describe(), build)
        # Whoever waits for it, or makes it anew, finds the entry: there is nothing left to lock.
        _remove(lock)
    _clean()
    _limit(keep=folder)
    return entry


def write_entry(folder: Path, key: str, description: Mapping[str, Any], build: Callable[[Path], None]) -> Entry:
    """Build a library beside a folder, with its manifest, and rename the whole into place."""
    with temporary_folder(folder.parent, _PREFIX) as temporary:
        # In a folder of its own: it becomes the entry.
        made = temporary / key
        made.mkdir()
        library = made / "kernel.so"
        build(library)
        data = library.read_bytes()
        says: dict[str, Any] = {
            "format": _FORMAT,
            "key": key,
            "library": library.name,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            **{name: manifest.plain(value) if isinstance(value, str) else value for name, value in description.items()},
        }
        says["digest"] = manifest.digest_of(says)
        (made / _MANIFEST).write_text(json.dumps(says, indent=1), encoding="ascii")
        try:
            made.replace(folder)
        except OSError:  # Something is there: another process' entry, where locks do not work, or no entry at all.
            with contextlib.suppress(FileNotFoundError, DamagedEntryError):
                return read_entry(folder, key)
            _remove(folder)
            made.replace(folder)
    return read_entry(folder, key)


def read_entry(folder: Path, key: str) -> Entry:
    """Read an entry, checking its manifest and the library's hash.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    DamagedEntryError
        If it does not hold what it should.
    """
    if not folder.exists():
        raise FileNotFoundError(folder)
    try:
        said = manifest.read(folder / _MANIFEST, manifest.ENTRY, _FORMAT)
        if said["key"] != key:
            raise DamagedEntryError(f"{folder} holds another entry")
        if said["digest"] != manifest.digest_of(said):
            raise DamagedEntryError(f"{folder / _MANIFEST} was edited")
        info = KernelInfo.from_dict(said)
        library = folder / said["library"]
        manifest.check_file(library, said["bytes"], said["sha256"])
        return Entry(key, info, library, library.stat().st_mtime, said["config"], said["reason"])
    except (OSError, ValueError) as error:
        raise DamagedEntryError(f"{folder} cannot be read: {error}") from error


def entries() -> Iterator[Entry]:
    """Yield the cache's entries, those used last first; damaged ones are left out."""
    found = []
    for folder in _entry_folders():
        with contextlib.suppress(FileNotFoundError, DamagedEntryError):
            found.append(read_entry(folder, folder.name))
    yield from sorted(found, key=lambda entry: entry.used, reverse=True)


def clear() -> int:
    """Delete all entries, and what lies beside them; returns how many entries there were."""
    count = len(list(_entry_folders()))
    # With what is hidden there, of processes that were killed while they compiled, and what else this package keeps.
    for folder in (_folder(), cache_folder() / "locks", cache_folder() / "host", cache_folder() / "models"):
        for path in folder.iterdir() if folder.is_dir() else ():
            _remove(path)
    return count


def limit_bytes() -> int:
    """Return the size that the cache is kept under: ``NA_COMPILER_CACHE_BYTES``, or 1 GiB.

    Raises
    ------
    ValueError
        If the variable is no number.
    """
    named = os.environ.get("NA_COMPILER_CACHE_BYTES")
    if named is None:
        return _DEFAULT_LIMIT
    if not named.isdigit():
        raise ValueError(f"NA_COMPILER_CACHE_BYTES must be a number of bytes, got {named!r}; e.g. {_DEFAULT_LIMIT}")
    return int(named)


def _folder() -> Path:
    return cache_folder() / "kernels"


def _entry_folders() -> Iterator[Path]:
    folder = _folder()
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _used(entry: Entry) -> Entry:
    """Remember that an entry was used: those used least recently are deleted first."""
    with contextlib.suppress(OSError):  # A cache that others filled may be read-only.
        os.utime(entry.library, (time.time(), time.time()))
    return entry


def _clean() -> None:
    """Delete what processes that were killed left: half of an entry, a lock of one that was never made."""
    for folder in (_folder(), *_subfolders(cache_folder() / "host")):
        clear_leftovers(folder, _PREFIX)
    with contextlib.suppress(OSError):
        for lock in (cache_folder() / "locks").iterdir():
            if time.time() - lock.stat().st_mtime > _OLD_LOCK:
                _remove(lock)


def _limit(keep: Path) -> None:
    """Delete what was used least recently until the rest fits the limit. A library that is loaded stays usable.

    Kernels and the libraries of the host count, and what is half made, which is left alone.
    """
    sizes: list[tuple[float, int, Path]] = []
    for folder in (*_subfolders(_folder()), *_subfolders(cache_folder() / "host")):
        with contextlib.suppress(OSError):
            files: list[Any] = [path.stat() for path in folder.rglob("*") if path.is_file()]
            used = max((file.st_mtime for file in files), default=0.0)
            sizes.append((used, sum(file.st_size for file in files), folder))
    total = sum(size for _, size, _ in sizes)
    for _, size, folder in sorted(sizes):
        if total <= limit_bytes():
            return
        if folder != keep and not folder.name.startswith("."):
            shutil.rmtree(folder, ignore_errors=True)
            total -= size


def _subfolders(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in folder.iterdir() if path.is_dir()]
    return []
