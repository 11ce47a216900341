"""`Pool`: processes that compile, in place of this one. There is one protocol for all devices: `compiler.messages`.

Processes of their own, and not forked or spawned by multiprocessing, so that a user's script needs no ``if __name__ ==
"__main__"``, and one that crashes says so by going away. For CUDA there is another reason: TVM compiles for it only
where the driver's and the runtime's libraries load, and the stand-ins for these are on a worker's path alone: in the
user's process a torch with CUDA would find them.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import na_compiler
from na_compiler import schedules
from na_compiler.compiler import toolkit
from na_compiler.compiler.messages import Answer, Build, Failure, Request, receive, send
from na_compiler.compiler.spec import KernelSpec
from na_compiler.runtime.host import c_compiler

__all__ = ["POOL", "Pool", "WorkerEndedError"]

# Runs isolated (-I): nothing of the current folder, of a script's, or of variables is on the path that it starts with.
# The package is the one that this process has, wherever else there may be another.
_START = """
import importlib.util, json, sys
given = json.loads(sys.argv[1])
class Package:
    def find_spec(self, name, path=None, target=None):
        file = given["packages"].get(name)
        if file is not None:
            folder = file.rpartition("/")[0]
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[folder])
sys.path[:] = given["path"]
sys.meta_path.insert(0, Package())
from na_compiler.compiler.worker import serve
serve(given["folder"])
"""


class WorkerEndedError(RuntimeError):
    """A compiling process went away."""


class Pool:
    """Compiling processes: as many as there are threads that ask at a time.

    Parameters
    ----------
    keep
        How many with nothing to do are kept, of each kind, for the next request.
    """

    def __init__(self, keep: int = 1) -> None:
        self._keep = keep
        self._reset()
        _POOLS.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._ended = False

    def build(self, spec: KernelSpec, path: Path | None) -> Build:
        """Have a spec compiled.

        Parameters
        ----------
        spec
            What to compile.
        path
            Where to write the library; ``None`` for the source text alone, of a kernel for a GPU.

        Raises
        ------
        RuntimeError
            If it cannot be compiled, with the reason; `WorkerEndedError` if the process crashed.
        OSError
            If the library cannot be written.
        """
        kind = spec.target.device_type
        nvcc = str(toolkit.find_toolkit().nvcc) if kind == "cuda" and path is not None else None
        result: Build | Failure = Failure("")
        for attempt in range(2):
            worker = self._take(kind)
            try:
                result = worker.ask(spec, None if path is None else str(path.resolve()), nvcc)
            except WorkerEndedError as error:
                self._end(worker)
                # It may have ended because it had nothing to do, just as it was asked.
                if self._ended or attempt or not error.args[1:]:
                    raise
            except BaseException:  # Interrupted. What the process answers now is the answer to nobody's question.
                self._end(worker)
                raise
            else:
                self._give_back(worker)
                break
        if isinstance(result, Build):
            return result
        if result.errno is not None:
            raise OSError(result.errno, os.strerror(result.errno), result.text)
        raise RuntimeError(f"compiling {spec} failed: {result.text}")

    def end(self) -> None:
        """End all processes, those that compile as well; for good."""
        with self._lock:
            workers, self._ended = list(self._all), True
        for worker in workers:
            self._end(worker)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _take(self, kind: str) -> _Worker:
        with self._lock:
            found = next((worker for worker in self._idle if worker.kind == kind), None)
            if found is not None:
                self._idle.remove(found)
        if found is not None and found.is_alive:
            return found
        if found is not None:
            self._end(found)
        worker = _Worker(kind)
        with self._lock:
            self._all.add(worker)
            ended = self._ended
        if ended:
            self._end(worker)
            raise WorkerEndedError("the compiling processes were ended")
        return worker

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            is_kept = sum(other.kind == worker.kind for other in self._idle) < self._keep and not self._ended
            if is_kept:
                self._idle.append(worker)
        if not is_kept:
            self._end(worker)

    def _end(self, worker: _Worker) -> None:
        with self._lock:
            self._all.discard(worker)
            if worker in self._idle:
                self._idle.remove(worker)
        worker.end()

    def forget(self) -> None:
        """Leave the processes to the parent, in a forked child, which may have been forked while the lock was held."""
        for worker in self._all:
            worker.forget()
        self._reset()


class _Worker:
    """One compiling process, and this side of talking to it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._numbers = itertools.count()
        self._asking = threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="na_compiler-worker-"))
        try:
            given = {"path": _path(), "packages": _packages(), "folder": str(self._folder)}
            with (self._folder / "log").open("wb") as log:
                self._process = subprocess.Popen(  # noqa: S603
                    [sys.executable, "-I", "-c", _START, json.dumps(given)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,
                    env=_environment(kind, self._folder),
                    # With the compilers that it calls in a group of its own, which can be ended, and which a Ctrl-C in
                    # the terminal does not reach: this process ends it then.
                    start_new_session=True,
                )
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._back = self._process.stdin, self._process.stdout

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, spec: KernelSpec, path: str | None, nvcc: str | None) -> Build | Failure:
        number = next(self._numbers)
        try:
            with self._asking:
                send(self._to.fileno(), Request(number, spec, path, nvcc, c_compiler()))
                answer = receive(self._back.fileno(), Answer)
        except (OSError, EOFError, ValueError):  # ValueError: another thread has ended it, and closed the pipes.
            raise self._why() from None
        if answer.number != number:
            raise WorkerEndedError(f"the worker process answered request {answer.number} when asked {number}")
        return answer.result

    def _why(self) -> WorkerEndedError:
        status = self._process.wait()
        try:
            log = (self._folder / "log").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            log = ""
        reason = f"signal {-status}" if status < 0 else f"status {status}"
        tail = f": {log.splitlines()[-1]}" if log else ""
        message = f"the worker process ended with {reason}{tail}"
        return WorkerEndedError(message, "it may have had nothing to do") if status == 0 else WorkerEndedError(message)

    def end(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        with self._asking:  # Who asks now reads that it has ended, and then the pipes can be closed.
            self.forget()
        shutil.rmtree(self._folder, ignore_errors=True)

    def forget(self) -> None:
        """Close this side of the pipes, and leave the rest to whom it belongs."""
        for pipe in (self._to, self._back):
            with contextlib.suppress(OSError):
                pipe.close()


def _environment(kind: str, folder: Path) -> dict[str, str]:
    # A worker uses one core. What it and its compilers leave is in its own folder, which is deleted with it.
    environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"}
    if kind == "cuda":
        # Empty parts of a path are the current folder.
        named = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
        environment["LD_LIBRARY_PATH"] = os.pathsep.join([*map(str, toolkit.stand_ins()), *named])
    return environment


def _packages() -> dict[str, str]:
    """Return where this package is."""
    files = {"na_compiler": na_compiler.__file__, "na_compiler.schedules": schedules.__file__}
    return {name: str(Path(file).resolve()) for name, file in files.items() if file and Path(file).is_file()}


def _path() -> list[str]:
    """Return where a worker finds other packages: where this process does, but for the current folder and a script's.

    Unless TVM is there: then they come last, behind the standard library and everything that is installed.
    """
    main = sys.modules.get("__main__")
    script = getattr(main, "__file__", None) if getattr(main, "__spec__", None) is None else None
    doubtful = {str(Path.cwd()), *([str(Path(script).resolve().parent)] if script else [])}
    places: dict[str, bool] = {}
    for entry in sys.path:
        place = str(Path(entry).absolute())
        # What is relative, or empty, is in the current folder.
        places[place] = not os.path.isabs(entry) or place in doubtful  # noqa: PTH117
    needed = {str(Path(folder).parent) for name in ("tvm", "tvm_ffi") for folder in _folders(name)}
    certain = [place for place, is_doubtful in places.items() if not is_doubtful]
    return certain + [place for place, is_doubtful in places.items() if is_doubtful and place in needed]


def _folders(package: str) -> Iterator[str]:
    spec = importlib.util.find_spec(package)
    yield from (spec.submodule_search_locations or ()) if spec else ()


def _after_fork() -> None:
    for pool in _POOLS:
        pool.forget()


_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork)
# For what is compiled one at a time.
POOL = Pool()
atexit.register(POOL.end)
