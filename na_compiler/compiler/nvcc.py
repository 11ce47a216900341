"""Machine code for GPUs: nvcc compiles what TVM generates, and the library holds what it made, never source text."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from pathlib import Path

from na_compiler.target import CudaTarget

__all__ = ["Nvcc", "check_library"]

# A kernel's parameters in what TVM generates.
_PARAMETERS = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(([^)]*)\)')
# The numbers that TVM's launcher passes, beside pointers and tensor maps; any other it refuses, at the first launch.
_PASSED = {"int", "int64_t", "uint", "uint32_t", "unsigned int", "float", "double"}


class Nvcc:
    """Calls nvcc in place of TVM's own callback, which wants it on the path and adds options of its own.

    Parameters
    ----------
    target
        What to compile for.
    nvcc
        The compiler; ``None`` where only the source is asked for.
    """

    def __init__(self, target: CudaTarget, nvcc: str | None) -> None:
        self._target, self._nvcc = target, nvcc
        self.source, self.log = "", ""
        self.options: tuple[str, ...] = ()

    def __call__(self, source: str) -> bytes:
        """Return machine code."""
        self.source = source
        _check_parameters(source)
        if self._nvcc is None:
            return b"/"  # TVM takes what begins so for text.
        with tempfile.TemporaryDirectory(prefix="na_compiler-nvcc-") as folder:
            text, code = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
            text.write_text(source, encoding="utf-8")
            command = [self._nvcc, "--cubin", "-O3", f"-arch={self._target.architecture}", "-std=c++17"]
            # 177 is an unused variable or function, of which generated code has many.
            command += ["--expt-relaxed-constexpr", "--ptxas-options=-v", "-diag-suppress=177", *self.options]
            result = subprocess.run(  # noqa: S603
                [*command, "-o", str(code), str(text)], capture_output=True, text=True, check=False
            )
            self.log = result.stdout + result.stderr
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{self.log}")
            return code.read_bytes()


def _check_parameters(source: str) -> None:
    """Check that each kernel can be launched; what TVM moves out of a kernel becomes a parameter of its type."""
    for name, parameters in _PARAMETERS.findall(source):
        for parameter in filter(None, (each.strip() for each in parameters.split(","))):
            kind = parameter.rpartition(" ")[0]
            if not (kind in _PASSED or "*" in parameter or "CUtensorMap" in parameter):
                raise RuntimeError(
                    f"{name} has a parameter that TVM cannot pass: {parameter}; a pointer, a tensor map, int32, int64, "
                    f"uint32, float32 or float64 would work"
                )


def check_library(path: Path) -> None:
    """Check that a library holds machine code of a GPU, and no source text.

    Raises
    ------
    RuntimeError
        If not: such a library would be compiled again where it is loaded, with what is there.
    """
    data = path.read_bytes()
    if b"__global__" in data:
        raise RuntimeError(
            f"{path} holds CUDA source text instead of machine code: TVM's part for CUDA, libtvm_runtime_cuda.so, "
            f"was not loaded where it was compiled; is apache-tvm a build without CUDA?"
        )
    if not _has_cubin(data):
        raise RuntimeError(f"{path} holds no machine code for a GPU")


def _has_cubin(data: bytes) -> bool:
    """Whether there is an ELF file for a GPU inside another one."""
    cuda_machine = 190  # EM_CUDA, in elf.h
    at = data.find(b"\x7fELF", 1)
    while at >= 0:
        if data[at + 18 : at + 20] == struct.pack("<H", cuda_machine):
            return True
        at = data.find(b"\x7fELF", at + 1)
    return False
