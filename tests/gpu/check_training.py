"""Checks of training on a GPU with tensor cores, from a bundle: gradients of every parameter, torch's ways to train.

Called like ``check.py`` beside it::

    python tests/gpu/check_training.py build FOLDER --target cuda:sm_90a
    python tests/gpu/check_training.py run FOLDER
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import check
import oracle

import na_compiler
from na_compiler.problem import Problem

BF16, FP16 = "bfloat16", "float16"
PROBLEMS = [
    Problem((40, 37), 3, 64, (7, 5), dtype=BF16),
    Problem((56, 56), 4, 32, 7, dtype=FP16),
    Problem((40, 40), 2, 128, 13, dtype=FP16),
    Problem((24, 61), 2, 64, 9, (4, 5), 1, (True, False), dtype=FP16),
    Problem((31, 45), 4, 64, 5, 1, (3, 2), heads_kv=1, dtype=FP16),
    Problem(1500, 2, 64, 600, 8, dtype=BF16),
    Problem(700, 4, 128, 129, is_causal=True, heads_kv=2, head_dim_v=64, dtype=BF16),
    Problem(1000, 1, 32, 40, 3, 8, dtype=BF16),
    Problem((5, 17, 33), 2, 80, (3, 5, 4), dtype=BF16),
    Problem((8, 12, 16), 4, 64, 3, (1, 2, 1), (2, 1, 3), (False, True, False), 2, additional_kv=True, dtype=BF16),
    Problem((12, 40), 2, 256, 7, dtype=BF16),
    Problem((12, 40), 1, 192, 7, head_dim_v=256, dtype=FP16),
    Problem((26, 30), 2, 72, 7, head_dim_v=40, dtype=BF16),
    Problem((26, 30), 2, 16, 7, head_dim_v=8, dtype=FP16),
    Problem((16, 20), 4, 64, 7, heads_kv=1, additional_kv=True, dtype=BF16),
    Problem((14, 14), 16, 32, 7, 1, 2, dtype=FP16),
    Problem((19, 21), 1, 64, 1, dtype=BF16),
    Problem((32, 32), 2, 64, 32, dtype=BF16),
    Problem((20, 20), 2, 40, 5, additional_kv=True, dtype=FP16),
    Problem((9, 10), 3, 72, (2, 10), (1, 4), (3, 1), dtype=FP16),
]
# One sweep makes all gradients of these: strides, causal windows of grouped heads, 3-D in other orders, dilation.
ONE_SWEEP = [
    Problem((128, 128), 6, 128, 48, 16, dtype=BF16),
    Problem((125, 131), 6, 128, 48, 1, 1, (True, False), heads_kv=3, dtype=FP16),
    Problem((16, 16, 32), 4, 128, (16, 12, 12), (1, 4, 8), dtype=FP16),
    Problem((255, 128), 6, 128, 48, 1, (2, 1), (True, False), heads_kv=3, dtype=BF16),
]
LAYER = Problem((24, 28), 4, 32, 7, dtype=FP16)
MEASURED = Problem((64, 64), 8, 64, 13, dtype=BF16)
LARGE = check.LARGE


def random_problems(count: int) -> list[Problem]:
    """Return problems of any parameters, the same for the machine that compiles and the one that runs."""
    draw = random.Random(20)
    found = []
    while len(found) < count:
        rank = draw.choice((1, 2, 3))
        axes = []
        for most in {1: (900,), 2: (40, 60), 3: (8, 14, 22)}[rank]:
            length = draw.randint(3, most)
            dilation = draw.choice((1, 1, 2, 3)) if length >= 8 else 1
            window = draw.randint(1, length // dilation)
            axes.append((length, window, draw.randint(1, window), dilation, draw.random() < 0.3))
        layout, kernel, stride, dilation, causal = map(tuple, zip(*axes, strict=True))
        unit = 16 if rank == 3 else 8
        dims = [unit * draw.randint(1, 256 // unit) if draw.random() < 0.4 else draw.choice((32, 64, 128))
                for _ in range(2)]  # fmt: skip
        heads_kv = draw.choice((1, 2))
        found.append(Problem(
            layout, heads_kv * draw.choice((1, 2, 3)), dims[0], kernel, stride, dilation, causal, heads_kv, dims[1],
            draw.random() < 0.25, draw.choice((BF16, FP16)),
        ))  # fmt: skip
    return found


RANDOM = random_problems(16)


def specs(target: str) -> Iterator[Any]:
    """Yield what has to be in the bundle."""
    for problem in dict.fromkeys([*PROBLEMS, *ONE_SWEEP, *RANDOM, LAYER, MEASURED, LARGE]):
        for direction in ("forward", "backward"):
            spec = na_compiler.KernelSpec.make(problem, target, direction)
            if target == "cuda:sm_90a" and direction == "backward":
                assert (type(spec.config).__name__ == "Sm90Fused") == (problem in ONE_SWEEP), spec
            yield spec


def main() -> int:
    """Build the bundle, or run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="cuda:sm_90a")
    parser.add_argument("--only", default="", help="run the checks whose name holds this")
    options = parser.parse_args()
    if options.command == "build":
        na_compiler.save_bundle(options.folder, specs(options.target))
        return 0
    na_compiler.load_bundle(options.folder)
    return Training("cuda").run(options.only)


