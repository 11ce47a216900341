"""``na-compile bench --suite onnx``: the operator in ONNX Runtime against what any runtime can do without our library.

Sessions have thread pools of their own, whose threads spin for a while after a run: each competitor is let come to rest
before another is timed.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from na_compiler.cli.output import notes, print_json, print_table
from na_compiler.compiler.bundle import save_bundle
from na_compiler.compiler.kernels import compile as compile_kernel
from na_compiler.compiler.spec import KernelSpec
from na_compiler.functional import na2d
from na_compiler.onnx import build_library, export, register
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention, neighborhood_mask
from na_compiler.timing.cpu import Run, interleave

__all__ = ["run"]

PROBLEM = Problem((56, 56), heads=4, head_dim=32, kernel_size=13)
_TOLERANCE = 1e-5
_REST_SECONDS = 0.03


class _Attention(torch.nn.Module):
    """The operator, as a model."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = na2d(query, key, value, PROBLEM.kernel_size)
        return output


class _MaskedAttention(torch.nn.Module):
    """Torch's attention with the neighborhood as a mask; takes and returns what suits it best, heads first."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", neighborhood_mask(PROBLEM))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)


class _Nothing(torch.nn.Module):
    """What is left of a session's run without attention."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return query + 0, key.flatten()[:1] + value.flatten()[:1]


@dataclass(frozen=True)
class _Figure:
    name: str
    value: float
    asked: str
    reached: bool


def run(options: argparse.Namespace) -> None:
    """Time everything and print a table; the options are those of ``na-compile bench``."""
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    about = f"{PROBLEM}, {options.threads} threads, ONNX Runtime {onnxruntime.__version__}"
    notes(options).print(about, soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="na_compiler-bench-") as folder:
        # What torch's exporter says of itself is nothing that a reader of figures can act on.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            models = _models(Path(folder))
        times = _times(models, Path(folder), options)
        figures = [*_speeds(times), *_memory(models), *_library(Path(folder))]
    if options.json:
        data = {"milliseconds": {k: 1e3 * v for k, v in times.items()}, "figures": [vars(f) for f in figures]}
        print_json({"machine": about, **data})
        return
    rows = [(name, f"{1e3 * seconds:.2f}") for name, seconds in times.items()]
    print_table(("run", "median, ms"), rows, "one interleaved run", numbers=("median, ms",))
    columns = ("figure", "value", "goal", "") if options.goals else ("figure", "value")
    verdicts = {True: "reached", False: "missed"}
    cells = [(figure.name, f"{figure.value:.3g}", figure.asked, verdicts[figure.reached]) for figure in figures]
    print_table(columns, [row[: len(columns)] for row in cells], numbers=("value",))


def _models(folder: Path) -> dict[str, Path]:
    """Export what is compared."""
    last = [torch.zeros(1, *PROBLEM.layout, PROBLEM.heads, PROBLEM.head_dim) for _ in range(3)]
    first = [tensor.flatten(1, 2).transpose(1, 2).contiguous() for tensor in last]
    names = ["query", "key", "value"]
    paths = {name: folder / f"{name}.onnx" for name in ("generic", "blocked", "masked SDPA", "empty session")}
    for body in ("generic", "blocked"):
        export(_Attention(), last, paths[body], body=body, input_names=names)
    export(_MaskedAttention(), first, paths["masked SDPA"], input_names=names)
    export(_Nothing(), last, paths["empty session"], input_names=names)
    return paths


