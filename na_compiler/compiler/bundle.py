"""`save_bundle`: compiled kernels in a folder of their own, for machines without a compiler.

The folder holds a manifest and the libraries it names, beside it; no path in it is absolute. The manifest is JSON::

    {"format": 2,
     "versions": {"na_compiler": "0.1.0", "abi": "1", "apache-tvm": "0.27.0", "apache-tvm-ffi": "0.1.14"},
     "kernels": [{"key": "...", "library": "....so", "function": "main", "bytes": 42640, "sha256": "...",
                  "problem": {"layout": [56, 56], ...}, "direction": "forward", "target": "llvm:x86-64-v3",
                  "workspace": null}, ...],
     "files": {"launcher": {"library": "...", "bytes": ..., "sha256": "..."}, "runtime": {...}},
     "digest": "..."}
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import na_compiler
from na_compiler.compiler.parallel import Compiled, Progress, compile_all
from na_compiler.compiler.spec import KernelSpec
from na_compiler.runtime import threads
from na_compiler.runtime.bundle import FORMAT, MANIFEST, digest_of
from na_compiler.runtime.folders import runtime_library
from na_compiler.runtime.kernel import ABI

__all__ = ["save_bundle"]


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
        Whether to put TVM's runtime library in as well, for machines that have apache-tvm-ffi and not apache-tvm.
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
        If this machine cannot link libraries for a target.
    OSError
        If it cannot be written; a bundle that was there stays as it was.

    Examples
    --------
    >>> spec = KernelSpec.make(Problem((8, 8), heads=2, head_dim=16, kernel_size=3))  # doctest: +SKIP
    >>> save_bundle("kernels", [spec])  # doctest: +SKIP
    """
    folder = Path(folder)
    check_place(folder)
    with (
        compile_all(specs, jobs, progress) as compiled,
        tempfile.TemporaryDirectory(prefix=".bundle-", dir=_parent(folder)) as temporary,
    ):
        made = Path(temporary) / "bundle"
        made.mkdir()
        kernels = [_kernel(one, made) for one in compiled]
        files = {}
        launcher = threads.launcher_library()
        if launcher is not None:
            files["launcher"] = _file(launcher, made / launcher.name)
        if with_runtime:
            library = runtime_library()
            files["runtime"] = _file(library, made / library.name)
        manifest: dict[str, Any] = {"format": FORMAT, "versions": _versions(), "kernels": kernels, "files": files}
        manifest["digest"] = digest_of(manifest)
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _replace(made, folder, Path(temporary) / "replaced")
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
    """Put a folder in its place, and the one that is there aside: back, if that fails."""
    if not folder.exists():
        made.replace(folder)
        return
    folder.replace(aside)
    try:
        made.replace(folder)
    except OSError:
        with contextlib.suppress(OSError):
            aside.replace(folder)
        raise


def _versions() -> dict[str, str]:
    versions = {"na_compiler": na_compiler.__version__, "abi": str(ABI)}
    return versions | {name: importlib.metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi")}


def _kernel(compiled: Compiled, folder: Path) -> Mapping[str, Any]:
    spec = compiled.spec
    if not _is_shared(compiled.library):
        raise RuntimeError(
            f"kernels for {spec.target} are compiled here but cannot be linked: install a C compiler for it "
            f"({getattr(spec.target, 'triple', spec.target)}-gcc), or run na-compile on such a machine"
        )
    copied = _file(compiled.library, folder / f"{spec.key}.so")
    return {"key": spec.key, **copied, "function": "main", **compiled.entry.info.to_dict()}


def _is_shared(library: Path) -> bool:
    """Return whether a file is a shared library, by the type in its ELF header, and not an object file."""
    with library.open("rb") as file:
        header = file.read(18)
    return header[:4] == b"\x7fELF" and int.from_bytes(header[16:18], "little") == 3


def _file(source: Path, target: Path) -> dict[str, Any]:
    shutil.copyfile(source, target)
    data = target.read_bytes()
    return {"library": target.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
