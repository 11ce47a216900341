"""Remembers which sites a file's model has: to load an exported program, torch takes seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from na_compiler.passes.sites import Site, Sites
from na_compiler.problem import Problem
from na_compiler.runtime import manifest
from na_compiler.runtime.folders import cache_folder

__all__ = ["remembered"]

# Files that are remembered; those that were written or asked for longest ago go first.
_LIMIT = 256


def remembered(path: str, shapes: Sequence[Mapping[str, Sequence[int]]] | None, find: Callable[[], Sites]) -> Sites:
    """Return the sites of a file, from the cache if it has them.

    Parameters
    ----------
    path
        The file. Its content is what counts, and the sources of the passes.
    shapes
        What the sites depend on besides.
    find
        Finds them.
    """
    if not Path(path).is_file():
        return find()
    asked = json.dumps([{name: list(shape) for name, shape in one.items()} for one in shapes or ()])
    with Path(path).open("rb") as file:
        content = (
            hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
        )
    key = hashlib.sha256(f"{content.hexdigest()} {asked} {shapes is None} {_fingerprint()}".encode()).hexdigest()[:32]
    entry = cache_folder() / "models" / f"{key}.json"
    # Whatever else is in its place costs time, and is written anew.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        sites = Sites(_site(data) for data in json.loads(manifest.contents(entry))["sites"])
        with contextlib.suppress(OSError):
            os.utime(entry)
        return sites
    sites = find()
    # A cache that cannot be written costs time, nothing else.
    with contextlib.suppress(OSError):
        _write(entry, json.dumps({"model": Path(path).name, "sites": [dataclasses.asdict(site) for site in sites]}))
    return sites


def _site(data: dict[str, object]) -> Site:
    problem = data.pop("problem")
    dynamic, opened = data.pop("dynamic"), data.pop("open_problem")
    assert isinstance(dynamic, list)
    made, made_open = (None if one is None else Problem.from_dict(one) for one in (problem, opened))  # type: ignore[arg-type]
    return Site(problem=made, dynamic=tuple(dynamic), open_problem=made_open, **data)  # type: ignore[arg-type]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    Path(temporary).replace(path)
    # With what processes left that were killed while they wrote.
    for old in sorted(path.parent.iterdir(), key=_written)[:-_LIMIT]:
        old.unlink(missing_ok=True)


def _written(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.lstat().st_mtime
    return 0.0


@functools.cache
def _fingerprint() -> str:
    package = Path(__file__).parent
    digest = hashlib.sha256()
    operators = sorted((package.parent / "ops").glob("*.py"))
    problems = [package.parent / name for name in ("borders.py", "parameters.py", "problem.py")]
    for path in [*sorted(package.glob("*.py")), *operators, *problems]:
        digest.update(path.relative_to(package.parent).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
