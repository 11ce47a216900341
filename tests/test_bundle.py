"""`save_bundle` and `load_bundle`: kernels in a folder, for machines without a compiler."""

import contextvars
import json
import queue
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from oracle import check_forward, draw
from processes import WITHOUT_TORCH, run_python, start_python

import na_compiler
from na_compiler import KernelSpec, Problem, cli, load_bundle, save_bundle
from na_compiler.runtime import bundle as bundle_module
from na_compiler.runtime import manifest as manifest_module
from na_compiler.runtime.folders import runtime_library
from na_compiler.runtime.jit import is_compiling_allowed

PROBLEM = Problem((5, 6), 2, 8, 3)
OTHER = Problem(20, 2, 8, 5, additional_kv=True)
SPECS = [
    KernelSpec.make(PROBLEM), KernelSpec.make(PROBLEM, "llvm:x86-64"), KernelSpec.make(PROBLEM, direction="backward"),
    KernelSpec.make(OTHER), KernelSpec.make(PROBLEM),
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
    assert len(bundle) == 4, "a spec given twice is one kernel"
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
    monkeypatch.setattr(na_compiler.ops.kernels, "_kernels", {})
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
    return "manifest.json: kernels is missing"


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


def test_what_cannot_be_linked_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin") if not shutil.which("aarch64-linux-gnu-gcc") else pytest.skip(
        "this machine links for aarch64"
    )
    with pytest.raises(
        RuntimeError, match=r"llvm:aarch64 are compiled here but cannot be linked.*aarch64-linux-gnu-gcc"
    ):
        save_bundle(tmp_path / "kernels", [KernelSpec.make(PROBLEM, "llvm:aarch64")])
    assert list(tmp_path.iterdir()) == []


def test_another_machines_bundle_is_refused(folder):
    rewrite(folder, lambda manifest: [kernel.update(target="llvm:aarch64") for kernel in manifest["kernels"]])
    with pytest.raises(ValueError, match=r"has kernels for llvm:aarch64 only, and this machine is llvm:.*--target"):
        load_bundle(folder)
    assert bundle_module.loaded_bundles() == []


@pytest.mark.parametrize("name", ["apache-tvm", "apache-tvm-ffi", "abi"])
def test_another_versions_bundle_is_refused(folder, name):
    rewrite(folder, lambda manifest: manifest["versions"].update({name: "7.3"}))
    with pytest.raises(ValueError, match=r"(made with apache-tvm.* 7\.3|ABI 7\.3).*make it again with na-compile"):
        load_bundle(folder)


def test_an_edited_problem_is_noticed(folder):
    """The library would be called with tensors that fit it, and compute with another window."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    data["kernels"][0]["problem"]["kernel_size"] = [5, 5]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"manifest.json was edited"):
        load_bundle(folder)


def test_a_library_that_changes_after_loading_is_not_opened(folder):
    bundle = load_bundle(folder)
    for path in folder.glob("*.so"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=r"has changed: .*\.so is not the file that was put in"):
        bundle.find(PROBLEM)


def test_named_by_the_environment(folder, monkeypatch, seed):
    bundle_module._named_bundles.cache_clear()
    monkeypatch.setenv("NA_COMPILER_BUNDLE", f"{folder}")
    (bundle,) = bundle_module.loaded_bundles()
    assert bundle.folder == folder
    assert bundle_module.loaded_bundles() == [bundle]
    monkeypatch.setenv("NA_COMPILER_BUNDLE", f"{folder}-gone")
    with pytest.raises(FileNotFoundError, match=r"NA_COMPILER_BUNDLE=.*-gone: no bundle in"):
        bundle_module.loaded_bundles()


def test_with_compiling_switched_off(folder, tmp_path, seed):
    """Kernels of a bundle run, one that is missing is an error with the command that adds it, and tvm stays out."""
    code = """
        import sys, torch, na_compiler
        assert "tvm" not in sys.modules
        query = torch.randn(1, 5, 6, 2, 8)
        na_compiler.na2d(query, query, query, 3)
        try:
            na_compiler.na2d(query, query, query, 5, dilation=1, is_causal=(True, False))
        except na_compiler.MissingKernelError as error:
            print(error)
        assert not [name for name in sys.modules if name.partition(".")[0] == "tvm"]
    """
    said = run_python(code, NA_COMPILER_BUNDLE=folder, NA_COMPILER_JIT="0", NA_COMPILER_CACHE=tmp_path / "empty")
    name = KernelSpec.make(PROBLEM).target.name
    assert said.strip().endswith(
        "na-compile problem --layout 5x6 --heads 2 --head-dim 8 --kernel-size 5x5 --causal 1x0 "
        f"--target {name} -o BUNDLE"
    )
    command = said.strip().rpartition("with:  ")[2].split()
    assert cli.main([*command[1:-1], str(tmp_path / "added")]) == 0
    assert [info.problem for info in load_bundle(tmp_path / "added")] == [
        PROBLEM.replace(kernel_size=5, is_causal=(True, False))
    ]


def test_compiling_is_switched_off_in_a_block(monkeypatch, tmp_path):
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path))
    problem = Problem(24, 3, 8, 7)
    with na_compiler.compiling(False), pytest.raises(na_compiler.MissingKernelError, match="--layout 24"):
        na_compiler.compile(problem)
    monkeypatch.setenv("NA_COMPILER_JIT", "0")
    with pytest.raises(na_compiler.MissingKernelError):
        na_compiler.compile(problem)
    with na_compiler.compiling(True):
        na_compiler.compile(problem)
    monkeypatch.setenv("NA_COMPILER_JIT", "perhaps")
    with pytest.raises(ValueError, match="NA_COMPILER_JIT must be 0 or 1, got 'perhaps'"):
        na_compiler.compile(Problem(25, 3, 8, 7))


def test_compiling_is_switched_off_in_all_threads(monkeypatch, tmp_path):
    """Those that the block did not start: autograd's run backwards, and were there before."""
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path))
    asked, answers = queue.Queue(), queue.Queue()

    def answer():
        for allowed in iter(asked.get, "end"):
            if allowed is None:
                answers.put(is_compiling_allowed())
            else:
                with na_compiler.compiling(allowed):
                    answers.put(is_compiling_allowed())

    def elsewhere(allowed=None):
        asked.put(allowed)
        return answers.get(timeout=60)

    other = threading.Thread(target=answer)
    other.start()
    try:
        assert elsewhere()
        with na_compiler.compiling(False):
            assert not elsewhere()
            assert elsewhere(True)  # Its own block.
            with na_compiler.compiling(True):
                assert is_compiling_allowed()
                assert not elsewhere()  # One of the two forbids it.
            assert not is_compiling_allowed()
            context = contextvars.copy_context()
        assert elsewhere()
        assert context.run(is_compiling_allowed)  # A task that outlives the block.
        with na_compiler.compiling(True):
            monkeypatch.setenv("NA_COMPILER_JIT", "0")
            assert elsewhere()
        assert not elsewhere()
    finally:
        asked.put("end")
        other.join()


