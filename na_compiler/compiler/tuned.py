"""Records of what was fastest on a device: a line of JSON each, in a file that people read, share, and edit.

`na_compiler.tune` writes them. `find` is what a spec asks: what it says is part of the spec's key, so that a kernel is
compiled, and found, by what was recorded when it was asked for.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import na_compiler
from na_compiler.compiler.locks import hold_file
from na_compiler.problem import Problem
from na_compiler.runtime import manifest
from na_compiler.runtime.folders import cache_folder
from na_compiler.runtime.temporary import temporary_folder
from na_compiler.target import Target

__all__ = ["Record", "find", "records", "store", "tuned_file"]

_LOG = logging.getLogger("na_compiler")
_NAME = "tuned.jsonl"
# Changed whenever what a record says does.
_FORMAT = 1
# Seconds. Whoever has the lock reads and writes one small file.
_LOCK_SECONDS = 60.0
_PREFIX = ".tuned-"


@dataclass(frozen=True)
class Record:
    """What was fastest for a problem on a device.

    Parameters
    ----------
    device
        The device, as it calls itself.
    target
        Name of the target.
    direction
        ``"forward"``, ``"backward"`` or ``"tangent"``.
    problem
        What was computed.
    family, config
        What was fastest: a family's name, and the text of its config.
    nanoseconds
        Its time.
    planned, planned_nanoseconds
        The text of what the planner had chosen, and its time in the same run.
    batch
        Batch entries.
    """

    device: str
    target: str
    direction: str
    problem: Problem
    family: str
    config: str
    nanoseconds: int
    planned: str
    planned_nanoseconds: int
    batch: int

    @property
    def about(self) -> tuple[object, ...]:
        """What there is one record of."""
        return self.device, self.target, self.direction, self.problem

    @property
    def choice(self) -> tuple[str, str]:
        """What a spec is told: the family's name, and the text of its config."""
        return self.family, self.config

    def to_line(self) -> str:
        """Return the line of the file."""
        said = {"format": _FORMAT, "version": na_compiler.__version__, **vars(self)}
        said |= {"device": manifest.plain(self.device), "problem": self.problem.to_dict()}
        return json.dumps(said)

    @classmethod
    def from_line(cls, line: str) -> Record:
        """Make a record of a line.

        Raises
        ------
        ValueError
            If it is none, or of another version.
        """
        said: Any = manifest.parse(line.encode())
        if not isinstance(said, dict) or said.get("format") != _FORMAT:
            raise ValueError(f"it is no record of format {_FORMAT}")
        manifest.TUNED(said, "")
        if said["version"] != na_compiler.__version__:
            raise ValueError(f"it is of na_compiler {said['version']}, and this is {na_compiler.__version__}")
        fields = {name: value for name, value in said.items() if name not in ("format", "version")}
        return cls(**{**fields, "problem": Problem.from_dict(said["problem"])})


def tuned_file() -> Path | None:
    """Return the file of records: ``NA_COMPILER_TUNED``, or one in the cache's folder; ``None`` if that is ``0``."""
    named = os.environ.get("NA_COMPILER_TUNED")
    if named == "0":
        return None
    if not named:
        return cache_folder() / _NAME
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"NA_COMPILER_TUNED={named}: {error}; name a file from the root on, or 0 for none") from error


def find(problem: Problem, target: Target, direction: str) -> Record | None:
    """Return what was recorded for a problem, if anything was.

    Where this machine has a device that runs kernels for the target, only what was measured on such a device counts:
    elsewhere, as where a bundle is made for another machine, the last record for the target.
    """
    about = (target.name, direction, problem)
    found = [one for one in records() if (one.target, one.direction, one.problem) == about]
    if not found:
        return None
    here = tuple(map(manifest.plain, target.devices_here))
    found = [one for one in found if one.device in here] if here else found
    return found[-1] if found else None


def records() -> tuple[Record, ...]:
    """Return all records that this version reads; of others it is said, in one line, that they are passed over."""
    path = tuned_file()
    if path is None:
        return ()
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if os.environ.get("NA_COMPILER_TUNED"):
            _say_missing(path)
        return ()
    except OSError:
        return _read(path)  # Which says why it cannot.
    return _read(path, status.st_mtime_ns, status.st_size, status.st_ino)


@functools.cache
def _say_missing(path: Path) -> None:
    _LOG.warning("NA_COMPILER_TUNED names %s, which is not there yet: kernels are as they are planned", path)


@functools.lru_cache(maxsize=4)
def _read(path: Path, *_: int) -> tuple[Record, ...]:
    """Read a file, once as long as it stays the same."""
    found: dict[tuple[object, ...], Record] = {}
    passed: list[str] = []
    try:
        lines = _lines(path)
    except ValueError as error:
        _LOG.warning("nothing is taken from %s: %s", path, error)
        return ()
    for number, line in enumerate(lines, 1):
        try:
            record = Record.from_line(line)
        except ValueError as error:
            passed.append(f"line {number}: {error}")
        else:
            # What is said last counts, and is last.
            found.pop(record.about, None)
            found[record.about] = record
    if passed:
        _LOG.warning(
            "%d of the %d records in %s are passed over, as if there were none (%s); na-compile tune makes them anew",
            len(passed), len(lines), path, passed[0],
        )  # fmt: skip
    return tuple(found.values())


def _lines(path: Path) -> list[str]:
    return [line for line in manifest.contents(path).decode("ascii", "replace").splitlines() if line.strip()]


def store(record: Record) -> Path:
    """Write a record to the file, in place of the one about the same; returns the file.

    What others write meanwhile stays, and what this version does not read. It is written beside its place and renamed.

    Raises
    ------
    OSError
        If the file cannot be written.
    ValueError
        If there is none, or it is not a file that could hold records.
    """
    path = tuned_file()
    if path is None:
        raise ValueError("NA_COMPILER_TUNED=0 keeps no records; unset it, or name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold_file(path.with_name(f"{path.name}.lock"), _LOCK_SECONDS):
        lines = _lines(path) if os.path.lexists(path) else []
        lines = [line for line in lines if not _is_about(line, record)]
        with temporary_folder(path.parent, _PREFIX) as folder:
            made = folder / path.name
            made.write_text("".join(f"{line}\n" for line in (*lines, record.to_line())), encoding="ascii")
            made.replace(path)
    return path


def _is_about(line: str, record: Record) -> bool:
    """Whether a line is an older record about the same, of this version or another."""
    with contextlib.suppress(ValueError):
        said: Any = manifest.parse(line.encode())
        if isinstance(said, dict):
            told = tuple(said.get(name) for name in ("device", "target", "direction", "problem"))
            return told == (manifest.plain(record.device), record.target, record.direction, record.problem.to_dict())
    return False
