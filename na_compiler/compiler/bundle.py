"""`save_bundle`: compiled kernels in a folder of their own, for machines without a compiler."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from na_compiler.compiler.kernels import library_of
from na_compiler.compiler.spec import KernelSpec
from na_compiler.runtime import threads
from na_compiler.runtime.bundle import FORMAT, MANIFEST

__all__ = ["save_bundle"]


def save_bundle(folder: str | Path, specs: Iterable[KernelSpec]) -> None:
    """Compile specs and write them to a folder, for `load_bundle`.

    Parameters
    ----------
    folder
        Replaced if it is a bundle; refused if it is anything else.
    specs
        What to put in: see `KernelSpec.make`.

    Raises
    ------
    FileExistsError
        If the folder is there and no bundle.

    Examples
    --------
    >>> spec = KernelSpec.make(Problem((8, 8), heads=2, head_dim=16, kernel_size=3))  # doctest: +SKIP
    >>> save_bundle("kernels", [spec])  # doctest: +SKIP
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise FileExistsError(f"{folder} is there and no bundle; name another folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=folder.parent) as temporary:
        made = Path(temporary) / "bundle"
        made.mkdir()
        kernels = []
        for spec in dict.fromkeys(specs):
            name = f"{spec.key}.so"
            kernels.append({"key": spec.key, **_file(library_of(spec), made / name), **spec.info.to_dict()})
        launcher = threads.launcher_library()
        manifest = {
            "format": FORMAT,
            "kernels": kernels,
            "launcher": _file(launcher, made / launcher.name) if launcher else None,
        }
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        made.replace(folder)


def _file(source: Path, target: Path) -> dict[str, Any]:
    shutil.copyfile(source, target)
    data = target.read_bytes()
    return {"library": target.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
