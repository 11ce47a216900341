"""``na-compile bench``: times this package against what else there is, all in one interleaved run.

Machines are noisy: what counts are ratios of medians over rounds in which everything runs in turn. Each result is
compared with the float64 reference before anything is timed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from na_compiler.cli.output import Commands, add_json, notes, print_json, print_table
from na_compiler.cli.overheads import measure_overheads
from na_compiler.devices.cpu import processor
from na_compiler.problem import Problem
from na_compiler.timing.cpu import Run, interleave

if TYPE_CHECKING:
    from torch import Tensor

    from na_compiler.cli.competitors import Inputs

__all__ = ["add_parser"]

# Relative error, ``|x - reference| / |reference|``, up to which a float32 result counts as right.
_TOLERANCE = 1e-5
_SECONDS = 10.0


@dataclass(frozen=True)
class Case:
    """A problem, and what to time it against: name of the competitor to the ratio that is asked for, if any."""

    title: str
    problem: Problem
    forward: dict[str, float | None]
    backward: dict[str, float | None] = field(default_factory=dict)


def _windowed(title: str, problem: Problem, sdpa: float, sdpa_backward: float, flex: float | None) -> Case:
    forward = {"masked SDPA": sdpa, "FlexAttention": flex, "gather": None}
    return Case(title, problem, forward, {"masked SDPA": sdpa_backward})


CPU_SUITE = (
    _windowed("2-D, small window", Problem((56, 56), 4, 32, 7), 55, 50, 35),
    _windowed("2-D, large window", Problem((64, 64), 8, 64, 13), 25, 25, None),
    _windowed("1-D", Problem(4096, 4, 64, 255), 30, 27, 3.5),
    _windowed("3-D", Problem((16, 16, 16), 4, 32, 5), 34, 28, None),
    Case("dense", Problem((32, 32), 4, 64, 32), {"dense SDPA": 1.0}, {"dense SDPA": 1.0}),
)


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("bench", help="time this package against torch's attention")
    suites = ["cpu", "sizes", "hopper", "small", "onnx", "aot"]
    parser.add_argument("--suite", choices=suites, default="cpu", help="which problems (default: cpu)")
    parser.add_argument("--threads", type=int, default=2, help="threads of everything that is timed (default: 2)")
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, help=f"time for each table row (default: {_SECONDS})"
    )
    parser.add_argument("--sizes", type=int, default=200, metavar="N", help="sizes: how many images (default: 200)")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="a competitor to leave out")
    parser.add_argument(
        "--goals", action="store_true", help="beside the figures, what this project asks of itself on its own machines"
    )
    add_json(parser)
    parser.add_argument("--backward", action="store_true", help="hopper, small: time the gradients instead")
    parser.add_argument("--tangents", action="store_true", help="cpu: time forward mode against the forward instead")
    parser.add_argument("--save", metavar="BUNDLE", help="hopper, small: only compile, into a bundle; needs no GPU")
    parser.add_argument("--bundle", metavar="BUNDLE", help="hopper, small: take kernels from what --save wrote")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    for flag in ("backward", "save", "bundle"):
        if getattr(options, flag) and options.suite not in ("hopper", "small"):
            raise ValueError(f"--{flag} goes with --suite hopper and --suite small, and the suite is {options.suite}")
    if options.tangents and options.suite != "cpu":
        raise ValueError(f"--tangents goes with --suite cpu, and the suite is {options.suite}")
    if options.suite == "onnx":
        from na_compiler.cli import bench_onnx  # noqa: PLC0415

        bench_onnx.run(options)
        return
    if options.suite in ("hopper", "small"):
        from na_compiler.cli import bench_hopper  # noqa: PLC0415

        bench_hopper.run(options)
        return
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}")
    if options.suite == "sizes":
        from na_compiler.cli import bench_sizes  # noqa: PLC0415

        bench_sizes.run(options)
        return
    if options.suite == "aot":
        from na_compiler.cli import bench_aot  # noqa: PLC0415

        bench_aot.run(options)
        return
    if options.tangents:
        from na_compiler.cli import bench_tangents  # noqa: PLC0415

        bench_tangents.run(options, [(case.title, case.problem) for case in CPU_SUITE])
        return
    _run_cpu(options)


def _run_cpu(options: argparse.Namespace) -> None:
    import torch  # noqa: PLC0415

    from na_compiler.target import Target  # noqa: PLC0415

    torch.set_num_threads(options.threads)
    console = notes(options)
    seed = int.from_bytes(os.urandom(2), "little")
    machine = (
        f"{processor()}, {Target.parse('llvm')}, {options.threads} threads, torch {torch.__version__}, seed {seed}"
    )
    console.print(machine, soft_wrap=True)
    for case in CPU_SUITE:
        console.print(f"{case.title}: {case.problem}", soft_wrap=True)
    rows: list[dict[str, Any]] = []
    steps = sum(1 + bool(case.backward) for case in CPU_SUITE) + 1
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing", total=steps)
        for case in CPU_SUITE:
            for direction in ("forward", "backward"):
                competitors = getattr(case, direction)
                if competitors:
                    progress.update(task, description=f"{case.title}, {direction}")
                    wanted = {name: ratio for name, ratio in competitors.items() if name not in options.skip}
                    rows.append(_row(case, direction, wanted, options.seconds, seed, progress.console))
                    progress.advance(task)
        progress.update(task, description="overheads")
        overheads = measure_overheads(options.seconds)
    if options.json:
        print_json({"machine": machine, "rows": rows, "overheads": overheads})
        return
    _print_rows(rows, options.goals)
    overhead_rows = [(name, f"{value:.2f}") for name, value in overheads.items()]
    print_table(("measure", "value"), overhead_rows, "overheads", numbers=("value",))


def _row(
    case: Case, direction: str, wanted: dict[str, float | None], seconds: float, seed: int, console: Console
) -> dict[str, Any]:
    """Check and time one problem in one direction."""
    import torch  # noqa: PLC0415

    from na_compiler.cli import competitors  # noqa: PLC0415
    from na_compiler.functional import na1d, na2d, na3d  # noqa: PLC0415

    problem = case.problem
    inputs = competitors.Inputs.draw(problem, seed)
    attend: Callable[..., Any] = {1: na1d, 2: na2d, 3: na3d}[problem.rank]
    runs: dict[str, Run] = {}
    if direction == "forward":
        runs["na_compiler"] = lambda: attend(inputs.query, inputs.key, inputs.value, problem.kernel_size)
        makers: dict[str, Callable[[], Run]] = {
            "masked SDPA": lambda: competitors.masked_sdpa(inputs),
            "dense SDPA": lambda: competitors.dense_sdpa(inputs),
            "FlexAttention": lambda: competitors.flex_attention(inputs),
            "gather": lambda: competitors.gather(inputs),
        }
    else:
        grad = torch.randn_like(inputs.query)
        tensors = [tensor.clone().requires_grad_() for tensor in (inputs.query, inputs.key, inputs.value)]
        output = attend(*tensors, problem.kernel_size)
        runs["na_compiler"] = lambda: torch.autograd.grad(output, tensors, grad, retain_graph=True)
        makers = dict.fromkeys(wanted, lambda: competitors.masked_sdpa_backward(inputs, grad))
    expected = _expected(inputs, None if direction == "forward" else grad)
    failures = {}
    for name in ("na_compiler", *wanted):
        try:
            runs.setdefault(name, makers[name]() if name in makers else runs["na_compiler"])
            _check(name, runs[name](), expected)
        except Exception as error:  # A competitor that does not run is a result too.
            if name == "na_compiler":
                raise
            runs.pop(name, None)
            failures[name] = _reason(error)
            console.print(f"{case.title}: {name} does not run here: {failures[name]}")
    medians = {name: 1e3 * value for name, value in interleave(runs, seconds).items()}
    ours = medians["na_compiler"]
    return {
        "title": case.title,
        "problem": str(problem),
        "direction": direction,
        "milliseconds": medians,
        "ratios": {name: value / ours for name, value in medians.items() if name != "na_compiler"},
        "asked": {name: ratio for name, ratio in wanted.items() if ratio is not None},
        "failures": failures,
        "gflops": problem.flops(direction=direction) / ours / 1e6,
    }


def _expected(inputs: Inputs, grad: Tensor | None) -> list[Tensor]:
    """Return the output, or the gradients, in float64."""
    import torch  # noqa: PLC0415

    from na_compiler.reference import neighborhood_attention  # noqa: PLC0415

    tensors = [tensor.double().requires_grad_(grad is not None) for tensor in (inputs.query, inputs.key, inputs.value)]
    query, key, value = tensors
    output, _ = neighborhood_attention(query, key, value, inputs.problem.kernel_size)
    return [output] if grad is None else list(torch.autograd.grad(output, tensors, grad.double()))


def _check(name: str, results: Tensor | tuple[Tensor, ...], expected: list[Tensor]) -> None:
    for result, reference in zip(results if isinstance(results, tuple) else [results], expected, strict=True):
        error = ((result.double() - reference).norm() / reference.norm()).item()
        if not error < _TOLERANCE:
            raise RuntimeError(f"{name} is wrong: relative error {error:.1e}")


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).replace("\\n", "\n").splitlines() if "error:" in line] or [str(error)]
    return f"{type(error).__name__}: {lines[0].strip()[:160]}"


def _print_rows(rows: list[dict[str, Any]], goals: bool) -> None:
    names = list(dict.fromkeys(name for row in rows for name in (*row["ratios"], *row["failures"])))
    cells = []
    for row in rows:
        ratios = []
        for name in names:
            asked = row["asked"].get(name) if goals else None
            text = (
                f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "failed" if name in row["failures"] else ""
            )
            ratios.append(f"{text} ({asked:g})" if text and asked is not None else text)
        title = row["title"] if row["direction"] == "forward" else f"{row['title']}, backward"
        cells.append((title, f"{row['milliseconds']['na_compiler']:.2f}", f"{row['gflops']:.0f}", *ratios))
    columns = ("problem", "ours, ms", "GFLOP/s", *names)
    title = f"time over ours: medians of one interleaved run{' (goals)' if goals else ''}"
    print_table(columns, cells, title, numbers=columns[1:])
