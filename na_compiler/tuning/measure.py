"""How long kernels take on the device present: compiled, compared with each other, and timed in turn."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from na_compiler.compiler.kernels import compile, compile_spec, make_entry  # noqa: A004
from na_compiler.compiler.spec import KernelSpec
from na_compiler.compiler.workers import Pool
from na_compiler.devices.cuda import CUDA
from na_compiler.operands import BATCH, GIVEN, INPUT, KEY_MASK, OUTPUT, SCALAR
from na_compiler.runtime.kernel import Kernel
from na_compiler.runtime.threads import cores
from na_compiler.target import Target
from na_compiler.workspace import ADDITIONAL

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["device_of", "seconds_of"]

# Additional keys and values of problems that have them.
_ADDITIONAL = 16
# Relative difference from what the first one computes, up to which a result is the same.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}


def device_of(target: Target) -> str:
    """Return the name of the device of this machine that kernels for a target run on.

    Raises
    ------
    ValueError
        If there is none.
    RuntimeError
        If there is no torch.
    """
    if not target.devices_here:
        kind = target.device.kind
        raise ValueError(
            f"target {target} does not run on this machine, and kernels are timed where they run; tune there, or for "
            f"{'llvm, this CPU' if kind != 'llvm' else Target.parse('llvm')}"
        )
    if importlib.util.find_spec("torch") is None:
        raise RuntimeError("kernels are timed on torch's tensors, and there is no torch; pip install torch")
    if target.device is not CUDA:
        return target.devices_here[0]
    import torch  # noqa: PLC0415

    name = torch.cuda.get_device_name()
    if name not in target.devices_here:
        raise ValueError(
            f"target {target} runs on {', '.join(target.devices_here)}, and the current GPU is {name}; choose another "
            f"with CUDA_VISIBLE_DEVICES"
        )
    return name


def seconds_of(
    specs: list[KernelSpec],
    batch: int,
    seconds: float,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[KernelSpec, float], dict[KernelSpec, str]]:
    """Return how long the kernels of one problem take, and why some are left out.

    Parameters
    ----------
    specs
        What to time, of one problem, direction and target.
    batch
        Batch entries.
    seconds
        Time for all of them, beside compiling.
    jobs
        Processes that compile; default: one for each core.
    progress
        Called with how many are compiled, and how many there are.
    """
    failed = _compile(specs, jobs or cores(), progress)
    given = _operands(specs[0], batch)
    runs: dict[KernelSpec, Callable[[], object]] = {}
    expected: list[Tensor] | None = None
    with _stream(specs[0].target):
        for spec in (spec for spec in specs if spec not in failed):
            try:
                call, results = _prepared(compile_spec(spec), given)
                call()
                difference = 0.0 if expected is None else _difference(results, expected)
            except Exception as error:  # noqa: BLE001 - one that does not run is a result too
                failed[spec] = _reason(error)
                continue
            if not difference < _TOLERANCE[spec.problem.dtype]:
                failed[spec] = f"its results differ from the first one's by {difference:.1e}"
                continue
            expected = [result.clone() for result in results] if expected is None else expected
            runs[spec] = call
        return _timed(specs[0].target, runs, seconds) if runs else {}, failed


def _compile(specs: list[KernelSpec], jobs: int, progress: Callable[[int, int], None] | None) -> dict[KernelSpec, str]:
    """Compile all at once, into the cache; returns why some could not be."""
    failed: dict[KernelSpec, str] = {}
    pool = Pool(keep=jobs)
    try:
        with ThreadPoolExecutor(jobs) as threads:
            waiting = {threads.submit(make_entry, spec, pool): spec for spec in specs}
            for done, one in enumerate(as_completed(waiting), 1):
                error = one.exception()
                if error is not None:
                    failed[waiting[one]] = _reason(error)
                if progress is not None:
                    progress(done, len(specs))
    finally:
        pool.end()
    return failed


def _reason(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _operands(spec: KernelSpec, batch: int) -> dict[str, Any]:
    """Return what kernels of a spec read, drawn at random; for a backward with what the forward returned."""
    import torch  # noqa: PLC0415

    problem = spec.problem
    sizes = _sizes(batch)
    generator = torch.Generator(spec.target.device_type).manual_seed(1)
    found: dict[str, Any] = {"scale": problem.head_dim**-0.5}
    for argument in spec.info.arguments:
        if argument.role == INPUT:
            dtype = getattr(torch, "float32" if argument.name == KEY_MASK else argument.dtype)
            drawn = torch.randn(argument.sizes(sizes), generator=generator, device=generator.device, dtype=dtype)
            found[argument.name] = drawn > -1 if argument.name == KEY_MASK else drawn
    if spec.direction == "backward":
        forward: Any = compile(problem, spec.target)
        names = [argument.name for argument in forward.info.arguments if argument.role == INPUT]
        found["output"], found["lse"] = forward(**{name: found[name] for name in names})
    return found


def _sizes(batch: int) -> dict[str, int]:
    return {BATCH: batch, GIVEN: batch, ADDITIONAL: _ADDITIONAL}


def _prepared(kernel: Kernel, given: dict[str, Any]) -> tuple[Callable[[], object], list[Tensor]]:
    """Return a call of a kernel, with all that it takes made beforehand, and the tensors that it writes."""
    import torch  # noqa: PLC0415

    query = given["query"]
    batch = query.shape[0]
    taken = [argument for argument in kernel.info.arguments if argument.role in (INPUT, SCALAR)]
    written = [argument for argument in kernel.info.arguments if argument.role == OUTPUT]
    results = [
        torch.full(one.sizes(_sizes(batch)), math.nan, device=query.device, dtype=getattr(torch, one.dtype))
        for one in written
    ]
    spaces = kernel.spaces(query, given.get("additional_keys"))
    arguments = [*(given[argument.name] for argument in taken), *results, *spaces]
    function = kernel.function
    return lambda: function(*arguments), results


def _difference(results: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(results, expected, strict=True)
    # A lone result of zero is equal to itself.
    return max(
        float((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30)) for one, other in pairs
    )


@contextlib.contextmanager
def _stream(target: Target) -> Iterator[None]:
    """Run a block on a stream of its own, on a GPU: the default one cannot be captured."""
    if target.device is not CUDA:
        yield
        return
    import torch  # noqa: PLC0415

    stream: torch.cuda.Stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize()


def _timed(target: Target, runs: dict[KernelSpec, Callable[[], object]], seconds: float) -> dict[KernelSpec, float]:
    if target.device is CUDA:
        from na_compiler.timing import gpu  # noqa: PLC0415

        return {spec: 1e-3 * time for spec, time in gpu.interleave(runs, seconds).items()}
    from na_compiler.timing import cpu  # noqa: PLC0415

    return cpu.interleave(runs, seconds)
