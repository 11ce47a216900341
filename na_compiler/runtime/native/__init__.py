"""C++ that reads bundles and calls their kernels: what the operator libraries for torch and ONNX Runtime share."""

from __future__ import annotations

import functools
import importlib.util
import logging
from pathlib import Path

from na_compiler import operands
from na_compiler.devices.cpu import feature_table
from na_compiler.runtime.bundle import FORMAT
from na_compiler.runtime.folders import runtime_library
from na_compiler.runtime.kernel import ABI

__all__ = ["flags", "installed", "operand_table", "sources"]

_LOG = logging.getLogger("na_compiler")


def sources(folder: Path) -> tuple[Path, ...]:
    """Return the C and C++ files of a folder, and those of this one."""
    here = Path(__file__).parent
    return tuple(path for place in (folder, here) for path in sorted(place.iterdir()) if path.suffix in _SUFFIXES)


_SUFFIXES = (".c", ".cc", ".h")


def flags() -> tuple[str, ...]:
    """Return the options that the files here are compiled with: headers, formats, where TVM is on this machine.

    Raises
    ------
    FileNotFoundError
        If the headers of apache-tvm-ffi are not installed.
    """
    folders = [installed("tvm_ffi") / "lib"]
    try:
        folders.append(runtime_library().parent)
    except FileNotFoundError:
        _LOG.info("no libtvm_runtime.so is installed here: operator libraries have to find one where they run")
    known = ":".join(map(str, folders))
    if '"' in known or known.count(":") >= len(folders):
        known = ""  # Found by the variable then.
    return (
        f"-I{Path(__file__).parent}",
        f"-I{installed('tvm_ffi') / 'include'}",
        f"-DNA_BUNDLE_FORMAT={FORMAT}",
        f"-DNA_KERNEL_ABI={ABI}",
        f'-DNA_CPU_FEATURES="{feature_table()}"',
        f'-DNA_OPERANDS="{operand_table()}"',
        f'-DNA_TVM_FOLDERS="{known}"',
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-pthread",
    )


def operand_table() -> str:
    """Return the table of operands as `table.cc` reads it: operands between semicolons, their fields between spaces."""

    def line(operand: operands.Operand) -> str:
        default = "-" if operand.default is None else str(operand.default)
        shape = ",".join(operand.shape) or "-"
        return " ".join((operand.name, operand.role, operand.dtype, operand.option or "-", default, shape))

    return ";".join(map(line, operands.TABLE))


@functools.cache
def installed(package: str) -> Path:
    """Return where a package is installed, without importing it.

    Raises
    ------
    FileNotFoundError
        If it is not.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"operator libraries are built with the headers of {package}; install it")
    return Path(spec.origin).parent
