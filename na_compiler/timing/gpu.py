"""Timing on a GPU: everything in CUDA graphs, in turn, by the GPU's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch.cuda import CUDAGraph

__all__ = ["interleave"]

# What runs are known by.
_Name = TypeVar("_Name")

# Milliseconds that a graph takes, about: several calls of a short operation.
_GRAPH = 2.0
_LEAST_ROUNDS = 5
# What takes longer than this share of the time runs in the first rounds only.
_SLOW, _SLOW_ROUNDS = 0.1, 3


def interleave(runs: dict[_Name, Callable[[], object]], seconds: float) -> dict[_Name, float]:
    """Run everything in turn until the time is up; returns medians in milliseconds.

    Calls are captured in graphs, several of a short one, so that what the host takes to launch them is not timed. How
    many follows from the time of a graph of one, not from that of a call, which the host may take longer for. Before
    each graph that is timed runs one that is not, so that the caches hold its own data.

    The current stream must not be the default one, which cannot be captured; and what is called must have been prepared
    on it, because gradients are computed on the stream of what they are gradients of.

    Parameters
    ----------
    runs
        What to run, by name.
    seconds
        Time for all of them.
    """
    graphs = {name: _captured(call) for name, call in runs.items()}
    times: dict[_Name, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + seconds
    rounds = 0
    while rounds < _LEAST_ROUNDS or time.perf_counter() < until:
        for name, (graph, calls) in graphs.items():
            if rounds >= _SLOW_ROUNDS and calls * times[name][0] > 1e3 * seconds * _SLOW:
                continue
            graph.replay()
            times[name].append(_replay(graph) / calls)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def _captured(call: Callable[[], object]) -> tuple[CUDAGraph, int]:
    """Return a graph of as many calls as take about two milliseconds, and how many these are."""
    graph = _capture(call, 1)
    graph.replay()
    calls = max(1, int(_GRAPH / max(_replay(graph), 1e-3)))
    return (graph, 1) if calls == 1 else (_capture(call, calls), calls)


def _capture(call: Callable[[], object], calls: int) -> CUDAGraph:
    import torch  # noqa: PLC0415

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(calls):
            call()
    return graph


def _replay(graph: CUDAGraph) -> float:
    """Return the milliseconds of a graph."""
    import torch  # noqa: PLC0415

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))
