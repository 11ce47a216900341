"""`na_compiler.compiler.cache`: kernels on disk, whatever happens to it."""

import json
import logging
import os
import shutil
import subprocess
import time

import pytest
import torch
from processes import run_python, start_python

import na_compiler
from na_compiler.compiler import cache, kernels
from na_compiler.compiler import spec as spec_module
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.runtime.jit import compiling
from na_compiler.runtime.temporary import temporary_folder

PROBLEM = Problem((5, 6), 1, 8, 3)
SPEC = KernelSpec.make(PROBLEM)
INFO = SPEC.info
COMPILE = """
    import sys, logging
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    import na_compiler, torch
    kernel = na_compiler.compile(na_compiler.Problem((5, 6), 1, 8, 3))
    query = torch.randn(1, 5, 6, 1, 8)
    assert torch.isfinite(kernel(query, query, query)[0]).all()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, and a process that has no kernels."""
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "_kernels", {})
    monkeypatch.setattr(kernels, "_said", set())
    return tmp_path / "cache" / "kernels"


def put(key, data=b"code", builds=None):
    """Return an entry whose library is some bytes, made if it is not there."""

    def build(path):
        path.write_bytes(data)
        if builds is not None:
            builds.append(key)

    return cache.make(key, SPEC.describe, build)


def works(kernel):
    query = torch.randn(1, 5, 6, 1, 8)
    return bool(torch.isfinite(kernel(query, query, query)[0]).all())


def test_builds_once(folder):
    builds = []
    first, second = put("a", builds=builds), put("a", builds=builds)
    assert builds == ["a"]
    assert first.library == second.library
    assert second.library.read_bytes() == b"code"
    assert second.info == INFO
    assert (second.config, second.reason) == (repr(SPEC.config), None)
    assert [path.name for path in folder.iterdir()] == ["a"], "something temporary is left"


def test_what_is_cached_is_found_once_and_without_a_plan(folder, monkeypatch):
    """Neither the family is asked nor the library hashed twice, however large the layout is."""
    na_compiler.compile(PROBLEM)
    monkeypatch.setattr(kernels, "_kernels", {})
    monkeypatch.setattr(spec_module, "choose", None)
    reads, read = [], cache.read_entry
    monkeypatch.setattr(cache, "read_entry", lambda *arguments: reads.append(arguments) or read(*arguments))
    assert works(na_compiler.compile(PROBLEM))
    assert len(reads) == 1
    with compiling(False), pytest.raises(na_compiler.MissingKernelError):
        na_compiler.compile(Problem((1 << 31,), 1, 8, 1 << 20, is_causal=True))


def test_says_again_why_no_faster_family_was_chosen(folder, caplog):
    spec = KernelSpec.make(Problem((64, 64), 1, 64, 7), "cuda:sm_90a")
    cache.make(spec.key, spec.describe, lambda path: path.write_bytes(b"code"))
    na_compiler.compile(spec.problem, "cuda:sm_90a")
    assert "takes float16 and bfloat16, not float32" in caplog.text


def test_a_build_that_fails_leaves_nothing(folder):
    def build(path):
        path.write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.make("a", SPEC.describe, build)
    assert list(folder.iterdir()) == []
    assert put("a").library.is_file()


