"""Whether kernels may be compiled when they are first needed, and what is said where one is missing."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar

from na_compiler.borders import joined
from na_compiler.problem import Problem

__all__ = [
    "ALWAYS",
    "BACKGROUND",
    "FEW",
    "NEVER",
    "MissingKernelError",
    "command_for",
    "compiling",
    "is_compiling_allowed",
    "specialization",
    "specialize",
]


class _Block:
    """A block of `compiling` that is open."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self.thread = threading.get_ident()


# The innermost one of this thread, or of this task; and those of the process. A task that outlives the block in which
# it was started still has it as its own, though it is open no more.
_own: ContextVar[_Block | None] = ContextVar("na_compiler_compiling", default=None)
_open: list[_Block] = []
# In a forked child there is only the thread that forked: nobody would ever leave the blocks of the others.
os.register_at_fork(
    after_in_child=lambda: _open.__setitem__(
        slice(None), [block for block in _open if block.thread == threading.get_ident()]
    )
)
_VALUES = {"0": False, "false": False, "off": False, "1": True, "true": True, "on": True, "": True}


# When layouts that are met get kernels of their own.
ALWAYS, FEW, BACKGROUND, NEVER = _WHEN = ("always", "few", "background", "never")
_said: str | None = None


def specialize(when: str | None) -> str:
    """Say when a layout that has no kernel gets one of its own; until then an open kernel serves it, of every layout.

    Parameters
    ----------
    when
        ``"few"``, the default: as soon as it is met, which waits for a compiler, if it is among the first four layouts
        of its problem that the process meets; all others are served by one kernel, compiled once. ``"always"``: as soon
        as it is met, each. ``"never"``: one kernel serves all layouts; those that have kernels of their own, in a
        bundle or the cache, keep them. ``"background"``: likewise, and a layout that is called often gets a kernel of
        its own, compiled beside the program, for later processes: what serves a layout does not change within one.
        ``None``: what ``NA_COMPILER_SPECIALIZE`` says.

    Returns
    -------
    str
        What it was before.

    Raises
    ------
    ValueError
        If it is another word.

    Notes
    -----
    Problems that have no open kernels (borders but ``"shift"``, GPUs) get kernels of their own in any case. Where
    compiling is switched off, an open kernel that is there serves all layouts, whatever is said here.

    Examples
    --------
    >>> before = specialize("never")
    >>> specialize(None)
    'never'
    """
    global _said  # noqa: PLW0603 - of the whole process
    before = specialization()
    if when is not None and when not in _WHEN:
        raise ValueError(f"when must be one of {', '.join(map(repr, _WHEN))}, or None, got {when!r}")
    _said = when
    return before


def specialization() -> str:
    """Return when layouts get kernels of their own: as `specialize` says, or else ``NA_COMPILER_SPECIALIZE``.

    Raises
    ------
    ValueError
        If the variable is none of the words.
    """
    if _said is not None:
        return _said
    named = os.environ.get("NA_COMPILER_SPECIALIZE", "") or FEW
    if named not in _WHEN:
        raise ValueError(f"NA_COMPILER_SPECIALIZE must be one of {', '.join(_WHEN)}, got {named!r}")
    return named


class MissingKernelError(RuntimeError):
    """A kernel is in no bundle and not in the cache, and compiling is switched off."""

    def __init__(self, problem: Problem, direction: str, target: str) -> None:
        super().__init__(
            f"no kernel for {problem} {direction} on {target}, and compiling is switched off; add it to a bundle "
            f"with:  {command_for(problem, direction, target)}"
        )


@contextlib.contextmanager
def compiling(allowed: bool) -> Iterator[None]:
    """Allow or forbid compiling within a block, whatever ``NA_COMPILER_JIT`` says.

    Parameters
    ----------
    allowed
        False makes a kernel that is neither in a bundle nor in the cache an error, `MissingKernelError`, which names
        the command that would add it.

    Notes
    -----
    It holds in the whole process while the block lasts: in threads that it did not start as well, such as those in
    which torch's autograd runs backwards. A thread or task in a block of its own, or started from within one, follows
    that. Any other may compile if none of the blocks that are open forbids it.

    Examples
    --------
    >>> with compiling(False):
    ...     is_compiling_allowed()
    False
    """
    block = _Block(allowed)
    _open.append(block)
    token = _own.set(block)
    try:
        yield
    finally:
        _own.reset(token)
        _open.remove(block)


def is_compiling_allowed() -> bool:
    """Return whether kernels may be compiled now: as `compiling` says, or else ``NA_COMPILER_JIT`` (default 1).

    Raises
    ------
    ValueError
        If the variable is neither 0 nor 1.
    """
    own, blocks = _own.get(), tuple(_open)
    if own in blocks:
        return own.allowed
    if blocks:
        return all(block.allowed for block in blocks)
    named = os.environ.get("NA_COMPILER_JIT", "")
    if named.lower() not in _VALUES:
        raise ValueError(f"NA_COMPILER_JIT must be 0 or 1, got {named!r}")
    return _VALUES[named.lower()]


# What asks for a direction beside the forward.
_FLAGS: dict[str, list[str]] = {"forward": [], "backward": ["--training"], "tangent": ["--tangents"]}


def command_for(problem: Problem, direction: str, target: str, bundle: str = "BUNDLE") -> str:
    """Return the command that makes a bundle with a kernel."""

    def times(values: tuple[int, ...]) -> str:
        return "x".join(map(str, values))

    layout = "x".join(["any"] * problem.rank) if problem.is_open else times(problem.layout)
    words = ["na-compile problem", f"--layout {layout}", f"--heads {problem.heads}"]
    words += [f"--head-dim {problem.head_dim}", f"--kernel-size {times(problem.kernel_size)}"]
    if problem.heads_kv != problem.heads:
        words.append(f"--heads-kv {problem.heads_kv}")
    if problem.head_dim_v != problem.head_dim:
        words.append(f"--head-dim-v {problem.head_dim_v}")
    for name in ("stride", "dilation"):
        if any(value != 1 for value in getattr(problem, name)):
            words.append(f"--{name} {times(getattr(problem, name))}")
    if any(problem.is_causal):
        words.append("--causal " + "x".join("1" if flag else "0" for flag in problem.is_causal))
    if problem.has_borders:
        words.append(f"--border {joined(problem.border)}")
    words += ["--additional-kv"] * problem.additional_kv
    words += [f"--operand {name}" for name in problem.operands]
    if problem.dtype != "float32":
        words.append(f"--dtype {problem.dtype}")
    words += _FLAGS[direction]
    return " ".join([*words, f"--target {target}", f"-o {bundle}"])
