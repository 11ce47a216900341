"""Bundles where nothing else is: another Python, another architecture, another GPU. Whole models, and programs without
Python, are in tests/test_models.py and tests/test_onnx_deploy.py."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from nvcc import needs_nvcc
from oracle import check_forward, draw
from processes import run_bare

import na_compiler
from na_compiler import KernelSpec, Problem, load_bundle, save_bundle
from na_compiler.compiler import bundle as save_module
from na_compiler.runtime import bundle as bundle_module
from na_compiler.runtime import folders, threads
from na_compiler.runtime.manifest import digest_of

PROBLEM = Problem((5, 6), 2, 8, 3)
# What a machine has that only runs kernels.
NEEDED = ("numpy", "tvm_ffi", "typing_extensions", "platformdirs")
RUN = """
import os, sys
import numpy as np
import na_compiler
bundle = na_compiler.load_bundle(os.path.relpath(sys.argv[1]))
os.chdir("/")  # Kernels are loaded later, from another current folder.
kernel = bundle.find(na_compiler.Problem((5, 6), 2, 8, 3))
output, lse = kernel(*(np.load(sys.argv[2])[name] for name in ("query", "key", "value")))
np.savez(sys.argv[3], output=output, lse=lse)
assert not {"torch", "tvm"} & set(sys.modules)
mapped = [line.split()[-1] for line in open("/proc/self/maps") if "libtvm_runtime" in line]
assert mapped and all(path.startswith(os.path.realpath(sys.argv[1])) for path in mapped), mapped
"""


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch):
    monkeypatch.setattr(bundle_module, "_loaded", [])
    monkeypatch.setattr(threads, "_given_launcher", [])
    monkeypatch.setattr(folders, "_given_runtime", [])


@pytest.fixture
def python(tmp_path):
    """A Python with this package, apache-tvm-ffi, NumPy and what these need, and nothing else of TVM's or torch's."""
    folder = tmp_path / "python"
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in NEEDED:
        found = Path(sys.modules[name].__file__ if name in sys.modules else __import__(name).__file__)
        (packages / (found.parent.name if found.name == "__init__.py" else found.name)).symlink_to(
            found.parent if found.name == "__init__.py" else found
        )
    package = Path(na_compiler.__file__).parent
    shutil.copytree(package, packages / "na_compiler", ignore=shutil.ignore_patterns("__pycache__", "schedules"))
    (packages / "na_compiler" / "schedules").symlink_to(Path(na_compiler.schedules.__file__).parent)
    made = folder / "bin" / "python"
    for name in ("tvm", "torch", "filelock", "rich"):
        done = subprocess.run([made, "-c", f"import {name}"], capture_output=True, check=False, cwd=folder)
        assert b"ModuleNotFoundError" in done.stderr, name
    return made


def test_a_bundle_with_its_runtime_and_nothing_else(python, tmp_path, seed):
    folder = tmp_path / "kernels"
    save_bundle(folder, [KernelSpec.make(PROBLEM)], with_runtime=True)
    example = draw(PROBLEM, batch=2)
    np.savez(tmp_path / "in.npz", **dict(zip(("query", "key", "value"), map(np.asarray, example.inputs), strict=True)))
    (tmp_path / "out").mkdir()
    command = [python, "-B", "-c", RUN, folder, tmp_path / "in.npz", tmp_path / "out" / "out.npz"]
    run_bare(command, tmp_path, folder, tmp_path / "in.npz")
    outputs = np.load(tmp_path / "out" / "out.npz")
    check_forward(example, torch.from_numpy(outputs["output"]), torch.from_numpy(outputs["lse"]))


@needs_nvcc
def test_a_bundle_for_cuda_brings_what_launches_its_kernels(tmp_path):
    save_bundle(tmp_path / "kernels", [KernelSpec.make(PROBLEM, "cuda:sm_80")], with_runtime=True)
    names = {path.name for path in (tmp_path / "kernels").iterdir()}
    assert {"libtvm_runtime.so", "libtvm_runtime_cuda.so"} <= names
    kinds = [data["kind"] for data in json.loads((tmp_path / "kernels" / "manifest.json").read_text())["files"]]
    assert kinds == ["launcher", "runtime", "runtime-cuda"]


def test_advice_for_another_gpu_is_that_gpu(tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    save_bundle(folder, [KernelSpec.make(PROBLEM)])
    rewrite(folder, lambda manifest: manifest["kernels"][0].update(target="cuda:sm_90a"))
    here = KernelSpec.make(PROBLEM).target.name
    monkeypatch.setattr(bundle_module, "cuda_capabilities", lambda: ((8, 0),))
    with pytest.raises(ValueError, match=f"is {here} with cuda:sm_80; make it again with --target cuda:sm_80"):
        load_bundle(folder)
    monkeypatch.setattr(bundle_module, "cuda_capabilities", lambda: ())
    with pytest.raises(ValueError, match=f"for cuda:sm_90a only, and this machine is {here}; .* --target {here}"):
        load_bundle(folder)


def rewrite(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))


class TestAnotherArchitecture:
    """A compiler for aarch64 that is none: what it makes says that it is for aarch64, and runs nowhere."""

    @pytest.fixture
    def cross(self, tmp_path, monkeypatch):
        folder = tmp_path / "cross"
        folder.mkdir()
        compiler = folder / "aarch64-linux-gnu-gcc"
        compiler.write_text(
            f"#!{sys.executable}\nimport shutil, sys\n"
            "made = sys.argv[sys.argv.index('-o') + 1]\n"
            "header = bytearray(b'\\x7fELF' + bytes(60))\n"
            "header[16], header[18] = 3, 183\n"
            "open(made, 'wb').write(header)\n"
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "cache"))

    def test_brings_a_launcher_for_each(self, cross, tmp_path):
        folder = tmp_path / "kernels"
        save_bundle(folder, [KernelSpec.make(PROBLEM), KernelSpec.make(PROBLEM, "llvm:aarch64")])
        files = json.loads((folder / "manifest.json").read_text())["files"]
        assert [(data["kind"], data["machine"]) for data in files] == [("launcher", "aarch64"), ("launcher", "x86-64")]
        for data in files:
            assert (folder / data["library"]).read_bytes()[18] == {"aarch64": 183, "x86-64": 62}[data["machine"]]
        bundle = load_bundle(folder)
        assert bundle.file("launcher").name.startswith("x86-64-launcher")
        assert bundle.find(PROBLEM).target != "llvm:aarch64"

    def test_brings_no_launcher_that_cannot_run_there(self, cross, tmp_path):
        folder = tmp_path / "kernels"
        save_bundle(folder, [KernelSpec.make(PROBLEM, "llvm:aarch64")])
        assert not list(folder.glob("x86*"))
        with pytest.raises(ValueError, match=r"has kernels for llvm:aarch64 only, and this machine is llvm:.*--target"):
            load_bundle(folder)

    def test_brings_no_runtime_that_cannot_run_there(self, cross, tmp_path):
        with pytest.raises(RuntimeError, match=r"is for x86-64, .* kernels for llvm:aarch64; name the"):
            save_bundle(tmp_path / "kernels", [KernelSpec.make(PROBLEM, "llvm:aarch64")], with_runtime=True)
        assert not (tmp_path / "kernels").exists()


def test_a_launcher_that_cannot_be_loaded_is_named(tmp_path, caplog, monkeypatch):
    """As one of a newer C library: the one that is compiled here is taken."""
    other = tmp_path / "launcher-other.so"
    other.write_bytes(b"\x7fELF, of a newer system")
    monkeypatch.setattr(threads, "_given_launcher", [other])
    threads._launcher.cache_clear()
    try:
        assert threads._launcher() is not None
    finally:
        threads._launcher.cache_clear()
    assert f"the launcher in {other} cannot be loaded here: " in caplog.text


def test_loading_a_bundle_again_takes_its_place(tmp_path):
    save_bundle(tmp_path / "one", [KernelSpec.make(PROBLEM)])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for _ in range(3):
        first, second = load_bundle(tmp_path / "one"), load_bundle(tmp_path / "two")
    assert bundle_module.loaded_bundles() == [second, first]
    assert len(threads._given_launcher) == 2


def test_what_a_reader_would_refuse_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(save_module, "_versions", dict)
    with pytest.raises(ValueError, match=r"versions\.na_compiler is missing"):
        save_bundle(tmp_path / "kernels", [KernelSpec.make(PROBLEM)])
    assert not (tmp_path / "kernels").exists()
