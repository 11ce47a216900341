"""`load_bundle`: kernels that were compiled before, from a folder that can be moved to another machine.

A bundle is native code: to load one is to trust whoever made it, as one trusts the author of a program. The hashes in
its manifest find damage and mistakes, not malice.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from na_compiler.problem import Problem
from na_compiler.runtime import folders, threads
from na_compiler.runtime.jit import command_for
from na_compiler.runtime.kernel import ABI, Kernel, KernelInfo, make_kernel
from na_compiler.runtime.library import load_function
from na_compiler.target import Target

__all__ = ["FORMAT", "MANIFEST", "Bundle", "BundleEntry", "digest_of", "load_bundle", "loaded_bundles", "read_bundle"]

FORMAT = 4
MANIFEST = "manifest.json"

_loaded: list[Bundle] = []
_lock = threading.Lock()


@dataclass(frozen=True)
class BundleEntry:
    """One library of a bundle: what `na_compiler.compiler.spec.KernelSpec.key` named it, what it is, where it is."""

    key: str
    info: KernelInfo
    library: Path
    bytes: int
    sha256: str

    @property
    def target(self) -> Target:
        """The machine that it was compiled for."""
        return Target.parse(self.info.target)


class Bundle:
    """Kernels of a bundle, each loaded when it is first asked for. Make one with `load_bundle`."""

    def __init__(self, folder: Path, entries: list[BundleEntry], versions: Mapping[str, str]) -> None:
        self.folder = folder
        self.entries = tuple(entries)
        self.versions = dict(versions)
        self._kernels: dict[str, Kernel] = {}
        self._by_problem: dict[tuple[Problem, str], list[BundleEntry]] = {}
        for entry in entries:
            self._by_problem.setdefault((entry.info.problem, entry.info.direction), []).append(entry)
        self._by_key = {entry.key: entry for entry in entries}

    def find(self, problem: Problem, direction: str = "forward", machine: str | Target = "llvm") -> Kernel | None:
        """Return the kernel for a problem that runs best on a machine, this one's CPU by default, or ``None``.

        Raises
        ------
        ValueError
            If its library was changed since the bundle was loaded.
        """
        machine = Target.parse(machine)
        found = [entry for entry in self._by_problem.get((problem, direction), ()) if entry.target.runs_on(machine)]
        return self._open(max(found, key=lambda entry: entry.target.order)) if found else None

    def by_key(self, key: str) -> Kernel | None:
        """Return the kernel of a key, or ``None``; raises as `find`."""
        entry = self._by_key.get(key)
        return None if entry is None else self._open(entry)

    def _open(self, entry: BundleEntry) -> Kernel:
        kernel = self._kernels.get(entry.key)
        if kernel is None:
            # Hashed when the bundle was loaded, and once more before it runs.
            try:
                _check(entry.library, entry.sha256)
            except (OSError, ValueError) as error:
                raise ValueError(f"the bundle in {self.folder} has changed: {error}") from error
            function = load_function(entry.library, entry.target.device_type)
            kernel = self._kernels[entry.key] = make_kernel(entry.info, function)
        return kernel

    def __iter__(self) -> Iterator[KernelInfo]:
        return (entry.info for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"<Bundle {self.folder} of {len(self)} kernels>"


def load_bundle(folder: str | Path) -> Bundle:
    """Load a bundle: from now on the operators find its kernels before they look in the cache or compile.

    Parameters
    ----------
    folder
        What ``na-compile`` or `save_bundle` wrote. ``NA_COMPILER_BUNDLE`` names bundles that are loaded when a kernel
        is first needed, separated as in ``PATH``.

    Returns
    -------
    Bundle
        Its kernels, which are loaded when they are first used.

    Raises
    ------
    FileNotFoundError
        If there is no bundle.
    ValueError
        If the bundle is damaged, another version's, or another machine's; nothing of it is used then.

    Notes
    -----
    A bundle is native code, which runs with all rights of the process. Load only those whose author you trust.
    """
    bundle, launcher, runtime = read_bundle(folder)
    if bundle.entries and not any(entry.target.runs_here for entry in bundle.entries):
        targets = ", ".join(sorted({info.target for info in bundle}))
        raise ValueError(
            f"the bundle in {folder} has kernels for {targets} only, and this machine is {Target.parse('llvm')}; make "
            f"it again with --target {Target.parse('llvm')}"
        )
    if launcher is not None:
        threads.use_launcher(launcher)
    if runtime is not None:
        folders.use_runtime(runtime.parent)
    threads.warm()
    _loaded.append(bundle)
    return bundle


def loaded_bundles() -> list[Bundle]:
    """Return the bundles loaded so far, the last first; those that ``NA_COMPILER_BUNDLE`` names come after them."""
    named = os.environ.get("NA_COMPILER_BUNDLE")
    return [*_loaded[::-1], *(_named_bundles(named) if named else ())]


@functools.cache
def _named_bundles(paths: str) -> tuple[Bundle, ...]:
    bundles = []
    with _lock:
        for path in filter(None, paths.split(os.pathsep)):
            try:
                bundle = load_bundle(path)
            except (OSError, ValueError) as error:
                raise type(error)(f"NA_COMPILER_BUNDLE={paths}: {error}") from error
            _loaded.remove(bundle)
            bundles.append(bundle)
    return tuple(bundles)


def read_bundle(folder: str | Path) -> tuple[Bundle, Path | None, Path | None]:
    """Read and check a bundle without using it; returns it, its launcher, and its copy of TVM's runtime.

    Raises
    ------
    FileNotFoundError, ValueError
        As `load_bundle`, but for another machine's bundle.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no bundle in {folder}: it has no {MANIFEST}")
    manifest = None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _check_versions(manifest)
        if digest_of(manifest) != manifest["digest"]:
            raise ValueError(f"{MANIFEST} was edited")
        entries = [_entry(folder, data) for data in manifest["kernels"]]
        files = {name: _file(folder, data) for name, data in manifest["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        reason = f"{MANIFEST} has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"the bundle in {folder} cannot be used: {reason}; {_again(manifest, folder)}") from error
    return Bundle(folder, entries, manifest["versions"]), files.get("launcher"), files.get("runtime")


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Return a hash of all that a manifest says."""
    content = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _again(manifest: Any, folder: Path) -> str:
    """Return how to make a bundle again: by the command of its first kernel, if the manifest says what that is."""
    try:
        commands = [
            command_for(Problem.from_dict(kernel["problem"]), kernel["direction"], kernel["target"], str(folder))
            for kernel in manifest["kernels"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        commands = []
    if not commands:
        return "make it again with na-compile"
    others = f" (and {len(commands) - 1} kernels more: na-compile MODEL finds those of a model)" if commands[1:] else ""
    return f"make it again with:  {commands[0]}{others}"


def _check_versions(manifest: Mapping[str, Any]) -> None:
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']}, and this version of na_compiler reads {FORMAT}")
    versions = manifest["versions"]
    if versions["abi"] != str(ABI):
        raise ValueError(
            f"it is of na_compiler {versions['na_compiler']}, whose kernels are called in another way (ABI "
            f"{versions['abi']}, here {ABI})"
        )
    # TVM's runtime is compatible within a minor version.
    for name in ("apache-tvm-ffi", "apache-tvm"):
        here = _version(name)
        if here is not None and _minor(here) != _minor(versions[name]):
            raise ValueError(f"it was made with {name} {versions[name]}, and {here} is installed here")


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _entry(folder: Path, data: Mapping[str, Any]) -> BundleEntry:
    path = _file(folder, data)
    return BundleEntry(data["key"], KernelInfo.from_dict(dict(data)), path, data["bytes"], data["sha256"])


def _file(folder: Path, data: Mapping[str, Any]) -> Path:
    # A name, never a path: nothing outside the folder is loaded.
    path = folder / Path(str(data["library"])).name
    _check(path, data["sha256"])
    return path


def _check(path: Path, sha256: str) -> None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path.name} is not the file that was put in")
