"""Checks of the operators for programs without Python on a GPU: the C++ library, and what AOTInductor makes.

On a machine with the compiler::

    python tests/gpu/check_native.py build FOLDER --target cuda:sm_90a

On the machine with the GPU, with the folders of ``libtvm_runtime.so`` and ``libtvm_ffi.so`` in ``NA_COMPILER_TVM_LIB``
where they are not installed::

    python tests/gpu/check_native.py run FOLDER

Prints a line for each check; the exit status is the number of checks that failed. ``--device cpu`` rehearses it all
with a bundle for the CPU. This process has the operators from the library: only ``export``, which runs in another
one, has those of the package.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# Before torch: the package defines the operators where torch is already, and at the end of its import otherwise, unless
# its finder is gone by then. Here they are to be the library's.
import na_compiler

sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "na_compiler.after_torch"]

# What follows is imported with the finder gone.
# ruff: noqa: E402
# isort: split
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

import check
import oracle

from na_compiler.problem import Problem

PROBLEMS = [*check.SMALL, check.PLAIN, check.HALF]
SIZE = 64
# Float32 sums in another order, through a whole model; on a GPU its matrix products may be in tf32.
_TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}


def build(folder: Path, target: str) -> None:
    """Compile what `run` needs: kernels, and the library."""
    from na_compiler import aot
    from na_compiler.passes import collect

    program, _ = exported("cpu")
    specs = [na_compiler.KernelSpec.make(problem, target) for problem in PROBLEMS]
    na_compiler.save_bundle(folder / "bundle", dict.fromkeys([*specs, *collect(program).specs([target])]))
    aot.build_library(folder)
    (folder / "na_compiler.h").write_bytes((aot.header_folder() / "na_compiler.h").read_bytes())


def exported(device: str) -> tuple[torch.export.ExportedProgram, tuple[torch.Tensor, torch.Tensor]]:
    """Return a program, and an input with what the model makes of it where there is a bundle."""
    from models.nat import Classifier

    from na_compiler.passes import canonicalise

    torch.manual_seed(0)
    model = Classifier("dinat_pocket").eval().to(device)
    image = torch.randn(2, 3, SIZE, SIZE, device=device)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (image,), dynamic_shapes=({0: batch},))
        canonicalise(program)
        return program, (image, model(image) if "NA_COMPILER_BUNDLE" in os.environ else image)


def export(folder: Path, device: str) -> None:
    """Compile a model with AOTInductor for this machine; writes an input and what is expected of it, too."""
    program, (image, expected) = exported(device)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    for name, tensor in (("input", image), ("expected", expected)):
        tensor.cpu().numpy().tofile(folder / f"{name}.bin")


class Checks:
    """The checks, and how they went."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, torch.device(device)
        self.failed = 0
        os.environ["NA_COMPILER_BUNDLE"] = str(folder / "bundle")
        torch.ops.load_library(folder / "libna_compiler_torch.so")
        assert "na_compiler.ops.operators" not in sys.modules, "the operators are the package's"
        torch.manual_seed(time.time_ns() % 2**31)

    def run(self) -> int:
        """Run all checks; returns how many failed."""
        print(f"{self.device}, torch {torch.__version__}, seed {torch.initial_seed()}")
        checks: list[tuple[str, Callable[[], str | None]]] = [
            (f"{problem}", lambda problem=problem: self.accuracy(problem)) for problem in PROBLEMS
        ]
        if self.device.type == "cuda":
            checks += [("stream", self.stream), ("graph", self.graph)]
            if torch.cuda.device_count() > 1:
                checks.append(("devices", self.devices))
            else:
                print("not checked: another device than the current one; there is one")
        checks += [("missing", self.missing), ("export", self.export), ("package", self.package)]
        checks += [("program", self.program)]
        for name, one in checks:
            started = time.perf_counter()
            try:
                said, verdict = one() or "", "ok"
            except Exception as error:  # noqa: BLE001
                said, verdict = f"{type(error).__name__}: {error}", "FAILED"
                self.failed += 1
                traceback.print_exc()
            print(f"{verdict:6} {name}: {said} ({time.perf_counter() - started:.2f} s)", flush=True)
        print(f"{self.failed} of {len(checks)} failed")
        return self.failed

    @staticmethod
    def operate(problem: Problem, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Call the library's operator."""
        operator = getattr(torch.ops.na_compiler, f"na{problem.rank}d")
        parameters = (problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)
        return operator(*inputs[:3], *map(list, parameters), problem.head_dim**-0.5, *inputs[3:])

    def accuracy(self, problem: Problem, device: torch.device | None = None) -> str:
        """Compare an operator with the reference, on tensors as they come and on ones that no kernel takes."""
        example = oracle.draw(problem, batch=2, device=device or self.device)
        errors = oracle.check_forward(example, *self.operate(problem, example.inputs))
        # An odd address, and heads before tokens: copied where a kernel wants them otherwise.
        moved = [torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:].view_as(tensor)
                 .copy_(tensor) for tensor in example.inputs]  # fmt: skip
        turned = [tensor.transpose(1, -2).contiguous().transpose(1, -2) for tensor in example.inputs]
        for inputs in (moved, turned):
            oracle.check_forward(example, *self.operate(problem, inputs))
        return " ".join(f"{name}={error:.1e}" for name, error in errors.items())

    def stream(self) -> None:
        """Launches are on torch's current stream: they wait for what is before them there, and for nothing else."""
        example = oracle.draw(check.PLAIN, batch=2, device=self.device)
        late = [torch.full_like(tensor, float("nan")) for tensor in example.inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            for tensor, given in zip(late, example.inputs, strict=True):
                tensor.copy_(given)
            output, lse = self.operate(check.PLAIN, late)
        torch.cuda.current_stream().wait_stream(side)
        oracle.check_forward(example, output, lse)

    def graph(self) -> None:
        """A CUDA graph of the operator replays on new data."""
        example = oracle.draw(check.HALF, batch=2, device=self.device)
        inputs = [torch.randn_like(tensor) for tensor in example.inputs]
        self.operate(check.HALF, inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, lse = self.operate(check.HALF, inputs)
        for tensor, given in zip(inputs, example.inputs, strict=True):
            tensor.copy_(given)
        oracle.poisoned(output, lse)
        graph.replay()
        oracle.check_forward(example, output, lse)

    def devices(self) -> str:
        """Tensors of another device than the current one, which stays the current one."""
        last = torch.cuda.device_count() - 1
        before = torch.cuda.current_device()
        for problem in (check.PLAIN, check.HALF):
            self.accuracy(problem, torch.device("cuda", last))
            assert torch.cuda.current_device() == before
            # What TVM left behind is seen by CUDA alone, not by torch's notion of it.
            assert torch.empty(1, device="cuda").device.index == before
        return f"{last + 1} devices"

    def missing(self) -> None:
        """A shape without a kernel is an error that names it."""
        inputs = [torch.zeros(1, 5, 1, 16, device=self.device) for _ in range(3)]
        with check.raises(RuntimeError, "layout=5 heads=1 head_dim=16"):
            self.operate(Problem(5, 1, 16, 3), inputs)

    def export(self) -> None:
        """AOTInductor compiles a model, in a process that has the operators from Python."""
        subprocess.run([sys.executable, __file__, "export", self.folder, "--device", self.device.type], check=True)

    def package(self) -> str:
        """The package runs with the library's operators."""
        image = self.tensor("input", (2, 3, SIZE, SIZE)).to(self.device)
        output = torch._inductor.aoti_load_package(str(self.folder / "model.pt2"))(image)
        return self.compare(output.cpu())

    def program(self) -> str:
        """A program without Python runs the package."""
        source, output = Path(__file__).parent.parent.parent / "examples" / "aot_cpp", self.folder / "output.bin"
        prefix, here = torch.utils.cmake_prefix_path, self.folder
        configure = ["cmake", "-S", source, "-B", here / "build", f"-DNA_COMPILER={here}"]
        for command in ([*configure, f"-DCMAKE_PREFIX_PATH={prefix}"], ["cmake", "--build", here / "build"]):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        output.unlink(missing_ok=True)
        arguments = [here / "model.pt2", here / "bundle", output, here / "input.bin", f"2x3x{SIZE}x{SIZE}"]
        environment = {name: value for name, value in os.environ.items() if name != "NA_COMPILER_BUNDLE"}
        printed = subprocess.check_output([here / "build" / "main", *arguments], env=environment, text=True)
        return f"{printed.strip()}, {self.compare(self.tensor('output', (2, -1)))}"

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read a tensor that `export` or the program wrote."""
        return torch.from_numpy(np.fromfile(self.folder / f"{name}.bin", np.float32)).reshape(shape)

    def compare(self, output: torch.Tensor) -> str:
        """Compare the model's output with eager's."""
        expected = self.tensor("expected", (2, -1)).double()
        error = ((output.double() - expected).norm() / expected.norm()).item()
        assert error < _TOLERANCE[self.device.type], f"relative error {error:.1e}"
        return f"relative error {error:.1e}"


def main() -> int:
    """Build, or run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "export", "run"])
    parser.add_argument("folder", type=lambda path: Path(path).absolute())
    parser.add_argument("--target", default="cuda:sm_90a")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.command == "run":
        return Checks(options.folder, options.device).run()
    if options.command == "build":
        build(options.folder, options.target)
    else:
        export(options.folder, options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
