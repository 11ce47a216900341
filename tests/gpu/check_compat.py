"""Checks of models written for NATTEN on a GPU, from a bundle: the names of its versions, as such models call them.

Called like ``check.py`` beside it::

    python tests/gpu/check_compat.py build FOLDER --target cuda:sm_90a
    python tests/gpu/check_compat.py run FOLDER

Prints a line for each model: errors of its output and of its gradients, relative to attention by the reference in
float64 on the CPU, and milliseconds of a forward and of both passes. The exit status is the number that failed.
``--device cpu`` rehearses it.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import na_compiler
from na_compiler import passes
from na_compiler.compat import natten as compat
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention

LIMITS = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
BIAS = ("relative_position_bias",)
REPEATS = 10


class Block(nn.Module):
    """A block of a model that calls functions of its own choice: projections around ``attend(query, key, value)``."""

    def __init__(self, case: Case, attend: Callable[..., torch.Tensor], *, heads_first: bool) -> None:
        super().__init__()
        dim = case.heads * case.head_dim
        self.heads, self.attend, self.heads_first = case.heads, attend, heads_first
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        table = torch.empty(case.heads, *[2 * case.kernel_size - 1] * len(case.layout))
        self.rpb = nn.Parameter(nn.init.trunc_normal_(table)) if case.has_bias else None
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend, in ``[batch, *layout, channels]``."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if not self.heads_first:
            return self.proj(self.attend(query, key, value, self.rpb).flatten(-2))  # type: ignore[no-any-return]
        query, key, value = (tensor.movedim(-2, 1) for tensor in (query, key, value))
        attended = self.attend(query * query.shape[-1] ** -0.5, key, value, self.rpb, self.dropout)
        return self.proj(attended.movedim(1, -2).flatten(-2))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """A model, the version of NATTEN that it was written for, and what it computes.

    Parameters
    ----------
    make
        Of the module ``natten`` and the case.
    is_fused
        Whether a kernel computes it; otherwise plain torch does.
    """

    name: str
    version: str
    make: Callable[[Any, Case], nn.Module]
    layout: tuple[int, ...] = (28, 28)
    kernel_size: int = 7
    dilation: int = 1
    stride: int = 1
    is_causal: bool = False
    has_bias: bool = True
    dtype: str = "float32"
    is_fused: bool = True
    heads: int = 4
    head_dim: int = 32

    def problem(self) -> Problem:
        """Return what its kernel computes: layers of before pad inputs that are smaller than the window."""
        layout = [max(extent, self.kernel_size * self.dilation) for extent in self.layout]
        causal = [self.is_causal, *[False] * (len(layout) - 1)]
        operands = BIAS if self.has_bias else ()
        parameters = (self.kernel_size, self.stride, self.dilation, causal)
        return Problem(layout, self.heads, self.head_dim, *parameters, dtype=self.dtype, operands=operands)


def split_2d(natten: Any, case: Case) -> nn.Module:
    """NAT's and DiNAT's way: three operators, a softmax and dropout."""
    functional = natten.functional

    def attend(query: Any, key: Any, value: Any, rpb: Any, dropout: Any) -> torch.Tensor:
        scores = functional.natten2dqkrpb(query, key, rpb, case.kernel_size, case.dilation)
        sums: torch.Tensor = functional.natten2dav(dropout(scores.softmax(-1)), value, case.kernel_size, case.dilation)
        return sums

    return Block(case, attend, heads_first=True)


def split_1d(natten: Any, case: Case) -> nn.Module:
    """The names of 0.17, causal."""
    functional, parameters = natten.functional, {"kernel_size": case.kernel_size, "dilation": case.dilation}
    parameters |= {"is_causal": case.is_causal}

    def attend(query: Any, key: Any, value: Any, rpb: Any, dropout: Any) -> torch.Tensor:
        scores = functional.na1d_qk(query, key, **parameters, rpb=rpb)
        sums: torch.Tensor = functional.na1d_av(dropout(scores.softmax(-1)), value, **parameters)
        return sums

    return Block(case, attend, heads_first=True)


def fused_017(natten: Any, case: Case) -> nn.Module:
    """The function of 0.17, of which the fifth argument is the dilation."""

    def attend(query: Any, key: Any, value: Any, rpb: Any) -> torch.Tensor:
        output: torch.Tensor = natten.functional.na2d(query, key, value, case.kernel_size, case.dilation, False, rpb)
        return output

    return Block(case, attend, heads_first=False)


def function(natten: Any, case: Case) -> nn.Module:
    """The functions of 0.21."""
    parameters: Any = (case.kernel_size, case.stride, case.dilation)
    causal = [case.is_causal, *[False] * (len(case.layout) - 1)]

    def attend(query: Any, key: Any, value: Any, _: Any) -> torch.Tensor:
        call = getattr(natten, f"na{len(case.layout)}d")
        output: torch.Tensor = call(query, key, value, *parameters, is_causal=causal, backend="hopper-fna")
        return output

    return Block(case, attend, heads_first=False)


def layer(**options: Any) -> Callable[[Any, Case], nn.Module]:
    """Return what makes a layer of its own."""

    def make(natten: Any, case: Case) -> nn.Module:
        kind = getattr(natten, f"NeighborhoodAttention{len(case.layout)}D")
        width = "embed_dim" if case.version == "0.21" else "dim"
        stride = {"stride": case.stride} if case.version == "0.21" else {}
        dim = {width: case.heads * case.head_dim, "num_heads": case.heads}
        made: nn.Module = kind(**dim, kernel_size=case.kernel_size, dilation=case.dilation, **stride, **options)
        return made

    return make


CASES = [
    Case("NAT, split", "0.14", split_2d, is_fused=False),
    Case("DiNAT, split", "0.15", split_2d, dilation=4, is_fused=False),
    Case("split, causal", "0.17", split_1d, (200,), is_causal=True, is_fused=False),
    Case("split, half", "0.15", split_2d, dtype="float16", is_fused=False),
    Case("layer", "0.15", layer(bias=True), dilation=4),
    Case("layer, padded", "0.15", layer(bias=True), (5, 12)),
    Case("layer, half", "0.15", layer(bias=True), dtype="float16"),
    Case("na2d", "0.17", fused_017, dilation=2),
    Case("na2d, bfloat16", "0.17", fused_017, dilation=2, dtype="bfloat16"),
    Case("layer, 3-D", "0.17", layer(rel_pos_bias=True), (6, 8, 9), 3, 2),
    Case("layer", "0.21", layer(), stride=2, has_bias=False),
    Case("layer, half", "0.21", layer(), stride=2, has_bias=False, dtype="float16"),
    Case("na1d, causal", "0.21", function, (300,), 33, has_bias=False, is_causal=True, dtype="bfloat16"),
    Case("na3d", "0.21", function, (6, 8, 9), 3, 2, has_bias=False),
]
# A model that splits, in a graph: the passes put a kernel in the place of its operators.
FUSED_BY_PASSES = Case("DiNAT, fused by passes", "0.15", split_2d, dilation=4)


def specs(target: str) -> Iterator[Any]:
    """Yield what has to be in the bundle."""
    for problem in dict.fromkeys(case.problem() for case in (*CASES, FUSED_BY_PASSES) if case.is_fused):
        for direction in ("forward", "backward"):
            yield na_compiler.KernelSpec.make(problem, target, direction)


def expected(case: Case, state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Compute what a model computes, from its parameters in float64."""
    more = [0, 0]
    for extent in reversed(x.shape[1:-1]):
        more += [0, max(case.kernel_size * case.dilation - extent, 0)]
    qkv = nn.functional.linear(nn.functional.pad(x, more), state["qkv.weight"], state["qkv.bias"])
    query, key, value = qkv.unflatten(-1, (3, case.heads, -1)).unbind(-3)
    parameters = (case.kernel_size, case.stride, case.dilation, case.problem().is_causal)
    output, _ = neighborhood_attention(query, key, value, *parameters, relative_position_bias=state.get("rpb"))
    output = output.flatten(-2)[(slice(None), *(slice(extent) for extent in x.shape[1:-1]))]
    return nn.functional.linear(output, state["proj.weight"], state["proj.bias"])


