"""``na-compile bench --suite hopper`` and ``--suite small``: problems on an H100 or H200, forward or backward.

Useful operations only: two products over the pairs that the windows need, five of a backward, of the whole operation
from tensors as they lie. Beside it, from the same run: what a matrix product reaches, cuDNN's dense attention over the
same tokens, compiled FlexAttention with the neighborhood as its block mask, and where flash-attn-4 is installed FA4's
block-sparse kernel, whose tokens are put in the order of its tiles beforehand. Every result is first compared with the
float64 reference, on tokens drawn anew.

Kernels are compiled where TVM is and run where it need not be::

    na-compile bench --suite hopper --backward --save BUNDLE      # no GPU needed
    na-compile bench --suite hopper --backward --bundle BUNDLE    # on the GPU
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any

from rich.console import Console

from na_compiler.cli.gpu_suites import SUITES, Row
from na_compiler.cli.output import notes, print_json, print_table

__all__ = ["run", "save"]

_TARGET = "cuda:sm_90a"
_SIZE = 8192  # of the matrix product


def save(folder: str, suite: str, directions: tuple[str, ...]) -> None:
    """Compile a suite's kernels into a bundle; needs no GPU."""
    from na_compiler.compiler.bundle import save_bundle  # noqa: PLC0415
    from na_compiler.compiler.spec import KernelSpec  # noqa: PLC0415

    save_bundle(folder, [KernelSpec.make(row.problem, _TARGET, name) for row in SUITES[suite] for name in directions])


def run(options: argparse.Namespace) -> None:
    """Check and time a suite on the GPU."""
    direction = "backward" if options.backward else "forward"
    if options.save:
        # A backward begins with a forward.
        save(options.save, options.suite, ("forward", "backward") if options.backward else ("forward",))
        return
    import torch  # noqa: PLC0415

    from na_compiler.cli.gpu_peers import PEERS, missing  # noqa: PLC0415
    from na_compiler.runtime.bundle import load_bundle  # noqa: PLC0415

    if not torch.cuda.is_available():
        raise RuntimeError(f"the suite {options.suite} runs on a GPU, and there is none; with --save it only compiles")
    if options.bundle:
        load_bundle(options.bundle)
    console = notes(options)
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, seed {seed}"
    console.print(machine, soft_wrap=True)
    skip = list(options.skip)
    for name in PEERS:
        absent = missing(name)
        if absent is not None and name not in skip:
            console.print(f"without {name}: {absent}", soft_wrap=True)
            skip.append(name)
    rows = []
    for row in SUITES[options.suite]:
        with torch.cuda.stream(torch.cuda.Stream()):
            rows.append(_time(row, direction, skip, options.seconds, console))
        times = ", ".join(f"{name} {time:.4g}" for name, time in rows[-1]["milliseconds"].items())
        console.print(f"{row.title}, milliseconds: {times}", soft_wrap=True)
        torch.cuda.empty_cache()
    if options.json:
        print_json({"machine": machine, "rows": rows})
    else:
        _print_rows(rows, options.goals)


def _time(row: Row, direction: str, skip: list[str], seconds: float, console: Console) -> dict[str, Any]:
    import torch  # noqa: PLC0415

    from na_compiler.cli.gpu_peers import PEERS, Inputs, dense  # noqa: PLC0415
    from na_compiler.timing.gpu import interleave  # noqa: PLC0415

    inputs = Inputs(row, direction)
    whole = dense(row.problem)
    runs: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}
    for name, make in PEERS.items():
        if name in skip:
            continue
        try:
            peer = make(inputs)
            result = peer.natural(peer.call())
            inputs.check(name, result, whole if name == "cuDNN, dense" else row.problem)
            runs[name] = peer.call
        except Exception as error:
            if name == "ours":
                raise
            failures[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            console.print(f"{row.title}: {name} does not run here: {failures[name]}", soft_wrap=True)
    one, other = torch.randn(2, _SIZE, _SIZE, device="cuda", dtype=torch.bfloat16)
    runs["matrix product"] = functools.partial(torch.mm, one, other)
    times = interleave(runs, seconds)
    operations = dict.fromkeys(runs, row.flops[direction])
    operations["matrix product"] = 2 * _SIZE**3
    operations["cuDNN, dense"] = whole.flops(row.batch, direction=direction)
    return {
        "title": row.title,
        "problem": str(row.problem),
        "batch": row.batch,
        "direction": direction,
        "goals": row.goals.get(direction),
        "natten": row.natten.get(direction),
        "milliseconds": times,
        "teraflops": {name: operations[name] / milliseconds / 1e9 for name, milliseconds in times.items()},
        "failures": failures,
    }


def _print_rows(rows: list[dict[str, Any]], goals: bool) -> None:
    cells = []
    for row in rows:
        rates, times = row["teraflops"], row["milliseconds"]

        def cell(name: str, rates: dict[str, float] = rates, times: dict[str, float] = times) -> str:
            return f"{rates[name]:.0f} ({times[name]:.3g})" if name in rates else "-"

        over = f"{times['FlexAttention'] / times['ours']:.2f}" if "FlexAttention" in times else "-"
        asked = [f"{goal:.0f}" for goal in row["goals"] or ()] or ["-", "-"]
        natten = "-" if row["natten"] is None else f"{row['natten']:.0f}"
        others = (cell("FA4 kernel"), cell("FlexAttention"), over, cell("cuDNN, dense"))
        peers = (natten, *others, f"{rates['matrix product']:.0f}")
        cells.append((row["title"], cell("ours"), *(asked if goals else ()), *peers))
    names = ("NATTEN", "FA4 kernel", "FlexAttention", "over it", "cuDNN, dense", "matrix product")
    columns = ("problem", "ours", *(("least", "possible") if goals else ()), *names)
    print_table(columns, cells, f"{rows[0]['direction']}: useful TFLOP/s (and milliseconds)", numbers=columns[1:])
