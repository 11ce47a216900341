"""`na_compiler.compiler.cuda`: libraries for GPUs that this machine does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nvcc import needs_nvcc
from processes import run_python

import na_compiler
from na_compiler.compiler import cuda
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem

PROBLEM = Problem((9, 10), 2, 32, (3, 5), heads_kv=1, additional_kv=True, dtype="bfloat16")


@needs_nvcc
@pytest.mark.parametrize(("target", "direction"), [("cuda:sm_80", "forward"), ("cuda:sm_75", "backward")])
def test_builds_machine_code_and_refuses_to_call_it_here(target, direction, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/gpu/check.py calls kernels")
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path))
    kernel = na_compiler.compile(PROBLEM, target, direction)
    libraries = list((tmp_path / "kernels").glob("*/kernel.so"))
    assert len(libraries) == 1
    cuda.check_library(libraries[0])
    tensors = torch.zeros(3, 1, 9, 10, 2, 32)
    with pytest.raises(RuntimeError, match=f"compiled for {target}, which this machine cannot run"):
        kernel(*tensors, *tensors)


COMPILE_AGAIN = """
import sys
import na_compiler
from na_compiler import Problem
kernel = na_compiler.compile(eval(sys.argv[1]), "cuda:sm_80")
assert "tvm" not in sys.modules
assert not any("libcuda.so" in line for line in open("/proc/self/maps"))
print(kernel.target)
"""


@needs_nvcc
def test_another_process_finds_it_without_tvm_nvcc_or_a_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path))
    problem = PROBLEM.replace(kernel_size=3)  # Not in this process' memory yet.
    na_compiler.compile(problem, "cuda:sm_80")
    # The stand-in for the driver's library stays in the process that compiled.
    assert "libcuda.so" not in Path("/proc/self/maps").read_text(encoding="ascii")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert run_python(COMPILE_AGAIN, repr(problem)).strip() == "cuda:sm_80"


def test_without_nvcc_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(cuda, "_compilers", lambda: iter(()))
    with pytest.raises(RuntimeError, match=r"needs nvcc, and it is not in CUDA_HOME, on the path or in a package"):
        cuda.find_toolkit()


def test_source_text_is_refused(tmp_path):
    library = tmp_path / "kernel.so"
    library.write_bytes(b'\x7fELF extern "C" __global__ void main_kernel()')
    with pytest.raises(RuntimeError, match="holds CUDA source text instead of machine code"):
        cuda.check_library(library)
    library.write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(RuntimeError, match="holds no machine code for a GPU"):
        cuda.check_library(library)


@needs_nvcc
def test_what_nvcc_says_is_passed_on(tmp_path, monkeypatch):
    """Its errors, and those of a library that is not what it should be."""
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho 'nvcc fatal: no such thing' >&2\nexit 1\n", encoding="ascii")
    broken.chmod(0o755)
    monkeypatch.setattr(cuda, "find_toolkit", lambda: cuda.Toolkit(broken, None))
    with pytest.raises(RuntimeError, match="nvcc fatal: no such thing"):
        cuda.build_library(KernelSpec.make(PROBLEM, "cuda:sm_80"), tmp_path / "kernel.so")


def test_generates_without_nvcc():
    source = cuda.generate(KernelSpec.make(PROBLEM, "cuda:sm_90a"))
    assert "__global__" in source
    assert "wgmma" in source, "half precision on sm_90a has the schedule for Hopper"
    assert "wgmma" not in cuda.generate(KernelSpec.make(PROBLEM, "cuda:sm_80"))


def test_nvcc_is_taken_from_cuda_home(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda.find_toolkit().nvcc == nvcc


@needs_nvcc
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_everything_of_a_row_is_in_registers(direction, tmp_path):
    build = cuda.build_library(KernelSpec.make(PROBLEM, "cuda:sm_80", direction), tmp_path / "kernel.so")
    frames = [line for line in build.log.splitlines() if "bytes stack frame" in line]
    assert frames
    for line in frames:
        assert line.strip() == "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", line
