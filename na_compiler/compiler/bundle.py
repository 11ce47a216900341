"""`save_bundle`: compiled kernels in a folder of their own, for machines without a compiler.

The folder holds a manifest and the libraries it names, beside it; no path in it is absolute. docs/bundle-format.md says
what is in the manifest.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import na_compiler
from na_compiler.compiler.parallel import Compiled, Progress, compile_all
from na_compiler.compiler.spec import KernelSpec
from na_compiler.devices.cpu import machine as machine_here
from na_compiler.runtime import threads
from na_compiler.runtime.bundle import FORMAT, MANIFEST, read_bundle
from na_compiler.runtime.folders import runtime_library
from na_compiler.runtime.kernel import ABI
from na_compiler.runtime.manifest import digest_of
from na_compiler.runtime.temporary import clear_leftovers, in_use, temporary_folder
from na_compiler.target import CpuTarget, Target

__all__ = ["check_place", "save_bundle"]

_LOG = logging.getLogger("na_compiler")
# A temporary folder beside the bundle, and in it what is replaced.
_PREFIX, _ASIDE = ".bundle-", "replaced"
# renameat2: paths that begin at the root need no folder (AT_FDCWD), and RENAME_EXCHANGE.
_HERE, _EXCHANGE = -100, 2
# Of an ELF header: what kind of file it is, and for which architecture.
_SHARED = 3
_MACHINES = {62: "x86-64", 183: "aarch64"}


def save_bundle(
    folder: str | Path,
    specs: Iterable[KernelSpec],
    *,
    jobs: int | None = None,
    with_runtime: bool = False,
    progress: Progress | None = None,
) -> list[Compiled]:
    """Compile specs and write them to a folder, for `load_bundle`.

    Parameters
    ----------
    folder
        Replaced if it is a bundle; refused if it is anything else. It is whole or not there: it is made beside its
        place and renamed into it.
    specs
        What to put in, for one target or several: see `KernelSpec.make`.
    jobs
        Processes that compile; default: one for each core.
    with_runtime
        Whether to put TVM's runtime libraries in as well, for machines that have apache-tvm-ffi and not apache-tvm.
    progress
        See `na_compiler.compiler.parallel.compile_all`.

    Returns
    -------
    list of Compiled
        What was put in.

    Raises
    ------
    FileExistsError
        If the folder is there and no bundle.
    RuntimeError
        If this machine cannot link libraries for a target, or its TVM's runtime is not for all of them.
    ValueError
        If there are more kernels than a manifest may name.
    OSError
        If it cannot be written; a bundle that was there stays as it was.

    Examples
    --------
    >>> spec = KernelSpec.make(Problem((8, 8), heads=2, head_dim=16, kernel_size=3))  # doctest: +SKIP
    >>> save_bundle("kernels", [spec])  # doctest: +SKIP
    """
    folder = Path(folder)
    check_place(folder)
    _restore(folder)
    clear_leftovers(folder.parent, _PREFIX)
    with (
        compile_all(specs, jobs, progress) as compiled,
        temporary_folder(_parent(folder), _PREFIX) as temporary,
    ):
        made = temporary / "bundle"
        made.mkdir()
        kernels = [_kernel(one, made) for one in compiled]
        files = [*_launchers(compiled, made), *(_runtimes(compiled, made) if with_runtime else [])]
        manifest: dict[str, Any] = {"format": FORMAT, "versions": _versions(), "kernels": kernels, "files": files}
        manifest["digest"] = digest_of(manifest)
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="ascii")
        # What a reader would refuse is refused here.
        read_bundle(made)
        _replace(made, folder, temporary / _ASIDE)
    return compiled


def check_place(folder: Path) -> None:
    """Refuse a folder that is there and no bundle.

    Raises
    ------
    FileExistsError
        If it is.
    """
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise FileExistsError(f"{folder} is there and no bundle; name another folder, or remove it")


def _parent(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.parent


def _replace(made: Path, folder: Path, aside: Path) -> None:
    """Put a folder in the place of another, in one step: whoever is killed leaves one of them there."""
    if not folder.exists():
        made.replace(folder)
        return
    if _exchange(made, folder):
        return
    # Where the file system cannot: the one that is there goes aside under its own name, for `_restore` to find.
    aside.mkdir()
    folder.replace(aside / folder.name)
    try:
        made.replace(folder)
    except OSError:
        with contextlib.suppress(OSError):
            (aside / folder.name).replace(folder)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places, by what Linux has for that; return whether they did."""
    try:
        function = ctypes.CDLL(None).renameat2
    except AttributeError:  # Before glibc 2.28.
        return False
    return not function(_HERE, os.fsencode(one.absolute()), _HERE, os.fsencode(other.absolute()), _EXCHANGE)


