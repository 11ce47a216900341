"""The process in which TVM compiles for CUDA: reads specs from its standard input, answers on its standard output.

Started by `na_compiler.compiler.cuda`, with the stand-in for the driver's library on the loader's path.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from na_compiler.compiler import cuda
from na_compiler.compiler.spec import KernelSpec
from na_compiler.target import CudaTarget

# After this long with nothing to compile the process ends: it takes some hundred megabytes.
_IDLE_SECONDS = 120.0


class _Compiler:
    """Calls nvcc in place of TVM's own callback, which wants it on the path and adds options of its own."""

    def __init__(self, spec: KernelSpec, nvcc: str | None) -> None:
        self.spec, self.nvcc = spec, nvcc
        self.source, self.log = "", ""
        self.options: tuple[str, ...] = ()

    def __call__(self, source: str) -> bytes:
        """Return machine code."""
        self.source = source
        if self.nvcc is None:
            return b"/"  # Only the source was asked for; TVM takes what begins so for text.
        assert isinstance(self.spec.target, CudaTarget)
        with tempfile.TemporaryDirectory(prefix="na_compiler-nvcc-") as folder:
            text, code = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
            text.write_text(source, encoding="utf-8")
            command = [self.nvcc, "--cubin", "-O3", f"-arch={self.spec.target.architecture}", "-std=c++17"]
            # 177 is an unused variable or function, of which generated code has many.
            command += [
                "--expt-relaxed-constexpr",
                "--ptxas-options=-v",
                "-diag-suppress=177",
                *self.options,
            ]
            result = subprocess.run(  # noqa: S603
                [*command, "-o", str(code), str(text)], capture_output=True, text=True, check=False
            )
            self.log = result.stdout + result.stderr
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{self.log}")
            return code.read_bytes()


def _build(request: dict[str, Any]) -> cuda.Build:
    import tvm  # noqa: PLC0415

    from na_compiler.compiler.build import compile_lowered, lowered  # noqa: PLC0415

    spec = request["spec"]
    compiler = _Compiler(spec, request["nvcc"])
    tvm.register_global_func("tvm_callback_cuda_compile", compiler.__call__, override=True)
    target = tvm.target.Target(spec.target.to_tvm())
    with target:
        made = lowered(spec)
        compiler.options = made.nvcc
        module = compile_lowered(made, target)
    if request["path"] is not None:
        module.export_library(request["path"], cc=request["cc"])
    return cuda.Build(compiler.source, compiler.log)


def main() -> None:
    """Answer requests until there are none."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    # What libraries print goes to standard error: the pipe is for answers.
    os.dup2(2, 1)
    while select.select([requests], [], [], _IDLE_SECONDS)[0]:
        try:
            request = cuda.receive(requests)
        except EOFError:
            return
        try:
            answer: Any = _build(request)
        except Exception as error:  # noqa: BLE001  # Whatever it is, it is the other process' to report.
            answer = f"{type(error).__name__}: {error}"
        cuda.send(answers, answer)


if __name__ == "__main__":
    main()
    sys.exit(0)