def test_a_forked_child_is_in_no_block_of_a_thread_that_it_has_not():
    code = """
        import os, threading, na_compiler
        from na_compiler.runtime.jit import is_compiling_allowed

        inside, leave = threading.Event(), threading.Event()
        def forbid():
            with na_compiler.compiling(False):
                inside.set()
                leave.wait()
        other = threading.Thread(target=forbid)
        other.start()
        inside.wait()
        assert not is_compiling_allowed()
        if os.fork() == 0:
            os._exit(0 if is_compiling_allowed() else 3)
        print(os.waitstatus_to_exitcode(os.wait()[1]))
        with na_compiler.compiling(False):
            if os.fork() == 0:
                os._exit(3 if is_compiling_allowed() else 0)
            print(os.waitstatus_to_exitcode(os.wait()[1]))
        leave.set()
        other.join()
        assert is_compiling_allowed()
    """
    assert run_python(code, NA_COMPILER_JIT=None).split() == ["0", "0"]


def test_brings_tvms_runtime(tmp_path, seed):
    """A machine has apache-tvm-ffi and nothing else of TVM."""
    folder = tmp_path / "kernels"
    save_bundle(folder, [KernelSpec.make(PROBLEM)], with_runtime=True)
    assert (folder / "libtvm_runtime.so").is_file()
    code = """
        import sys, importlib.util
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "tvm" else found(name, *rest)
        import numpy as np, na_compiler
        kernel = na_compiler.load_bundle(sys.argv[1]).find(na_compiler.Problem((5, 6), 2, 8, 3))
        query = np.ones((1, 5, 6, 2, 8), "float32")
        output, _ = kernel(query, query, query)
        assert abs(output - 1).max() < 1e-6
        assert [line for line in open("/proc/self/maps") if sys.argv[1] in line and "libtvm_runtime" in line]
    """
    run_python(code, str(folder), NA_COMPILER_TVM_LIB=None)


def test_runtime_in_a_list_of_folders(tmp_path, monkeypatch):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    monkeypatch.setenv("NA_COMPILER_TVM_LIB", f"{tmp_path}/first:{tmp_path}/second")
    with pytest.raises(FileNotFoundError, match=f"no libtvm_runtime.so in {tmp_path}/first or {tmp_path}/second"):
        runtime_library()
    (tmp_path / "second" / "libtvm_runtime.so").touch()
    assert runtime_library() == tmp_path / "second" / "libtvm_runtime.so"


def rewrite(folder, change):
    """Change a manifest as who made it could."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    data["digest"] = manifest_module.digest_of(data)
    path.write_text(json.dumps(data))


KILLED = """
    import os, signal, sys
    from na_compiler import KernelSpec, Problem, save_bundle
    from na_compiler.compiler import bundle

    def killing(function, before):
        def call(*arguments):
            if before:
                os.kill(os.getpid(), signal.SIGKILL)
            function(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return call

    if sys.argv[2] == "no exchange":
        bundle._exchange = lambda *_: False
        bundle.Path.replace = killing(bundle.Path.replace, False)
    else:
        bundle._exchange = killing(bundle._exchange, sys.argv[2] == "before")
    problems = [Problem((5, 6), 2, 8, 3), Problem(20, 2, 8, 5, additional_kv=True)]
    save_bundle(sys.argv[1], map(KernelSpec.make, problems))
"""


@pytest.mark.parametrize("when", ["before", "after", "no exchange"])
def test_a_process_that_is_killed_while_it_replaces_a_bundle_leaves_one(when, tmp_path):
    folder = tmp_path / "kernels"
    save_bundle(folder, [KernelSpec.make(PROBLEM)])
    process = start_python(KILLED, str(folder), when)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    if when != "no exchange":
        assert len(load_bundle(folder)) == (1 if when == "before" else 2)
        return
    assert not folder.exists(), "a file system that cannot exchange folders has a moment without any"
    with pytest.raises(AttributeError):
        save_bundle(folder, ["no spec"])
    assert len(load_bundle(folder)) == 1, "it is back, whatever becomes of the new one"


def test_replaces_a_bundle_and_nothing_else(folder, tmp_path):
    save_bundle(folder, SPECS[:1])
    assert len(load_bundle(folder)) == 1
    (tmp_path / "documents").mkdir()
    with pytest.raises(FileExistsError, match="is there and no bundle; name another folder, or remove it"):
        save_bundle(tmp_path / "documents", SPECS[:1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "moved"], "something temporary is left"
