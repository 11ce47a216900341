"""``na-compile info``: what this installation has and finds, as a report of a fault should say."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

import na_compiler
from na_compiler.cli.output import Commands, add_json, print_json, print_line
from na_compiler.devices.cpu import processor

__all__ = ["add_parser", "collect"]

_PACKAGES = (
    "apache-tvm", "apache-tvm-ffi", "torch", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime",
    "onnxruntime-gpu", "matplotlib", "natten",
)  # fmt: skip
_VARIABLES = ("NA_COMPILER_CACHE", "NA_COMPILER_CACHE_BYTES", "NA_COMPILER_BUNDLE", "NA_COMPILER_JIT",
              "NA_COMPILER_SPECIALIZE", "NA_COMPILER_TUNED", "NA_COMPILER_TVM_LIB", "CC", "CXX", "CUDA_HOME",
              "OMP_NUM_THREADS", "TVM_NUM_THREADS")  # fmt: skip


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "info", help="what a report of a fault needs: versions, targets, compilers, cache, threads"
    )
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    found = collect()
    if options.json:
        print_json(found)
        return
    for group, values in found.items():
        print_line(f"{group}:" if values else f"{group}: none set")
        width = max(map(len, values), default=0)
        for name, value in values.items():
            print_line(f"    {name:<{width}}  {value}")


def collect() -> dict[str, dict[str, str]]:
    """Return what there is, in groups. What cannot be found out says why; nothing is compiled."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "targets": {"CPU": _told(_cpu), "CUDA": _told(_cuda), "GPUs": _told(_gpus)},
        "compilers": {
            "C": _told(_c_compiler),
            "C++": _told(_cxx_compiler),
            "nvcc": _told(_nvcc),
            "TVM's runtime": _told(_runtime),
        },
        "cache": {"folder": _told(_folder), "kernels": _told(_cached), "tuned": _told(_tuned)},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _told(find: Callable[[], object]) -> str:
    """Return what a function finds, or why it does not."""
    try:
        return str(find())
    except Exception as error:  # noqa: BLE001 - a report is most needed where something is broken
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _versions() -> dict[str, str]:
    found = {"na_compiler": f"{na_compiler.__version__} in {os.path.dirname(na_compiler.__file__)}"}  # noqa: PTH120
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "Python": f"{platform.python_version()} in {sys.prefix}"}


def _machine() -> dict[str, str]:
    from na_compiler.runtime.threads import cores  # noqa: PLC0415

    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": _told(processor),
        "cores for this process": _told(cores),
        "threads of kernels": "torch's, in a process with torch (torch.set_num_threads); else TVM's, one a core",
    }


def _cpu() -> str:
    from na_compiler.target import Target  # noqa: PLC0415

    return Target.parse("llvm").name


def _cuda() -> str:
    from na_compiler.target import Target  # noqa: PLC0415

    try:
        return Target.parse("cuda").name
    except ValueError:
        return "no GPU here"


def _gpus() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "no nvidia-smi"
    return ", ".join(_said_by(program, "--query-gpu=name,driver_version", "--format=csv,noheader")) or "none"


def _said_by(*command: str) -> list[str]:
    """Return the lines that a program prints, if it does so at once."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _with_version(command: str | Sequence[str], word: str = "") -> str:
    """Return a compiler with the line in which it says its version: the first one, or the first with a word."""
    words = [command] if isinstance(command, str) else command
    lines = _said_by(*words, "--version")
    return f"{shlex.join(words)}: {next((line for line in lines if word in line), 'says no version')}"


def _c_compiler() -> str:
    from na_compiler.runtime.host import c_compiler  # noqa: PLC0415

    found = c_compiler()
    if found is None:
        return "none: kernels are built in memory, in every process again; install gcc or clang"
    return _with_version(found)


def _cxx_compiler() -> str:
    from na_compiler.runtime.host import cxx_compiler  # noqa: PLC0415

    found = cxx_compiler()
    return "none: needed for ort-library and torch-library only" if found is None else _with_version(found)


def _nvcc() -> str:
    from na_compiler.compiler.toolkit import find_toolkit  # noqa: PLC0415

    return _with_version(str(find_toolkit().nvcc), "release")


def _runtime() -> str:
    from na_compiler.runtime.folders import runtime_library  # noqa: PLC0415

    return str(runtime_library())


def _folder() -> str:
    from na_compiler.runtime.folders import cache_folder  # noqa: PLC0415

    return str(cache_folder())


def _cached() -> str:
    from na_compiler.compiler import cache  # noqa: PLC0415

    entries = list(cache.entries())
    return f"{len(entries)}, {sum(entry.bytes for entry in entries) / 2**20:.1f} MiB"


def _tuned() -> str:
    from na_compiler.compiler.tuned import records, tuned_file  # noqa: PLC0415

    file = tuned_file()
    if file is None:
        return "none, by NA_COMPILER_TUNED=0"
    found = records()
    devices = ", ".join(sorted({record.device for record in found}))
    return f"{len(found)} in {file}" + (f", of {devices}" if devices else "")
