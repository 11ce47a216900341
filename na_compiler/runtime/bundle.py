"""`load_bundle`: kernels that were compiled before, from a folder that can be moved to another machine.

A bundle is native code: to load one is to trust whoever made it, as one trusts the author of a program. The hashes in
its manifest find damage and mistakes, not malice.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from na_compiler.devices.cpu import machine as machine_here
from na_compiler.devices.cuda import CudaTarget, cuda_capabilities
from na_compiler.problem import Problem
from na_compiler.runtime import folders, manifest, threads
from na_compiler.runtime.jit import command_for
from na_compiler.runtime.kernel import ABI, Kernel, KernelInfo, make_kernel
from na_compiler.runtime.library import load_function
from na_compiler.target import Target

__all__ = ["FORMAT", "MANIFEST", "Bundle", "BundleEntry", "load_bundle", "loaded_bundles", "read_bundle"]

# Changed whenever what a manifest says does: docs/bundle-format.md.
FORMAT = 6
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
    def target(self) -> Target | None:
        """The machine that it was compiled for; ``None`` for one that only a later version of this package knows."""
        try:
            return Target.parse(self.info.target)
        except ValueError:
            return None

    @property
    def runs_here(self) -> bool:
        """Whether this machine can run it."""
        target = self.target
        return target is not None and target.runs_here


class Bundle:
    """Kernels of a bundle, each loaded when it is first asked for. Make one with `load_bundle`."""

    def __init__(
        self,
        folder: Path,
        entries: list[BundleEntry],
        versions: Mapping[str, str],
        files: list[tuple[str, str, Path]],
    ) -> None:
        self.folder = folder
        self.entries = tuple(entries)
        self.versions = dict(versions)
        # What it is (`na_compiler.runtime.manifest.FILES`), the architecture that it is for, where it is.
        self.files = tuple(files)
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
        entries = self._by_problem.get((problem, direction), ())
        found = [
            (target.order, entry)
            for entry in entries
            if (target := entry.target) is not None and target.runs_on(machine)
        ]
        return self._open(max(found, key=lambda one: one[0])[1]) if found else None

    def file(self, kind: str) -> Path | None:
        """Return the launcher, the runtime or the runtime for CUDA that it has for this machine, or ``None``."""
        machine = machine_here()
        return next((path for what, where, path in self.files if (what, where) == (kind, machine)), None)

    def by_key(self, key: str) -> Kernel | None:
        """Return the kernel of a key, or ``None``; raises as `find`."""
        entry = self._by_key.get(key)
        return None if entry is None else self._open(entry)

    def _open(self, entry: BundleEntry) -> Kernel:
        kernel = self._kernels.get(entry.key)
        if kernel is None:
            # Hashed when the bundle was loaded, and once more before it runs.
            try:
                manifest.check_file(entry.library, entry.bytes, entry.sha256)
            except (OSError, ValueError) as error:
                raise ValueError(f"the bundle in {self.folder} has changed: {error}") from error
            is_cuda = entry.info.target.startswith("cuda:")
            function = load_function(entry.library, "cuda" if is_cuda else "cpu")
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
    bundle = _prepared(folder)
    with _lock:
        # The same folder again takes the place of what was there.
        _loaded[:] = [one for one in _loaded if one.folder != bundle.folder]
        _loaded.append(bundle)
    return bundle


def _prepared(folder: str | Path) -> Bundle:
    """Read a bundle, and make ready what its kernels need."""
    bundle = read_bundle(folder)
    if bundle.entries and not any(entry.runs_here for entry in bundle.entries):
        targets = {info.target for info in bundle}
        here = _targets_here(targets)
        raise ValueError(
            f"the bundle in {folder} has kernels for {', '.join(sorted(targets))} only, and this machine is "
            f"{' with '.join(here)}; make it again with --target {here[-1]}"
        )
    launcher, runtime = bundle.file("launcher"), bundle.file("runtime")
    if launcher is not None:
        threads.use_launcher(launcher)
    if runtime is not None:
        folders.use_runtime(runtime.parent)
    threads.warm()
    return bundle


def _targets_here(targets: set[str]) -> list[str]:
    """Return this machine's CPU, and its first GPU if a target is one: the last is what to compile for instead."""
    here = [Target.parse("llvm").name]
    if any(target.startswith("cuda:") for target in targets):
        with contextlib.suppress(ValueError):  # Of one that this version does not compile for.
            here += [CudaTarget.of_capability(capability).name for capability in cuda_capabilities()[:1]]
    return here


def loaded_bundles() -> list[Bundle]:
    """Return the bundles loaded so far, the last first; those that ``NA_COMPILER_BUNDLE`` names come after them."""
    named = os.environ.get("NA_COMPILER_BUNDLE")
    return [*_loaded[::-1], *(_named_bundles(named) if named else ())]


@functools.lru_cache(maxsize=4)
def _named_bundles(paths: str) -> tuple[Bundle, ...]:
    bundles = []
    for path in filter(None, paths.split(os.pathsep)):
        try:
            bundles.append(_prepared(path))
        except (OSError, ValueError) as error:
            raise type(error)(f"NA_COMPILER_BUNDLE={paths}: {error}") from error
    return tuple(bundles)


def read_bundle(folder: str | Path) -> Bundle:
    """Read and check a bundle without using it.

    Raises
    ------
    FileNotFoundError, ValueError
        As `load_bundle`, but for another machine's bundle.
    """
    folder = Path(folder).absolute()  # Kernels are loaded later, maybe from another current folder.
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise FileNotFoundError(f"no bundle in {folder}: it has no {MANIFEST}")
    said: dict[str, Any] | None = None
    try:
        said = manifest.read(path, manifest.BUNDLE, FORMAT)
        _check_versions(said["versions"])
        if manifest.digest_of(said) != said["digest"]:
            raise ValueError(f"{MANIFEST} was edited")
        entries = [_entry(folder, data) for data in said["kernels"]]
        files = [(data["kind"], data["machine"], folder / data["library"]) for data in said["files"]]
        _check_unique("kernels", [entry.key for entry in entries])
        _check_unique("files", [f"a {kind} for {machine}" for kind, machine, _ in files])
        for data in (*said["kernels"], *said["files"]):
            manifest.check_file(folder / data["library"], data["bytes"], data["sha256"])
    except (ValueError, OSError) as error:
        advice = _again(error.said if isinstance(error, manifest.OtherFormatError) else said, folder)
        raise ValueError(f"the bundle in {folder} cannot be used: {error}; {advice}") from error
    return Bundle(folder, entries, said["versions"], files)


def _entry(folder: Path, data: dict[str, Any]) -> BundleEntry:
    return BundleEntry(data["key"], KernelInfo.from_dict(data), folder / data["library"], data["bytes"], data["sha256"])


def _check_unique(what: str, names: list[str]) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{MANIFEST}: {what} has {twice} twice")


def _again(said: Mapping[str, Any] | None, folder: Path) -> str:
    """Return how to make a bundle again: by the command of its first kernel, if the manifest says what that is."""
    try:
        kernels = (said or {})["kernels"]
        first = kernels[0]
        command = command_for(Problem.from_dict(first["problem"]), first["direction"], first["target"], str(folder))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return "make it again with na-compile"
    others = f" (and {len(kernels) - 1} kernels more: na-compile MODEL finds those of a model)" if kernels[1:] else ""
    return f"make it again with {command}{others}"


def _check_versions(versions: Mapping[str, str]) -> None:
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
