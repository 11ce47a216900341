"""Shorthand for writing TensorIR from Python functions, with TVM's IR builder.

The descriptions are plain functions that emit TensorIR where they are called, so that one function can describe a
step for the forward, the backward, the window and the additional keys. (TVMScript's own ``T.inline`` does this too,
but each call walks and reads the whole Python stack: half a second a kernel.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

__all__ = ["block", "local", "prim_func", "reduction", "steps", "update"]


@contextlib.contextmanager
def block(name: str, extents: tuple[Any, ...], where: Callable[..., Any] | None = None) -> Iterator[tuple[Any, ...]]:
    """Open a loop nest and a spatial block in it; yields the block's iterators.

    Parameters
    ----------
    name
        What schedules know the block by.
    extents
        Of the loops, outermost first.
    where
        From the loop variables to the condition under which the block runs; ``None`` for always.
    """
    with _nest(name, "S" * len(extents), extents, where) as iterators:
        yield iterators


@contextlib.contextmanager
def reduction(name: str, spatial: tuple[Any, ...], reduced: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Open a loop nest and a block that reduces over the innermost loops; yields the block's iterators."""
    with _nest(name, "S" * len(spatial) + "R" * len(reduced), (*spatial, *reduced), None) as iterators:
        yield iterators


@contextlib.contextmanager
def _nest(
    name: str, kinds: str, extents: tuple[Any, ...], where: Callable[..., Any] | None
) -> Iterator[tuple[Any, ...]]:
    with T.grid(*extents) as variables, T.sblock(name):
        loops = variables if len(extents) > 1 else (variables,)
        iterators = T.axis.remap(kinds, list(loops))
        condition = None if where is None else where(*loops)
        if condition is not None:
            T.where(condition)
        yield tuple(iterators) if len(extents) > 1 else (iterators,)


@contextlib.contextmanager
def update(name: str, extents: tuple[int, ...], vector: int) -> Iterator[tuple[Any, ...]]:
    """Open a loop nest, vectorised over its last axis, and a block that changes a buffer in place.

    Yields the block's iterators. TensorIR's schedule refuses to vectorise a block that reads what it writes, so these
    loops are written as they are to run.
    """
    *outer, width = extents
    if width % vector:
        vector = 1
    with contextlib.ExitStack() as stack:
        loops = stack.enter_context(T.grid(*outer, width // vector))
        lane = stack.enter_context(T.vectorized(vector))
        stack.enter_context(T.sblock(name))
        *places, part = loops if outer else (loops,)
        iterators = [T.axis.spatial(extent, place) for extent, place in zip(outer, places, strict=True)]
        yield (*iterators, T.axis.spatial(width, part * vector + lane))


def local(shape: tuple[int, ...], dtype: str = "float32") -> Any:
    """Allocate a buffer that belongs to the block around."""
    return T.sblock_alloc_buffer(shape, dtype)


def prim_func(parameters: dict[str, Any], body: Callable[..., None]) -> Any:
    """Make a function ``main`` of named parameters.

    Parameters
    ----------
    parameters
        Name to a dtype, for a scalar, or to the arguments of ``T.match_buffer``, for a tensor.
    body
        Called with one variable or buffer for each parameter; emits the function's body.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"global_symbol": "main", "tirx.noalias": True})
            arguments = {}
            for name, kind in parameters.items():
                arguments[name] = T.arg(name, T.handle() if isinstance(kind, dict) else getattr(T, kind)())
            buffers = [
                IRBuilder.name(name, T.match_buffer(arguments[name], **kind))
                if isinstance(kind, dict)
                else arguments[name]
                for name, kind in parameters.items()
            ]
            body(*buffers)
        return builder.get()


def steps(schedule: Any) -> list[Any]:
    """Return the blocks of a schedule of TVM's that hold no others: what is to be scheduled, by names."""

    def inside(outer: Any) -> Iterator[Any]:
        for inner in schedule.get_child_blocks(outer):
            if schedule.get_child_blocks(inner):
                yield from inside(inner)
            else:
                yield inner

    return list(inside(schedule.get_sblock("root")))