class Training(check.Checks):
    """The checks, and how they went."""

    def checks(self) -> list[tuple[str, Any]]:
        """Return the checks by name."""
        problems = [
            (f"{problem}", lambda problem=problem: self.gradients(problem))
            for problem in [*PROBLEMS, *ONE_SWEEP, *RANDOM]
        ]
        names = [name.removeprefix("train_") for name in vars(Training) if name.startswith("train_")]
        return [*problems, *((name, getattr(self, f"train_{name}")) for name in names)]

    def times(self) -> None:
        """Print none: the bench does."""

    def gradients(self, problem: Problem) -> str:
        """Compare the operators' outputs and gradients with the reference; twice the same bits."""
        example = self.example(problem, batch=2)
        inputs = [tensor.requires_grad_() for tensor in example.inputs]
        runs = []
        for _ in range(2):
            output, lse = self.operate(problem, inputs)
            grads = torch.autograd.grad((output, lse), inputs, (example.grad_output, example.grad_lse))
            runs.append((output.detach(), lse.detach(), *grads))
        errors = oracle.check_forward(example, *runs[0][:2]) | oracle.check_backward(example, runs[0][2:])
        assert all(map(torch.equal, *runs)), "other bits in a second run"
        return " ".join(f"{name.replace('grad_', 'd_')}={error:.1e}" for name, error in errors.items())

    def train_views_of_a_fused_projection(self) -> None:
        """Nothing is copied, forward or backward; gradients of views are exact."""
        for problem in (LAYER, ONE_SWEEP[2]):
            example = self.example(problem, batch=2)
            fused = torch.stack(example.inputs, -3).requires_grad_()
            output, lse = self.operate(problem, list(fused.unbind(-3)))
            (grad,) = torch.autograd.grad((output, lse), fused, (example.grad_output, example.grad_lse))
            oracle.check_backward(example, grad.unbind(-3))

    def train_gradients_as_they_come(self) -> None:
        """Gradients of the output with other strides: heads first, misaligned, padded, expanded."""
        for problem in (ONE_SWEEP[2], LAYER):
            example = self.example(problem)
            for kind in ("heads_first", "misaligned", "padded"):
                inputs = [tensor.requires_grad_() for tensor in example.inputs]
                output, lse = self.operate(problem, inputs)
                moved = check._moved(example.grad_output, kind)
                grads = torch.autograd.grad((output, lse), inputs, (moved, example.grad_lse))
                oracle.check_backward(example, grads)
        inputs = [tensor.requires_grad_() for tensor in example.inputs]
        by_sum = torch.autograd.grad(self.operate(LAYER, inputs)[0].sum(), inputs)
        output, _ = self.operate(LAYER, inputs)
        by_ones = torch.autograd.grad(output, inputs, torch.ones_like(output))
        assert all(map(torch.equal, by_sum, by_ones))

    def train_checkpointing(self) -> None:
        """A forward computed again gives the same gradients, to the bit."""
        example = self.example(LAYER, batch=2)
        inputs = [tensor.requires_grad_() for tensor in example.inputs]
        plain = torch.autograd.grad(self.operate(LAYER, inputs), inputs, (example.grad_output, example.grad_lse))
        again = checkpoint(lambda *tensors: self.operate(LAYER, list(tensors)), *inputs, use_reentrant=False)
        grads = torch.autograd.grad(again, inputs, (example.grad_output, example.grad_lse))
        assert all(map(torch.equal, plain, grads))

    def train_grad_scaler(self) -> str:
        """Autocast to float16 with a GradScaler: a layer learns, and no step is skipped once the scale has settled."""
        torch.manual_seed(0)
        layer = na_compiler.NeighborhoodAttention2D(128, 4, kernel_size=7).to(self.device)
        x, target = torch.randn(2, 2, 24, 28, 128, device=self.device)
        optimizer, scaler = torch.optim.Adam(layer.parameters(), 3e-3), torch.amp.GradScaler()
        losses = []
        for _ in range(30):
            with torch.autocast("cuda", torch.float16):
                loss = (layer(x).float() - target).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0], losses
        return f"loss {losses[0]:.3f} to {losses[-1]:.3f}, scale {scaler.get_scale():.0f}"

    def train_compiled_steps(self) -> str:
        """`torch.compile` of a training step, in every mode."""
        example = self.example(LAYER, batch=2)
        done = []
        for mode in ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"):
            torch._dynamo.reset()

            def step(*tensors: torch.Tensor) -> torch.Tensor:
                output, lse = self.operate(LAYER, list(tensors))
                return (output * example.grad_output).sum(dtype=torch.float32) + (lse * example.grad_lse).sum()

            compiled = torch.compile(step, mode=mode, fullgraph=True)
            for _ in range(3):
                inputs = [tensor.clone().requires_grad_() for tensor in example.inputs]
                torch.compiler.cudagraph_mark_step_begin()
                compiled(*inputs).backward()
                oracle.check_backward(example, [tensor.grad.clone() for tensor in inputs])
            done.append(mode)
        return ", ".join(done)

    def train_memory(self) -> str:
        """What a backward takes beside its gradients is its workspace."""
        return "; ".join(self._memory(problem) for problem in (MEASURED, ONE_SWEEP[0]))

    def _memory(self, problem: Problem) -> str:
        example = self.example(problem, batch=4)
        inputs = [tensor.requires_grad_() for tensor in example.inputs]
        kernel = self.kernel(problem, "backward")
        spaces = sum(4 * math.prod(shape) for shape in kernel.info.workspace.shapes(4))
        gradients = sum(2 * tensor.numel() for tensor in inputs)
        output, lse = self.operate(problem, inputs)
        torch.autograd.grad((output, lse), inputs, (example.grad_output, example.grad_lse), retain_graph=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad((output, lse), inputs, (example.grad_output, example.grad_lse), retain_graph=True)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - gradients
        assert extra <= spaces + 4096, (extra, spaces)
        return f"{extra} bytes beside {gradients} of gradients; the workspace has {spaces}"

    def train_past_two_to_the_31(self) -> str:
        """Offsets of 64 bits: gradients of the last batch entry."""
        batch = 40
        shape = (batch, *LARGE.layout, LARGE.heads, LARGE.head_dim)
        assert math.prod(shape) > 2**31
        tokens = torch.tensor([0, 1, 30000, 65534, 65535], device=self.device)
        inputs = [torch.randn(shape, device=self.device, dtype=torch.bfloat16) for _ in range(3)]
        grad = torch.zeros(shape, device=self.device, dtype=torch.bfloat16)
        grad[:, tokens] = torch.randn(batch, len(tokens), *shape[2:], device=self.device).bfloat16()
        leaves = [tensor.requires_grad_() for tensor in inputs]
        output, _ = self.operate(LARGE, leaves)
        grads = torch.autograd.grad(output, leaves, grad)
        worst = 0.0
        for entry in (0, batch - 1):
            exact = [tensor[entry : entry + 1].detach().double().requires_grad_() for tensor in inputs]
            expected, _ = check.neighborhood_attention(*exact, LARGE.kernel_size, tokens=tokens)
            references = torch.autograd.grad(expected, exact, grad[entry : entry + 1][:, tokens].double())
            for found, reference in zip(grads, references, strict=True):
                error = (found[entry : entry + 1].double() - reference).norm() / reference.norm()
                worst = max(worst, error.item())
        assert worst < oracle.TOLERANCE["bfloat16"], worst
        return f"{math.prod(shape) / 2**31:.2f} * 2**31 elements, error {worst:.1e}"


if __name__ == "__main__":
    sys.exit(main())