def _restore(folder: Path) -> None:
    """Put a bundle back that was aside when the process that was replacing it was killed."""
    if not folder.exists():
        for kept in sorted(folder.parent.glob(f"{_PREFIX}*/{_ASIDE}/{folder.name}")):
            if not in_use(kept.parent.parent):
                _LOG.warning("%s was being replaced by a process that was killed: it is back", folder)
                kept.replace(folder)
                return


def _versions() -> dict[str, str]:
    versions = {"na_compiler": na_compiler.__version__, "abi": str(ABI)}
    return versions | {name: importlib.metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi")}


def _kernel(compiled: Compiled, folder: Path) -> Mapping[str, Any]:
    spec = compiled.spec
    if _machine_of(compiled.library) != _machine(spec.target):
        raise RuntimeError(
            f"kernels for {spec.target} are compiled here but cannot be linked: install a C compiler for it "
            f"({getattr(spec.target, 'triple', spec.target)}-gcc), or run na-compile on such a machine"
        )
    return {"key": spec.key, **_file(compiled.library, folder / f"{spec.key}.so"), **compiled.entry.info.to_dict()}


def _launchers(compiled: Iterable[Compiled], folder: Path) -> Iterator[dict[str, Any]]:
    """Put in a launcher for each architecture that it can be compiled for here; where it runs, the others are made."""
    for machine in sorted({_machine(one.spec.target) for one in compiled}):
        library = threads.launcher_library() if machine == machine_here() else _cross_launcher(machine)
        if library is None or _machine_of(library) != machine:
            _LOG.info(
                "no launcher for %s in the bundle: its kernels need a C compiler there, or run on TVM's threads",
                machine,
            )
            continue
        named = folder / f"{machine}-{library.name}"
        yield {"kind": "launcher", "machine": machine, **_file(library, named)}


def _cross_launcher(machine: str) -> Path | None:
    compiler = shutil.which(f"{CpuTarget(machine).triple}-gcc")
    return None if compiler is None else threads.launcher_library((compiler,))


def _runtimes(compiled: Iterable[Compiled], folder: Path) -> Iterator[dict[str, Any]]:
    library = runtime_library()
    has = _machine_of(library)
    for one in compiled:
        if _machine(one.spec.target) != has:
            raise RuntimeError(
                f"{library} is for {has}, and the bundle has kernels for {one.spec.target}; name the folder of TVM's "
                f"runtime for that in NA_COMPILER_TVM_LIB, or make a bundle for each architecture"
            )
    assert has is not None
    yield {"kind": "runtime", "machine": has, **_file(library, folder / library.name)}
    if any(one.spec.target.device_type == "cuda" for one in compiled):
        library = library.with_name("libtvm_runtime_cuda.so")
        if not library.is_file():
            raise RuntimeError(
                f"kernels for CUDA need {library.name}, and it is not beside libtvm_runtime.so in {library.parent}"
            )
        yield {"kind": "runtime-cuda", "machine": has, **_file(library, folder / library.name)}


def _machine(target: Target) -> str:
    """Return the architecture of the CPU that kernels for a target are called on: of a GPU's, this one's."""
    return target.instruction_set.partition("-v")[0] if isinstance(target, CpuTarget) else machine_here()


def _machine_of(library: Path) -> str | None:
    """Return the architecture of a shared library, by its ELF header; ``None`` for an object file and anything else."""
    with library.open("rb") as file:
        header = file.read(20)
    if header[:4] != b"\x7fELF" or int.from_bytes(header[16:18], "little") != _SHARED:
        return None
    return _MACHINES.get(int.from_bytes(header[18:20], "little"))


def _file(source: Path, target: Path) -> dict[str, Any]:
    shutil.copyfile(source, target)
    data = target.read_bytes()
    return {"library": target.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
