"""`compile`: from a problem to a kernel that can be called."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from na_compiler.compiler import cache
from na_compiler.compiler.locks import KeyLocks
from na_compiler.compiler.spec import KernelSpec
from na_compiler.compiler.toolkit import remember_version
from na_compiler.compiler.workers import Pool
from na_compiler.problem import Problem
from na_compiler.runtime.bundle import loaded_bundles
from na_compiler.runtime.folders import cache_folder, process_folder
from na_compiler.runtime.host import c_compiler
from na_compiler.runtime.jit import MissingKernelError, is_compiling_allowed
from na_compiler.runtime.kernel import Kernel, make_kernel
from na_compiler.runtime.library import load_function
from na_compiler.target import Target

__all__ = ["cached_entry", "compile", "compile_spec", "is_loaded", "kernel_by_key", "make_entry"]

_LOG = logging.getLogger("na_compiler")
_kernels: dict[KernelSpec, Kernel] = {}
_by_key: dict[str, Kernel] = {}
_locks = KeyLocks()
_said: set[str] = set()
# Seconds of compiling without a word.
_PATIENCE = 1.0


def compile(problem: Problem, target: str | Target = "llvm", direction: str = "forward") -> Kernel:  # noqa: A001
    """Compile a problem, or find it compiled.

    Parameters
    ----------
    problem
        What to compute. With an open layout, ``Problem((None, None), ...)``: the kernel takes every layout, and a part
        of one, see `na_compiler.Place`.
    target
        ``"llvm"`` for this machine's CPU, or an instruction set: ``"llvm:x86-64"``, ``"llvm:x86-64-v2"``,
        ``"llvm:x86-64-v3"`` (AVX2), ``"llvm:x86-64-v4"`` (AVX-512), ``"llvm:aarch64"``. ``"cuda"`` for the GPU present,
        or an architecture: ``"cuda:sm_90a"``.
    direction
        ``"forward"``, ``"backward"``, or ``"tangent"`` for the forward with its derivative.

    Returns
    -------
    ForwardKernel, BackwardKernel or TangentKernel
        A kernel for a target that this machine is not can be built and cached, but not called.

    Raises
    ------
    ValueError
        For an unknown target or direction.

    Notes
    -----
    Looks in this process, in the on-disk cache (``NA_COMPILER_CACHE``), and then compiles, which takes about a second.
    Without a C compiler kernels are built in memory, for this process only.

    Examples
    --------
    >>> import torch
    >>> kernel = compile(Problem((8, 8), heads=2, head_dim=16, kernel_size=3))
    >>> query, key, value = torch.randn(3, 1, 8, 8, 2, 16)
    >>> output, lse = kernel(query, key, value)
    >>> output.shape, lse.shape
    (torch.Size([1, 8, 8, 2, 16]), torch.Size([1, 8, 8, 2]))
    """
    return compile_spec(KernelSpec.make(problem, target, direction))


def is_loaded(spec: KernelSpec) -> bool:
    """Return whether this process has the kernel of a spec."""
    return spec in _kernels


def compile_spec(spec: KernelSpec) -> Kernel:
    """Return the kernel of a spec; see `compile`."""
    kernel = _kernels.get(spec)
    if kernel is None:
        # A lock for each: what is cached waits for nothing that is being compiled.
        with _locks.hold(spec):
            kernel = _kernels.get(spec)
            if kernel is None:
                kernel = _kernels[spec] = _load(spec)
    return kernel


def _load(spec: KernelSpec) -> Kernel:
    entry = cached_entry(spec)
    if entry is not None:
        return _of_entry(spec, entry)
    if not is_compiling_allowed():
        raise MissingKernelError(spec.problem, spec.direction, spec.target.name)
    if spec.target.device_type == "cpu" and spec.target.runs_here and c_compiler() is None:
        _say_once(
            "no C compiler was found: kernels are built in memory, again in every process; install one, or set CC"
        )
        from na_compiler.compiler.build import build_in_memory  # noqa: PLC0415

        function, module = build_in_memory(spec)
        return make_kernel(spec.info, _in_this_process(function), module)
    return _of_entry(spec, make_entry(spec))


def _of_entry(spec: KernelSpec, entry: cache.Entry) -> Kernel:
    if entry.reason:
        _say_once(f"{spec.problem} {spec.direction} for {spec.target}: {entry.reason}", about=entry.reason)
    function = load_function(entry.library, spec.target.device_type) if spec.target.runs_here else None
    return make_kernel(entry.info, function)


def _in_this_process(function: Callable[..., None]) -> Callable[..., None]:
    """Refuse to run in a forked child what runs on TVM's threads there, and would wait for them for ever."""
    process = os.getpid()

    def run(*arguments: object) -> None:
        if os.getpid() != process:
            raise RuntimeError(
                "kernels that were built in memory do not run in forked children; set CC to a C compiler"
            )
        function(*arguments)

    return run


