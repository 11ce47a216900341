"""Kernels for several of NVIDIA's architectures in one bundle: which a GPU gets, and what each is compiled to."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from draws import some
from nvcc import needs_nvcc

from na_compiler import KernelSpec, Problem, cli, save_bundle
from na_compiler.compiler import cuda as cuda_compiler
from na_compiler.devices import cuda
from na_compiler.passes.sites import Site, Sites
from na_compiler.runtime import bundle as bundle_module
from na_compiler.runtime.bundle import load_bundle, read_bundle
from na_compiler.runtime.manifest import digest_of
from na_compiler.target import CudaTarget, Target

PROBLEM = Problem((9, 8), 2, 16, 3, dtype="float16")
ALL = tuple(target.name for target in Target.several("cuda:all"))
# Compute capabilities of GPUs that are no Tegra, and the best of ``cuda:all`` for each.
BEST = {
    (7, 5): "cuda:sm_75", (8, 0): "cuda:sm_80", (8, 6): "cuda:sm_86", (8, 9): "cuda:sm_89", (9, 0): "cuda:sm_90a",
    (10, 0): "cuda:sm_100", (10, 3): "cuda:sm_100", (12, 0): "cuda:sm_120", (12, 1): "cuda:sm_120",
}  # fmt: skip


def test_all_is_one_for_each_gpu():
    known = {(number // 10, number % 10) for number in cuda._SHARED_MEMORY if number not in cuda._TEGRA}
    assert known == set(BEST)
    assert set(BEST.values()) == set(ALL)
    sites = Sites([Site("", "here", "na_compiler", "forward", PROBLEM, (), 1)])
    specs = sites.specs(["llvm", "cuda:all", "cuda:sm_90a"])
    assert [spec.target.name for spec in specs] == [Target.parse("llvm").name, *ALL]
    assert [target.name for target in Target.several("cuda:sm_86")] == ["cuda:sm_86"]
    with pytest.raises(ValueError, match="target cuda:all is several, and one is wanted here: one of cuda:sm_75, "):
        KernelSpec.make(PROBLEM, "cuda:all")
    with pytest.raises(ValueError, match="llvm:all"):
        Target.several("llvm:all")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundle for all: what is in the libraries plays no part, so each is a copy of the CPU's."""
    folder = tmp_path_factory.mktemp("bundles") / "kernels"
    save_bundle(folder, [KernelSpec.make(PROBLEM)])
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    (kernel,) = manifest["kernels"]
    kernels = []
    for number, target in enumerate(ALL):
        library = f"{number}.so"
        shutil.copyfile(folder / kernel["library"], folder / library)
        kernels.append(kernel | {"key": str(number), "library": library, "target": target})
    manifest["kernels"] = kernels
    path.write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))
    return folder


def without(folder, tmp_path, *targets):
    """A copy of a bundle without its kernels for some targets."""
    copied = shutil.copytree(folder, tmp_path / "some")
    path = copied / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["kernels"] = [kernel for kernel in manifest["kernels"] if kernel["target"] not in targets]
    path.write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))
    return copied


@pytest.fixture
def gpu(monkeypatch):
    """Say which GPU there is; kernels are not loaded, but told apart."""
    monkeypatch.setattr(bundle_module, "_loaded", [])
    monkeypatch.setattr(bundle_module, "load_function", lambda library, kind: lambda *_: (library.name, kind))

    def has(*capabilities):
        gpus = tuple((f"GPU {major}.{minor}", (major, minor)) for major, minor in capabilities)
        monkeypatch.setattr(cuda, "_gpus", lambda: gpus)
        monkeypatch.setattr(bundle_module, "cuda_capabilities", lambda: tuple(capabilities))

    return has


@pytest.mark.parametrize("capability", BEST)
def test_every_gpu_gets_the_best_that_runs_on_it(capability, made, gpu):
    gpu(capability)
    bundle = load_bundle(made)
    machine = CudaTarget.of_capability(capability)
    kernel = bundle.find(PROBLEM, "forward", machine)
    assert kernel.info.target == BEST[capability]
    assert kernel.function() == (f"{ALL.index(BEST[capability])}.so", "cuda")
    assert Target.parse(kernel.info.target).shared_memory <= machine.shared_memory
    assert bundle.find(PROBLEM, "forward", "llvm") is None


def test_a_machine_with_two_gpus_gets_a_kernel_for_each(made, gpu):
    gpu((8, 6), (9, 0))
    bundle = load_bundle(made)
    found = [bundle.find(PROBLEM, "forward", CudaTarget.of_capability(one)).info.target for one in ((8, 6), (9, 0))]
    assert found == ["cuda:sm_86", "cuda:sm_90a"]


