"""`compile_all`: many kernels at once, in processes of `na_compiler.compiler.workers`."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from na_compiler.compiler import cache
from na_compiler.compiler.kernels import cached_entry, make_entry
from na_compiler.compiler.spec import KernelSpec
from na_compiler.compiler.workers import Pool
from na_compiler.runtime.host import c_compiler
from na_compiler.runtime.threads import cores

__all__ = ["CompileError", "Compiled", "Progress", "compile_all"]

# Seconds. A thread whose process was ended may wait for another program's lock on a kernel: it is left alone then.
_PATIENCE = 2.0
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
        In the order of ``specs``. Where the cache cannot be written, the libraries are gone with this process.

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
        _run(missing, min(jobs or cores(), len(missing)), ready)
    yield [done[spec] for spec in wanted]


def _check_compilers(specs: list[KernelSpec]) -> None:
    if importlib.util.find_spec("tvm") is None:
        raise CompileError("there is no compiler: apache-tvm is not installed; pip install 'apache-tvm==0.27.*'")
    if c_compiler() is None and any(spec.target.device_type == "cpu" for spec in specs):
        raise CompileError("there is no C compiler to link kernels with; install gcc or clang, or set CC")


def _effort(spec: KernelSpec) -> int:
    problem = spec.problem
    return (3 if spec.direction == "backward" else 1) * (2 if problem.additional_kv else 1) * problem.rank


def _run(specs: list[KernelSpec], jobs: int, ready: Callable[[Compiled], None]) -> None:
    pending: SimpleQueue[KernelSpec] = SimpleQueue()
    made: SimpleQueue[Compiled | tuple[KernelSpec, BaseException]] = SimpleQueue()
    for spec in specs:
        pending.put(spec)
    pool = Pool(keep=jobs)
    threads = [threading.Thread(target=_serve, args=(pending, made, pool), daemon=True) for _ in range(jobs)]
    try:
        for thread in threads:
            thread.start()
        for _ in specs:
            one = made.get()
            if not isinstance(one, Compiled):
                spec, error = one
                raise CompileError(f"{spec} could not be compiled: {error}") from error
            ready(one)
    finally:
        with contextlib.suppress(Empty):
            while True:
                pending.get_nowait()
        pool.end()
        # Each finds that its process has ended, and gives up its lock and what it has half made in the cache.
        for thread in threads:
            thread.join(_PATIENCE)


def _serve(
    pending: SimpleQueue[KernelSpec], made: SimpleQueue[Compiled | tuple[KernelSpec, BaseException]], pool: Pool
) -> None:
    """Compile specs until there are none."""
    while True:
        try:
            spec = pending.get_nowait()
        except Empty:
            return
        started = time.perf_counter()
        try:
            entry = make_entry(spec, pool)
        except Exception as error:  # noqa: BLE001 - told to the thread that waits, which raises it
            made.put((spec, error))
        else:
            made.put(Compiled(spec, entry, max(time.perf_counter() - started, 1e-9)))