def cached_entry(spec: KernelSpec) -> cache.Entry | None:
    """Return the cache's entry of a spec, if there is one. Needs no plan."""
    try:
        return cache.find(spec.key)
    except (OSError, cache.DamagedEntryError):
        return None


def kernel_by_key(key: str) -> Kernel:
    """Return the kernel of a key, from a loaded bundle or the cache.

    Raises
    ------
    KeyError
        If neither has it: a key does not say enough to compile it.
    """
    for bundle in loaded_bundles():
        kernel = bundle.by_key(key)
        if kernel is not None:
            return kernel
    if key not in _by_key:
        try:
            entry = cache.find(key)
        except (FileNotFoundError, cache.DamagedEntryError):
            raise KeyError(
                f"no kernel {key} in a loaded bundle or the cache; load the bundle that was made with this program, or "
                f"make one with na-compile"
            ) from None
        _by_key[key] = make_kernel(
            entry.info, load_function(entry.library, Target.parse(entry.info.target).device_type)
        )
    return _by_key[key]


def make_entry(spec: KernelSpec, pool: Pool | None = None) -> cache.Entry:
    """Compile a spec that is not cached, or wait for the process that does; where there is no cache, for this one.

    Parameters
    ----------
    spec
        What to compile.
    pool
        Whose processes compile; default: see `na_compiler.compiler.build.build_library`.
    """

    def build(path: Path) -> None:
        from na_compiler.compiler.build import build_library  # noqa: PLC0415

        with _announced(spec) if pool is None else contextlib.nullcontext():
            build_library(spec, path, pool)
        if spec.target.device_type == "cuda":
            remember_version()

    try:
        return cache.make(spec.key, spec.describe, build)
    except OSError as error:
        _say_once(f"the cache in {cache_folder()} cannot be used, kernels are kept for this process only: {error}")
    folder = process_folder() / "kernels"
    try:
        folder.mkdir(exist_ok=True)
        return cache.write_entry(folder / spec.key, spec.key, spec.describe(), build)
    except OSError as error:
        raise OSError(
            error.errno,
            f"a kernel can be written neither to the cache in {cache_folder()} nor to {folder} ({error.strerror}); set "
            f"NA_COMPILER_CACHE or TMPDIR to a folder that has room",
        ) from error


def _say_once(message: str, about: str | None = None) -> None:
    """Warn, once of each thing that a message is about; what follows of the same kind is for those who want it all."""
    _LOG.log(logging.INFO if (about or message) in _said else logging.WARNING, "%s", message)
    _said.add(about or message)


@contextlib.contextmanager
def _announced(spec: KernelSpec) -> Iterator[None]:
    """Say what takes so long, if it does: a line on standard error, unless the program has set up logging."""
    timer = threading.Timer(_PATIENCE, _announce, [spec])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _announce(spec: KernelSpec) -> None:
    message = f"na_compiler: compiling {spec}, once on this machine"
    if _LOG.level == logging.NOTSET and not _LOG.hasHandlers():
        print(message, file=sys.stderr, flush=True)
    else:
        _LOG.info("%s", message)
