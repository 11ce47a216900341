"""`na_compiler.target`: names of machines."""

import subprocess
import sys

import pytest

from na_compiler.devices import cuda
from na_compiler.target import CpuTarget, CudaTarget, Target


@pytest.mark.parametrize("name", ["llvm:x86-64", "llvm:x86-64-v3", "llvm:aarch64", "cuda:sm_75", "cuda:sm_90a"])
def test_names_round_trip(name):
    target = Target.parse(name)
    assert str(target) == target.name == name
    assert Target.parse(target) is target
    assert target == Target.parse(name)
    assert hash(target) == hash(Target.parse(name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opencl", "llvm:x86-64-v3 or cuda:sm_90a; got 'opencl'"),
        ("llvm:i386", "one of llvm:x86-64, .* got 'llvm:i386'"),
        ("cuda:sm_70", "cuda:sm_70 is too old: CUDA 13 compiles for sm_75 and later, e.g. cuda:sm_75"),
        ("cuda:sm_91", "e.g. cuda:sm_90a; got 'cuda:sm_91'"),
        ("cuda:sm_80a", "got 'cuda:sm_80a'"),
        ("cuda:90", "got 'cuda:90'"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Target.parse(name)


def test_what_runs_where():
    runs = {
        ("llvm:x86-64-v2", "llvm:x86-64-v3"): True,
        ("llvm:x86-64-v3", "llvm:x86-64-v2"): False,
        ("llvm:aarch64", "llvm:x86-64"): False,
        ("llvm:x86-64", "cuda:sm_80"): False,
        ("cuda:sm_80", "llvm:x86-64"): False,
        ("cuda:sm_80", "cuda:sm_88"): False,
        # Later, but with less shared memory for a block.
        ("cuda:sm_80", "cuda:sm_86"): False,
        ("cuda:sm_80", "cuda:sm_89"): False,
        ("cuda:sm_86", "cuda:sm_89"): True,
        ("cuda:sm_86", "cuda:sm_80"): False,
        ("cuda:sm_80", "cuda:sm_90a"): False,
        ("cuda:sm_90", "cuda:sm_90a"): True,
        ("cuda:sm_90a", "cuda:sm_90"): True,  # The machine is the same: only the code differs.
        ("cuda:sm_100a", "cuda:sm_103"): False,
        ("cuda:sm_100", "cuda:sm_103"): True,
        # Tegra's and a desktop's code do not run on one another.
        ("cuda:sm_80", "cuda:sm_87"): False,
        ("cuda:sm_86", "cuda:sm_87"): False,
        ("cuda:sm_87", "cuda:sm_87"): True,
        ("cuda:sm_87", "cuda:sm_89"): False,
        ("cuda:sm_110", "cuda:sm_110"): True,
    }
    for (code, machine), expected in runs.items():
        assert Target.parse(code).runs_on(Target.parse(machine)) is expected, (code, machine)


def test_the_best_of_several():
    targets = [Target.parse(f"cuda:{name}") for name in ("sm_90", "sm_90a", "sm_80")]
    assert max(targets, key=lambda target: target.order).name == "cuda:sm_90a"
    targets = [Target.parse(f"llvm:{name}") for name in ("x86-64", "x86-64-v3", "x86-64-v2")]
    assert max(targets, key=lambda target: target.order).name == "llvm:x86-64-v3"


@pytest.mark.parametrize(
    ("capabilities", "name"), [([(9, 0)], "cuda:sm_90a"), ([(7, 5), (8, 6)], "cuda:sm_75"), ([(12, 0)], "cuda:sm_120")]
)
def test_cuda_is_the_gpu_present(monkeypatch, capabilities, name):
    monkeypatch.setattr(cuda, "cuda_capabilities", lambda: tuple(capabilities))
    monkeypatch.setattr(cuda, "_current", lambda: 0)
    target = Target.parse("cuda")
    assert target.name == name
    assert target.runs_here
    assert not Target.parse("cuda:sm_110").runs_here


def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "cuda_capabilities", tuple)
    with pytest.raises(ValueError, match="target cuda is the GPU present, and there is none; name one"):
        Target.parse("cuda")


def test_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(cuda, "cuda_capabilities", lambda: ((7, 0),))
    with pytest.raises(ValueError, match="cuda:sm_70 is too old"):
        Target.parse("cuda")


def test_the_driver_is_asked_without_torch_or_tvm():
    code = (
        "import sys; from na_compiler.devices import cuda; from na_compiler.target import Target;"
        "print(cuda.cuda_capabilities()); Target.parse('cuda:sm_80').runs_here;"
        "assert 'torch' not in sys.modules and 'tvm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_types():
    assert isinstance(Target.parse("llvm"), CpuTarget)
    assert isinstance(Target.parse("cuda:sm_80"), CudaTarget)
    assert Target.parse("llvm").runs_here
