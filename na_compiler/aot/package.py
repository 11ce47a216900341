"""`package`: an exported program as machine code by AOTInductor, and its kernels in a bundle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from na_compiler.compiler.bundle import save_bundle
from na_compiler.passes.canonicalise_torch import canonicalise_torch
from na_compiler.passes.collect_torch import collect_torch

__all__ = ["package"]


def package(
    program: ExportedProgram,
    path: str | os.PathLike[str],
    *,
    bundle: str | os.PathLike[str] | None = None,
    targets: Sequence[str] | None = None,
    shapes: Sequence[Mapping[str, Sequence[int]]] | None = None,
    jobs: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Compile a program with AOTInductor, and every neighborhood attention in it into a bundle.

    Parameters
    ----------
    program
        From ``torch.export.export``, in a block of ``torch.no_grad()``. It is canonicalised in place.
    path
        The ``.pt2`` to write. In Python ``torch._inductor.aoti_load_package`` loads it; in C++
        ``torch::inductor::AOTIModelPackageLoader``, after `build_library`'s library.
    bundle
        The folder to write the kernels to. Default: the path without its suffix, and ``.kernels``.
    targets
        What machines the kernels are for; default: this one's CPU. The rest of the program is for this machine.
    shapes
        Shapes of inputs by name, where a layout is dynamic: see `na_compiler.passes.collect`.
    jobs
        Processes that compile kernels.
    options
        Inductor's.

    Returns
    -------
    Path
        The package.

    Raises
    ------
    ValueError
        If there is no neighborhood attention in the program, or a layout is not known.
    """
    path = Path(path).absolute()
    canonicalise_torch(program)
    sites = collect_torch(program, shapes)
    if not sites:
        raise ValueError("the program has no neighborhood attention in it")
    folder = path.with_suffix(".kernels") if bundle is None else Path(bundle)
    save_bundle(folder, sites.specs(targets or ["llvm"]), jobs=jobs)
    torch._inductor.aoti_compile_and_package(  # noqa: SLF001 - AOTInductor's documented entry
        program, package_path=str(path), inductor_configs=dict(options) if options else None
    )
    return path
