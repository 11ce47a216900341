"""`compile_all`: many kernels at once, in worker processes."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from na_compiler.compiler import cache
from na_compiler.compiler.kernels import cached_entry
from na_compiler.compiler.spec import KernelSpec
from na_compiler.runtime.host import c_compiler
from na_compiler.runtime.threads import cores

__all__ = ["CompileError", "Compiled", "Progress", "compile_all"]

# Called with a kernel that is done, how many are, and how many there are.
Progress = Callable[["Compiled", int, int], None]


class CompileError(RuntimeError):
    """A kernel could not be compiled."""


@dataclass(frozen=True)
class Compiled:
    """A kernel that is there.

    Parameters
    ----------
    spec
        What was wanted.
    entry
        The cache's entry: what it is, and where.
    seconds
        Time it took a worker; 0 if it was in the cache.
    """

    spec: KernelSpec
    entry: cache.Entry
    seconds: float

    @property
    def library(self) -> Path:
        """Where it is."""
        return self.entry.library

    @property
    def was_cached(self) -> bool:
        """Whether it was in the cache."""
        return self.seconds == 0.0


@contextlib.contextmanager
def compile_all(
    specs: Iterable[KernelSpec], jobs: int | None = None, progress: Progress | None = None
) -> Iterator[list[Compiled]]:
    """Compile specs that are not cached, each once, in parallel processes.

    Parameters
    ----------
    specs
        What to compile; duplicates are compiled once.
    jobs
        Worker processes; default: the cores that this process may use.
    progress
        Called from this thread as kernels become ready.

    Yields
    ------
    list of Compiled
        In the order of ``specs``. Where the cache cannot be written the libraries are gone after the block.

    Raises
    ------
    ValueError
        If ``jobs`` is less than 1.
    CompileError
        If one could not be compiled (the others' workers are stopped), or there is nothing to compile with.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    wanted = list(dict.fromkeys(specs))
    done: dict[KernelSpec, Compiled] = {}

    def ready(compiled: Compiled) -> None:
        done[compiled.spec] = compiled
        if progress is not None:
            progress(compiled, len(done), len(wanted))

    for spec in wanted:
        entry = cached_entry(spec)
        if entry is not None:
            ready(Compiled(spec, entry, 0.0))
    # The longest first, so that no worker is left with one while the others have nothing to do.
    missing = sorted((spec for spec in wanted if spec not in done), key=_effort, reverse=True)
    if missing:
        _check_compilers(missing)
    with tempfile.TemporaryDirectory(prefix="na_compiler-") as temporary:
        if missing:
            _run(missing, min(jobs or cores(), len(missing)), Path(temporary), ready)
        yield [done[spec] for spec in wanted]


def _check_compilers(specs: list[KernelSpec]) -> None:
    if importlib.util.find_spec("tvm") is None:
        raise CompileError("there is no compiler: apache-tvm is not installed; pip install 'apache-tvm==0.27.*'")
    if c_compiler() is None and any(spec.target.device_type == "cpu" for spec in specs):
        raise CompileError("there is no C compiler to link kernels with; install gcc or clang, or set CC")


def _effort(spec: KernelSpec) -> int:
    problem = spec.problem
    return (3 if spec.direction == "backward" else 1) * (2 if problem.additional_kv else 1) * problem.rank


def _run(specs: list[KernelSpec], jobs: int, temporary: Path, ready: Callable[[Compiled], None]) -> None:
    pending: SimpleQueue[KernelSpec] = SimpleQueue()
    answers: SimpleQueue[tuple[KernelSpec, dict[str, Any]]] = SimpleQueue()
    for spec in specs:
        pending.put(spec)
    workers = [_Worker(temporary, number) for number in range(jobs)]
    try:
        threads = [threading.Thread(target=worker.serve, args=(pending, answers), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        for _ in specs:
            spec, answer = answers.get()
            if "error" in answer:
                raise CompileError(f"{spec} could not be compiled: {answer['error']}")
            entry = cache.read_entry(Path(answer["library"]).parent, spec.key)
            ready(Compiled(spec, entry, max(float(answer["seconds"]), 1e-9)))
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One worker process, and the thread's side of talking to it."""

    def __init__(self, temporary: Path, number: int) -> None:
        self.log = temporary / f"worker-{number}.log"
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "na_compiler.compiler.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # Where the cache cannot be written, libraries go to the temporary folder. A worker uses one core.
                env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"},
            )

    def serve(self, pending: SimpleQueue[KernelSpec], answers: SimpleQueue[tuple[KernelSpec, dict[str, Any]]]) -> None:
        """Hand specs to the process until there are none, or it is gone."""
        while True:
            try:
                spec = pending.get_nowait()
            except Empty:
                return
            answers.put((spec, self._ask(spec)))

    def _ask(self, spec: KernelSpec) -> dict[str, Any]:
        to, back = self.process.stdin, self.process.stdout
        assert to is not None
        assert back is not None
        try:
            print(base64.b64encode(pickle.dumps(spec)).decode(), file=to, flush=True)
            answer = _line(back)
        except (OSError, ValueError):
            answer = None
        if answer is None:
            status = self.process.wait()
            tail = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            reason = f"signal {-status}" if status < 0 else f"status {status}"
            return {"error": f"the worker process ended with {reason}{': ' + tail[0] if tail else ''}"}
        return answer

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _line(pipe: IO[str]) -> dict[str, Any] | None:
    line = pipe.readline()
    return json.loads(line) if line.endswith("\n") else None
