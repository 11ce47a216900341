"""`save_bundle` and `load_bundle`: kernels in a folder, for machines without a compiler."""

import json
import shutil

import numpy as np
import pytest
import torch
from oracle import check_forward, draw
from processes import WITHOUT_TORCH, run_python

import na_compiler
from na_compiler import KernelSpec, Problem, load_bundle, save_bundle
from na_compiler.runtime import bundle as bundle_module

PROBLEM = Problem((5, 6), 2, 8, 3)
OTHER = Problem(20, 2, 8, 5, additional_kv=True)
SPECS = [
    KernelSpec.make(PROBLEM), KernelSpec.make(PROBLEM, "llvm:x86-64"), KernelSpec.make(PROBLEM, direction="backward"),
    KernelSpec.make(OTHER), KernelSpec.make(PROBLEM, "llvm:aarch64"), KernelSpec.make(PROBLEM),
]  # fmt: skip


@pytest.fixture(autouse=True)
def none_loaded(monkeypatch):
    monkeypatch.setattr(bundle_module, "_loaded", [])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "kernels"
    save_bundle(folder, SPECS)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "moved")


def test_holds_what_was_put_in(folder, seed):
    bundle = load_bundle(folder)
    assert len(bundle) == 5, "a spec given twice is one kernel"
    assert {info.problem for info in bundle} == {PROBLEM, OTHER}
    example = draw(PROBLEM)
    kernel = bundle.find(PROBLEM)
    assert kernel.target == KernelSpec.make(PROBLEM).target.name, "the best for this machine"
    check_forward(example, *kernel(*example.inputs))
    assert bundle.find(PROBLEM, "backward").info.direction == "backward"
    assert bundle.find(OTHER, "backward") is None
    assert bundle.find(PROBLEM.replace(heads=4)) is None
    assert bundle.find(PROBLEM) is kernel


def test_the_functions_use_it_before_the_cache(folder, monkeypatch, seed):
    monkeypatch.setattr(na_compiler.torch_ops, "_kernels", {})
    bundle = load_bundle(folder)
    query = torch.randn(1, 5, 6, 2, 8)
    na_compiler.na2d(query, query, query, 3)
    assert [kernel.problem for kernel in bundle._kernels.values()] == [PROBLEM]


def test_works_without_torch_tvm_and_a_c_compiler(folder, tmp_path):
    """What a deployment has: NumPy, apache-tvm-ffi and TVM's runtime library."""
    code = """
import numpy as np
import na_compiler
bundle = na_compiler.load_bundle(sys.argv[1])
kernel = bundle.find(na_compiler.Problem((5, 6), 2, 8, 3))
query, key, value = (np.load(sys.argv[2])[name] for name in ("query", "key", "value"))
output, lse = kernel(query, key, value)
np.savez(sys.argv[3], output=output, lse=lse)
assert not {"torch", "tvm"} & set(sys.modules)
"""
    example = draw(PROBLEM, batch=2)
    query, key, value = (tensor.numpy() for tensor in example.inputs)
    np.savez(tmp_path / "inputs.npz", query=query, key=key, value=value)
    files = (str(tmp_path / "inputs.npz"), str(tmp_path / "outputs.npz"))
    run_python(WITHOUT_TORCH + code, str(folder), *files, NA_COMPILER_CACHE=tmp_path / "empty", PATH=tmp_path, CC=None)
    outputs = np.load(tmp_path / "outputs.npz")
    check_forward(example, torch.from_numpy(outputs["output"]), torch.from_numpy(outputs["lse"]))


def test_brings_the_launcher_for_torchs_threads(folder, tmp_path):
    """So that a machine without a C compiler runs kernels on torch's own threads as well."""
    code = """
        import sys, logging, torch
        logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
        import na_compiler
        na_compiler.load_bundle(sys.argv[1])
        query = torch.randn(1, 5, 6, 2, 8)
        na_compiler.na2d(query, query, query, 3)
        assert "tvm" not in sys.modules
    """
    assert run_python(code, str(folder), NA_COMPILER_CACHE=tmp_path, PATH=tmp_path, CC=None) == ""


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_a_library(folder):
    path = min(folder.glob("*.so"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    return path.name


def remove_a_library(folder):
    path = min(folder.glob("*.so"))
    path.unlink()
    return path.name


def half_a_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:100])
    return str(folder)


def another_version(folder):
    edit(folder, format=99)
    return "its format is 99, and this version of na_compiler reads"


def no_kernels(folder):
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    del data["kernels"]
    path.write_text(json.dumps(data))
    return "manifest.json was edited"


def another_manifest(folder):
    (folder / "manifest.json").write_text("[]")
    return str(folder)


@pytest.mark.parametrize(
    "damage", [damage_a_library, remove_a_library, half_a_manifest, another_version, no_kernels, another_manifest]
)
def test_damage_is_refused_by_name(folder, damage):
    named = damage(folder)
    with pytest.raises(ValueError, match="cannot be used") as caught:
        load_bundle(folder)
    assert str(folder) in str(caught.value)
    assert named in str(caught.value)
    assert bundle_module.loaded_bundles() == []


def test_a_manifest_cannot_name_files_elsewhere(folder, tmp_path):
    outside = tmp_path / "outside.so"
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    shutil.move(folder / data["kernels"][0]["library"], outside)
    data["kernels"][0]["library"] = f"../{outside.name}"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="cannot be used"):
        load_bundle(folder)


def test_no_bundle(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no bundle in .*: it has no manifest\.json"):
        load_bundle(tmp_path)


def test_replaces_a_bundle_and_nothing_else(folder, tmp_path):
    save_bundle(folder, SPECS[:1])
    assert len(load_bundle(folder)) == 1
    (tmp_path / "documents").mkdir()
    with pytest.raises(FileExistsError, match="is there and no bundle; name another folder, or remove it"):
        save_bundle(tmp_path / "documents", SPECS[:1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "moved"], "something temporary is left"
