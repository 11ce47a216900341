"""``na-compile bench --tangents``: what forward mode costs, against the forward, both in one interleaved run.

A kernel in the direction "tangent" computes output and lse and the tangents of both: six products where the forward has
two, twice the tensors. What it returns is compared with forward mode of the float64 reference first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from na_compiler.cli.output import print_json, print_table
from na_compiler.problem import Problem
from na_compiler.timing.cpu import interleave

if TYPE_CHECKING:
    import argparse

__all__ = ["run"]

# Relative error, ``|x - reference| / |reference|``, up to which a float32 result counts as right.
_TOLERANCE = 1e-5
# Beside the suite: small windows, where the time is that of reading and writing.
_SMALL = (
    ("2-D, window of 3", Problem((128, 128), 4, 32, 3)),
    ("2-D, one key", Problem((256, 256), 2, 64, 1)),
)


def run(options: argparse.Namespace, problems: Iterable[tuple[str, Problem]]) -> None:
    """Check and time forward mode of some problems, by their titles."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(options.threads)
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    rows = [_row(title, problem, options.seconds) for title, problem in (*problems, *_SMALL)]
    if options.json:
        print_json({"rows": rows})
        return
    columns = ("problem", "forward, ms", "with tangents, ms", "over the forward")
    cells = [(row["title"], *(f"{row[name]:.2f}" for name in ("forward", "tangent", "ratio"))) for row in rows]
    print_table(columns, cells, "forward mode: medians of one interleaved run", numbers=columns[1:])


def _row(title: str, problem: Problem, seconds: float) -> dict[str, Any]:
    import torch  # noqa: PLC0415

    from na_compiler.functional import na1d, na2d, na3d  # noqa: PLC0415
    from na_compiler.reference import neighborhood_attention  # noqa: PLC0415

    attend: Callable[..., Any] = {1: na1d, 2: na2d, 3: na3d}[problem.rank]
    shape, dtype = (6, 1, *problem.layout, problem.heads, problem.head_dim), getattr(torch, problem.dtype)
    tensors = tuple(torch.randn(shape).to(dtype))
    inputs, tangents, window = tensors[:3], tensors[3:], problem.kernel_size

    def moved() -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.func.jvp(lambda q, k, v: attend(q, k, v, window), inputs, tangents)
        return found[0], found[1]

    some = torch.randperm(problem.tokens)[:64]
    expected = torch.func.jvp(
        lambda q, k, v: neighborhood_attention(q, k, v, window, tokens=some)[0],
        *(tuple(tensor.double() for tensor in each) for each in (inputs, tangents)),
    )[1]
    error = ((moved()[1].flatten(1, -3)[:, some].double() - expected).norm() / expected.norm()).item()
    if not error < _TOLERANCE:
        raise RuntimeError(f"the tangent of {problem} is wrong: relative error {error:.1e}")
    times = interleave({"forward": lambda: attend(*inputs, window), "tangent": moved}, seconds)
    milliseconds = {name: 1e3 * time for name, time in times.items()}
    return {"title": title, "problem": str(problem), **milliseconds, "ratio": times["tangent"] / times["forward"]}
