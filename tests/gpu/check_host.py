"""Checks on a GPU of the host's part of a call: its time beside SDPA's, and CUDA graphs.

On a machine with the compiler::

    python tests/gpu/check_host.py build FOLDER --target cuda:sm_90a

On the machine with the GPU::

    python tests/gpu/check_host.py run FOLDER

The problem is so small that the device waits for the host. The exit status is the number of checks that failed.
``--device cpu`` rehearses it with a bundle for the CPU, but for the graphs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import na_compiler
from na_compiler import na2d
from na_compiler.ops.plain import PLAIN
from na_compiler.problem import Problem

PROBLEM = Problem((8, 8), 2, 64, 3, dtype="float16")
# What a call may take of the time that SDPA takes on the host.
LIMIT = 1.3
CALLS, ROUNDS = 200, 15


def main() -> int:
    """Build the bundle, or run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="cuda:sm_90a")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.command == "build":
        directions = ("forward", "backward")
        specs = [na_compiler.KernelSpec.make(PROBLEM, options.target, direction) for direction in directions]
        na_compiler.save_bundle(options.folder, specs)
        return 0
    na_compiler.load_bundle(options.folder)
    torch.set_num_threads(1)
    checks: list[Callable[[str], str]] = [plain, *(timed(mode) for mode in ("inference_mode", "no_grad", "training"))]
    if options.device == "cuda":
        checks += [graph, reduce_overhead]
    failed = 0
    with na_compiler.compiling(False):
        for check in checks:
            try:
                print(f"ok      {check.__name__}: {check(options.device)}", flush=True)
            except Exception:  # noqa: BLE001
                failed += 1
                print(f"FAILED  {check.__name__}", flush=True)
                traceback.print_exc()
    return failed


def tensors(device: str, *shape: int, grad: bool = False) -> list[torch.Tensor]:
    """Draw a query, a key and a value."""
    return [torch.randn(shape, dtype=torch.float16, device=device, requires_grad=grad) for _ in range(3)]


def plain(device: str) -> str:
    """Ordinary tensors take the short way in all modes."""
    keys = []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            keys.append(torch._C._dispatch_keys(tensors(device, 1, 8, 8, 2, 64)[0]))
    wrong = [str(one) for one in keys if one.raw_repr() not in PLAIN]
    assert not wrong, f"these go through the dispatcher: {wrong}"
    return str(keys[-1])


def timed(mode: str) -> Callable[[str], str]:
    """Make the check of a mode."""

    def check(device: str) -> str:
        ours, theirs = tensors(device, 1, 8, 8, 2, 64), tensors(device, 1, 2, 64, 64)
        ratios, best = [], [float("inf"), float("inf")]
        for _ in range(ROUNDS):
            times = [seconds(lambda: na2d(*ours, 3), ours, mode), seconds(lambda: sdpa(*theirs), theirs, mode)]
            ratios.append(times[0] / times[1])
            best = [min(pair) for pair in zip(best, times, strict=True)]
        ratio = statistics.median(ratios)
        said = f"{ratio:.2f} of SDPA's time on the host ({1e6 * best[0]:.1f} and {1e6 * best[1]:.1f} us)"
        assert ratio <= LIMIT, said
        return said

    check.__name__ = f"host time, {mode}"
    return check


sdpa = F.scaled_dot_product_attention


def seconds(run: Callable[[], Any], inputs: list[torch.Tensor], mode: str) -> float:
    """Return what a call takes on the host: many one after another, without waiting for the device in between."""
    if mode == "training":
        for tensor in inputs:
            tensor.requires_grad_()
        grad = torch.ones_like(run())

        def step() -> None:
            run().backward(grad)
    else:
        step = run  # type: ignore[assignment]
    context = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}.get(mode, torch.enable_grad)
    with context():
        for _ in range(5):
            step()
        synchronize(inputs[0])
        started = time.perf_counter()
        for _ in range(CALLS):
            step()
        taken = time.perf_counter() - started
        synchronize(inputs[0])
    for tensor in inputs:
        tensor.requires_grad_(mode == "training").grad = None
    return taken / CALLS


def synchronize(tensor: torch.Tensor) -> None:
    """Wait for the device."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


def graph(device: str) -> str:
    """A CUDA graph that holds the first call with some shapes."""
    inputs = tensors(device, 2, 8, 8, 2, 64)
    captured = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        na2d(*inputs, 3)  # Loads the kernel, which a capture does not allow.
        torch.cuda.synchronize()
        na_compiler.ops.kernels._kernels.clear()
        with torch.cuda.graph(captured):
            output = na2d(*inputs, 3)
        for tensor in inputs:
            tensor.normal_()
        captured.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(output, na2d(*inputs, 3))
    return "replayed on other inputs"


def reduce_overhead(device: str) -> str:
    """Training under ``torch.compile(mode="reduce-overhead")``, whose graphs free what was allocated in them."""
    na_compiler.ops.kernels._kernels.clear()

    def loss(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return na2d(query, key, value, 3).float().square().mean()

    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        inputs = tensors(device, 2, 8, 8, 2, 64, grad=True)
        compiled(*inputs).backward()
        grads = [tensor.grad.clone() for tensor in inputs]
        expected = torch.autograd.grad(loss(*inputs), inputs)
        torch.testing.assert_close(grads, list(expected), rtol=1e-2, atol=1e-4)
    return "six steps"


if __name__ == "__main__":
    sys.exit(main())
