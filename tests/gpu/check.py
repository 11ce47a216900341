"""Checks of the kernels and operators on a GPU, from a bundle: needs torch and TVM's runtime libraries, not TVM.

On a machine with the compiler::

    python tests/gpu/check.py build FOLDER --target cuda:sm_90a

On the machine with the GPU, with ``NA_COMPILER_TVM_LIB`` set where apache-tvm is not installed::

    python tests/gpu/check.py run FOLDER

Prints a line for each check, with errors relative to a float64 reference, and a table of times; the exit status is
the number of checks that failed. ``--device cpu`` rehearses it all with a bundle for the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import oracle

import na_compiler
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention
from na_compiler.target import Target

SMALL = [
    Problem(1, 1, 1, 1),
    Problem(33, 2, 16, 1),
    Problem(50, 1, 8, 8, 3),
    Problem(64, 2, 16, 16, 16, is_causal=True),
    Problem(45, 2, 24, 12, 5, is_causal=True),
    Problem(40, 2, 20, 40, is_causal=True),
    Problem(101, 2, 16, 6, 2, 7),
    Problem(700, 1, 32, 255),
    Problem(300, 2, 40, 130, 7, 2, is_causal=True),
    Problem((19, 23), 2, 32, (5, 8)),
    Problem((21, 18), 2, 16, (6, 7), (2, 3), dtype="bfloat16"),
    Problem((13, 17), 2, 16, (5, 6), (4, 2), is_causal=(False, True)),
    Problem((3, 40), 1, 16, (3, 7), dilation=(1, 5)),
    Problem((14, 14), 6, 32, 7, heads_kv=1, head_dim_v=48, dtype="float16"),
    Problem((20, 20), 2, 7, 5, head_dim_v=3),
    Problem((12, 12), 2, 96, 12, dtype="bfloat16"),
    Problem((9, 10), 3, 72, (2, 10), (1, 4), (3, 1)),
    Problem((11, 9), 2, 128, 3, additional_kv=True),
    Problem((11, 9), 1, 256, 3, additional_kv=True, dtype="bfloat16"),
    Problem((16, 16), 4, 32, 16, heads_kv=2, additional_kv=True),
    Problem((8, 8, 8), 2, 16, 3, (1, 2, 1), (2, 1, 2), (True, False, False), dtype="float16"),
    Problem((5, 12, 6), 4, 17, (5, 2, 3), (1, 1, 2), (1, 5, 2), (False, True, True), 2, 9, additional_kv=True),
]
# With a bias by relative position, a key mask, or both.
OPTIONAL = [
    problem.replace(operands=options)
    for problem, options in (
        (Problem(45, 2, 24, 12, 5, is_causal=True), ("relative_position_bias", "key_mask")),
        (Problem(700, 1, 32, 255), ("relative_position_bias",)),
        (Problem((21, 18), 2, 16, (6, 7), (2, 3), dtype="bfloat16"), ("key_mask",)),
        (Problem((56, 56), 4, 32, 7, dtype="float16"), ("relative_position_bias", "key_mask")),
        (Problem((16, 16), 4, 32, 16, heads_kv=2, additional_kv=True), ("relative_position_bias", "key_mask")),
        (Problem((8, 8, 8), 2, 16, 3, (1, 2, 1), (2, 1, 2), (True, False, False)), ("relative_position_bias",)),
    )
]
PLAIN = Problem((24, 28), 4, 32, 7)
MORE = Problem((24, 28), 4, 32, 7, additional_kv=True)
HALF = PLAIN.replace(dtype="bfloat16")
TRAINED = Problem((12, 12), 4, 16, 5, dilation=2)
# Past 2**31 elements of query with a batch of 40.
LARGE = Problem(65536, 8, 128, 2, dtype="bfloat16")
TIMED = [
    Problem((56, 56), 4, 32, 7),
    Problem((56, 56), 4, 32, 7, dtype="bfloat16"),
    Problem((56, 56), 4, 32, 7, dtype="bfloat16", operands=("relative_position_bias",)),
    Problem((56, 56), 4, 32, 7, dtype="bfloat16", operands=("key_mask",)),
    Problem((64, 64), 8, 64, 13, dtype="bfloat16"),
    Problem(4096, 4, 64, 255, dtype="bfloat16"),
    Problem((16, 16, 16), 4, 32, 5, dtype="bfloat16"),
    Problem((128, 128), 16, 128, 31, dtype="bfloat16"),
]
DIRECTIONS = ("forward", "backward")


def specs(target: str) -> Iterator[Any]:
    """Yield what has to be in the bundle."""
    for problem in dict.fromkeys([*SMALL, *OPTIONAL, PLAIN, MORE, HALF, TRAINED, *TIMED]):
        for direction in DIRECTIONS:
            yield na_compiler.KernelSpec.make(problem, target, direction)
    if target.startswith("cuda"):
        yield na_compiler.KernelSpec.make(LARGE, target, "forward")


def main() -> int:
    """Build the bundle, or run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="cuda:sm_90a")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="run the checks whose name holds this")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.command == "build":
        na_compiler.save_bundle(options.folder, specs(options.target))
        return 0
    na_compiler.load_bundle(options.folder)
    return Checks(options.device).run(options.only)


