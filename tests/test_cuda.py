"""`na_compiler.compiler.cuda`: libraries for GPUs that this machine does not have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from nvcc import needs_nvcc
from processes import run_python

import na_compiler
from na_compiler.compiler import cuda, toolkit
from na_compiler.compiler.nvcc import Nvcc, check_library
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.target import Target

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
    check_library(libraries[0])
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
    monkeypatch.setattr(toolkit, "_compilers", lambda: iter(()))
    with pytest.raises(RuntimeError, match="needs nvcc 13 or later, and it is not in CUDA_HOME, CUDA_PATH, on the"):
        toolkit.find_toolkit()


def test_source_text_is_refused(tmp_path):
    library = tmp_path / "kernel.so"
    library.write_bytes(b'\x7fELF extern "C" __global__ void main_kernel()')
    with pytest.raises(RuntimeError, match="holds CUDA source text instead of machine code"):
        check_library(library)
    library.write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(RuntimeError, match="holds no machine code for a GPU"):
        check_library(library)


@needs_nvcc
def test_what_nvcc_says_is_passed_on(tmp_path, monkeypatch):
    """Its errors, and those of a library that is not what it should be."""
    broken = compiler(tmp_path, "13.1.5", "echo 'nvcc fatal: no such thing' >&2\nexit 1")
    monkeypatch.setattr(toolkit, "_compilers", lambda: iter([broken]))
    with pytest.raises(RuntimeError, match="nvcc fatal: no such thing"):
        cuda.build_library(KernelSpec.make(PROBLEM, "cuda:sm_80"), tmp_path / "kernel.so")


def test_generates_without_nvcc():
    problem = Problem((128, 128), 2, 128, 31, dtype="bfloat16")
    source = cuda.generate(KernelSpec.make(problem, "cuda:sm_90a"))
    assert "__global__" in source
    assert "wgmma" in source, "long windows in half precision on sm_90a have the schedule for Hopper"
    elsewhere = cuda.generate(KernelSpec.make(problem, "cuda:sm_80"))
    assert "wgmma" not in elsewhere
    assert "mma_sync" in elsewhere, "from sm_80 on there is the one for single warps"


def test_nvcc_is_taken_from_cuda_home(monkeypatch, tmp_path):
    nvcc = compiler(tmp_path / "bin", "13.2.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolkit.find_toolkit() == toolkit.Toolkit(nvcc, "13.2.1")


@pytest.mark.parametrize(
    ("version", "told"), [("12.4.131", "is version 12.4.131"), (None, "is of no version that it tells")]
)
def test_another_nvcc_is_refused_and_a_later_one_is_looked_for(monkeypatch, tmp_path, version, told, caplog):
    old, new = compiler(tmp_path / "old" / "bin", version), compiler(tmp_path / "new", "14.0.1")
    monkeypatch.setattr(toolkit, "packaged", lambda path: iter(()))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match=rf"needs nvcc 13 or later, and {old} {told}; install .*-nvcc==13"):
        toolkit.find_toolkit()
    monkeypatch.setenv("PATH", f"{new.parent}:/bin:/usr/bin")
    caplog.clear()
    assert [toolkit.find_toolkit().nvcc for _ in range(2)] == [new, new]
    (message,) = caplog.messages
    assert "is version 14.0.1, which is later than this version of na_compiler knows" in message


def test_keys_change_with_nvcc(monkeypatch, tmp_path):
    """Without any, kernels are found that were compiled with the one that was there before."""
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "cache"))
    nvcc = compiler(tmp_path, "13.1.5")
    monkeypatch.setattr(toolkit, "_compilers", lambda: iter([nvcc] if nvcc.exists() else []))

    def keys():
        return tuple(KernelSpec.make(PROBLEM, target).key for target in ("cuda:sm_80", "llvm:x86-64-v3"))

    first = keys()
    (tmp_path / "cache").mkdir()
    toolkit.remember_version()
    compiler(tmp_path, "13.1.6")
    second = keys()
    assert second[0] != first[0]
    assert second[1] == first[1], "a CPU's kernels have nothing to do with it"
    nvcc.unlink()
    assert keys() == first
    # Anything else in the place of what was written down is nothing.
    remembered = tmp_path / "cache" / "nvcc-version"
    remembered.unlink()
    nothing = keys()
    os.mkfifo(remembered)
    assert keys() == nothing
    compiler(tmp_path, "13.1.6")
    toolkit.remember_version()
    assert remembered.read_text() == "13.1.6"


def compiler(folder, version, what=""):
    """Write something that says that it is nvcc, of a version."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvcc"
    said = f"Cuda compilation tools, release {version.rpartition('.')[0]}, V{version}" if version else "what?"
    text = f"#!/bin/sh\nif [ $1 = --version ]; then echo '{said}'; exit; fi\n{what}\n"
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="ascii")
    path.chmod(0o755)
    return path


@needs_nvcc
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_everything_of_a_row_is_in_registers(direction, tmp_path):
    build = cuda.build_library(KernelSpec.make(PROBLEM, "cuda:sm_80", direction), tmp_path / "kernel.so")
    frames = [line for line in build.log.splitlines() if "bytes stack frame" in line]
    assert frames
    for line in frames:
        assert line.strip() == "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", line


@pytest.mark.parametrize("parameter", ["uint64_t moved", "bool moved", "half moved"])
def test_kernels_take_what_the_launcher_passes(parameter: str) -> None:
    """What TVM moves out of a kernel is refused where it compiles, not at the first launch on a GPU."""
    text = 'extern "C" __global__ void __launch_bounds__(32) main_kernel(half* __restrict__ key, int64_t n{}) {{}}'
    source = text.format(", const __grid_constant__ CUtensorMap map, float scale")
    assert Nvcc(Target.parse("cuda:sm_80"), None)(source) == b"/"
    with pytest.raises(RuntimeError, match=f"{parameter}; .*int32.* would work"):
        Nvcc(Target.parse("cuda:sm_80"), None)(text.format(", " + parameter))
