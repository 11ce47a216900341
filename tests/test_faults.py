"""What goes wrong while compiling ahead of inference: nothing corrupt is loaded, and what is said says what to do.

Damaged bundles are in ``test_bundle.py``, damaged caches in ``test_cache.py``.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import environment

from na_compiler import KernelSpec, Problem, load_bundle, save_bundle
from na_compiler.compiler import cache
from na_compiler.runtime import bundle as bundle_module

PROBLEMS = [Problem((9, 9 + i), 2, 8, 3, additional_kv=True) for i in range(4)]
COMPILE = """
import sys, na_compiler
from na_compiler import KernelSpec, Problem
specs = [KernelSpec.make(Problem((9, 9 + i), 2, 8, 3, additional_kv=True)) for i in range(4)]
try:
    done = na_compiler.save_bundle(sys.argv[1], specs, jobs=2, progress=lambda one, *_: print(one.seconds, flush=True))
except (OSError, RuntimeError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(autouse=True)
def none_loaded(monkeypatch):
    monkeypatch.setattr(bundle_module, "_loaded", [])


def start(folder, *, prefix=(), **variables):
    command = [*prefix, sys.executable, "-c", COMPILE, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(**variables), **pipes)


def finish(process):
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def test_killed_in_the_middle(tmp_path, monkeypatch):
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "bundles" / "kernels"
    process = start(folder)
    process.stdout.readline()  # One is done, the others are being compiled.
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not folder.exists()
    # Whoever is still at it finds that nobody asks any more.
    until = time.monotonic() + 60
    while _workers(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _workers(tmp_path), "workers outlive who started them"
    whole = len(list(cache.entries()))
    assert 1 <= whole <= 4
    status, output, errors = finish(start(folder))
    assert status == 0, errors
    assert output.split().count("0.0") == whole
    assert {info.problem for info in load_bundle(folder)} == set(PROBLEMS)
    assert [path.name for path in folder.parent.iterdir()] == ["kernels"]


def _workers(folder):
    """Return the worker processes that use a cache."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if b"na_compiler.compiler.worker" in (process / "cmdline").read_bytes():
                found += [int(process.name)] * (str(folder).encode() in (process / "environ").read_bytes())
        except OSError:
            continue
    return found


def test_a_worker_that_is_killed_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "cache"))
    process = start(tmp_path / "kernels")
    process.stdout.readline()
    for worker in _workers(tmp_path):
        os.kill(worker, signal.SIGKILL)
    status, _, errors = finish(process)
    assert status == 1
    assert "could not be compiled: the worker process ended with signal 9" in errors
    assert not (tmp_path / "kernels").exists()


def test_two_processes_compile_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "cache"))
    processes = [start(tmp_path / name) for name in ("one", "two")]
    for process in processes:
        status, _, errors = finish(process)
        assert status == 0, errors
    assert len(list(cache.entries())) == 4
    names = ["one", "two"]
    hashes = [
        sorted(
            (kernel["key"], kernel["sha256"])
            for kernel in json.loads((tmp_path / name / "manifest.json").read_text())["kernels"]
        )
        for name in names
    ]
    assert hashes[0] == hashes[1], "each was compiled once"


@pytest.mark.full
def test_two_processes_write_the_same_bundle(tmp_path):
    for process in [start(tmp_path / "kernels") for _ in range(2)]:
        status, _, errors = finish(process)
        # The second may find that the first has just replaced it; it is whole all the same.
        assert status == 0, errors
    assert {info.problem for info in load_bundle(tmp_path / "kernels")} == set(PROBLEMS)


def mounted(folder, options):
    """Return a prefix for a command that runs with a file system of its own in a folder."""
    script = f'mount -t tmpfs -o {options} none "{folder}" && exec "$@"'
    prefix = ("unshare", "-rm", "sh", "-c", script, "sh")
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no test mount a file system")
    return prefix


@pytest.mark.parametrize(("options", "told"), [("size=16k", "No space left"), ("ro", "Read-only file system")])
def test_a_disk_that_takes_nothing(options, told, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    # The bundle cannot be written.
    status, _, errors = finish(start(folder / "kernels", prefix=mounted(folder, options)))
    assert status == 1
    assert told in errors
    # The cache cannot: it costs time the next time, nothing else.
    status, _, errors = finish(
        start(tmp_path / "kernels", prefix=mounted(folder, options), NA_COMPILER_CACHE=folder / "cache")
    )
    assert status == 0, errors
    assert len(load_bundle(tmp_path / "kernels")) == 4


def test_what_a_killed_process_left_beside_a_bundle_goes(tmp_path):
    left = [tmp_path / f".bundle-{name}" for name in ("old", "new")]
    for path in left:
        (path / "bundle").mkdir(parents=True)
    os.utime(left[0], (1000, 1000))
    save_bundle(tmp_path / "kernels", [KernelSpec.make(PROBLEMS[0])])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bundle-new", "kernels"]


def test_a_bundle_stays_where_its_successor_finds_no_room(tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    save_bundle(folder, [KernelSpec.make(PROBLEMS[0])])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_bundle(folder, [KernelSpec.make(PROBLEMS[1])])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["kernels"]
    assert len(load_bundle(folder)) == 1
