"""Whether nvcc is here: what builds kernels for GPUs is tested where it is."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from na_compiler.compiler import toolkit


def _has_nvcc() -> bool:
    try:
        toolkit.find_toolkit()
    except RuntimeError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not _has_nvcc(), reason="nvcc is not here: pip install nvidia-cuda-nvcc")


def disassembler() -> str | None:
    """Return the path of nvdisasm, if it is here."""
    packages = importlib.util.find_spec("nvidia")
    folders = packages.submodule_search_locations if packages else ()
    found = [Path(folder) / "cu13" / "bin" / "nvdisasm" for folder in folders or ()]
    return next((str(path) for path in found if path.is_file()), shutil.which("nvdisasm"))


def disassemble(library: Path) -> str:
    """Return the instructions of a library's kernels; skips the test where there is nothing to do it with."""
    program = disassembler()
    if program is None:
        pytest.skip("nvdisasm is not here: pip install nvidia-cuda-nvdisasm")
    data = library.read_bytes()
    code = library.with_suffix(".cubin")
    code.write_bytes(data[data.index(b"\x7fELF", 1) :])
    return subprocess.run([program, str(code)], capture_output=True, text=True, check=True).stdout
