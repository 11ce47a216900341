"""Which kernel serves a problem: one of its own, or the open one of its rule, which serves every layout.

In this order: a kernel of its own that a loaded bundle, this process or the cache has; the open kernel of a loaded
bundle; and then, as `na_compiler.specialize` says, a kernel of its own compiled now, or the open one, which is compiled
once for all layouts. By default the first few layouts get their own: a program of one size, or of a model's few, runs
as fast as it can, and one of many sizes waits for a few kernels and not for each. Where compiling is forbidden the
open kernel of the cache serves what nothing else does.

Both forms agree to rounding, not to the bit. So what serves a problem does not change within a process: once it is the
open kernel, one of its own that turns up in the cache is for later processes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

from na_compiler.compiler.kernels import cached_entry, compile_spec, is_loaded, make_entry
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.runtime.bundle import loaded_bundles
from na_compiler.runtime.jit import ALWAYS, BACKGROUND, FEW, is_compiling_allowed, specialization
from na_compiler.runtime.kernel import Kernel
from na_compiler.schedules.choose import takes
from na_compiler.target import Target

__all__ = ["OFTEN", "STEP", "find_kernel", "forget", "met_often"]

_LOG = logging.getLogger("na_compiler")
# Calls of one layout after which it gets a kernel of its own, in the background. Assumed: what is called so often in a
# process is called in the next one as well; a validation set of images of all sizes never gets there.
OFTEN = 20
# Queries of a call, along all axes, that make it a step of a stream. Those of a tile of AVX-512: with more of them the
# kernel of all calls is no slower.
STEP = 16
# Layouts of a rule that get kernels of their own by default. An open kernel takes up to 1.1 times as long at most
# sizes, and one of its own up to a second to compile. Assumed: programs that know their sizes have no more of one rule.
_MOST_OWN = 4
# Windows that an axis has to hold for the open backward to serve it by default: below, strips made for any layout lie
# mostly beyond it. Of 56x56 tokens, with a window of 7 and dilation 8, it took 8 times as long as one of its own.
_LEAST_WINDOWS = 3


@dataclass(frozen=True)
class _Served:
    """Layouts of a rule that this process has met, by what serves them; there may be thousands."""

    own: set[tuple[int, ...]] = field(default_factory=set)
    opened: set[tuple[int, ...]] = field(default_factory=set)


_served: dict[Hashable, _Served] = {}
_queue: list[KernelSpec] = []
_lock = threading.Lock()


def find_kernel(
    problem: Problem, direction: str, machine: str | Target = "llvm", *, rounds: bool = False, steps: bool = False
) -> Kernel:
    """Return the kernel that serves a problem on a device of this machine; its problem may be the one that is open.

    Parameters
    ----------
    problem, direction, machine
        Which kernel.
    rounds
        Whether products of float32 may round to TF32. Kernels of bundles do what they were compiled for, and come
        first all the same: there may be nothing else to compile with.
    steps
        Of an open layout, whether calls have no more than `STEP` queries. There may be a kernel for such calls.

    Raises
    ------
    MissingKernelError
        If none is there, and compiling is switched off.
    """
    machine = Target.parse(machine)
    kernel = _of_bundle(problem, direction, machine)
    if kernel is not None:
        return kernel
    rounded = KernelSpec.rounded(problem, machine, direction) if rounds else None
    if rounded is not None and (is_compiling_allowed() or cached_entry(rounded) is not None):
        return compile_spec(rounded)
    spec = KernelSpec.make(problem, machine, direction)
    if problem.is_open:
        step = KernelSpec.of_steps(problem, machine, direction) if steps else spec
        return compile_spec(step if is_compiling_allowed() or cached_entry(step) is not None else spec)
    served, layout = _served_of(spec), problem.layout
    is_there = layout not in served.opened and (is_loaded(spec) or cached_entry(spec) is not None)
    opened = None if is_there else _open_kernel(spec, served)
    if opened is None:
        kernel = compile_spec(spec)
        if len(served.own) < _MOST_OWN:
            served.own.add(layout)
        return kernel
    if layout not in served.opened:
        served.opened.add(layout)
        _LOG.info("%s is served by the open kernel, for %s", spec, opened.problem)
    return opened


def _of_bundle(problem: Problem, direction: str, machine: Target) -> Kernel | None:
    for bundle in loaded_bundles():
        kernel = bundle.find(problem, direction, machine)
        if kernel is not None:
            return kernel
    return None


def _served_of(spec: KernelSpec) -> _Served:
    with _lock:
        return _served.setdefault((spec.problem.opened(), spec.direction, spec.target), _Served())


def forget(problem: Problem, direction: str, machine: Target) -> None:
    """Let a problem get a kernel of its own at the next look, whatever serves it now."""
    _served_of(KernelSpec(problem, direction, machine)).opened.discard(problem.layout)


def _open_kernel(spec: KernelSpec, served: _Served) -> Kernel | None:
    """Return the open kernel for a spec, where that is what serves it."""
    opened = KernelSpec(spec.problem.opened(), spec.direction, spec.target)
    if not takes(opened.problem, opened.target, opened.direction):
        return None
    kernel = _of_bundle(opened.problem, opened.direction, opened.target)
    if kernel is not None:
        return kernel
    may_compile = is_compiling_allowed()
    if may_compile and spec.problem.layout not in served.opened:
        when = specialization()
        is_among_few = spec.problem.layout in served.own or len(served.own) < _MOST_OWN or _is_short(spec)
        if when == ALWAYS or (when == FEW and is_among_few):
            return None
    is_there = is_loaded(opened) or cached_entry(opened) is not None
    # Where there is none and none can be made the error names the problem's own.
    return compile_spec(opened) if is_there or may_compile else None


def _is_short(spec: KernelSpec) -> bool:
    """Return whether the open kernel would take much longer than one of the spec's own."""
    problem = spec.problem
    axes = zip(problem.layout, problem.kernel_size, problem.dilation, strict=True)
    return spec.direction == "backward" and any(
        tokens < _LEAST_WINDOWS * kernel * dilation for tokens, kernel, dilation in axes
    )


def met_often(problem: Problem, direction: str, machine: str | Target) -> None:
    """Note that the open kernel has served a problem `OFTEN` times.

    If `na_compiler.specialize` says ``"background"``, a kernel of its own is compiled in a process beside this one, for
    later processes.
    """
    if specialization() != BACKGROUND or not is_compiling_allowed():
        return
    with _lock:
        _queue.append(KernelSpec.make(problem, machine, direction))
        if len(_queue) == 1:
            threading.Thread(target=_compile_queued, name="na_compiler-specialize", daemon=True).start()


def _compile_queued() -> None:
    """Compile what is queued, one after another, in another process."""
    from na_compiler.compiler.workers import POOL  # noqa: PLC0415

    while True:
        with _lock:
            spec = _queue[0]
        try:
            if cached_entry(spec) is None:
                make_entry(spec, POOL)
        except Exception as error:  # noqa: BLE001 - the open kernel serves it, whatever this is
            _LOG.warning("%s gets no kernel of its own: %s", spec, error)
        with _lock:
            del _queue[0]
            if not _queue:
                return
