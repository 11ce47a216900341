"""`load_bundle`: kernels that were compiled before, from a folder that can be moved to another machine.

A bundle is native code: to load one is to trust whoever made it. Hashes in its manifest find damage, not malice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from na_compiler.problem import Problem
from na_compiler.runtime import threads
from na_compiler.runtime.kernel import Kernel, KernelInfo, make_kernel
from na_compiler.runtime.library import load_function
from na_compiler.target import Target

__all__ = ["FORMAT", "MANIFEST", "Bundle", "BundleEntry", "load_bundle", "loaded_bundles"]

FORMAT = 1
MANIFEST = "manifest.json"

_loaded: list[Bundle] = []


@dataclass(frozen=True)
class BundleEntry:
    """One library of a bundle."""

    info: KernelInfo
    library: Path


class Bundle:
    """Kernels of a bundle, each loaded when it is first asked for. Make one with `load_bundle`."""

    def __init__(self, folder: Path, entries: list[BundleEntry]) -> None:
        self.folder = folder
        self._entries = entries
        self._kernels: dict[Path, Kernel] = {}

    def find(self, problem: Problem, direction: str = "forward", machine: str | Target = "llvm") -> Kernel | None:
        """Return the kernel for a problem that runs best on a machine, this one's CPU by default, or ``None``."""
        machine = Target.parse(machine)
        found = [e for e in self._entries if e.info.problem == problem and e.info.direction == direction]
        found = [entry for entry in found if Target.parse(entry.info.target).runs_on(machine)]
        if not found:
            return None
        best = max(found, key=lambda entry: Target.parse(entry.info.target).order)
        if best.library not in self._kernels:
            self._kernels[best.library] = make_kernel(best.info, load_function(best.library, machine.device_type))
        return self._kernels[best.library]

    def __iter__(self) -> Iterator[KernelInfo]:
        return (entry.info for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<Bundle {self.folder} of {len(self)} kernels>"


def load_bundle(folder: str | Path) -> Bundle:
    """Load a bundle: from now on the operators find its kernels before they look in the cache or compile.

    Parameters
    ----------
    folder
        What `save_bundle` wrote.

    Returns
    -------
    Bundle
        Its kernels, which are loaded when they are first used.

    Raises
    ------
    FileNotFoundError
        If there is no bundle.
    ValueError
        If the bundle is damaged, or another version's; nothing of it is used then.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no bundle in {folder}: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']}, this version reads {FORMAT}")
        entries = [_entry(folder, data) for data in manifest["kernels"]]
        launcher = _checked(folder, manifest["launcher"]) if manifest["launcher"] else None
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"the bundle in {folder} cannot be used: {error}; make it again with save_bundle") from error
    if launcher is not None:
        threads.use_launcher(launcher)
    bundle = Bundle(folder, entries)
    _loaded.append(bundle)
    return bundle


def loaded_bundles() -> list[Bundle]:
    """Return the bundles loaded so far, the last first."""
    return _loaded[::-1]


def _entry(folder: Path, data: dict[str, object]) -> BundleEntry:
    return BundleEntry(KernelInfo.from_dict(data), _checked(folder, data))


def _checked(folder: Path, data: dict[str, object]) -> Path:
    path = folder / Path(str(data["library"])).name
    if hashlib.sha256(path.read_bytes()).hexdigest() != data["sha256"]:
        raise ValueError(f"{path.name} is not the file that was put in")
    return path
