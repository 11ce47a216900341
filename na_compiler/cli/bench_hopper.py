"""``na-compile bench --suite hopper``: video and image sized problems on an H100 or H200.

Useful operations only: two products over the pairs that the windows need, of the whole operation from query, key and
value as they lie. Beside it, from the same run: what a matrix product reaches, cuDNN's dense attention over the same
tokens, and compiled FlexAttention with the neighborhood as its block mask. Every result is first compared with the
float64 reference, on queries drawn anew.

Kernels are compiled where TVM is and run where it need not be::

    na-compile bench --suite hopper --save BUNDLE      # no GPU needed
    na-compile bench --suite hopper --bundle BUNDLE    # on the GPU
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from na_compiler.cli.output import notes, print_json, print_table
from na_compiler.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SUITE", "Row", "run", "save"]

_TARGET = "cuda:sm_90a"
# Relative error up to which a bfloat16 result counts as right.
_TOLERANCE = 1e-2
# Queries of each head that are compared with the reference.
_SAMPLE = 128
_SIZE = 8192  # of the matrix product


Ints = int | tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A problem, and useful TFLOP/s: the least that is asked for, what should be possible, what NATTEN publishes.

    NATTEN's figures are for an H100 with its permutation of tokens (its documentation's sample outputs).
    """

    title: str
    problem: Problem
    floor: float
    goal: float
    natten: float | None = None


def _row(
    title: str, layout: Ints, heads: int, kernel: Ints, stride: Ints, floor: float, goal: float, natten: float | None
) -> Row:
    return Row(title, Problem(layout, heads, 128, kernel, stride, dtype="bfloat16"), floor, goal, natten)


_IMAGE, _VIDEO, _COSMOS = (256, 256), (30, 48, 80), (24, 44, 80)
SUITE = (
    _row("image, window 80x80, stride 16", _IMAGE, 24, 80, 16, 500, 600, 486),
    _row("image, window 80x80", _IMAGE, 24, 80, 1, 380, 480, 277),
    _row("video, window 18x24x24, stride 16x8x8", _VIDEO, 24, (18, 24, 24), (16, 8, 8), 500, 600, 504),
    _row("video, window 18x24x24", _VIDEO, 24, (18, 24, 24), 1, 270, 370, 174),
    _row("sequence, window 2048", 32768, 1, 2048, 1, 370, 520, 362),
    _row("sequence, window 2048, stride 256", 32768, 1, 2048, 256, 480, 560, 548),
    _row("video, window 24x12x24, stride 1x4x8", _COSMOS, 16, (24, 12, 24), (1, 4, 8), 450, 580, None),
)


def save(folder: str) -> None:
    """Compile the suite's kernels into a bundle; needs no GPU."""
    from na_compiler.compiler.bundle import save_bundle  # noqa: PLC0415
    from na_compiler.compiler.spec import KernelSpec  # noqa: PLC0415

    save_bundle(folder, [KernelSpec.make(row.problem, _TARGET) for row in SUITE])


def run(options: argparse.Namespace) -> None:
    """Check and time the suite on the GPU."""
    if options.save:
        save(options.save)
        return
    import torch  # noqa: PLC0415

    from na_compiler.runtime.bundle import load_bundle  # noqa: PLC0415

    if not torch.cuda.is_available():
        raise RuntimeError("the suite hopper runs on a GPU, and there is none; with --save it only compiles")
    if options.bundle:
        load_bundle(options.bundle)
    console = notes(options)
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, seed {seed}"
    console.print(machine, soft_wrap=True)
    rows = []
    for row in SUITE:
        rows.append(_time(row, options.skip, options.seconds, console))
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in rows[-1]["teraflops"].items())
        console.print(f"{row.title}, TFLOP/s: {rates}", soft_wrap=True)
        torch.cuda.empty_cache()
    if options.json:
        print_json({"machine": machine, "rows": rows})
    else:
        _print_rows(rows, options.goals)


class _Inputs:
    """Tensors of one row on the GPU, and what the reference makes of some queries."""

    def __init__(self, problem: Problem) -> None:
        import torch  # noqa: PLC0415

        self.problem = problem
        shape = (1, *problem.layout, problem.heads, problem.head_dim)
        self.tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        self.tokens = torch.randperm(problem.tokens, device="cuda")[:_SAMPLE]

    def heads_first(self) -> list[Any]:
        """Return ``[batch, heads, tokens, head_dim]``: views, nothing is copied."""
        return [tensor.flatten(1, -3).transpose(1, 2) for tensor in self.tensors]

    def expected(self, problem: Problem) -> Tensor:
        """Return the output of some queries in float64, ``[heads, queries, head_dim]``; by head, to save memory."""
        import torch  # noqa: PLC0415

        from na_compiler.reference import neighborhood_attention  # noqa: PLC0415

        found = []
        for head in range(problem.heads):
            query, key, value = (tensor[..., head : head + 1, :].double() for tensor in self.tensors)
            output, _ = neighborhood_attention(
                query,
                key,
                value,
                problem.kernel_size,
                problem.stride,
                problem.dilation,
                problem.is_causal,
                tokens=self.tokens,
            )
            found.append(output.flatten(0, 1).flatten(1))
        return torch.stack(found)

    def check(self, name: str, output: Tensor, expected: Tensor) -> None:
        """Compare an output, ``[heads, tokens, head_dim]``."""
        error = ((output[:, self.tokens].double() - expected).norm() / expected.norm()).item()
        if not error < _TOLERANCE:
            raise RuntimeError(f"{name} is wrong: relative error {error:.1e}")