def damage_library(entry):
    # Another file in its place: this process may have mapped the old one.
    data = bytearray(entry.library.read_bytes())
    data[len(data) // 2] ^= 0xFF
    entry.library.unlink()
    entry.library.write_bytes(data)


def truncate_library(entry):
    os.truncate(entry.library, entry.bytes // 2)


def empty_manifest(entry):
    (entry.library.parent / "kernel.json").write_text("")


def half_manifest(entry):
    path = entry.library.parent / "kernel.json"
    path.write_text(path.read_text()[: path.stat().st_size // 2])


def foreign_manifest(entry):
    (entry.library.parent / "kernel.json").write_text("[1, 2]")


def other_format(entry):
    path = entry.library.parent / "kernel.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


def another_entry(entry):
    path = entry.library.parent / "kernel.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"key": "b"}))


def no_library(entry):
    entry.library.unlink()


def a_file_in_its_place(entry):
    shutil.rmtree(entry.library.parent)
    entry.library.parent.write_text("what is this")


@pytest.mark.parametrize(
    "damage",
    [
        damage_library, truncate_library, empty_manifest, half_manifest, foreign_manifest, other_format, another_entry,
        no_library, a_file_in_its_place,
    ],
)  # fmt: skip
def test_what_is_damaged_is_built_again_with_a_warning(folder, damage, caplog):
    builds = []
    damage(put("a", builds=builds))
    with caplog.at_level(logging.WARNING, logger="na_compiler"):
        entry = put("a", builds=builds)
    assert builds == ["a", "a"]
    assert entry.library.read_bytes() == b"code"
    assert "compiling a again: " in caplog.text


def test_a_damaged_kernel_is_compiled_again(folder, caplog):
    na_compiler.compile(PROBLEM)
    (entry,) = cache.entries()
    damage_library(entry)
    kernels._kernels.clear()
    with caplog.at_level(logging.WARNING, logger="na_compiler"):
        assert works(na_compiler.compile(PROBLEM))
    assert "kernel.so is not the file that was put in" in caplog.text
    assert len(list(cache.entries())) == 1


def test_two_processes_compile_one_problem_once(tmp_path):
    """One compiles, the other waits for it and takes what it made."""
    processes = [start_python(COMPILE, NA_COMPILER_CACHE=tmp_path) for _ in range(2)]
    outputs = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        outputs.append(output)
    assert sum("compiled na2d" in output for output in outputs) == 1, outputs
    assert len(list((tmp_path / "kernels").iterdir())) == 1


def test_a_process_killed_while_it_compiles_harms_nobody(folder):
    folder.mkdir(parents=True)
    half = folder / ".building-123" / "a"
    half.mkdir(parents=True)
    (half / "kernel.so").write_bytes(b"half")
    assert put("a").library.read_bytes() == b"code"
    assert [entry.key for entry in cache.entries()] == ["a"]
    assert cache.clear() == 1
    assert list(folder.iterdir()) == []


def test_is_kept_under_its_limit(folder, monkeypatch):
    for number, key in enumerate("abcd"):
        entry = put(key, bytes(100_000))
        os.utime(entry.library, (number + 1000, number + 1000))
        os.utime(entry.library.parent / "kernel.json", (number + 1000, number + 1000))
    put("a")  # Used again: b is now the one that was not used longest.
    monkeypatch.setenv("NA_COMPILER_CACHE_BYTES", "350000")
    put("e", bytes(100_000))
    assert sorted(entry.key for entry in cache.entries()) == ["a", "d", "e"]


def test_the_limit_never_deletes_what_was_just_made(folder, monkeypatch):
    monkeypatch.setenv("NA_COMPILER_CACHE_BYTES", "10")
    assert works(na_compiler.compile(PROBLEM))
    assert len(list(cache.entries())) == 1


def test_what_killed_processes_left_goes_and_what_is_in_use_stays(folder):
    """Old folders that nobody holds; locks that nobody needs."""
    host = folder.parent / "host" / "x"
    host.mkdir(parents=True)
    put("a")
    old = time.time() - 7200
    with temporary_folder(folder, ".building-") as used, temporary_folder(host, ".building-") as used_by_host:
        left = [place / f".building-{name}" for place in (folder, host) for name in ("old", "new")]
        for path in left:
            (path / "a").mkdir(parents=True)
        for path in (used, used_by_host, left[0], left[2]):
            os.utime(path, (old, old))
        lock = folder.parent / "locks" / "gone.lock"
        lock.write_text("")
        os.utime(lock, (old - 86400, old - 86400))
        put("b")
        assert [path.exists() for path in left] == [False, True, False, True]
        assert used.exists()
        assert used_by_host.exists()
    assert list(lock.parent.iterdir()) == [], "a lock for each kernel would be one file more for each"


def test_the_limit_counts_everything(folder, monkeypatch):
    """The host's libraries, and what is half made."""
    library = folder.parent / "host" / "x" / "lib.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(bytes(100_000))
    os.utime(library, (1000, 1000))
    put("a", bytes(100_000))
    half = folder / ".building-1" / "kernel.so"
    half.parent.mkdir()
    half.write_bytes(bytes(100_000))
    monkeypatch.setenv("NA_COMPILER_CACHE_BYTES", "350000")
    put("b", bytes(100_000))
    assert not library.exists()
    assert half.exists()
    assert {entry.key for entry in cache.entries()} == {"a", "b"}
    put("c", bytes(100_000))
    assert len(list(cache.entries())) == 2
    assert cache.clear() == 2
    assert [path for path in folder.parent.rglob("*") if path.is_file()] == []


def test_the_limit_must_be_a_number(monkeypatch):
    monkeypatch.setenv("NA_COMPILER_CACHE_BYTES", "1 GB")
    with pytest.raises(ValueError, match=r"must be a number of bytes, got '1 GB'; e\.g\. 1073741824"):
        cache.limit_bytes()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    """Kernels are kept for the process, and that is said once."""
    monkeypatch.setattr(kernels, "_kernels", {})
    monkeypatch.setattr(kernels, "_said", set())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING, logger="na_compiler"):
        assert works(na_compiler.compile(PROBLEM))
        assert na_compiler.compile(PROBLEM, direction="backward")
    assert len([record for record in caplog.records if "cannot be used" in record.getMessage()]) == 1


def test_a_read_only_cache_that_others_filled(tmp_path):
    """Is used; what it lacks is compiled for the process."""
    run_python(COMPILE, NA_COMPILER_CACHE=tmp_path)
    prefix = ()
    if os.geteuid() == 0:  # Permissions do not hold root back, unless it gives up the right to ignore them.
        prefix = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
        if shutil.which("setpriv") is None:
            pytest.skip("running as root, and there is no setpriv")
    subprocess.run(["chmod", "-R", "a-w", tmp_path], check=True)
    try:
        output = run_python(COMPILE, prefix=prefix, NA_COMPILER_CACHE=tmp_path)
        assert "compiled" not in output
        assert "cannot be used" not in output
        more = COMPILE.replace("(5, 6)", "(6, 5)").replace("1, 5, 6, 1, 8", "1, 6, 5, 1, 8")
        output = run_python(more, prefix=prefix, NA_COMPILER_CACHE=tmp_path)
        assert "compiled na2d" in output
        assert output.count("cannot be used, kernels are kept for this process only") == 1
    finally:
        subprocess.run(["chmod", "-R", "u+w", tmp_path], check=True)


class TestWithoutACompiler:
    """Kernels are built in memory where no C compiler is found."""

    def test_is_said_once_and_works(self, tmp_path):
        code = """
            import sys, logging
            logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
            import torch
            from na_compiler import na2d
            from na_compiler.reference import neighborhood_attention
            for kernel_size in (3, 5):
                tensors = [torch.randn(1, 6, 7, 2, 8, requires_grad=True) for _ in range(3)]
                output, expected = na2d(*tensors, kernel_size), neighborhood_attention(*tensors, kernel_size)[0]
                assert (output - expected).norm() < 1e-5 * expected.norm()
                grads = torch.autograd.grad(output.square().sum(), tensors)
                references = torch.autograd.grad(expected.square().sum(), tensors)
                for grad, reference in zip(grads, references):
                    assert (grad - reference).norm() < 1e-5 * reference.norm()
        """
        output = run_python(code, NA_COMPILER_CACHE=tmp_path / "cache", PATH=tmp_path, CC=None)
        assert output.count("no C compiler was found: kernels are built in memory") == 1
        assert len(output.strip().splitlines()) == 1, output

    def test_a_compiler_that_is_named_but_not_there(self, tmp_path):
        output = run_python(COMPILE, NA_COMPILER_CACHE=tmp_path, CC="/nowhere/cc")
        assert "no C compiler was found" in output

    def test_cached_kernels_are_used(self, tmp_path):
        run_python(COMPILE, NA_COMPILER_CACHE=tmp_path / "cache")
        output = run_python(COMPILE, NA_COMPILER_CACHE=tmp_path / "cache", PATH=tmp_path, CC=None)
        assert "compiled" not in output

    def test_a_forked_child_is_told(self, tmp_path):
        code = """
            import os, torch, na_compiler
            kernel = na_compiler.compile(na_compiler.Problem((5, 6), 1, 8, 3))
            query = torch.randn(1, 5, 6, 1, 8)
            kernel(query, query, query)
            if os.fork() == 0:
                try:
                    kernel(query, query, query)
                except RuntimeError as error:
                    print(error, flush=True)
                os._exit(0)
            os.wait()
        """
        output = run_python(code, NA_COMPILER_CACHE=tmp_path / "cache", PATH=tmp_path, CC=None)
        assert "built in memory do not run in forked children; set CC to a C compiler" in output
