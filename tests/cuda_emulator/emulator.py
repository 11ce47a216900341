"""`Emulator`: a kernel's generated CUDA as a program for the CPU."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cuda_emulator.choices import early
from cuda_emulator.host import HostProgram, Launch, TensorMapArguments
from na_compiler.compiler import build
from na_compiler.compiler.spec import KernelSpec

__all__ = ["ORDERS", "Emulator", "EmulatorError", "Order"]

_SOURCES = Path(__file__).parent
_SECONDS = 120


class EmulatorError(Exception):
    """The program did what a GPU would not let it do, or would hang or lie about."""


@dataclass(frozen=True)
class Order:
    """When asynchronous work happens, and which warp runs first; see ``machine.h``."""

    late_loads: bool
    late_products: bool
    descending: bool
    greedy: bool = False


# Data as late as it may come and used at once, and data that comes at once and is used as late as it may be.
ORDERS = (
    Order(late_loads=True, late_products=False, descending=False),
    Order(late_loads=False, late_products=True, descending=True),
)


class Emulator:
    """Emulates one function.

    Parameters
    ----------
    function
        A TensorIR function for CUDA, before lowering.
    target
        TVM's description of its target.
    pipeline
        TVM's lowering pipeline.
    edit
        Changes the generated text, to plant a fault: ``edit(text) -> text``.
    passes
        Options of TVM's passes.
    """

    def __init__(
        self, function: Any, target: Any, pipeline: str = "tirx", edit: Any = None, passes: Any = None
    ) -> None:
        self.host = HostProgram(function, target, pipeline, passes)
        self.source = self.host.source
        text = self.source[self.source.index('extern "C" __global__') :]
        if edit is not None:
            edited = edit(text)
            assert edited != text, "the fault was not planted"
            text = edited
        if choices := early(text):
            raise EmulatorError(f"it reads before it chooses: {choices[0]}")
        self._folder = tempfile.TemporaryDirectory(prefix="na_compiler-emulator-")
        self.folder = Path(self._folder.name)
        self._compile(text)

    @classmethod
    def of(cls, spec: KernelSpec, edit: Any = None) -> Emulator:
        """Make the emulator of a spec's kernels."""
        made = build.lowered(spec)
        return cls(made.function, spec.target.to_tvm(), made.pipeline, edit, made.options)

    def _compile(self, text: str) -> None:
        source, parts = self.folder / "kernel.cc", sorted(_machine().glob("*.o"))
        source.write_text(_program(text), encoding="utf-8")
        # A shift by a negative number or by too many bits, which is undefined in CUDA as it is here, is an illegal
        # instruction.
        options = ["-O1", "-fsanitize=shift-exponent", "-fsanitize-undefined-trap-on-error"]
        _call_compiler(*options, "-o", self.folder / "kernel", source, *parts)

    def __call__(self, *arguments: Any, order: Order = ORDERS[0]) -> None:
        """Call the function; tensors are torch's, on the CPU, and outputs are written in place.

        Raises
        ------
        EmulatorError
            With what went wrong.
        """
        named = dict(zip(self.host.parameters, arguments, strict=True))
        tensors = {name: tensor for name, tensor in named.items() if hasattr(tensor, "data_ptr")}
        described = {
            name: (tuple(value.shape), tuple(value.stride())) if name in tensors else value
            for name, value in named.items()
        }
        lines = []
        numbers, given = {}, {}
        for number, (name, tensor) in enumerate(tensors.items()):
            numbers[name] = number
            count = _span(tensor)
            given[name] = ctypes.string_at(tensor.data_ptr(), count) if count else b""
            (self.folder / f"{number}.bin").write_bytes(given[name])
            lines.append(f"tensor {count}")
        lines += [self._launch(launch, numbers) for launch in self.host.run(described)]
        (self.folder / "call.txt").write_text("\n".join(lines) + "\n", encoding="ascii")
        chosen = (order.late_loads, order.late_products, order.descending, order.greedy)
        flags = "".join(str(int(flag)) for flag in chosen)
        try:
            result = subprocess.run(
                [str(self.folder / "kernel"), str(self.folder), flags],
                capture_output=True, text=True, check=False, timeout=_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise EmulatorError(f"it did not end in {_SECONDS} s") from error
        if result.returncode:
            raise EmulatorError(result.stderr.strip() or f"the program ended with status {result.returncode}")
        for name, tensor in tensors.items():
            data = (self.folder / f"{numbers[name]}.bin").read_bytes()
            if data != given[name]:
                _write(name, tensor, data, given[name])

    @staticmethod
    def _launch(launch: Launch, numbers: dict[str, int]) -> str:
        words = [f"launch {launch.kernel}", *map(str, launch.grid), *map(str, launch.block)]
        for argument in launch.arguments:
            if isinstance(argument, str):
                words.append(f"t {numbers[argument]}")
            elif isinstance(argument, TensorMapArguments):
                extents, strides = argument.extents, (argument.element, *argument.strides)
                fields = [*extents, *strides, *argument.box, *argument.steps, argument.swizzle]
                words.append(f"m {numbers[argument.tensor]} {len(extents)} {' '.join(map(str, fields))}")
            elif argument is None:
                words.append("n")
            else:
                words.append(f"f {argument!r}" if isinstance(argument, float) else f"i {argument}")
        return " ".join(words)


def _call_compiler(*arguments: Any, folder: Path | None = None) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    assert compiler, "the emulator needs a C++ compiler"
    # Multiplications and additions are contracted, as nvcc does. Fortified, jumps to another stack are refused.
    options = ["-march=native", "-ffp-contract=fast", "-std=c++17", "-w", "-U_FORTIFY_SOURCE", f"-I{_SOURCES}"]
    command = [compiler, *options, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert not result.returncode, result.stderr[:4000]


# Until the process ends.
_MACHINE = tempfile.TemporaryDirectory(prefix="na_compiler-emulator-")


@functools.cache
def _machine() -> Path:
    """Return a folder with the machine's parts, compiled once a process: that takes as long as four kernels."""
    _call_compiler("-O2", "-c", *sorted(_SOURCES.glob("*.cc")), folder=Path(_MACHINE.name))
    return Path(_MACHINE.name)


def _span(tensor: Any) -> int:
    if tensor.numel() == 0:
        return 0
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _write(name: str, tensor: Any, data: bytes, given: bytes) -> None:
    """Give a tensor what a kernel wrote to it; between its rows may be those of others."""
    written, before = (
        torch.frombuffer(bytearray(one), dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())
        for one in (data, given)
    )
    tensor.copy_(written)
    before.copy_(written)
    if ctypes.string_at(before.data_ptr(), len(data)) != data:
        raise EmulatorError(f"{name} was written to between its rows")


def _program(text: str) -> str:
    """Turn the text of kernels into a C++ program."""
    kernels = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\((.*?)\) \{', text)
    text = re.sub(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?', "void ", text)
    text = re.sub(r"extern __shared__ __align__\(\d+\) uchar (\w+)\[\];", r"uchar* \1 = shared_memory;", text)
    # Tensor maps outlive the thread that uses them: loads that it began are read from them later.
    text = re.sub(r"__grid_constant__ CUtensorMap (\w+)", r"CUtensorMap& \1", text)
    text = text.replace("__shared__", "static").replace("__restrict__", "")
    text = re.sub(r"alignas\(64\) |__align__\(\d+\)", "", text)
    parts = ['#include "kernel.h"', *_products(text)]
    parts += [f"inline void {name}() {{}}" for name in sorted(set(re.findall(r"tvm_builtin_ptx_setmaxnreg_\w+", text)))]
    return "\n".join([*parts, *_immediates(text), text, *_launchers(kernels)])


def _immediates(text: str) -> list[str]:
    """Write the wrappers of instructions whose address has an offset in the instruction."""
    copy = "uint32_t target, const void* source, uint32_t bytes", "target, (const uchar*)source + {0}, bytes"
    load = "uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t address", "a, b, c, d, address + {0}"
    four = "float& a, float& b, float& c, float& d, uint32_t address", "a, b, c, d, address + {0}"
    store = "const void* address, float a, float b, float c, float d", "(const uchar*)address + {0}, a, b, c, d"
    found = []
    kinds = {
        r"cp_async_cg_\w+?_addr1": copy,
        r"ldmatrix_\w+?_addr0": load,
        r"ld_vec_shared_\w+?_addr0": four,
        r"st_vec_global_v4_f32_addr0": store,
    }
    for pattern, (parameters, passed) in kinds.items():
        for name in sorted(set(re.findall(rf"tvm_builtin_ptx_{pattern}_p\d+", text))):
            root, offset = name.rsplit("_addr", 1)[0], name.rpartition("_p")[2]
            found.append(f"inline void {name}({parameters}) {{ {root}({passed.format(offset)}); }}")
    return found


def _products(text: str) -> list[str]:
    """Write the wrappers of the shapes of wgmma that are used."""
    parts = []
    for name in sorted(set(re.findall(r"tvm_builtin_ptx_wgmma_\w+_(?:ss|rs)_mma_async_\w+", text))):
        columns = int(re.search(r"_m64n(\d+)k16_", name)[1])
        kind, flags = int("_f16_f16_" in name), name.rpartition("k16_")[2].split("_")
        accumulators = ", ".join(f"float& d{i}" for i in range(columns // 2))
        taken = " ".join(f"p.accumulator[{i}] = &d{i};" for i in range(columns // 2))
        from_registers = "_rs_" in name
        if from_registers:
            operand = "uint& a0, uint& a1, uint& a2, uint& a3"
            taken += " ".join(f"p.registers[{i}] = &a{i};" for i in range(4))
            transposed = f"0, {flags[-1]}"
        else:
            operand, transposed = "uint64_t a", f"{flags[-2]}, {flags[-1]}"
            taken += " p.a = a;"
        fields = f"{columns}, {kind}, {transposed}, {'true' if from_registers else 'false'}, (bool)accumulates"
        parts.append(
            f"inline void {name}({accumulators}, {operand}, uint64_t b, int accumulates) {{ "
            f"Product p{{{fields}}}; {taken} p.b = b; wgmma_push(p); }}"
        )
    return parts


def _launchers(kernels: list[tuple[str, str]]) -> list[str]:
    parts, table = [], []
    for name, signature in kernels:
        values = []
        for number, parameter in enumerate(signature.split(",")):
            kind = " ".join(parameter.split()[:-1]).replace("__restrict__", "").replace("__grid_constant__", "")
            kind = kind.replace("const CUtensorMap", "CUtensorMap").strip()
            if "*" in kind:
                values.append(f"({kind})arguments[{number}].pointer")
            elif "CUtensorMap" in kind:
                values.append(f"arguments[{number}].map")
            else:
                values.append(f"({kind})arguments[{number}].{'real' if kind == 'float' else 'whole'}")
        parts.append(f"static void run_{name}() {{ {name}({', '.join(values)}); }}")
        table.append(f'{{"{name}", run_{name}}}')
    return [*parts, f"Kernel kernels[] = {{{', '.join(table)}, {{nullptr, nullptr}}}};"]
