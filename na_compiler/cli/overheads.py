"""What ``na-compile bench`` measures beside its tables: a call, neighbours on the cores, dtypes, targets, compiling."""

from __future__ import annotations

import functools
import statistics
import time
from typing import TYPE_CHECKING, Any

from na_compiler.problem import Problem
from na_compiler.timing.cpu import Run, interleave, repeated

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["measure_overheads"]

_PROBLEM = Problem((56, 56), 4, 32, 7)


def measure_overheads(seconds: float) -> dict[str, float]:
    """Return figures by what they are."""
    import torch  # noqa: PLC0415

    with torch.inference_mode():
        return {
            "na2d on a 4x4 layout in inference_mode, us above the bare kernel": _call(),
            **_beside_products(seconds),
            "bfloat16, time over float32 (56x56, kernel 7)": _bfloat16(seconds / 2),
            **_other_targets(seconds / 2),
            **_compile_seconds(),
        }


def _call() -> float:
    import torch  # noqa: PLC0415

    from na_compiler.functional import na2d  # noqa: PLC0415

    query, key, value = torch.randn(3, 1, 4, 4, 1, 8).unbind()
    kernel, output, lse = _kernel(Problem((4, 4), 1, 8, 3), query, key, value)
    bare = min(repeated(lambda: kernel.function(query, key, value, 0.35, output, lse)) for _ in range(20))
    return 1e6 * (min(repeated(lambda: na2d(query, key, value, 3)) for _ in range(20)) - bare)


def _kernel(problem: Problem, query: Tensor, key: Tensor, value: Tensor, target: str = "llvm") -> tuple[Any, Any, Any]:
    """Return a kernel, and what it makes of some tensors."""
    from na_compiler.compiler.kernels import compile as compile_kernel  # noqa: PLC0415

    kernel: Any = compile_kernel(problem, target)
    return kernel, *kernel(query, key, value)


def _beside_products(seconds: float) -> dict[str, float]:
    """Measure kernels right after matrix products, and these beside kernels."""
    import torch  # noqa: PLC0415

    query, key, value = torch.randn(3, 1, 56, 56, 4, 32)
    kernel, output, lse = _kernel(_PROBLEM, query, key, value)
    matrix, product = torch.randn(512, 512), torch.empty(512, 512)

    def attend() -> None:
        kernel.function(query, key, value, 0.2, output, lse)

    def multiply() -> None:
        torch.mm(matrix, matrix, out=product)

    alone, multiply_alone, after, multiply_mixed = _mixed(attend, multiply, seconds)
    return {
        "right after torch.mm, time over the kernel alone": after / alone,
        "torch.mm mixed with kernels, time over torch.mm alone": multiply_mixed / multiply_alone,
    }


def _mixed(attend: Run, multiply: Run, seconds: float) -> list[float]:
    """Return medians of each alone, and of both in turn; alone and mixed alternate in short spells."""
    times: list[list[float]] = [[], [], [], []]
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for series, run in zip(times[:2], (attend, multiply), strict=True):
            for _ in range(20):
                start = time.perf_counter()
                run()
                series.append(time.perf_counter() - start)
        for _ in range(20):
            start = time.perf_counter()
            multiply()
            between = time.perf_counter()
            attend()
            times[2].append(time.perf_counter() - between)
            times[3].append(between - start)
    return list(map(statistics.median, times))


def _bfloat16(seconds: float) -> float:
    import torch  # noqa: PLC0415

    from na_compiler.functional import na2d  # noqa: PLC0415

    query, key, value = torch.randn(3, 1, 56, 56, 4, 32).unbind()
    q, k, v = query.bfloat16(), key.bfloat16(), value.bfloat16()
    runs: dict[str, Run] = {"float32": lambda: na2d(query, key, value, 7), "bfloat16": lambda: na2d(q, k, v, 7)}
    times = interleave(runs, seconds)
    return times["bfloat16"] / times["float32"]


def _other_targets(seconds: float) -> dict[str, float]:
    """Measure what code for AVX2 does, where the machine has AVX-512."""
    import torch  # noqa: PLC0415

    from na_compiler.target import Target  # noqa: PLC0415

    if not Target.parse("llvm:x86-64-v4").runs_here:
        return {}
    query, key, value = torch.randn(3, 1, 56, 56, 4, 32).unbind()
    runs: dict[str, Run] = {}
    for target in ("llvm:x86-64-v3", "llvm:x86-64-v4"):
        kernel, output, lse = _kernel(_PROBLEM, query, key, value, target)
        runs[target] = functools.partial(kernel.function, query, key, value, 0.2, output, lse)
    times = interleave(runs, seconds)
    return {"AVX2, rate over that of AVX-512 (56x56, kernel 7)": times["llvm:x86-64-v4"] / times["llvm:x86-64-v3"]}


def _compile_seconds() -> dict[str, float]:
    """Measure compiling one problem, with TVM loaded."""
    import tempfile  # noqa: PLC0415
    from pathlib import Path  # noqa: PLC0415

    from na_compiler.compiler.build import build_library  # noqa: PLC0415
    from na_compiler.compiler.spec import KernelSpec  # noqa: PLC0415

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for direction in ("forward", "backward"):
            spec = KernelSpec.make(_PROBLEM, "llvm", direction)
            seconds = []
            for number in range(4):
                start = time.perf_counter()
                build_library(spec, Path(folder) / f"{direction}{number}.so")
                seconds.append(time.perf_counter() - start)
            # The first one loads TVM.
            found[f"compiling a {direction}, s"] = statistics.median(seconds[1:])
    return found