def error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the relative error."""
    return float((value.detach().double().cpu() - wanted).norm() / wanted.norm())


def check(case: Case, device: torch.device, *, is_exported: bool = False) -> str:
    """Run a model as it is, compare it, and say how it went."""
    compat.uninstall()
    assert compat.install(case.version)
    natten = importlib.import_module("natten")
    importlib.import_module("natten.functional")
    assert natten.__version__.startswith(case.version), natten.__version__
    dtype = getattr(torch, case.dtype)
    model = case.make(natten, case).to(device, dtype).eval()
    x = torch.randn(2, *case.layout, case.heads * case.head_dim, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(x.shape, device=device, dtype=dtype)
    call: Callable[..., torch.Tensor] = model
    parameters = dict(model.named_parameters())
    if is_exported:
        program = torch.export.export(model, (x.detach(),), strict=False)
        assert passes.canonicalise(program) == 1
        call = program.module()
        parameters = dict(call.named_parameters())  # type: ignore[attr-defined]
    inputs = [x, *parameters.values()]

    def both() -> tuple[torch.Tensor, ...]:
        output = call(x)
        return output, *torch.autograd.grad(output, inputs, grad)

    results = both()
    state = {name: tensor.detach().double().cpu().requires_grad_() for name, tensor in parameters.items()}
    wide = x.detach().double().cpu().requires_grad_()
    wanted = expected(case, state, wide)
    gradients = torch.autograd.grad(wanted, [wide, *state.values()], grad.double().cpu())
    errors = [error(one, other) for one, other in zip(results, (wanted.detach(), *gradients), strict=True)]
    assert max(errors) < LIMITS[case.dtype], errors
    with torch.no_grad():
        forward = milliseconds(lambda: call(x), device)
    return f"{errors[0]:8.1e} {max(errors[1:]):8.1e} {forward:8.2f} {milliseconds(both, device):8.2f}"


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median time of some runs."""
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - started))
    return statistics.median(found)


def main() -> int:
    """Build the bundle, or run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="cuda:sm_90a")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.command == "build":
        na_compiler.save_bundle(options.folder, specs(options.target))
        return 0
    na_compiler.load_bundle(options.folder)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, seed {torch.initial_seed()}")
    print(f"{'natten':6} {'model':24} {'dtype':9} {'output':>8} {'grads':>8} {'fwd ms':>8} {'both ms':>8}")
    failed = 0
    with na_compiler.compiling(False):  # What is not in the bundle is an error, not a compilation.
        for case in (*CASES, FUSED_BY_PASSES):
            try:
                said = check(case, device, is_exported=case is FUSED_BY_PASSES)
            except Exception as failure:  # noqa: BLE001
                traceback.print_exc()
                failed, said = failed + 1, f"FAILED {type(failure).__name__}: {failure}"
            print(f"{case.version:6} {case.name:24} {case.dtype:9} {said}", flush=True)
    print(f"{failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())
