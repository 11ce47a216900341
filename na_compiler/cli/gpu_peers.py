"""What ``na-compile bench`` times on a GPU: this package, and other ways to attend, each a function of no arguments.

All but FA4 take their inputs as they lie, heads last, and nothing is copied; what can be prepared beforehand is not
timed. FA4's tokens are put in its order beforehand (`na_compiler.cli.fa4`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from na_compiler.cli import fa4
from na_compiler.cli.gpu_suites import Row
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention, neighborhood_mask

__all__ = ["PEERS", "Inputs", "Peer", "dense", "missing"]

# Tokens of some heads that are compared with the reference.
_SAMPLE = 128
_HEADS = 3
# Queries whose masks are made at once.
_ROWS = 4096
# Relative error up to which a result of 16 bits counts as right.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Peer:
    """What is timed.

    Parameters
    ----------
    call
        Returns an output, or the gradients of query, key and value.
    natural
        Returns what the call did as ``[batch, *layout, heads, head_dim]``, to be compared. Default: it is that.
    """

    call: Callable[[], object]
    natural: Callable[[object], object] = lambda result: result


def dense(problem: Problem) -> Problem:
    """Return the problem without windows: each token sees all."""
    return problem.replace(kernel_size=problem.layout, stride=1, dilation=1)


class Inputs:
    """Tensors of one row on the GPU, and what the reference makes of some of their tokens."""

    def __init__(self, row: Row, direction: str) -> None:
        self.problem, self.direction = row.problem, direction
        problem = row.problem
        shape = (row.batch, *problem.layout, problem.heads, problem.head_dim)
        dtype = getattr(torch, problem.dtype)
        *tensors, self.grad = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4))
        self.tensors = [tensor.requires_grad_(direction == "backward") for tensor in tensors]
        self._found: dict[Problem, Tensor] = {}
        self.tokens = torch.randperm(problem.tokens, device="cuda")[:_SAMPLE]

    def heads_first(self) -> list[Tensor]:
        """Return ``[batch, heads, tokens, head_dim]``: views of leaves, nothing is copied."""
        return [tensor.flatten(1, -3).transpose(1, 2) for tensor in self.tensors]

    def call(self, attend: Callable[[], Tensor], heads_first: bool) -> Callable[[], object]:
        """Return what is timed: the forward, or the gradients of what it returned."""
        if self.direction == "forward":
            # Views of what comes out.
            return (lambda: attend().transpose(1, 2).unflatten(1, self.problem.layout)) if heads_first else attend
        output = attend()
        grad = self.grad.flatten(1, -3).transpose(1, 2) if heads_first else self.grad
        return lambda: torch.autograd.grad(output, self.tensors, grad, retain_graph=True)

    def check(self, name: str, result: object, problem: Problem) -> None:
        """Compare an output, or gradients, with the float64 reference, for some tokens of some heads.

        Raises
        ------
        RuntimeError
            If they differ.
        """
        first = range(0, problem.heads, max(problem.heads // _HEADS, 1))
        results: list[Tensor] = [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]
        for head in first:
            expected = self._expected(problem, head)
            for got, reference in zip(results, expected, strict=True):
                some = got[0].flatten(0, -3)[self.tokens, head].double()
                error = ((some - reference).norm() / reference.norm()).item()
                if not error < _TOLERANCE:
                    raise RuntimeError(f"{name} is wrong: relative error {error:.1e}")

    def _expected(self, problem: Problem, head: int) -> list[Tensor]:
        one = [tensor.detach()[:1, ..., head : head + 1, :].double() for tensor in self.tensors]
        output, lse = _reference(problem, one, self.tokens)
        if self.direction == "forward":
            return [output[0, :, 0]]
        return self._gradients(problem, one, self.grad[0, ..., head, :].flatten(0, -2).double(), output, lse)

    def _gradients(
        self, problem: Problem, one: list[Tensor], grad: Tensor, output: Tensor, lse: Tensor
    ) -> list[Tensor]:
        """Return the gradients of the sampled queries, and of the sampled keys, which all queries are asked for."""
        query, key, value = (tensor.flatten(0, -2) for tensor in one)
        scale, tokens = problem.head_dim**-0.5, self.tokens
        found: list[Tensor] = []

        def slopes(rows: Tensor, columns: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
            mask = neighborhood_mask(problem, rows)[:, columns]
            weights = (scale * query[rows] @ key[columns].T - lse[:, None]).exp().where(mask, 0.0)
            delta = (output * grad[rows]).sum(-1, keepdim=True)
            return weights, weights * (grad[rows] @ value[columns].T - delta)

        everything = torch.arange(problem.tokens, device="cuda")
        _, slope = slopes(tokens, everything, output[0, :, 0], lse[0, :, 0])
        found.append(scale * slope @ key)
        sums = [torch.zeros_like(key[tokens]), torch.zeros_like(value[tokens])]
        for rows in self._askers(problem).split(_ROWS):
            output, lse = _reference(problem, one, rows)
            weights, slope = slopes(rows, tokens, output[0, :, 0], lse[0, :, 0])
            sums[0] += scale * slope.T @ query[rows]
            sums[1] += weights.T @ grad[rows]
        return [*found, *sums]

    def _askers(self, problem: Problem) -> Tensor:
        """Return the queries that see one of the sampled keys."""
        if problem not in self._found:
            everything = torch.arange(problem.tokens, device="cuda")
            parts = [rows[neighborhood_mask(problem, rows)[:, self.tokens].any(1)] for rows in everything.split(_ROWS)]
            self._found[problem] = torch.cat(parts)
        return self._found[problem]


def _reference(problem: Problem, tensors: list[Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    query, key, value = tensors
    rule = (problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)
    return neighborhood_attention(query, key, value, *rule, tokens=tokens)


def ours(inputs: Inputs) -> Peer:
    """Attend by this package's operator."""
    from na_compiler.functional import na1d, na2d, na3d  # noqa: PLC0415

    problem = inputs.problem
    attend: Callable[..., Tensor] = {1: na1d, 2: na2d, 3: na3d}[problem.rank]
    rule = {"stride": problem.stride, "dilation": problem.dilation, "is_causal": problem.is_causal}
    call = functools.partial(attend, *inputs.tensors, problem.kernel_size, **rule)
    return Peer(inputs.call(call, heads_first=False))


