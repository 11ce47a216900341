"""`na_compiler.compiler.workers`: processes that compile, whatever happens to them and to who asks them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from pathlib import Path

import pytest
from processes import environment, run_python

import na_compiler
from na_compiler.compiler import build, cuda, kernels, workers
from na_compiler.compiler.locks import KeyLocks
from na_compiler.compiler.messages import Build
from na_compiler.compiler.spec import KernelSpec
from na_compiler.compiler.workers import Pool, WorkerEndedError
from na_compiler.problem import Problem

FIRST, SECOND = (KernelSpec.make(Problem((9, 10), 1, head_dim, 3), "cuda:sm_80") for head_dim in (8, 16))
CPU = KernelSpec.make(Problem((5, 6), 1, 8, 3))
ROOT = Path(__file__).parent.parent


@pytest.fixture
def pool(monkeypatch):
    with Pool() as made:
        monkeypatch.setattr(cuda, "POOL", made)
        yield made


class AlarmError(Exception):
    pass


def test_an_interrupted_question_is_answered_to_nobody(pool):
    """The process that was asked is ended: its answer would be taken for the next one's."""

    def ring(*_):
        raise AlarmError

    before = signal.signal(signal.SIGALRM, ring)
    try:
        expected = cuda.generate(FIRST), cuda.generate(SECOND)
        (asked,) = pool._all
        # As soon as it compiles: it would answer a moment later.
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(AlarmError):
            deque((cuda.generate(FIRST) for _ in range(100)), maxlen=0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert asked not in pool._all
    assert not asked.is_alive
    time.sleep(0.1)
    assert (cuda.generate(FIRST), cuda.generate(SECOND)) == expected
    assert expected[0] != expected[1]


def test_an_answer_to_another_question_is_refused(pool, monkeypatch):
    monkeypatch.setattr(workers, "receive", lambda _, kind: kind(7, Build("of another kernel")))
    with pytest.raises(WorkerEndedError, match="answered request 7 when asked 0"):
        cuda.generate(FIRST)
    assert not pool._all


def test_one_that_ended_for_want_of_work_is_replaced(pool, monkeypatch):
    """Also where it ends just as it is asked: before, it seemed to be there."""
    cuda.generate(FIRST)
    (idle,) = pool._idle
    # As it ends itself: nobody asks any more.
    idle._process.stdin.close()
    idle._process.wait(20)
    assert not idle._folder.exists()
    seemed = iter([True])
    monkeypatch.setattr(type(idle), "is_alive", property(lambda _: next(seemed)))
    assert "__global__" in cuda.generate(FIRST)
    assert next(seemed, None) is None


def test_one_that_was_killed_while_it_had_nothing_to_do_is_replaced(pool):
    """By the system where memory is short, say. Only who is killed at work is told of."""
    cuda.generate(FIRST)
    (idle,) = pool._idle
    idle._process.kill()
    idle._process.wait(20)
    assert "__global__" in cuda.generate(FIRST)
    assert idle not in pool._all


def test_a_pool_keeps_one_and_ends_all(pool):
    threads = [threading.Thread(target=cuda.generate, args=(spec,)) for spec in (FIRST, SECOND)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (kept,) = pool._all
    pool.end()
    assert not kept.is_alive
    assert not kept._folder.exists()


HOSTILE = ["base64", "json", "pickle", "struct", "select", "numpy", "tvm", "tvm_ffi", "na_compiler", "ml_dtypes"]


def test_nothing_of_the_current_folder_is_run(tmp_path):
    """Neither what has the name of a module that is needed, nor of one that is looked for."""
    here = tmp_path / "here"
    here.mkdir()
    for name in HOSTILE:
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})")
    code = """
        import os, sys
        from na_compiler.compiler.spec import KernelSpec
        from na_compiler.compiler.workers import POOL
        from na_compiler.problem import Problem
        from pathlib import Path
        sys.path[:0] = ["", ".", os.getcwd()]
        del os.environ["PYTHONSAFEPATH"]
        os.environ["PYTHONPATH"] = "."
        POOL.build(KernelSpec.make(Problem((5, 6), 1, 8, 3)), Path(sys.argv[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "kernel.so")]
    # Python's own variable, for this process alone, which deletes it: a worker has to see to it by itself.
    variables = {"PYTHONSAFEPATH": "1"}
    if sys.version_info < (3, 11):
        pytest.skip("this test starts Python 3.11")
    subprocess.run(command, check=True, cwd=here, env=environment(**variables), timeout=120)
    assert (tmp_path / "kernel.so").is_file()
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


def test_the_package_is_the_one_of_this_process(tmp_path):
    """Wherever it is, and whatever is installed beside it."""
    place = tmp_path / "place"
    shutil.copytree(Path(na_compiler.__file__).parent, place / "na_compiler", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copytree(ROOT / "schedules", place / "na_compiler" / "schedules", ignore=shutil.ignore_patterns("*.pyc"))
    worker = place / "na_compiler" / "compiler" / "worker.py"
    worker.write_text(worker.read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w').write(__file__)\n")
    # On no path, as where an editable installation finds it.
    code = """
        import importlib.util, sys
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "na_compiler":
                    folder = sys.argv[1] + "/na_compiler"
                    return importlib.util.spec_from_file_location(
                        name, folder + "/__init__.py", submodule_search_locations=[folder]
                    )
        sys.meta_path[:] = [Finder(), *(finder for finder in sys.meta_path if "editable" not in repr(finder))]
        from na_compiler.compiler.spec import KernelSpec
        from na_compiler.compiler.workers import POOL
        from na_compiler.problem import Problem
        from pathlib import Path
        POOL.build(KernelSpec.make(Problem((5, 6), 1, 8, 3)), Path(sys.argv[2]))
    """
    run_python(code, str(place), str(tmp_path / "kernel.so"))
    assert (tmp_path / "ran").read_text() == str(worker)


def test_a_forked_child_has_its_own(tmp_path):
    """Forked while another thread compiles, and holds locks; when it ends, the parent's go on."""
    code = """
        import os, signal, sys, threading, time
        import na_compiler
        from na_compiler.compiler import build, kernels
        from na_compiler.compiler.workers import POOL
        from na_compiler.compiler.spec import KernelSpec
        from na_compiler.problem import Problem
        specs = [KernelSpec.make(Problem((5, 6), 1, head_dim, 3), "cuda:sm_80") for head_dim in (8, 16)]
        assert "__global__" in POOL.build(specs[0], None).source
        (mine,) = POOL._all
        cpu = KernelSpec.make(Problem((5, 6), 1, 8, 3))
        held, done = threading.Event(), threading.Event()
        def hold():
            with POOL._lock, kernels._locks.hold(cpu), build._LOCK:
                held.set()
                done.wait()
        thread = threading.Thread(target=hold, daemon=True)
        thread.start()
        held.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            assert "__global__" in POOL.build(specs[1], None).source
            assert na_compiler.compile(cpu.problem) is not None
            assert "tvm" not in sys.modules
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        done.set()
        thread.join()
        assert mine.is_alive
        assert "__global__" in POOL.build(specs[0], None).source and POOL._all == {mine}
        print(mine._process.pid, mine._folder)
    """
    pid, folder = run_python(code, NA_COMPILER_CACHE=tmp_path).split()
    assert not Path(folder).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_what_is_cached_waits_for_no_compilation(tmp_path, monkeypatch):
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "_kernels", {})
    na_compiler.compile(CPU.problem)
    kernels._kernels.clear()
    compiles, goes_on = threading.Event(), threading.Event()

    def slowly(*_):
        compiles.set()
        assert goes_on.wait(60)
        raise RuntimeError("slow")

    monkeypatch.setattr(build, "compile_here", slowly)
    problem = CPU.problem.replace(head_dim=16)
    failed = []

    def compile_slowly():
        try:
            na_compiler.compile(problem)
        except RuntimeError as error:
            failed.append(str(error))

    thread = threading.Thread(target=compile_slowly)
    thread.start()
    assert compiles.wait(60)
    started = time.perf_counter()
    loader = threading.Thread(target=na_compiler.compile, args=(CPU.problem,))
    loader.start()
    loader.join(5)
    took = time.perf_counter() - started
    was_waiting = loader.is_alive()
    goes_on.set()
    thread.join()
    loader.join()
    assert not was_waiting
    assert took < 1
    assert failed == ["slow"]


def test_locks_of_keys_exclude_and_are_not_kept():
    locks, order = KeyLocks(), []

    def work(name):
        with locks.hold("a"):
            order.append(name)
            time.sleep(0.01)
            order.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    with locks.hold("b"):
        pass
    for thread in threads:
        thread.join()
    assert order[::2] == order[1::2]
    assert not locks._locks