def _times(models: dict[str, Path], folder: Path, options: argparse.Namespace) -> dict[str, float]:
    save_bundle(folder / "bundle", [KernelSpec.make(PROBLEM)])
    tensors = torch.randn(3, 1, *PROBLEM.layout, PROBLEM.heads, PROBLEM.head_dim).unbind()
    query, key, value = tensors
    kernel: Any = compile_kernel(PROBLEM)
    output, lse = kernel(query, key, value)
    last = dict(zip(("query", "key", "value"), (tensor.numpy() for tensor in tensors), strict=True))
    first = {name: np.ascontiguousarray(array.reshape(1, -1, *array.shape[3:]).transpose(0, 2, 1, 3))
             for name, array in last.items()}  # fmt: skip
    scale = PROBLEM.head_dim**-0.5
    runs: dict[str, Run] = {"bare kernel": lambda: kernel.function(query, key, value, scale, output, lse)}
    expected, _ = neighborhood_attention(query.double(), key.double(), value.double(), PROBLEM.kernel_size)
    sessions = {"library": _session(models["generic"], options.threads, folder / "bundle")}
    sessions |= {name: _session(path, options.threads) for name, path in models.items()}
    for name, session in sessions.items():
        if name in options.skip:
            continue
        feeds = first if name == "masked SDPA" else last
        runs[name] = lambda session=session, feeds=feeds: session.run(None, feeds)  # type: ignore[misc]
        if name != "empty session":
            _check(name, runs[name]()[0], expected)
    return interleave(runs, options.seconds, _REST_SECONDS)


def _session(path: Path, threads: int, bundle: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if bundle is not None:
        register(options, bundle)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _check(name: str, output: np.ndarray[Any, Any], expected: torch.Tensor) -> None:
    result = torch.from_numpy(output).double()
    if result.shape != expected.shape:
        result = result.transpose(1, 2).unflatten(1, PROBLEM.layout)
    error = ((result - expected).norm() / expected.norm()).item()
    if not error < _TOLERANCE:
        raise RuntimeError(f"{name} is wrong: relative error {error:.1e}")


def _speeds(times: dict[str, float]) -> list[_Figure]:
    figures = []
    ours = times["library"]
    share = (ours - times["empty session"]) / times["bare kernel"]
    figures.append(_Figure("library, less an empty session, over the bare kernel", share, "<= 1.15", share <= 1.15))
    for name, asked in (("masked SDPA", 40), ("generic", 25), ("blocked", 5)):
        if name in times:
            ratio = times[name] / ours
            figures.append(_Figure(f"{name} over the library", ratio, f">= {asked}", ratio >= asked))
    if {"blocked", "masked SDPA"} <= set(times):
        ratio = times["blocked"] / times["masked SDPA"]
        figures.append(_Figure("blocked over masked SDPA, time", ratio, "<= 0.2", ratio <= 0.2))
    return figures


# What a process grows by when it makes a session and runs it twice; of its own, so that nothing else is counted.
_GROWTH = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime
def kib(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
rng = np.random.default_rng()
feeds = {name: rng.standard_normal(eval(sys.argv[2]), np.float32) for name in ("query", "key", "value")}
before = kib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for _ in range(2):
    session.run(None, feeds)
print((kib("VmHWM") - before) / 1024)
"""


def _memory(models: dict[str, Path]) -> list[_Figure]:
    tokens, heads, head_dim = PROBLEM.tokens, PROBLEM.heads, PROBLEM.head_dim
    last = (1, *PROBLEM.layout, heads, head_dim)
    shapes = {"generic": last, "blocked": last, "masked SDPA": (1, heads, tokens, head_dim)}
    growth = {}
    for name, shape in shapes.items():
        command = [sys.executable, "-c", _GROWTH, str(models[name]), str(shape)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        growth[name] = float(result.stdout)
    ratio = growth["blocked"] / growth["masked SDPA"]
    figures = [_Figure(f"{name}, peak memory, MiB", value, "", reached=True) for name, value in growth.items()]
    return [*figures, _Figure("blocked over masked SDPA, peak memory", ratio, "<= 0.5", ratio <= 0.5)]


def _library(folder: Path) -> list[_Figure]:
    started = time.perf_counter()
    size = build_library(folder / "library").stat().st_size / 1000
    seconds = time.perf_counter() - started
    return [
        _Figure("building the operator library, s", seconds, "<= 5", seconds <= 5),
        _Figure("its size, kB", size, "<= 100", size <= 100),
    ]
