"""`Emulator`: a kernel's generated CUDA as a program for the CPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cuda_emulator.host import HostProgram, Launch, TensorMapArguments
from na_compiler.compiler import build
from na_compiler.compiler.spec import KernelSpec

__all__ = ["ORDERS", "Emulator", "EmulatorError", "Order"]

_HEADER = Path(__file__).with_name("emulator.h")
_SECONDS = 120


class EmulatorError(Exception):
    """The program did what a GPU would not let it do, or would hang or lie about."""


@dataclass(frozen=True)
class Order:
    """When asynchronous work happens, and which warp runs first; see ``emulator.h``."""

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
        self._folder = tempfile.TemporaryDirectory(prefix="na_compiler-emulator-")
        self.folder = Path(self._folder.name)
        self._compile(text)

    @classmethod
    def of(cls, spec: KernelSpec, edit: Any = None) -> Emulator:
        """Make the emulator of a spec's kernels."""
        made = build.lowered(spec)
        return cls(made.function, spec.target.to_tvm(), made.pipeline, edit, made.options)

    def _compile(self, text: str) -> None:
        compiler = shutil.which("g++") or shutil.which("clang++")
        assert compiler, "the emulator needs a C++ compiler"
        (self.folder / "kernel.cpp").write_text(_program(text), encoding="utf-8")
        # Multiplications and additions are contracted, as nvcc does.
        options = ["-O1", "-fexpensive-optimizations", "-march=native", "-ffp-contract=fast"]
        options += ["-std=c++17", "-w", f"-I{_HEADER.parent}"]
        command = [compiler, *options, "-o", str(self.folder / "kernel"), str(self.folder / "kernel.cpp")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not result.returncode, result.stderr[:4000]

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
    text = text.replace("__shared__", "static").replace("__restrict__", "").replace("__grid_constant__", "")
    text = re.sub(r"alignas\(64\) |__align__\(\d+\)", "", text)
    parts = ['#include "emulator.h"', *_products(text)]
    parts += [f"inline void {name}() {{}}" for name in sorted(set(re.findall(r"tvm_builtin_ptx_setmaxnreg_\w+", text)))]
    return "\n".join([*parts, *_immediates(text), text, _MAIN, *_launchers(kernels)])


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
            f"Product p{{{fields}}}; {taken} p.b = b; wgmma_push(std::move(p)); }}"
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


_MAIN = r"""
#include <fstream>
struct Argument { void* pointer; CUtensorMap map; int64_t whole; float real; };
static Argument arguments[64];
struct Kernel { const char* name; void (*run)(); };
extern Kernel kernels[];
int main(int, char** argv) {
  std::string folder = argv[1];
  late_loads = argv[2][0] == '1', late_products = argv[2][1] == '1';
  descending = argv[2][2] == '1', greedy = argv[2][3] == '1';
  catch_faults();
  std::ifstream call(folder + "/call.txt");
  std::string word, name;
  std::vector<std::pair<uchar*, size_t>> given;
  while (call >> word) {
    if (word == "tensor") {
      size_t bytes;
      call >> bytes;
      std::string path = folder + "/" + std::to_string(given.size()) + ".bin";
      given.push_back({read_tensor(path.c_str(), bytes), bytes});
      continue;
    }
    if (word != "launch") die("what is %s", word.c_str());
    int grid[3], block[3], count = 0;
    call >> name;
    for (int& extent : grid) call >> extent;
    for (int& extent : block) call >> extent;
    while (call.peek() != '\n' && call >> word) {
      if (count == 64) die("more than 64 arguments of %s", name.c_str());
      Argument& argument = arguments[count++];
      if (word == "t") { int number; call >> number; argument.pointer = given[number].first; }
      else if (word == "i") call >> argument.whole;
      else if (word == "f") call >> argument.real;
      else if (word == "n") argument.map = CUtensorMap{};
      else {
        CUtensorMap& map = argument.map;
        int number;
        call >> number >> map.rank;
        map.base = given[number].first;
        for (int i = 0; i < map.rank; i++) call >> map.extent[i];
        for (int i = 0; i < map.rank; i++) call >> map.stride[i];
        for (int i = 0; i < map.rank; i++) call >> map.box[i];
        for (int i = 0; i < map.rank; i++) call >> map.step[i];
        call >> map.swizzle;
      }
    }
    Kernel* kernel = kernels;
    while (kernel->name && name != kernel->name) kernel++;
    if (!kernel->name) die("there is no kernel %s", name.c_str());
    blockDim = {block[0], block[1], block[2]}, gridDim = {grid[0], grid[1], grid[2]};
    for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
      for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) run_block(block[0] * block[1] * block[2], kernel->run);
  }
  for (size_t number = 0; number < given.size(); number++)
    write_tensor((folder + "/" + std::to_string(number) + ".bin").c_str(), given[number].first, given[number].second);
  return 0;
}
"""
