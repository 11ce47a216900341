"""`na_compiler.devices`: what each takes, in Python and in C++, and that what has no kernels is refused by its name."""

from __future__ import annotations

import logging
import platform
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from processes import run_python

from na_compiler import na2d
from na_compiler.devices import CPU, CUDA, DEVICES, cpu, cuda
from na_compiler.devices.cpu import best_instruction_set
from na_compiler.ops import kernels
from na_compiler.runtime import native
from na_compiler.runtime.host import c_compiler, cxx_compiler
from na_compiler.target import CudaTarget, Target, target_of

# System V ABI, AMD64 architecture processor supplement, table 3.1, as Linux names the features.
V2 = {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}
V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
V4 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
FEATURES = [set(), V2, V2 | V3, V2 | V3 | V4, *((V2 | V3 | V4) - {feature} for feature in V2 | V3 | V4)]


def level(features):
    """What a CPU with some features is, by the standard."""
    for name, needs in (("-v4", V2 | V3 | V4), ("-v3", V2 | V3), ("-v2", V2)):
        if features >= needs:
            return f"x86-64{name}"
    return "x86-64"


def test_levels_of_x86_64_are_those_of_the_abi():
    for features in FEATURES:
        assert best_instruction_set("x86-64", features | {"something"}) == level(features), features
    assert best_instruction_set("aarch64", set()) == "aarch64"
    assert best_instruction_set("riscv64", V2) is None


MAIN = """
    #include <iostream>
    #include <sstream>
    #include "devices.h"
    int main() {
      for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string kind, target;
        words >> kind >> target;
        int capability = 0;
        std::set<std::string> features;
        if (kind == "cuda") words >> capability;
        for (std::string word; words >> word;) features.insert(word);
        std::cout << (kind == "cuda" ? na::cuda_order(target, capability)
                                     : na::cpu_order(target, kind == "here" ? na::cpu_features() : features)) << "\\n";
      }
    }
"""


@pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler")
def test_cpp_says_the_same(tmp_path):
    """Which of several targets is the best for a CPU with some features, and for a GPU."""
    cpus = [f"llvm:{name}" for name in ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64")]
    numbers = [*cuda._SHARED_MEMORY, 70, 130]
    gpus = [f"cuda:sm_{n}{suffix}" for n in cuda._SHARED_MEMORY for suffix in ("", *(["a"] if n >= 90 else []))]
    (tmp_path / "main.cc").write_text(textwrap.dedent(MAIN))
    source = Path(native.__file__).with_name("devices.cc")
    command = [*cxx_compiler(), "-std=c++17", *native.flags(), str(tmp_path / "main.cc"), str(source), "-ldl"]
    subprocess.run([*command, "-o", str(tmp_path / "main")], check=True)
    asked = [f"cpu {target} {' '.join(features)}" for features in FEATURES for target in cpus]
    asked += [f"cuda {target} {number}" for number in numbers for target in gpus]
    asked += [f"here {target}" for target in cpus]
    done = subprocess.run([tmp_path / "main"], input="\n".join(asked), capture_output=True, text=True, check=True)
    orders = dict(zip(asked, map(int, done.stdout.split()), strict=True))

    def same(targets, line, runs):
        """The same run, and in the same order."""
        found = {target: orders[line.format(target)] for target in targets}
        running = [target for target in targets if runs(Target.parse(target))]
        assert {target for target, order in found.items() if order >= 0} == set(running), line
        assert sorted(running, key=found.get) == sorted(running, key=lambda target: Target.parse(target).order)
        assert len({found[target] for target in running}) == len(running)

    if platform.machine() == "x86_64":
        for features in FEATURES:
            machine = Target.parse(f"llvm:{level(features)}")
            same(cpus, f"cpu {{}} {' '.join(features)}", lambda target, machine=machine: target.runs_on(machine))
    same(cpus, "here {}", lambda target: target.runs_here)
    for number in numbers:
        same(gpus, f"cuda {{}} {number}", lambda target, number=number: target._runs_on((number // 10, number % 10)))


def test_each_device_is_found_by_name_and_by_torchs():
    assert [device.kind for device in DEVICES] == ["llvm", "cuda"]
    assert target_of(torch.device("cpu")) == Target.parse("llvm") == CPU.target("")
    assert Target.parse("cuda:sm_80").device is CUDA
    assert (Target.parse("cuda:sm_80").device_type, Target.parse("llvm").device_type) == ("cuda", "cpu")


@pytest.mark.parametrize("name", ["xpu", "mps", "hpu", "privateuseone"])
def test_a_device_that_nobody_wrote(name):
    with pytest.raises(NotImplementedError, match=rf"for the CPU and for NVIDIA's GPUs \(cuda\), got .* {name}:0"):
        target_of(torch.device(name, 0))


def test_tensors_without_numbers():
    """torch's own: shapes only, nothing is computed."""
    query = torch.empty(1, 8, 8, 2, 16, device="meta")
    assert na2d(query, query, query, 3).shape == query.shape


def test_an_amd_gpu_is_no_nvidia_one(monkeypatch):
    """In a torch for AMD its GPUs are called cuda, and have capabilities: (9, 4), say, or (9, 0)."""
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "AMD Instinct MI210")
    monkeypatch.setattr(cuda, "_gpus_by_driver", tuple)
    told = r"cuda:0 is an AMD GPU \(AMD Instinct MI210\): na_compiler has kernels for the CPU and"
    assert kernels.target_of is target_of, "which is what the operators ask"
    with pytest.raises(NotImplementedError, match=told):
        target_of(torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"there is none of NVIDIA's \(torch has one of AMD's\)"):
        Target.parse("cuda")


@pytest.mark.parametrize(("capability", "name"), [((12, 3), "sm_121"), ((8, 4), "sm_80"), ((10, 9), "sm_103")])
def test_an_unknown_gpu_of_a_known_generation_gets_what_runs(capability, name, caplog):
    cuda._say_unknown.cache_clear()
    with caplog.at_level(logging.WARNING, logger="na_compiler"):
        targets = {CudaTarget.of_capability(capability) for _ in range(2)}
    (target,) = targets
    assert target.architecture == name
    assert target._runs_on(capability)
    (message,) = caplog.messages
    assert f"compute capability {capability[0]}.{capability[1]} is not known" in message
    assert f"kernels for {name}, which run on it" in message


def test_an_unknown_generation_is_refused():
    told = r"capability 13\.0 is not known to this version of na_compiler, which knows 7\.5 to 12\.1, and"
    with pytest.raises(ValueError, match=told):
        CudaTarget.of_capability((13, 0))
    # Of its generation there is Tegra's code only.
    with pytest.raises(ValueError, match=r"capability 11\.1 is not known"):
        CudaTarget.of_capability((11, 1))
    with pytest.raises(ValueError, match="cuda:sm_70 is too old"):
        CudaTarget.of_capability((7, 0))


def test_features_that_the_system_hides_are_not_there(monkeypatch):
    monkeypatch.setattr(cpu, "_features", lambda: (V2 | V3) - {"abm"})
    monkeypatch.setattr(cpu, "machine", lambda: "x86-64")
    cpu._host_instruction_set.cache_clear()
    try:
        assert Target.parse("llvm").name == "llvm:x86-64-v2"
        assert not Target.parse("llvm:x86-64-v3").runs_here
        assert not Target.parse("llvm:aarch64").runs_here
    finally:
        cpu._host_instruction_set.cache_clear()


TWO_RUNTIMES = """
    import ctypes, os, sys
    import na_compiler.devices.cuda as cuda
    # As a torch for CUDA 12 has loaded its own, for everybody.
    ctypes.CDLL(f"{sys.argv[1]}/libcudart.so.12", ctypes.RTLD_GLOBAL)
    cuda._load_cudart()
    print(ctypes.CDLL(f"{sys.argv[1]}/kernels.so").version())
    print(ctypes.CDLL(f"{sys.argv[1]}/others.so").version())
"""


def test_two_runtimes_of_cuda_in_one_process(tmp_path):
    """A torch for CUDA 12 has its own: each library calls the one that it was linked with, by name and version."""
    compiler = c_compiler()
    if compiler is None:
        pytest.skip("no C compiler")

    def build(name, code, *options):
        (tmp_path / f"{name}.c").write_text(code)
        command = [*compiler, "-shared", "-fPIC", "-o", tmp_path / name, tmp_path / f"{name}.c", *options]
        subprocess.run(command, check=True)

    for number, user in ((12, "others.so"), (13, "kernels.so")):
        runtime = f"libcudart.so.{number}"
        (tmp_path / f"{runtime}.map").write_text(f"{runtime} {{ global: cuda*; local: *; }};")
        build(
            runtime, f"int cudaRuntimeGetVersion(void) {{ return {number}; }}", f"-Wl,-soname,{runtime}",
            f"-Wl,--version-script={tmp_path / runtime}.map",
        )  # fmt: skip
        code = "int cudaRuntimeGetVersion(void); int version(void) { return cudaRuntimeGetVersion(); }"
        build(user, code, f"-L{tmp_path}", f"-l:{runtime}")
    assert run_python(TWO_RUNTIMES, str(tmp_path), LD_LIBRARY_PATH=tmp_path) == "13\n12\n"