@pytest.mark.parametrize(
    ("capability", "left_out"),
    [
        ((8, 6), ("cuda:sm_86",)),  # sm_80 may take more shared memory, sm_89 is later.
        ((8, 9), ("cuda:sm_89", "cuda:sm_86")),
        ((9, 0), ("cuda:sm_90a",)),
        ((12, 1), ("cuda:sm_120",)),
        ((7, 5), ("cuda:sm_75",)),
        ((8, 7), ()),  # Tegra.
    ],
)
def test_a_gpu_that_none_runs_on_is_told_so(capability, left_out, made, gpu, tmp_path):
    folder = without(made, tmp_path, *left_out)
    gpu(capability)
    wanted = CudaTarget.of_capability(capability).name
    with pytest.raises(
        ValueError, match=rf"has kernels for .*cuda:sm_80.* only, .*make it again with --target {wanted}"
    ):
        load_bundle(folder)
    # Beside another GPU, for which there is one, it is not taken for this one.
    gpu(capability, (10, 0))
    assert load_bundle(folder).find(PROBLEM, "forward", CudaTarget.of_capability(capability)) is None


def test_the_next_best_where_the_best_is_not_there(made, gpu, tmp_path):
    gpu((8, 9))
    bundle = load_bundle(without(made, tmp_path, "cuda:sm_89"))
    assert bundle.find(PROBLEM, "forward", "cuda:sm_89").info.target == "cuda:sm_86"


def test_the_command_line_says_what_it_would_compile(capsys):
    problem = ["--layout", "9x8", "--heads", "2", "--head-dim", "16", "--kernel-size", "3", "--dtype", "float16"]
    assert cli.main(["problem", *problem, "--target", "cuda:all", "--dry-run", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert [kernel["target"] for kernel in kernels] == list(ALL)


@needs_nvcc
@pytest.mark.full
def test_one_bundle_for_all_for_real(tmp_path):
    problem = ["--layout", "9x8", "--heads", "2", "--head-dim", "16", "--kernel-size", "3", "--dtype", "float16"]
    folder = tmp_path / "kernels"
    assert cli.main(["problem", *problem, "--target", "llvm", "--target", "cuda:all", "-o", str(folder)]) == 0
    assert [entry.info.target for entry in read_bundle(folder).entries] == [Target.parse("llvm").name, *ALL]


_PROBLEMS = (
    Problem((56, 56), 4, 32, 7, dtype="float16"),
    Problem((64, 64), 8, 64, 13, dtype="bfloat16"),
    Problem((8, 32, 48), 8, 64, (3, 7, 7), dtype="bfloat16"),
    Problem(4096, 4, 128, 255, additional_kv=True, dtype="float16"),
    Problem(4096, 8, 64, 255),
    Problem((28, 28), 4, 32, 7, 2, 2, (True, False), 2, border=("cut", "shift")),
)
_KERNELS = [(p, d, t) for p in _PROBLEMS for d in ("forward", "backward") for t in ALL]
# Registers of a multiprocessor, and of a thread: CUDA C++ Programming Guide, the same for all of these.
_REGISTERS, _OF_A_THREAD = 65536, 255
# What ptxas says of a kernel: its name, bytes spilled, registers, and what else it uses.
_SAID = (
    r"entry function '(\w+)' for .*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
)
# Bytes that a thread of a kernel for CUDA cores may spill: see `_STAGED` in schedules/simt/planner.py.
_SPILLS = {"simt": 8}


@needs_nvcc
@pytest.mark.parametrize(("problem", "direction", "target"), some(_KERNELS, 2, "architectures"))
def test_what_is_compiled_keeps_to_the_architectures_limits(problem, direction, target, tmp_path):
    """By what ptxas says: registers for one block at least, no spills but where they are known, shared memory."""
    spec = KernelSpec.make(problem, target, direction)
    built = cuda_compiler.build_library(spec, tmp_path / "kernel.so")
    bounds = re.findall(r"__launch_bounds__\((\d+)[^)]*\)\s+(\w+)", built.source)
    threads = {name: int(bound) for bound, name in bounds}
    said = re.findall(_SAID, built.log, re.DOTALL)
    assert {name for name, *_ in said} == set(threads) != set()
    most, static = _SPILLS.get(spec.config.family, 0), 0
    for name, stores, loads, registers, rest in said:
        assert int(registers) <= _OF_A_THREAD
        assert int(registers) * threads[name] <= _REGISTERS, name
        assert int(stores) <= most >= int(loads), f"{name} spills {stores} and {loads} bytes"
        static = max([static, *map(int, re.findall(r"(\d+) bytes smem", rest))])
    dynamic = getattr(spec.plan, "shared_bytes", 0)
    assert static + dynamic <= spec.target.shared_memory