def _time(row: Row, skip: list[str], seconds: float, console: Console) -> dict[str, Any]:
    import torch  # noqa: PLC0415

    problem = row.problem
    inputs = _Inputs(problem)
    dense = problem.replace(kernel_size=problem.layout, stride=1)
    runs: dict[str, Callable[[], Any]] = {}
    failures: dict[str, str] = {}
    makers = {"ours": _ours, "FlexAttention": _flex, "cuDNN, dense": _dense}
    for name, make in makers.items():
        if name in skip:
            continue
        try:
            call = make(inputs)
            output = call()
            as_rows = output.flatten(1, -3)[0].transpose(0, 1) if name == "ours" else output[0]
            inputs.check(name, as_rows, inputs.expected(dense if name == "cuDNN, dense" else problem))
            del output, as_rows
            runs[name] = call
        except Exception as error:
            if name == "ours":
                raise
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            console.print(f"{row.title}: {name} does not run here: {failures[name]}")
    one, other = torch.randn(2, _SIZE, _SIZE, device="cuda", dtype=torch.bfloat16)
    runs["matrix product"] = functools.partial(torch.mm, one, other)
    times = _interleave(runs, seconds)
    operations = {name: problem.flops() for name in runs}
    operations["matrix product"] = 2 * _SIZE**3
    operations["cuDNN, dense"] = dense.flops()
    return {
        "title": row.title,
        "problem": str(problem),
        "floor": row.floor,
        "goal": row.goal,
        "natten": row.natten,
        "milliseconds": times,
        "teraflops": {name: operations[name] / milliseconds / 1e9 for name, milliseconds in times.items()},
        "failures": failures,
    }


def _ours(inputs: _Inputs) -> Callable[[], Any]:
    from na_compiler.functional import na1d, na2d, na3d  # noqa: PLC0415

    problem = inputs.problem
    attend: Any = {1: na1d, 2: na2d, 3: na3d}[problem.rank]
    return functools.partial(attend, *inputs.tensors, problem.kernel_size, stride=problem.stride)


def _dense(inputs: _Inputs) -> Callable[[], Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: PLC0415
    from torch.nn.functional import scaled_dot_product_attention  # noqa: PLC0415

    tensors = inputs.heads_first()

    def call() -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*tensors)

    return call


def _flex(inputs: _Inputs) -> Callable[[], Any]:
    import torch  # noqa: PLC0415
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: PLC0415

    problem = inputs.problem

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        seen = None
        axes = zip(problem.layout, problem.kernel_size, problem.stride, strict=True)
        for extent, kernel, stride in reversed(list(axes)):
            leader = (query % extent // stride * stride + stride // 2).clamp(max=extent - 1)
            start = (leader - kernel // 2).clamp(0, extent - kernel)
            place = key % extent
            along = (place >= start) & (place < start + kernel)
            seen = along if seen is None else seen & along
            query, key = query // extent, key // extent
        assert seen is not None  # There is an axis.
        return seen

    blocks = create_block_mask(sees, None, None, problem.tokens, problem.tokens, device="cuda", _compile=True)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, *inputs.heads_first(), block_mask=blocks)


def _interleave(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Run everything in turn until the time is up; returns medians in milliseconds, by the GPU's clock.

    Calls are captured in graphs, several of a short one, so that what the host takes to launch them is not timed.
    """
    import torch  # noqa: PLC0415

    graphs = {name: _captured(call) for name, call in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    spent = 0.0
    while spent < 1e3 * seconds or len(times["ours"]) < 5:
        marks = []
        for name, (graph, calls) in graphs.items():
            # What takes long runs a few times only.
            if len(times[name]) >= 3 and times[name][0] > 100 * seconds:
                continue
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()
            begin.record()
            graph.replay()
            end.record()
            marks.append((name, calls, begin, end))
        torch.cuda.synchronize()
        for name, calls, begin, end in marks:
            times[name].append(begin.elapsed_time(end) / calls)
            spent += 2 * calls * times[name][-1]
    return {name: statistics.median(values) for name, values in times.items()}


def _captured(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return a graph of as many calls as take about two milliseconds, and how many these are."""
    import torch  # noqa: PLC0415

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    calls = max(1, int(2 / max(begin.elapsed_time(end), 0.01)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph, calls


def _print_rows(rows: list[dict[str, Any]], goals: bool) -> None:
    columns = ["problem", "ours", "NATTEN, published", "FlexAttention", "over it", "cuDNN, dense", "matmul"]
    if goals:
        columns += ["floor", "goal"]
    cells = []
    for row in rows:
        rates, times = row["teraflops"], row["milliseconds"]

        def cell(name: str, rates: dict[str, float] = rates, times: dict[str, float] = times) -> str:
            return f"{rates[name]:.0f} ({times[name]:.3g})" if name in rates else "-"

        over = f"{times['FlexAttention'] / times['ours']:.2f}" if "FlexAttention" in times else "-"
        published = "-" if row["natten"] is None else f"{row['natten']:.0f}"
        made = (row["title"], cell("ours"), published, cell("FlexAttention"), over, cell("cuDNN, dense"),
                f"{rates['matrix product']:.0f}", f"{row['floor']:.0f}", f"{row['goal']:.0f}")  # fmt: skip
        cells.append(made[: len(columns)])
    print_table(columns, cells, "useful TFLOP/s (and milliseconds)", numbers=columns[1:])