class Checks:
    """The checks, and how they went."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.failed: list[str] = []
        torch.manual_seed(time.time_ns() % 2**31)

    def run(self, only: str) -> int:
        """Run all checks whose name holds a text; returns how many failed."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}, seed {torch.initial_seed()}")
        checks = self.checks()
        for name, check in checks:
            if only not in name:
                continue
            started = time.perf_counter()
            try:
                said = check() or ""
                verdict = "ok"
            except Exception as error:  # noqa: BLE001
                said, verdict = f"{type(error).__name__}: {error}", "FAILED"
                self.failed.append(name)
                traceback.print_exc()
            print(f"{verdict:6} {name}: {said} ({time.perf_counter() - started:.2f} s)", flush=True)
        if not only:
            self.times()
        print(f"{len(self.failed)} of {len(checks)} failed {self.failed}")
        return len(self.failed)

    def checks(self) -> list[tuple[str, Callable[[], str | None]]]:
        """Return the checks by name."""
        checks: list[tuple[str, Callable[[], str | None]]] = [
            (f"{problem}", lambda problem=problem: self.accuracy(problem)) for problem in [*SMALL, *OPTIONAL]
        ]
        checks += [(name, getattr(self, f"check_{name}")) for name in _names(type(self), "check_")]
        if self.device.type == "cuda":
            checks += [(name, getattr(self, f"gpu_{name}")) for name in _names(type(self), "gpu_")]
        return checks

    # What a problem comes to.

    def example(self, problem: Problem, **options: Any) -> oracle.Example:
        """Draw a problem's inputs on the device."""
        return oracle.draw(problem, device=self.device, **options)

    def accuracy(self, problem: Problem) -> str:
        """Compare forward and backward with the reference."""
        example = self.example(problem, batch=2)
        output, lse = self.attend(example)
        errors = oracle.check_forward(example, output, lse)
        grads = self.differentiate(example, example.output.to(output.dtype).contiguous(), example.lse.float())
        errors |= oracle.check_backward(example, grads)
        return " ".join(f"{name.replace('grad_', 'd_')}={error:.1e}" for name, error in errors.items())

    def attend(self, example: oracle.Example, inputs: list[torch.Tensor] | None = None) -> tuple[Any, Any]:
        """Call the kernel itself, on poisoned outputs."""
        problem = example.problem
        inputs = example.inputs if inputs is None else inputs
        kernel = self.kernel(problem, "forward")
        output, lse = oracle.poisoned(
            torch.empty((*inputs[0].shape[:-1], problem.head_dim_v), dtype=inputs[0].dtype, device=self.device),
            torch.empty(inputs[0].shape[:-1], device=self.device),
        )
        spaces = kernel.spaces(*inputs[:1], *inputs[3:4])
        kernel.function(*inputs, *example.others.values(), problem.head_dim**-0.5, output, lse, *spaces)
        return output, lse

    def differentiate(self, example: oracle.Example, output: torch.Tensor, lse: torch.Tensor) -> tuple[Any, ...]:
        """Call the backward kernel."""
        kernel = self.kernel(example.problem, "backward")
        arguments = (*example.inputs[:3], output, lse.contiguous(), example.grad_output, example.grad_lse)
        return kernel(*arguments, *example.additional, **example.others)

    def kernel(self, problem: Problem, direction: str) -> Any:
        """Return the bundle's kernel."""
        from na_compiler.runtime.bundle import loaded_bundles

        machine = "llvm" if self.device.type == "cpu" else "cuda"
        kernel = loaded_bundles()[0].find(problem, direction, machine)
        assert kernel is not None, f"the bundle has no {direction} of {problem}"
        return kernel

    def operate(self, problem: Problem, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Call the operator."""
        function = {1: na_compiler.na1d, 2: na_compiler.na2d, 3: na_compiler.na3d}[problem.rank]
        parameters = (problem.kernel_size, problem.stride, problem.dilation, problem.is_causal, None)
        return function(*inputs[:3], *parameters, *inputs[3:], return_lse=True)

    # Checks on any device.

    def check_operators(self) -> None:
        """The operators, with gradients, as autograd calls them."""
        for problem in (PLAIN, MORE, HALF):
            example = self.example(problem)
            inputs = [tensor.requires_grad_() for tensor in example.inputs]
            output, lse = self.operate(problem, inputs)
            assert output.device.type == self.device.type
            oracle.check_forward(example, output.detach(), lse.detach())
            grads = torch.autograd.grad((output, lse), inputs, (example.grad_output, example.grad_lse))
            oracle.check_backward(example, grads)

    def check_views_of_a_fused_projection(self) -> None:
        """Views of one tensor are read where they are."""
        for problem in (PLAIN, HALF):
            fused = torch.randn(2, *problem.layout, 3, problem.heads, problem.head_dim, device=self.device)
            views = fused.to(getattr(torch, problem.dtype)).unbind(-3)
            with oracle.copies() as made:
                output, lse = self.operate(problem, list(views))
            assert not made, made
            contiguous = self.operate(problem, [view.contiguous() for view in views])
            assert torch.equal(output, contiguous[0])
            assert torch.equal(lse, contiguous[1])

    def check_other_strides(self) -> None:
        """Heads first, misaligned, and padded rows."""
        for problem in (MORE, MORE.replace(additional_kv=False, dtype="bfloat16")):
            example = self.example(problem)
            for kind in ("heads_first", "misaligned", "padded"):
                moved = [_moved(tensor, kind) for tensor in example.inputs]
                inputs = [tensor.requires_grad_() for tensor in moved]
                output, lse = self.operate(problem, inputs)
                oracle.check_forward(example, output.detach(), lse.detach())
                grad_output = _moved(example.grad_output, kind)
                grads = torch.autograd.grad((output, lse), inputs, (grad_output, example.grad_lse))
                oracle.check_backward(example, grads)

    def check_empty_batch(self) -> None:
        """No batch entries, and no additional keys."""
        for problem, batch, additional in ((PLAIN, 0, 0), (MORE, 0, 3), (MORE, 1, 0), (MORE, 2, 0)):
            example = self.example(problem, batch=batch, additional=additional)
            inputs = [tensor.requires_grad_() for tensor in example.inputs]
            output, lse = self.operate(problem, inputs)
            oracle.check_forward(example, output.detach(), lse.detach())
            grads = torch.autograd.grad((output, lse), inputs, (example.grad_output, example.grad_lse))
            oracle.check_backward(example, grads)

    def check_the_same_bits_every_time(self) -> None:
        """Nothing is added in an order that changes."""
        for problem in (MORE, HALF):
            example = self.example(problem, batch=3)
            runs = []
            for _ in range(5):
                output, lse = self.attend(example)
                runs.append([output, lse, *self.differentiate(example, output, lse)])
            for run in runs[1:]:
                assert all(map(torch.equal, run, runs[0]))

    def check_not_finite(self) -> None:
        """One number that is not finite in each tensor in turn, and scores as low as float32 has them."""
        for problem in (PLAIN, MORE, HALF):
            names = [*oracle.NAMES[: 5 if problem.additional_kv else 3], "grad_output", "grad_lse"]
            for name, number in zip(names, itertools.cycle((math.nan, math.inf, -math.inf)), strict=False):
                example = self.example(problem, spoiled={name: number})
                output, lse = self.attend(example)
                oracle.check_forward(example, output, lse, spreads=name == "value", repeats=True)
                grads = self.differentiate(example, example.output.to(output.dtype).contiguous(), example.lse.float())
                spreads = name in {"query", "key", "grad_output"}
                oracle.check_backward(example, grads, spreads=spreads, repeats=True)
            for score in (-math.inf, -1e38):
                example = self.example(problem)
                for number, tensor in enumerate(example.inputs):
                    if number in {0, 1, 3}:
                        tensor.zero_()[..., 0] = 1.0 if number == 0 else max(score, torch.finfo(tensor.dtype).min / 2)
                        if number and math.isinf(score):
                            tensor[..., 0] = score
                output, lse = self.attend(example)
                assert output.isnan().all() if math.isinf(score) else output.isfinite().all()
                assert lse.isnan().all() if math.isinf(score) else lse.isfinite().all()

    def check_training(self) -> str:
        """A layer learns, and as it does on the CPU in float64 by the reference."""
        torch.manual_seed(0)
        layer = na_compiler.NeighborhoodAttention2D(64, 4, kernel_size=5, dilation=2).to(self.device)
        x, target = torch.randn(2, 2, 12, 12, 64, device=self.device)
        optimizer = torch.optim.Adam(layer.parameters(), 3e-3)
        losses = []
        for _ in range(30):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0], losses
        return f"loss {losses[0]:.3f} to {losses[-1]:.3f}"

    def check_autocast(self) -> None:
        """Autocast casts to its dtype."""
        example = self.example(PLAIN)
        with torch.autocast(self.device.type, torch.bfloat16):
            output, _ = self.operate(PLAIN, example.inputs)
        assert output.dtype == torch.bfloat16
        error = ((output.double() - example.output).norm() / example.output.norm()).item()
        assert error < 2e-2, error

    def check_compile(self) -> None:
        """torch.compile, with gradients."""
        example = self.example(PLAIN)
        compiled = torch.compile(lambda *tensors: self.operate(PLAIN, list(tensors)), fullgraph=True)
        inputs = [tensor.requires_grad_() for tensor in example.inputs]
        output, lse = compiled(*inputs)
        oracle.check_forward(example, output.detach(), lse.detach())
        grads = torch.autograd.grad((output, lse), inputs, (example.grad_output, example.grad_lse))
        oracle.check_backward(example, grads)

    # Checks on a GPU.

    def gpu_other_architectures_are_refused(self) -> None:
        """A target that this GPU is not does not run here."""
        assert not Target.parse("cuda:sm_120").runs_here
        assert Target.parse("cuda").runs_here

    def gpu_misaligned_tensors_are_refused_by_kernels(self) -> None:
        """They would be an error that ends the use of the GPU."""
        example = self.example(HALF)
        moved = [_moved(tensor, "misaligned") for tensor in example.inputs]
        for place in range(3):
            inputs = [*example.inputs[:place], moved[place], *example.inputs[place + 1 :]]
            with raises(ValueError, "must lie at a multiple of 16 bytes"):
                self.attend(example, inputs)
        torch.cuda.synchronize()

    def gpu_devices_are_not_mixed(self) -> None:
        """Nothing is copied to another device in silence."""
        example = self.example(PLAIN)
        for moved in range(3):
            inputs = [tensor.cpu() if i == moved else tensor for i, tensor in enumerate(example.inputs)]
            for _ in range(2):
                with raises(ValueError, "must be on query's device"):
                    self.operate(PLAIN, inputs)
        kernel = self.kernel(PLAIN, "forward").function
        output, lse = torch.empty(example.output.shape), torch.empty(example.lse.shape)
        with raises((ValueError, RuntimeError, TypeError), ""):
            kernel(*example.inputs, 1.0, output, lse)

    def gpu_no_synchronisation(self) -> None:
        """The operators never wait for the GPU, nor copy from it."""
        example = self.example(MORE)
        inputs = [tensor.requires_grad_() for tensor in example.inputs]
        for warm in (True, False):
            torch.cuda.set_sync_debug_mode("default" if warm else "error")
            try:
                output, lse = self.operate(MORE, inputs)
                torch.autograd.grad((output, lse), inputs, (example.grad_output, example.grad_lse))
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def gpu_returns_at_once(self) -> str:
        """A call returns while the GPU is still busy with something else."""
        example = self.example(PLAIN)
        self.operate(PLAIN, example.inputs)
        torch.cuda.synchronize()
        torch.cuda._sleep(400_000_000)
        started = time.perf_counter()
        output, lse = self.operate(PLAIN, example.inputs)
        took = time.perf_counter() - started
        busy = not torch.cuda.current_stream().query()
        oracle.check_forward(example, output, lse)
        assert busy, f"the call took {took:.3f} s"
        return f"{took * 1e6:.0f} us"

    def gpu_streams(self) -> None:
        """Kernels run on torch's current stream: after what is before them there."""
        example = self.example(PLAIN)
        late = [torch.zeros_like(tensor) for tensor in example.inputs]
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            for tensor, value in zip(late, example.inputs, strict=True):
                tensor.copy_(value)
            output, lse = self.operate(PLAIN, late)
            assert not stream.query()
        stream.synchronize()
        oracle.check_forward(example, output, lse)

    def gpu_graph_capture(self) -> None:
        """Forward and backward are captured, and replayed on other data."""
        example, other = self.example(MORE), self.example(MORE)
        inputs = [tensor.clone().requires_grad_() for tensor in example.inputs]
        grad_output, grad_lse = example.grad_output.clone(), example.grad_lse.clone()

        def step() -> tuple[Any, ...]:
            output, lse = self.operate(MORE, inputs)
            return output, lse, *torch.autograd.grad((output, lse), inputs, (grad_output, grad_lse))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, lse, *grads = step()
        for drawn in (other, example):
            with torch.no_grad():
                for tensor, value in zip(inputs, drawn.inputs, strict=True):
                    tensor.copy_(value)
                grad_output.copy_(drawn.grad_output)
                grad_lse.copy_(drawn.grad_lse)
                for tensor in (output, lse, *grads):
                    tensor.fill_(math.nan)
            graph.replay()
            torch.cuda.synchronize()
            oracle.check_forward(drawn, output.detach(), lse.detach())
            oracle.check_backward(drawn, grads)

    def gpu_other_devices(self) -> str:
        """Tensors of a GPU that is not the current one."""
        if torch.cuda.device_count() < 2:
            return "not run: there is one GPU"
        device = torch.device("cuda", 1)
        example = oracle.draw(PLAIN, device=device)
        inputs = [tensor.requires_grad_() for tensor in example.inputs]
        output, lse = self.operate(PLAIN, inputs)
        assert output.device == device
        assert torch.cuda.current_device() == 0
        oracle.check_forward(example, output.detach(), lse.detach())
        grads = torch.autograd.grad((output, lse), inputs, (example.grad_output, example.grad_lse))
        oracle.check_backward(example, grads)
        return "on cuda:1"

    def gpu_past_two_to_the_31(self) -> str:
        """Offsets of 64 bits."""
        batch = 40
        shape = (batch, *LARGE.layout, LARGE.heads, LARGE.head_dim)
        assert math.prod(shape) > 2**31
        inputs = [torch.randn(shape, device=self.device, dtype=torch.bfloat16) for _ in range(3)]
        output, lse = self.operate(LARGE, inputs)
        tokens = torch.tensor([0, 1, 30000, 65534, 65535], device=self.device)
        worst = 0.0
        for entry in (0, 31, batch - 1):
            some = [tensor[entry : entry + 1].double() for tensor in inputs]
            expected, expected_lse = neighborhood_attention(*some, LARGE.kernel_size, tokens=tokens)
            found = output[entry : entry + 1][:, tokens].double()
            worst = max(worst, ((found - expected).norm() / expected.norm()).item())
            assert (lse[entry : entry + 1][:, tokens] - expected_lse).abs().max() < 1e-4
        assert worst < oracle.TOLERANCE["bfloat16"]
        return f"{math.prod(shape) / 2**31:.2f} * 2**31 elements, error {worst:.1e}"

    def gpu_host_time(self) -> str:
        """What a call costs the host."""
        example = self.example(PLAIN)
        kernel = self.kernel(PLAIN, "forward").function
        output, lse = self.attend(example)
        texts = []
        with torch.inference_mode():
            for name, run in (
                ("kernel", lambda: kernel(*example.inputs, 0.2, output, lse)),
                ("na2d", lambda: self.operate(PLAIN, example.inputs)),
            ):
                times = []
                for _ in range(20):
                    torch.cuda.synchronize()
                    started = time.perf_counter()
                    for _ in range(50):
                        run()
                    times.append((time.perf_counter() - started) / 50)
                texts.append(f"{name} {min(times) * 1e6:.1f} us")
        torch.cuda.synchronize()
        return ", ".join(texts)

    # Times.

    def times(self) -> None:
        """Print a table of times, and useful TFLOP/s."""
        print(f"{'problem':70} {'forward':>20} {'backward':>20}")
        for problem in TIMED:
            try:
                print(f"{problem!s:70} {' '.join(self.time(problem))}", flush=True)
            except Exception as error:  # noqa: BLE001
                self.failed.append(f"time of {problem}")
                print(f"{problem!s:70} {type(error).__name__}: {error}", flush=True)

    def time(self, problem: Problem) -> Iterator[str]:
        """Yield what forward and backward take, after checking some of what they return."""
        example = self.example(problem, tokens=torch.arange(0, problem.tokens, 997, device=self.device))
        output, lse = self.attend(example)
        oracle.check_forward(example, output, lse)
        oracle.check_backward(example, self.differentiate(example, output, lse))
        runs = (lambda: self.attend(example), lambda: self.differentiate(example, output, lse))
        for direction, run in zip(DIRECTIONS, runs, strict=True):
            seconds = _median(run, self.device)
            yield f"{seconds * 1e3:9.3f} ms {problem.flops(direction=direction) / seconds / 1e12:6.2f} T"


def _names(cls: type, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in vars(cls) if name.startswith(prefix)]


def _moved(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a tensor of the same values that lies differently in memory."""
    if kind == "heads_first":
        return tensor.transpose(1, -2).contiguous().transpose(1, -2)
    if kind == "misaligned":
        flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        return flat[1:].view(tensor.shape).copy_(tensor)
    return torch.cat([tensor, torch.full_like(tensor, math.nan)], -1)[..., : tensor.shape[-1]]


@contextlib.contextmanager
def raises(errors: Any, text: str) -> Iterator[None]:
    try:
        yield
    except errors as error:
        said = str(error)
    else:
        raise AssertionError("nothing was raised")
    assert text in said, f"it said: {said}"


def _median(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of a call: on a GPU by events, without the host's."""
    run()
    if device.type == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            run()
    times = []
    for _ in range(15):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    sys.exit(main())
