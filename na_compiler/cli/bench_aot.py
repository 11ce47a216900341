"""``na-compile bench --suite aot``: compiling ahead of inference, bundles, and models as a whole.

The model is a transformer of twelve layers. What attention costs in it is told by the same model with attention
replaced by the identity, and by its kernels alone: all in one interleaved run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from na_compiler.cli.output import print_json, print_table
from na_compiler.problem import Problem
from na_compiler.timing.cpu import interleave

if TYPE_CHECKING:
    import torch

__all__ = ["run"]

_LAYERS, _TOKENS, _DIM, _HEADS, _WINDOW = 12, 28, 256, 8, 7
_PARTS = ("compile", "bundle", "model", "whole")

# In a process of its own: nothing is loaded before it is timed. Memory is had and written once before, and kept by the
# allocator: a first call would be timed with the faults of pages that it is the first to touch, at every size anew.
_KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
_LOAD = """
import json, sys, time
import torch, na_compiler
from na_compiler.runtime.library import load_runtime
import tvm_ffi
load_runtime()
torch.ones(32 << 20)
load_bundle = na_compiler.load_bundle
start = time.perf_counter()
bundle = load_bundle(sys.argv[1])
loaded = time.perf_counter() - start
above = []
with torch.inference_mode():
    for info in bundle:
        p = info.problem
        query = torch.randn(1, *p.layout, p.heads, p.head_dim)
        arguments = (query, query, query)
        if info.direction == "backward":
            arguments += (query, torch.randn(query.shape[:-1]), query)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            bundle.find(p, info.direction)(*arguments)
            times.append(time.perf_counter() - start)
        above.append(times[0] - min(times[1:]))
print(json.dumps({"load": loaded, "above": above, "tvm": "tvm" in sys.modules}))
"""


def run(options: argparse.Namespace) -> None:
    """Measure, and print a table: figures, and those that are asked for."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(options.threads)
    figures: dict[str, tuple[float, str]] = {}
    measures: dict[str, Callable[[argparse.Namespace, Path], dict[str, tuple[float, str]]]] = {
        "compile": _compile,
        "bundle": _bundle,
        "model": _model,
        "whole": _whole,
    }
    with tempfile.TemporaryDirectory(prefix="na_compiler-bench-") as temporary:
        for name in _PARTS:
            if name not in options.skip:
                folder = Path(temporary) / name
                folder.mkdir()
                figures |= measures[name](options, folder)
    if options.json:
        print_json({name: {"value": value, "asked": asked} for name, (value, asked) in figures.items()})
        return
    columns = ("measure", "value", "goal") if options.goals else ("measure", "value")
    rows = [(name, f"{value:.3g}", asked)[: len(columns)] for name, (value, asked) in figures.items()]
    print_table(columns, rows, f"ahead of inference, {options.threads} threads", numbers=("value",))


def problems() -> list[Problem]:
    """Return 24 distinct problems, as one model of several levels may pose them."""
    sizes = [((56, 56), 2), ((28, 28), 4), ((14, 14), 8), ((7, 7), 16)]
    found = [
        Problem(layout, heads, 32, kernel_size, dilation=dilation)
        for (layout, heads), kernel_size, dilation in itertools.product(sizes, (3, 5, 7), (1, 2, 4))
        if kernel_size * dilation <= layout[0]
    ]
    found += [Problem(512, 4, 32, window, is_causal=True) for window in (16, 32, 64, 128)]
    return found[:24]


# ---- na-compile ----------------------------------------------------------------------------------------------------


def _compile(options: argparse.Namespace, folder: Path) -> dict[str, tuple[float, str]]:
    """Time ``na-compile`` on an exported model of 24 problems: cold with all cores and with one, and cached."""
    program = folder / "model.pt2"
    _save_program(program)
    cold = _na_compile(program, folder, "all", options.threads)
    cached = min(_na_compile(program, folder, "all", options.threads) for _ in range(3))
    one = _na_compile(program, folder, "one", 1)
    return {
        "na-compile, 24 problems, cold, s": (cold, "< 20"),
        "the same, cached, s": (cached, "< 2"),
        f"the same, cold, --jobs 1 over --jobs {options.threads}": (one / cold, ""),
    }


def _na_compile(program: Path, folder: Path, cache: str, jobs: int) -> float:
    command = [
        sys.executable,
        "-m",
        "na_compiler.cli",
        str(program),
        "-o",
        str(folder / "kernels"),
        "--jobs",
        str(jobs),
    ]
    environment = {**os.environ, "NA_COMPILER_CACHE": str(folder / f"cache-{cache}")}
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment, capture_output=True)  # noqa: S603
    return time.perf_counter() - start


def _save_program(path: Path) -> None:
    import torch  # noqa: PLC0415

    from na_compiler.functional import na1d, na2d  # noqa: PLC0415

    class Model(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
            found = []
            for tensor, p in zip(tensors, problems(), strict=True):
                attend = na1d if p.rank == 1 else na2d
                found.append(attend(tensor, tensor, tensor, p.kernel_size, p.stride, p.dilation, p.is_causal))
            return found

    tensors = tuple(torch.randn(1, *p.layout, p.heads, p.head_dim) for p in problems())
    torch.export.save(torch.export.export(Model(), tensors), path)


# ---- Bundles -------------------------------------------------------------------------------------------------------


def _bundle(options: argparse.Namespace, folder: Path) -> dict[str, tuple[float, str]]:
    """Time loading a bundle of 48 kernels in a new process, and the first call of each."""
    from na_compiler.compiler.bundle import save_bundle  # noqa: PLC0415
    from na_compiler.compiler.spec import KernelSpec  # noqa: PLC0415

    specs = [KernelSpec.make(p, direction=direction) for p in problems() for direction in ("forward", "backward")]
    save_bundle(folder / "kernels", specs, jobs=options.threads)
    command = [sys.executable, "-c", _LOAD, str(folder / "kernels")]
    environment = {**os.environ, **_KEEPS_MEMORY}
    found = []
    for _ in range(5):
        done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)  # noqa: S603
        found.append(json.loads(done.stdout))
    assert not any(one["tvm"] for one in found), "running from a bundle loaded tvm"
    above = [1e3 * statistics.median(values) for values in zip(*(one["above"] for one in found), strict=True)]
    return {
        f"loading a bundle of {len(specs)} kernels, ms": (
            1e3 * statistics.median(one["load"] for one in found),
            "< 30",
        ),
        "first call of a kernel above the next, ms, median of kernels": (statistics.median(above), "< 1"),
        "the same, the worst kernel": (max(above), "< 1"),
    }


