"""``na-compile bench --suite sizes``: images of many sizes, one after another, as a detection backbone meets them.

One open kernel serves them all. It is compared with a kernel of its own for each size, compiled before it is timed, and
with torch's attention where that can be had: FlexAttention compiled for dynamic shapes, and a mask, which of a large
image does not fit into memory. Of each size the two run in turn a few times, and the quickest of each counts; sums over
sizes are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from na_compiler.cli import competitors
from na_compiler.cli.output import notes, print_json, print_table
from na_compiler.compiler.kernels import compile_spec
from na_compiler.compiler.parallel import compile_all
from na_compiler.compiler.spec import KernelSpec
from na_compiler.devices.cpu import processor
from na_compiler.functional import na2d
from na_compiler.problem import Problem
from na_compiler.runtime.jit import specialize
from na_compiler.timing.cpu import Run

__all__ = ["run"]

# Of the first stage of a detection backbone: images of about 200 to 1000 pixels, in patches of 4, a multiple of 8 wide
# as loaders pad them.
_SMALLEST, _LARGEST = 56, 200
_WINDOW, _HEADS, _HEAD_DIM = 7, 4, 32
_DILATIONS = (1, 8)
_REPEATS = 3
_CACHE = "NA_COMPILER_CACHE"
# Pairs of tokens up to which a mask is made: a GiB of booleans.
_MASKED_PAIRS = 2**26


def run(options: argparse.Namespace) -> None:
    """Run the suite."""
    torch.set_num_threads(options.threads)
    seed = random.SystemRandom().randrange(2**16)
    draw = random.Random(seed)  # noqa: S311 - sizes, no secrets
    sizes = [(draw.randint(_SMALLEST, _LARGEST), draw.randint(_SMALLEST, _LARGEST)) for _ in range(options.sizes)]
    machine = f"{processor()}, {options.threads} threads, torch {torch.__version__}, seed {seed}"
    notes(options).print(machine, soft_wrap=True)
    with _only_the_open_kernel():
        rows = [_row(sizes, dilation, seed, options.skip) for dilation in _DILATIONS]
    if options.json:
        print_json({"machine": machine, "rows": rows})
        return
    columns = ("dilation", "what", "sizes", "total, ms", "open, ms", "over open")
    cells = [
        (str(row["dilation"]), name, str(one["sizes"]), f"{one['total']:.0f}", f"{one['open']:.0f}",
         f"{one['total'] / one['open']:.2f}")
        for row in rows for name, one in row["competitors"].items()
    ]  # fmt: skip
    title = f"{options.sizes} image sizes of {_SMALLEST} to {_LARGEST}, window {_WINDOW}, {_HEADS} heads of {_HEAD_DIM}"
    print_table(columns, cells, title, numbers=columns[2:])
    for row in rows:
        print_table(
            ("measure", "ms"),
            [(name, f"{value:.2f}") for name, value in row["open"].items()],
            f"the open kernel, dilation {row['dilation']}",
            numbers=("ms",),
        )


@contextlib.contextmanager
def _only_the_open_kernel() -> Iterator[None]:
    """Have the open kernel serve all sizes, also those of which the cache has kernels of their own."""
    before, cache = specialize("never"), os.environ.get(_CACHE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[_CACHE] = folder
        try:
            yield
        finally:
            specialize(before)
            del os.environ[_CACHE]
            os.environ.update({} if cache is None else {_CACHE: cache})


def _row(sizes: Sequence[tuple[int, int]], dilation: int, seed: int, skip: Sequence[str]) -> dict[str, Any]:
    """Time one dilation."""
    rule = Problem((None, None), _HEADS, _HEAD_DIM, _WINDOW, dilation=dilation)
    started = time.perf_counter()
    compile_spec(KernelSpec.make(rule))
    compiling = 1e3 * (time.perf_counter() - started)
    opened: list[float] = []
    first: list[float] = []
    for size in sizes:
        attend = _ours(_draw(rule, size, seed))
        first.append(_milliseconds(attend))
        opened.append(min(_milliseconds(attend) for _ in range(_REPEATS)))
    found = {name: _beside(rule, sizes, make, seed) for name, make in _makers(rule, sizes, skip).items()}
    later = sorted(one - again for one, again in zip(first, opened, strict=True))
    measures = {"compiling, once": compiling, "all sizes, first call of each": sum(first)}
    measures |= {"all sizes, repeated": sum(opened), "what a first call takes longer, median": later[len(later) // 2]}
    measures["what a first call takes longer, most"] = later[-1]
    return {"dilation": dilation, "open": measures, "competitors": {name: one for name, one in found.items() if one}}


def _beside(
    rule: Problem, sizes: Sequence[tuple[int, int]], make: Callable[[competitors.Inputs], Run | None], seed: int
) -> dict[str, Any]:
    """Time a competitor in turn with the open kernel, at each size that it takes; nothing if it takes none."""
    totals: dict[str, Any] = {"sizes": 0, "total": 0.0, "open": 0.0}
    for size in dict.fromkeys(sizes):
        inputs = _draw(rule, size, seed)
        other, attend = make(inputs), _ours(inputs)
        if other is None:
            continue
        other()
        times = [(_milliseconds(other), _milliseconds(attend)) for _ in range(_REPEATS)]
        theirs, ours = (min(column) for column in zip(*times, strict=True))
        totals = {"sizes": totals["sizes"] + 1, "total": totals["total"] + theirs, "open": totals["open"] + ours}
    return totals if totals["sizes"] else {}


def _draw(rule: Problem, size: tuple[int, int], seed: int) -> competitors.Inputs:
    return competitors.Inputs.draw(rule.replace(layout=size), seed)


def _ours(inputs: competitors.Inputs) -> Run:
    problem = inputs.problem
    return lambda: na2d(inputs.query, inputs.key, inputs.value, problem.kernel_size, dilation=problem.dilation)


def _makers(
    rule: Problem, sizes: Sequence[tuple[int, int]], skip: Sequence[str]
) -> dict[str, Callable[[competitors.Inputs], Run | None]]:
    """Return what else there is: of inputs, what to time, or ``None`` where that cannot be had."""
    dynamic = torch.compile(_flex(), dynamic=True)

    def own(inputs: competitors.Inputs) -> Run:
        function = compile_spec(KernelSpec.make(inputs.problem)).function
        scale = inputs.problem.head_dim**-0.5

        def run() -> None:
            output, lse = torch.empty_like(inputs.query), inputs.query.new_empty(inputs.query.shape[:-1])
            function(inputs.query, inputs.key, inputs.value, scale, output, lse)

        return run

    def flex(inputs: competitors.Inputs) -> Run | None:
        if rule.dilation != (1, 1):
            return None
        try:
            made = competitors.flex_attention(inputs, dynamic)
            made()
        except Exception:  # noqa: BLE001 - a competitor that does not run is a result too
            return None
        return made

    def masked(inputs: competitors.Inputs) -> Run | None:
        return competitors.masked_sdpa(inputs) if inputs.problem.tokens**2 <= _MASKED_PAIRS else None

    found: dict[str, Callable[[competitors.Inputs], Run | None]] = {
        "a kernel of its own": own,
        "FlexAttention, dynamic": flex,
        "masked SDPA": masked,
    }
    made = {name: make for name, make in found.items() if name not in skip}
    if "a kernel of its own" in made:
        # All at once, on all cores: it is not timed.
        with compile_all([KernelSpec.make(rule.replace(layout=size)) for size in dict.fromkeys(sizes)]):
            pass
    return made


def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415

    return flex_attention


def _milliseconds(attend: Run) -> float:
    start = time.perf_counter()
    attend()
    return 1e3 * (time.perf_counter() - start)