def cudnn(inputs: Inputs) -> Peer:
    """CuDNN's dense attention over the same tokens."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: PLC0415

    query, key, value = inputs.heads_first()

    def attend() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(query, key, value)

    return Peer(inputs.call(attend, heads_first=True))


def flex(inputs: Inputs) -> Peer:
    """Attend by compiled FlexAttention with the neighborhood as its block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: PLC0415

    problem = inputs.problem

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        seen = None
        axes = zip(problem.layout, problem.kernel_size, problem.stride, problem.dilation, strict=True)
        for extent, kernel, stride, dilation in reversed(list(axes)):
            own, other = query % extent, key % extent
            length = (extent - own % dilation + dilation - 1) // dilation
            leader = torch.minimum(own // dilation // stride * stride + stride // 2, length - 1)
            start = torch.minimum((leader - kernel // 2).clamp(min=0), length - kernel)
            place = other // dilation
            along = (own % dilation == other % dilation) & (place >= start) & (place < start + kernel)
            seen = along if seen is None else seen & along
            query, key = query // extent, key // extent
        assert seen is not None
        return seen

    blocks = create_block_mask(sees, None, None, problem.tokens, problem.tokens, device="cuda", _compile=True)
    # Dynamo gives a function up after some shapes, and each row brings its own.
    torch.compiler.reset()
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    tensors = inputs.heads_first()
    return Peer(inputs.call(functools.partial(compiled, *tensors, block_mask=blocks), heads_first=True))


def block_sparse(inputs: Inputs) -> Peer:
    """Attend by FA4's block-sparse kernel, on tokens that are in the order of its tiles already."""
    problem = inputs.problem
    refused = fa4.refusal(problem)
    if refused is not None:
        raise RuntimeError(refused)
    tiles = fa4.Tiles.of(problem)
    kinds = (tiles.query, tiles.key, tiles.key)
    tensors = [
        fa4.in_tiles(tensor.detach(), tile).requires_grad_(tensor.requires_grad)
        for tensor, tile in zip(inputs.tensors, kinds, strict=True)
    ]
    attend = functools.partial(fa4.attention(problem, tiles), *tensors)
    if inputs.direction == "forward":
        return Peer(attend, lambda output: fa4.in_layout(output, problem.layout, tiles.query))  # type: ignore[arg-type]
    output, grad = attend(), fa4.in_tiles(inputs.grad, tiles.query)

    def natural(gradients: object) -> list[Tensor]:
        given: list[Tensor] = list(gradients)  # type: ignore[call-overload]
        return [fa4.in_layout(one, problem.layout, tile) for one, tile in zip(given, kinds, strict=True)]

    return Peer(lambda: torch.autograd.grad(output, tensors, grad, retain_graph=True), natural)


def missing(name: str) -> str | None:
    """Return in a sentence why a competitor cannot run here at all; ``None`` if it may."""
    return fa4.missing() if name == "FA4 kernel" else None


PEERS: dict[str, Callable[[Inputs], Peer]] = {
    "ours": ours,
    "FA4 kernel": block_sparse,
    "FlexAttention": flex,
    "cuDNN, dense": cudnn,
}