# ---- Models --------------------------------------------------------------------------------------------------------


def transformer(*, is_identity: bool = False) -> torch.nn.Module:
    """Return the transformer; its attention returns value as it is where that is asked for."""
    import torch  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415

    from na_compiler.modules import NeighborhoodAttention2D  # noqa: PLC0415

    class Identity(NeighborhoodAttention2D):
        def forward(self, x: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
            *_, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
            return self.proj(value.flatten(-2))  # type: ignore[no-any-return]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(_DIM), nn.LayerNorm(_DIM)
            self.attn = (Identity if is_identity else NeighborhoodAttention2D)(_DIM, _HEADS, _WINDOW)
            self.mlp = nn.Sequential(nn.Linear(_DIM, 4 * _DIM), nn.GELU(), nn.Linear(4 * _DIM, _DIM))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(_LAYERS))).eval()


def _kernels(x: torch.Tensor) -> Callable[[], None]:
    """Return what runs the model's kernels, and nothing else: each on views of a projection of its own."""
    import torch  # noqa: PLC0415

    from na_compiler.compiler.kernels import compile as compile_kernel  # noqa: PLC0415

    head_dim = _DIM // _HEADS
    kernel: Any = compile_kernel(Problem((_TOKENS, _TOKENS), _HEADS, head_dim, _WINDOW))
    views = [torch.randn(*x.shape[:-1], 3, _HEADS, head_dim).unbind(-3) for _ in range(_LAYERS)]
    results = [kernel(*one) for one in views]
    function = kernel.function

    def attend() -> None:
        for one, result in zip(views, results, strict=True):
            function(*one, head_dim**-0.5, *result)

    return attend


def _model(options: argparse.Namespace, folder: Path) -> dict[str, tuple[float, str]]:
    """Time the transformer with the backend and from a package against the identity's plus the kernels'."""
    import torch  # noqa: PLC0415

    from na_compiler.aot import package  # noqa: PLC0415

    x = torch.randn(1, _TOKENS, _TOKENS, _DIM)
    model, identity = transformer(), transformer(is_identity=True)
    with torch.no_grad():
        package(torch.export.export(model, (x,)), folder / "model.pt2")
        path = torch._inductor.aoti_compile_and_package(  # noqa: SLF001
            torch.export.export(identity, (x,)), package_path=str(folder / "identity.pt2")
        )
        compiled: Any = torch.compile(model, backend="na_compiler", fullgraph=True)
        compiled_identity: Any = torch.compile(identity, fullgraph=True)
        packaged: Any = torch._inductor.aoti_load_package(str(folder / "model.pt2"))  # noqa: SLF001
        packaged_identity: Any = torch._inductor.aoti_load_package(path)  # noqa: SLF001
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(packaged(x), model(x), rtol=1e-4, atol=1e-4)
        compiled_identity(x)
        times = interleave(
            {
                "backend": lambda: compiled(x),
                "identity, backend": lambda: compiled_identity(x),
                "package": lambda: packaged(x),
                "identity, package": lambda: packaged_identity(x),
                "kernels": _kernels(x),
                "eager": lambda: model(x),
            },
            4 * options.seconds,
        )
    return {
        "12 layers with the backend over identity and kernels": (
            times["backend"] / (times["identity, backend"] + times["kernels"]),
            "< 1.05",
        ),
        "12 layers by AOTInductor over identity and kernels": (
            times["package"] / (times["identity, package"] + times["kernels"]),
            "< 1.05",
        ),
        "the kernels' part of the latter": (times["kernels"] / times["package"], ""),
        "12 layers with the backend, ms": (1e3 * times["backend"], ""),
        "12 layers in eager mode over the backend": (times["eager"] / times["backend"], ""),
    }


def _whole(options: argparse.Namespace, folder: Path) -> dict[str, tuple[float, str]]:
    """Time the whole transformer through Relax against eager mode."""
    import torch  # noqa: PLC0415

    from na_compiler.runtime.whole import load_whole  # noqa: PLC0415
    from na_compiler.whole import compile_whole  # noqa: PLC0415

    # TVM reads it when it makes its threads.
    os.environ["TVM_NUM_THREADS"] = str(options.threads)
    x = torch.randn(1, _TOKENS, _TOKENS, _DIM)
    model = transformer()
    with torch.no_grad():
        compile_whole(torch.export.export(model, (x,)), folder / "model.so")
        whole = load_whole(folder / "model.so")
        torch.testing.assert_close(torch.utils.dlpack.from_dlpack(whole(x)), model(x), rtol=1e-4, atol=1e-4)
        times = interleave({"whole": lambda: whole(x), "eager": lambda: model(x)}, 2 * options.seconds)
    return {
        "12 layers through Relax: its speed over eager mode's": (times["eager"] / times["whole"], "> 0.5"),
        "12 layers through Relax, ms": (1e3 * times["whole"], ""),
    }
